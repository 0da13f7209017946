"""Windows of servers that speak like older versions, as a user's project opens them.

The server and its load driver are those of the recorded cases, whose head explains `FAKE`.
"""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from tests.support.project import Outcome, Project

BASE = {"ready": True, "info": "/server_info", "loads": "v1"}
PREFILL = {"loads": "v1_odd", "sizes": {"disaggregation_mode": "prefill"}}
WAITING = {"dp_rank": 0, "num_running_reqs": 0, "num_waiting_reqs": 30}
QUEUES = {"mode": "prefill", "prefill_bootstrap_queue_reqs": 0, "prefill_inflight_queue_reqs": 9}
HANDED_OVER = {"dp_rank": 0, "num_running_reqs": 0, "disaggregation": QUEUES}
ATTENTION = ["--tp", "4", "--dp", "2", "--enable-dp-attention"]
# Name -> (what FAKE has beside `BASE`, arguments of the server).
ROWS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "own_id": ({"own_id": True}, []),
    "no_id": ({"own_id": True, "start_line": "Profiling starts. Saved to: {dir}"}, []),
    "old_auth": ({"ready": False, "auth": "old", "info": "/get_server_info"}, []),
    "no_loads": ({"loads": None}, []),
    "get_load": ({"loads": "get_load"}, []),
    "get_load_old": ({"loads": "get_load_old"}, []),
    "tp_names": ({"names": "tp"}, ATTENTION),
    "late_files": ({"stop_before_files": 5}, []),
    "stop_504": ({"stop_504": True}, []),
    "prefill": ({**PREFILL, "loads_body": {"loads": [WAITING]}}, []),
    "handed_over": ({**PREFILL, "loads_body": {"loads": [HANDED_OVER]}}, []),
    "unknown_sizes": ({"sizes": {"tp_size": None}}, []),
    "nested": ({"nested": True}, []),
}
SERVER = """
[servers.{name}]
kind = "sglang"
model_path = "none"
args = {args}
ready_timeout = 60
env = {{ PYTHONPATH = "{fake}", FAKE_LOAD_S = "5", FAKE = '{settings}' }}
{key}
"""
TEST = """
@pytest.mark.sglang_server("{name}")
@pytest.mark.profile_window(duration=1.0, slowdown=5.0)
def test_{name}(sglang_server, bench_serving):
    bench_serving(num_prompts=64, max_concurrency=8, warm_up=False)
"""


@pytest.fixture(scope="module")
def run(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    cases = shared_data.parent / "cases"
    fake, traces = cases / "server" / "fake_sglang", cases / "faults" / "slow_rank"
    if not fake.is_dir() or not traces.is_dir():
        pytest.skip("no servers that speak like older ones in ../shared")
    four = _of_four_ranks(traces, tmp_path_factory.mktemp("four"))
    servers, tests = "", ""
    for name, (more, args) in ROWS.items():
        servers += SERVER.format(
            name=name,
            args=json.dumps([*(args or ["--tp", "2"]), "--device", "cpu"]),
            fake=fake,
            settings=json.dumps({**BASE, "traces": str(four if args else traces), **more}),
            key='api_key_env = "OLD_KEY"' if "auth" in more else "",
        )
        tests += TEST.format(name=name)
    project = Project(tmp_path_factory.mktemp("older"), tests, servers)
    return project.run(PYTHONPATH=str(fake), OLD_KEY="a-key-of-an-old-server")


def _of_four_ranks(traces: Path, folder: Path) -> Path:
    """Copies of the two ranks' traces, which say themselves that they are of four ranks."""
    pair = sorted(traces.glob("*.trace.json.gz"))
    for number in range(4):
        document = json.loads(gzip.decompress(pair[number % 2].read_bytes()))
        document["distributedInfo"] |= {"rank": number, "world_size": 4}
        target = folder / f"w-TP-{number}.trace.json.gz"
        target.write_bytes(gzip.compress(json.dumps(document).encode(), 1))
    return folder


def window_of(run: Outcome, name: str) -> dict[str, Any]:
    (window,) = run.windows(f"test_{name}")
    return window


@pytest.mark.parametrize("name", list(ROWS))
def test_a_window_of_an_older_server_is_whole(run: Outcome, name: str) -> None:
    window = window_of(run, name)
    assert window["state"] == "complete"
    assert window["missing_ranks"] == []
    assert run.test(f"test_{name}")["verdict"] == "pass"


def notes(run: Outcome, name: str) -> str:
    return "; ".join(window_of(run, name)["notes"])


def test_what_is_odd_about_a_window_is_told_with_it(run: Outcome) -> None:
    assert "stop_profile answered 504" in notes(run, "stop_504")
    assert "a missing one cannot be told" in notes(run, "unknown_sizes")
    assert "a prefill server runs no decode steps" in notes(run, "prefill")
    assert "load could not be read" not in notes(run, "no_loads")  # the log has it
    for name in ("own_id", "get_load", "tp_names", "late_files", "nested"):
        assert notes(run, name) == ""


def test_ranks_get_their_full_names(run: Outcome) -> None:
    labels = ["DP0 TP0", "DP0 TP1", "DP1 TP2", "DP1 TP3"]
    assert window_of(run, "tp_names")["expected_ranks"] == labels
    assert window_of(run, "unknown_sizes")["expected_ranks"] == ["TP0", "TP1"]
