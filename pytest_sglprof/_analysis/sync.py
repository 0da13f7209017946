"""What it costs that ranks with different input wait for each other, and why they do.

Three answers for the ranks of a sync group (`passes`): the cost in three parts, how much of the
difference between ranks is load (`load_split`), and how slow each rank is at the same work.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import msgspec
import numpy as np

from pytest_sglprof._analysis.alignment import NO_BATCH
from pytest_sglprof._analysis.busy import Activities, Ints, busy_times
from pytest_sglprof._analysis.certainty import (
    Amount,
    Count,
    Floats,
    Interval,
    Share,
    error_of_mean,
    t_quantile,
)
from pytest_sglprof._analysis.collectives import Waits, by_step
from pytest_sglprof._analysis.groups import ComparedSteps, RankGroup, sync_groups, work_groups
from pytest_sglprof._analysis.imbalance import lost_of_wall, slower_ranks
from pytest_sglprof._analysis.load_split import (
    SURELY,
    CategorySplit,
    Driver,
    Part,
    Speeds,
    added,
    mean_of_others,
    price_of_input,
    speeds_of,
    split,
)
from pytest_sglprof._analysis.passes import STATIC, Passes, SyncGroup, why_other_work
from pytest_sglprof._analysis.replicas import replica_cells
from pytest_sglprof._analysis.sums import Sums
from pytest_sglprof._analysis.sync_words import (
    MOST_HOT,
    HeadWait,
    HotExpert,
    hot_experts,
    sentence_of,
)
from pytest_sglprof._analysis.times import GroupCells, Rows
from pytest_sglprof._analysis.work import matrix_places
from pytest_sglprof._ranks import Rank
from pytest_sglprof._server.log_lines import SyncWait
from pytest_sglprof._trace.categories import NOT_COMPUTE

if TYPE_CHECKING:
    from pytest_sglprof._trace.table import KernelTable


class SyncCost(msgspec.Struct, frozen=True, kw_only=True):
    """What waiting for each other costs, in shares of the wall time of the passes, 0 to 1.

    waiting: in collectives of the device, while the rank computes nothing. idle: at the head of a
    pass, where its GPU has nothing to do while a peer still works (with DP attention ranks meet on
    the CPU before a pass). padding: rows that are computed beyond the rank's own; None where the
    price of a row is not known. padded_rows: their share of all rows. lost: the sum of the known
    parts, interval: what it may be (`Estimate.interval`). wall_ns: of all passes and ranks.
    """

    waiting: Share | None
    idle: Share | None
    padding: Share | None
    padded_rows: Share | None
    lost: Share | None
    interval: Interval | None
    wall_ns: Count


class RankSplit(msgspec.Struct, frozen=True, kw_only=True):
    """Why one rank computes longer or shorter than the mean of the others, in ns a pass.

    difference_ns: its compute less theirs. load, speed, rest: what more input, a slower rank, and
    neither makes of it, over the categories where that is known (95 % intervals); unknown_ns: the
    part of the others. load_share: load / difference with its interval, None unless the difference
    itself is sure. speed_ratio: how many times as long as the median of the others it takes at the
    same work, with its interval (95 %). waits_for: share of all waiting in collectives at which it
    arrived last. slower_in: categories of the same work in which it is surely slower.
    categories: by category and kind of pass, the largest difference first.
    """

    rank: str
    difference_ns: float
    load: Part
    speed: Part
    rest: Part
    unknown_ns: float
    load_share: Part | None
    speed_ratio: float | None
    speed_interval: Interval | None
    waits_for: Share | None
    slower_in: tuple[str, ...]
    categories: tuple[CategorySplit, ...]

    @property
    def is_load_known(self) -> bool:
        """Whether the load of any category is known; else its part is no figure."""
        return any(each.load is not None for each in self.categories)

    @property
    def is_speed_known(self) -> bool:
        """Whether the speed part of any category is known."""
        return any(each.speed is not None for each in self.categories)


class DifferentCalls(msgspec.Struct, frozen=True, kw_only=True):
    """A kernel that ranks call differently often at the same work: calls a pass of each rank."""

    kernel: str
    calls: tuple[Amount, ...]


class SyncFinding(msgspec.Struct, frozen=True, kw_only=True):
    """The imbalance of one sync group whose ranks have different input.

    kinds: number of compared passes of each kind (`passes`), missing: of passes that some rank
    lacks. pushed_out: passes in which a rank decodes without graph since a peer prefills. regime:
    "gather" or "local", None where not known. same_work: passes in which the kernels of `STATIC`
    have the same shapes on all ranks. latest: the rank for which the others wait most.
    hot: the expert of that rank that gets far more tokens than those of its layer do; None where
    there is none or they were not counted. heads: idle time at the head of a pass beside SGLang's
    own measure of it, for ranks of which both are known. hot_experts: the hottest of all ranks, at
    most `MOST_HOT`; None in older documents. sentence: the three answers in words. reason: why
    there are none, "" if there are.
    """

    group: str
    kinds: dict[str, Count]
    missing: Count
    pushed_out: Count
    regime: str | None
    same_work: Count
    cost: SyncCost | None
    latest: str | None
    ranks: tuple[RankSplit, ...]
    differing: tuple[DifferentCalls, ...]
    hot: HotExpert | None
    sentence: str
    reason: str
    heads: tuple[HeadWait, ...] = ()
    hot_experts: tuple[HotExpert, ...] | None = None


# Cost.


@dataclass(frozen=True)
class LostTimes:
    """Of each pass: lost by waiting and at its head, its wall, shape (passes, ranks), ns.

    The earliest pass has none of it, since its head is not known. waiting: None where no
    collectives are matched.
    """

    waiting: Floats | None
    idle: Floats
    wall: Floats
    padding: Floats | None

    @property
    def lost(self) -> Floats:
        """The known parts together."""
        parts = (self.waiting, self.idle, self.padding)
        total: Floats = sum((part for part in parts if part is not None), np.zeros_like(self.idle))
        return total

    @property
    def columns(self) -> Floats:
        """Lost and wall of all ranks in each pass, shape (passes, 2)."""
        return np.stack([self.lost.sum(axis=1), self.wall.sum(axis=1)], axis=1)


def lost_times(group: SyncGroup) -> LostTimes | None:
    """What is lost in each pass; None without a timeline, or with fewer than two."""
    passes, table, waited = group.passes, group.table, group.waited
    if not table.is_timeline or len(passes.numbers) < 2:
        return None
    start, end = _extents(group.rows, passes)
    clocks = waited.clocks
    if clocks is not None:
        start = start - clocks.at_middle
        end = end - clocks.at_middle
    elif table.hosts and len({table.hosts.get(rank) for rank in passes.group.ranks}) != 1:
        return None
    # By time: passes of the target and of the draft model are numbered apart.
    order = np.argsort(np.median(start, axis=1), kind="stable")
    start, end = start[order], end[order]
    before, head = end[:-1], start[1:]
    gap = np.maximum(head - before, 0.0)
    nobody = np.maximum(head.min(axis=1) - before.max(axis=1), 0.0)[:, None]
    wall = np.maximum(end[1:] - before, 0.0)
    # Where a pass between them is left out, the time between two is not known.
    follows = np.diff(_places(table, passes)[order]) == 1
    idle, known_wall = np.zeros(start.shape), np.zeros(start.shape)
    idle[order[1:]] = np.where(follows[:, None], np.maximum(gap - nobody, 0.0), 0.0)
    known_wall[order[1:]] = np.where(follows[:, None], wall, end[1:] - head)
    waiting, padding = None, _padding(group)
    if not waited.reason:
        known = by_step(waited, passes.numbers.tolist(), passes.group.ranks)
        waiting = None if known is None else known.astype(np.float64)
    for lost in (waiting, padding):
        if lost is not None:
            lost[order[0]] = 0.0
    return LostTimes(waiting, idle, known_wall, padding)


def _places(table: KernelTable, passes: Passes) -> Ints:
    """The place of each pass among all of the first rank, by time, shape (passes,)."""
    import pandas as pd

    steps = table.steps[table.steps["rank"] == passes.group.ranks[0]]
    numbers = steps.sort_values("start_ns", kind="stable")["step"].drop_duplicates()
    places: Ints = pd.Index(numbers).get_indexer(pd.Index(passes.numbers)).astype(np.int64)
    return places


def _padding(group: SyncGroup) -> Floats | None:
    """What rows beyond the rank's own cost in each pass, shape (passes, ranks), ns.

    None where the price of a row is not known: as long as all passes replay one graph, it does not
    show. 0 where nothing is padded.
    """
    passes, cells = group.passes, group.cells
    graph = passes.of_kind("decode")
    if (passes.rows[graph] < 0).any() or (passes.batch[graph] < 0).any():
        return None
    beyond = np.where(graph[:, None], np.maximum(passes.rows - passes.batch, 0), 0)
    if not beyond.any():
        return np.zeros(beyond.shape)
    price = 0.0
    for category in STATIC:
        times = cells.matrix(cells.select(category))[graph].astype(np.float64)
        if times.any():
            known = price_of_input(times, passes.rows[graph].astype(np.float64))
            if known is None:
                return None
            price += known
    padding: Floats = price * beyond
    return padding


def _extents(rows: Rows, passes: Passes) -> tuple[Floats, Floats]:
    """When the first activity of each pass begins on each rank and the last one ends, ns."""
    import pandas as pd

    ranks = pd.Categorical.from_codes(rows.rank, pd.Index(rows.ranks))
    *at, kept = matrix_places(passes.numbers, passes.group.ranks, rows.step, ranks)
    begin = rows.start[kept]
    begin = begin - int(begin.min() if len(begin) else 0)
    end = begin + rows.dur[kept]
    shape = (len(passes.numbers), len(passes.group.ranks))
    first = np.full(shape, np.inf)
    last = np.full(shape, -np.inf)
    np.minimum.at(first, tuple(at), begin)
    np.maximum.at(last, tuple(at), end)
    empty = ~np.isfinite(first)
    middle = np.nanmedian(np.where(empty, np.nan, first), axis=1)[:, None]
    return np.where(empty, middle, first), np.where(empty, middle, last)


def _cost(times: LostTimes | None, passes: Passes) -> SyncCost | None:
    if times is None or not times.wall.sum():
        return None
    wall = float(times.wall.sum())
    estimate = lost_of_wall(times.columns)

    def share(part: Floats | None) -> float | None:
        return None if part is None else float(min(1.0, part.sum() / wall))

    interval = estimate.interval if estimate is not None else None
    return SyncCost(
        waiting=share(times.waiting),
        idle=share(times.idle),
        padding=share(times.padding),
        padded_rows=_padded_rows(passes),
        lost=share(times.lost),
        interval=interval,
        wall_ns=round(wall),
    )


def _heads(
    times: LostTimes | None, passes: Passes, waits: Sequence[SyncWait]
) -> tuple[HeadWait, ...]:
    """The two measures of the ranks that have both, by iteration: drafts do not meet on the CPU."""
    number = len(passes.numbers) - int(passes.of_kind("draft").sum())
    if times is None or number < 2:
        return ()
    by_dp = {each.dp: each for each in waits}
    known = [
        (at, label, by_dp.get(rank.dp))
        for at, label in enumerate(passes.group.ranks)
        if (rank := Rank.parse(label)) is not None and rank.dp is not None
    ]
    return tuple(
        HeadWait(
            rank=label,
            idle_ns=float(times.idle[:, at].sum()) / (number - 1),
            wall_ns=float(times.wall[:, at].sum()) / (number - 1),
            passes=number - 1,
            waited_ns=1e9 * measured.seconds,
            waited_passes=measured.passes,
            long_waits=measured.long,
        )
        for at, label, measured in known
        if measured is not None
    )


def _padded_rows(passes: Passes) -> float | None:
    graph = passes.of_kind("decode")
    rows, batch = passes.rows[graph], passes.batch[graph]
    if not rows.size or (rows < 0).any() or (batch < 0).any() or not rows.sum():
        return None
    return float((rows - np.minimum(batch, rows)).sum() / rows.sum())


# Load.

UNPRICED = "nothing that is recorded prices it"
TWO_LAWS = "some ranks prefill while others decode, which have no common law"
NO_EXPERTS = (
    "how many tokens its experts got was not recorded (hot experts or the kernel: not known)"
)


def no_experts(balancedness: float | None) -> str:
    """Why the load of experts is not known. A balance says how unequal, never which rank."""
    if balancedness is None:
        return NO_EXPERTS
    measure = f"SGLang's balancedness is {balancedness:.2f} (mean / max over the ranks)"
    return f"{NO_EXPERTS}; {measure}"


def driver_of(
    category: str, kind: str, passes: Passes, balancedness: float | None = None
) -> tuple[Driver | None, Floats | None, str]:
    """What prices a category in passes of a kind: its name, its values, or why not known.

    Values have shape (passes of that kind, ranks). balancedness: of `ServerFacts`.
    """
    chosen = passes.of_kind(kind)
    if kind == "prefill beside decode":
        return None, None, TWO_LAWS
    if category in STATIC:
        return (
            ("graph batch" if kind == "decode" else "tokens"),
            passes.rows[chosen].astype(np.float64),
            "",
        )
    if category == "attention":
        if kind == "prefill":
            return "query-key pairs", passes.query_keys[chosen].astype(np.float64), ""
        return "KV tokens", passes.kv_tokens[chosen].astype(np.float64), ""
    if category == "moe":
        tokens = passes.expert_tokens[chosen]
        if (tokens < 0).any():
            return "expert tokens", None, no_experts(balancedness)
        return "expert tokens", tokens.astype(np.float64), ""
    if category == "sampling":
        return "requests", passes.batch[chosen].astype(np.float64), ""
    return None, None, UNPRICED


def splits(group: SyncGroup, speeds: Speeds | None) -> tuple[tuple[CategorySplit, ...], ...]:
    """For each category and kind of pass the split of every rank."""
    passes, cells = group.passes, group.cells
    same = group.same_work
    lines = []
    for kind in passes.counts:
        chosen = passes.of_kind(kind)
        is_paired = same.steps.numbers == tuple(passes.numbers[chosen].tolist())
        for category in cells.categories:
            if category in NOT_COMPUTE:
                continue
            times = cells.matrix(cells.select(category))[chosen].astype(np.float64)
            driver, inputs, unknown = driver_of(
                category, kind, passes, group.table.facts.balancedness
            )
            lines.append(
                split(
                    times,
                    inputs,
                    speeds,
                    category=category,
                    kind=kind,
                    driver=driver,
                    unknown=unknown,
                    is_paired=is_paired,
                )
            )
    return tuple(lines)


def same_speeds(group: SyncGroup) -> Speeds | None:
    """How slow each rank is at the same work; None with too few passes of it."""
    same = group.same_work
    matrices = [same.matrix(same.select(each)) for each in same.categories]
    return speeds_of([each.astype(np.float64) for each in matrices])


def sync_findings(sums: Sums) -> tuple[SyncFinding, ...]:
    """The finding of each sync group whose ranks have different input; none for plain TP."""
    if not has_different_input(sums.table.ranks):
        return ()
    return tuple(
        sync_finding(each) for each in sums.synced if has_different_input(each.passes.group.ranks)
    )


def has_different_input(ranks: Sequence[str]) -> bool:
    """Whether ranks that meet in collectives have different input."""
    return any(len(work_groups(each.ranks)) > 1 for each in sync_groups(ranks))


def sync_finding(group: SyncGroup) -> SyncFinding:
    """The finding of one sync group."""
    passes = group.passes
    base = SyncFinding(
        group=passes.group.label,
        kinds=passes.counts,
        missing=passes.missing,
        pushed_out=passes.pushed_out,
        regime=passes.settings.regime if passes.settings is not None else None,
        same_work=len(group.same_work.steps.numbers),
        cost=None,
        latest=None,
        ranks=(),
        differing=tuple(
            DifferentCalls(kernel=name, calls=calls) for name, calls in group.differing
        ),
        hot=None,
        sentence="",
        reason=passes.reason,
    )
    if passes.reason:
        return base
    times = lost_times(group)
    waits_for = _waits_for(group.waited, passes)
    ranks = _rank_splits(group, waits_for)
    latest = _latest(ranks)
    hot = hot_experts(group.table.experts, passes.numbers)
    finding = msgspec.structs.replace(
        base,
        cost=_cost(times, passes),
        heads=_heads(times, passes, group.table.facts.sync_waits),
        latest=latest,
        ranks=ranks,
        hot=next((expert for expert in hot if expert.rank == latest), None),
        hot_experts=hot[:MOST_HOT],
    )
    return msgspec.structs.replace(finding, sentence=sentence_of(finding))


def _waits_for(waited: Waits, passes: Passes) -> Floats | None:
    """For which share of the waiting each rank is the last to arrive, shape (ranks,)."""
    if waited.reason or not waited.wait.size:
        return None
    known = np.isin(waited.step, passes.numbers)
    lost = waited.wait[known].sum(axis=1)
    last = waited.late_ns[known].argmax(axis=1)
    sums = np.bincount(last, weights=lost, minlength=len(passes.group.ranks))
    total = float(sums.sum())
    return sums / total if total > 0 else None


def _latest(ranks: Sequence[RankSplit]) -> str | None:
    if all(each.waits_for is None for each in ranks):
        return max(ranks, key=lambda each: each.difference_ns).rank if ranks else None
    return max(ranks, key=lambda each: each.waits_for or 0.0).rank


def _rank_splits(group: SyncGroup, waits_for: Floats | None) -> tuple[RankSplit, ...]:
    passes, cells = group.passes, group.cells
    speeds = same_speeds(group)
    lines = splits(group, speeds)
    same = group.same_work
    slower = slower_ranks(same)
    compute = cells.matrix(cells.select("compute")).astype(np.float64)
    differences = compute - mean_of_others(compute)
    total = len(passes.numbers)
    parts = []
    for at, rank in enumerate(passes.group.ranks):
        lines_of_rank = tuple(line[at] for line in lines)
        weighted = [(each.passes / total, each) for each in lines_of_rank]
        difference = differences[:, at]
        load = added([(share, each.load) for share, each in weighted if each.load])
        parts.append(
            RankSplit(
                rank=rank,
                difference_ns=float(difference.mean()),
                load=load,
                speed=added(
                    [(share, each.speed) for share, each in weighted if each.speed],
                    are_independent=False,
                ),
                rest=added([(share, each.rest) for share, each in weighted if each.rest]),
                unknown_ns=sum(
                    share * each.difference_ns for share, each in weighted if each.load is None
                ),
                load_share=_load_share(difference, load),
                speed_ratio=None if speeds is None else speeds.beside_others(at),
                speed_interval=None if speeds is None else speeds.interval_of(at),
                waits_for=None if waits_for is None else float(waits_for[at]),
                slower_in=tuple(name for name, ranks in slower.items() if ranks[at]),
                categories=tuple(
                    sorted(lines_of_rank, key=lambda each: -abs(each.difference_ns) * each.passes)
                ),
            )
        )
    return tuple(parts)


def _load_share(difference: Floats, load: Part) -> Part | None:
    """The load part / the difference; None unless the difference is surely above 0."""
    mean = float(difference.mean())
    error, freedom = error_of_mean(difference - mean)
    if mean <= t_quantile(SURELY, freedom) * error:
        return None
    low, high = load.bounds
    return Part(load.ns / mean, (low / mean, high / mean))


# What is judged across ranks with different input.


def cells_across(sums: Sums, kind: str, scope: str, kernel: str) -> tuple[GroupCells, ...]:
    """The cells of each sync group of which a figure is estimated.

    kind: a key of `imbalance.ESTIMATES`. The typical ratio compares only what has the same shapes
    on all ranks; other figures say what it costs that the ranks differ, in all passes.
    """
    if not sums.synced:
        return replica_cells(sums.table, kind, scope, kernel)
    cells = []
    for group in sums.synced:
        passes = group.passes
        if passes.reason:
            cells.append(_doubted(passes.group, passes.reason))
        elif kind == "typical_ratio":
            doubt = _why_not_same_work(group, scope, kernel)
            cells.append(replace(group.same_work, across="sync", doubt=doubt))
        else:
            times = None
            if kind == "lost_of_wall":
                times = lost_times(group)
            doubt = ""
            if kind == "lost_of_wall" and times is None:
                doubt = "what is lost by waiting is only known of GPUs whose clocks are known"
            cells.append(
                replace(
                    group.cells,
                    across="sync",
                    doubt=doubt,
                    lost=None if times is None else times.columns,
                )
            )
    return tuple(cells)


def _doubted(group: RankGroup, doubt: str) -> GroupCells:
    """Cells without any times."""
    nothing = ComparedSteps((), (), 0, 0)
    times = busy_times(Activities(*(np.zeros(0, np.int64),) * 4), 0, 0, is_timeline=True)
    return GroupCells(group, nothing, True, (), times, 1.0, frozenset(), across="sync", doubt=doubt)


def _why_not_same_work(group: SyncGroup, scope: str, kernel: str) -> str:
    """Why ranks have no work of equal shapes to compare; "" if they have."""
    passes = group.passes
    if other := why_other_work(scope, kernel):
        return other
    if group.same_work.steps.numbers:
        return ""
    if group.differing:
        name = group.differing[0][0]
        return f"the ranks do not run the same kernels at the same work ({name})"
    if passes.settings is None or (passes.settings.regime is None and passes.settings.graphs):
        return (
            "how the ranks' batches are padded is not known: give the answer of the server's "
            "/server_info with --server-info"
        )
    if (passes.rows < 0).all():
        return NO_BATCH
    if (passes.rows < 0).any():
        return "the batches of some passes are not known"
    return "no pass has equally many rows on all ranks, so none has the same work"
