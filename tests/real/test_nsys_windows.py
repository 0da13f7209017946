"""The main job on a real SGLang under a real nsys: two windows in one server life."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest

from tests.real.project import Outcome, left_over, run_project, write_project
from tests.real_env import real_nsys, real_sglang

pytestmark = [pytest.mark.real_server, pytest.mark.real_nsys]

BODY = """
import pytest

pytestmark = pytest.mark.sglang_server(nsys=True)


def test_two_windows_in_one_life(bench_serving, profile_window):
    load = dict(max_concurrency=4, random_input_len=32, random_output_len=64)
    with bench_serving.running(num_prompts=240, random_range_ratio=1.0, **load):
        for name in ("first", "second"):
            with profile_window(name, backend="nsys", duration=3.0) as window:
                window.wait()
"""
BATCHES = """
    SELECT (e.globalTid >> 24) & 0xFFFFFF AS pid, count(*)
    FROM NVTX_EVENTS AS e LEFT JOIN StringIds AS s ON s.id = e.textId
    WHERE coalesce(e.text, s.value) = 'scheduler.run_batch' GROUP BY pid
"""


@pytest.fixture(scope="module")
def under_nsys(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    real_nsys()
    folder = tmp_path_factory.mktemp("nsys")
    write_project(folder, real_sglang(), BODY, model="llama", args=("--tp", "2"), ranks=2)
    return run_project(folder)


def test_both_windows_are_complete_and_judged(under_nsys: Outcome) -> None:
    assert under_nsys.status == 0, under_nsys.output
    versions = under_nsys.results["run"]["versions"]
    assert versions["nsys"]
    assert versions["sglang"]
    print(f"sglang {versions['sglang']} under nsys {versions['nsys']}")
    assert len(under_nsys.results["servers"]) == 1
    for window in under_nsys.windows().values():
        assert window["state"] == "complete", window["state_reason"]
        assert window["verdict"] == "pass"
        assert window["source"] == "nvtx"
        assert window["ranks"] == ["TP0", "TP1"]


def test_the_ranks_in_the_report_are_those_of_the_server(under_nsys: Outcome) -> None:
    for name, window in under_nsys.windows().items():
        exports = [a["path"] for a in window["artifacts"] if a["path"].endswith(".sqlite")]
        batches = dict(_query(under_nsys.folder / exports[0], BATCHES))
        assert len(batches) == 2
        steps = window["steps"]["per_rank"]
        print(f"nsys window {name}: scheduler.run_batch {steps} (by pid: {batches})")
        assert sorted(steps.values()) == sorted(batches.values())
        assert min(steps.values()) >= 30


def test_nothing_is_left_of_server_session_and_agent(under_nsys: Outcome) -> None:
    project = under_nsys.folder.parents[1]
    assert left_over(project) == []
    assert list((project / "leases").glob("*")) == []


def _query(path: Path, text: str) -> list[tuple[int, int]]:
    connection = sqlite3.connect(path)
    try:
        return connection.execute(text).fetchall()
    finally:
        connection.close()
