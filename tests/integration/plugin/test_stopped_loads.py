"""Loads that a test stops once its window is over: what ran is known, what it measured is not."""

from __future__ import annotations

from pytest_sglprof._baselines.history import read_history
from tests.integration.plugin.conftest import MakeProject

TESTS = """
import pytest

@pytest.mark.parametrize("length", [16, 32])
def test_stopped(bench_serving, profile_window, length):
    options = {"max_concurrency": 2, "random_output_len": 400, "warm_up": False}
    with bench_serving.running(num_prompts=50, random_input_len=length, **options) as load:
        with profile_window("first", num_steps=60) as window:
            window.wait()
        load.stop()
    with bench_serving.running(num_prompts=16, random_input_len=64, **options):
        with profile_window("second", num_steps=60) as window:
            window.wait()
"""
SERVER = """
[server]
kind = "standin"
args = ["--tp", "2"]
standin_args = ["--step-ms", "4", "--layers", "1"]
"""


def test_windows_know_the_load_that_ran_beside_them(make_project: MakeProject) -> None:
    project = make_project(TESTS, SERVER)
    outcome = project.run()
    records = read_history(project.folder / ".sglprof")
    lengths = [
        (record.key.window, record.provenance.load.get("random_input_len")) for record in records
    ]
    assert lengths == [("first", "16"), ("second", "64"), ("first", "32"), ("second", "64")], (
        outcome.text
    )
    assert records[0].key.load != records[2].key.load
    loads = {load["id"]: load for load in outcome.results["loads"]}
    assert len(loads) == 2  # a load that was stopped has no figures
    for window in outcome.results["windows"]:
        assert (window["load"] in loads) == (window["name"] == "second")
