"""Checks the onset of a load imbalance against the kernels of a window."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from pytest_sglprof._analysis.imbalance import steps_per_rank
from pytest_sglprof._load.onset import Onset
from pytest_sglprof._load.samples import RankLoad
from pytest_sglprof._ranks import Rank
from pytest_sglprof._trace.categories import NOT_COMPUTE

if TYPE_CHECKING:
    from pytest_sglprof._trace.table import KernelTable


@dataclass(frozen=True)
class LoadJoin:
    """Whether the compute of the DP ranks follows their load.

    correlation: Pearson's r over the DP ranks between tokens held at the onset (requests, if
    the source has no tokens) and compute time in the window; None if it does not exist.
    sentence: the answer in words, with its numbers.
    """

    correlation: float | None
    sentence: str


def join_load(onset: Onset, table: KernelTable) -> LoadJoin:
    """Whether ranks with more load at `onset` computed longer in the window `table`.

    Compute of a DP rank is the mean over its ranks of kernel time other than communication
    and memory: per step if every rank has steps, else over the whole window, since a rank
    without work runs no steps.
    """
    if len(onset.ranks) < 2:
        return LoadJoin(None, "only one DP rank: nothing to compare")
    compute, per_step = compute_by_dp(table)
    pairs = [(load, compute.get(_dp(load.rank))) for load in onset.ranks]
    missing = [load.rank for load, ns in pairs if ns is None]
    if missing:
        return LoadJoin(None, f"the trace has no kernels of {', '.join(missing)}")
    weights = [_weight(load) for load, _ in pairs]
    times = [float(ns or 0.0) for _, ns in pairs]
    value = pearson(weights, times)
    if value is None:
        return LoadJoin(None, "no correlation: load or compute is the same on all ranks")
    unit = "a step" if per_step else "in the window"
    top = max(range(len(pairs)), key=lambda at: weights[at])
    others = [ns for at, ns in enumerate(times) if at != top]
    rest = sum(others) / len(others)
    if rest > 0:
        how = f"{times[top] / rest:.2f}x as long {unit} as the others"
    else:
        how = f"{times[top] / 1e6:.0f} ms {unit}, the others nothing"
    confirms = times[top] > rest
    word = "confirms" if confirms else "does not confirm"
    sure = (
        "with two ranks only its sign means anything" if len(pairs) == 2 else f"{len(pairs)} ranks"
    )
    return LoadJoin(
        value,
        f"the trace {word} it: {onset.ranks[top].rank} had most to do and computed {how} "
        f"(r = {value:.2f}, {sure})",
    )


def compute_by_dp(table: KernelTable) -> tuple[dict[int, float], bool]:
    """Maps DP ranks to compute, ns; the flag says per step, else over the whole window.

    Only the NVTX ranges of steps count: the others are the scheduler's loop, which also runs
    while there is no work.
    """
    if table.has_idle_ranges:
        table = replace(table, frame=table.frame[table.frame["step"] >= 0])
    totals: dict[str, float] = dict.fromkeys(table.ranks, 0.0)
    rows = table.by("rank", "category")
    for rank, category, ns in zip(rows["rank"], rows["category"], rows["total_ns"], strict=True):
        if str(category) not in NOT_COMPUTE:
            totals[str(rank)] += float(ns)
    steps = steps_per_rank(table)
    per_step = bool(totals) and all(steps.get(rank, 0) > 0 for rank in totals)
    if per_step:
        totals = {rank: ns / steps[rank] for rank, ns in totals.items()}
    by_dp: dict[int, list[float]] = {}
    for rank, ns in totals.items():
        if Rank.parse(rank) is not None:  # otherwise a process whose rank is unknown
            by_dp.setdefault(_dp(rank), []).append(ns)
    return {dp: sum(times) / len(times) for dp, times in by_dp.items()}, per_step


def pearson(left: Sequence[float], right: Sequence[float]) -> float | None:
    """Pearson's correlation of two series; None if either does not vary."""
    mean_left, mean_right = sum(left) / len(left), sum(right) / len(right)
    pairs = [(x - mean_left, y - mean_right) for x, y in zip(left, right, strict=True)]
    spread = math.sqrt(sum(x * x for x, _ in pairs) * sum(y * y for _, y in pairs))
    return sum(x * y for x, y in pairs) / spread if spread > 0 else None


def _weight(load: RankLoad) -> float:
    return load.running if not load.tokens else float(load.tokens)


def _dp(label: str) -> int:
    rank = Rank.parse(label)
    return (rank.dp or 0) if rank is not None else 0
