from __future__ import annotations

import itertools
import math
import os
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pytest_sglprof._analysis import scan as scan_module
from pytest_sglprof._analysis.lives import LifeValue
from pytest_sglprof._analysis.scan import (
    KernelChange,
    false_shares,
    levels_of,
    max_t,
    scan,
    spread_of,
    tails,
    without_levels,
)

SEEDS = int(os.environ.get("SGLPROF_SEEDS", "300")) // 3
KERNELS = 200
NAMES = [("gemm", f"kernel_{at}") for at in range(KERNELS)]
LIMIT = 1.02
SLOW = 7  # the kernel that is planted slower


@dataclass(frozen=True)
class Plan:
    """Accepted and new lives. run_sd: of all kernels of a life; sd: of each; bistable: kernels
    that are 8 % above or below, by a life's luck. prior: degrees of freedom of the χ² by which
    kernels vary differently; 0: all alike."""

    accepted: int = 10
    fresh: int = 2
    factor: float = 1.0
    sd: float = 0.015
    run_sd: float = 0.010
    bistable: int = 0
    prior: float = 0.0

    def draw(self, seed: int) -> tuple[np.ndarray, np.ndarray]:
        rng = np.random.default_rng(seed)
        lives = self.accepted + self.fresh
        logs = rng.uniform(7.0, 12.0, KERNELS) + rng.normal(0, self.run_sd, (lives, 1))
        scale = np.sqrt(self.prior / rng.chisquare(self.prior, KERNELS)) if self.prior else 1.0
        logs = logs + rng.normal(0, 1, (lives, KERNELS)) * self.sd * scale
        logs[:, KERNELS - self.bistable :] += rng.choice([-0.08, 0.08], (lives, self.bistable))
        logs[self.accepted :, SLOW] += math.log(self.factor)
        return logs[: self.accepted], logs[self.accepted :]


def scanned(accepted: np.ndarray, fresh: np.ndarray, **more: float) -> tuple[KernelChange, ...]:
    changes = scan(NAMES, accepted, fresh, **{"limit": LIMIT, **more})
    assert not isinstance(changes, str), changes
    return changes


def slower(plan: Plan, seed: int) -> list[str]:
    return [change.name for change in scanned(*plan.draw(seed)) if change.is_slower]


def rates(plan: Plan) -> tuple[float, float, float]:
    """Shares of nights: with the planted kernel, with it first, and with another kernel."""
    slow = NAMES[SLOW][1]
    nights = [slower(plan, seed) for seed in range(SEEDS)]
    return (
        float(np.mean([slow in night for night in nights])),
        float(np.mean([night[:1] == [slow] for night in nights])),
        float(np.mean([set(night) - {slow} != set() for night in nights])),
    )


def by_chance(rate: float) -> float:
    """A rate that SEEDS nights exceed with p < 0.001 if the true one is `rate`."""
    return rate + 3.1 * math.sqrt(rate * (1 - rate) / SEEDS)


# Rates.


def test_five_per_cent_of_one_kernel_are_found_and_stand_first() -> None:
    found, first, _ = rates(Plan(fresh=4, factor=1.05))

    assert min(found, first) >= 0.9


def test_two_new_lives_find_five_per_cent_of_one_kernel_in_two_of_three_nights() -> None:
    found, _, _ = rates(Plan(fresh=2, factor=1.05))

    assert found >= 0.65 - (by_chance(0.65) - 0.65)


@pytest.mark.parametrize("fresh", [1, 2, 4])
@pytest.mark.parametrize("bistable", [0, 10])
def test_unchanged_nights_with_a_slower_kernel_are_at_most_one_in_twenty(
    fresh: int, bistable: int
) -> None:
    _, _, false = rates(Plan(fresh=fresh, bistable=bistable))

    assert false <= by_chance(0.05)


def test_kernels_with_two_states_do_not_hide_what_others_do(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plan = Plan(fresh=4, factor=1.05, bistable=10)
    found, _, _ = rates(plan)
    monkeypatch.setattr(scan_module, "OWN_VARIANCE", 1e6)  # as if none kept its own
    hidden, _, _ = rates(plan)

    assert found > 0.9 > hidden + 0.05


@pytest.mark.parametrize("fresh", [1, 4])
def test_kernels_that_vary_by_different_amounts_name_no_more_than_those_that_do_not(
    fresh: int,
) -> None:
    _, _, false = rates(Plan(accepted=8, fresh=fresh, prior=3.0))

    assert false <= by_chance(0.05)


def test_a_life_that_is_slower_as_a_whole_names_no_kernel() -> None:
    accepted, fresh = Plan(fresh=2).draw(3)
    before = scanned(accepted, fresh)

    after = scanned(accepted, fresh + math.log(1.2))

    assert not any(change.is_slower for change in after)
    assert [change.name for change in after] == [change.name for change in before]
    for one, other in zip(before, after, strict=True):
        assert other.relative == pytest.approx(one.relative, rel=1e-9)
        assert other.p == pytest.approx(one.p, rel=1e-4)
        assert other.ratio == pytest.approx(1.2 * one.ratio)


def test_without_the_level_of_a_life_taken_out_many_kernels_would_be_named() -> None:
    accepted, fresh = Plan(fresh=2).draw(4)
    fresh = fresh + math.log(1.06)

    together = np.vstack([accepted, fresh])
    plain = together[10:].mean(axis=0) - together[:10].mean(axis=0)
    p = 2 * tails(np.abs(plain), np.full(KERNELS, 0.015 * math.sqrt(0.6)), np.full(KERNELS, 30.0))

    assert (false_shares(p) <= 0.05).mean() > 0.5
    assert not any(change.is_slower for change in scanned(accepted, fresh))


# Figures.


def test_a_kernel_has_its_times_its_ratio_and_where_that_may_be() -> None:
    accepted, fresh = Plan(fresh=4, factor=1.10).draw(5)

    change = next(each for each in scanned(accepted, fresh) if each.name == NAMES[SLOW][1])

    before, now = np.exp(accepted[:, SLOW].mean()), np.exp(fresh[:, SLOW].mean())
    assert (change.before_ns, change.now_ns) == pytest.approx((before, now))
    assert change.ratio == pytest.approx(now / before)
    assert change.low < change.ratio < change.high
    assert change.is_slower
    assert not change.is_faster
    levels = levels_of(np.vstack([accepted, fresh]))
    own = math.log(change.ratio) - (levels[10:].mean() - levels[:10].mean())
    assert change.relative == pytest.approx(math.exp(own))


def test_intervals_hold_the_truth_in_95_per_cent() -> None:
    plan, inside = Plan(fresh=2, factor=1.05), 0
    for seed in range(SEEDS):
        for change in scanned(*plan.draw(seed)):
            truth = 1.05 if change.name == NAMES[SLOW][1] else 1.0
            inside += change.low <= truth <= change.high

    # Those of a night share the run's effect, so they are not independent.
    assert inside / (SEEDS * KERNELS) == pytest.approx(0.95, abs=0.02)


def test_faster_is_the_mirror_of_slower() -> None:
    accepted, fresh = Plan(accepted=10, fresh=10, factor=1.10).draw(6)

    up, down = scanned(accepted, fresh), scanned(fresh, accepted)

    assert [change.name for change in up if change.is_slower] == [
        change.name for change in down if change.is_faster
    ]
    assert any(change.is_slower for change in up)


def test_a_kernel_must_cost_as_many_ns_as_are_asked_for() -> None:
    accepted, fresh = Plan(fresh=4, factor=1.10).draw(5)
    cost = np.exp(fresh[:, SLOW].mean()) - np.exp(accepted[:, SLOW].mean())

    for least, is_listed in ((cost * 0.99, True), (cost * 1.01, False)):
        names = [each.name for each in scanned(accepted, fresh, min_ns=least) if each.is_slower]
        assert (NAMES[SLOW][1] in names) is is_listed


def test_a_change_below_the_limit_is_sure_but_not_listed() -> None:
    accepted, fresh = Plan(fresh=10, factor=1.05, sd=0.002).draw(7)

    change = scanned(accepted, fresh, limit=1.10)[0]

    assert change.name == NAMES[SLOW][1]
    assert change.q < 1e-6
    assert not change.is_slower


def test_kernels_that_a_life_lacks_are_left_out() -> None:
    accepted, fresh = Plan(factor=1.05).draw(8)
    fresh[1, 3] = -math.inf

    changes = scanned(accepted, fresh)

    assert {change.name for change in changes} == {name for _, name in NAMES} - {"kernel_3"}


# Which lives.


@pytest.mark.parametrize(
    ("accepted_lives", "fresh_host", "words"),
    [
        ([LifeValue(1.0, "a")] * 10, "b", "first life on b"),
        ([LifeValue(1.0, host) for host in "abcdefghij"], "a", "too few"),
    ],
)
def test_hosts_that_do_not_tell_how_kernels_differ_are_named(
    accepted_lives: list[LifeValue], fresh_host: str, words: str
) -> None:
    accepted, fresh = Plan(fresh=1).draw(1)

    why = scan(
        NAMES,
        accepted,
        fresh,
        accepted_lives=accepted_lives,
        fresh_lives=[LifeValue(1.0, fresh_host)],
    )

    assert words in str(why)


def test_eight_accepted_lives_and_five_kernels_are_needed() -> None:
    accepted, fresh = Plan().draw(1)

    assert "7 accepted lives, 8 are needed" in str(scan(NAMES, accepted[:7], fresh))
    assert "4 kernels" in str(scan(NAMES[:4], accepted[:, :4], fresh[:, :4]))


def test_lives_before_the_latest_level_give_the_variance_alone() -> None:
    accepted, fresh = Plan(accepted=12, fresh=4).draw(9)
    fresh[:, SLOW] += math.log(1.10)
    accepted[6:, SLOW] += math.log(1.10)  # accepted with a reason
    levels = [LifeValue(1.0, level=int(at >= 6)) for at in range(12)]

    told = scan(
        NAMES,
        accepted,
        fresh,
        accepted_lives=levels,
        fresh_lives=[LifeValue(1.0)] * 4,
        limit=LIMIT,
    )

    assert not isinstance(told, str)
    change = next(each for each in told if each.name == NAMES[SLOW][1])
    assert change.before_ns == pytest.approx(np.exp(accepted[6:, SLOW].mean()))
    assert not change.is_slower


# Variances.


@pytest.mark.parametrize("prior", [3.0, 8.0, 20.0])
@pytest.mark.parametrize("wild", [0, 200])
def test_the_common_variance_and_its_degrees_of_freedom_are_those_drawn(
    prior: float, wild: int
) -> None:
    rng = np.random.default_rng(1)
    kernels, common, freedom = 4000, 0.0004, 10
    true = prior * common / rng.chisquare(prior, kernels)
    true[:wild] *= 30
    own = true * rng.chisquare(freedom, kernels) / freedom

    spread = spread_of(own, freedom)

    drawn = spread.freedom > freedom
    # (prior · common + freedom · own) / (prior + freedom): a line through these kernels.
    slope, offset = np.polyfit(own[drawn], spread.variances[drawn], 1)
    found = freedom / slope - freedom
    assert found == pytest.approx(prior, rel=0.15)
    assert offset / (1 - slope) == pytest.approx(common, rel=0.05)
    assert spread.freedom[drawn] == pytest.approx(found + freedom)
    assert not drawn[own > 5 * np.median(own)].any()
    assert (spread.variances[~drawn] == own[~drawn]).all()


def test_equal_variances_are_known_as_if_of_many_lives() -> None:
    rng = np.random.default_rng(2)

    spread = spread_of(0.0004 * rng.chisquare(10, 2000) / 10, 10)

    assert spread.freedom.min() > 200
    assert spread.variances == pytest.approx(0.0004, rel=0.1)


def test_p_of_unchanged_kernels_is_uniform() -> None:
    stats = pytest.importorskip("scipy.stats")
    chances = [
        change.p
        for seed in range(40)
        for change in scanned(*Plan(fresh=4, run_sd=0.02).draw(seed))[:: KERNELS // 50]
    ]

    assert stats.kstest(chances, "uniform").pvalue > 0.01


@given(st.lists(st.floats(0, 1), min_size=1, max_size=30))
@settings(deadline=None)
def test_false_shares_are_those_of_scipy(chances: list[float]) -> None:
    stats = pytest.importorskip("scipy.stats")

    assert false_shares(np.array(chances)) == pytest.approx(
        stats.false_discovery_control(chances), abs=1e-12
    )


def test_tails_are_those_of_scipy() -> None:
    stats = pytest.importorskip("scipy.stats")
    t, freedom = np.array([0.0, 0.5, 3.0, 5.0, 12.0]), np.array([4.0, 10.0, 10.0, 5000.0, 7.5])

    assert tails(t * 0.3, np.full(5, 0.3), freedom) == pytest.approx(
        stats.t.sf(t, freedom), rel=0.01
    )


# A/B.


def by_hand(a: np.ndarray, b: np.ndarray, sign: int) -> np.ndarray:
    """Step-down max-T of the plain t, one labelling and one column at a time."""
    logs, size = np.vstack([a, b]), len(b)
    tables = []
    for chosen in itertools.combinations(range(len(logs)), size):
        rest = [at for at in range(len(logs)) if at not in chosen]
        new, old = logs[list(chosen)], logs[rest]
        squares = ((new - new.mean(0)) ** 2).sum(0) + ((old - old.mean(0)) ** 2).sum(0)
        t = (new.mean(0) - old.mean(0)) / np.sqrt(squares / (len(logs) - 2))
        tables.append(np.abs(t) if sign == 0 else t)
    at_hand = tables[-1]  # the last lives
    order = np.argsort(-at_hand)
    adjusted, largest = np.empty(len(order)), 0.0
    for place, column in enumerate(order):
        reached = [table[order[place:]].max() >= at_hand[column] - 1e-9 for table in tables]
        largest = max(largest, float(np.mean(reached)))
        adjusted[column] = largest
    return adjusted


@pytest.mark.parametrize("sides", [(5, 5), (4, 6)])
@pytest.mark.parametrize("sign", [0, 1])
def test_max_t_is_that_of_every_labelling(sides: tuple[int, int], sign: int) -> None:
    rng = np.random.default_rng(3)
    logs = rng.normal(0, 0.01, (sum(sides), 4)) + np.where(np.arange(4) == 2, 0.03, 0) * (
        np.arange(sum(sides)) >= sides[0]
    ).reshape(-1, 1)
    a, b = logs[: sides[0]], logs[sides[0] :]

    # Of four figures, none has a variance in common with the others.
    assert max_t(a, b, is_two_sided=sign == 0) == pytest.approx(by_hand(a, b, sign))


def test_labellings_that_are_drawn_give_nearly_the_p_of_all() -> None:
    plan = Plan(accepted=6, fresh=6, factor=1.06)
    a, b = plan.draw(1)
    logs = without_levels(np.vstack([a, b]))[:, :40]
    every = max_t(logs[:6], logs[6:])
    more = np.vstack([logs, logs])  # twelve a side: 2.7 million labellings

    drawn = [max_t(more[::2], more[1::2], seed=seed) for seed in (1, 1, 2)]

    assert every[SLOW] < 0.05
    assert drawn[0].tolist() == drawn[1].tolist()
    assert drawn[0] == pytest.approx(drawn[2], abs=0.05)
    assert drawn[0].min() >= 1 / 5001


def ab_rates(plan: Plan, alpha: float) -> tuple[float, float]:
    """Shares of A/B runs: with the planted kernel, and with another one."""
    hits = others = 0
    for seed in range(SEEDS):
        a, b = plan.draw(seed)
        logs = without_levels(np.vstack([a, b]))
        p = max_t(logs[: len(a)], logs[len(a) :])
        hits += p[SLOW] <= alpha
        others += bool((np.delete(p, SLOW) <= alpha).any())
    return hits / SEEDS, others / SEEDS


@pytest.mark.parametrize(("sd", "least"), [(0.015, 0.70), (0.010, 0.95)])
def test_an_ab_run_of_five_lives_each_finds_five_per_cent_of_one_kernel(
    sd: float, least: float
) -> None:
    found, false = ab_rates(Plan(5, 5, 1.05, sd=sd), 0.01)

    assert found >= least - 2 * math.sqrt(least * (1 - least) / SEEDS)
    assert false <= by_chance(0.01)


@pytest.mark.parametrize("bistable", [0, 10])
def test_an_ab_run_of_the_same_names_a_kernel_as_often_as_it_may(bistable: int) -> None:
    _, false = ab_rates(Plan(5, 5, bistable=bistable), 0.05)

    assert false <= by_chance(0.05)


def test_figures_without_any_noise_are_judged_by_their_labels_alone() -> None:
    a, b = np.zeros((5, 2)), np.zeros((5, 2))
    b[:, 1] = 0.5

    assert max_t(a, b).tolist() == [1.0, pytest.approx(1 / 252)]
    assert max_t(b, a).tolist() == [1.0, 1.0]
