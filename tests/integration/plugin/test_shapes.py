"""`profile_shapes` on the stand-in: the same kinds of steps in every window, and no silent skip."""

from __future__ import annotations

import json
from collections import Counter

import pytest

from tests.integration.plugin.conftest import MakeProject
from tests.support.project import Outcome

SERVERS = """
[server]
kind = "standin"
api_key_env = "THE_KEY"
admin_api_key_env = "THE_ADMIN_KEY"
args = ["--tp", "2", "--max-running-requests", "4"]
standin_args = ["--step-ms", "4", "--layers", "1"]

[[threshold]]
limit = 1.10
"""
TESTS = """
import json
import pytest
from pytest_sglprof import LoadResult, SglprofError

SMALL = dict(input=16, output=60)

def test_two_shapes(profile_shapes):
    one, four = profile_shapes(batch=[1, 4], **SMALL, slowdown={"moe": 1.2})
    for size, shape in ((1, one), (4, four)):
        assert (shape.batch, shape.input_len, shape.output_len) == (size, 16, 60)
        # 59 steps of 4 ms at least, after one prefill
        assert 0.236 <= shape.latency < 5
        assert 0 < shape.ttft < 1000 * shape.latency
        assert shape.output_throughput > 0
        assert shape.accept_length is None
        assert shape.load.requested == shape.load.completed == size
        assert shape.window.check("slowdown", 1.2) < 1.1
    assert one.load.tpot["mean"] == pytest.approx((1000 * one.latency - one.ttft) / 59)
    assert four.load.tpot["mean"] is four.load.ttft["p99"] is None
    assert four.output_throughput > 1.5 * one.output_throughput

def test_ends_by_steps(profile_shapes, bench_serving):
    (two,) = profile_shapes(batch=2, **SMALL, num_steps=50)
    load = bench_serving(num_prompts=2, random_input_len=8, random_output_len=8, warm_up=False)
    assert bench_serving.results == [two.load, load]

def test_no_room(profile_shapes):
    profile_shapes(batch=[1, 5], **SMALL)

def test_no_room_for_the_first(profile_shapes):
    profile_shapes(batch=[8, 2], **SMALL)

def test_unknown_option_of_the_driver(profile_shapes):
    profile_shapes(batch=1, **SMALL, driver={"temprature": 1})

@pytest.mark.parametrize(("what", "message"), [
    (dict(batch=[1, 1]), "each of them once"),
    (dict(batch=0), "at least 1"),
    (dict(batch=[]), "one or more"),
    (dict(output=50), "give output=51"),
    (dict(output=60, num_steps=90), "give output=91"),
    (dict(repeat=2), "opens one window"),
    (dict(name="x"), "opens one window"),
    (dict(slowdwn=1.1), "slowdown"),
    (dict(driver={"base_url": "x"}), "set by pytest-sglprof"),
    (dict(driver={"profile": True}), "set by pytest-sglprof"),
])
def test_refused(profile_shapes, what, message):
    with pytest.raises(SglprofError, match=message):
        profile_shapes(**{"batch": 1, **SMALL, **what})
"""


@pytest.fixture(scope="module")
def outcome(make_project: MakeProject) -> Outcome:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("THE_KEY", "key-of-shapes-1")
        patch.setenv("THE_ADMIN_KEY", "admin-key-of-shapes-1")
        return make_project(TESTS, SERVERS).run()


def test_only_what_has_no_room_fails(outcome: Outcome) -> None:
    failed = [
        t["nodeid"].rsplit("::", 1)[1] for t in outcome.results["tests"] if t["outcome"] != "passed"
    ]
    assert sorted(failed) == [
        "test_no_room",
        "test_no_room_for_the_first",
        "test_unknown_option_of_the_driver",
    ], outcome.text


def test_every_shape_has_a_window_with_its_own_kind_of_step(outcome: Outcome) -> None:
    windows = [w for w in outcome.results["windows"] if "test_two_shapes" in w["nodeid"]]
    assert [window["name"] for window in windows] == ["bs1", "bs4"]
    for window, size in zip(windows, (1, 4), strict=True):
        assert (window["state"], window["verdict"]) == ("complete", "pass")
        (group,) = window["strata"]
        steps = Counter[int]()  # by batch: KV tokens make several kinds of each
        for each in group["strata"]:
            if each["work"]["stage"] == "decode":
                steps[each["work"]["batch"]] += each["steps"]
        # Of 59 the ends may be cut off; while a batch arrives a smaller one may decode once.
        assert steps[size] >= 59 - 4, steps
        assert sum(steps.values()) <= 60


def test_a_skipped_batch_is_an_error_with_the_drivers_own_words(outcome: Outcome) -> None:
    for size in (5, 8):
        assert f"the server has no room for a batch of {size}" in outcome.text
        assert f"batch_size={size} > skip_max_running_requests_threshold=4" in outcome.text
    assert "unrecognized arguments: --temprature 1" in outcome.text


def test_figures_and_windows_are_joined(outcome: Outcome) -> None:
    loads = {load["id"]: load for load in outcome.results["loads"]}
    for window in outcome.results["windows"]:
        if window["state"] != "complete":
            continue
        load = loads[window["load"]]
        assert load["requested"] == int(window["name"].removeprefix("bs"))
        assert load["started"] < window["opened"]
        size = load["command"].index("--batch-size")
        assert load["command"][size + 1] == str(load["requested"])


def test_no_key_is_left(outcome: Outcome) -> None:
    for path in outcome.run_folder.rglob("*"):
        if path.is_file():
            assert b"key-of-shapes-1" not in path.read_bytes(), path


def test_the_record_of_the_life_has_the_figures_from_before_the_windows(outcome: Outcome) -> None:
    (history,) = (outcome.folder / ".sglprof" / "history").iterdir()
    records = [json.loads(line) for line in history.read_text().splitlines()]
    loads = {record["key"]["window"]: record["load"] for record in records}
    assert set(loads) == {"bs1", "bs4", "bs2"}
    assert loads["bs2"] is None  # a window was open before it
    for name, figures in (("bs1", {"ttft_mean", "tpot_mean"}), ("bs4", set())):
        load = loads[name]
        assert (load["driven"], load["queue_grows"]) == ("concurrency", False)
        assert load["completed"] == load["requested"] == int(name[2:])
        assert {"output_throughput"} <= set(load["figures"])
        assert figures == {each for each in load["figures"] if each.endswith("_mean")}
