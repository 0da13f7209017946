"""How unequal the ranks of a work group are: slowdown, imbalance factor, lost time.

The definition, unit and formula of every figure are in docs/metrics.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import msgspec
import numpy as np
from msgspec.structs import replace

from pytest_sglprof._analysis.busy import Ints, Mask
from pytest_sglprof._analysis.certainty import (
    Amount,
    Count,
    Estimate,
    Floats,
    Interval,
    Share,
    lost_share,
    noise_share,
    ratio_of_sums,
    share_of_mean,
    spike_shares,
    spikes,
    typical_ratio,
)
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

    ranks: in the order of the table. slowest: label of the rank with the largest slowdown; None
    if two share it. others_ns: median total of the others, ns. slowdown: how many times as long
    as the median of its peers it takes in a typical step (`typical_ratio`); without steps, its
    total / others_ns. factor: λ, max / mean of the ranks' totals.
    lost_ns: Σ (max − mean) over the steps, ns. lost_share: lost_ns / Σ max. noise_share: how much
    of lost_share noise alone makes. spike_share: share of Σ max that spike_rank loses in its
    spikes; spike_steps: in how many steps it has one, spike_steps_of_all: in how many any has.
    interval, factor_interval, spike_interval, lost_share_interval: what slowdown, factor,
    spike_share and lost_share − noise_share may be (`Estimate.interval`). p_value: probability of
    a rank this much slower by chance; None without steps. reason: why figures are None, "" if
    they are not.
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
    across: "sync" if ranks with different input are compared (`passes`); then slowdown is that of
    the kernels and passes with equal shapes, and sync_lost_share the share of the wall time of all
    ranks that they lose by waiting for each other, in collectives or idle, and by padding;
    slower_in: categories in which the slowest rank is surely slower.
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
    noise_share: Share | None = None
    spike_share: Share | None = None
    spike_interval: Interval | None = None
    spike_rank: str | None = None
    spike_steps: Count | None = None
    spike_steps_of_all: Count | None = None
    across: Literal["peers", "sync"] = "peers"
    sync_lost_share: Share | None = None
    sync_lost_interval: Interval | None = None
    slower_in: tuple[str, ...] | None = None

    @property
    def has_steps(self) -> bool:
        """False if the table has no steps, so that totals of the window are compared."""
        return self.steps is not None

    @property
    def work(self) -> Work:
        """The input of the slowest rank beside that of its peers."""
        return Work(self.work_word, self.work_ratio, self.work_by)

    @property
    def judged_lost_share(self) -> float | None:
        """The lost share beyond what noise alone makes, 0 to 1."""
        if self.lost_share is None:
            return None
        return max(0.0, self.lost_share - (self.noise_share or 0.0))

    @property
    def one_sided(self) -> bool:
        """True if only the slowest rank has activity, so the others' median is 0: no ratio."""
        return not self.reason and self.others_ns == 0

    def figure(self, rank: str | None) -> RankFigure | None:
        """The figures of one rank; None if it is not in the group."""
        return next((each for each in self.ranks if each.rank == rank), None)


def lost_of_wall(times: Floats) -> Estimate | None:
    """Σ lost / Σ wall. times: those two of each step, shape (steps, 2)."""
    return ratio_of_sums(times[:, :1], times[:, 1], are_inverse=False)


# How figures are estimated, from the times of each step and rank (`Metric.estimate`).
ESTIMATES: Mapping[str, Callable[[Floats], Estimate | None]] = {
    function.__name__: function
    for function in (typical_ratio, share_of_mean, lost_share, spike_shares, lost_of_wall)
}


def estimate(
    cells: GroupCells, kind: str, *, scope: str = "compute", kernel: str = "", stage: str = ""
) -> Estimate | None:
    """One of `ESTIMATES` in one work group; None without steps, or without a figure."""
    if not cells.has_steps:
        return None
    live = _live(cells.matrix(cells.select(scope, kernel), stage)).astype(np.float64)
    return _estimate(cells, kind, live, stage) if live.size and live.shape[1] > 1 else None


def _estimate(cells: GroupCells, kind: str, times: Floats, stage: str) -> Estimate | None:
    """times: of the steps in which some rank has activity, shape (steps, ranks)."""
    if ESTIMATES[kind] is not lost_of_wall:
        return ESTIMATES[kind](times)
    return None if cells.lost is None else lost_of_wall(cells.lost[cells.stage_rows(stage)])


def _live(matrix: Ints) -> Ints:
    """The steps in which some rank has activity."""
    live: Ints = matrix[(matrix > 0).any(axis=1)]
    return live


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
        nothing |= {"across": "peers"}
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
    live = _live(matrix)
    reason = _why_no_figures(cells, len(matrix), totals, scope, kernel, stage)
    met = live if cells.is_paired else live[:0]  # in which one rank may be the last
    peak = int(met.max(axis=1).sum()) if met.size else 0
    lost = peak - met.mean(axis=1).sum() if met.size else 0.0
    times = live.astype(np.float64)
    estimates: dict[str, Estimate | None] = dict.fromkeys(ESTIMATES)
    if cells.has_steps and not reason:
        kinds = ESTIMATES if cells.is_paired else ("typical_ratio",)
        estimates |= {kind: _estimate(cells, kind, times, stage) for kind in kinds}
    typical, waited = estimates["typical_ratio"], estimates["lost_of_wall"]
    top, others = _slowest_and_others(totals, typical)
    slowest = None if top is None or reason else cells.group.ranks[top]
    compute = cells.compute_ns(stage)
    steps = len(live) if cells.has_steps else 0
    busy = cells.busy_ns(stage)
    by_kernel: tuple[KernelTime, ...] = ()
    by_category: tuple[KernelTime, ...] = ()
    if slowest is not None and top is not None:
        by_kernel, by_category = _contributors(cells, chosen, stage, top)
    slowdown = float(totals.max() / others) if others and not reason else None
    if typical is not None and slowdown is not None:
        slowdown = typical.value
    finding = ImbalanceFinding(
        scope=scope,
        kernel=kernel,
        stage=stage,
        ranks=_rank_figures(cells, chosen, stage, totals, met),
        slowdown=slowdown,
        factor=None if reason else float(totals.max() / totals.mean()),
        lost_ns=0 if reason else round(lost),
        lost_share=None if reason or not cells.is_paired else float(lost / peak),
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
        interval=_interval(typical),
        factor_interval=_interval(estimates["share_of_mean"]),
        lost_share_interval=_interval(estimates["lost_share"]),
        p_value=typical.chance(1.0) if typical is not None else None,
        factor_sync=None if reason else cells.sync_factor(chosen, stage),
        cv=None if reason else float(totals.std() / totals.mean()),
        lost_ns_per_step=float(lost / steps) if steps and cells.is_paired and not reason else None,
        share_of_step=float(totals.sum() / busy) if busy and not reason else None,
        work_word=None,
        work_ratio=None,
        work_by=None,
        other_input_steps=0,
        output_tokens=None,
        ns_per_token=None,
        lost_ns_per_token=None,
        across=cells.across,
        sync_lost_share=None if waited is None else max(0.0, min(1.0, waited.value)),
        sync_lost_interval=_interval(waited),
        slower_in=_slower_in(cells, chosen, stage, None if slowest is None else top),
    )
    if estimates["spike_shares"] is not None:
        finding = _with_spikes(finding, cells.group.ranks, times, estimates["spike_shares"])
    if cells.inputs is None or reason:
        return finding
    return _with_inputs(
        finding, cells, cells.inputs, chosen, matrix, None if slowest is None else top
    )


SLOWER = 1.01  # a rank is slower in a category if it surely takes so many times as long there


def slower_ranks(cells: GroupCells, stage: str = "") -> dict[str, Mask]:
    """Of each category which ranks are surely slower than the others, shape (ranks,)."""
    slower = {}
    for category in cells.categories:
        times = _live(cells.matrix(cells.select(category), stage)).astype(np.float64)
        estimate = typical_ratio(times)
        if estimate is not None:
            slower[category] = np.array(estimate.lows()) > SLOWER
    return slower


def _slower_in(
    cells: GroupCells, chosen: Mask, stage: str, rank: int | None
) -> tuple[str, ...] | None:
    """The categories of the chosen kernels in which a rank is surely slower."""
    if cells.across != "sync" or rank is None:
        return None
    of = {cells.kernels[at][0] for at in np.flatnonzero(chosen)}
    slower = slower_ranks(cells, stage).items()
    return tuple(category for category, ranks in slower if category in of and ranks[rank])


def _interval(estimate: Estimate | None) -> Interval | None:
    return None if estimate is None else estimate.interval


def _with_spikes(
    finding: ImbalanceFinding, ranks: Sequence[str], times: Floats, share: Estimate
) -> ImbalanceFinding:
    """Adds the figures of spikes, and of the noise without them."""
    spiked = spikes(times) > 0
    return replace(
        finding,
        noise_share=min(noise_share(times), finding.lost_share or 0.0),
        spike_share=min(share.value, 1.0),
        spike_interval=share.interval,
        spike_rank=None if share.top is None else ranks[share.top],
        spike_steps=0 if share.top is None else int(spiked[:, share.top].sum()),
        spike_steps_of_all=int(spiked.any(axis=1).sum()),
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
    if cells.doubt:
        return cells.doubt
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


def _slowest_and_others(totals: Ints, typical: Estimate | None) -> tuple[int | None, float | None]:
    """Index of the slowest rank (None if two are), and the median total of the others."""
    if len(totals) < 2:
        return None, None
    heaviest = int(totals.argmax())
    alone = heaviest if (totals == totals[heaviest]).sum() == 1 else None
    top = alone if typical is None else typical.top
    others = float(np.median(np.delete(totals, heaviest if top is None else top)))
    return top, others


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
