"""A verdict on lives as results hold it, and its words on the page."""

from __future__ import annotations

import math

import msgspec
import pytest

from pytest_sglprof._baselines.figures import Figure
from pytest_sglprof._baselines.records import AcceptedLife, Floor, LifeRecord
from pytest_sglprof._config.model import Threshold
from pytest_sglprof._report.page.regression import regression_picture
from pytest_sglprof._report.regression import RecordedRegression, regression_document
from pytest_sglprof._verdict.regression import Against, KnownLife, LifeCase, judge_lives
from tests.support.lives import group, kind, life, load, provenance

NOISE = (0.0, 0.004, -0.005, 0.003, -0.002, 0.006, -0.004, 0.001, -0.003, 0.002)
LIMITS = (
    Threshold("regression", 1.05, scope="compute"),
    Threshold("regression", 1.05, scope="output_throughput"),
    Threshold("ttft_p99", 300.0),
)
FLOOR = Floor(
    lives=10, sd={"compute": 0.004}, upper=1.65, measured="2026-11-01T00:00:00Z", host="h1"
)


def night(at: int, *, slower: float = 1.0, host: str = "h1") -> LifeRecord:
    scale = math.exp(NOISE[at % len(NOISE)]) * slower
    return life(
        group(kind([300_000.0 * scale, 500_000.0 * scale, 80_000.0])),
        night=1 + at,
        load=load(figures={"ttft_p99": 250.0 * scale, "output_throughput": 1500.0 / scale}),
        provenance=provenance(host=host, commit="b88f031dda07"),
    )


def document(
    *, accepted: int = 10, slower: float = 1.0, begins: int | None = None
) -> RecordedRegression:
    lives = [night(at) for at in range(accepted)]
    kept = tuple(
        AcceptedLife(
            record=record,
            accepted="2026-11-20T00:00:00Z",
            reason="FP8 by default" if at == begins else "",
            begins_level=at == begins,
        )
        for at, record in enumerate(lives)
    )
    known = tuple(
        KnownLife(record, int(begins is not None and at >= begins))
        for at, record in enumerate(lives)
    )
    against = Against("decode-1f3a9c02.json", accepted > 0, known, FLOOR)
    fresh = (night(accepted, slower=slower),)
    (verdict,) = judge_lives([LifeCase(fresh, against, LIMITS)])
    refused = life(night=1, verdict="inconclusive")
    return regression_document(verdict, against, accepted=kept, history=[refused, *lives])


def test_a_document_holds_what_was_judged_and_comes_back() -> None:
    found = document(slower=1.15)
    again = msgspec.json.decode(msgspec.json.encode(found), type=RecordedRegression)
    assert again == found
    compute, throughput, ttft = found.figures[:3]
    assert (compute.name, compute.verdict, compute.limit_of) == ("compute", "fail", "ratio")
    assert compute.ratio == pytest.approx(1.15, abs=0.01)
    assert compute.low is not None
    assert 1.05 < compute.low < compute.ratio
    assert compute.now == pytest.approx(compute.before * compute.ratio)
    assert (throughput.verdict, ttft.verdict) == ("fail", "pass")
    assert {each.verdict for each in (*found.fresh, found.history[-1])} == {"fail"}
    assert throughput.ratio == pytest.approx(compute.ratio)
    assert (ttft.limit, ttft.limit_of, ttft.pass_bound) == (300.0, "figure", None)
    for figure in found.figures:
        assert len(figure.accepted) == len(found.accepted) == 10
        assert len(figure.fresh) == len(found.fresh) == 1
        assert len(figure.history) == len(found.history) == 12


def test_history_knows_which_lives_are_accepted_and_ends_with_the_new_ones() -> None:
    found = document(begins=7)
    marks = [bool(each.accepted) for each in found.history]
    assert marks == [False] + [True] * 10 + [False]
    assert [each.is_level for each in found.accepted] == [False] * 7 + [True] * 3
    assert [each.reason for each in found.accepted if each.begins_level] == ["FP8 by default"]
    assert found.fresh[0].version == "0.5.23 (b88f031)"


def test_facts_of_the_page_say_what_is_compared() -> None:
    picture = regression_picture(document(begins=7))
    assert picture is not None
    facts = dict(picture.facts)
    assert facts["Baseline"] == ("decode-1f3a9c02.json: 10 accepted lives since 2026-11-01, on h1")
    assert facts["Level"] == (
        "new since 2026-11-08: “FP8 by default”; 7 lives before it for the variance alone"
    )
    assert facts["Now"] == "1 life, on h1; 0.5.23 (b88f031)"
    assert facts["Floor"].startswith("lives of one version differ by sd 0.4 % in compute on h1")
    assert facts["Sees"].startswith("compute: with 10 accepted lives (sd 0.")
    assert regression_picture(None) is None


def test_rows_say_what_is_compared_where_the_figure_is_not() -> None:
    picture = regression_picture(document())
    assert picture is not None
    by_name = {row.name: row for row in picture.rows}
    assert by_name["compute"].inverse == ""
    assert by_name["output_throughput"].inverse == "inverse: higher is better"
    assert by_name["ttft_p99"].limit_words == "300.00"
    assert by_name["idle_share"].inverse == "of the busy share, inverse"
    assert by_name["idle_share"].limit_words == "–"
    # A throughput that sinks is drawn to the right, as a time that rises.
    slow = regression_picture(document(slower=1.15))
    assert slow is not None
    rows = {row.name: row for row in slow.rows}
    for name in ("compute", "output_throughput"):
        (new,) = [dot for dot in rows[name].dots if "new" in dot.of]
        limit = rows[name].limit
        assert limit is not None
        assert new.left > limit > rows[name].one


@pytest.mark.parametrize("accepted", [0, 3])
def test_a_first_night_has_no_verdict_and_can_be_shown(accepted: int) -> None:
    found = document(accepted=accepted)
    assert "recorded as a candidate" in found.sentence
    assert found.exists == (accepted > 0)
    picture = regression_picture(found)
    assert picture is not None
    compute = next(row for row in picture.rows if row.name == "compute")
    assert (compute.figure.verdict, compute.figure.ratio, compute.interval) == (None, None, None)
    assert len(compute.dots) == (accepted + 1 if accepted else 0)
    assert compute.figure.figure == Figure("compute")


def test_no_idle_time_at_all_is_a_figure_too() -> None:
    lives = [life(group(kind(idle_ns=0.0))) for _ in range(6)]
    against = Against("a.json", True, tuple(map(KnownLife, lives)))
    (verdict,) = judge_lives([LifeCase((life(group(kind(idle_ns=50_000.0))),), against)])
    picture = regression_picture(regression_document(verdict, against))
    assert picture is not None
    (idle,) = [row for row in picture.rows if row.name == "idle_share"]
    assert (idle.now, idle.unit) == ("5.0", ", % idle")
    assert len(idle.dots) == 7
