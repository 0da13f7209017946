"""Planted clocks are found within the interval that is given for them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from pytest_sglprof._analysis.clocks import SHARED_NS, ClockFit, clocks_of, fit_clocks
from pytest_sglprof._analysis.straggler import StragglerFinding, stragglers
from pytest_sglprof._trace.read import read_window
from tests.support.kineto import document, kernel, write
from tests.support.planted import Plan, window

Floats = npt.NDArray[np.float64]
SEEDS = 100
NOISE_NS = 800.0  # of the end of a collective on one rank
PPM = 1e-6


def planted(
    offsets: list[float], drifts: list[float], seed: int, *, ends: int = 300, carried: float = 0.0
) -> Floats:
    """Ends of collectives every 0.3 ms or so on clocks with these offsets and drifts (ppm).

    The offsets are those in the middle of the window.
    """
    rng = np.random.default_rng(seed)
    true = np.cumsum(rng.uniform(100_000, 500_000, ends))
    noise = rng.normal(0, NOISE_NS, (ends, len(offsets)))
    for at in range(1, ends):
        noise[at] = carried * noise[at - 1] + (1 - carried**2) ** 0.5 * noise[at]
    middle = true.mean()
    return (
        true[:, None]
        + np.array(offsets)
        + (true[:, None] - middle) * np.array(drifts) * PPM
        + noise
    )


def fitted(ends: Floats) -> ClockFit:
    fit = fit_clocks(ends)
    assert fit is not None
    return fit


CELLS = [
    ([0.0, 0.0], [0.0, 0.0]),
    ([0.0, 20_000.0], [0.0, 0.0]),
    ([0.0, 3_000_000.0], [0.0, 20.0]),
    ([0.0, 20_000.0, -3_000_000.0], [0.0, 0.0, 20.0]),
    ([0.0, 20_000.0, 3_000_000.0, -20_000.0], [0.0, 20.0, 0.0, -20.0]),
    ([1_000.0 * rank for rank in range(8)], [0.0] * 8),
]


@pytest.mark.parametrize(("offsets", "drifts"), CELLS)
@pytest.mark.parametrize(("ends", "carried"), [(30, 0.0), (300, 0.0), (300, 0.6)])
def test_offsets_and_drifts_are_recovered_within_their_interval(
    offsets: list[float], drifts: list[float], ends: int, carried: float
) -> None:
    """All ranks of a window at once, in at least 95 of 100 windows; by the plain differences."""
    middle = np.argsort(offsets)[(len(offsets) - 1) // 2 : len(offsets) // 2 + 1]
    truth, pace = (np.array(each) - np.array(each)[middle].mean() for each in (offsets, drifts))
    found = [0, 0]
    widths = []
    for seed in range(SEEDS):
        fit = fitted(planted(offsets, drifts, seed, ends=ends, carried=carried))
        pairs = ((fit.at_middle, truth, fit.margin), (fit.drift, pace, fit.drift_margin))
        for at, (values, true, margin) in enumerate(pairs):
            found[at] += bool((np.abs(values - true) <= margin).all())
        widths.append(fit.margin.max())
    assert min(found) >= 95
    # An interval that holds everything would say nothing: noise / √ends, and some.
    plain = NOISE_NS / np.sqrt(ends) * np.sqrt((1 + carried) / (1 - carried))
    assert np.median(widths) < 6 * plain


def test_ranks_that_are_held_up_do_not_move_their_clock() -> None:
    """Two of five ends are late by 0.5 to 1.5 ms, in the first and last part of the window."""
    ends = planted([0.0, 0.0], [0.0, 20.0], 3)
    rng = np.random.default_rng(4)
    late = np.r_[0:60, 240:300]
    ends[late, 0] += rng.uniform(500_000, 1_500_000, len(late))
    fit = fitted(ends)
    assert abs(fit.at_middle[0]) <= fit.margin[0] < 1_000
    assert abs(fit.drift[1] - 10.0) <= fit.drift_margin[1]
    assert fit.uncertainty_ns > 200_000


def test_a_clock_that_is_set_inside_the_window_is_followed() -> None:
    ends = planted([0.0, 0.0, 0.0], [0.0, 0.0, 0.0], 5)
    ends[150:, 1] += 100_000.0
    fit = fitted(ends)
    apart = fit.offsets[:, 1] - fit.offsets[:, 0]
    assert apart[:120] == pytest.approx(0.0, abs=2_000)
    assert apart[180:] == pytest.approx(100_000.0, abs=2_000)
    # It has no one offset, and that is what its interval says.
    assert fit.margin[1] > 10_000


def test_a_rank_that_is_ahead_is_behind_when_time_runs_backward() -> None:
    ends = planted([0.0, 5_000.0, -70_000.0], [0.0, 3.0, -9.0], 6)
    one, other = fitted(ends), fitted(-ends[::-1])
    assert other.at_middle == pytest.approx(-one.at_middle, abs=1e-3)
    assert other.drift == pytest.approx(one.drift, rel=1e-6, abs=1e-6)
    assert other.margin == pytest.approx(one.margin, rel=1e-6)


NOISY = planted([0.0, 0.0], [0.0, 0.0], 7, ends=30) + np.random.default_rng(8).normal(
    0, 300_000, (30, 2)
)


@pytest.mark.parametrize(
    ("ends", "hosts", "measured"),
    [
        (NOISY, ["a", "a"], False),  # ends say less than that it is one host
        (NOISY[:5], ["a", "a"], False),
        (NOISY, ["a", "b"], True),
        (NOISY, ["a", ""], True),
        (planted([0.0, 0.0], [0.0, 0.0], 7), ["a", "a"], True),
        (planted([0.0, 3e6], [0.0, 0.0], 7), ["a", "a"], True),  # and it is far from one clock
        (NOISY[:5], ["a", "b"], None),
        (NOISY[:5], ["", ""], None),
    ],
)
def test_ranks_of_one_host_share_its_clock_unless_ends_say_more(
    ends: Floats, hosts: list[str], measured: bool | None
) -> None:
    fit = clocks_of(ends, hosts)
    assert (None if fit is None else fit.is_measured) is measured
    if fit is not None and not measured:
        assert (fit.offsets == 0).all()
        assert set(fit.margin) == {SHARED_NS}
        assert fit.reach_ns == SHARED_NS


# In verdicts.

PAIR = Plan(slow={(1, ""): 1.1}, steps=60)


def only(plan: Plan, hosts: dict[str, str] | None = None) -> StragglerFinding:
    (found,) = stragglers(replace(window(plan), hosts=hosts or {}), min_steps=2)
    return found


def test_a_finding_has_each_clock_with_its_intervals() -> None:
    found = only(replace(PAIR, ranks=3, offset={1: 20_000, 2: -3_000_000}, drift={2: 2e-5}))
    assert found.clocks is not None
    assert [clock.rank for clock in found.clocks] == ["TP0", "TP1", "TP2"]
    first, second, third = found.clocks
    for clock, offset in ((second, 20_000), (first, 0)):
        low, high = clock.offset_interval
        assert low <= offset <= high
        assert high - low < 500
    assert third.drift_interval is not None
    low, high = third.drift_interval
    assert low <= 20.0 <= high
    assert found.clock_margin_ns is not None
    assert 0 < found.clock_margin_ns < 1_000


def test_waits_below_three_times_the_uncertainty_of_the_clocks_are_none_and_no_pass() -> None:
    """Fifteen steps on one host: waits of 30 µs are below 3 x 20 µs, those of 300 µs are not."""
    one_host = {"TP0": "a", "TP1": "a"}
    short = replace(PAIR, steps=15, layers=1, jitter=0.002)
    unseen = only(short, one_host)
    assert (unseen.method, [rank.wait_ns for rank in unseen.ranks]) == ("arrival", [0, 0])
    assert (unseen.straggler, unseen.verdict) == (None, "inconclusive")
    # 60 µs at each of the collectives, of 300 µs of compute, half of it 1.1 times, and transfer.
    assert "what they may hide is 17.9 % of the work" in unseen.reason
    seen = only(replace(short, slow={(1, ""): 2.0}), one_host)
    assert seen.method == "arrival"
    assert seen.ranks[0].wait_ns == pytest.approx(14 * 300_000, rel=0.01)
    assert seen.clocks is not None
    assert {clock.drift_ppm for clock in seen.clocks} == {None}


def test_the_host_of_a_torch_trace_is_known(tmp_path: Path) -> None:
    for rank in range(2):
        found = document([kernel("gemm", 10, 5)], rank=rank) | {"host_name": f"node{rank}"}
        write(tmp_path, found, f"1-TP-{rank}.trace.json")
    assert read_window(tmp_path).hosts == {"TP0": "node0", "TP1": "node1"}


def test_the_host_of_an_nsys_report_is_known(shared_data: Path) -> None:
    hosts = read_window(shared_data / "nsys" / "mfu_2gpu_before.sqlite").hosts
    assert hosts == {"GPU0": "modal", "GPU1": "modal"}
