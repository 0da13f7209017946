"""Windows of a few steps around an onset: rings, samples, and that none fires its own trigger."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from pytest_sglprof._cli.main import main
from tests.integration.plugin.conftest import MakeProject
from tests.support.project import Outcome

CONFIG = """
[server]
kind = "standin"
args = ["--dp", "2"]
standin_args = ["--step-ms", "4", "--layers", "1", "--profile-stall", "rank=1,s=3"]

[servers.tp]
kind = "standin"
args = ["--tp", "2"]
standin_args = ["--step-ms", "4", "--layers", "1", "--slow", "rank=1,factor=1.2,from_step=200"]

[output]
keep = "all"

[[threshold]]
limit = 1.5
"""
TESTS = """
import math, time
from pytest_sglprof import ImbalanceOnset, KernelImbalance, Ring, balanced_load

def endless(concurrency, output_len):
    load = balanced_load(
        concurrency=concurrency, requests=100_000, input_len=8, output_len=output_len
    )
    return {"warm_up": False, "disable_stream": True, **load}

def closed(load_watch):
    return [each for each in load_watch.disturbances.windows if each.closed < math.inf]

ONSET = ImbalanceOnset(hold=0.5, min_running=4, within=250, suspicion=False)

# While the second replica writes its traces, it serves nobody: its queue grows, and the first one
# runs out of requests.
@pytest.mark.profile_window(trigger=ONSET, ring=Ring(steps=5, every=1, keep=1, max_share=0.1))
def test_the_ring_does_not_fire_its_own_trigger(bench_serving, load_watch):
    with bench_serving.running(**endless(32, 50)) as load:
        began, calm = time.time(), load_watch.disturbances.undisturbed
        while load.is_running and (
            len(closed(load_watch)) < 2 or calm(time.time()) - calm(began) < 5
        ):
            time.sleep(0.1)
        load.stop()
    assert min(each.stall for each in closed(load_watch)[:1]) > 1

@pytest.mark.profile_window(trigger=ONSET, ring=Ring(steps=5, every=1, keep=1, max_share=0.001))
def test_a_ring_that_stalls_too_much_is_refused(bench_serving, load_watch):
    with bench_serving.running(**endless(32, 100)) as load:
        while load.is_running and not closed(load_watch):
            time.sleep(0.1)
        time.sleep(12)
        load.stop()

@pytest.mark.sglang_server("tp")
@pytest.mark.profile_window(
    trigger=KernelImbalance(every=0.5, steps=5, limit=1.1, max_share=1.0),
    num_steps=60, slowdown=1.1, source_lines=True,
)
def test_a_rank_becomes_slower(bench_serving, load_watch):
    with bench_serving.running(**endless(8, 400)) as load:
        while load.is_running and not has_sources():
            time.sleep(0.1)
        load.stop()

def has_sources():
    import pathlib
    folder = ".sglprof/run-*/windows/*becomes_slower*-sources*/*-TP-1.trace.json.gz"
    return any(pathlib.Path().glob(folder))

@pytest.mark.profile_window(trigger=KernelImbalance())
def test_replicas_of_one_rank_have_no_peers(bench_serving):
    open("body-without-peers", "w").close()
"""


@pytest.fixture(scope="module")
def outcome(make_project: MakeProject) -> Outcome:
    return make_project(TESTS, CONFIG).run("-p", "no:cacheprovider")


def test_windows_do_not_fire_the_trigger_that_they_are_opened_for(outcome: Outcome) -> None:
    assert outcome.word("test_the_ring_does_not_fire_its_own_trigger") == "PASSED"
    windows = outcome.windows("test_the_ring_does_not_fire_its_own_trigger")
    (unopened,) = [each for each in windows if each["name"].endswith("trigger")]
    assert unopened["onset"] is None
    assert unopened["reason"].startswith("balanced for ")


def test_only_the_newest_windows_of_a_ring_are_kept(outcome: Outcome) -> None:
    windows = outcome.windows("test_the_ring_does_not_fire_its_own_trigger")
    (kept,) = [each for each in windows if each["name"].endswith("-ring")]
    assert kept["moment"] == "before"
    assert outcome.run_folder is not None
    folders = (outcome.run_folder / "windows").glob("*does_not_fire*-ring*")
    assert len(list(folders)) == 1


def test_a_ring_whose_windows_would_be_too_far_apart_is_inconclusive(outcome: Outcome) -> None:
    test = outcome.test("test_a_ring_that_stalls_too_much_is_refused")
    assert test["verdict"] == "inconclusive"
    assert "more than 10: ask for fewer steps" in test["reason"]


def test_a_rank_that_becomes_slower_opens_a_window_by_its_kernels(outcome: Outcome) -> None:
    windows = outcome.windows("test_a_rank_becomes_slower")
    by_moment = {each["moment"]: each for each in windows}
    assert set(by_moment) == {"at", "after", "sources"}  # samples are read and deleted
    window = by_moment["at"]
    assert (window["onset"]["kind"], window["onset"]["source"]) == ("kernels", "kernels")
    assert window["onset"]["sentence"].startswith("TP1 computes 1.")
    assert window["verdict"] == "fail"
    sampled = {series["rank"]: series["ratios"] for series in window["around"]["sampled"]}
    assert len(sampled["TP1"]) >= 2
    assert sampled["TP1"][-1] == pytest.approx(1.2, abs=0.05)


def test_after_the_fail_the_lines_behind_the_kernels_of_the_slow_rank_are_named(
    outcome: Outcome,
) -> None:
    windows = outcome.windows("test_a_rank_becomes_slower")
    by_moment = {each["moment"]: each for each in windows}
    sources = by_moment["at"]["sources"]
    assert (sources["rank"], sources["reason"]) == ("TP1", "")
    assert sources["window"] == by_moment["sources"]["id"]
    assert by_moment["sources"]["spec"]["with_stack"] is True
    (trace,) = [each for each in by_moment["sources"]["artifacts"] if each["rank"] == "TP1"]
    assert outcome.run_folder is not None
    packed = (outcome.run_folder / trace["path"]).read_bytes()
    events = json.loads(gzip.decompress(packed))["traceEvents"]
    on_gpu = ("kernel", "gpu_memcpy", "gpu_memset")
    total = sum(event["dur"] for event in events if event.get("cat") in on_gpu)
    assert sum(line["total_ns"] for line in sources["lines"]) / 1e3 == pytest.approx(total)
    assert all(line["line"].startswith("sglang/") for line in sources["lines"])


def test_perfetto_has_the_windows_around_an_onset_side_by_side(
    outcome: Outcome, tmp_path: Path
) -> None:
    windows = outcome.windows("test_a_rank_becomes_slower")
    by_moment = {each["moment"]: each for each in windows}
    file = tmp_path / "around.json"
    words = ("--to", "perfetto", "--only", "kernels", "--window", by_moment["after"]["id"])
    assert main(["export", str(outcome.run_folder), *words, "-o", str(file)]) == 0
    events = json.loads(file.read_text())["traceEvents"]
    names = {
        event["pid"]: event["args"]["name"] for event in events if event["name"] == "process_name"
    }
    for moment in ("at", "after"):
        rows = by_moment[moment]["table"]
        for rank in ("TP0", "TP1"):
            of_rank = [
                e for e in events if e["ph"] == "X" and names[e["pid"]] == f"{rank} {moment}"
            ]
            assert len(of_rank) == sum(row["count"] for row in rows if row["rank"] == rank)
        of_window = [e for e in events if e["ph"] == "X" and names[e["pid"]].endswith(moment)]
        assert min(event["ts"] for event in of_window) == 0


def test_kernels_without_peers_are_refused_before_the_load_runs(outcome: Outcome) -> None:
    assert "whose ranks have no peers" in outcome.section("test_replicas_of_one_rank_have_no_peers")
    assert not (outcome.folder / "body-without-peers").exists()
