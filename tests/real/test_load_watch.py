"""Onsets on a real SGLang of two replicas: load that moves to one of them, and load that
does not."""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from pytest_sglprof._load.change_points import finished_load
from pytest_sglprof._load.onset import OnsetDetector, OnsetRule
from pytest_sglprof._load.samples import LoadSample
from pytest_sglprof._load.sources import read_log
from tests.support.real_env import real_sglang
from tests.support.real_project import Outcome, left_over, run_project, write_project

pytestmark = pytest.mark.real_server

BODY = """
import contextlib
import json
import pathlib
import threading
import time

import httpx
import pytest

from pytest_sglprof import ImbalanceOnset

TRIGGER = dict(hold=2.0, min_running=4, min_gap=3)
CLIENTS = 16
facts = {}
requests = []

@contextlib.contextmanager
def load(url, rank_of):
    over = threading.Event()

    def client(number):
        with httpx.Client(timeout=60, trust_env=False) as http:
            while not over.is_set():
                began = time.time()
                body = {
                    "input_ids": [number + 7] * 16,
                    "routed_dp_rank": rank_of(number),
                    # Each client's own length: of one length they would come in waves.
                    "sampling_params": {"max_new_tokens": 40 + 3 * number, "ignore_eos": True},
                }
                http.post(f"{url}/generate", json=body).raise_for_status()
                requests.append((began, time.time()))

    threads = [threading.Thread(target=client, args=(n,)) for n in range(CLIENTS)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        over.set()
        for thread in threads:
            thread.join()


@pytest.mark.profile_window(trigger=ImbalanceOnset(within=60, **TRIGGER), duration=2.0)
def test_load_moves_to_one_rank(sglang_server, load_watch):
    target = {}
    with load(sglang_server.url, lambda n: target.get("rank", n % 2)):
        time.sleep(10)
        facts["change"] = time.time()
        target["rank"] = 0
        time.sleep(12)
    frame = load_watch.frame
    facts["sources"] = sorted(set(frame["source"]))
    facts["ranks"] = sorted(set(frame["rank"]))
    at_change = [end - facts["change"] for begin, end in requests if begin < facts["change"] < end]
    facts["drained"] = max(at_change, default=0.0)
    pathlib.Path("facts.json").write_text(json.dumps(facts))


@pytest.mark.profile_window(trigger=ImbalanceOnset(within=60, **TRIGGER))
def test_load_stays_balanced(sglang_server):
    with load(sglang_server.url, lambda n: n % 2):
        time.sleep(62)
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    folder = tmp_path_factory.mktemp("dp2")
    write_project(folder, real_sglang(), BODY, model="llama", args=("--dp", "2"), ranks=2)
    config = (folder / "sglprof.toml").read_text()
    config = config.replace("env = {", 'env = {"SGLANG_LOG_MS" = "1", ')
    (folder / "sglprof.toml").write_text(config)
    return run_project(folder)


@pytest.fixture(scope="module")
def facts(run: Outcome) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run.folder.parents[1] / "facts.json").read_text())
    return found


def moment(text: str) -> float:
    return datetime.fromisoformat(text.replace("Z", "+00:00")).timestamp()


def window_of(run: Outcome, name: str) -> dict[str, Any]:
    return next(w for w in run.results["windows"] if w["nodeid"].endswith(f"::{name}"))


def test_the_onset_is_seen_within_three_seconds(run: Outcome, facts: dict[str, Any]) -> None:
    onset = window_of(run, "test_load_moves_to_one_rank")["onset"]
    print("onset after the change:", moment(onset["time"]) - facts["change"], "s", onset)
    assert 0 <= moment(onset["time"]) - facts["change"] <= 3.0
    assert onset["source"] == "loads"
    assert "DP1 is starved" in onset["sentence"] or "DP0 has" in onset["sentence"]
    assert (facts["sources"], facts["ranks"]) == (["loads", "log"], ["DP0", "DP1"])


def test_the_window_holds_the_busy_rank(run: Outcome) -> None:
    window = window_of(run, "test_load_moves_to_one_rank")
    delay = moment(window["opened"]) - moment(window["onset"]["declared"])
    print("window opened", delay, "s after the onset was declared;", window["onset"]["sentence"])
    assert 0 <= delay <= 1.0
    assert window["state"] == "complete", window["state_reason"]
    steps = window["steps"]["per_rank"]
    assert steps["DP0 TP0"] >= 10
    assert steps.get("DP1 TP0", 0) == 0
    assert window["onset"]["correlation"] == pytest.approx(1.0)
    assert "the trace confirms it: DP0 had most to do" in window["onset"]["sentence"]


def log_samples(run: Outcome) -> list[LoadSample]:
    (server,) = run.results["servers"]
    samples = read_log(run.folder / server["log"])
    return [sample for sample in samples if isinstance(sample, LoadSample)]


def test_the_log_tells_it_within_one_interval(run: Outcome, facts: dict[str, Any]) -> None:
    rule = OnsetRule(hold=2.0, min_running=4, min_gap=3)
    samples = log_samples(run)
    detector = OnsetDetector(rule, ranks=["DP0", "DP1"], source="log", milliseconds=True)
    for sample in samples:
        detector.add([sample], sample.time)
    # What DP1 was running at the change goes on there to its end.
    drained = facts["change"] + facts["drained"]
    online = detector.onsets[0]
    offline = finished_load(samples, rule, milliseconds=True).onsets[0]
    print("from the log, after the change:", online.time - facts["change"], online)
    print("by change points:", offline.time - facts["change"], "s; drained", facts["drained"])
    # A line is of the time of its step, which may have begun before the change.
    assert facts["change"] - 3 * online.resolution_s <= online.time
    assert online.time <= drained + online.resolution_s + 0.05
    assert abs(offline.time - facts["change"]) <= 3.0
    assert online.resolution_s < 1.0
    ends = [onset for onset in detector.onsets if onset.time > facts["change"] + 30]
    assert ends == [], "the balanced minute has no onset"


def test_balanced_load_has_no_onset_in_a_minute(run: Outcome) -> None:
    # Each replica is one rank without a peer: the window of the onset itself is no verdict.
    assert run.tests()["test_load_moves_to_one_rank"]["verdict"] == "inconclusive"
    test = run.tests()["test_load_stays_balanced"]
    assert test["verdict"] == "pass"
    assert window_of(run, "test_load_stays_balanced")["onset"] is None
    print(test["reason"])
    assert left_over(Path(run.folder.parents[1])) == []
