"""Starts stand-ins for tests, on ports that the system picks."""

from __future__ import annotations

import contextlib
import os
import re
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil

ROOT = Path(__file__).resolve().parents[2]
PATIENCE = 30.0


class Running:
    """One stand-in process, its log and a client for it."""

    def __init__(self, process: subprocess.Popen[bytes], log: Path, ca: Path | None = None) -> None:
        self.process = process
        self.log_file = log
        self.url = ""
        # After a 500 the server closes the connection: a kept one could meet its end.
        limits = httpx.Limits(max_keepalive_connections=0)
        verify = ssl.create_default_context(cafile=ca) if ca else False
        self.http = httpx.Client(timeout=PATIENCE, limits=limits, verify=verify)

    @property
    def log(self) -> str:
        return self.log_file.read_text(errors="replace")

    def lines(self, pattern: str) -> list[str]:
        return [line for line in self.log.splitlines() if re.search(pattern, line)]

    def get(self, path: str, **options: Any) -> httpx.Response:
        return self.http.get(self.url + path, **options)

    def post(self, path: str, body: Any = None, **options: Any) -> httpx.Response:
        return self.http.post(self.url + path, json=body, **options)

    def generate(self, tokens: int, text: str = "one two three", **body: Any) -> dict[str, Any]:
        sampling = {"max_new_tokens": tokens, "ignore_eos": True}
        reply = self.post("/generate", {"text": text, "sampling_params": sampling, **body})
        reply.raise_for_status()
        answer: dict[str, Any] = reply.json()
        return answer

    def ranks(self) -> list[psutil.Process]:
        children = psutil.Process(self.process.pid).children(recursive=True)
        return [p for p in children if p.cmdline()[:1][0].startswith("sglang::")]


def wait_for(what: Callable[[], Any], patience: float = PATIENCE) -> Any:
    """The first true answer of `what`."""
    deadline = time.monotonic() + patience
    while not (found := what()):
        assert time.monotonic() < deadline, f"never: {what}"
        time.sleep(0.02)
    return found


def end(process: subprocess.Popen[bytes], tree: list[psutil.Process], *, patience: float) -> None:
    """SIGTERM, and SIGKILL to whatever of the process and its `tree` is left after it."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(patience)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    for left in psutil.wait_procs(tree, timeout=patience / 2)[1]:
        left.kill()


@contextlib.contextmanager
def standin(
    folder: Path,
    *arguments: str,
    env: dict[str, str] | None = None,
    ready: bool = True,
    ca: Path | None = None,
) -> Iterator[Running]:
    """A running stand-in; whatever is left of it is killed at the end.

    ca: whom its certificate is trusted by; it is then called localhost.
    """
    log = folder / "server.log"
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    with log.open("ab") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "pytest_sglprof.standin", "--port", "0", *arguments],
            stdout=file,
            stderr=file,
            env={**os.environ, "PYTHONPATH": path, "TMPDIR": str(folder), **(env or {})},
            start_new_session=True,
        )
    running = Running(process, log, ca)
    tree: list[psutil.Process] = []
    try:
        if ready:

            def is_up() -> bool:
                assert process.poll() is None, running.log
                return "ready to roll" in running.log

            wait_for(is_up)
            running.url = re.findall(r"running on (https?://\S+)", running.log)[0]
            running.url = running.url.replace("127.0.0.1", "localhost") if ca else running.url
            tree = psutil.Process(process.pid).children(recursive=True)
        yield running
    finally:
        running.http.close()
        end(process, tree, patience=10)
