"""The verdict on new server lives: by the rule, in words, and on lives whose truth is planted."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

import pytest
from msgspec.structs import replace

from pytest_sglprof._analysis.certainty import t_quantile
from pytest_sglprof._analysis.strata import StepWork
from pytest_sglprof._baselines.records import AcceptedLife, Floor, LifeRecord
from pytest_sglprof._config.model import Threshold
from pytest_sglprof._verdict.regression import (
    Against,
    JudgedFigure,
    KnownLife,
    LifeCase,
    LivesVerdict,
    bad_night,
    judge_lives,
    unconfirmed,
)
from pytest_sglprof.standin.life_model import Change, LifePlan, draw, night
from tests.support.lives import NS, group, key, kind, life, load, provenance

SCALES = (0.995, 1.0, 1.004, 1.002, 0.997, 1.003, 0.998, 1.001)
COMPUTE = Threshold("regression", 1.05)


def against(records: Sequence[LifeRecord], **more: Any) -> Against:
    return Against("x.json", True, tuple(map(KnownLife, records)), **more)


def accepted(number: int = 5, **changes: Any) -> list[LifeRecord]:
    return [life(scale=scale, **changes) for scale in SCALES[:number]]


def verdict(
    fresh: Sequence[LifeRecord], *thresholds: Threshold, known: Against | None = None, **more: Any
) -> LivesVerdict:
    case = LifeCase(tuple(fresh), known or against(accepted()), thresholds or (COMPUTE,))
    (found,) = judge_lives([case], **more)
    return found


class TestTheRule:
    def test_the_ratio_and_its_ends_are_those_of_a_t_test_of_logs(self) -> None:
        found = verdict([life(scale=1.04), life(scale=1.05)])
        (figure, *_) = found.figures
        old, new = [math.log(s) for s in SCALES[:5]], [math.log(1.04), math.log(1.05)]
        squares = sum((x - statistics.mean(old)) ** 2 for x in old)
        squares += sum((x - statistics.mean(new)) ** 2 for x in new)
        error = math.sqrt(squares / 5 * (1 / 5 + 1 / 2))
        difference = statistics.mean(new) - statistics.mean(old)
        assert figure.value == pytest.approx(math.exp(difference))
        assert figure.ends is not None
        assert figure.ends[0] == pytest.approx(math.exp(difference - t_quantile(0.01, 5.0) * error))
        assert figure.ends[1] == pytest.approx(math.exp(difference + t_quantile(0.05, 5.0) * error))

    @pytest.mark.parametrize(
        ("scale", "word"),
        [(1.0, "pass"), (0.8, "pass"), (1.04, "pass"), (1.06, "inconclusive"), (1.2, "fail")],
    )
    def test_fails_surely_above_and_passes_surely_below_the_pass_bound(
        self, scale: float, word: str
    ) -> None:
        assert verdict([life(scale=scale)]).word == word

    def test_a_uncertain_pass_says_what_it_may_be(self) -> None:
        noisy = against([life(scale=s) for s in (0.9, 1.1, 1.0, 0.95, 1.05)])
        found = verdict([life(scale=1.0)], known=noisy)
        assert found.word == "inconclusive"
        assert "a pass must be surely below 1.075: it may be 0." in found.sentence
        assert "with 5 accepted lives (sd 7." in found.sentence
        assert not found.is_beyond

    def test_named_thresholds_share_the_level(self) -> None:
        """Alone it fails; beside 30 others that do not, it is not sure enough."""
        fresh, known = [life(scale=1.078)], against(accepted())
        others = [Threshold("regression", 2.0, kernel=f"all_reduce|x{n}") for n in range(30)]
        assert verdict(fresh, known=known).word == "fail"
        assert verdict(fresh, COMPUTE, *others, known=known).word == "inconclusive"

    def test_a_smaller_level_needs_more(self) -> None:
        fresh, known = [life(scale=1.078)], against(accepted())
        assert verdict(fresh, known=known, alpha=0.01 / 30).word == "inconclusive"

    def test_several_records_of_one_life_are_one_number(self) -> None:
        first = life(scale=1.2)
        again = replace(life(scale=1.1), life=first.life)
        (figure, *_) = verdict([first, again]).figures
        assert len(figure.fresh) == 1
        assert figure.change is not None
        assert figure.change.fresh == 1
        assert figure.fresh[0] == pytest.approx(800_000 * math.sqrt(1.2 * 1.1))

    def test_earlier_levels_give_the_variance_alone(self) -> None:
        old = [KnownLife(each, 0) for each in accepted()]
        new = KnownLife(life(scale=1.5), 1)
        known = Against("x.json", True, (*old, new))
        found = verdict([life(scale=1.5)], known=known)
        assert found.word == "pass"
        assert found.judgements[0].value == pytest.approx(1.0)
        assert verdict([life(scale=1.0)], known=known).judgements[0].value == pytest.approx(1 / 1.5)


PREFILL = StepWork("prefill", "", 1, 10, 10)


class TestKindsOfSteps:
    """Only kinds of steps that all lives have are compared, so others must not pass unseen."""

    @staticmethod
    def life(decode: float = 1.0, *, steps: int = 90) -> LifeRecord:
        """Ten prefills, and decode steps that may be slower; none without steps."""
        prefill = kind(work=PREFILL, steps=10)
        slow = kind([decode * ns for ns in NS], steps=steps)
        return life(group(*((slow, prefill) if steps else (prefill,))))

    def known(self, *more: LifeRecord) -> Against:
        return against([*(self.life(scale) for scale in SCALES[:5]), *more])

    def test_what_new_lives_lack_most_of_does_not_pass(self) -> None:
        found = verdict([self.life(steps=0)], known=self.known())
        assert found.word == "inconclusive"
        assert "compared are kinds of steps that take 10 % of the time" in found.sentence
        assert "decode of 4 requests, 1024 to 2047 KV tokens each" in found.sentence
        assert "a pass must be" not in found.sentence

    def test_a_failure_by_what_they_share_stays_one(self) -> None:
        slow = life(group(kind([1.5 * ns for ns in NS], PREFILL)))
        assert verdict([slow], known=self.known()).word == "fail"

    def test_one_odd_accepted_life_hides_no_kind(self) -> None:
        known = self.known(self.life(steps=0))
        found = verdict([self.life(1.5)], known=known)
        assert found.word == "fail"
        assert found.judgements[0].change is not None
        assert found.judgements[0].change.accepted == 5
        assert len(found.accepted) == 5

    def test_where_too_few_lives_would_stay_all_are_compared(self) -> None:
        known = against([*(self.life() for _ in range(3)), self.life(steps=0), self.life(steps=0)])
        found = verdict([self.life()], known=known)
        assert found.judgements[0].change is not None
        assert found.judgements[0].change.accepted == 5
        assert found.word == "inconclusive"

    def test_the_level_that_is_compared_with_stays(self) -> None:
        """Lives of the last level without a common kind are not left out for those before it."""
        old = [KnownLife(self.life(), 0) for _ in range(5)]
        works = [StepWork("decode", "", batch, 10, -1) for batch in (1, 2, 3)]
        pairs = [(works[0], works[1]), (works[1], works[2]), (works[2], works[0])]
        new = [
            KnownLife(life(group(*(kind(work=each) for each in (*pair, PREFILL)))), 1)
            for pair in pairs
        ]
        fresh = life(group(*(kind(work=each) for each in (*works, PREFILL))))
        found = verdict([fresh], known=Against("x.json", True, (*old, *new)))
        assert [each.level for each in found.accepted] == [0] * 5 + [1] * 3
        assert found.word == "inconclusive"


class TestWords:
    def test_lives_that_differ_by_far_see_nothing_instead_of_a_huge_number(self) -> None:
        known = against([life(scale=s) for s in (0.01, 5.0, 0.2, 40.0, 1.0)])
        assert verdict([life()], known=known).detection.endswith("this sees nothing below 10x")

    def test_a_failure_names_figures_category_and_kernel(self) -> None:
        slower = kind((300_000.0, 600_000.0, 80_000.0))
        found = verdict([life(group(slower))], Threshold("regression", 1.05))
        assert found.word == "fail"
        assert found.sentence.startswith(
            "compute is 1.13x as long as in the accepted lives (limit 1.05): 800 µs → 900 µs a "
            "step, 1 new life beside 5 accepted; most of it in moe (+100 µs a step): fused_moe "
            "500 µs → 600 µs a step; surely above 1.1"
        )
        assert "; with 5 accepted lives (sd 0.4 %) this sees +" in found.sentence

    def test_a_longer_step_is_explained_by_compute_only_as_far_as_that_goes(self) -> None:
        limit = Threshold("regression", 1.05, scope="pass_wall")
        idle = verdict([life(group(kind(wall_ns=1_200_000.0)))], limit)
        assert "a step is 1.20x as long as in the accepted lives" in idle.sentence
        assert "; compute is +" in idle.sentence
        assert "of +200 µs; " in idle.sentence
        assert "most of it" not in idle.sentence
        slower = kind((300_000.0, 690_000.0, 80_000.0), wall_ns=1_200_000.0)
        busy = verdict([life(group(slower))], limit)
        assert "compute is +190 µs of +200 µs; most of it in moe (+190 µs a step)" in busy.sentence

    def test_the_worst_of_several_comes_first_and_in_full(self) -> None:
        slower = kind((300_000.0, 750_000.0, 80_000.0))
        found = verdict([life(group(slower))], COMPUTE, Threshold("regression", 1.05, scope="moe"))
        assert found.sentence.startswith("moe is 1.50x as long")
        assert found.sentence.endswith(
            "also beyond their limits: regression of compute 1.31 (limit 1.05)"
        )
        assert found.deciding == 1

    def test_a_figure_of_rates_and_shares_is_worse_where_it_is_lower(self) -> None:
        slow = load(figures={"ttft_p99": 250.0, "output_throughput": 1250.0})
        found = verdict([life(load=slow)], Threshold("regression", 1.05, scope="output_throughput"))
        assert "the output throughput is 1.20x as low as in the accepted lives" in found.sentence
        assert "1500.0 tokens/s → 1250.0 tokens/s" in found.sentence
        idle = group(kind(idle_ns=280_000.0))
        found = verdict([life(idle)], Threshold("regression", 1.05, scope="idle_share"))
        assert "the busy share of steps is 1.22x as low" in found.sentence
        assert "12.0 % idle → 28.0 % idle" in found.sentence

    def test_kernels_that_appear_and_vanish_are_findings(self) -> None:
        kernels = (("gemm", "new_a"), ("gemm", "new_b"), ("moe", "fused_moe"), ("norm", "rms"))
        ns = (150_000.0, 141_000.0, 500_000.0, 1_000.0)
        fresh = life(group(kind(ns, kernels=kernels), kernels=kernels))
        found = verdict([fresh])
        assert found.kernels.findings[0] == (
            "gemm_bf16 replaced by new_a and new_b in gemm, together −3.0 %"
        )
        assert "rms appeared in norm: +1.00 µs a step" in found.kernels.findings
        assert found.word == "pass"

    def test_another_number_of_calls_is_a_finding(self) -> None:
        fresh = life(group(kind(calls=(10.0, 20.0, 10.0))))
        assert verdict([fresh]).kernels.findings == (
            "fused_moe is called 20 times a step, 10 before",
        )

    def test_kernels_are_listed_with_eight_accepted_lives(self) -> None:
        assert verdict([life()]).kernels.not_scanned.startswith("5 accepted lives, 8 are needed")


class TestWithoutAVerdict:
    def test_a_first_night_is_a_candidate(self) -> None:
        found = verdict([life(scale=9.0)], known=against(accepted(3)))
        assert (found.word, found.judgements) == (None, ())
        assert found.sentence == "recorded as a candidate (3 of 5 accepted lives)"
        required = verdict([life()], known=against(accepted(3)), required=True)
        assert required.word == "inconclusive"
        assert required.sentence == (
            "regression of compute: only 3 of 5 accepted lives, and a baseline is required "
            "(--sglprof-require-baseline)"
        )

    def test_lives_that_are_too_young_do_not_count(self) -> None:
        found = verdict([life()], known=against(accepted(3), accepted=9))
        assert found.sentence.endswith("(3 of 5 accepted lives that are old enough)")

    def test_without_a_folder_nothing_is_compared(self) -> None:
        found = verdict([life()], known=Against())
        assert (found.word, found.is_beyond) == (None, False)
        assert "--sglprof-baselines" in found.sentence

    def test_a_baseline_that_cannot_be_used_is_inconclusive(self) -> None:
        found = verdict([life()], known=Against("x", problem="gpu: A100 before, H100 now"))
        assert found.word == "inconclusive"
        assert found.sentence == "regression of compute: gpu: A100 before, H100 now"
        assert not found.is_open

    def test_other_kinds_of_steps_are_not_compared(self) -> None:
        other = replace(kind().work, batch=9)
        found = verdict([life(group(kind(work=other)))])
        assert found.word == "inconclusive"
        assert "no kind of step is in all lives" in found.sentence

    def test_the_first_life_on_a_host_is_inconclusive(self) -> None:
        found = verdict([life(provenance=provenance(host="h5"))])
        assert found.word == "inconclusive"
        assert "first life on h5" in found.sentence

    def test_a_life_that_is_kept_apart_is_inconclusive(self) -> None:
        found = verdict([life(apart="a kernel was compiled inside of the window")])
        assert found.word == "inconclusive"
        assert "a kernel was compiled" in found.sentence

    def test_no_new_life_is_inconclusive(self) -> None:
        found = verdict([])
        assert (found.word, found.is_beyond) == ("inconclusive", False)


class TestFloor:
    FLOOR = Floor(lives=10, sd={"compute": 0.03}, upper=1.65, measured="2026-11-01", host="h1")

    def test_a_limit_below_it_is_inconclusive(self) -> None:
        found = verdict([life()], known=against(accepted(), floor=self.FLOOR))
        assert found.word == "inconclusive"
        assert "the limit 1.05 is below what this machine shows between lives" in found.sentence

    def test_what_is_surely_beyond_it_fails(self) -> None:
        found = verdict([life(scale=1.5)], known=against(accepted(), floor=self.FLOOR))
        assert found.word == "fail"

    def test_a_floor_of_another_figure_says_nothing(self) -> None:
        found = verdict(
            [life()],
            Threshold("regression", 1.05, scope="moe"),
            known=against(accepted(), floor=self.FLOOR),
        )
        assert found.word == "pass"


class TestMicroseconds:
    def test_a_ratio_alone_does_not_fail(self) -> None:
        """Moe takes 500 µs a step, and 1.2 times as long in the new life."""
        least = Threshold("regression", 1.05, scope="moe", min_us=200.0)
        found = verdict([life(scale=1.2)], least)
        assert (found.word, found.is_beyond) == ("pass", False)
        assert "+100.20 µs a step, below the 200 µs that count" in found.sentence
        both = Threshold("regression", 1.05, scope="moe", min_us=50.0)
        assert verdict([life(scale=1.2)], both).word == "fail"


class TestLoad:
    LIMIT = Threshold("ttft_p99", 200.0)

    @pytest.mark.parametrize(
        ("changes", "why"),
        [
            ({"driven": "unlimited"}, "as fast as possible"),
            ({"completed": 99}, "1 of 100 requests did not complete"),
            ({"queue_grows": True}, "waited longer and longer"),
            ({"figures": {}}, "did not report ttft_p99"),
        ],
    )
    def test_a_load_that_says_nothing_is_inconclusive(
        self, changes: dict[str, Any], why: str
    ) -> None:
        found = verdict([life(load=load(**changes))], self.LIMIT, known=Against())
        assert found.word == "inconclusive"
        assert why in found.sentence

    def test_no_load_is_inconclusive(self) -> None:
        found = verdict([life(load=None)], self.LIMIT, known=Against())
        assert found.sentence == "ttft_p99: no load was complete before its first window"

    def test_needs_no_baseline(self) -> None:
        found = verdict([life()], self.LIMIT, known=Against())
        assert (found.word, found.is_beyond) == ("fail", True)
        assert found.sentence == (
            "the p99 of the time to the first token is 250.00 ms (limit 200.00 ms) in 1 life"
        )
        two = [life(), life(load=load(figures={"ttft_p99": 100.0}))]
        found = verdict(two, self.LIMIT, known=Against())
        assert found.word == "pass"
        assert found.judgements[0].value == pytest.approx(math.sqrt(250.0 * 100.0))

    def test_fails_surely_where_accepted_lives_say_how_much_they_differ(self) -> None:
        figures = [200.0, 300.0, 250.0, 220.0, 280.0]
        known = against([life(load=load(figures={"ttft_p99": each})) for each in figures])
        found = verdict([life()], Threshold("ttft_p99", 240.0), known=known)
        assert found.word == "inconclusive"
        assert "that may be chance" in found.sentence


class TestOneLifeAlone:
    def test_decides_no_failure(self) -> None:
        found = unconfirmed(verdict([life(scale=1.5)]))
        assert (found.word, found.judgements[0].verdict) == ("inconclusive", "inconclusive")
        assert "one life alone decides nothing" in found.sentence
        assert found.figures[0].word == "inconclusive"

    def test_a_bad_night_is_tolerated_until_the_nth(self) -> None:
        failed = verdict([life(scale=1.5)])
        found = bad_night(failed, 2, 3)
        assert (found.word, found.is_tolerated) == ("pass", True)
        assert "bad run 2 in a row, it fails at number 3" in found.sentence
        assert bad_night(failed, 3, 3) is failed
        passed = verdict([life()])
        assert bad_night(passed, 1, 3) is passed


# Lives whose truth is planted: seeds of the model of lives, as records.

PLAN = LifePlan(kernels=60, steps=20, run_sd=0.005, kernel_sd=0.005)


def drawn_night(
    seed: int, factor: float, fresh: int = 2, accepted: int = 5
) -> tuple[list[LifeRecord], Threshold]:
    """Accepted lives and new ones, in which one category takes `factor` times as long."""
    plan = night(accepted, fresh, is_changed=True)
    lives = draw(PLAN, plan, seed, Change(factor, category="moe"))
    records = []
    for at in range(accepted + fresh):
        times = lives.times[at].mean(axis=0).tolist()
        kernels = tuple(zip(lives.categories, lives.names, strict=True))
        records.append(life(group(kind(times, kernels=kernels), kernels=kernels)))
    return records, Threshold("regression", 1.05, scope="moe")


@pytest.mark.parametrize("seed", range(20))
def test_nights_by_records(seed: int) -> None:
    """Unchanged passes; one category 1.15 slower fails and is named, with a kernel of it."""
    records, limit = drawn_night(seed, 1.0, fresh=1)
    known = against(records[:5])
    assert verdict(records[5:], limit, known=known).word == "pass"
    records, limit = drawn_night(seed, 1.15)
    found = verdict(records[5:], limit, known=against(records[:5]), alpha=0.01 / 3)
    assert found.word == "fail"
    assert found.sentence.startswith("moe is 1.1")
    slowest = found.sentence.split("most of it in ")[1].split()[0]
    named = {name for group_ in records[0].groups for c, name in group_.kernels if c == "moe"}
    assert slowest in named
    records.append(replace(records[5], life="accepted with a reason"))
    level = [*map(KnownLife, records[:5]), KnownLife(records[-1], 1)]
    after = verdict([records[6]], limit, known=Against("x", True, tuple(level)))
    assert after.word == "pass"


def test_with_eight_accepted_lives_the_slower_kernels_are_listed() -> None:
    records, limit = drawn_night(1, 1.15, accepted=8)
    news = verdict(records[8:], limit, known=against(records[:8])).kernels
    assert (news.not_scanned, news.scanned) == ("", 60)
    assert len(news.calls) == len(news.changes) > 0
    moe = {name for group_ in records[0].groups for c, name in group_.kernels if c == "moe"}
    assert {each.name for each in news.changes} == moe
    assert all(each.is_slower and 1.1 < each.ratio < 1.2 for each in news.changes)
    costs = [each.now_ns - each.before_ns for each in news.changes]
    assert costs == sorted(costs, reverse=True)
    assert news.calls[0] == (10.0, 10.0)


def test_an_accepted_life_can_be_named_with_its_reason() -> None:
    """`KnownLife.accepted` is kept for the document."""
    accepted_life = AcceptedLife(record=life(), accepted="today", reason="why", begins_level=True)
    known = KnownLife(accepted_life.record, 1, accepted_life)
    found = verdict([life()], known=Against("x", True, (known,)))
    assert found.accepted == (known,)
    assert isinstance(found.figures[0], JudgedFigure)
    assert key().test.startswith("tests/")
