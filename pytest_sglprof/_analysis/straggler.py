"""Which rank the others wait for, why, and whether that is certain.

The definition, unit and formula of every figure are in docs/metrics.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import msgspec
import numpy as np
import numpy.typing as npt
from msgspec.structs import replace

from pytest_sglprof._analysis.busy import busy_parts
from pytest_sglprof._analysis.causes import Cause, CauseShare, causes_of, over_others
from pytest_sglprof._analysis.certainty import (
    MIN_EFFECTIVE,
    Amount,
    Count,
    Interval,
    Share,
    mean_excess,
    median_of_others,
)
from pytest_sglprof._analysis.clocks import TIMES_UNCERTAINTY
from pytest_sglprof._analysis.collectives import (
    Method,
    Segments,
    Waits,
    segments,
    sync_factor,
    waits,
)
from pytest_sglprof._analysis.imbalance import KernelTime
from pytest_sglprof._metrics import MIN_STEPS, PASS_MARGIN, VerdictWord
from pytest_sglprof._server.nvml import GpuClocks
from pytest_sglprof._trace.categories import NOT_COMPUTE

if TYPE_CHECKING:
    from pytest_sglprof._trace.table import KernelTable

Floats = npt.NDArray[np.float64]

DEFAULT_LATENESS = 0.02
CAUSE_SHARE = 0.5  # of all waiting: a straggler that durations show must explain as much
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


class RankClock(msgspec.Struct, frozen=True, kw_only=True):
    """How far the clock of a rank is ahead of the median, with intervals (99 %, of all ranks).

    offset_ns: in the middle of the window. drift_ppm: how much faster it runs, None where the
    ends of collectives do not tell: ranks of one host then share its clock.
    """

    rank: str
    offset_ns: float | None
    offset_interval: Interval | None
    drift_ppm: float | None
    drift_interval: Interval | None


class StragglerFinding(msgspec.Struct, frozen=True, kw_only=True, rename={"method": "waits_by"}):
    """Who is late in one sync group.

    straggler: its label; None if there is none, or it is not certain. verdict: "fail" if there
    is one, "pass" if there certainly is none. cause: None without a straggler. latest: label of
    the latest rank, certain or not. causes: what makes its lateness, largest first; None unless
    that is above the limit. lateness: the excess of the latest rank / the work: how
    much later it arrives than the median of the others, as a share of compute and transfer;
    interval: what it may be (`Estimate.interval`); limit: above it a rank is a straggler.
    p_value: probability of a rank this late by chance. factor_sync: λ over sync segments.
    totals_difference: (max - min) / max of the ranks' sums of all activities. The rest as in
    `Waits`. kinds: number of calls of each kind of communication. clocks, clock_margin_ns: those
    of the ranks, and how exactly they are known at any time of the window. overlapped: share of
    the time in collectives in which their ranks compute on other streams.
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
    causes: tuple[CauseShare, ...] | None = None
    kinds: dict[str, Count] | None = None
    clocks: tuple[RankClock, ...] | None = None
    clock_margin_ns: Amount | None = None
    overlapped: Share | None = None


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
    base = _unjudged(table, parts, late, limit)
    if waited.reason:
        return replace(base, reason=waited.reason)
    work = float(np.median(parts.compute, axis=1).sum() + np.nansum(waited.transfer[1:]))
    if len(late) < 2:
        reason = f"steps with work between collectives: {len(late)}, at least 2 are needed"
        return replace(base, reason=reason)
    if not work:
        return replace(base, reason="no compute was recorded between collectives")
    totals = late.sum(axis=0)
    top = int(totals.argmax())
    excess = over_others(totals, top)
    estimate = mean_excess(late)
    ends = estimate.interval
    base = replace(
        base,
        latest=waited.group.ranks[top] if excess > 0 else None,
        lateness=excess / work,
        interval=None if ends is None else tuple(len(late) * end / work for end in ends),
        p_value=estimate.chance(0.0),
    )
    why = ""
    if excess / work > limit:
        kernels = base.ranks[top].kernels
        causes, why = causes_of(table, parts, top, excess, kernels, clocks)
        base = replace(base, causes=causes)
    rows = "steps" if base.steps else "collectives"
    if len(late) < min_steps:
        reason = f"{len(late)} {rows} with matched collectives, {min_steps} are needed"
        return replace(base, reason=reason)
    if ends is None:
        reason = (
            f"{len(late)} {rows} resemble each other so much that they are worth "
            f"{estimate.effective:.1f} independent ones; {MIN_EFFECTIVE:g} are needed"
        )
        return replace(base, reason=reason)
    doubt = _doubt_of_durations(base, waited, top, work / len(late))
    doubt = doubt or _doubt_of_clocks(base, waited, work)
    return _judged(base, doubt, top, why)


def _unjudged(table: KernelTable, parts: Segments, late: Floats, limit: float) -> StragglerFinding:
    """The figures that need no decision on who is late."""
    waited, fit = parts.waits, parts.waits.clocks
    ranks = _ranks(table, parts, late)
    transfer = waited.transfer[~np.isnan(waited.transfer)]
    return StragglerFinding(
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
        kinds=waited.kinds,
        overlapped=waited.overlapped if len(waited.step) else None,
        transfer_ns=float(np.median(transfer)) if len(transfer) else None,
        skew_ns=float(np.median(waited.skew)) if len(waited.skew) else None,
        method=waited.method,
        clock_offsets_ns=None if fit is None else tuple(fit.at_middle.tolist()),
        clock_uncertainty_ns=None if fit is None else fit.uncertainty_ns,
        clock_margin_ns=None if fit is None else fit.reach_ns,
        clocks=_rank_clocks(waited),
    )


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
    if waited.clocks is None:
        return None
    if low * work <= waited.clocks.uncertainty_ns:
        return "the lateness in a step is not certainly above their uncertainty"
    begun = waited.start - waited.start.min() - waited.clocks.at_middle
    first = (begun - begun.min(axis=1, keepdims=True)).sum(axis=0)
    if int(first.argmax()) != top:
        return f"by its start {base.ranks[int(first.argmax())].rank} is the latest"
    return None


def _doubt_of_clocks(base: StragglerFinding, waited: Waits, work: float) -> str | None:
    """Why clocks are too uncertain to show who is late; None if they are not. work: ns.

    Waits below three times their uncertainty count as 0, at each collective.
    """
    if base.method != "arrival" or waited.clocks is None:
        return None
    lost = TIMES_UNCERTAINTY * waited.clocks.reach_ns * len(waited.step[1:]) / work
    low, _ = base.interval or (0.0, 0.0)
    if lost <= base.limit or low > lost:
        return None
    return f"what they may hide is {_percent(lost)} of the work"


def _rank_clocks(waited: Waits) -> tuple[RankClock, ...] | None:
    fit = waited.clocks
    if fit is None:
        return None
    return tuple(
        RankClock(
            rank=rank,
            offset_ns=float(offset),
            offset_interval=(float(offset - margin), float(offset + margin)),
            drift_ppm=float(drift) if fit.is_measured else None,
            drift_interval=(float(drift - more), float(drift + more)) if fit.is_measured else None,
        )
        for rank, offset, margin, drift, more in zip(
            waited.group.ranks, fit.at_middle, fit.margin, fit.drift, fit.drift_margin, strict=True
        )
    )


def _judged(base: StragglerFinding, doubt: str | None, top: int, why: str) -> StragglerFinding:
    """The verdict, once there are enough steps for one.

    top: index of the latest rank. why: what makes its lateness.
    """
    who, lateness = base.ranks[top].rank, base.lateness or 0.0
    low, high = base.interval or (0.0, 0.0)
    figures = f"{who} arrives {_percent(lateness)} of the work later than the others' median"
    uncertain = f"{figures}, but the clocks are too uncertain to tell: {doubt}"
    may_be = f"it may be {_percent(low)} to {_percent(high)}"
    if lateness <= base.limit:
        if doubt:
            return replace(base, reason=uncertain)
        bound = PASS_MARGIN * base.limit
        if high >= bound:
            reason = f"{figures}; a pass is surely below {_percent(bound)}: {may_be}"
            return replace(base, reason=reason)
        reason = f"nobody is late: {figures}, the limit is {_percent(base.limit)}"
        return replace(base, verdict="pass", reason=reason)
    if low <= base.limit:
        return replace(base, reason=f"{figures}, which may be chance: {may_be}")
    if doubt:
        return replace(base, reason=uncertain)
    cause = base.causes[0].cause if base.causes else None
    share = _percent(base.ranks[top].explained_share)
    reason = f"{figures} and explains {share} of all waiting: {why}"
    return replace(base, straggler=who, verdict="fail", reason=reason, cause=cause)


def _ranks(table: KernelTable, parts: Segments, late: Floats) -> tuple[RankLateness, ...]:
    waited = parts.waits
    dur = table.frame["dur_ns"].to_numpy(np.int64)
    compute = parts.compute.sum(axis=0)
    idle = np.maximum(0, parts.span.sum(axis=0) - compute)
    if not len(parts.span):  # without collectives
        compute = _window_compute(table, waited.group.ranks)
    waiting = waited.wait[1:]
    last = waited.late_ns[1:].argmax(axis=1) if waiting.size else np.zeros(0, int)
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
            total_ns=int(dur[table.places[rank]].sum()),
        )
        for at, rank in enumerate(waited.group.ranks)
    )


def _window_compute(table: KernelTable, ranks: Sequence[str]) -> npt.NDArray[np.int64]:
    """Busy time of compute over the whole window, shape (ranks,), ns."""
    sums = []
    for rank in ranks:
        rows = table.frame.iloc[table.places[rank]]
        rows = rows[~rows["category"].isin(NOT_COMPUTE)]
        ns = rows["dur_ns"].to_numpy(np.int64)
        if table.is_timeline:
            ns = busy_parts(0 * ns, rows["start_ns"].to_numpy(np.int64), ns)
        sums.append(int(ns.sum()))
    return np.array(sums, np.int64)


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
    for over in (sums - median_of_others(sums)).T:
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


def _difference(totals: Sequence[int]) -> float | None:
    most = max(totals, default=0)
    return (most - min(totals)) / most if most else None


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"
