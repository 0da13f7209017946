"""`merged.open.html` in a real browser, against a page that answers as the Perfetto UI does."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import threading
import urllib.parse
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from pytest_sglprof._report import perfetto

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
# Answers every PING, and tells the test what it was handed over and how it was opened.
INTERFACE = """<!DOCTYPE html><script>
window.addEventListener("message", async (event) => {
  if (event.source !== window.opener) return;
  if (event.data === "PING") { event.source.postMessage("PONG", "*"); return; }
  const {buffer, title, fileName} = event.data.perfetto;
  const hash = new Uint8Array(await crypto.subtle.digest("SHA-256", buffer));
  await fetch("/told", {method: "POST", body: JSON.stringify({
    title, fileName, keys: Object.keys(event.data), hash: location.hash,
    sha: Array.from(hash, (byte) => byte.toString(16).padStart(2, "0")).join("")})});
});
</script>"""


class Interface(ThreadingHTTPServer):
    """A stand-in for ui.perfetto.dev on this machine."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.told: list[dict[str, Any]] = []
        self.heard = threading.Event()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Interface

    def do_GET(self) -> None:
        self._answer(INTERFACE.encode())

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.told.append(json.loads(body))
        self._answer(b"")
        self.server.heard.set()

    def _answer(self, body: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/html; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Silent."""


@pytest.fixture
def interface() -> Iterator[Interface]:
    server = Interface()
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def test_the_trace_is_handed_over_whole_with_the_commands(
    tmp_path: Path, interface: Interface, monkeypatch: pytest.MonkeyPatch
) -> None:
    if CHROMIUM is None:
        pytest.skip("no chromium to open the page in")
    monkeypatch.setattr(perfetto, "PERFETTO", interface.address)
    trace = tmp_path / "merged <script><b>&\"'.json.gz"
    trace.write_bytes(bytes(range(256)) * 400)
    page = perfetto.write_open_page(trace, ["TP0", "DP1 TP1"])
    # Nobody is there to click; the rest of the page is as it was written.
    click = "<script>setInterval(() => button.disabled || handle || button.click(), 50)</script>"
    page.write_text(page.read_text().replace("</body>", f"{click}</body>"))
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run"]
    command += ["--disable-popup-blocking", f"--user-data-dir={tmp_path / 'profile'}"]
    command += ["--remote-debugging-port=0", page.as_uri()]
    with (tmp_path / "log").open("wb") as log:
        browser = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            assert interface.heard.wait(60), (tmp_path / "log").read_text()[-2000:]
        finally:
            browser.terminate()
            browser.wait(20)
    told = interface.told[0]
    assert told["sha"] == hashlib.sha256(trace.read_bytes()).hexdigest()
    assert told["title"] == told["fileName"] == trace.name
    assert told["keys"] == ["perfetto"]
    query = urllib.parse.urlsplit(told["hash"].removeprefix("#!")).query
    commands = json.loads(urllib.parse.parse_qs(query)["startupCommands"][0])
    assert commands == perfetto.startup_commands(["TP0", "DP1 TP1"])
    assert len(interface.told) == 1


def test_hostile_rank_names_stay_one_pattern() -> None:
    pattern = perfetto.startup_commands(["TP0|.*", "a(b"])[1]["args"]
    assert pattern == [r"^(TP0\|\.\*|a\(b) stream \d+"]
