"""What the wall time of a step is made of: compute, communication, copies, and an idle GPU.

The commonest regression is host-bound: the kernels are equal and the step takes longer. The wall
of a step lasts from its first activity on the GPU to that of the rank's next step; every
nanosecond of it is in exactly one part. The formula of every figure is in docs/metrics.md.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import msgspec
import numpy as np

from pytest_sglprof._analysis.busy import Ints, Mask
from pytest_sglprof._analysis.certainty import (
    Amount,
    Count,
    Estimate,
    Floats,
    Interval,
    Share,
    mean_of,
    ratio_of_sums,
    side_by_side,
)
from pytest_sglprof._analysis.collectives import Waits, waits
from pytest_sglprof._analysis.groups import step_spans
from pytest_sglprof._trace.categories import NOT_COMPUTE
from pytest_sglprof._trace.table import NO_STEP

if TYPE_CHECKING:
    import pandas as pd

    from pytest_sglprof._trace.table import KernelTable

NO_TIMELINE = (
    "activities are {source}, which are no intervals on a GPU: whether it was idle is not known"
)
SOURCES = {"cpu_op": "CPU operators", "nvtx": "NVTX ranges"}
MS = 1e6  # ns

# The parts of a wall. An instant is in the first that it can be in; the last two are what is left.
COMPUTE, TRANSFER, WAITING, UNSPLIT, COPIES, LAUNCHING, BETWEEN = range(7)
_PARTS = 7


class RankBudget(msgspec.Struct, frozen=True, kw_only=True):
    """The parts of a rank's walls, summed over its steps of one kind, ns.

    wall_ns = compute_ns + communication_ns + copies_ns + idle_ns, exactly. compute_ns: busy time
    of compute; kernels that wait for a collective of their own stream do not compute.
    communication_ns, copies_ns: what of these no compute covers (copies: no communication
    either). transfer_ns: of the communication what comes after the last rank has arrived;
    waiting_ns: what comes before; the rest is of calls that could not be matched. Both None
    where none could. idle_ns: nothing is on the GPU: within a step (launching_ns) or between two
    (between_ns, of which longest_between_ns is the longest); None without steps.

    steps: their number, None without steps. median_wall_ns: of one step. accepted: tokens that a
    request accepted in these steps, all together; ns_per_accepted: wall_ns / accepted. Both
    None without speculative decoding, and where it is not known of each step.
    """

    rank: str
    steps: Count | None
    wall_ns: Count
    compute_ns: Count
    communication_ns: Count
    transfer_ns: Count | None
    waiting_ns: Count | None
    copies_ns: Count
    idle_ns: Count
    launching_ns: Count | None
    between_ns: Count | None
    longest_between_ns: Count | None
    median_wall_ns: Amount | None
    accepted: Amount | None
    ns_per_accepted: Amount | None

    @property
    def idle_share(self) -> float | None:
        """Share of the wall in which the GPU is idle, 0 to 1; None for a wall of 0."""
        return self.idle_ns / self.wall_ns if self.wall_ns else None


class StepBudget(msgspec.Struct, frozen=True, kw_only=True):
    """What the steps of one kind are made of, on each rank that has any.

    stage, substage: of the steps; substage only under speculative decoding, where a step is one
    iteration of the scheduler, called by its pass of the target model. "" for all together.
    ranks: in the order of the table. steps: fewest of a rank; None without steps: the window is
    then one. dropped_steps: those of all ranks that do not count, since something was compiled
    or captured in them, or since the window began within them. idle_share: largest of the
    ranks; idle_rank has it. pass_wall: largest mean wall of a rank, ms; wall_rank has it. None
    without a figure. idle_interval, wall_interval: what these may be (`Estimate.interval`).
    reason: why there are no figures, "" if there are.
    """

    stage: str
    substage: str
    ranks: tuple[RankBudget, ...]
    steps: Count | None
    dropped_steps: Count
    idle_share: Share | None
    idle_rank: str | None
    idle_interval: Interval | None
    pass_wall: Amount | None
    wall_rank: str | None
    wall_interval: Interval | None
    reason: str = ""

    @property
    def has_steps(self) -> bool:
        """False if the table has no steps, so that the window is one."""
        return self.steps is not None

    @property
    def unit(self) -> str:
        """What is measured: `step`, `iteration` (under speculative decoding), `window`."""
        return "window" if not self.has_steps else "iteration" if self.substage else "step"

    def figure(self, rank: str | None) -> RankBudget | None:
        """The parts of one rank; None if it is not among them."""
        return next((each for each in self.ranks if each.rank == rank), None)


@dataclass(frozen=True)
class RankWalls:
    """The walls of one rank, in order of time.

    numbers: that of each step's pass, -1 without steps. parts: ns of each part, shape (steps,
    parts). stage, substage: of each step. whole: whether it counts. accepted: tokens that a
    request accepted in it, NaN if unknown. is_matched: whether waiting and transfer can be
    distinguished. has_steps: False if the window is one step.
    """

    rank: str
    numbers: Ints
    parts: Ints
    stage: tuple[str, ...]
    substage: tuple[str, ...]
    whole: Mask
    accepted: Floats
    is_matched: bool
    has_steps: bool

    @property
    def kinds(self) -> tuple[tuple[str, str], ...]:
        """Stage and substage of each step."""
        return tuple(zip(self.stage, self.substage, strict=True))

    def of(self, chosen: Mask) -> Ints:
        """The parts of the chosen steps that count, shape (steps, parts), ns."""
        return self.parts[chosen & self.whole]


@dataclass(frozen=True)
class Walls:
    """The walls of all ranks of a table. reason: why there are none, "" if there are."""

    ranks: tuple[RankWalls, ...]
    reason: str = ""


def step_walls(table: KernelTable, waited: Sequence[Waits] | None = None) -> Walls:
    """Splits the steps of each rank. waited: `waits(table)`, if already computed."""
    if not table.is_timeline:
        return Walls((), NO_TIMELINE.format(source=SOURCES.get(table.source, table.source)))
    waited = waits(table) if waited is None else waited
    passes = _passes_of(table)
    by_rank = dict(iter(passes.groupby("rank", sort=False)))
    ranks = []
    for rank in table.ranks:
        line, of_rank = _timeline(table, table.places[rank]), by_rank.get(rank, passes.iloc[:0])
        walls = _rank_walls(rank, line, of_rank, _met(rank, waited))
        ranks += [] if walls is None else [walls]
    known = any(len(walls.parts) for walls in ranks)
    return Walls(tuple(ranks), "" if known else "no rank has a step with any GPU activity")


def budgets(walls: Walls) -> tuple[StepBudget, ...]:
    """One for each kind of step, in order of appearance; one without figures if there are none."""
    kinds = dict.fromkeys(kind for rank in walls.ranks for kind in rank.kinds)
    if not kinds:
        return (_budget(walls, "", ""),)
    return tuple(_budget(walls, *kind, is_one_kind=True) for kind in kinds)


def budget_of(walls: Walls, stage: str = "") -> StepBudget:
    """The budget of all steps of a stage together, "" for all stages."""
    kinds = {kind for rank in walls.ranks for kind in rank.kinds}
    every = {substage for of, substage in kinds if stage in ("", of)}
    return _budget(walls, stage, every.pop() if len(every) == 1 else "")


# How figures are estimated from the parts of a rank's steps (`Metric.estimate`).


def idle_of_wall(parts: Ints) -> Estimate | None:
    """Share of the wall in which the GPU is idle, launching and between steps."""
    idle, wall = parts[:, [LAUNCHING, BETWEEN]].sum(axis=1), parts.sum(axis=1)
    return ratio_of_sums(idle[:, None].astype(np.float64), wall.astype(np.float64))


def mean_wall(parts: Ints) -> Estimate | None:
    """The mean wall of a step, ms."""
    return mean_of(parts.sum(axis=1)[:, None] / MS) if len(parts) else None


ESTIMATES: Mapping[str, Callable[[Ints], Estimate | None]] = {
    function.__name__: function for function in (idle_of_wall, mean_wall)
}


def estimate(walls: Walls, kind: str, stage: str = "") -> Estimate | None:
    """One of `ESTIMATES`, of each rank that has steps of the stage; None without steps."""
    return _estimate_of(_chosen(walls, stage, None), kind)


class _Chosen(NamedTuple):
    """The steps of one kind on one rank: the parts of those that count, and what they accept."""

    rank: RankWalls
    parts: Ints
    accepted: Floats
    dropped: int


def _chosen(walls: Walls, stage: str, substage: str | None) -> list[_Chosen]:
    """The ranks that have such steps. stage: "" for all. substage: None for all."""
    kept = []
    for rank in walls.ranks:
        mask = np.array(
            [stage in ("", of) and substage in (None, sub) for of, sub in rank.kinds], bool
        )
        parts, counts = rank.of(mask), mask & rank.whole
        if mask.any():
            dropped = int(mask.sum() - counts.sum())
            kept.append(_Chosen(rank, parts, rank.accepted[counts], dropped))
    return kept


def _estimate_of(chosen: Sequence[_Chosen], kind: str) -> Estimate | None:
    """None where no rank, or only some, have a figure."""
    parts = [each.parts for each in chosen if each.rank.has_steps and len(each.parts)]
    figures = [ESTIMATES[kind](each) for each in parts]
    known = [each for each in figures if each is not None]
    return side_by_side(known) if known and len(known) == len(figures) else None


def _budget(walls: Walls, stage: str, substage: str, *, is_one_kind: bool = False) -> StepBudget:
    chosen = _chosen(walls, stage, substage if is_one_kind else None)
    dropped = sum(each.dropped for each in chosen)
    chosen = [each for each in chosen if len(each.parts)]
    ranks = tuple(_rank_budget(each) for each in chosen)
    steps = [rank.steps for rank in ranks if rank.steps is not None]
    has_steps = bool(steps) or not ranks
    idle, wall = (_estimate_of(chosen, kind) for kind in ESTIMATES)
    shares = {rank.rank: rank.idle_share or 0.0 for rank in ranks if rank.wall_ns}
    means = {rank.rank: rank.wall_ns / rank.steps / MS for rank in ranks if rank.steps}
    reason = walls.reason
    if not ranks and not reason:
        of_stage = f"{stage} step" if stage else "step"
        reason = f"no {of_stage} with GPU activity counts" if dropped else f"no {of_stage} at all"
    return StepBudget(
        stage=stage,
        substage=substage,
        ranks=ranks,
        steps=min(steps, default=0) if has_steps else None,
        dropped_steps=dropped,
        idle_share=max(shares.values(), default=None),
        idle_rank=max(shares, key=shares.__getitem__, default=None),
        idle_interval=None if idle is None else idle.interval,
        pass_wall=max(means.values(), default=None),
        wall_rank=max(means, key=means.__getitem__, default=None),
        wall_interval=None if wall is None else wall.interval,
        reason=reason,
    )


def _rank_budget(chosen: _Chosen) -> RankBudget:
    rank, parts = chosen.rank, chosen.parts
    sums, wall = parts.sum(axis=0).tolist(), parts.sum(axis=1)
    communication = sums[TRANSFER] + sums[WAITING] + sums[UNSPLIT]
    accepted = float(chosen.accepted.sum())  # NaN if unknown for one step
    is_known = rank.has_steps and accepted > 0
    return RankBudget(
        rank=rank.rank,
        steps=len(parts) if rank.has_steps else None,
        wall_ns=int(wall.sum()),
        compute_ns=sums[COMPUTE],
        communication_ns=communication,
        transfer_ns=sums[TRANSFER] if rank.is_matched else None,
        waiting_ns=sums[WAITING] if rank.is_matched else None,
        copies_ns=sums[COPIES],
        idle_ns=sums[LAUNCHING] + sums[BETWEEN],
        launching_ns=sums[LAUNCHING] if rank.has_steps else None,
        between_ns=sums[BETWEEN] if rank.has_steps else None,
        longest_between_ns=int(parts[:, BETWEEN].max()) if rank.has_steps else None,
        median_wall_ns=float(np.median(wall)) if rank.has_steps else None,
        accepted=accepted if is_known else None,
        ns_per_accepted=float(wall.sum()) / accepted if is_known else None,
    )


# The passes of a rank, and the steps that they make.


def _passes_of(table: KernelTable) -> pd.DataFrame:
    """The forward passes of a table: `rank, step, stage, excluded, substage, accept_length`."""
    spans = step_spans(table)
    for name, otherwise in (("substage", ""), ("accept_length", -1.0)):
        is_known = name in table.steps and not table.steps.empty
        spans[name] = table.steps[name].reindex(spans.index) if is_known else otherwise
    return spans


class _Timeline(NamedTuple):
    """The activities of one rank as parallel arrays; end: ns, like start."""

    step: Ints
    start: Ints
    end: Ints
    stream: Ints
    is_compute: Mask
    is_communication: Mask


def _timeline(table: KernelTable, rows: Ints) -> _Timeline:
    frame = table.frame.iloc[rows]
    step, start, dur, stream = (
        frame[name].to_numpy(np.int64) for name in ("step", "start_ns", "dur_ns", "stream")
    )
    is_compute = ~frame["category"].isin(NOT_COMPUTE).to_numpy(bool)
    is_communication = (frame["category"] == "communication").to_numpy(bool)
    return _Timeline(step, start, start + dur, stream, is_compute, is_communication)


class _Steps(NamedTuple):
    """Steps of one rank, in order of time. begin, end: of their activities, ns.

    stop: where the wall of the last one ends. target: row of each step's pass of the target
    model, among the passes in order of time. whole: whether it counts.
    """

    begin: Ints
    end: Ints
    stop: int
    target: Ints
    whole: Mask


def _rank_walls(
    rank: str, line: _Timeline, passes: pd.DataFrame, met: Sequence[Ints]
) -> RankWalls | None:
    """None for a rank without activities. met: begin, arrival of the last, end of collectives."""
    if not len(line.start):
        return None
    layers = _layers(line, met)
    is_matched = bool(len(met[0]))
    if passes.empty:
        begin, end = line.start.min()[None], line.end.max()[None]
        parts = _split(layers, begin, end, int(end[0]))
        whole, unknown = np.ones(1, bool), np.full(1, np.nan)
        number = np.full(1, NO_STEP, np.int64)
        return RankWalls(
            rank, number, parts, ("",), ("",), whole, unknown, is_matched, has_steps=False
        )
    passes = passes.drop_duplicates("step")
    passes, begin, end = _on_gpu(passes, line)
    substage = passes["substage"].astype(str).tolist()
    steps = _steps(begin, end, substage, passes["excluded"].to_numpy(bool))
    chosen = passes.iloc[steps.target]
    is_speculative = any(map(_is_draft, substage)) or any("VERIFY" in each for each in substage)
    names = chosen["substage"].astype(str).tolist()
    accepted = chosen["accept_length"].to_numpy(np.float64)
    return RankWalls(
        rank=rank,
        numbers=chosen["step"].to_numpy(np.int64),
        parts=_split(layers, steps.begin, steps.end, steps.stop),
        stage=tuple(map(str, chosen["stage"])),
        substage=tuple(names) if is_speculative else ("",) * len(names),
        whole=steps.whole,
        accepted=np.where((accepted > 0) & is_speculative, accepted, np.nan),
        is_matched=is_matched,
        has_steps=True,
    )


def _on_gpu(passes: pd.DataFrame, line: _Timeline) -> tuple[pd.DataFrame, Ints, Ints]:
    """The passes that have activities, by the begin of these, with their begins and ends."""
    import pandas as pd

    numbers, place = np.unique(line.step, return_inverse=True)
    begin, end = np.full(len(numbers), line.start.max()), np.full(len(numbers), line.end.min())
    np.minimum.at(begin, place, line.start)
    np.maximum.at(end, place, line.end)
    at = pd.Index(numbers).get_indexer(pd.Index(passes["step"]))
    passes, at = passes[at >= 0], at[at >= 0]
    order = np.argsort(begin[at], kind="stable")
    return passes.iloc[order], begin[at][order], end[at][order]


def _steps(begin: Ints, end: Ints, substage: Sequence[str], excluded: Mask) -> _Steps:
    """Joins the passes of one iteration of speculative decoding; else each pass is a step.

    begin, end, excluded: of each pass, in order of `begin`.
    """
    number, cut = _iterations(substage)
    kept = np.flatnonzero(number >= 0)
    target = np.flatnonzero([not _is_draft(each) for each in substage]).astype(np.int64)
    begins, ends = begin[target], end[target]
    np.minimum.at(begins, number[kept], begin[kept])
    np.maximum.at(ends, number[kept], end[kept])
    whole = np.ones(len(target), bool)
    whole[number[kept][excluded[kept]]] = False
    if cut and len(target):
        whole[0] = False
    left = np.flatnonzero(number < 0)
    left = left[left > kept.max(initial=-1)]
    reached = int(ends.max(initial=0))
    stop = int(begin[left[0]]) if len(left) else reached
    return _Steps(begins, ends, max(stop, int(begins.max(initial=0))), target, whole)


def _is_draft(substage: str) -> bool:
    return substage.startswith("DRAFT")


def _iterations(substage: Sequence[str]) -> tuple[Ints, bool]:
    """Which iteration each pass belongs to, -1 for none, and whether the first one may be cut.

    SGLang drafts, verifies with the target model, and extends the draft model's cache by what was
    accepted, once after each pass of the target. Spans of the draft model are called DRAFT
    whichever they are, so the first one behind a target's is that extension, and the others are
    the drafts for the next target. Those behind the last target belong to an iteration that the
    window does not hold.
    """
    number = np.full(len(substage), -1, np.int64)
    target, is_extended, is_cut = -1, False, False
    drafts: list[int] = []
    for at, name in enumerate(substage):
        if not _is_draft(name):
            target, is_extended = target + 1, False
            number[[*drafts, at]] = target
            drafts = []
        elif target < 0:
            is_cut = True
        elif name.startswith("DRAFT_EXTEND") or not (is_extended or name == "DRAFT_LOOP"):
            number[at], is_extended = target, True
        else:
            drafts.append(at)
    return number, is_cut


# The parts of a wall.


def _met(rank: str, waited: Sequence[Waits]) -> tuple[Ints, Ints, Ints]:
    """When a rank arrived at its matched collectives, when the last rank did, and their end."""
    for each in waited:
        if rank in each.group.ranks and len(each.step):
            at = each.group.ranks.index(rank)
            arrived, end = each.start[:, at], each.end[:, at]
            last = arrived + np.rint(each.whole_wait[:, at]).astype(np.int64)
            return arrived, np.minimum(last, end), end
    none = np.zeros(0, np.int64)
    return none, none, none


_Layer = tuple[Ints, Ints]  # begins and ends of intervals


def _layers(line: _Timeline, met: Sequence[Ints]) -> tuple[_Layer, ...]:
    """The intervals of each part but idle time, in the order of the parts."""
    arrived, last, end = met
    copies = ~line.is_compute & ~line.is_communication
    begin = _computing_from(line)
    return (
        (begin[line.is_compute], line.end[line.is_compute]),
        (last, end),
        (arrived, last),
        (line.start[line.is_communication], line.end[line.is_communication]),
        (line.start[copies], line.end[copies]),
    )


def _computing_from(line: _Timeline) -> Ints:
    """When each activity begins to do more than wait for a collective of its own stream.

    A kernel that is launched early (programmatic dependent launch) is on the GPU while the one
    ahead of it still runs. If that is a collective, it is the collective that takes the time.
    """
    order = np.lexsort((line.is_communication, line.start, line.stream))
    begin, start = line.start.copy(), line.start[order]
    stream, ends = line.stream[order], line.end[order]
    edges = np.flatnonzero(np.diff(stream, prepend=stream[0] - 1))
    for first, after in zip(edges, np.append(edges[1:], len(stream)), strict=True):
        if stream[first] < 0:
            continue
        rows = slice(first, after)
        is_call = line.is_communication[order[rows]]
        reached = np.maximum.accumulate(np.where(is_call, ends[rows], start[rows][0]))
        held = np.append(start[rows][:1], reached[:-1])
        begin[order[rows]] = np.minimum(np.maximum(start[rows], held), ends[rows])
    return begin


def _split(layers: Sequence[_Layer], begin: Ints, end: Ints, stop: int) -> Ints:
    """The parts of walls that lie end to end, shape (walls, parts), ns.

    begin, end: of the activities of each step, in order of `begin`. An instant belongs to the step
    that began last. Where steps overlap, nothing is between them until all that began have ended.
    """
    walls = len(begin)
    if not walls:
        return np.zeros((0, _PARTS), np.int64)
    first = int(begin[0])
    inside = [(np.clip(a, first, stop), np.clip(b, first, stop)) for a, b in layers]
    reached = np.clip(np.maximum.accumulate(end), first, stop)
    sides = [side for layer in inside for side in layer]
    edges = np.unique(np.concatenate([*sides, begin, reached, [stop]]))
    at = edges[:-1]
    wall = np.searchsorted(begin, at, side="right") - 1
    part = np.where(at < reached[wall], LAUNCHING, BETWEEN)
    for number in range(len(inside) - 1, -1, -1):
        part[_covered(*inside[number], edges)] = number
    parts = np.zeros((walls, _PARTS), np.int64)
    np.add.at(parts, (wall, part), np.diff(edges))
    return parts


def _covered(start: Ints, end: Ints, edges: Ints) -> Mask:
    """Which of the intervals between successive edges lie in any of these."""
    depth = np.zeros(len(edges), np.int64)
    np.add.at(depth, np.searchsorted(edges, start), 1)
    np.add.at(depth, np.searchsorted(edges, end), -1)
    covered: Mask = depth.cumsum()[:-1] > 0
    return covered
