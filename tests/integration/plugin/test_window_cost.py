"""What a window costs, as the server's log says, beside what the load driver measured."""

from __future__ import annotations

import statistics
from typing import Any

import pytest

from tests.integration.plugin.conftest import MakeProject
from tests.support.project import Outcome

STALL = 1.5  # s, of the stand-in
CONFIG = f"""
[server]
kind = "standin"
args = ["--tp", "2"]
standin_args = ["--step-ms", "10", "--layers", "1", "--profile-stall", "rank=0,s={STALL}"]

[gate]
min_steps = 20

[[threshold]]
limit = 1.5
"""
TESTS = """
LOAD = dict(max_concurrency=4, random_input_len=8, random_range_ratio=1.0, warm_up=False)

@pytest.mark.profile_window("plain", num_steps=60)
def test_plain(bench_serving):
    bench_serving(num_prompts=4, random_output_len=900, output_details=True, **LOAD)

def test_dear(bench_serving, profile_window):
    with bench_serving.running(num_prompts=100, random_output_len=900, disable_stream=True,
                               **LOAD) as load:
        with profile_window("dear", num_steps=60, max_stall=1):
            pass
        load.stop()

def test_by_hand(bench_serving, profile_window):
    with bench_serving.running(num_prompts=100, random_output_len=900, disable_stream=True,
                               **LOAD) as load:
        with profile_window("small", num_steps=200, max_mib=0.3) as window:
            window.wait()
        load.stop()

def test_certain(bench_serving, profile_window):
    with bench_serving.running(num_prompts=100, random_output_len=900, disable_stream=True,
                               **LOAD) as load:
        with profile_window("half", num_steps=30, max_mib=0.1, repeat="certain") as window:
            window.wait()
        load.stop()
"""


@pytest.fixture(scope="module")
def outcome(make_project: MakeProject) -> Outcome:
    return make_project(TESTS, CONFIG).run()


def window_of(outcome: Outcome, name: str) -> dict[str, Any]:
    (window,) = (each for each in outcome.results["windows"] if each["name"] == name)
    return window


def waited(outcome: Outcome, name: str) -> float:
    """By how much longer than usual a stream of the load waited for a token, s."""
    window = window_of(outcome, name)
    (load,) = [each for each in outcome.results["loads"] if each["id"] == window["load"]]
    gaps = [gap for stream in load["raw"]["itls"] for gap in stream]
    return max(gaps) - statistics.median(gaps)


def test_the_stall_of_a_window_is_what_streams_waited(outcome: Outcome) -> None:
    cost = window_of(outcome, "plain")["cost"]
    assert cost["stall_s"] == pytest.approx(waited(outcome, "plain"), rel=0.2)
    assert cost["stall_s"] > STALL
    assert cost["written_bytes"] > 1000
    assert cost["analysis_s"] > 0


def test_traces_of_what_passed_are_not_kept_and_cost_nothing_any_more(outcome: Outcome) -> None:
    assert window_of(outcome, "plain")["verdict"] == "pass"
    assert window_of(outcome, "plain")["cost"]["kept_bytes"] == 0


def test_the_cost_is_a_line_of_the_summary_and_properties_of_the_test(outcome: Outcome) -> None:
    (line,) = [line for line in outcome.text.splitlines() if line.startswith("cost: ")]
    assert "serving stood still for " in line
    properties = dict(outcome.properties("test_plain"))
    assert float(properties["stall_s"]) == pytest.approx(
        window_of(outcome, "plain")["cost"]["stall_s"], rel=1e-4
    )


def test_a_window_is_shorter_for_the_disk_that_it_may_take(outcome: Outcome) -> None:
    """The window before it was of the same kind, so that no other one was opened for it."""
    plain, small = window_of(outcome, "plain"), window_of(outcome, "small")
    assert small["spec"]["max_mib"] == 0.3
    per_step = plain["cost"]["written_bytes"] / plain["spec"]["num_steps"]
    assert small["spec"]["num_steps"] == pytest.approx(0.27 * 2**20 / per_step, abs=1)
    assert small["cost"]["written_bytes"] <= 0.3 * 2**20
    assert small["verdict"] == "pass"


def test_until_certain_each_window_may_have_half_of_the_steps(outcome: Outcome) -> None:
    windows = [each for each in outcome.results["windows"] if each["name"] == "half"]
    assert len(windows) >= 2
    assert {each["verdict"] for each in windows} == {"pass"}
    assert all(10 <= each["spec"]["num_steps"] < 20 for each in windows)


def test_a_window_that_is_too_dear_is_refused_with_what_was_measured(outcome: Outcome) -> None:
    assert outcome.word("test_dear") == "FAILED"
    message = " ".join(outcome.text.split())
    assert "window 'dear': max_stall=1 allows " in message
    assert "serving stood still for 1." in message
