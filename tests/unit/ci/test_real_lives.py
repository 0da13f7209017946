"""A/A lives of a real server: what is made of them once they were run."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.life_judge import records_of
from ci.real_lives import BEFORE, WINDOW, judged, lives_of, upper_end
from pytest_sglprof._baselines.history import append_run
from pytest_sglprof.standin.life_model import Change, Life, LifePlan, draw, night


def test_each_life_is_judged_against_the_ten_before_it() -> None:
    lives = [Life(is_changed=number >= 12) for number in range(16)]
    records = records_of(draw(LifePlan(run_sd=0.002), lives, 1, Change(1.5)))
    verdicts = judged(records, 1.05)
    assert [verdict.word for verdict in verdicts][:3] == ["pass", "pass", "fail"]
    assert len(verdicts) == 16 - BEFORE
    assert all(len(verdict.accepted) == BEFORE for verdict in verdicts)
    # Later ones are compared with changed lives too, which makes the lives before differ.
    assert verdicts[3].figures[0].change is not None
    assert verdicts[3].figures[0].change.sd > 0.05


def test_lives_that_are_not_enough_give_no_verdict() -> None:
    assert judged(records_of(draw(LifePlan(steps=10), night(BEFORE, 0), 2)), 1.05) == []


def test_lives_are_found_where_runs_left_them(tmp_path: Path) -> None:
    records = records_of(draw(LifePlan(steps=10), night(3, 0), 3))
    for record in records:
        append_run(tmp_path / ".sglprof", record.run, [record])
    found = lives_of(tmp_path)
    assert [each.id for each in found] == [each.id for each in records]
    assert {each.key.window for each in found} == {WINDOW}
    assert lives_of(tmp_path / "empty") == []


@pytest.mark.parametrize(
    ("fails", "of", "end"),
    [(0, 20, 0.1391), (0, 299, 0.00997), (1, 473, 0.00999), (2, 628, 0.00999), (2, 700, 0.00897)],
)
def test_the_upper_end_of_a_rate_is_clopper_s_and_pearson_s(
    fails: int, of: int, end: float
) -> None:
    assert upper_end(fails, of) == pytest.approx(end, rel=0.01)
