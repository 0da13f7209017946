"""Two versions by their lives: what is found, what is not, and what cannot be told."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import msgspec
import numpy as np
import pytest

from pytest_sglprof._analysis.strata import GroupStrata, StepWork, Stratum
from pytest_sglprof._baselines.records import (
    RECORD_FORMAT,
    LifeRecord,
    LoadFigures,
)
from pytest_sglprof._verdict.ab import (
    ABResult,
    ABRow,
    compare_lives,
    floor_result,
    least_lives,
    order_of,
)
from tests.support.lives import key, provenance

KERNELS = 40
WORK = StepWork("decode", "DECODE", 8, 10, -1)
KEY = key(test="sglprof ab", window="ab", gpus=1, sizes={"tp": 1})
PROVENANCE = provenance(host="h", versions={}, clocks_mhz={}, power_limit_w={}, options={}, load={})


@dataclass(frozen=True)
class Version:
    """Lives of one version. sd: of each kernel between lives; level: of the life as a whole."""

    factors: Sequence[float] = (1.0,) * KERNELS
    sd: float = 0.005
    level: float = 0.005
    wall: float = 1.0
    throughput: float = 1.0
    calls: int = 2
    names: Sequence[str] = tuple(f"kernel_{at}" for at in range(KERNELS))
    ranks: tuple[str, ...] = ("TP0",)
    driven: Any = "concurrency"

    def life(self, rng: np.random.Generator, number: int) -> LifeRecord:
        level = math.exp(rng.normal(0, self.level))
        noise = np.exp(rng.normal(0, self.sd, len(self.factors)))
        ns = 10_000.0 * np.asarray(self.factors) * noise * level
        compute = float(ns.sum())
        stratum = Stratum(
            work=WORK,
            steps=60,
            compute_ns=compute,
            categories={"gemm": compute},
            kernels=tuple(ns.tolist()),
            calls=(float(self.calls),) * len(ns),
            transfer_ns=None,
            wall_ns=self.wall * 1.2 * 10_000 * KERNELS * math.exp(rng.normal(0, self.sd)),
            idle_ns=None,
        )
        group = GroupStrata(
            group="",
            ranks=self.ranks,
            steps={"decode": 60},
            assigned_share=1.0,
            kernels=tuple(("gemm", name) for name in self.names),
            strata=(stratum,),
            left_out_strata=0,
            left_out_kernels=0,
            calls=(),
        )
        load = LoadFigures(
            figures={"output_throughput": self.throughput * 1000 * math.exp(rng.normal(0, 0.005))},
            driven=self.driven,
            requested=64,
            completed=64,
            queue_grows=False,
        )
        return LifeRecord(
            format=RECORD_FORMAT,
            id=f"r/{number}",
            life=f"r/{number}",
            run="r",
            recorded="2026-11-29T03:00:00Z",
            key=KEY,
            groups=(group,),
            load=load,
            provenance=PROVENANCE,
            verdict="pass",
        )


def lives_of(a: Version, b: Version, lives: int, seed: int) -> list[tuple[str, LifeRecord]]:
    rng = np.random.default_rng(seed)
    order = order_of(lives, seed)
    return [(side, (a if side == "A" else b).life(rng, at)) for at, side in enumerate(order)]


def compared(
    b: Version, lives: int = 5, seed: int = 1, a: Version = Version(), **more: Any
) -> ABResult:
    records = lives_of(a, b, lives, seed)
    return compare_lives(records, a="a", b="b", seed=seed, order=order_of(lives, seed), **more)


def row(result: ABResult, name: str) -> ABRow:
    return next(each for each in result.rows if each.name == name)


def with_slow_kernel(factor: float) -> Version:
    return Version(factors=(factor, *[1.0] * (KERNELS - 1)))


def test_the_order_is_abba_and_either_side_may_start() -> None:
    orders = Counter(order_of(4, seed) for seed in range(200))
    assert set(orders) == {"ABBAABBA", "BAABBAAB"}
    assert min(orders.values()) > 60
    assert order_of(5, 7) == order_of(5, 7)
    assert Counter(order_of(5, 3)) == {"A": 5, "B": 5}


@pytest.mark.parametrize(("alpha", "lives"), [(0.01, 5), (0.05, 3), (0.1, 3), (0.2, 2)])
def test_how_many_lives_a_permutation_needs(alpha: float, lives: int) -> None:
    assert least_lives(alpha) == lives
    few = compared(with_slow_kernel(2.0), lives - 1, alpha=alpha)
    assert few.word == "inconclusive"
    assert f"{lives} + {lives} are needed" in few.reason
    assert compared(with_slow_kernel(2.0), lives, alpha=alpha).word == "slower"


def test_a_slower_kernel_is_found_and_named_with_its_ratio() -> None:
    result = compared(with_slow_kernel(1.05))
    assert result.word == "slower"
    assert "kernel kernel_0 is slower: 1.0" in result.reason
    slow = row(result, "kernel_0")
    assert slow.low < 1.05 < slow.high
    assert slow.p_slower <= 0.01
    assert [each.name for each in result.rows if each.word] == ["kernel_0"]


def test_a_faster_version_is_not_slower() -> None:
    result = compared(with_slow_kernel(0.9))
    assert result.word == "faster"
    assert row(result, "kernel_0").word == "faster"


def test_versions_that_do_not_differ_are_called_slower_in_one_of_a_hundred() -> None:
    words = Counter(compared(Version(), seed=seed).word for seed in range(300))
    assert words["slower"] <= 9  # at 1 % more are less likely than 0.2 %
    assert words["not different"] > 285


def test_a_slower_wall_and_a_lower_throughput_are_slower() -> None:
    assert row(compared(Version(wall=1.05)), "pass_wall").word == "slower"
    result = compared(Version(throughput=0.9))
    assert row(result, "output_throughput").ratio == pytest.approx(1 / 0.9, rel=0.02)
    assert row(result, "output_throughput").word == "slower"
    assert result.word == "slower"
    assert compared(Version(throughput=1.1)).word == "faster"


def test_all_kernels_together_are_a_figure_not_forty_kernels() -> None:
    result = compared(Version(factors=(1.08,) * KERNELS))
    assert {each.name for each in result.rows if each.word} == {"compute", "gemm"}


def test_a_limit_allows_what_is_below_it_and_wants_lives_that_can_tell() -> None:
    slow = Version(factors=(1.04,) * KERNELS)
    assert compared(slow).word == "slower"
    allowed = compared(slow, limit=1.05)
    assert allowed.word == "not different"
    assert row(allowed, "compute").ratio == pytest.approx(1.04, rel=0.02)
    assert compared(Version(factors=(1.15,) * KERNELS), limit=1.05).word == "slower"
    noisy = Version(level=0.08)
    nights = [compared(noisy, a=noisy, limit=1.05, seed=seed) for seed in range(20)]
    unknown = [each for each in nights if each.word == "inconclusive"]
    assert 8 <= len(unknown) < 20  # some nights B is by chance so fast that its upper end is low
    assert not [each for each in nights if each.word == "slower"]
    assert all("more lives are needed" in each.reason for each in unknown)
    assert all(each.sees is not None and each.sees > 1.15 for each in unknown)


def test_three_lives_each_find_what_is_far_beyond_a_limit() -> None:
    """Although all other figures are surely below it, in whichever order."""
    result = compared(with_slow_kernel(2.0), 3, alpha=0.05, limit=1.3)
    assert row(result, "kernel_0").p_slower == pytest.approx(0.05)
    assert [each.name for each in result.rows if each.word] == ["kernel_0"]
    at_the_limit = Version(factors=(1.3,) * KERNELS)
    words = Counter(compared(at_the_limit, seed=seed, limit=1.3).word for seed in range(200))
    assert words["slower"] <= 7  # at 1 % more are less likely than 0.2 %


def test_kernels_that_appear_vanish_or_change_their_calls_are_named() -> None:
    names = [f"kernel_{at}" for at in range(KERNELS)]
    result = compared(Version(names=("fused", *names[1:])))
    assert set(result.notes) == {"only in A: kernel_0", "only in B: fused"}
    notes = compared(Version(calls=3)).notes
    assert "called 2 times a step in A, 3 times in B: kernel_5" in notes


def test_a_kernel_below_the_least_share_decides_nothing() -> None:
    small = (0.01, *[1.0] * (KERNELS - 1))
    a, b = Version(factors=small), Version(factors=(0.02, *small[1:]))
    assert compared(b, a=a).word == "not different"
    assert compared(b, a=a, min_share=0.0).word == "slower"


def test_lives_that_cannot_be_compared_are_inconclusive_and_say_why() -> None:
    two = compared(Version(ranks=("TP0", "TP1")))
    assert two.word == "inconclusive"
    assert "other ranks: " in two.reason
    assert {each.name for each in two.rows} == {"output_throughput"}
    unlimited = Version(driven="unlimited")
    assert "as fast as possible" in compared(unlimited, a=unlimited).notes[0]


def test_a_life_in_which_a_kernel_was_compiled_is_left_out() -> None:
    records = lives_of(Version(), Version(), 6, 1)
    side, first = records[0]
    records[0] = (side, msgspec.structs.replace(first, apart="a kernel was compiled"))
    result = compare_lives(records, a="a", b="b", seed=1, order=order_of(6, 1))
    assert sorted(result.lives) == [5, 6]
    assert result.notes == (f"a life of {side} is left out: a kernel was compiled",)
    assert result.word == "not different"


def test_what_one_version_differs_by_is_its_floor() -> None:
    rng = np.random.default_rng(5)
    version = replace(Version(), level=0.01, sd=0.0)
    records = [version.life(rng, at) for at in range(40)]
    result = floor_result(records, a="a", seed=0, measured="2026-11-29T03:00:00+00:00", host="h")
    assert result.floor is not None
    assert result.floor.lives == 40
    assert result.floor.sd["compute"] == pytest.approx(0.01, rel=0.3)
    assert result.floor.sd["compute in decode"] == result.floor.sd["compute"]
    assert result.floor.upper == pytest.approx(1.236, abs=0.01)  # chi² of 39 at 5 %: 25.70
    few = floor_result(records[:2], a="a", seed=0, measured="", host="h")
    assert few.word == "inconclusive"
    assert few.floor is None
