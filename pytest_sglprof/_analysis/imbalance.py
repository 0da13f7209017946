"""How unequal the ranks of a work group are: slowdown, imbalance factor, lost time.

Definitions, units and formulas of every figure stand in docs/metrics.md.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
from msgspec.structs import replace

from pytest_sglprof._analysis.busy import Ints, Mask
from pytest_sglprof._analysis.certainty import Certainty, Interval, certainty
from pytest_sglprof._analysis.groups import steps_per_rank
from pytest_sglprof._analysis.times import GroupCells, measure
from pytest_sglprof._analysis.work import (
    UNKNOWN_WORK,
    Measure,
    StepInputs,
    Work,
    WorkWord,
    compare_work,
)
from pytest_sglprof._figures import Amount, Count, Share

if TYPE_CHECKING:
    from pytest_sglprof._trace.table import KernelTable

__all__ = [
    "ImbalanceFinding",
    "KernelTime",
    "RankFigure",
    "all_findings",
    "group_findings",
    "imbalance",
    "imbalance_of_groups",
    "steps_per_rank",
]

# Below half, the steps no longer speak for the window.
MIN_ASSIGNED_SHARE = 0.5
MIN_MATCHED_SHARE = 0.5
MAX_CONTRIBUTORS = 5


class KernelTime(msgspec.Struct, frozen=True):
    """A kernel or category, and ns of kernel time by which a rank exceeds its peers in it."""

    name: str
    ns: float


class RankFigure(msgspec.Struct, frozen=True):
    """One rank's time in the compared steps.

    total_ns: kernel time, sum of durations, ns. busy_ns: busy time, Σ over the steps of the
    length of the union, ns; of self times their sum. slowest_share: share of the steps with
    any activity of the scope in which this rank alone was busy longest, 0 to 1; None without
    steps.
    """

    rank: str
    total_ns: Count
    busy_ns: Count
    slowest_share: Share | None


class ImbalanceFinding(
    msgspec.Struct,
    frozen=True,
    kw_only=True,
    rename={"work_word": "work"},
):
    """How unequal the ranks of one work group are in one scope.

    scope: "compute", "communication", "all" or a category; kernel: a regular expression
    or an exact name instead ("" for none); stage: "" for all steps together. All but
    `ranks[].total_ns` and the contributors is made of busy time.
    ranks: in the order of the table. slowdown: slowest rank / median of the others.
    factor: λ, max / mean of the ranks' totals. lost_ns: Σ (max − mean) over the steps, ns.
    lost_share: lost_ns / Σ max. Figures are None where `reason` says why.
    slowest: label of the rank with the largest total; None when two share it.
    share_of_compute: Σ total of the scope / the same of compute, same group.
    contributors: the kernels in which the slowest exceeds the median of the others most, largest
    first; category_contributors: the same by category.
    others_ns: median total of the others, ns. group: label of the work group, "" if only
    one. steps: compared steps with activity of the scope (None: the table knows no steps,
    totals are compared). compared_steps: all that are compared. dropped_steps: seen on
    some rank, not on all, or cut by the window's edge. interval, factor_interval,
    lost_share_interval: 95 % of slowdown, factor and lost_share; p_value: of totals as unequal by
    chance (None without steps). factor_sync: λ over sync segments, None where no collectives
    are matched. cv: standard deviation / mean of the ranks' totals. lost_ns_per_step:
    lost_ns / steps. share_of_step: Σ total / Σ busy time of the ranks in these steps.
    work_*: the input of the slowest rank beside that of its peers, as in `Work`, None where it
    is not known. other_input_steps: compared
    steps in which ranks had other input or ran another graph. output_tokens: of the compared
    decode steps; ns_per_token, lost_ns_per_token: Σ max and Σ (max − mean) of those steps /
    output_tokens, ns. None where they are not known.
    """

    group: str
    scope: str
    kernel: str
    stage: str
    slowdown: float | None
    factor: float | None
    lost_ns: Count
    lost_share: Share | None
    slowest: str | None
    others_ns: Amount | None
    share_of_compute: Amount
    interval: Interval | None
    factor_interval: Interval | None
    lost_share_interval: Interval | None
    p_value: Share | None
    factor_sync: float | None
    cv: Amount | None
    lost_ns_per_step: Amount | None
    share_of_step: Amount | None
    work_word: WorkWord | None
    work_ratio: Amount | None
    work_by: Measure | None
    other_input_steps: Count
    output_tokens: Amount | None
    ns_per_token: Amount | None
    lost_ns_per_token: Amount | None
    steps: Count | None
    compared_steps: Count | None
    dropped_steps: Count
    reason: str
    ranks: tuple[RankFigure, ...]
    contributors: tuple[KernelTime, ...]
    category_contributors: tuple[KernelTime, ...]

    @property
    def has_steps(self) -> bool:
        """False where the table knows no steps, so that totals of the window are compared."""
        return self.steps is not None

    @property
    def work(self) -> Work:
        """The input of the slowest rank beside that of its peers."""
        return Work(self.work_word, self.work_ratio, self.work_by)

    @property
    def one_sided(self) -> bool:
        """True when the others' median is 0 while the slowest has activity: no ratio exists."""
        return not self.reason and self.others_ns == 0

    def figure(self, rank: str | None) -> RankFigure | None:
        """The figure of a rank; None when there is none."""
        return next((found for found in self.ranks if found.rank == rank), None)


def imbalance(
    table: KernelTable, *, scope: str = "compute", kernel: str = "", stage: str = ""
) -> ImbalanceFinding:
    """The finding of the worst work group (largest slowdown).

    scope: "compute", "communication", "all" or a category. kernel: regular expression
    over normalised names, searched; stands instead of the scope; all kernels that it
    finds are summed. stage: "decode", "prefill", ... or "" for all steps together.
    A table without ranks gives a finding without figures.
    """
    found = imbalance_of_groups(measure(table), scope=scope, kernel=kernel, stage=stage)
    return worst(found, scope=scope, kernel=kernel, stage=stage)


def imbalance_of_groups(
    groups: Sequence[GroupCells], *, scope: str = "compute", kernel: str = "", stage: str = ""
) -> tuple[ImbalanceFinding, ...]:
    """One finding for each work group, in the order of the table."""
    return tuple(
        _finding(cells, cells.select(scope, kernel), scope, kernel, stage) for cells in groups
    )


def worst(
    findings: Sequence[ImbalanceFinding], *, scope: str, kernel: str, stage: str
) -> ImbalanceFinding:
    """The finding with the largest slowdown, then lost time; an empty one of none."""
    if not findings:
        nothing: dict[str, Any] = dict.fromkeys(ImbalanceFinding.__struct_fields__)
        nothing |= dict.fromkeys(("lost_ns", "other_input_steps", "dropped_steps"), 0)
        nothing |= dict.fromkeys(("ranks", "contributors", "category_contributors"), ())
        nothing |= {"group": "", "share_of_compute": 0.0, "reason": "no rank at all"}
        return ImbalanceFinding(**nothing | {"scope": scope, "kernel": kernel, "stage": stage})

    def badness(found: ImbalanceFinding) -> tuple[float, int]:
        return (math.inf if found.one_sided else found.slowdown or 0.0, found.lost_ns)

    return max(findings, key=badness)


def all_findings(table: KernelTable) -> tuple[ImbalanceFinding, ...]:
    """Compute, communication, every category and every kernel, for each work group.

    Categories and kernels by kernel time, largest first. In a kernel's finding `kernel`
    is its exact normalised name and `scope` its category.
    """
    return tuple(found for cells in measure(table) for found in group_findings(cells))


def group_findings(
    cells: GroupCells, *, max_kernels: int | None = None
) -> tuple[ImbalanceFinding, ...]:
    """`all_findings` of one work group; at most `max_kernels` kernels, the longest first."""
    scopes = dict.fromkeys(("compute", "communication", *cells.categories))
    findings = [_finding(cells, cells.select(scope), scope, "", "") for scope in scopes]
    kernel_ns = cells.kernel_totals(np.ones(len(cells.kernels), bool)).sum(axis=1)
    order = sorted(range(len(cells.kernels)), key=lambda at: (-kernel_ns[at], cells.kernels[at]))
    for at in order[:max_kernels]:
        category, name = cells.kernels[at]
        chosen = np.zeros(len(cells.kernels), bool)
        chosen[at] = True
        findings.append(_finding(cells, chosen, category, name, ""))
    return tuple(findings)


def _finding(
    cells: GroupCells, chosen: Mask, scope: str, kernel: str, stage: str
) -> ImbalanceFinding:
    matrix = cells.matrix(chosen, stage)
    totals = matrix.sum(axis=0)
    live = matrix[(matrix > 0).any(axis=1)]
    reason = _why_no_figures(cells, len(matrix), totals, scope, kernel, stage)
    peak = int(live.max(axis=1).sum()) if live.size else 0
    lost = peak - live.mean(axis=1).sum() if live.size else 0.0
    top, others = _slowest_and_others(totals)
    slowest = None if top is None or reason else cells.group.ranks[top]
    compute = cells.compute_ns(stage)
    steps = len(live) if cells.has_steps else 0
    certain = Certainty() if reason or not steps else certainty(live)
    busy = cells.busy_ns(stage)
    by_kernel: tuple[KernelTime, ...] = ()
    by_category: tuple[KernelTime, ...] = ()
    if slowest is not None and top is not None:
        by_kernel, by_category = _contributors(cells, chosen, stage, top)
    slowdown = float(totals.max() / others) if others and not reason else None
    found = ImbalanceFinding(
        scope=scope,
        kernel=kernel,
        stage=stage,
        ranks=_rank_figures(cells, chosen, stage, totals, live),
        slowdown=slowdown,
        factor=None if reason else float(totals.max() / totals.mean()),
        lost_ns=0 if reason else round(lost),
        lost_share=None if reason else float(lost / peak),
        slowest=slowest,
        share_of_compute=float(totals.sum() / compute) if compute else 0.0,
        contributors=by_kernel,
        category_contributors=by_category,
        others_ns=None if reason else others,
        group=cells.group.label,
        steps=steps if cells.has_steps else None,
        compared_steps=len(matrix) if cells.has_steps else None,
        dropped_steps=cells.steps.dropped,
        reason=reason,
        interval=certain.slowdown,
        factor_interval=certain.factor,
        lost_share_interval=certain.lost_share,
        p_value=certain.p_value,
        factor_sync=None if reason else cells.sync_factor(chosen, stage),
        cv=None if reason else float(totals.std() / totals.mean()),
        lost_ns_per_step=float(lost / steps) if steps and not reason else None,
        share_of_step=float(totals.sum() / busy) if busy and not reason else None,
        work_word=None,
        work_ratio=None,
        work_by=None,
        other_input_steps=0,
        output_tokens=None,
        ns_per_token=None,
        lost_ns_per_token=None,
    )
    if cells.inputs is None or reason:
        return found
    return _with_inputs(
        found, cells, cells.inputs, chosen, matrix, None if slowest is None else top
    )


def _with_inputs(
    found: ImbalanceFinding,
    cells: GroupCells,
    inputs: StepInputs,
    chosen: Mask,
    matrix: Ints,
    top: int | None,
) -> ImbalanceFinding:
    """The finding with what depends on the input of the steps. top: the slowest rank."""
    rows = cells.stage_rows(found.stage)
    work = UNKNOWN_WORK
    if top is not None:
        categories = {cells.kernels[at][0] for at in np.flatnonzero(chosen)}
        attention = categories == {"attention"}
        work = compare_work(inputs, rows, top, found.slowdown, attention=attention)
    decodes = matrix[(np.array(cells.steps.stages, object) == "decode")[rows]]
    tokens = float(inputs.output_tokens[rows].sum())  # NaN where one step does not tell
    found = replace(
        found,
        work_word=work.word,
        work_ratio=work.ratio,
        work_by=work.by,
        other_input_steps=int(inputs.other[rows].sum()),
    )
    if not tokens > 0:
        return found
    peak = float(decodes.max(axis=1).sum())
    return replace(
        found,
        output_tokens=tokens,
        ns_per_token=peak / tokens,
        lost_ns_per_token=(peak - float(decodes.mean(axis=1).sum())) / tokens,
    )


def _why_no_figures(
    cells: GroupCells, rows: int, totals: Ints, scope: str, kernel: str, stage: str
) -> str:
    """The reason for which ranks cannot be compared; "" when they can."""
    ranks = cells.group.ranks
    if len(ranks) == 1:
        return f"{ranks[0]} is the only rank with this input, so it has no peer to compare with"
    silent = [rank for rank in ranks if rank not in cells.active]
    if silent:
        who = "no rank" if len(silent) == len(ranks) else ", ".join(silent)
        return f"{who} recorded {'any' if who == 'no rank' else 'no'} activity"
    if stage and not cells.has_steps:
        return f"the table knows no steps, so none of them is {stage}"
    if rows == 0 and not stage and not cells.steps.dropped:
        return f"no step was recorded on {', '.join(ranks)}"
    if rows == 0:
        kind = f"{stage} step" if stage else "step"
        return f"no {kind} is whole on all of {', '.join(ranks)}"
    matched, seen = cells.steps.matched(stage)
    if cells.has_steps and matched < MIN_MATCHED_SHARE * seen:
        return (
            f"only {matched} of {seen} {f'{stage} ' if stage else ''}steps are on all of "
            f"{', '.join(ranks)} in one stage; below half they do not speak for the window"
        )
    if cells.assigned_share < MIN_ASSIGNED_SHARE:
        return (
            f"only {100 * cells.assigned_share:.0f} % of the compute time belongs to a known step"
        )
    if not totals.any():
        return f"no activity of {f'a kernel like /{kernel}/' if kernel else scope}"
    return ""


def _slowest_and_others(totals: Ints) -> tuple[int | None, float | None]:
    """Index of the only rank with the largest total, and the median of the others."""
    if len(totals) < 2:
        return None, None
    top = int(totals.argmax())
    others = float(np.median(np.delete(totals, top)))
    return (top if (totals == totals[top]).sum() == 1 else None), others


def _rank_figures(
    cells: GroupCells, chosen: Mask, stage: str, totals: Ints, live: Ints
) -> tuple[RankFigure, ...]:
    shares: list[float | None] = [None] * len(totals)
    if cells.has_steps and len(live):
        at_peak = live == live.max(axis=1, keepdims=True)
        alone = at_peak & (at_peak.sum(axis=1, keepdims=True) == 1)
        shares = [float(share) for share in alone.mean(axis=0)]
    kernel_ns = cells.kernel_matrix(chosen, stage).sum(axis=0)
    columns = zip(cells.group.ranks, kernel_ns, totals, shares, strict=True)
    return tuple(
        RankFigure(rank, int(kernel_ns), int(busy), share)
        for rank, kernel_ns, busy, share in columns
    )


def _contributors(
    cells: GroupCells, chosen: Mask, stage: str, top: int
) -> tuple[tuple[KernelTime, ...], tuple[KernelTime, ...]]:
    """By kernel and by category: how much longer the slowest took than the others' median."""
    totals = cells.kernel_totals(chosen, stage)[chosen]
    names = [cells.kernels[at] for at in np.flatnonzero(chosen)]
    by_kernel = _over_others([name for _, name in names], totals, top)
    return by_kernel, _over_others([category for category, _ in names], totals, top)


def _over_others(keys: Sequence[str], totals: Ints, top: int) -> tuple[KernelTime, ...]:
    """totals: shape (keys, ranks); those of equal keys are added up."""
    places = {key: at for at, key in enumerate(dict.fromkeys(keys))}
    sums = np.zeros((len(places), totals.shape[1]), np.int64)
    np.add.at(sums, [places[key] for key in keys], totals)
    over = sums[:, top] - np.median(np.delete(sums, top, axis=1), axis=1)
    ordered = sorted(zip(places, over, strict=True), key=lambda item: (-item[1], item[0]))
    return tuple(KernelTime(key, float(ns)) for key, ns in ordered[:MAX_CONTRIBUTORS] if ns > 0)
