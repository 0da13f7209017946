"""The main job on a real SGLang with torch windows: `--tp 2`, and `--tp 2 --dp 2`."""

from __future__ import annotations

import statistics
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tests.support.real_env import real_sglang
from tests.support.real_project import FAR, Outcome, left_over, run_project, write_project

pytestmark = pytest.mark.real_server

LOAD = """
LOAD = dict(max_concurrency=4, random_input_len=32, random_output_len=64, random_range_ratio=1.0)
"""
# 3 ms of 9 ms one scheduler does nothing: what a host that is busy elsewhere does to a rank.
INTERRUPTED = """
STOPPED_S, RUNNING_S = 0.003, 0.006


@contextlib.contextmanager
def interrupted(pid, stopped=STOPPED_S, running=RUNNING_S):
    over = threading.Event()

    def interrupt():
        while not over.is_set():
            try:
                os.kill(pid, signal.SIGSTOP)
                time.sleep(stopped)
            finally:
                os.kill(pid, signal.SIGCONT)
            time.sleep(running)

    thread = threading.Thread(target=interrupt)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def test_one_rank_is_interrupted(sglang_server, bench_serving, profile_window):
    pids = {rank.label: pid for pid, rank in sglang_server.scheduler_ranks().items()}
    with bench_serving.running(num_prompts=200, **LOAD):
        with profile_window("undisturbed", num_steps=60) as window:
            window.wait()
        with interrupted(pids["TP1"]), profile_window("interrupted", num_steps=60) as window:
            window.wait()
"""
TP2 = f"""
import contextlib
import os
import signal
import threading
import time

import pytest
{LOAD}
{INTERRUPTED}

@pytest.mark.profile_window("steady", num_steps=60)
def test_a_window_at_steady_load(sglang_server, bench_serving):
    result = bench_serving(num_prompts=40, output_details=True, **LOAD)
    assert result.completed == 40
    assert result.ttft["p99"] > 0


@pytest.mark.profile_window("cheap", num_steps=300, max_stall=2)
def test_a_window_that_may_cost_two_seconds(sglang_server, bench_serving):
    bench_serving(num_prompts=40, output_details=True, **LOAD)


def test_two_windows_by_hand(sglang_server, bench_serving, profile_window):
    pids = {{rank.label: pid for pid, rank in sglang_server.scheduler_ranks().items()}}
    with bench_serving.running(num_prompts=240, **LOAD):
        with profile_window("steps", num_steps=100) as steps:
            steps.wait()
        often = interrupted(pids["TP1"], stopped=0.002, running=0.001)
        with often, profile_window("seconds", duration=8.0) as seconds:
            seconds.wait()
    assert steps.check("slowdown", {FAR}) >= 1.0
    # A rank that is stopped for two thirds of the time has steps that take far longer: this fails.
    assert seconds.check("spike_share", 0.0) > 0


def test_fixed_shapes(sglang_server, profile_shapes):
    one, four = profile_shapes(batch=[1, 4], input=32, output=64)
    for shape in (one, four):
        assert 0 < shape.ttft < 1000 * shape.latency
        assert shape.load.raw["total_output_tokens"] == shape.batch * 64
        print("fixed shape", shape.batch, shape.latency, shape.ttft, shape.output_throughput)
"""
TP2_DP2 = f"""
import pytest
{LOAD}

@pytest.mark.profile_window("both_replicas", num_steps=60)
def test_two_replicas(sglang_server, bench_serving):
    bench_serving(num_prompts=64, **LOAD)
"""


@pytest.fixture(scope="module")
def tp2(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    folder = tmp_path_factory.mktemp("tp2")
    write_project(folder, real_sglang(), TP2, model="llama", args=("--tp", "2"), ranks=2)
    return run_project(folder, "--junitxml=junit.xml", "--sglprof-set=gate.min_steps=10")


def test_the_right_test_fails(tp2: Outcome) -> None:
    assert tp2.status == 1, tp2.output
    tests = tp2.tests()
    assert tests["test_a_window_at_steady_load"]["verdict"] == "pass"
    assert tests["test_two_windows_by_hand"]["verdict"] == "fail"
    assert "TP" in tests["test_two_windows_by_hand"]["reason"]
    assert tp2.results["run"]["versions"]["sglang"]
    assert not tp2.results["summary"]["standin"]


def test_every_window_has_the_file_of_every_rank(tp2: Outcome) -> None:
    by_hand = {"steps", "seconds", "undisturbed", "interrupted"}
    assert set(tp2.windows()) == {"steady", "cheap", *by_hand, "bs1", "bs4"}
    for name, window in tp2.windows().items():
        assert window["state"] == "complete", window["state_reason"]
        assert window["source"] == "cpu_op"
        assert [artifact["rank"] for artifact in window["artifacts"]] == ["TP0", "TP1"]
        for artifact in window["artifacts"]:
            assert (tp2.folder / artifact["path"]).stat().st_size > 1000
            print(f"torch window {name}: {artifact['rank']} {Path(artifact['path']).name}")
    for name in ("steady", "steps"):
        assert min(tp2.windows()[name]["steps"]["per_rank"].values()) >= 38


@pytest.mark.parametrize("name", ["steady", "cheap"])
def test_the_cost_of_a_window_is_what_streams_waited(tp2: Outcome, name: str) -> None:
    """Each is the only window of its load, and its stall the longest wait for a token."""
    window = tp2.windows()[name]
    (load,) = [each for each in tp2.results["loads"] if each["id"] == window["load"]]
    # Where it came between two requests of each stream, it is in the time to their first tokens.
    waits = [gap for stream in load["raw"]["itls"] for gap in stream], load["raw"]["ttfts"]
    waited = max(max(times) - statistics.median(times) for times in waits)
    cost, steps = window["cost"], window["spec"]["num_steps"]
    print(f"window {name}: {steps} steps, {cost}, by the driver {waited:.3f} s")
    assert cost["stall_s"] == pytest.approx(waited, rel=0.2)
    files = [tp2.folder / artifact["path"] for artifact in window["artifacts"]]
    assert cost["written_bytes"] >= sum(path.stat().st_size for path in files) > 0


def test_a_window_is_shorter_for_what_it_may_cost(tp2: Outcome) -> None:
    window = tp2.windows()["cheap"]
    assert 10 <= window["spec"]["num_steps"] < 300
    assert window["spec"]["max_stall"] == 2
    assert window["cost"]["stall_s"] < 0.75 * tp2.windows()["steady"]["cost"]["stall_s"]


def test_a_fixed_shape_has_one_kind_of_decode_step(tp2: Outcome) -> None:
    for size in (1, 4):
        (group,) = tp2.windows()[f"bs{size}"]["strata"]
        batches = Counter[int]()
        for each in group["strata"]:
            if each["work"]["stage"] == "decode":
                batches[each["work"]["batch"]] += each["steps"]
        print(f"bs{size}: decode steps by batch: {dict(batches)}")
        # 63 steps: all but those at the ends, and those while the rest of the batch arrives.
        assert batches[size] >= 56


def test_ranks_of_a_window_meet_in_the_same_steps(tp2: Outcome) -> None:
    steps = tp2.windows()["steady"]["steps"]
    assert set(steps["per_rank"]) == {"TP0", "TP1"}
    assert steps["groups"][0]["compared"] >= 30


def straggler_of(outcome: Outcome, name: str) -> dict[str, Any]:
    """The finding of a window's only sync group; prints the figures that it stands on."""
    (found,) = outcome.windows()[name]["stragglers"]
    print(f"window {name}: {found['verdict']}: {found['reason']}")
    for key in ("latest", "lateness", "interval", "p_value", "steps", "collectives", "unmatched"):
        print(f"  {key}: {found[key]}")
    print(f"  waits by {found['waits_by']}, clocks within {found['clock_uncertainty_ns']} ns")
    for rank in found["ranks"]:
        waits, late = rank["wait_ns"] / 1e6, rank["late_ns"] / 1e6
        share = rank["explained_share"]
        print(f"  {rank['rank']}: waits {waits:.1f} ms, late {late:.1f} ms, explains {share:.2f}")
    result: dict[str, Any] = found
    return result


def test_an_undisturbed_window_blames_nobody(tp2: Outcome) -> None:
    found = straggler_of(tp2, "undisturbed")
    assert found["steps"] >= 30
    assert found["straggler"] is None, found["reason"]


def test_the_rank_that_is_interrupted_is_late_or_nobody_surely_is(tp2: Outcome) -> None:
    found = straggler_of(tp2, "interrupted")
    assert found["steps"] >= 30
    if found["straggler"] is None:
        assert found["verdict"] == "inconclusive"
        assert found["reason"]
    else:
        assert (found["straggler"], found["verdict"]) == ("TP1", "fail")
        first, second = found["ranks"]
        assert second["wait_ns"] < first["wait_ns"]


def test_nothing_is_left(tp2: Outcome) -> None:
    project = tp2.folder.parents[1]
    assert left_over(project) == []
    assert list((project / "leases").glob("*")) == []


def test_two_replicas_of_two_ranks(tmp_path: Path) -> None:
    sglang = real_sglang()
    write_project(
        tmp_path, sglang, TP2_DP2, model="llama", args=("--tp", "2", "--dp", "2"), ranks=4
    )
    outcome = run_project(tmp_path)
    assert outcome.status == 0, outcome.output
    window = outcome.windows()["both_replicas"]
    labels = ["DP0 TP0", "DP0 TP1", "DP1 TP0", "DP1 TP1"]
    assert window["ranks"] == labels
    assert sorted(artifact["rank"] for artifact in window["artifacts"]) == labels
    print("torch window of tp 2 x dp 2:", ", ".join(labels))
    assert [group["ranks"] for group in window["steps"]["groups"]] == [labels[:2], labels[2:]]
    assert left_over(tmp_path) == []
