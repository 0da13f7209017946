"""Windows of servers that speak like older versions, as a user's project opens them.

The server and its load driver are those of the recorded cases, whose head explains `FAKE`.
"""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from pytest_sglprof.standin.speech import SPEECHES
from tests.support.project import Project

TWO = ["TP0", "TP1"]
FOUR = ["DP0 TP0", "DP0 TP1", "DP1 TP2", "DP1 TP3"]
ATTENTION = ("--tp", "4", "--dp", "2", "--enable-dp-attention")
PREFILL = {"disaggregation_mode": "prefill"}
WAITING = {"loads": [{"dp_rank": 0, "num_running_reqs": 0, "num_waiting_reqs": 30}]}


class Row(NamedTuple):
    """settings: what FAKE has. note: what the window's notes say, "" for none at all."""

    settings: dict[str, Any]
    note: str = ""
    args: tuple[str, ...] = ("--tp", "2")
    ranks: list[str] = TWO


ROWS: dict[str, Row] = {
    "own_id": Row({"own_id": True}),
    "old_auth": Row({"ready": False, "auth": "old", "info": "/get_server_info"}),
    "no_loads": Row({"loads": None}),
    "get_load": Row({"loads": "get_load"}),
    "tp_names": Row({"names": "tp"}, "", ATTENTION, FOUR),
    "late_files": Row({"stop_before_files": 5}),
    "stop_504": Row({"stop_504": True}, "stop_profile answered 504"),
    "prefill": Row(
        {"loads": "v1_odd", "loads_body": WAITING, "sizes": PREFILL},
        "a prefill server runs no decode steps",
    ),
    "unknown_sizes": Row({"sizes": {"tp_size": None}}, "a missing one cannot be told"),
}
SERVER = """
[server]
kind = "sglang"
model_path = "none"
args = {args}
ready_timeout = 60
api_key_env = "OLD_KEY"
env = {{ PYTHONPATH = "{fake}", FAKE_LOAD_S = "5", FAKE = '{settings}' }}
"""
TEST = """
@pytest.mark.profile_window(duration=1.0, slowdown=5.0)
def test_window(sglang_server, bench_serving):
    bench_serving(num_prompts=64, max_concurrency=8, warm_up=False)
"""


@pytest.fixture(scope="module")
def cases(shared_data: Path) -> Path:
    folder = shared_data.parent / "cases"
    if not (folder / "server" / "fake_sglang").is_dir():
        pytest.skip("no servers that speak like older ones in ../shared")
    return folder


@pytest.mark.parametrize("name", list(ROWS))
def test_a_window_of_an_older_server_is_whole(cases: Path, tmp_path: Path, name: str) -> None:
    row = ROWS[name]
    fake, traces = cases / "server" / "fake_sglang", cases / "faults" / "slow_rank"
    if len(row.ranks) > len(TWO):
        traces = _of_four_ranks(traces, tmp_path / "four")
    settings = {"ready": True, "info": "/server_info", "loads": "v1", "traces": str(traces)}
    config = SERVER.format(
        args=json.dumps([*row.args, "--device", "cpu"]),
        fake=fake,
        settings=json.dumps({**settings, **row.settings}),
    )
    project = Project(tmp_path / "project", TEST, config)
    run = project.run(PYTHONPATH=str(fake), OLD_KEY="a-key-of-an-old-server")
    (window,) = run.windows("test_window")
    assert (window["state"], window["state_reason"]) == ("complete", "")
    assert (window["expected_ranks"], window["missing_ranks"]) == (row.ranks, [])
    notes = "; ".join(window["notes"])
    assert row.note in notes if row.note else not notes
    assert run.test("test_window")["verdict"] == "pass"


def _of_four_ranks(traces: Path, folder: Path) -> Path:
    """Copies of the two ranks' traces, which say themselves that they are of four ranks."""
    folder.mkdir()
    pair = sorted(traces.glob("*.trace.json.gz"))
    for number in range(4):
        document = json.loads(gzip.decompress(pair[number % 2].read_bytes()))
        document["distributedInfo"] |= {"rank": number, "world_size": 4}
        document["trace_id"] = f"{number:032X}"
        target = folder / f"w-TP-{number}.trace.json.gz"
        target.write_bytes(gzip.compress(json.dumps(document).encode(), 1))
    return folder


STEPS = 60
SPEAKING = """
[server]
kind = "standin"
args = {args}
standin_args = ["--step-ms", "4", "--layers", "1", "--speak", "{version}"]
"""
COUNTED = f"""
@pytest.mark.profile_window(num_steps={STEPS}, slowdown=5.0)
def test_window(sglang_server, bench_serving):
    bench_serving(num_prompts=48, max_concurrency=8, random_input_len=8, random_output_len=300,
                  random_range_ratio=1.0, warm_up=False, disable_stream=True)
"""
# Where passes have no names, as in 0.5.3, steps are what lies between two samplings.
NAMED = [version for version, speech in SPEECHES.items() if speech.spans]
OLDER = NAMED[1:] if os.environ.get("CI") else NAMED[-1:]


@pytest.mark.parametrize("version", OLDER)
def test_a_window_has_as_many_steps_as_were_asked_for(tmp_path: Path, version: str) -> None:
    args = json.dumps(["--tp", "2", "--dp", "2", "--enable-dp-attention"])
    config = SPEAKING.format(args=args, version=version)
    run = Project(tmp_path / "project", COUNTED, config).run()
    (window,) = run.windows("test_window")
    assert (window["state"], window["state_reason"]) == ("complete", "")
    assert window["steps"]["per_rank"] == dict.fromkeys(["DP0 TP0", "DP1 TP1"], STEPS)


UNNAMED = """
@pytest.mark.profile_window(num_steps=60, slowdown=1.10)
def test_window(sglang_server, bench_serving):
    bench_serving(num_prompts=200, max_concurrency=8, random_input_len=64, random_output_len=64)
"""


def test_the_oldest_server_has_a_verdict_under_load(tmp_path: Path) -> None:
    """Its traces name no passes, and prefills are between the decode passes."""
    (oldest, *_) = (version for version, speech in SPEECHES.items() if not speech.spans)
    args = json.dumps(["--tp", "2", "--slow", "rank=1,factor=1.3"])
    config = SPEAKING.format(args=args, version=oldest).replace('"--layers", "1", ', "")
    run = Project(tmp_path / "project", UNNAMED, config).run()
    test = run.test("test_window")
    assert test["verdict"] == "fail", test["reason"]
    assert "TP1 is 1.30x slower" in test["reason"]
