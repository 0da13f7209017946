"""The step x rank series of a window: compute, waits, batch size, tokens of every step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import msgspec
import numpy as np

from pytest_sglprof._analysis.busy import Ints, busy_parts
from pytest_sglprof._analysis.certainty import Count
from pytest_sglprof._analysis.collectives import Waits, by_step, matched_collectives
from pytest_sglprof._analysis.groups import step_spans
from pytest_sglprof._analysis.kinds import communication
from pytest_sglprof._analysis.times import GroupCells
from pytest_sglprof._trace.categories import NOT_COMPUTE

if TYPE_CHECKING:
    import pandas as pd

    from pytest_sglprof._trace.table import KernelTable


# Steps x ranks of a series. A longer window keeps one of every k consecutive steps: the one in
# which the ranks differ most.
MAX_CELLS = 200_000
ABSENT = -1
State = Literal["compared", "cut", "unmatched"]


class StepSeries(msgspec.Struct, frozen=True, kw_only=True):
    """The steps of one work group, in order. Times in ns, -1 for a missing figure.

    compute_ns, wait_ns: rows are steps, columns ranks; wait_ns is None without collectives.
    state: "compared", "cut" (a rank has a part only) or "unmatched" (a rank lacks it).
    every: 1, or k when each row stands for k consecutive steps.
    """

    group: str
    ranks: tuple[str, ...]
    every: int
    numbers: list[int]
    stages: list[str]
    state: list[State]
    batch_size: list[int]
    tokens: list[int]
    start_ns: list[int]
    compute_ns: list[list[int]]
    wait_ns: list[list[int]] | None


def step_times(
    table: KernelTable, groups: Sequence[GroupCells], waited: Sequence[Waits]
) -> tuple[StepSeries, ...]:
    """One series for each work group; none where the table has no steps."""
    spans = step_spans(table)
    if spans.empty:
        return ()
    compute = _compute_sums(table)
    series = (_series(table, group, spans, compute, waited) for group in groups)
    return tuple(one for one in series if one is not None)


def _series(
    table: KernelTable,
    cells: GroupCells,
    spans: pd.DataFrame,
    compute: pd.DataFrame,
    waited: Sequence[Waits],
) -> StepSeries | None:
    ranks = cells.group.ranks
    group_spans = spans[spans["rank"].isin(ranks)]
    if group_spans.empty:
        return None
    numbers = np.unique(group_spans["step"].to_numpy(np.int64))
    present = _wide(group_spans.assign(n=1), "n", numbers, ranks, 0) > 0
    ns = _wide(compute[compute["rank"].isin(ranks)], "ns", numbers, ranks, 0)
    ns[~present] = ABSENT
    # A work group lies inside one sync group: ranks with equal input meet.
    sync_waits = next((one for one in waited if set(ranks) <= set(one.group.ranks)), None)
    wait = None if sync_waits is None else by_step(sync_waits, numbers.tolist(), ranks)
    if wait is not None:
        wait[~present] = ABSENT
    kept, every = _kept(ns, present)
    about = table.steps[table.steps["rank"].isin(list(ranks))]
    first = about.groupby("step")[["batch_size", "tokens", "start_ns"]].agg(
        {"batch_size": "max", "tokens": "max", "start_ns": "min"}
    )
    first = first.reindex(numbers).fillna(ABSENT).astype(np.int64).iloc[kept]
    stages = group_spans.groupby("step")["stage"].first().reindex(numbers)
    return StepSeries(
        group=cells.group.label,
        ranks=tuple(ranks),
        every=every,
        numbers=numbers[kept].tolist(),
        stages=[str(stage) for stage in stages.iloc[kept]],
        state=_states(cells, numbers, present.all(axis=1), kept),
        batch_size=first["batch_size"].tolist(),
        tokens=first["tokens"].tolist(),
        start_ns=first["start_ns"].tolist(),
        compute_ns=ns[kept].tolist(),
        wait_ns=None if wait is None else wait[kept].tolist(),
    )


def _compute_sums(table: KernelTable) -> pd.DataFrame:
    """`rank, step, ns`: compute of each step.

    Busy time where the table is a timeline, else the sum: self times are no intervals.
    """
    frame = table.frame
    compute = frame[(frame["step"] >= 0) & ~frame["category"].isin(list(NOT_COMPUTE))]
    ns = compute["dur_ns"].to_numpy(np.int64)
    if table.is_timeline:
        rank = compute["rank"].astype("category").cat.codes.to_numpy().astype(np.int64)
        step = compute["step"].to_numpy(np.int64)
        owner = rank * (step.max(initial=0) + 1) + step
        ns = busy_parts(owner, compute["start_ns"].to_numpy(np.int64), ns)
    sums = compute.assign(ns=ns).groupby(["rank", "step"], observed=True, sort=False)["ns"].sum()
    typed: pd.DataFrame = sums.reset_index().astype({"rank": object})
    return typed


def _wide(
    rows: pd.DataFrame, value: str, numbers: Any, ranks: Sequence[str], empty: int
) -> np.ndarray[Any, np.dtype[np.int64]]:
    wide = rows.pivot_table(index="step", columns="rank", values=value, aggfunc="sum")
    full = wide.reindex(index=numbers, columns=list(ranks)).fillna(empty)
    return full.to_numpy(np.int64, copy=True)


def _kept(ns: Any, present: Any) -> tuple[Any, int]:
    """Rows that are kept, and how many steps each stands for."""
    steps, ranks = ns.shape
    every = -(-steps * ranks // MAX_CELLS)
    if every <= 1:
        return np.arange(steps), 1
    spread = np.where(present.all(axis=1), ns.max(axis=1) - ns.mean(axis=1), -1.0)
    starts = range(0, steps, every)
    return np.array([at + int(spread[at : at + every].argmax()) for at in starts]), every


def _states(cells: GroupCells, numbers: Any, common: Any, kept: Any) -> list[State]:
    compared = set(cells.steps.numbers)
    words: list[State] = []
    for at in kept:
        if int(numbers[at]) in compared:
            words.append("compared")
        else:
            words.append("cut" if common[at] else "unmatched")
    return words


# Kernels, rank by rank: how long their calls took, in which step and call.

MAX_KERNELS = 300  # a work group; those with the largest lost time, then total
QUANTILES = (0.0, 0.25, 0.5, 0.75, 1.0)
# Numbers in the step x rank and call x rank matrices of a work group: as many kernels have
# them, in the order of lost time, as fit.
MAX_DETAILED = 20
MAX_CALLS = 512  # k-th calls in a step
_KEYS = ("rank", "category", "name")
_DUR_BITS = 40  # 18 minutes in ns; longer calls count as that
_DUR_MASK = (1 << _DUR_BITS) - 1


class KernelSpread(msgspec.Struct, frozen=True, kw_only=True):
    """One kernel over the compared steps; lists are by rank.

    quantiles: 0, 25, 50, 75, 100 % of single calls, ns; None without a call. by_step: steps x
    ranks, kernel time, ns. by_call: k-th call in a step x ranks, mean duration, ns; -1 without
    one. Both are None but for the kernels with the largest lost time.
    """

    name: str
    category: str
    lost_ns: Count
    total_ns: list[int]
    count: list[int]
    quantiles: list[list[int] | None]
    by_step: list[list[int]] | None
    by_call: list[list[int]] | None


class KernelGroup(msgspec.Struct, frozen=True, kw_only=True):
    """The kernels of one work group, the largest lost time first.

    numbers: the steps of `by_step`. left_out: kernels that are not listed.
    """

    group: str
    ranks: tuple[str, ...]
    numbers: list[int]
    left_out: Count
    rows: tuple[KernelSpread, ...]


def kernel_spread(table: KernelTable, groups: Sequence[GroupCells]) -> tuple[KernelGroup, ...]:
    """The kernels of each work group. groups: as `sum_times(table)` returns them."""
    return tuple(_group(table, cells) for cells in groups)


def _group(table: KernelTable, cells: GroupCells) -> KernelGroup:
    ranks = cells.group.ranks
    lost, totals = _lost(cells)
    order = sorted(range(len(lost)), key=lambda k: (-lost[k], -int(totals[k].sum()), k))
    shown = order[:MAX_KERNELS]
    places = np.sort(np.concatenate([table.places[rank] for rank in ranks]))
    calls = _Calls(table.frame.iloc[places], cells)
    rows = []
    room = MAX_CELLS
    for at, k in enumerate(shown):
        category, name = cells.kernels[k]
        count, quantiles = calls.quantiles(k)
        by_step = by_call = None
        room -= len(cells.steps.numbers) * len(ranks)
        if cells.has_steps and room >= 0 and at < MAX_DETAILED:
            by_step = cells.kernel_matrix(_only(k, len(lost))).tolist()
            by_call = calls.by_call(k)
            room -= sum(len(line) for line in by_call)
        rows.append(
            KernelSpread(
                name=name,
                category=category,
                lost_ns=round(float(lost[k])),
                total_ns=totals[k].tolist(),
                count=count,
                quantiles=quantiles,
                by_step=by_step,
                by_call=by_call,
            )
        )
    return KernelGroup(
        group=cells.group.label,
        ranks=tuple(ranks),
        numbers=list(cells.steps.numbers) if cells.has_steps else [],
        left_out=len(order) - len(shown),
        rows=tuple(rows),
    )


def _lost(cells: GroupCells) -> tuple[list[float], Ints]:
    """Lost time of each kernel (as in a finding), and its totals, shape (kernels, ranks)."""
    every = np.ones(len(cells.kernels), bool)
    lost = []
    for k in range(len(cells.kernels)):
        matrix = cells.matrix(_only(k, len(cells.kernels)))
        lost.append(float(matrix.max(axis=1).sum() - matrix.mean(axis=1).sum()))
    return lost, cells.kernel_totals(every)


def _only(k: int, count: int) -> np.ndarray[Any, np.dtype[np.bool_]]:
    chosen = np.zeros(count, bool)
    chosen[k] = True
    return chosen


class _Calls:
    """Single calls of a work group in its compared steps, sorted by kernel and rank."""

    def __init__(self, frame: pd.DataFrame, cells: GroupCells) -> None:
        import pandas as pd

        codes = {key: frame[key].cat.codes.to_numpy().astype(np.int64) for key in _KEYS}
        words = {key: [str(word) for word in frame[key].cat.categories] for key in _KEYS}
        self._ranks = len(cells.group.ranks)
        rank = pd.Index(list(cells.group.ranks)).get_indexer(pd.Index(words["rank"], dtype=object))
        # (category, name) as one number, and which kernel of the cells it is.
        width = max(1, len(words["name"]))
        places = {key: {word: at for at, word in enumerate(words[key])} for key in _KEYS}
        kernel = np.full(len(words["category"]) * width, -1, np.int64)
        for k, (category, name) in enumerate(cells.kernels):
            kernel[places["category"][category] * width + places["name"][name]] = k
        key = kernel[codes["category"] * width + codes["name"]] * self._ranks
        key += rank[codes["rank"]]
        in_group = (rank >= 0)[codes["rank"]]
        if cells.has_steps:
            in_group &= np.isin(frame["step"].to_numpy(np.int64), np.array(cells.steps.numbers))
        self._key = key[in_group]
        self._dur = frame["dur_ns"].to_numpy(np.int64)[in_group]
        self._start = frame["start_ns"].to_numpy(np.int64)[in_group]
        self._step = frame["step"].to_numpy(np.int64)[in_group]
        # One sort of one number is several times faster than a sort by two keys.
        ordered = np.sort((self._key << _DUR_BITS) | np.minimum(self._dur, _DUR_MASK))
        self._sorted_dur = ordered & _DUR_MASK
        edges = np.arange(len(cells.kernels) * self._ranks + 1) << _DUR_BITS
        self._bounds = np.searchsorted(ordered, edges)

    def quantiles(self, kernel: int) -> tuple[list[int], list[list[int] | None]]:
        """Number of calls and the quantiles of their durations, by rank."""
        counts, quantiles = [], []
        for rank in range(self._ranks):
            at = kernel * self._ranks + rank
            calls = self._sorted_dur[self._bounds[at] : self._bounds[at + 1]]
            counts.append(len(calls))
            points = (
                [int(calls[round(q * (len(calls) - 1))]) for q in QUANTILES] if counts[-1] else None
            )
            quantiles.append(points)
        return counts, quantiles

    def by_call(self, kernel: int) -> list[list[int]]:
        """Mean duration of the k-th call in a step, rows k, columns ranks."""
        import pandas as pd

        of_kernel = self._key // self._ranks == kernel
        calls = pd.DataFrame(
            {
                "rank": self._key[of_kernel] % self._ranks,
                "step": self._step[of_kernel],
                "start": self._start[of_kernel],
                "dur": self._dur[of_kernel],
            }
        ).sort_values("start", kind="stable")
        calls["call"] = calls.groupby(["rank", "step"]).cumcount()
        calls = calls[calls["call"] < MAX_CALLS]
        mean = calls.groupby(["call", "rank"])["dur"].mean().unstack("rank")
        full = mean.reindex(columns=range(self._ranks)).fillna(-1).round()
        return [[int(ns) for ns in row] for row in full.to_numpy()]


# Lanes: the activities of a few steps on one time axis.

MAX_STEPS = 8  # of a window
MAX_EVENTS = 160_000  # of a window; steps that do not fit are left out
WORST = 3
NO_MATCH = -1
EDGE_NS = 2_000_000_000  # ns of a window without steps that are shown, from its middle


class Lane(msgspec.Struct, frozen=True, kw_only=True):
    """The activities of one stream of a rank, in order of time; each list has an item for each.

    name: index into `Lanes.names`. start_ns: from the picture's origin. match: the number of
    the collective, the same on all ranks; -1 where there is none.
    """

    rank: str
    stream: int
    name: list[int]
    start_ns: list[int]
    dur_ns: list[int]
    match: list[int]


class Picture(msgspec.Struct, frozen=True, kw_only=True):
    """One step of a work group, or the whole window (step: None).

    why: why it is shown. origin_ns: the earliest start. dropped: activities left out.
    """

    group: str
    ranks: tuple[str, ...]
    step: int | None
    stage: str
    why: tuple[str, ...]
    origin_ns: int
    dropped: Count
    lanes: tuple[Lane, ...]


class Lanes(msgspec.Struct, frozen=True, kw_only=True):
    """names, categories: of the kernels in all pictures. left_out: steps that did not fit."""

    names: tuple[str, ...]
    categories: tuple[str, ...]
    left_out: Count
    steps: tuple[Picture, ...]


def lanes(
    table: KernelTable,
    groups: Sequence[GroupCells],
    *,
    onset_ns: int | None = None,
    steps: Sequence[int] = (),
) -> Lanes:
    """Events of up to 8 chosen steps, as parallel integer lists.

    Of each work group: the steps in which its ranks differ most in compute, the median one,
    and the first that begins after `onset_ns`; or exactly `steps`, where given. A table
    without steps gives one picture of the whole window (its middle, where that is long).
    """
    names: dict[tuple[str, str], int] = {}
    pictures: list[Picture] = []
    room = MAX_EVENTS
    left_out = 0
    # Of all steps: what kind a call is shows in many of them.
    calls = communication(table)
    for cells, number, why in _chosen(groups, _first_after(table, onset_ns), steps):
        rows = _rows(table.frame, cells, number)
        if len(rows) > room and pictures:
            left_out += 1
            continue
        pictures.append(_picture(table, calls, cells, rows, number, why, names, room))
        room -= len(rows)
    return Lanes(
        names=tuple(name for name, _ in names),
        categories=tuple(category for _, category in names),
        left_out=left_out,
        steps=tuple(pictures),
    )


def _chosen(
    groups: Sequence[GroupCells], onset: set[int], steps: Sequence[int]
) -> list[tuple[GroupCells, int | None, list[str]]]:
    each = max(1, MAX_STEPS // max(1, len(groups)))
    chosen = []
    if len(groups) > MAX_STEPS and not steps:  # the page shows the most unequal ones first
        groups = sorted(groups, key=_spread, reverse=True)
    for cells in groups[:MAX_STEPS]:
        if not cells.has_steps:
            why_by_step: dict[int | None, list[str]] = {None: ["the window"]}
        elif steps:
            why_by_step = {number: ["chosen"] for number in steps[:MAX_STEPS]}
        else:
            why_by_step = _notable_steps(cells, onset)
        chosen += [(cells, number, why) for number, why in list(why_by_step.items())[:each]]
    return chosen


def _spread(cells: GroupCells) -> float:
    """By how much of the mean the slowest rank of a group exceeds it."""
    totals = cells.matrix(cells.select("compute")).sum(axis=0)
    return float(totals.max() / mean) if (mean := totals.mean()) else 0.0


def _notable_steps(cells: GroupCells, onset: set[int]) -> dict[int | None, list[str]]:
    """Step number -> why it is shown, the worst first."""
    numbers = cells.steps.numbers
    if not numbers:
        return {}
    matrix = cells.matrix(cells.select("compute"))
    spread = matrix.max(axis=1) - matrix.mean(axis=1)
    order = np.argsort(-spread, kind="stable")
    why_by_step: dict[int | None, list[str]] = {numbers[int(order[0])]: ["worst"]}
    longest = matrix.max(axis=1)
    median = int(np.argsort(longest, kind="stable")[len(longest) // 2])
    why_by_step.setdefault(numbers[median], []).append("median")
    after = next((number for number in numbers if number in onset), None)
    if after is not None:
        why_by_step.setdefault(after, []).append("first after onset")
    for place, at in enumerate(order[1:WORST], start=2):
        why_by_step.setdefault(numbers[int(at)], []).append(f"{_ORDINAL[place]} worst")
    return why_by_step


def _first_after(table: KernelTable, onset_ns: int | None) -> set[int]:
    """The steps that begin at or after the onset; none without one."""
    if onset_ns is None:
        return set()
    return {int(n) for n in table.steps.loc[table.steps["start_ns"] >= onset_ns, "step"]}


_ORDINAL = {2: "second", 3: "third"}


def _rows(frame: pd.DataFrame, cells: GroupCells, number: int | None) -> pd.DataFrame:
    activities = frame[frame["rank"].isin(cells.group.ranks)]
    if number is not None:
        return activities[activities["step"] == number]
    if activities.empty:
        return activities
    middle = (int(activities["start_ns"].min()) + int(activities["start_ns"].max())) // 2
    return activities[(activities["start_ns"] - middle).abs() <= EDGE_NS // 2]


def _picture(
    table: KernelTable,
    calls: pd.DataFrame,
    cells: GroupCells,
    rows: pd.DataFrame,
    number: int | None,
    why: Sequence[str],
    names: dict[tuple[str, str], int],
    room: int,
) -> Picture:
    """One step. Of more than `room` events the shortest are left out."""
    dropped = max(0, len(rows) - room)
    shown = calls[calls.index.isin(rows.index)]
    matched = matched_collectives(table, cells.group.ranks, shown)["match"]
    if dropped:
        rows = rows.nlargest(room, "dur_ns")
    origin = int(rows["start_ns"].min()) if len(rows) else 0
    match = matched.reindex(rows.index).fillna(NO_MATCH).astype(np.int64)
    drawn = []
    rows = rows.assign(match=match).sort_values("start_ns", kind="stable")
    for rank in cells.group.ranks:
        activities = rows[rows["rank"] == rank]
        for stream in np.unique(activities["stream"].to_numpy(np.int64)):
            events = activities[activities["stream"] == stream]
            pairs = zip(events["name"], events["category"], strict=True)
            start = events["start_ns"].to_numpy(np.int64) - origin
            drawn.append(
                Lane(
                    rank=rank,
                    stream=int(stream),
                    name=[names.setdefault((str(n), str(c)), len(names)) for n, c in pairs],
                    start_ns=start.tolist(),
                    dur_ns=events["dur_ns"].tolist(),
                    match=events["match"].tolist(),
                )
            )
    spans = table.steps[table.steps["step"] == number] if number is not None else table.steps[:0]
    return Picture(
        group=cells.group.label,
        ranks=tuple(cells.group.ranks),
        step=number,
        stage=str(spans["stage"].iloc[0]) if len(spans) else "",
        why=tuple(why),
        origin_ns=origin,
        dropped=dropped,
        lanes=tuple(drawn),
    )
