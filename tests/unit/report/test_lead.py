"""What a window says first: who, how much, since when, how sure."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest

from pytest_sglprof._report.model import RecordedWindow, Results
from pytest_sglprof._report.page.history import PlacedWindow, with_earlier
from pytest_sglprof._report.page.lead import Lead, beginning_words, headline, lead
from tests.support.kernel_tables import build, slow
from tests.support.regressions import regression
from tests.support.windows import BALANCED, SHORT, SLOW, as_run, as_window, plain, run, window

SINCE = 30  # step of 50 from which the rank of `LATE` is slower
LATE = build(scale=slow("TP1", "moe", 2.0, from_step=SINCE))


def placed(document: RecordedWindow, **more: Any) -> PlacedWindow:
    return PlacedWindow(document, as_run(run([])), "window-1", None, "", **more)


def lead_of(document: dict[str, Any]) -> Lead:
    answers = lead(placed(as_window(document)))
    assert answers is not None
    return answers


def test_a_slow_rank_is_named_with_one_measure_and_the_others_are_more() -> None:
    answers = lead_of(window(SLOW))
    assert answers.who == "TP1"
    assert (answers.value, answers.measure) == ("1.40", "slowdown of moe, limit 1.10")
    assert answers.sure == ("exactly 1.400", "p < 0.001", "50 steps")  # planted without jitter
    assert answers.more[:2] == ("imbalance factor 1.17", "lost share 14.3 %")
    assert not any("slowdown" in words for words in answers.more)
    assert answers.since == ("throughout the window's 50 steps",)


def test_nobody_only_where_the_verdict_is_nobody() -> None:
    assert lead_of(window(BALANCED)).who == "nobody"
    assert lead_of(window(SHORT)).who == "not known"
    died = lead_of(window(None, state="failed", reason="it died"))
    assert (died.who, died.value, died.sure) == ("not known", "–", ("not known",))
    assert lead_of(window(SHORT)).since == lead_of(window(BALANCED)).since == ()


def test_the_step_from_which_a_rank_is_slower() -> None:
    (since,) = lead_of(window(LATE)).since
    # Compute of a step is 1.1 ms, of which 0.6 ms are twice as long.
    assert since == f"since step {SINCE} (1.00 before, {1.7 / 1.1:.2f} after)"


def test_a_rank_that_is_slower_for_a_while() -> None:
    draw = np.random.default_rng(7)
    noise = 0.01 * draw.standard_normal(120)
    excess = [0.4 * (40 <= at < 70) + noise[at] for at in range(120)]
    words = beginning_words([*range(1000, 1120)], excess)
    assert words == f"in steps 1040 to 1069, where it is {math.exp(np.mean(excess[40:70])):.2f}"
    twice = [0.4 * (20 <= at < 50 or at >= 90) + noise[at] for at in range(120)]
    assert beginning_words([*range(120)], twice) == "on and off from step 20 to 119"
    assert beginning_words([*range(120)], [*(0.1 * noise)]) == ""
    assert beginning_words([], []) == ""


def test_in_a_long_window_the_step_is_known_to_one_point() -> None:
    draw = np.random.default_rng(1)
    excess = [0.3 * (at >= 6000) + 0.02 * each for at, each in enumerate(draw.normal(size=10_000))]
    words = beginning_words([*range(10_000)], excess)
    step = int(words.split()[2])
    assert words.startswith("since step ")
    assert abs(step - 6000) <= 50  # 200 points


def test_without_steps_it_is_not_known_since_when() -> None:
    table = build(with_steps=False, scale=slow("TP1", "moe", 1.4))
    document = window(table)
    document["verdict"] = "fail"
    assert lead_of(document).since == ("not known",)


def test_an_onset_comes_before_the_steps() -> None:
    document = window(SLOW)
    moment = "2023-11-14T22:13:20.020Z"
    document["onset"] = {
        "time": moment, "declared": moment, "kind": "running", "factor": 1.5, "resolution_s": 0.5,
        "source": "log", "ranks": [], "sentence": "", "correlation": None,
    }  # fmt: skip
    assert lead_of(document).since == (
        "load is uneven since 2023-11-14 22:13:20 UTC",
        "throughout the window's 50 steps",
    )


def of_lives(**changes: Any) -> dict[str, Any]:
    """A window that its accepted lives fail."""
    document = window(SLOW)
    judgement = json.loads(json.dumps(document["judgements"][document["decisive"]]))
    judgement["threshold"] |= {"metric": "regression", "limit": 1.05}
    judgement |= {"finding": None, "value": 1.15}
    recorded = plain(regression(lives=10, nights=40))
    recorded["figures"][1]["changes"] = changes.get("at", [])
    for figure in (recorded["figures"][0], *recorded["figures"][2:]):
        figure["changes"] = []
    return document | {"judgements": [judgement], "decisive": 0, "regression": recorded}


def test_nights_say_since_which_life() -> None:
    (life,) = [plain(regression(lives=10, nights=40))["history"][32]]
    answers = lead_of(of_lives(at=[32]))
    assert answers.who == "the server as a whole"
    assert answers.since == (
        f"moe in decode is at this level since {life['recorded'][:10]} ({life['version']}), "
        "9 lives ago",
    )
    last = regression(lives=10, nights=40).accepted[-1].recorded[:10]
    assert lead_of(of_lives()).since == (
        f"first seen in this run; the last accepted life is of {last}",
    )


def night(at: int, verdict: str) -> Results:
    document = run([window(SLOW, window_id=f"w{at}")])
    document["run"]["id"] = f"night-{at}"
    document["windows"][0] |= {"verdict": verdict, "opened": f"2026-11-0{at}T00:00:00.000Z"}
    return as_run(json.loads(json.dumps(document)))


@pytest.mark.parametrize(
    ("verdicts", "words"),
    [
        (["pass", "pass", "fail", "fail"], "failed first in night-3; night-2 passed"),
        (["fail", "inconclusive", "fail"], "failed first in night-3; night-2 was inconclusive"),
        (["fail", "fail"], "failed in every run since night-1, the first on this page"),
    ],
)
def test_runs_of_a_page_say_in_which_it_failed_first(verdicts: list[str], words: str) -> None:
    nights = [night(at, verdict) for at, verdict in enumerate(verdicts, 1)]
    windows = [
        PlacedWindow(document.windows[0], document, f"window-{at}", None, "")
        for at, document in enumerate(nights)
    ]
    newest = with_earlier(nights, windows)[-1]
    answers = lead(newest)
    assert answers is not None
    assert answers.since[0] == words


def test_the_unit_of_a_share_stands_beside_its_value() -> None:
    judgement = as_window(window(SLOW, keywords={"lost_share": 0.05})).deciding
    assert judgement is not None
    # Of 1.1 and 1.34 ms: (max − mean) / max.
    share = 100 * (1.34 - (1.1 + 1.34) / 2) / 1.34
    assert headline(judgement) == (f"{share:.2f} %", "lost share of compute, limit 5.00 %")
