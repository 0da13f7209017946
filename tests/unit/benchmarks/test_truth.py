"""The verdicts of a fixed part of `benchmarks.truth` keep their bounds, and mutants do not."""

from __future__ import annotations

import math
from functools import cache

import numpy as np
import pytest

from benchmarks.truth import Results, Tally, at_least, cells, least_found, misses, table, tally_of
from benchmarks.truth_judge import MUTANTS, decide, decide_many, judged_table, oracle
from benchmarks.truth_model import (
    NOISE,
    NOISES,
    Cell,
    batch,
    grid,
    lives,
    mean_deviation,
    residuals,
    to_the_others,
)

WINDOWS, LIVES = 200, 20
CHECKED = (
    *(Cell(ranks, 100, noise.name, 0.02, 2) for ranks in (2, 8, 64) for noise in NOISES),
    *(Cell(8, 100, noise, 0.02, 5) for noise in ("white", "AR 0.6", "spikes", "Pareto")),
    Cell(8, 100, "AR 0.6", 0.05, 10),
    Cell(64, 100, "white", 0.02, 0, limit=1.0),
    Cell(64, 100, "AR 0.6", 0.02, 0, limit=1.0),
    Cell(8, 300, "AR 0.6", 0.02, 0, limit=1.0),
    Cell(8, 100, "AR 0.6", 0.02, 0, is_repeated=True, moving=0.01),
    Cell(8, 100, "AR 0.6", 0.02, 5, is_repeated=True, moving=0.01),
)


@cache
def checked(without: str = "") -> Results:
    """The tally of each of the 40 cells, judged by a mutant if one is named."""
    known = [cell for cell in CHECKED if cell.noise != "recorded" or residuals()]
    return {
        cell: tally_of(cell, 0, LIVES if cell.is_repeated else WINDOWS, without=without)
        for cell in known
    }


def missed(results: Results) -> dict[str, list[str]]:
    every = {cell.key: misses(cell, tally, len(CHECKED)) for cell, tally in results.items()}
    return {key: texts for key, texts in every.items() if texts}


def test_the_checked_cells_are_40_of_those_of_the_benchmark() -> None:
    assert len(set(CHECKED)) == 40
    assert {cell for cell in CHECKED if cell.noise != "recorded"} <= set(cells())


def test_verdicts_keep_their_bounds() -> None:
    assert missed(checked()) == {}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_judge_without_one_of_its_rules_does_not(mutant: str) -> None:
    assert missed(checked(mutant)) != {}


def test_the_oracle_is_wrong_as_often_as_its_level_says() -> None:
    fails = [tally.oracle_fail for cell, tally in checked().items() if cell.limit == 1.0]
    assert sum(fails) <= 12  # of 600 at 0.5 %: more have a chance of 0.0002


# The model.


@pytest.mark.parametrize("noise", [noise.name for noise in NOISES if noise.is_clean])
def test_the_oracle_knows_how_far_means_scatter(noise: str) -> None:
    cell = Cell(2, 100, noise, 0.02, 0)
    drawn = batch(cell, 0, 2000)
    apart = drawn.known[:, 0] - drawn.known[:, 1]
    assert apart.std() == pytest.approx(math.sqrt(2) * mean_deviation(cell), rel=0.08)


def test_the_truth_of_a_window_has_no_noise() -> None:
    for cell in (Cell(8, 30, "spikes", 0.05, 5), Cell(8, 30, "drift", 0.05, 5)):
        truth = batch(cell, 0, 5).truth
        assert np.allclose(truth[:, 0], math.log(1.05))
        assert np.allclose(truth[:, 1:], 0.0)


def test_the_truth_of_a_rank_is_its_ratio_to_the_median_of_the_others() -> None:
    levels = np.log([[1.1, 1.0, 0.9, 1.02]])
    assert np.exp(to_the_others(levels)) == pytest.approx(
        np.array([[1.1, 1 / 1.02, 0.9 / 1.02, 1.02]])
    )


def test_a_tenth_of_pareto_noise_is_in_its_tail() -> None:
    noise = NOISE["Pareto"].draw(np.random.default_rng(0), (10, 1000, 10), 0.01)
    assert (noise > 0.0128155).mean() == pytest.approx(0.1, abs=0.005)
    assert (noise > 2 * 0.0128155).mean() == pytest.approx(0.1 * 2**-1.5, abs=0.003)


def test_recorded_noise_has_the_deviation_that_is_asked_for() -> None:
    if not residuals():
        pytest.skip("no recordings: ../shared/data is absent")
    noise = NOISE["recorded"].draw(np.random.default_rng(0), (20, 300, 8), 0.02)
    assert noise.std() == pytest.approx(0.02, rel=0.05)


def test_windows_of_a_life_differ_only_by_how_much_ranks_move() -> None:
    still, moving = (
        Cell(2, 100, "white", 0.01, 0, is_repeated=True, moving=moving) for moving in (0.0, 0.01)
    )
    spreads = []
    for cell in (still, moving):
        means = [
            [np.log(each[:, 0] / each[:, 1]).mean() for each in windows]
            for windows, _ in lives(cell, 0, 30, 8)
        ]
        spreads.append(float(np.std(means, axis=1).mean()))
    assert spreads[0] < 0.002
    assert 0.010 < spreads[1] < 0.018


def test_the_same_cell_has_the_same_windows() -> None:
    cell = Cell(8, 30, "AR 0.6", 0.02, 5)
    assert np.array_equal(batch(cell, 0, 3).logs, batch(cell, 0, 3).logs)
    assert not np.array_equal(batch(cell, 0, 3).logs, batch(cell, 50, 53).logs)


# The judge.


def test_a_matrix_and_a_kernel_table_of_it_have_the_same_verdict() -> None:
    for effect, word in ((0, "pass"), (10, "fail")):
        matrix = next(batch(Cell(8, 100, "AR 0.6", 0.02, effect), 0, 1).matrices())
        assert decide(matrix, 1.02)[0] == word
        assert judged_table(matrix, 1.02) == word


def test_one_window_of_a_life_decides_nothing() -> None:
    matrices = list(batch(Cell(8, 100, "white", 0.01, 10), 0, 2).matrices())
    assert decide(matrices[0], 1.02) == ("fail", 0)
    assert decide_many(matrices[:1], 1.02)[0] == "inconclusive"
    assert decide_many(matrices, 1.02) == ("fail", 0, 2)


def test_the_oracle_finds_what_is_large_and_passes_what_is_nothing() -> None:
    for effect, at in ((0, 1), (10, 0)):
        cell = Cell(8, 100, "white", 0.01, effect)
        assert oracle(cell, batch(cell, 0, 50))[at].all()


# Bounds.


def test_the_tail_of_the_binomial_is_exact() -> None:
    exact = sum(math.comb(50, k) * 0.01**k * 0.99 ** (50 - k) for k in range(3, 51))
    assert at_least(3, 50, 0.01) == pytest.approx(exact)
    assert (at_least(0, 50, 0.01), at_least(1, 50, 0.0), at_least(50, 50, 1.0)) == (1.0, 0.0, 1.0)


def test_false_verdicts_and_missing_power_are_misses() -> None:
    at_limit, slow = Cell(2, 100, "white", 0.02, 2), Cell(8, 100, "white", 0.02, 5)
    assert misses(at_limit, Tally(windows=200, failed=5, healthy=200, false_fail=5), 40) == []
    assert misses(at_limit, Tally(windows=200, failed=20, healthy=200, false_fail=20), 40) == [
        "20 of 200 fail falsely"
    ]
    assert misses(slow, Tally(windows=200, passed=200, slow=200, false_pass=200), 40)[0] == (
        "200 of 200 pass falsely"
    )
    weak = Cell(8, 300, "white", 0.05, 5)
    assert misses(weak, Tally(windows=200, failed=180, oracle_fail=200), 40) == []
    assert misses(weak, Tally(windows=200, failed=100, oracle_fail=200), 40) == [
        "50 % found, 100 by the oracle"
    ]
    assert misses(weak, Tally(windows=200, failed=200, tables=50, unlike=1), 40) == [
        "1 of 50 otherwise as kernel tables"
    ]


def test_a_cell_of_few_effective_steps_may_be_wrong_more_often() -> None:
    tally = Tally(windows=1000, failed=30, healthy=1000, false_fail=30)
    assert misses(Cell(2, 100, "AR 0.9", 0.02, 2), tally, 1000) == []
    assert misses(Cell(2, 100, "AR 0.6", 0.02, 2), tally, 1000) != []


def test_what_is_promised_by_number() -> None:
    promised = {cell for cell in grid() if least_found(cell) is not None}
    assert len(promised) == 4 * 2 + 2 + 2 * 2
    assert least_found(Cell(2, 100, "AR 0.6", 0.01, 5)) == 0.80


def test_a_window_counts_by_its_own_truth() -> None:
    cell, tally = Cell(2, 100, "bias", 0.02, 2), Tally()
    for word, ratio in (("fail", 1.02), ("fail", 1.025), ("pass", 1.03), ("pass", 1.01)):
        tally.add(cell, word, 0, np.log([ratio, 1 / ratio]))
    assert (tally.healthy, tally.false_fail) == (2, 1)
    assert (tally.slow, tally.false_pass) == (1, 1)


def test_a_table_has_one_row_for_all_effects() -> None:
    tally = Tally(windows=200, failed=1, passed=198, oracle_pass=200)
    results = {Cell(2, 30, "white", 0.01, effect): tally for effect in (0, 2)}
    assert table(results)[2:] == [
        "| 2 × 30 white sd 1 % | 0.5 / 99.0 / 0.5 (0 / 100) | 0.5 / 99.0 / 0.5 (0 / 100) |"
    ]
