"""A tiny HTTP server that answers as a profiled SGLang does, and the object around it.

It has knobs for each way in which the real one misbehaves; the traces it writes are small
but real gzip of real JSON.
"""

from __future__ import annotations

import contextlib
import gzip
import json
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from pytest_sglprof._config.model import ServerSpec
from pytest_sglprof._errors import LeaseError, ServerDied
from pytest_sglprof._server.client import SglangClient
from pytest_sglprof._server.log import ServerLog
from pytest_sglprof._server.sizes import ServerSizes

TRACE = {"traceEvents": [{"ph": "X", "name": "step[DECODE bs=4]", "ts": 1.0, "dur": 2.0}]}


class FakeSglang:
    """The HTTP side. steps_end: a step window ends by itself (False: the server is idle)."""

    def __init__(self, folder: Path, sizes: ServerSizes | None = None) -> None:
        self.sizes = sizes or ServerSizes(tp=2, device="cpu", version="0.5.23")
        self.log_path = folder / "server.log"
        self.log_path.touch()
        self.requests: list[tuple[str, Any]] = []
        self.steps_end = True
        self.silent_ranks: set[str] = set()
        self.cut_ranks: set[str] = set()
        self.stop_hangs = 0.0
        self.start_status = 200
        self.stop_404 = False
        self.running = 4
        self.on_start: Callable[[dict[str, Any]], None] = lambda body: None
        self.on_stop: Callable[[], None] = lambda: None
        self.on_recorder: Callable[[str], int] = lambda action: 200
        self.delay_write = 0.0
        self.auth = ""
        # Path -> what it answers instead, one after another: a status, a text of status 200,
        # "reset" and "half" (of an answer).
        self.instead: dict[str, Iterator[int | str]] = {}
        self.current: dict[str, Any] | None = None
        handler = self._handler()
        self._httpd = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._httpd.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._httpd.server_address[1]}"
        self._thread = threading.Thread(target=self._httpd.serve_forever, args=(0.01,))
        self._thread.start()

    def close(self) -> None:
        self._httpd.shutdown()
        self._httpd.server_close()
        self._thread.join()

    def log(self, text: str) -> None:
        with self.log_path.open("a") as stream:
            stream.write(text + "\n")

    def entry(self, rank: str, text: str) -> None:
        self.log(f"[2026-11-24 03:12:05 {rank}] {text}")

    def start(self, body: dict[str, Any]) -> int:
        if self.start_status != 200:
            self.log("RuntimeError: Profiling is already in progress. Call /stop_profile first.")
            return self.start_status
        self.on_start(body)
        if body.get("start_step") and body["start_step"] > 10**12:
            return 200
        self.current = dict(body)
        for rank in self.sizes.ranks():
            self.entry(
                rank.label,
                f"Profiling starts. Traces will be saved to: {body.get('output_dir')} "
                f"(with profile id: {body.get('profile_id')})",
            )
        if body.get("num_steps") and self.steps_end:
            self.entry("TP0", "Decode batch, #running-req: 4, #token: 318")
            threading.Thread(target=self.finish, daemon=True).start()
        return 200

    def finish(self) -> None:
        body, self.current = self.current, None
        if body is None or "output_dir" not in body:
            return
        time.sleep(self.delay_write)
        for rank in self.sizes.ranks():
            if rank.label in self.silent_ranks:
                continue
            parts = [f"TP-{rank.tp}"]
            parts += [f"DP-{rank.dp}"] if rank.dp is not None else []
            stages = ["-EXTEND", "-DECODE"] if body.get("profile_by_stage") else [""]
            prefix = f"{body['profile_prefix']}-" if body.get("profile_prefix") else ""
            for stage in stages:
                name = f"{prefix}{body['profile_id']}-{'-'.join(parts)}{stage}.trace.json.gz"
                data = gzip.compress(json.dumps(TRACE).encode())
                if rank.label in self.cut_ranks:
                    data = data[:-9]
                (Path(body["output_dir"]) / name).write_bytes(data)
            self.entry(rank.label, f"Profiling done. Traces are saved to: {body['output_dir']}")

    def stop(self) -> int:
        self.on_stop()
        if self.stop_hangs:
            time.sleep(self.stop_hangs)
        if self.current is None:
            self.log("RuntimeError: Profiling is not in progress. Call /start_profile first.")
            return 500
        self.finish()
        return 200

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        fake = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *args: Any) -> None:
                pass

            def _answer(self, status: int, body: Any = "") -> None:
                data = (body if isinstance(body, str) else json.dumps(body)).encode()
                with contextlib.suppress(OSError):
                    self.send_response(status)
                    self.send_header("Content-Length", str(len(data)))
                    self.end_headers()
                    self.wfile.write(data)

            def do_GET(self) -> None:
                fake.requests.append((self.path, dict(self.headers)))
                instead = next(fake.instead.get(self.path.partition("?")[0], iter(())), None)
                if instead is not None:
                    return self._answer_instead(instead)
                if fake.auth and self.headers.get("Authorization") != f"Bearer {fake.auth}":
                    return self._answer(401, {"error": "Unauthorized"})
                if self.path.partition("?")[0] == "/v1/loads":
                    half = fake.running // 2
                    loads = [
                        {"dp_rank": rank, "num_running_reqs": running}
                        for rank, running in enumerate((half, fake.running - half))
                    ]
                    return self._answer(200, {"loads": loads})
                if self.path == "/server_info":
                    return self._answer(200, {"tp_size": 2})
                if self.path == "/ready":
                    return self._answer(200)
                return self._answer(404)

            def _answer_instead(self, instead: int | str) -> None:
                if isinstance(instead, int):
                    return self._answer(instead)
                if instead == "half":
                    self.send_response(200)
                    self.send_header("Content-Length", "1000")
                    self.end_headers()
                    self.wfile.write(b'{"loads": [')
                elif instead != "reset":
                    return self._answer(200, instead)
                self.close_connection = True
                return None

            def do_POST(self) -> None:
                data = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                body = json.loads(data) if data else {}
                fake.requests.append((self.path, body))
                if self.path == "/start_profile":
                    return self._answer(fake.start(body), "Start profiling.\n")
                if self.path == "/end_profile" or (
                    self.path == "/stop_profile" and not fake.stop_404
                ):
                    return self._answer(fake.stop())
                if self.path.endswith("_expert_distribution_record"):
                    action = self.path[1:].partition("_")[0]
                    return self._answer(fake.on_recorder(action))
                return self._answer(404)

        return Handler

    def bodies(self, path: str = "/start_profile") -> list[Any]:
        return [body for where, body in self.requests if where == path]


class FakeServer:
    """The object that the rest of the plugin would hand to a window."""

    def __init__(self, folder: Path, http: FakeSglang, spec: ServerSpec | None = None) -> None:
        self.http = http
        self.spec = spec or ServerSpec(model_path="tiny")
        self.kind = "sglang"
        self.url = http.url
        self.folder = folder
        self.client = SglangClient(http.url, timeout=5)
        self.log: ServerLog | None = ServerLog(http.log_path)
        self.info: dict[str, Any] = {}
        self.python = sys.executable
        self.sizes = http.sizes
        self.nsys: Any = None
        self.attached = False
        self.server_dir: tuple[str, str] | None = None
        self.trace_root = folder / "traces"
        self.died: ServerDied | None = None
        self.announced: list[str | None] = []
        self.lock = threading.Lock()
        self.pids: dict[int, Any] = {}
        self.past_windows: dict[Any, dict[float, Any]] = {}
        self.nodes: tuple[Any, ...] = ()
        self.is_gathered = False

    def node_names(self) -> dict[str, str]:
        return {}

    def is_alive(self) -> bool:
        return self.died is None

    def exit_reason(self) -> ServerDied | None:
        return self.died

    def scheduler_ranks(self) -> dict[int, Any]:
        return self.pids

    @contextlib.contextmanager
    def window_lock(self) -> Iterator[None]:
        if not self.lock.acquire(blocking=False):
            raise LeaseError("another window of this server is open")
        try:
            yield
        finally:
            self.lock.release()

    def announce_window(self, backend: str | None) -> None:
        self.announced.append(backend)
