"""Compares the windows of two runs on equal work, stratum by stratum.

A stratum is the steps of a window that do equal work. One run is compared with one other, so
no limit is applied, and repeats are not considered.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import msgspec
import numpy as np
import numpy.typing as npt

from pytest_sglprof._analysis.certainty import Amount, Count, Share
from pytest_sglprof._analysis.imbalance import MIN_ASSIGNED_SHARE, MIN_MATCHED_SHARE
from pytest_sglprof._analysis.times import GroupCells
from pytest_sglprof._metrics import MIN_STEPS
from pytest_sglprof._trace.categories import NOT_COMPUTE
from pytest_sglprof._trace.table import Ints, first_of

if TYPE_CHECKING:
    from pytest_sglprof._trace.table import KernelTable


@dataclass(frozen=True)
class Change:
    """Kernel time before and now, ns per step (or per call), mean of the group's ranks.

    before_ns, now_ns: 0.0 if the run does not have the kernel; None if the run's kernel list
    was truncated, so absence is unknown. share: (now - before) x weight / compute before; the
    weight is 1 for steps, and for calls the mean number of calls of both runs.
    """

    name: str
    category: str
    before_ns: float | None
    now_ns: float | None
    share: float | None = None

    @property
    def ratio(self) -> float | None:
        """now / before; None if either is unknown or there was none before."""
        if self.before_ns is None or self.now_ns is None or self.before_ns <= 0:
            return None
        return self.now_ns / self.before_ns

    @property
    def difference_ns(self) -> float | None:
        """now - before; None if either is unknown."""
        if self.before_ns is None or self.now_ns is None:
            return None
        return self.now_ns - self.before_ns


@dataclass(frozen=True)
class StratumChange:
    """Compute of one stratum, ns per step; None, with 0 steps, in a run without such work."""

    work: StepWork
    before_steps: int
    now_steps: int
    before_ns: float | None
    now_ns: float | None


@dataclass(frozen=True)
class StageChange:
    """A stage of one work group in two runs.

    unit: "step", or "call" if the source has no steps. matched_before, matched_now: share of
    each run's steps of the stage whose stratum the other run has too (by call: share of
    compute in kernels that both have). reason: why the stage cannot be compared, in which case
    compute, categories and kernels are empty; "" if it can. cautions: what the figures do not
    take into account.
    """

    group: str
    stage: str
    unit: str
    matched_before: float
    matched_now: float
    reason: str = ""
    strata: tuple[StratumChange, ...] = ()
    compute: Change | None = None
    categories: tuple[Change, ...] = ()
    kernels: tuple[Change, ...] = ()
    cautions: tuple[str, ...] = ()


def compare_strata(
    before: Sequence[GroupStrata], now: Sequence[GroupStrata]
) -> tuple[StageChange, ...]:
    """Compares every stage of every work group; those with the most steps now come first.

    Strata that both runs have count equally, whatever their numbers of steps, so a different
    mix of batch sizes is not a change. If less than half of either run is matched, the stage
    is not compared.
    """
    old = {group.group: group for group in before}
    new = {group.group: group for group in now}
    stages: list[StageChange] = []
    for label in {**new, **old}:
        stages += _group(label, old.get(label), new.get(label))
    return tuple(sorted(stages, key=lambda stage: -sum(each.now_steps for each in stage.strata)))


def _group(label: str, before: GroupStrata | None, now: GroupStrata | None) -> list[StageChange]:
    if before is None or now is None:
        missing = "the baseline" if before is None else "this run"
        return [StageChange(label, "", "step", 0.0, 0.0, f"{missing} has no such group of ranks")]
    reason = _why_not_comparable(before, now)
    if reason is not None:
        return [StageChange(label, "", "step", 0.0, 0.0, reason)]
    if now.steps is None:
        return [_by_call(before, now)]
    stages = dict.fromkeys([*now.steps, *(before.steps or ())])
    return [_by_step(stage, before, now) for stage in stages]


def _why_not_comparable(before: GroupStrata, now: GroupStrata) -> str | None:
    """Why no stage of the group can be compared; None if they can."""
    if before.ranks != now.ranks:
        return f"other ranks: {', '.join(before.ranks)} before, {', '.join(now.ranks)} now"
    if (before.steps is None) != (now.steps is None):
        without = "the baseline" if before.steps is None else "this run"
        return f"the source of {without} has no steps, that of the other does"
    for which, side in (("the baseline", before), ("this run", now)):
        if side.assigned_share < MIN_ASSIGNED_SHARE:
            return f"less than half of the compute of {which} lies in known steps"
        if not side.strata:
            return f"{which} has no step that can be compared"
    return None


def _by_step(stage: str, before: GroupStrata, now: GroupStrata) -> StageChange:
    old, new = _strata_of(before, stage), _strata_of(now, stage)
    common = [work for work in new if work in old]
    matched_before, matched_now = _matched(before, old, common), _matched(now, new, common)
    listed = [
        StratumChange(
            work,
            old[work].steps if work in old else 0,
            new[work].steps if work in new else 0,
            old[work].compute_ns if work in old else None,
            new[work].compute_ns if work in new else None,
        )
        for work in {**new, **old}
    ]
    reason = ""
    if not old or not new:
        reason = f"only {'this run' if not old else 'the baseline'} has such steps"
    elif min(matched_before, matched_now) < MIN_MATCHED_SHARE:
        reason = (
            f"other work: {matched_before:.0%} of the baseline's and {matched_now:.0%} of this "
            "run's steps have a match, half of each is needed"
        )
    head = (now.group, stage, "step", matched_before, matched_now, reason, tuple(listed))
    if reason:
        return StageChange(*head)
    olds, news = [old[work] for work in common], [new[work] for work in common]
    compute = _change(
        "compute", "compute", _mean(s.compute_ns for s in olds), _mean(s.compute_ns for s in news)
    )
    base = compute.before_ns or 0.0
    names = dict.fromkeys(name for one in (*news, *olds) for name in one.categories)
    categories = [
        _change(
            name,
            name,
            _mean(one.categories.get(name, 0.0) for one in olds),
            _mean(one.categories.get(name, 0.0) for one in news),
            base,
        )
        for name in names
    ]
    kernels = _kernels(_kernel_means(before, olds), _kernel_means(now, news), before, now, base)
    return StageChange(
        *head,
        compute=compute,
        categories=_largest_first(categories),
        kernels=_largest_first(kernels),
        cautions=(*_few_steps(olds, news), *_unknown_work(common)),
    )


def _strata_of(group: GroupStrata, stage: str) -> dict[StepWork, Stratum]:
    return {one.work: one for one in group.strata if one.work.stage == stage}


def _matched(
    group: GroupStrata, by_work: Mapping[StepWork, Stratum], common: Sequence[StepWork]
) -> float:
    """Share of a run's steps that are in `common`; those of strata left out are not."""
    every = sum((group.steps or {}).get(stage, 0) for stage in {work.stage for work in by_work})
    return sum(by_work[work].steps for work in common) / every if every else 0.0


def _few_steps(olds: Sequence[Stratum], news: Sequence[Stratum]) -> tuple[str, ...]:
    before, now = (sum(one.steps for one in side) for side in (olds, news))
    if min(before, now) >= MIN_STEPS:
        return ()
    return (f"Few steps are compared: {before} before, {now} now",)


def _unknown_work(works: Sequence[StepWork]) -> tuple[str, ...]:
    cautions = []
    if any(work.batch == UNKNOWN for work in works):
        cautions.append("The source does not record the batch size of every step")
    if any(work.kv_bucket == UNKNOWN for work in works):
        cautions.append("The source does not record the KV cache lengths of the requests")
    return tuple(cautions)


def _kernel_means(group: GroupStrata, chosen: Sequence[Stratum]) -> dict[str, tuple[str, float]]:
    """Maps kernel names to category and mean time over the strata.

    A name that stands in two categories gets the sum of both.
    """
    means: dict[str, tuple[str, float]] = {}
    for at, (category, name) in enumerate(group.kernels):
        earlier = means[name][1] if name in means else 0.0
        means[name] = (category, earlier + _mean(each.kernels[at] for each in chosen))
    return means


def _kernels(
    old: Mapping[str, tuple[str, float]],
    new: Mapping[str, tuple[str, float]],
    before: GroupStrata,
    now: GroupStrata,
    base: float,
) -> list[Change]:
    changes = []
    for name, (category, _) in {**old, **new}.items():
        was = old[name][1] if name in old else _absent(before)
        became = new[name][1] if name in new else _absent(now)
        if was or became:
            changes.append(_change(name, category, was, became, base))
    return changes


def _absent(group: GroupStrata) -> float | None:
    return None if group.left_out_kernels else 0.0


def _change(
    name: str,
    category: str,
    before: float | None,
    now: float | None,
    base: float = 0.0,
    weight: float = 1.0,
) -> Change:
    share = None
    if before is not None and now is not None and base > 0:
        share = (now - before) * weight / base
    return Change(name, category, before, now, share)


def _by_call(before: GroupStrata, now: GroupStrata) -> StageChange:
    """Compares time per call: without steps, the amount of work in a window is not known."""
    old, new = _call_means(before), _call_means(now)
    common = [name for name in new if name in old]
    weights = {name: (old[name][2] + new[name][2]) / 2 for name in common}
    matched = [
        sum(calls[name][1] * calls[name][2] for name in common if _is_compute(calls[name][0]))
        / max(one.strata[0].compute_ns, 1.0)
        for calls, one in ((old, before), (new, now))
    ]
    head = (now.group, "", "call", matched[0], matched[1])
    if min(matched) < MIN_MATCHED_SHARE:
        return StageChange(
            *head,
            f"other work: {matched[0]:.0%} of the baseline's and {matched[1]:.0%} of this run's "
            "compute is in kernels that both have, half of each is needed",
        )

    def together(names: Iterable[str], title: str, base: float = 0.0) -> Change:
        chosen = list(names)
        was = sum(weights[name] * old[name][1] for name in chosen)
        became = sum(weights[name] * new[name][1] for name in chosen)
        return _change(title, title, was, became, base)

    compute = together((name for name in common if _is_compute(new[name][0])), "compute")
    base = compute.before_ns or 0.0
    categories = [
        together((name for name in common if new[name][0] == category), category, base)
        for category in dict.fromkeys(new[name][0] for name in common)
    ]
    kernels = [
        _change(
            name,
            category,
            old[name][1] if name in old else _absent(before),
            new[name][1] if name in new else _absent(now),
            # A kernel that only one run calls is neither faster nor slower.
            base if name in weights else 0.0,
            weights.get(name, 0.0),
        )
        for name, (category, _, _) in {**old, **new}.items()
    ]
    return StageChange(
        *head,
        compute=compute,
        categories=_largest_first(categories),
        kernels=_largest_first(kernels),
        cautions=(
            "The source has no steps: times per call are compared, whatever their batch size",
        ),
    )


def _call_means(group: GroupStrata) -> dict[str, tuple[str, float, float]]:
    """Maps kernel names to category, ns per call, calls per rank."""
    sums: dict[str, tuple[str, float, float]] = {}
    rows = zip(group.kernels, group.strata[0].kernels, group.calls, strict=True)
    for (category, name), ns, calls in rows:
        _, ns_before, calls_before = sums.get(name, (category, 0.0, 0.0))
        sums[name] = (category, ns_before + ns, calls_before + calls)
    return {name: (c, ns / calls, calls) for name, (c, ns, calls) in sums.items() if calls}


def _largest_first(changes: Iterable[Change]) -> tuple[Change, ...]:
    return tuple(sorted(changes, key=lambda change: (-abs(change.share or 0.0), change.name)))


def _is_compute(category: str) -> bool:
    return category not in NOT_COMPUTE


def _mean(values: Iterable[float]) -> float:
    listed = list(values)
    return sum(listed) / len(listed) if listed else 0.0


# Strata. The compared steps of a window are grouped by the work they do, so that they can be
# compared with another run's window, whatever its mix of batch sizes.


MAX_STRATA = 32  # kept of a work group: those with the most steps
MAX_KERNELS = 300  # kept of a work group: those with the largest kernel time
MIN_KERNELS = 20
MAX_CELLS = 60_000  # strata x kernels kept of a window; 64 groups of 32 strata keep 29 each
UNKNOWN = -1
DIGITS = 3  # decimals kept of a mean in ns
_ROWS = 1_000_000  # of the table that are summed at once, to bound memory
_DECODE = "decode"

Floats = npt.NDArray[np.float64]


class StepWork(msgspec.Struct, frozen=True, order=True):
    """The work of a step; steps of equal work are compared. -1 where it is not known.

    batch: requests, or the padded batch size of the graph that ran, if known. kv_bucket:
    floor(log2(KV tokens per request)). token_bucket: floor(log2(new tokens)); -1 for decode,
    where the batch says the same.
    """

    stage: str
    substage: str
    batch: int
    kv_bucket: int
    token_bucket: int


class Stratum(msgspec.Struct, frozen=True, kw_only=True):
    """Steps of equal work; kernel times are means over these steps and the group's ranks, ns.

    steps: number of steps. kernels: the time of each of `GroupStrata.kernels`, in that order.
    categories, compute_ns: over all kernels, including those that are not listed.
    """

    work: StepWork
    steps: Count
    compute_ns: Amount
    categories: dict[str, Amount]
    kernels: tuple[Amount, ...]


class GroupStrata(msgspec.Struct, frozen=True, kw_only=True):
    """The strata of one work group, the one with the most steps first.

    steps: number of compared steps by stage, including those of strata that are left out; None
    if the source has no steps. Then one stratum, with `steps` 1, holds the whole window, and
    `calls` has the number of calls of each kernel, mean of the ranks. kernels: (category,
    name). assigned_share: share of compute that lies in known steps. left_out_strata,
    left_out_kernels: number beyond the bounds on what is kept.
    """

    group: str
    ranks: tuple[str, ...]
    steps: dict[str, Count] | None
    assigned_share: Share
    kernels: tuple[tuple[str, str], ...]
    strata: tuple[Stratum, ...]
    left_out_strata: Count
    left_out_kernels: Count
    calls: tuple[Amount, ...]


def strata(table: KernelTable, groups: Sequence[GroupCells]) -> tuple[GroupStrata, ...]:
    """The strata of every work group. groups: the result of `sum_times(table)`."""
    room = max(MIN_KERNELS, min(MAX_KERNELS, MAX_CELLS // max(1, len(groups) * MAX_STRATA)))
    return tuple(_group_strata(table, cells, room) for cells in groups)


def _group_strata(table: KernelTable, cells: GroupCells, room: int) -> GroupStrata:
    works = _works(table, cells)
    sizes = Counter(works)
    ordered = sorted(sizes, key=lambda work: (-sizes[work], work))
    shown = ordered[:MAX_STRATA]
    sums, calls = _sums(table, cells, [ordered.index(work) for work in works], len(ordered))
    ranks = len(cells.group.ranks)
    steps = np.array([sizes[work] for work in ordered], dtype=np.int64)
    means = sums / np.maximum(1, steps[:, None] * ranks)
    totals = sums.sum(axis=0)
    order = np.argsort(-totals, kind="stable")[: int((totals > 0).sum())]
    names = dict.fromkeys(category for category, _ in cells.kernels)
    scopes = {name: cells.select(name) for name in names}
    return GroupStrata(
        group=cells.group.label,
        ranks=cells.group.ranks,
        steps=dict(Counter(cells.steps.stages)) if cells.has_steps else None,
        assigned_share=cells.assigned_share,
        kernels=tuple(cells.kernels[k] for k in order[:room]),
        strata=tuple(
            Stratum(
                work=work,
                steps=int(steps[at]),
                compute_ns=_mean_work(means[at][cells.select("compute")].sum()),
                categories={
                    name: _mean_work(means[at][mask].sum()) for name, mask in scopes.items()
                },
                kernels=tuple(map(_mean_work, means[at][order[:room]])),
            )
            for at, work in enumerate(shown)
        ),
        left_out_strata=len(ordered) - len(shown),
        left_out_kernels=max(0, len(order) - room),
        calls=() if cells.has_steps else tuple(float(calls[0, k]) / ranks for k in order[:room]),
    )


def _sums(
    table: KernelTable, cells: GroupCells, of_step: Sequence[int], count: int
) -> tuple[Floats, Floats]:
    """Kernel time (ns) and calls, summed over ranks, each of shape (count, kernels).

    of_step: index of the stratum of each compared step. count: number of strata. The sums are
    whole numbers below 2**53, so float64 is exact.
    """
    frame, width = table.frame, len(cells.kernels)
    words = {key: [str(w) for w in frame[key].cat.categories] for key in ("category", "name")}
    place = {kernel: at for at, kernel in enumerate(cells.kernels)}
    kernel = np.array(
        [[place.get((category, name), UNKNOWN) for name in words["name"]]
         for category in words["category"]]
    ).reshape(len(words["category"]), len(words["name"]))  # fmt: skip
    member = frame["rank"].cat.categories.isin(list(cells.group.ranks))
    numbers = np.array(cells.steps.numbers, np.int64)
    stratum = np.array([*of_step, UNKNOWN], np.int64)  # the last entry is for other steps
    sums = np.zeros((2, count * width))
    for at in range(0, len(frame), _ROWS):
        part = frame.iloc[at : at + _ROWS]
        of_row = np.zeros(len(part), np.int64)
        if cells.has_steps:
            of_row = stratum[first_of(numbers, part["step"].to_numpy(np.int64))]
        which = kernel[part["category"].cat.codes, part["name"].cat.codes]
        chosen = (of_row >= 0) & (which >= 0) & member[part["rank"].cat.codes]
        keys = of_row[chosen] * width + which[chosen]
        sums[0] += np.bincount(keys, part["dur_ns"].to_numpy()[chosen], count * width)
        sums[1] += np.bincount(keys, minlength=count * width)
    return sums[0].reshape(count, width), sums[1].reshape(count, width)


def _works(table: KernelTable, cells: GroupCells) -> list[StepWork]:
    """The work of each compared step; without steps, one entry for the whole window."""
    if not cells.has_steps:
        return [StepWork("", "", UNKNOWN, UNKNOWN, UNKNOWN)]
    steps = table.steps[table.steps["rank"].isin(list(cells.group.ranks))]
    numbers = cells.steps.numbers

    def largest(name: str) -> Ints:
        """Maximum over the ranks: all have the same input, but some may not record it."""
        if name not in steps or steps.empty:
            return np.full(len(numbers), UNKNOWN, np.int64)
        values = steps.groupby("step")[name].max().reindex(list(numbers)).fillna(UNKNOWN)
        return values.to_numpy(np.int64)

    substages = {}
    if "substage" in steps:
        known = steps[steps["substage"].astype(object) != ""]
        substages = known.drop_duplicates("step").set_index("step")["substage"].to_dict()
    names = ("batch_size", "padded_batch", "kv_tokens", "tokens")
    columns = [largest(name).tolist() for name in names]
    works = []
    for number, stage, batch, padded, kv, tokens in zip(
        numbers, cells.steps.stages, *columns, strict=True
    ):
        shape = padded if padded >= 0 else batch
        requests = batch if batch > 0 else shape
        works.append(
            StepWork(
                stage=stage,
                substage=str(substages.get(number, "")),
                batch=shape,
                kv_bucket=_bucket(kv // requests) if kv >= 0 and requests > 0 else UNKNOWN,
                token_bucket=UNKNOWN if stage == _DECODE else _bucket(tokens),
            )
        )
    return works


def _mean_work(ns: float) -> float:
    return round(float(ns), DIGITS)


def _bucket(tokens: int) -> int:
    """floor(log2(tokens)), and 0 for no tokens; -1 if unknown."""
    return UNKNOWN if tokens < 0 else max(1, tokens).bit_length() - 1
