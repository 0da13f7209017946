"""The same windows against the stand-in: real processes, real files, real time."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from pytest_sglprof._capture.recording import WindowCapture
from pytest_sglprof._config.model import ServerSpec, WindowSpec
from pytest_sglprof._run.opening import steady_load
from pytest_sglprof._run.window import Window
from pytest_sglprof._server.launch import Server, launch

REQUEST = {"text": "x " * 40, "sampling_params": {"max_new_tokens": 60, "ignore_eos": True}}


class Load:
    """Four clients that ask again and again until they are told to stop."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._run) for _ in range(4)]

    def _run(self) -> None:
        with httpx.Client(base_url=self._url, timeout=30, trust_env=False) as client:
            while not self._stop.is_set():
                try:
                    client.post("/generate", json=REQUEST)
                except httpx.HTTPError:
                    return

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()


@pytest.fixture(scope="module")
def standin(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("standin")
    server = launch(ServerSpec(kind="standin", args=("--tp", "2")), folder=folder)
    yield server
    assert server.stop() == ()


def capture(server: Server, folder: Path, **options: object) -> WindowCapture:
    options.setdefault("timeout", 20.0)
    window = Window(server, WindowSpec(**options), folder)
    window.open()
    window.wait()
    return window.close()


def test_windows_of_one_server_life(standin, tmp_path):
    idle = capture(standin, tmp_path / "idle", num_steps=5, timeout=0.5)
    assert idle.state == "incomplete"
    assert "no forward pass was run" in idle.reason
    with Load(standin.url):
        assert steady_load(standin, 4, hold=0.2, timeout=20, stop=threading.Event())
        steps = capture(standin, tmp_path / "steps", num_steps=20)
        timed = capture(standin, tmp_path / "timed", duration=0.3)
    for closed in (steps, timed):
        assert (closed.state, closed.reason) == ("complete", "")
        assert [artifact.rank for artifact in closed.artifacts] == ["TP0", "TP1"]
        assert all(artifact.path.stat().st_size > 2000 for artifact in closed.artifacts)


def test_a_killed_server_fails_its_window_at_once(tmp_path):
    server = launch(ServerSpec(kind="standin", args=("--tp", "2")), folder=tmp_path / "server")
    try:
        window = Window(server, WindowSpec(num_steps=50), tmp_path / "w")
        window.open()
        assert server.pid is not None
        os.kill(server.pid, signal.SIGKILL)
        start = time.monotonic()
        window.wait()
        closed = window.close()
        assert time.monotonic() - start < 10
        assert closed.state == "failed"
        assert closed.reason
    finally:
        assert server.stop() == ()
