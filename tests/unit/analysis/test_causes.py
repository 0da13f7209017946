"""What share of a planted lateness each cause makes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from pytest_sglprof._analysis.straggler import StragglerFinding, stragglers
from pytest_sglprof._server.nvml import GpuClocks
from pytest_sglprof._trace.read import read_window
from tests.support.planted import KERNELS, Plan, window

FOUR = Plan(ranks=4, jitter=0.005)
WORK = sum(ns for _, _, ns in KERNELS)
HOT = GpuClocks("TP2", "GPU-2", 900.0, 700.0, throttled=True, reason="thermal")


def found_in(plan: Plan, **options: object) -> StragglerFinding:
    (found,) = stragglers(window(plan), **options)  # type: ignore[arg-type]
    assert (found.straggler, found.verdict) == ("TP2", "fail")
    assert found.causes is not None
    assert sum(each.share for each in found.causes) == pytest.approx(1.0)
    assert found.cause == found.causes[0].cause
    return found


def shares(found: StragglerFinding) -> dict[str, float]:
    return {each.cause: each.share for each in found.causes or ()}


@pytest.mark.parametrize(
    ("slow", "idle"), [(0.1, 30_000), (0.1, 10_000), (0.02, 30_000), (0.3, 5_000)]
)
def test_compute_and_idle_have_the_shares_that_were_planted(slow: float, idle: int) -> None:
    found = found_in(replace(FOUR, slow={(2, ""): 1 + slow}, late={2: idle}))
    late = slow * WORK + idle
    made = shares(found)
    assert made["kernel"] == pytest.approx(slow * WORK / late, abs=0.04)
    assert made["host_late"] == pytest.approx(idle / late, abs=0.04)
    assert found.cause == ("kernel" if slow * WORK > idle else "host_late")


def test_half_of_each_is_told_as_two_causes_and_never_as_unexplained() -> None:
    found = found_in(replace(FOUR, slow={(2, ""): 1.1}, late={2: 29_000}))
    assert " % of it compute, 4" in found.reason
    assert " % idle (" in found.reason
    assert "its host is late" in found.reason
    assert "it computes 1.10x as long for the same work" in found.reason
    assert shares(found).get("unexplained", 0.0) < 0.01


def test_a_share_below_a_fifth_is_counted_and_not_named() -> None:
    found = found_in(replace(FOUR, slow={(2, ""): 1.3}, late={2: 5_000}))
    assert 0 < shares(found)["host_late"] < 0.1
    assert "idle" not in found.reason


def test_more_work_and_slower_kernels_share_the_longer_compute() -> None:
    """1.2 times the tokens on a GPU that is 1.15 times as slow: 1.38 times as long."""
    found = found_in(replace(FOUR, tokens={2: 1.2}, slow={(2, ""): 1.15}))
    made = shares(found)
    tokens = round(64 * 1.2) / 64
    assert made["more_work"] == pytest.approx((tokens - 1) / 0.38, abs=0.03)
    assert made["kernel"] == pytest.approx(1 - (tokens - 1) / 0.38, abs=0.03)
    assert f"it has {tokens:.2f}x the tokens" in found.reason


def test_a_throttled_gpu_has_the_share_of_compute_and_none_of_idle_time() -> None:
    plan = replace(FOUR, slow={(2, ""): 1.1}, late={2: 20_000})
    hot, cool = found_in(plan, clocks=[HOT]), found_in(plan)
    assert shares(hot)["throttled"] == pytest.approx(0.6, abs=0.04)
    assert "its GPU was throttled (thermal)" in hot.reason
    assert shares(hot)["host_late"] == shares(cool)["host_late"]
    assert shares(hot)["throttled"] == shares(cool)["kernel"]


def test_causes_are_those_of_the_latest_rank_certain_or_not() -> None:
    (balanced,) = stragglers(window(FOUR))
    assert (balanced.causes, balanced.cause) == (None, None)
    (doubted,) = stragglers(window(replace(FOUR, slow={(2, ""): 1.2})), doubt="a rank is missing")
    assert (doubted.straggler, doubted.cause, doubted.latest) == (None, None, "TP2")
    assert shares(doubted)["kernel"] > 0.95


def test_a_real_pair_has_both_of_its_causes(shared_data: Path) -> None:
    """A rank of a real server on CPU computes longer, is idle longer, and leaves gloo late."""
    folder = shared_data / "torch" / "sglang-cpu-tp2dp2"
    table = read_window(sorted(folder.glob("*DP-1.trace.json.gz")))
    (found,) = stragglers(table, min_steps=2)
    late, early = found.ranks
    assert found.latest == late.rank == "DP1 TP0"
    more = late.late_ns - early.late_ns
    computing, idling = (
        (getattr(late, name) - getattr(early, name)) / more for name in ("compute_ns", "idle_ns")
    )
    assert min(computing, idling) > 0.2
    assert shares(found) == pytest.approx(
        {"kernel": computing, "host_late": idling, "unexplained": 1 - computing - idling}, abs=1e-3
    )
