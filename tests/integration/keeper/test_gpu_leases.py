"""GPUs belong to one server at a time; what a teardown could not remove is told."""

from __future__ import annotations

import json
import os
from typing import ClassVar

import pytest

from pytest_sglprof import _nsys as nsys
from pytest_sglprof._config.model import ServerSpec
from pytest_sglprof._errors import LeaseError, NsysError, SettingsError
from pytest_sglprof._server import lease
from pytest_sglprof._server.keeper import teardown
from pytest_sglprof._server.launch import launch
from tests.support.real_env import real_nsys


@pytest.fixture
def four_gpus(monkeypatch):
    """Names of devices as a scheduler of jobs hands them out."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")


def seen_gpus(report) -> list[str]:
    block = json.loads(report.read_text())["block"]
    return [line for line in block if line.startswith("CUDA_VISIBLE_DEVICES=")]


def test_a_server_sees_and_leases_the_gpus_that_it_was_given(
    four_gpus, fake_sglang, nothing_left, tmp_path, lease_folder
):
    report = tmp_path / "report.json"
    spec = ServerSpec(gpus=(1, 2), env=(("FAKE_REPORT", str(report)),))
    server = launch(spec, folder=tmp_path / "server")
    try:
        assert seen_gpus(report) == ["CUDA_VISIBLE_DEVICES=5,6"]
        assert sorted(path.stem for path in lease_folder.glob("gpu-*")) == ["gpu-5", "gpu-6"]
        with pytest.raises(LeaseError, match=r"GPU 6 is held by process \d+"):
            launch(ServerSpec(gpus=(2,), ready_timeout=0.3), folder=tmp_path / "second")
    finally:
        server.stop()


def test_a_server_of_all_gpus_keeps_the_list_as_it_was(
    four_gpus, fake_sglang, nothing_left, tmp_path, lease_folder
):
    report = tmp_path / "report.json"
    server = launch(ServerSpec(env=(("FAKE_REPORT", str(report)),)), folder=tmp_path / "server")
    assert seen_gpus(report) == ["CUDA_VISIBLE_DEVICES=4,5,6,7"]
    assert len(list(lease_folder.glob("gpu-*"))) == 4
    server.stop()


def test_a_gpu_that_does_not_exist(four_gpus, fake_sglang, nothing_left, tmp_path):
    with pytest.raises(SettingsError, match="device 9 does not exist"):
        launch(ServerSpec(gpus=(9,)), folder=tmp_path / "server")


def test_a_cpu_server_leases_no_gpu(four_gpus, start, lease_folder):
    start()
    assert list(lease_folder.glob("gpu-*")) == []


def test_waiting_for_a_gpu_ends_with_pytest(four_gpus, fake_sglang, nothing_left, tmp_path):
    """The pipe closes while the keeper waits for a lease."""
    from pytest_sglprof._server import command
    from pytest_sglprof._server.keeper.link import KeeperLink
    from pytest_sglprof._server.keeper.protocol import Plan

    held = lease.acquire("gpu-4", timeout=0)
    spec = ServerSpec()
    keeper = KeeperLink(
        Plan(spec, command.find_entry(spec), tmp_path / "server", parent=os.getpid())
    )
    event = keeper.next_event(20)
    assert event is not None
    assert "waiting: GPU 4" in event.text
    assert keeper.close(20)
    held.release()


class StubSession:
    """An nsys session that will not go."""

    name = "stuck"

    def __init__(self, state: str = "Collection", broken: bool = False) -> None:
        self._state = state
        self._broken = broken

    def state(self) -> str:
        if self._broken:
            raise NsysError("nsys does not answer")
        return self._state

    def shutdown(self, *, timeout: float, discard: bool) -> None:
        raise NsysError("no shutdown")


class StubLife:
    def __init__(self, session: StubSession | None = None) -> None:
        self.session = session
        self.seen = {1234567}
        self.launcher = None
        self.clocks = None
        self.freed = False

    def remember(self) -> None: ...

    def is_alive(self) -> bool:
        return False

    def free(self) -> None:
        self.freed = True


@pytest.mark.parametrize(
    ("session", "left"),
    [
        (None, []),
        (StubSession("Shutdown"), []),
        (StubSession(), ["nsys session stuck (Collection)"]),
        (StubSession(broken=True), ["nsys session stuck: nsys does not answer"]),
    ],
)
def test_a_session_that_stays_is_told(session, left, monkeypatch):
    monkeypatch.setattr(teardown, "_end_rest", lambda life: [])
    life = StubLife(session)
    assert teardown.tear_down(life, None, 0.0, 1.0) == left
    assert life.freed


def test_a_context_that_stays_on_a_gpu_is_told(monkeypatch):
    monkeypatch.setattr(teardown, "_end_rest", lambda life: [])
    monkeypatch.setattr(teardown, "GPU_WAIT", 0.3)
    monkeypatch.setattr(teardown, "processes_on_gpus", lambda pids: sorted(pids))
    assert teardown.tear_down(StubLife(), None, 0.0, 1.0) == ["process 1234567 on a GPU"]


def test_clocks_are_given_back_even_where_the_teardown_fails(monkeypatch):
    class Lock:
        held: ClassVar[dict[str, int]] = {"GPU-a": 1410}
        released = 0

        def release(self) -> list[str]:
            self.released += 1
            return []

    def fails(life: StubLife) -> list[str]:
        raise OSError("no more processes")

    monkeypatch.setattr(teardown, "_end_rest", fails)
    life = StubLife()
    life.clocks = Lock()
    with pytest.raises(OSError, match="no more processes"):
        teardown.tear_down(life, None, 0.0, 1.0)
    assert life.clocks.released == 1


@pytest.mark.real_nsys
def test_nsys_own_words_when_it_rejects_an_option(fake_sglang, nothing_left, tmp_path):
    from pytest_sglprof._errors import ServerDied

    real_nsys()
    spec = ServerSpec(args=("--device", "cpu"), nsys=True, nsys_args=("--no-such-option=1",))
    with pytest.raises(ServerDied, match="before the server ran") as caught:
        launch(spec, folder=tmp_path / "server")
    assert "no-such-option" in "\n".join(caught.value.log)
    assert nsys.find_nsys().version
