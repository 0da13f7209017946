"""How many server lives a test takes, and what they are compared with."""

from __future__ import annotations

from dataclasses import replace as changed
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from pytest_sglprof._baselines.history import append_run
from pytest_sglprof._baselines.records import LifeRecord
from pytest_sglprof._baselines.store import BaselineFolder
from pytest_sglprof._config.load import Settings
from pytest_sglprof._config.model import Threshold
from pytest_sglprof._run.folder import RunBook
from pytest_sglprof._run.lives import KnownLives, NewLife, TestLives, accept_lives, differences
from tests.support.lives import key, life, provenance

LIMIT = Threshold("regression", 1.05)
SCALES = (0.995, 1.0, 1.004, 1.002, 0.997)


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    """Five accepted lives in a folder."""
    folder = tmp_path / "baselines"
    BaselineFolder(folder).accept([life(scale=scale) for scale in SCALES], now="2026-11-28")
    return Settings(tmp_path / "out", baselines=folder)


def lives_of(settings: Settings, **changes: Any) -> TestLives:
    return TestLives(KnownLives(changed(settings, **changes), "run-now"))


def new(scale: float = 1.0, **changes: Any) -> NewLife:
    return NewLife("steady", life(scale=scale, **changes), (LIMIT,))


def take(lives: TestLives, *scales: float, can_confirm: bool = True) -> list[tuple[bool, str]]:
    """For each new life: whether another is wanted, and the word so far."""
    story = []
    for scale in scales:
        lives.add([new(scale)])
        wants = lives.judge(can_confirm=can_confirm, is_over=False)
        story.append((wants, str(lives.verdicts["steady"].word)))
    return story


def test_a_life_that_looks_unchanged_decides_alone(settings: Settings) -> None:
    assert take(lives_of(settings), 1.0) == [(False, "pass")]


def test_a_life_that_looks_slower_is_confirmed_before_it_fails(settings: Settings) -> None:
    assert take(lives_of(settings), 1.3, 1.3) == [(True, "inconclusive"), (False, "fail")]


def test_a_life_that_was_slower_by_chance_is_outweighed(settings: Settings) -> None:
    """Both lives together are within the limit."""
    assert take(lives_of(settings), 1.06, 1.0)[0] == (True, "inconclusive")
    story = take(lives_of(settings), 1.06, 1.0, 1.0, 1.0)
    assert story[-1] == (False, "pass")


def test_there_are_at_most_as_many_lives_as_are_set(settings: Settings) -> None:
    noisy = (1.06, 1.2, 0.95, 1.1)
    story = take(lives_of(settings), *noisy)
    assert story == [(True, "inconclusive")] * 3 + [(False, "inconclusive")]
    story = take(lives_of(settings, confirm=1), *noisy[:2])
    assert story == [(True, "inconclusive"), (False, "inconclusive")]


def test_each_look_has_its_part_of_the_level(settings: Settings) -> None:
    """At 1 % this fails; at a third of it, it is not sure enough."""
    assert take(lives_of(settings, confirm=1), 1.061, 1.061)[-1] == (False, "fail")
    assert take(lives_of(settings, confirm=3), 1.061, 1.061)[-1] == (True, "inconclusive")


def test_without_confirming_lives_one_decides_at_one_percent(settings: Settings) -> None:
    assert take(lives_of(settings, confirm=0), 1.3) == [(False, "fail")]
    assert take(lives_of(settings), 1.3, can_confirm=False) == [(False, "fail")]


def test_where_no_further_life_follows_one_decides_nothing(settings: Settings) -> None:
    lives = lives_of(settings)
    lives.add([new(1.3)])
    assert not lives.judge(can_confirm=True, is_over=True)
    assert lives.verdicts["steady"].word == "inconclusive"


def test_a_further_life_that_leaves_nothing_ends_it(settings: Settings) -> None:
    lives = lives_of(settings)
    for at, record in enumerate((life(scale=1.3), None, None, None)):
        lives.add([NewLife("steady", record, (LIMIT,))])
        assert lives.judge(can_confirm=True, is_over=False) == (at < 3)
    assert lives.verdicts["steady"].word == "inconclusive"


def test_a_rerun_does_not_clear_what_the_lives_before_it_showed(settings: Settings) -> None:
    lives = lives_of(settings)
    assert take(lives, 1.3, 1.3)[-1] == (False, "fail")
    assert take(lives, 1.0)[-1][1] != "pass"


def test_a_first_night_is_no_failure_and_takes_one_life(tmp_path: Path) -> None:
    lives = lives_of(Settings(tmp_path / "out", baselines=tmp_path / "none"))
    assert take(lives, 9.0) == [(False, "None")]
    assert lives.together("pass", "balanced") == (
        "pass",
        "balanced\nsteady: recorded as a candidate (0 of 5 accepted lives)",
    )
    assert lives.together(None, "") == (
        None,
        "steady: recorded as a candidate (0 of 5 accepted lives)",
    )


def test_the_worst_verdict_decides(settings: Settings) -> None:
    lives = lives_of(settings)
    take(lives, 1.3, 1.3)
    word, reason = lives.together("pass", "balanced")
    assert (word, reason.partition(" is ")[0]) == ("fail", "steady: compute")
    assert lives.together("inconclusive", "short")[0] == "fail"


class TestAgainst:
    def test_another_key_names_each_field_with_both_values(self, settings: Settings) -> None:
        other = life(
            key=key(gpu="NVIDIA B200", server="33333333", sizes={"tp": 4, "dp": 1}),
            provenance=provenance(options={"attention_backend": "fa4", "mem_fraction": "0.8"}),
        )
        lives = lives_of(settings)
        lives.add([NewLife("steady", other, (LIMIT,))])
        assert not lives.judge(can_confirm=True, is_over=False)
        verdict = lives.verdicts["steady"]
        assert verdict.word == "inconclusive"
        for part in (
            "gpu: NVIDIA H200 before, NVIDIA B200 now",
            "sizes tp: 2 before, 4 now",
            "server attention_backend: fa3 before, fa4 now",
            "server mem_fraction: not given before, 0.8 now",
        ):
            assert part in verdict.sentence

    def test_equal_lives_do_not_differ(self) -> None:
        assert differences(life(), life()) == []

    def test_a_damaged_baseline_is_inconclusive_and_stays(self, settings: Settings) -> None:
        assert settings.baselines is not None
        (file,) = settings.baselines.iterdir()
        file.write_text("{")
        lives = lives_of(settings)
        assert take(lives, 1.0) == [(False, "inconclusive")]
        assert "is damaged" in lives.verdicts["steady"].sentence
        assert file.read_text() == "{"

    def test_the_newest_lives_can_be_left_out(self, settings: Settings) -> None:
        lives = lives_of(settings, min_age_lives=2)
        assert take(lives, 1.0) == [(False, "None")]
        assert "(3 of 5 accepted lives that are old enough)" in lives.verdicts["steady"].sentence

    def test_a_life_that_began_a_level_is_never_too_young(self, settings: Settings) -> None:
        """Somebody accepted it by hand; the level before it would fail each later night."""
        assert settings.baselines is not None
        BaselineFolder(settings.baselines).accept([life(), life()])
        slow = life(scale=1.3, verdict="fail", failed=("regression",))
        BaselineFolder(settings.baselines).accept([slow], reason="meant")
        lives = lives_of(settings, min_age_lives=2)
        assert take(lives, 1.3) == [(False, "pass")]
        assert [each.level for each in lives.verdicts["steady"].accepted] == [0] * 6 + [1]

    def test_windows_of_one_name_but_other_keys_are_not_one_life(self, settings: Settings) -> None:
        """Two loads under one name: the mean of both is a figure of neither."""
        first = life()
        second = replace(
            life(scale=1.3, key=key(load="33333333")),
            life=first.life,
            provenance=provenance(load={"num_prompts": "800"}),
        )
        lives = lives_of(settings)
        for record in (first, second):
            lives.add([NewLife("steady", record, (LIMIT,))])
        assert not lives.judge(can_confirm=True, is_over=False)
        verdict = lives.verdicts["steady"]
        assert verdict.word == "inconclusive"
        assert "in new lives differ: load num_prompts: 100 before, 800 now" in verdict.sentence

    def test_a_window_that_left_nothing_does_not_say_that_no_folder_is_set(
        self, settings: Settings
    ) -> None:
        lives = lives_of(settings)
        lives.add([NewLife("steady", None, (LIMIT,))])
        assert not lives.judge(can_confirm=True, is_over=False)
        assert "no new life has a complete window of it" in lives.verdicts["steady"].sentence

    def test_an_attached_server_is_not_compared_with_itself(self, settings: Settings) -> None:
        same = life()
        assert settings.baselines is not None
        BaselineFolder(settings.baselines).accept([same])
        lives = lives_of(settings)
        lives.add([NewLife("steady", replace(same, run="run-now"), (LIMIT,))])
        lives.judge(can_confirm=False, is_over=False)
        assert len(lives.verdicts["steady"].accepted) == 5

    def test_a_level_that_began_is_compared_with_alone(self, settings: Settings) -> None:
        slow = life(scale=1.3, verdict="fail", failed=("regression",))
        assert settings.baselines is not None
        BaselineFolder(settings.baselines).accept([slow], reason="meant")
        assert take(lives_of(settings), 1.3) == [(False, "pass")]
        (first, *_) = lives_of(settings)._known.against([life()]).lives
        assert first.accepted is not None
        assert first.accepted.accepted == "2026-11-28"


class TestAccepting:
    def book(self, settings: Settings, *lives: LifeRecord) -> RunBook:
        book = RunBook(settings.output, "run-now", {})
        book.lives.extend(lives)
        return book

    def test_what_was_not_accepted_is_named(self, settings: Settings) -> None:
        failed = life(verdict="fail", failed=("slowdown",))
        book = self.book(settings, life(), failed)
        accept_lives(changed(settings, accept="all"), book)
        assert book.notes == [
            f"baselines: 1 life accepted into {settings.baselines}",
            '  not accepted: tests/test_serving.py::test_decode window "steady": it failed by '
            "slowdown",
        ]

    def test_keys_that_have_a_baseline_are_no_news(self, settings: Settings) -> None:
        book = self.book(settings, life(), life(key=key(window="other")))
        accept_lives(changed(settings, accept="new"), book)
        assert book.notes == [
            f"baselines: 1 life accepted into {settings.baselines}, 1 new baseline"
        ]

    def test_a_folder_that_cannot_be_written_is_a_problem_of_the_run(
        self, settings: Settings, tmp_path: Path
    ) -> None:
        (tmp_path / "file").write_text("")
        book = self.book(settings, life())
        accept_lives(changed(settings, accept="all", baselines=tmp_path / "file"), book)
        assert (tmp_path / "file").read_text() == ""
        assert "cannot be" in " ".join((*book.problems, *book.notes))

    def test_nothing_is_accepted_unasked(self, settings: Settings) -> None:
        assert settings.baselines is not None
        (file,) = settings.baselines.iterdir()
        before = file.read_bytes()
        accept_lives(settings, self.book(settings, life()))
        assert file.read_bytes() == before


class TestBadNights:
    def night(self, settings: Settings, number: int, *failed: str) -> None:
        run = f"run-{number}"
        record: LifeRecord = life(night=number, run=run, failed=failed)
        append_run(settings.output, run, [replace(record, id=f"{run}/x")])

    def test_only_the_third_in_a_row_fails(self, settings: Settings) -> None:
        self.night(settings, 1, "regression")
        self.night(settings, 2)
        self.night(settings, 3, "regression")
        lives = lives_of(settings, fail_after=3)
        assert take(lives, 1.3, 1.3)[-1] == (False, "pass")
        assert "bad run 2 in a row, it fails at number 3" in lives.verdicts["steady"].sentence
        self.night(settings, 4, "regression")
        assert take(lives_of(settings, fail_after=3), 1.3, 1.3)[-1] == (False, "fail")

    def test_a_tolerated_night_is_never_accepted_unasked(self, settings: Settings) -> None:
        lives = lives_of(settings, fail_after=2)
        take(lives, 1.3, 1.3)
        record = lives._finished(life(), has_failed=False)
        assert (record.verdict, record.failed) == ("fail", ("regression",))
        assert settings.baselines is not None
        (done,) = BaselineFolder(settings.baselines).accept([record])
        assert "with a reason only" in done.refused

    def test_what_a_failed_test_left_is_never_accepted(self, settings: Settings) -> None:
        record = lives_of(settings)._finished(life(), has_failed=True)
        assert record.not_acceptable == ("its test failed by itself",)
