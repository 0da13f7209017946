"""One server for each kind: the stand-in, on a CPU, of older versions, and the real one."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import socket
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from pytest_sglprof.standin.speech import NEWEST, SPEECHES
from tests.support import real_env
from tests.support.running import Running, end, standin, wait_for

READY_S = 300.0
ALL = any(os.environ.get(name, "") not in ("", "0") for name in ("CI", "SGLPROF_ALL_VERSIONS"))
OLDER = list(SPEECHES)[1:] if ALL else list(SPEECHES)[-1:]
STANDINS = ["standin", "standin-cpu", *(f"standin-{version}" for version in OLDER)]
RECORDS = Path(__file__).parents[2] / "data" / "versions"


@dataclass
class ContractServer:
    """A running server, what it is, and a folder for its output. driver: words to run.

    record: what the wheel of its version says, made by ci.old_versions.
    """

    kind: str
    running: Running
    folder: Path
    model: str
    driver: tuple[str, ...]
    python: str
    version: str = NEWEST.version

    @property
    def on_cpu(self) -> bool:
        return self.kind in ("standin-cpu", "sglang")

    @functools.cached_property
    def record(self) -> dict[str, Any]:
        kept: dict[str, Any] = json.loads((RECORDS / f"{self.version}.json").read_text())
        return kept

    def has(self, path: str) -> bool:
        """Whether the version answers this path."""
        return self.record["http"]["routes"][path] is not None

    def knows(self, field: str) -> bool:
        """Whether a start of a window may have this field; others are ignored."""
        return field in self.record["http"]["profile"]["fields"]


@pytest.fixture(
    scope="module",
    params=[*STANDINS, pytest.param("sglang", marks=pytest.mark.real_server)],
)
def contract_server(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ContractServer]:
    kind = request.param
    folder = tmp_path_factory.mktemp(kind)
    if kind == "sglang":
        yield from _real(folder)
        return
    # The interval is the real one's, as is the time of a step there.
    arguments = ["--tp", "2", "--decode-log-interval", "5", "--max-running-requests", "16"]
    arguments += ["--crash-delay", "1"]
    arguments += ["--device", "cpu"] if kind == "standin-cpu" else []
    version = next((each for each in OLDER if kind.endswith(each)), NEWEST.version)
    arguments += ["--speak", version] if version != NEWEST.version else []
    with standin(folder, *arguments) as running:
        module = ("-m", "pytest_sglprof.standin.load_driver")
        yield ContractServer(kind, running, folder, "standin", module, "", version)


def _real(folder: Path) -> Iterator[ContractServer]:
    sglang = real_env.real_sglang()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    model = sglang.model("llama")
    log = folder / "server.log"
    words = [sglang.python, "-m", "sglang.launch_server", "--host", "127.0.0.1"]
    words += ["--port", str(port), "--model-path", model, *real_env.CPU_ARGUMENTS, "--tp", "2"]
    with log.open("ab") as file:
        process = subprocess.Popen(
            words,
            stdout=file,
            stderr=file,
            env={**os.environ, **sglang.environment(2), "TMPDIR": str(folder)},
            start_new_session=True,
        )
    running = Running(process, log)
    running.url = f"http://127.0.0.1:{port}"
    try:
        wait_for(lambda: _is_ready(running), READY_S)
        driver = ("-m", "sglang.benchmark.serving")
        yield ContractServer("sglang", running, folder, model, driver, sglang.python)
    finally:
        running.http.close()
        _end(process)


def _is_ready(running: Running) -> bool:
    assert running.process.poll() is None, running.log[-5000:]
    with contextlib.suppress(httpx.HTTPError):
        return "ready to roll" in running.log and running.get("/ready").status_code == 200
    return False


def _end(process: subprocess.Popen[bytes]) -> None:
    tree: list[psutil.Process] = []
    with contextlib.suppress(psutil.Error):
        tree = psutil.Process(process.pid).children(recursive=True)
    end(process, tree, patience=30)
