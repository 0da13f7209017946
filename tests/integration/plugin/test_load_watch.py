"""Triggers and the fixture `load_watch` in a user's project, on a stand-in of two replicas."""

from __future__ import annotations

import signal
import statistics
import time
from datetime import datetime
from typing import Any

import pytest

from pytest_sglprof._report.page.history import PlacedWindow
from pytest_sglprof._report.page.moments import Moments, moments
from pytest_sglprof._report.results import validate
from tests.integration.plugin.conftest import MakeProject, OutcomeOf, RunProjects
from tests.support.project import Outcome

CONFIG = """
[server]
kind = "standin"
args = ["--dp", "2"]
standin_args = ["--step-ms", "4", "--layers", "1", "--crash-delay", "0.2"]

[servers.tp]
kind = "standin"
args = ["--tp", "2"]
standin_args = ["--step-ms", "4", "--layers", "1"]

[[threshold]]
limit = 1.5
"""
HEAD = """
import math
import threading
import time
from pytest_sglprof._errors import SettingsError
from pytest_sglprof import ImbalanceOnset, QueueGrowth, balanced_load, one_rank_load

SHAPE = dict(input_len=8, output_len=300)

def equal(concurrency=32, requests=64):
    load = balanced_load(concurrency=concurrency, requests=requests, **SHAPE)
    return {"warm_up": False, "disable_stream": True, **load}

# In one wave: of three, looks would meet the moments while the rank is filled anew.
ONE = one_rank_load(1, concurrency=32, requests=32, input_len=8, output_len=20_000)
ONE |= {"warm_up": False, "disable_stream": True}

def uneven_until(bench_serving, load_watch, count):
    # As long as it takes: a load until so many windows are closed.
    with bench_serving.running(**ONE) as load:
        while load.is_running and sum(
            each.closed < math.inf for each in load_watch.disturbances.windows
        ) < count:
            time.sleep(0.1)
        load.stop()

def onset(**more):
    return pytest.mark.profile_window(trigger=ImbalanceOnset(hold=1.0, within=250, **more))
"""
ONSETS = """
@onset()
def test_onset(bench_serving, load_watch):
    bench_serving(**equal())
    uneven_until(bench_serving, load_watch, 3)
    frame = load_watch.frame
    assert set(frame["rank"]) == {"DP0", "DP1"}
    assert set(frame["source"]) == {"loads", "log"}
    assert frame.loc[frame["rank"] == "DP1", "running"].max() == 32

@onset(source="log", suspicion=False)
def test_onset_in_the_log(bench_serving, load_watch):
    uneven_until(bench_serving, load_watch, 1)
"""
BALANCED = """
@onset()
def test_balanced(bench_serving):
    bench_serving(**equal())

@onset(on_no_onset="fail")
def test_balanced_but_asked_for(bench_serving):
    bench_serving(**equal())

@pytest.mark.profile_window(
    trigger=lambda loads: sum(load.running for load in loads.values()) > 20, num_steps=60
)
def test_callable(bench_serving):
    bench_serving(**equal())

def broken(loads):
    raise ZeroDivisionError("the user's own mistake")

@pytest.mark.profile_window(trigger=broken)
def test_broken_callable(bench_serving):
    bench_serving(**equal())
"""
LAST = """
def test_nothing_is_left(sglang_server):
    names = [thread.name for thread in threading.enumerate()]
    assert not [name for name in names if name.startswith("sglprof-")], names
"""
UNKNOWN = """
@onset()
def test_too_little_load(bench_serving):
    bench_serving(**equal(concurrency=4, requests=16))

@pytest.mark.sglang_server("tp")
@onset()
def test_pure_tp_cannot_know(bench_serving):
    open("body-of-pure-tp", "w").close()

def test_a_window_by_hand_has_no_trigger(profile_window):
    with pytest.raises(SettingsError, match="you open this window yourself"):
        profile_window("mine", trigger=ImbalanceOnset())
"""


def load_page(outcome: Outcome) -> Moments:
    run = validate(outcome.results)
    placed = [PlacedWindow(doc, run, doc.id, None, "") for doc in run.windows]
    (around,) = moments(placed)
    return around


@pytest.fixture(scope="module")
def onsets(make_project: MakeProject) -> Outcome:
    return make_project(HEAD + ONSETS + LAST, CONFIG).run("-p", "no:cacheprovider")


@pytest.fixture(scope="module")
def without_onset(run_projects: RunProjects) -> OutcomeOf:
    texts = {"balanced": HEAD + BALANCED + LAST, "unknown": HEAD + UNKNOWN + LAST}
    return run_projects(texts, "-p", "no:cacheprovider", config=CONFIG)


@pytest.fixture(scope="module")
def balanced(without_onset: OutcomeOf) -> Outcome:
    return without_onset("balanced")


@pytest.fixture(scope="module")
def unknown(without_onset: OutcomeOf) -> Outcome:
    return without_onset("unknown")


def at_onset(outcome: Outcome) -> dict[str, Any]:
    (window,) = [each for each in outcome.windows("test_onset") if each["moment"] == "at"]
    return window


def moment(text: str) -> float:
    return datetime.fromisoformat(text.replace("Z", "+00:00")).timestamp()


def test_the_window_opens_within_a_second_of_the_onset(onsets: Outcome) -> None:
    validate(onsets.results)
    window = at_onset(onsets)
    onset = window["onset"]
    assert 0 <= moment(window["opened"]) - moment(onset["declared"]) <= 1.0
    assert moment(onset["declared"]) - moment(onset["time"]) >= 1.0
    assert (onset["kind"], onset["source"]) == ("starved", "loads")
    assert [rank["rank"] for rank in onset["ranks"]] == ["DP0", "DP1"]
    assert onset["ranks"][0]["running"] == 0
    assert onset["sentence"].startswith("DP0 is starved")


def test_the_trace_confirms_the_suspicion(onsets: Outcome) -> None:
    window = at_onset(onsets)
    assert window["state"] == "complete", window["state_reason"]
    assert window["steps"]["per_rank"]["DP1 TP0"] > 100
    assert window["onset"]["correlation"] == pytest.approx(1.0)
    assert "the trace confirms it: DP1 had most to do" in window["onset"]["sentence"]


def test_load_around_the_window_is_kept(onsets: Outcome) -> None:
    window = at_onset(onsets)
    strip = {rank["rank"]: rank for rank in window["load_samples"]}
    assert set(strip) == {"DP0", "DP1"}
    assert strip["DP1"]["time"][0] < moment(window["opened"]) - 2
    assert max(strip["DP1"]["running"]) == 32
    for rank in strip.values():
        assert len(rank["time"]) == len(rank["running"]) == len(rank["tokens"]) <= 600


def test_what_costs_nothing_is_kept_beside_it(onsets: Outcome) -> None:
    around = at_onset(onsets)["around"]
    log = {series["rank"]: series for series in around["log"]}
    assert {series["source"] for series in around["log"]} == {"log"}
    busy = log["DP1"]
    known = [ms for ms in busy["token_ms"] if ms is not None]
    assert (
        statistics.median(known) >= 4.0
    )  # of the stand-in's steps, which a busy machine makes longer
    assert busy["time"][0] < moment(at_onset(onsets)["onset"]["time"])


def test_short_windows_before_and_after_lie_beside_the_one_that_is_judged(
    onsets: Outcome,
) -> None:
    windows = sorted(onsets.windows("test_onset"), key=lambda each: each["opened"])
    assert [each["moment"] for each in windows] == ["before", "at", "after"]
    before, at, after = windows
    assert {each["moment_of"] for each in windows} == {at["id"]}
    assert moment(before["opened"]) < moment(at["onset"]["declared"]) < moment(after["opened"])
    names = ["test_onset-before", "test_onset", "test_onset-after"]
    assert [each["name"] for each in windows] == names
    for short in (before, after):
        assert short["reason"].startswith("not judged: it is of the time ")
        assert 0 < max(short["steps"]["per_rank"].values()) < at["steps"]["per_rank"]["DP1 TP0"]
        assert short["judgements"] == []
    shown = onsets.results["summary"]["windows"]
    assert sum(shown.values()) == 2  # those at the onsets of the two tests


def test_the_page_has_the_ranks_of_all_three_side_by_side(onsets: Outcome) -> None:
    page = load_page(onsets)
    assert [each.moment for each in page.windows] == ["before", "at", "after"]
    assert page.sentence.startswith("DP0 is starved")
    busy = next(row for row in page.rows if row.rank == "DP1 TP0")
    assert [then.running for then in busy.then][1] == 32
    # By hand, from the sums of the kernels in the document.
    window = at_onset(onsets)
    compute = sum(
        row["total_ns"]
        for row in window["table"]
        if row["rank"] == "DP1 TP0" and row["category"] not in ("communication", "memory")
    )
    shown = busy.then[1].compute_ns
    assert shown in (compute, pytest.approx(compute / window["steps"]["per_rank"]["DP1 TP0"]))


def test_an_onset_in_the_log_opens_it_too(onsets: Outcome) -> None:
    (window,) = onsets.windows("test_onset_in_the_log")
    assert window["onset"]["source"] == "log"
    assert window["onset"]["kind"] == "starved"
    assert window["steps"]["per_rank"]["DP1 TP0"] > 0


def test_balanced_load_passes_in_words(balanced: Outcome) -> None:
    assert balanced.word("test_balanced") == "PASSED"
    (window,) = balanced.windows("test_balanced")
    assert window["onset"] is None
    assert window["reason"].startswith("balanced for ")
    assert balanced.word("test_balanced_but_asked_for") == "FAILED"


def test_what_cannot_be_known_is_inconclusive(unknown: Outcome) -> None:
    assert unknown.test("test_too_little_load")["verdict"] == "inconclusive"
    assert "too little to tell" in unknown.test("test_too_little_load")["reason"]


def test_one_dp_rank_is_refused_before_the_load_runs(unknown: Outcome) -> None:
    section = unknown.section("test_pure_tp_cannot_know")
    assert "imbalance of load cannot be known here" in section
    assert "trigger=KernelImbalance(...)" in section
    assert not (unknown.folder / "body-of-pure-tp").exists()


def test_a_callable_is_a_trigger(balanced: Outcome) -> None:
    (window,) = balanced.windows("test_callable")
    assert window["onset"]["kind"] == "custom"
    assert window["spec"]["trigger"] == "<lambda>"


def test_an_error_in_the_watching_thread_is_raised_in_the_test(
    onsets: Outcome, balanced: Outcome, unknown: Outcome
) -> None:
    assert balanced.word("test_broken_callable") == "FAILED"
    assert "ZeroDivisionError: the user's own mistake" in balanced.section("test_broken_callable")
    for run in (onsets, balanced, unknown):
        assert run.word("test_nothing_is_left") == "PASSED"
    assert unknown.word("test_a_window_by_hand_has_no_trigger") == "PASSED"


WAITING = """
import time
from pytest_sglprof import ImbalanceOnset

@pytest.mark.profile_window(trigger=ImbalanceOnset(within=100))
def test_waits(sglang_server, load_watch):
    print("WAITING", flush=True)
    time.sleep(100)
"""


def test_ctrl_c_while_it_waits_leaves_nothing(make_project: MakeProject) -> None:
    project = make_project(WAITING, CONFIG)
    process = project.start("-s")
    output = project.folder / "output.txt"
    deadline = time.monotonic() + 60
    while "WAITING" not in output.read_text() and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    assert project.outcome(process).status == 2
    assert project.left_over(within=20.0) == []
