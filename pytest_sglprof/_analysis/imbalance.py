"""How unequal the ranks of a work group are: slowdown, imbalance factor, lost time.

The definition, unit and formula of every figure are in docs/metrics.md.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
from msgspec.structs import replace

from pytest_sglprof._analysis.busy import Ints, Mask
from pytest_sglprof._analysis.certainty import Amount, Certainty, Count, Interval, Share, certainty
from pytest_sglprof._analysis.groups import steps_per_rank
from pytest_sglprof._analysis.times import GroupCells, sum_times
from pytest_sglprof._analysis.work import (
    UNKNOWN_WORK,
    InputUnit,
    StepInputs,
    Work,
    WorkWord,
    compare_work,
)

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

# With less than half of the work or steps, the figures would not represent the window.
MIN_ASSIGNED_SHARE = 0.5
MIN_MATCHED_SHARE = 0.5
MAX_CONTRIBUTORS = 5


class KernelTime(msgspec.Struct, frozen=True):
    """A kernel or category, and by how much kernel time (ns) a rank exceeds its peers in it."""

    name: str
    ns: float


class RankFigure(msgspec.Struct, frozen=True):
    """One rank's time in the compared steps.

    total_ns: kernel time, the sum of durations, ns. busy_ns: busy time, the length of the
    union summed over the steps, ns; for self times their sum. slowest_share: among the steps
    with activity of the scope, the share in which this rank alone was busy longest, 0 to 1;
    None without steps.
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
    or an exact name instead ("" for none); stage: "" for all steps together. Times are busy
    time, except `ranks[].total_ns` and the contributors, which are kernel time.

    ranks: in the order of the table. slowest: label of the rank with the largest total; None
    if two share it. others_ns: median total of the others, ns.
    slowdown: largest total / others_ns. factor: λ, max / mean of the ranks' totals.
    lost_ns: Σ (max − mean) over the steps, ns. lost_share: lost_ns / Σ max. interval,
    factor_interval, lost_share_interval: 95 % of slowdown, factor and lost_share. p_value:
    probability of totals this unequal by chance; None without steps. reason: why figures are
    None, "" if they are not.
    factor_sync: λ over sync segments; None if no collectives are matched. cv: standard
    deviation / mean of the ranks' totals. lost_ns_per_step: lost_ns / steps.
    share_of_compute: Σ total of the scope / Σ total of compute in the same group.
    share_of_step: Σ total of the scope / Σ busy time of the ranks in the same steps.
    contributors: the kernels in which the slowest rank exceeds the median of the others most,
    largest first; category_contributors: the same by category.
    group: label of the work group, "" if there is only one. steps: number of compared steps
    with activity of the scope; None if the table has no steps, so that totals of the window
    are compared. compared_steps: number of all compared steps. dropped_steps: number of steps
    not compared, since some rank lacks them, has only a part or marks them as unlike its peers.
    work_*: input of the slowest rank beside that of its peers, as in `Work`; None if not
    known. other_input_steps: compared steps in which ranks differ in input or graph.
    output_tokens: tokens of the compared decode steps; ns_per_token, lost_ns_per_token: Σ max
    and Σ (max − mean) of those steps / output_tokens, ns. None if not known.
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
    work_by: InputUnit | None
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
        """False if the table has no steps, so that totals of the window are compared."""
        return self.steps is not None

    @property
    def work(self) -> Work:
        """The input of the slowest rank beside that of its peers."""
        return Work(self.work_word, self.work_ratio, self.work_by)

    @property
    def one_sided(self) -> bool:
        """True if only the slowest rank has activity, so the others' median is 0: no ratio."""
        return not self.reason and self.others_ns == 0

    def figure(self, rank: str | None) -> RankFigure | None:
        """The figures of one rank; None if it is not in the group."""
        return next((each for each in self.ranks if each.rank == rank), None)


def imbalance(
    table: KernelTable, *, scope: str = "compute", kernel: str = "", stage: str = ""
) -> ImbalanceFinding:
    """The finding of the work group with the largest slowdown.

    scope: "compute", "communication", "all" or a category. kernel: a regular expression
    searched in normalised names, used instead of the scope; all kernels that match are
    summed. stage: "decode", "prefill", ... or "" for all steps together.
    A table without ranks gives a finding without figures.
    """
    findings = imbalance_of_groups(sum_times(table), scope=scope, kernel=kernel, stage=stage)
    return worst_finding(findings, scope=scope, kernel=kernel, stage=stage)


def imbalance_of_groups(
    groups: Sequence[GroupCells], *, scope: str = "compute", kernel: str = "", stage: str = ""
) -> tuple[ImbalanceFinding, ...]:
    """One finding for each work group, in the order of the table."""
    return tuple(
        _finding(cells, cells.select(scope, kernel), scope, kernel, stage) for cells in groups
    )


def worst_finding(
    findings: Sequence[ImbalanceFinding], *, scope: str, kernel: str, stage: str
) -> ImbalanceFinding:
    """The finding with the largest slowdown, then lost time; an empty one if there are none."""
    if not findings:
        nothing: dict[str, Any] = dict.fromkeys(ImbalanceFinding.__struct_fields__)
        nothing |= dict.fromkeys(("lost_ns", "other_input_steps", "dropped_steps"), 0)
        nothing |= dict.fromkeys(("ranks", "contributors", "category_contributors"), ())
        nothing |= {"group": "", "share_of_compute": 0.0, "reason": "no rank at all"}
        return ImbalanceFinding(**nothing | {"scope": scope, "kernel": kernel, "stage": stage})

    def badness(finding: ImbalanceFinding) -> tuple[float, int]:
        return (math.inf if finding.one_sided else finding.slowdown or 0.0, finding.lost_ns)

    return max(findings, key=badness)


def all_findings(table: KernelTable) -> tuple[ImbalanceFinding, ...]:
    """Findings for compute, communication, every category and every kernel of each work group.

    Categories and kernels with the largest kernel time come first. In a kernel's finding
    `kernel` is its exact normalised name and `scope` its category.
    """
    return tuple(finding for cells in sum_times(table) for finding in group_findings(cells))


def group_findings(
    cells: GroupCells, *, max_kernels: int | None = None
) -> tuple[ImbalanceFinding, ...]:
    """`all_findings` of one work group, with at most `max_kernels` kernels, longest first."""
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
    finding = ImbalanceFinding(
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
        return finding
    return _with_inputs(
        finding, cells, cells.inputs, chosen, matrix, None if slowest is None else top
    )


def _with_inputs(
    finding: ImbalanceFinding,
    cells: GroupCells,
    inputs: StepInputs,
    chosen: Mask,
    matrix: Ints,
    top: int | None,
) -> ImbalanceFinding:
    """Adds the figures that depend on the input of the steps.

    top: index of the slowest rank; None if two share the largest total.
    """
    rows = cells.stage_rows(finding.stage)
    work = UNKNOWN_WORK
    if top is not None:
        categories = {cells.kernels[at][0] for at in np.flatnonzero(chosen)}
        attention = categories == {"attention"}
        calls = cells.calls(chosen, finding.stage)
        work = compare_work(inputs, rows, top, finding.slowdown, calls=calls, attention=attention)
    decodes = matrix[(np.array(cells.steps.stages, object) == "decode")[rows]]
    tokens = float(inputs.output_tokens[rows].sum())  # NaN if unknown for one step
    finding = replace(
        finding,
        work_word=work.word,
        work_ratio=work.ratio,
        work_by=work.by,
        other_input_steps=int(inputs.other[rows].sum()),
    )
    if not tokens > 0:
        return finding
    peak = float(decodes.max(axis=1).sum())
    return replace(
        finding,
        output_tokens=tokens,
        ns_per_token=peak / tokens,
        lost_ns_per_token=(peak - float(decodes.mean(axis=1).sum())) / tokens,
    )


def _why_no_figures(
    cells: GroupCells, rows: int, totals: Ints, scope: str, kernel: str, stage: str
) -> str:
    """Why the ranks cannot be compared; "" if they can."""
    ranks = cells.group.ranks
    if len(ranks) == 1:
        return f"{ranks[0]} is the only rank with this input, so it has no peer to compare with"
    silent = [rank for rank in ranks if rank not in cells.active]
    if silent:
        who = "no rank" if len(silent) == len(ranks) else ", ".join(silent)
        return f"{who} recorded {'any' if who == 'no rank' else 'no'} activity"
    if stage and not cells.has_steps:
        return f"the table has no steps, so {stage} steps cannot be selected"
    if rows == 0 and not stage and not cells.steps.dropped:
        return f"no step was recorded on {', '.join(ranks)}"
    if rows == 0:
        kind = f"{stage} step" if stage else "step"
        return f"no {kind} is whole on all of {', '.join(ranks)}"
    matched, seen = cells.steps.matched(stage)
    if cells.has_steps and matched < MIN_MATCHED_SHARE * seen:
        return (
            f"only {matched} of {seen} {f'{stage} ' if stage else ''}steps are on all of "
            f"{', '.join(ranks)} in the same stage; at least half are required"
        )
    if cells.assigned_share < MIN_ASSIGNED_SHARE:
        return (
            f"only {100 * cells.assigned_share:.0f} % of the compute time belongs to a known step"
        )
    if not totals.any():
        return f"no activity of {f'a kernel like /{kernel}/' if kernel else scope}"
    return ""


def _slowest_and_others(totals: Ints) -> tuple[int | None, float | None]:
    """Index of the rank with the largest total (None if shared), and the median of the others."""
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
    """Extra time of the slowest rank over the others' median, by kernel and by category."""
    totals = cells.kernel_totals(chosen, stage)[chosen]
    names = [cells.kernels[at] for at in np.flatnonzero(chosen)]
    by_kernel = _over_others([name for _, name in names], totals, top)
    return by_kernel, _over_others([category for category, _ in names], totals, top)


def _over_others(keys: Sequence[str], totals: Ints, top: int) -> tuple[KernelTime, ...]:
    """Extra time of rank `top` by key, largest first.

    totals: shape (keys, ranks), ns; rows with equal keys are summed.
    """
    places = {key: at for at, key in enumerate(dict.fromkeys(keys))}
    sums = np.zeros((len(places), totals.shape[1]), np.int64)
    np.add.at(sums, [places[key] for key in keys], totals)
    over = sums[:, top] - np.median(np.delete(sums, top, axis=1), axis=1)
    ordered = sorted(zip(places, over, strict=True), key=lambda item: (-item[1], item[0]))
    return tuple(KernelTime(key, float(ns)) for key, ns in ordered[:MAX_CONTRIBUTORS] if ns > 0)
