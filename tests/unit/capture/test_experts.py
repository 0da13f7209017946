"""When the recorder of experts runs around a window, and what its notes say.

The dumps of a real recorder are read in tests/real/test_experts_dump.py.
"""

from __future__ import annotations

import time
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pytest_sglprof._capture import experts
from pytest_sglprof._capture.experts import ExpertRecording, dump_folder, refusal
from pytest_sglprof._capture.recording import LifeWatch
from pytest_sglprof._config.model import ServerSpec
from pytest_sglprof._errors import ServerDied
from tests.support.fake_server import FakeServer, FakeSglang

RECORDER = {"expert_distribution_recorder_mode": "per_pass", "moe_a2a_backend": "none"}


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeServer]:
    """A server of two ranks with a recorder, which dumps nothing."""
    monkeypatch.delenv("SGLANG_EXPERT_DISTRIBUTION_RECORDER_DIR", raising=False)
    monkeypatch.setattr(experts, "DUMP_SECONDS", 0.2)
    http = FakeSglang(tmp_path)
    found = FakeServer(tmp_path, http)
    found.info = dict(RECORDER)
    yield found
    http.close()


def recording(server: Any) -> ExpertRecording:
    return ExpertRecording(server, server.folder, LifeWatch(server))


def actions(server: FakeServer) -> list[str]:
    return [path[1:].partition("_")[0] for path, _ in server.http.requests]


def run(server: FakeServer) -> tuple[str, ...]:
    window = recording(server)
    window.start()
    return window.finish()


@pytest.mark.parametrize("mode", [None, "", "absent"])
def test_a_server_without_a_recorder_is_never_asked(server: FakeServer, mode: str | None) -> None:
    server.info["expert_distribution_recorder_mode"] = mode
    if mode == "absent":
        del server.info["expert_distribution_recorder_mode"]
    assert run(server) == ()
    assert actions(server) == []


@pytest.mark.parametrize(
    ("info", "sizes", "attached", "reason"),
    [
        ({}, {}, True, "started by somebody else"),
        ({"enable_eplb": True}, {}, False, "EPLB"),
        ({}, {"dp": 2}, False, "replicas"),
        ({}, {"pp": 2}, False, "replicas"),
        ({}, {"moe_dp": 2}, False, "replicas"),
        ({"elastic_ep_backend": "mooncake"}, {}, False, "elastic"),
        ({"expert_distribution_recorder_mode": "stat"}, {}, False, "CPU dies"),
        (
            {"expert_distribution_recorder_mode": "stat", "ep_num_redundant_experts": 4},
            {"device": "cuda"},
            False,
            "on which rank",
        ),
        (
            {"expert_distribution_recorder_mode": "stat", "init_expert_location": "x.pt"},
            {"device": "cuda"},
            False,
            "on which rank",
        ),
    ],
)
def test_why_a_recorder_is_left_alone(
    server: FakeServer, info: dict[str, Any], sizes: dict[str, Any], attached: bool, reason: str
) -> None:
    server.info |= info
    server.sizes = replace(server.sizes, **sizes)
    server.attached = attached
    (note,) = run(server)
    assert note.startswith("experts are not recorded: ")
    assert reason in note
    assert actions(server) == []


def test_an_older_server_that_does_not_say_how_tokens_travel(server: FakeServer) -> None:
    del server.info["moe_a2a_backend"]
    assert "moe_a2a_backend" in refusal(server)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("info", "sizes"),
    [
        ({}, {}),
        ({"expert_distribution_recorder_mode": "stat"}, {"device": "cuda"}),
        ({"enable_eplb": False, "elastic_ep_backend": None}, {"attn_dp": 2, "dp_attention": True}),
    ],
)
def test_the_recorder_runs_around_the_window(
    server: FakeServer, info: dict[str, Any], sizes: dict[str, Any]
) -> None:
    server.info |= info
    server.sizes = replace(server.sizes, **sizes)
    (note,) = run(server)
    assert actions(server) == ["start", "stop", "dump"]
    folder = dump_folder(server)  # type: ignore[arg-type]
    assert note == f"experts are lost: no dump was written into {folder} on this machine"


def test_a_recorder_that_reports_the_balance_goes_on(server: FakeServer) -> None:
    server.info["expert_balancedness_report_mode"] = "log"
    run(server)
    assert actions(server) == ["start", "stop", "dump", "start"]


def test_a_window_that_is_dropped_leaves_no_recorder_running(server: FakeServer) -> None:
    window = recording(server)
    window.start()
    window.abort()
    assert actions(server) == ["start", "stop"]
    window.abort()
    assert window.finish() == ()
    assert actions(server) == ["start", "stop"]


def test_a_refusal_to_start_is_a_note(server: FakeServer) -> None:
    server.http.on_recorder = lambda action: 500
    (note,) = run(server)
    assert note.startswith("experts are not recorded: ")
    assert actions(server) == ["start"]


def test_a_server_that_dies_is_not_waited_for(server: FakeServer) -> None:
    window = recording(server)
    window.start()
    server.died = ServerDied("the server is gone")
    server.http.on_recorder = lambda action: 500
    began = time.monotonic()
    (note,) = window.finish()
    assert note == "experts are lost: the server is gone"
    assert time.monotonic() - began < 5


def test_a_dump_that_the_interpreter_cannot_read_stays(
    server: FakeServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """This project's interpreter has no torch."""
    chosen = tmp_path / "chosen"
    server.spec = ServerSpec(env=(("SGLANG_EXPERT_DISTRIBUTION_RECORDER_DIR", str(chosen)),))
    monkeypatch.setattr(experts, "DUMP_SECONDS", 5.0)
    old = chosen / "expert_distribution_recorder_1000.5_0.pt"

    def dump(action: str) -> int:
        chosen.mkdir(exist_ok=True)
        names = [f"expert_distribution_recorder_{time.time()}_{rank}.pt" for rank in range(2)]
        for name in names if action == "dump" else [old.name]:
            with zipfile.ZipFile(chosen / name, "w") as file:
                file.writestr("data.pkl", "")
        return 200

    server.http.on_recorder = dump
    (note,) = run(server)
    assert note.startswith("experts are lost: ModuleNotFoundError: No module named 'torch'")
    assert str(chosen) in note
    assert len(list(chosen.glob("*.pt"))) == 3
    assert not (server.folder / "experts.npz").exists()
