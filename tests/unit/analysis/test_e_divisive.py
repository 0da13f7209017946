from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pytest_sglprof._analysis.e_divisive import change_points

RECORDING = Path(__file__).parents[2] / "data" / "otava-0.8.0.json"
NIGHTS = 100
NOISE = 0.015  # sd of the logarithm of a night


def white(seed: int, nights: int) -> np.ndarray:
    return np.exp(np.random.default_rng(seed).normal(0, NOISE, nights))


def test_fifty_series_have_the_change_points_that_otava_finds() -> None:
    rows = json.loads(RECORDING.read_text(encoding="utf-8"))

    assert len(rows) == 50
    assert sum(len(row["change_points"]) for row in rows) > 50
    for row in rows:
        assert change_points(row["series"]) == row["change_points"]


def test_a_thousand_white_nights_have_at_most_one_false_change_point() -> None:
    figures = 10
    numbers = [
        sum(len(change_points(white(10 * year + figure, NIGHTS))) for figure in range(figures))
        for year in range(50)
    ]

    assert np.mean(numbers) <= 1


@pytest.mark.parametrize("before", [30, 60])
def test_five_per_cent_are_found_within_three_nights(before: int) -> None:
    hits = 0
    for seed in range(200):
        times = white(seed, before + 3)
        times[before:] *= 1.05
        hits += any(abs(index - before) <= 2 for index in change_points(times))

    assert hits >= 0.9 * 200


def test_all_levels_of_a_long_history_are_found_where_they_begin() -> None:
    times = white(1, 400)
    for start, factor in ((90, 1.1), (200, 0.9), (310, 1.2)):
        times[start:] *= factor

    assert {90, 200, 310} <= set(change_points(times))


def test_ten_thousand_nights_take_less_than_a_second() -> None:
    times = white(3, 10_000)
    change_points(times[:100])

    began = time.process_time()
    change_points(times)

    assert time.process_time() - began < 1


@pytest.mark.parametrize(
    "series", [[], [1.0], [1.0, 2.0], [3.0] * 120, [1.0, 2.0, 3.0]], ids=lambda each: str(len(each))
)
def test_few_or_equal_figures_have_no_change_point(series: list[float]) -> None:
    assert change_points(series) == []


def test_levels_without_noise_are_found() -> None:
    assert change_points([5.0] * 20 + [6.0] * 20) == [20]


@given(st.integers(0, 10_000), st.sampled_from([0.25, 2.0, 1024.0]))
@settings(max_examples=30, deadline=None)
def test_the_unit_of_a_figure_changes_nothing(seed: int, factor: float) -> None:
    times = white(seed, 80)
    times[seed % 80 :] *= 1.05

    assert change_points(times) == change_points(times * factor)


@pytest.mark.parametrize("factor", [1e306, 1e-300, -1e306, 2.0**-1000])
def test_the_size_of_numbers_makes_no_difference(factor: float) -> None:
    rng = np.random.default_rng(1)
    values = np.concatenate([rng.normal(100, 1, 40), rng.normal(110, 1, 40)])
    assert change_points(values * factor) == change_points(values) == [40]
    assert change_points([-1.7e308] * 10 + [1.7e308] * 10) == [10]
