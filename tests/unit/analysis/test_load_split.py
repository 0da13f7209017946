"""How much of a difference between ranks is load: on times whose law is known exactly."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pytest_sglprof._analysis.load_split import (
    CategorySplit,
    Part,
    Speeds,
    added,
    price_of_input,
    speeds_of,
    split,
)
from tests.support.planted import matrix

Floats = npt.NDArray[np.float64]
PASSES = 100


def growing(start: Floats, each: Floats | float = 64.0) -> Floats:
    """Inputs that grow by so much in each pass, shape (passes, ranks)."""
    return start + np.arange(PASSES)[:, None] * each


def parts(times: Floats, inputs: Floats | None, speeds: Speeds | None, **more: Any) -> Any:
    place: dict[str, Any] = {"category": "attention", "kind": "decode", "driver": "KV tokens"}
    return split(times, inputs, speeds, **(place | more))


def ns(part: Part | None) -> float:
    assert part is not None
    return part.ns


@given(st.integers(2, 9), st.integers(0, 10_000))
@settings(max_examples=30, deadline=None)
def test_parts_are_those_of_the_law_and_add_up(ranks: int, seed: int) -> None:
    """By plain sums: t = f (a + b x) without noise, each rank with inputs like the others'."""
    rng = np.random.default_rng(seed)
    inputs = rng.uniform(1e5, 2e5, (PASSES, ranks))
    factor = np.ones(ranks)
    factor[-1] = rng.uniform(1.0, 1.3)
    times = factor * (3e5 + 4.0 * inputs)
    speeds = speeds_of([factor * np.full((PASSES, ranks), 5e5)])
    for rank, each in enumerate(parts(times, inputs, speeds)):
        others = np.delete(np.arange(ranks), rank)
        load = 4.0 * (inputs[:, rank].mean() - inputs[:, others].mean())
        scale = np.median(factor[others])
        assert ns(each.load) == pytest.approx(scale * load, rel=1e-6, abs=1.0)
        slower = (factor - scale) * (3e5 + 4.0 * inputs.mean(axis=0))
        speed = slower[rank] - slower[others].mean()
        assert ns(each.speed) == pytest.approx(speed, rel=1e-6, abs=1.0)
        assert sum(ns(part) for part in (each.load, each.speed, each.rest)) == pytest.approx(
            each.difference_ns, rel=1e-9, abs=1e-3
        )
        whole = times[:, rank].mean() - times[:, others].mean()
        assert each.difference_ns == pytest.approx(whole, rel=1e-9, abs=1e-3)


@pytest.mark.parametrize("ranks", [2, 8])
@pytest.mark.parametrize("slow", [1.0, 1.1])
def test_a_law_is_continued_to_a_rank_with_more_than_the_others(ranks: int, slow: float) -> None:
    start = np.full(ranks, 2.5e5)
    start[-1] *= 1.6
    inputs = growing(start)
    factor = np.ones(ranks)
    factor[-1] = slow
    times = factor * (2e5 + 4.0 * inputs)
    *_, last = parts(times, inputs, speeds_of([factor * np.full((PASSES, ranks), 5e5)]))
    assert ns(last.load) == pytest.approx(4.0 * 1.5e5, rel=1e-6)
    assert ns(last.speed) == pytest.approx((slow - 1) * (2e5 + 4.0 * inputs[:, -1].mean()), abs=1)
    assert last.ratio == pytest.approx(inputs[:, -1].mean() / inputs[:, 0].mean())


def reason(each: CategorySplit) -> str:
    assert (each.load, each.speed, each.rest) == (None, None, None)
    return each.reason


def test_what_cannot_be_known_says_why() -> None:
    start = np.array([2.5e5, 4e5])
    times = 2e5 + 4.0 * growing(start)
    speeds = speeds_of([np.full((PASSES, 2), 5e5)])
    assert "KV tokens of some passes is not known" in reason(parts(times, None, speeds)[1])
    unknown = growing(start)
    unknown[3, 0] = -1
    assert "is not known" in reason(parts(times, unknown, speeds)[1])
    assert reason(parts(times, None, speeds, unknown="because")[1]) == "because"
    few = parts(times[:19], growing(start)[:19], speeds)
    assert reason(few[1]) == "19 passes, at least 20 are needed"
    flat = np.broadcast_to(start, (PASSES, 2)).copy()
    assert "varies too little" in reason(parts(2e5 + 4.0 * flat, flat, speeds)[1])
    far = growing(np.array([2.5e5, 5.5e5]))
    assert "more than 2 times beyond" in reason(parts(2e5 + 4.0 * far, far, speeds)[1])
    assert "its speed at the same work" in reason(parts(times, growing(start), None)[1])


def test_a_rank_that_is_slow_in_this_category_alone_is_not_called_loaded() -> None:
    """Its time grows with its input as that of the others, but is twice as long for it."""
    inputs = growing(np.array([2.5e5, 4e5]), np.array([600.0, 600.0]))
    times = np.array([1.0, 1.5]) * (2e5 + 4.0 * inputs)
    _, last = parts(times, inputs, speeds_of([np.full((PASSES, 2), 5e5)]))
    assert "differs by more than its load" in reason(last)


def test_equal_input_is_no_load_and_the_rest_is_the_ranks() -> None:
    inputs = np.full((PASSES, 4), 64.0)
    times = np.full((PASSES, 4), 1e6)
    times[:, 2] = 1.2e6
    each = parts(times, inputs, speeds_of([np.full((PASSES, 4), 5e5)]))[2]
    assert (ns(each.load), ns(each.speed), ns(each.rest)) == pytest.approx((0, 0, 2e5))


def test_without_a_speed_only_the_load_is_known() -> None:
    rng = np.random.default_rng(0)
    inputs = rng.uniform(1e5, 2e5, (PASSES, 3))
    each = parts(2e5 + 4.0 * inputs, inputs, None)[0]
    assert each.speed is None
    assert ns(each.load) + ns(each.rest) == pytest.approx(each.difference_ns)
    assert "its speed is not known" in each.reason


@pytest.mark.parametrize("phi", [0.0, 0.6])
def test_the_interval_of_the_load_holds_it(phi: float) -> None:
    """Of 200 windows at least 93 %, at 5 % noise; the truth is that of the law."""
    held = known = 0
    for seed in range(200):
        noise = [matrix(4, seed + shift, jitter=0.05, inherited=phi) / 1e6 for shift in (0, 999)]
        inputs = growing(np.array([2e5, 2.5e5, 3e5, 4.2e5]), 800.0)
        times = (2e5 + 4.0 * inputs) * noise[0]
        each = parts(times, inputs, speeds_of([5e5 * noise[1]]), is_paired=True)[3]
        if each.load is None:
            continue
        known += 1
        truth = 4.0 * (inputs[:, 3].mean() - inputs[:, :3].mean())
        low, high = each.load.interval
        held += low <= truth <= high
    assert known >= 180
    assert held >= 0.93 * known


def test_categories_of_equal_work_count_by_how_little_they_vary() -> None:
    quiet, loud = matrix(4, 1, jitter=0.01), matrix(4, 2, jitter=0.2, slow=1.5)
    speeds = speeds_of([quiet.astype(float), loud.astype(float)])
    assert speeds is not None
    assert speeds.beside_others(3) == pytest.approx(1.0, abs=0.02)
    low, high = speeds.interval_of(3)
    assert low < speeds.beside_others(3) < high
    assert speeds_of([quiet[:19].astype(float)]) is None
    assert speeds_of([quiet[:, :1].astype(float)]) is None


def test_a_price_is_known_only_where_it_shows() -> None:
    rng = np.random.default_rng(0)
    rows = rng.choice([64.0, 72.0, 80.0], (PASSES, 1)) * np.ones((1, 2))
    assert price_of_input(1e5 + 700.0 * rows, rows) == pytest.approx(700.0)
    assert price_of_input(np.full((PASSES, 2), 1e5), np.full((PASSES, 2), 64.0)) is None
    noise = 1 + 0.3 * rng.standard_normal((PASSES, 2))
    assert price_of_input(1e5 * noise, rows) is None


def test_errors_of_one_source_add_up_and_others_do_not() -> None:
    part = Part(100.0, (60.0, 140.0))
    assert added([(0.5, part), (0.5, part)]).interval == pytest.approx(
        (100 - 40 * 0.5**0.5, 100 + 40 * 0.5**0.5)
    )
    assert added([(0.5, part), (0.5, part)], are_independent=False).interval == (60.0, 140.0)
    assert added([]).interval == (0.0, 0.0)
