"""Which rank the others wait for, why, and whether that is certain.

The definition, unit and formula of every figure are in docs/metrics.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import msgspec
import numpy as np
import numpy.typing as npt
from msgspec.structs import replace

from pytest_sglprof._analysis.busy import busy_parts
from pytest_sglprof._analysis.certainty import (
    MAX_P,
    Amount,
    Count,
    Interval,
    Share,
    excess_certainty,
)
from pytest_sglprof._analysis.collectives import (
    Method,
    Segments,
    Waits,
    segments,
    sync_factor,
    waits,
)
from pytest_sglprof._analysis.imbalance import KernelTime
from pytest_sglprof._analysis.work import compare_work, step_inputs
from pytest_sglprof._metrics import MIN_STEPS, VerdictWord
from pytest_sglprof._server.nvml import GpuClocks
from pytest_sglprof._trace.categories import NOT_COMPUTE

if TYPE_CHECKING:
    from pytest_sglprof._trace.table import KernelTable

Floats = npt.NDArray[np.float64]
Cause = Literal["kernel", "more_work", "host_late", "throttled", "unexplained"]

DEFAULT_LATENESS = 0.02
CAUSE_SHARE = 0.5  # of the straggler's excess: explaining that much of it counts as its cause
MAX_KERNELS = 10


class RankLateness(msgspec.Struct, frozen=True, kw_only=True):
    """One rank of a sync group, over its matched collectives. Times in ns.

    compute_ns: busy time of compute between the collectives (of the whole window if there are
    none). idle_ns: the rest of the time between them. wait_ns: time it waited for others.
    late_ns: Σ of its arrival after the earliest rank. slowest_share: share of the steps in
    which it alone is the latest. explained_share: share of all waiting in collectives at which
    it arrived last, 0 to 1. total_ns: sum of all its activities in the window, including
    waiting. kernels: those in which it exceeds the median of the others, largest first.
    """

    rank: str
    compute_ns: Count
    idle_ns: Count
    wait_ns: Count
    late_ns: Count
    total_ns: Count
    slowest_share: Share | None
    explained_share: Share
    kernels: tuple[KernelTime, ...]


class StragglerFinding(msgspec.Struct, frozen=True, kw_only=True, rename={"method": "waits_by"}):
    """Who is late in one sync group.

    straggler: its label; None if there is none, or it is not certain. verdict: "fail" if there
    is one, "pass" if there certainly is none. cause: None without a straggler. latest: label of
    the latest rank, certain or not. lateness: the excess of the latest rank / the work: how
    much later it arrives than the median of the others, as a share of compute and transfer;
    interval: 95 % of it; limit: above it a rank is a straggler. p_value: probability of ranks
    this unequal by chance. factor_sync: λ over sync segments. totals_difference: (max - min) /
    max of the ranks' sums of all activities. The rest as in `Waits`.
    """

    group: str
    straggler: str | None
    verdict: VerdictWord
    reason: str
    cause: Cause | None
    latest: str | None
    lateness: float | None
    interval: Interval | None
    p_value: Share | None
    limit: Amount
    factor_sync: float | None
    totals_difference: Share | None
    steps: Count
    collectives: Count
    unmatched: Count
    transfer_ns: float | None
    skew_ns: float | None
    method: Method | None
    clock_offsets_ns: tuple[float, ...] | None
    clock_uncertainty_ns: Amount | None
    ranks: tuple[RankLateness, ...]


def stragglers(
    table: KernelTable,
    waited: Sequence[Waits] | None = None,
    *,
    limit: float = DEFAULT_LATENESS,
    min_steps: int = MIN_STEPS,
    clocks: Sequence[GpuClocks] = (),
    doubt: str | None = None,
) -> tuple[StragglerFinding, ...]:
    """One finding for each sync group of the table, in its order.

    waited: `waits(table)`, if already computed. limit: lateness up to which nobody is a
    straggler. min_steps: number of steps (of collectives, without steps) that a verdict needs.
    clocks: of the ranks' GPUs, if known. doubt: why the window is not whole, which makes every
    verdict inconclusive; None if it is.
    """
    doubt = doubt or ("a trace of this window is truncated" if table.partial else None)
    doubt = doubt or table.incomparable or None
    waited = waits(table) if waited is None else waited
    findings = (_finding(table, each, limit, min_steps, clocks) for each in waited)
    return tuple(_doubted(finding, doubt) if doubt else finding for finding in findings)


def _doubted(finding: StragglerFinding, doubt: str) -> StragglerFinding:
    return replace(finding, straggler=None, cause=None, verdict="inconclusive", reason=doubt)


def _finding(
    table: KernelTable, waited: Waits, limit: float, min_steps: int, clocks: Sequence[GpuClocks]
) -> StragglerFinding:
    parts = segments(table, waited)
    late = _by_step(waited.late_ns[1:], waited.step[1:])
    ranks = _ranks(table, parts, late)
    base = StragglerFinding(
        group=waited.group.label,
        straggler=None,
        verdict="inconclusive",
        reason="",
        cause=None,
        latest=None,
        lateness=None,
        interval=None,
        p_value=None,
        ranks=ranks,
        limit=limit,
        factor_sync=sync_factor(parts.compute),
        totals_difference=_difference([rank.total_ns for rank in ranks]),
        steps=len(np.unique(waited.step[waited.step >= 0])),
        collectives=len(waited.step),
        unmatched=waited.unmatched,
        transfer_ns=float(np.median(waited.transfer)) if len(waited.transfer) else None,
        skew_ns=float(np.median(waited.skew)) if len(waited.skew) else None,
        method=waited.method,
        clock_offsets_ns=waited.offsets,
        clock_uncertainty_ns=waited.uncertainty_ns,
    )
    if waited.reason:
        return replace(base, reason=waited.reason)
    work = float(np.median(parts.compute, axis=1).sum() + waited.transfer[1:].sum())
    if len(late) < 2:
        reason = f"steps with work between collectives: {len(late)}, at least 2 are needed"
        return replace(base, reason=reason)
    if not work:
        return replace(base, reason="no compute was recorded between collectives")
    totals = late.sum(axis=0)
    top = int(totals.argmax())
    excess = _excess(totals, top)
    interval, p_value = excess_certainty(late)
    base = replace(
        base,
        latest=waited.group.ranks[top] if excess > 0 else None,
        lateness=excess / work,
        interval=(interval[0] / work, interval[1] / work),
        p_value=p_value,
    )
    rows = "steps" if base.steps else "collectives"
    if len(late) < min_steps:
        reason = f"{len(late)} {rows} with matched collectives, {min_steps} are needed"
        return replace(base, reason=reason)
    doubt = _doubt_of_durations(base, waited, top, work / len(late))
    return _judged(base, table, parts, doubt, top, excess, clocks)


def _doubt_of_durations(base: StragglerFinding, waited: Waits, top: int, work: float) -> str | None:
    """Why waits by duration do not show who is late; None if they do, or are by arrival.

    A rank that is held up inside a collective ends it late, which looks like waiting.
    work: mean work of a step, ns.
    """
    if base.method != "duration":
        return None
    low, high = base.interval or (0.0, 0.0)
    if (base.lateness or 0.0) <= base.limit:
        return None if max(-low, high) <= base.limit else "no rank is certainly on time"
    if base.ranks[top].explained_share < CAUSE_SHARE:
        return "who arrives last is not known"
    if waited.offsets is None or waited.uncertainty_ns is None:
        return None
    if low * work <= waited.uncertainty_ns:
        return "the lateness in a step is not certainly above their uncertainty"
    begun = waited.start - waited.start.min() - np.array(waited.offsets)
    first = (begun - begun.min(axis=1, keepdims=True)).sum(axis=0)
    if int(first.argmax()) != top:
        return f"by its start {base.ranks[int(first.argmax())].rank} is the latest"
    return None


def _judged(
    base: StragglerFinding,
    table: KernelTable,
    parts: Segments,
    doubt: str | None,
    top: int,
    excess: float,
    clocks: Sequence[GpuClocks],
) -> StragglerFinding:
    """The verdict, once there are enough steps for one. top: index of the latest rank."""
    who, lateness = base.ranks[top].rank, base.lateness or 0.0
    low, high = base.interval or (0.0, 0.0)
    figures = f"{who} arrives {_percent(lateness)} of the work later than the others' median"
    uncertain = f"{figures}, but the clocks are too uncertain to tell: {doubt}"
    if lateness <= base.limit:
        if doubt:
            return replace(base, reason=uncertain)
        reason = f"nobody is late: {figures}, the limit is {_percent(base.limit)}"
        return replace(base, verdict="pass", reason=reason)
    if low <= base.limit or base.p_value is None or base.p_value > MAX_P:
        reason = (
            f"{figures}, which may be chance: 95 % of resampled steps give {_percent(low)} to "
            f"{_percent(high)}, p = {base.p_value or 1.0:.2g}"
        )
        return replace(base, reason=reason)
    if doubt:
        return replace(base, reason=uncertain)
    cause, why = _cause(table, parts, top, excess, clocks)
    share = _percent(base.ranks[top].explained_share)
    reason = f"{figures} and explains {share} of all waiting: {why}"
    return replace(base, straggler=who, verdict="fail", reason=reason, cause=cause)


def _cause(
    table: KernelTable, parts: Segments, top: int, excess: float, clocks: Sequence[GpuClocks]
) -> tuple[Cause, str]:
    """Why the straggler arrived late, as a word and as a phrase. excess: of rank `top`, ns."""
    group = parts.waits.group
    compute = parts.compute.sum(axis=0).astype(np.float64)
    idle = (parts.span.sum(axis=0) - compute).astype(np.float64)
    more_compute, more_idle = _excess(compute, top), _excess(idle, top)
    if more_compute >= CAUSE_SHARE * excess:
        slower = compute[top] / max(float(np.median(np.delete(compute, top))), 1.0)
        numbers = np.unique(parts.waits.step)
        inputs = step_inputs(table.steps, numbers.tolist(), group.ranks)
        calls = np.bincount(parts.rank, minlength=len(group.ranks))
        every = np.ones(len(numbers), bool)
        work = compare_work(inputs, every, top, float(slower), calls=calls)
        if work.word == "more_work":
            figures = f"it has {work.ratio:.2f}x the {work.by} and computes {slower:.2f}x as long"
            return "more_work", figures
        for clock in clocks:
            if clock.rank == group.ranks[top] and clock.throttled:
                return "throttled", f"its GPU was throttled ({clock.reason})"
        kernels = _kernels(table, parts)[top]
        first = f", most of all {kernels[0].name}" if kernels else ""
        of = " for the same work"
        if work.by == "kernel calls":
            of = f" with {work.ratio:.4g}x the kernel calls"
        return "kernel", f"it computes {slower:.2f}x as long{of}{first}"
    if more_idle >= CAUSE_SHARE * excess:
        return (
            "host_late",
            f"it is idle {_percent(more_idle / excess)} of that time: its host is late",
        )
    return "unexplained", "neither its compute nor its idle time explains it"


def _ranks(table: KernelTable, parts: Segments, late: Floats) -> tuple[RankLateness, ...]:
    waited = parts.waits
    frame = table.frame
    every = frame.groupby("rank", observed=True)["dur_ns"].sum()
    compute = parts.compute.sum(axis=0)
    idle = np.maximum(0, parts.span.sum(axis=0) - compute)
    if not len(parts.span):  # without collectives
        compute = _window_compute(table, waited.group.ranks)
    waiting = waited.wait[1:]
    last = waiting.argmin(axis=1) if waiting.size else np.zeros(0, int)
    caused = np.bincount(last, weights=waiting.sum(axis=1), minlength=len(waited.group.ranks))
    at_top = late == late.max(axis=1, keepdims=True, initial=0.0)
    alone = at_top & (at_top.sum(axis=1, keepdims=True) == 1)
    shares: list[float | None] = [None] * len(waited.group.ranks)
    if len(late):
        shares = [float(share) for share in alone.mean(axis=0)]
    kernels = _kernels(table, parts)
    return tuple(
        RankLateness(
            rank=rank,
            compute_ns=int(compute[at]),
            wait_ns=round(waiting[:, at].sum()),
            slowest_share=shares[at],
            explained_share=float(caused[at] / caused.sum()) if caused.sum() else 0.0,
            kernels=kernels[at],
            late_ns=round(late[:, at].sum()),
            idle_ns=int(idle[at]),
            total_ns=int(every.get(rank, 0)),
        )
        for at, rank in enumerate(waited.group.ranks)
    )


def _window_compute(table: KernelTable, ranks: Sequence[str]) -> npt.NDArray[np.int64]:
    """Busy time of compute over the whole window, shape (ranks,), ns."""
    import pandas as pd

    frame = table.frame[~table.frame["category"].isin(NOT_COMPUTE)]
    owner = pd.Index(ranks).get_indexer(pd.Index(frame["rank"].astype(object))).astype(np.int64)
    ns = frame["dur_ns"].to_numpy(np.int64)
    if table.is_timeline:
        ns = busy_parts(owner, frame["start_ns"].to_numpy(np.int64), ns)
    return np.array([ns[owner == at].sum() for at in range(len(ranks))], np.int64)


def _kernels(table: KernelTable, parts: Segments) -> list[tuple[KernelTime, ...]]:
    """For each rank, the kernels in which it exceeds the median of the others."""
    size = len(parts.waits.group.ranks)
    if not len(parts.rows) or size < 2:
        return [()] * size
    chosen = table.frame.iloc[parts.rows]
    names = chosen["name"].astype("category")
    codes = names.cat.codes.to_numpy(np.int64)
    sums = np.zeros((len(names.cat.categories), size), np.int64)
    np.add.at(sums, (codes, parts.rank), chosen["dur_ns"].to_numpy(np.int64))
    per_rank = []
    for at in range(size):
        over = sums[:, at] - np.median(np.delete(sums, at, axis=1), axis=1)
        pairs = sorted(zip(names.cat.categories, over, strict=True), key=lambda p: (-p[1], p[0]))
        longer = [KernelTime(str(n), float(ns)) for n, ns in pairs[:MAX_KERNELS] if ns > 0]
        per_rank.append(tuple(longer))
    return per_rank


def _by_step(values: Floats, step: npt.NDArray[np.int64]) -> Floats:
    """Sums rows by step; returns them unchanged if the steps are not known."""
    if not len(step) or step.min() < 0:
        return values
    numbers, where = np.unique(step, return_inverse=True)
    full = np.zeros((len(numbers), values.shape[1]))
    np.add.at(full, where, values)
    return full


def _excess(values: Floats, top: int) -> float:
    """How far rank `top` is above the median of the others."""
    return float(values[top] - np.median(np.delete(values, top)))


def _difference(totals: Sequence[int]) -> float | None:
    most = max(totals, default=0)
    return (most - min(totals)) / most if most else None


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"
