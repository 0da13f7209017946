"""Compares the windows of two runs on equal work, stratum by stratum.

A stratum is the steps of a window that do equal work. One run is compared with one other, so
no limit is applied, and repeats are not considered.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from msgspec.structs import replace as replace_struct

from pytest_sglprof._analysis.imbalance import MIN_ASSIGNED_SHARE, MIN_MATCHED_SHARE
from pytest_sglprof._analysis.strata import UNKNOWN, GroupStrata, StepWork, Stratum
from pytest_sglprof._metrics import MIN_STEPS
from pytest_sglprof._trace.categories import NOT_COMPUTE

MIN_CALLS_CHANGE = 0.02  # of the calls of a kernel; smaller ones are steps that differ a little


@dataclass(frozen=True)
class Change:
    """Kernel time before and now, ns per step (or per call), mean of the group's ranks.

    before_ns, now_ns: 0.0 if the run does not have the kernel; None if the run's kernel list
    was truncated, so absence is unknown. share: (now - before) x weight / compute before; the
    weight is 1 for steps, and for calls the mean number of calls of both runs. before_calls,
    now_calls: calls of a kernel per step (or per window); None if unknown.
    """

    name: str
    category: str
    before_ns: float | None
    now_ns: float | None
    share: float | None = None
    before_calls: float | None = None
    now_calls: float | None = None

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

    @property
    def changes_calls(self) -> bool:
        """Whether both runs call it, and not equally often."""
        before, now = self.before_calls, self.now_calls
        if not before or not now:
            return False
        return abs(now - before) > MIN_CALLS_CHANGE * before


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


_Mean = tuple[str, float, float | None]  # category, ns and calls per step


def _kernel_means(group: GroupStrata, chosen: Sequence[Stratum]) -> dict[str, _Mean]:
    """Maps kernel names to category, mean time and calls over the strata.

    A name that stands in two categories gets the sum of both.
    """
    means: dict[str, _Mean] = {}
    for at, (category, name) in enumerate(group.kernels):
        _, ns, calls = means.get(name, (category, 0.0, 0.0))
        listed = [each.calls[at] for each in chosen if each.calls is not None]
        is_known = calls is not None and len(listed) == len(chosen)
        means[name] = (
            category,
            ns + _mean(each.kernels[at] for each in chosen),
            (calls or 0.0) + _mean(listed) if is_known else None,
        )
    return means


def _kernels(
    old: Mapping[str, _Mean],
    new: Mapping[str, _Mean],
    before: GroupStrata,
    now: GroupStrata,
    base: float,
) -> list[Change]:
    changes = []
    for name, (category, _, _) in {**old, **new}.items():
        _, was, calls_before = old.get(name, (category, _absent(before), _absent(before)))
        _, became, calls_now = new.get(name, (category, _absent(now), _absent(now)))
        if was or became:
            change = _change(name, category, was, became, base)
            changes.append(replace(change, before_calls=calls_before, now_calls=calls_now))
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
        replace(
            _change(
                name,
                category,
                old[name][1] if name in old else _absent(before),
                new[name][1] if name in new else _absent(now),
                # A kernel that only one run calls is neither faster nor slower.
                base if name in weights else 0.0,
                weights.get(name, 0.0),
            ),
            before_calls=old[name][2] if name in old else _absent(before),
            now_calls=new[name][2] if name in new else _absent(now),
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


def mean_strata(lives: Sequence[Sequence[GroupStrata]]) -> tuple[GroupStrata, ...]:
    """The mean of several server lives, over the kinds of steps that all of them have.

    A kernel that a life does not list took no time there.
    """
    if len(lives) == 1:
        return tuple(lives[0])
    means = []
    for first in lives[0]:
        same = [each for groups in lives for each in groups if each.group == first.group]
        if len(same) == len(lives) and all(each.ranks == first.ranks for each in same):
            means.append(_mean_group(same))
    return tuple(means)


def _mean_group(same: Sequence[GroupStrata]) -> GroupStrata:
    first = same[0]
    kernels = tuple(dict.fromkeys(kernel for each in same for kernel in each.kernels))
    by_work = [{one.work: one for one in each.strata} for each in same]
    works = [one.work for one in first.strata if all(one.work in each for each in by_work)]
    strata = []
    for work in works:
        ones = [each[work] for each in by_work]
        names = dict.fromkeys(name for one in ones for name in one.categories)
        rows = [
            dict(zip(each.kernels, one.kernels, strict=True))
            for each, one in zip(same, ones, strict=True)
        ]
        calls = [
            dict(zip(each.kernels, one.calls or each.calls, strict=True))
            for each, one in zip(same, ones, strict=True)
            if one.calls or each.calls
        ]
        strata.append(
            Stratum(
                work=work,
                steps=min(one.steps for one in ones),
                compute_ns=_mean(one.compute_ns for one in ones),
                categories={
                    name: _mean(one.categories.get(name, 0.0) for one in ones) for name in names
                },
                kernels=tuple(_mean(row.get(kernel, 0.0) for row in rows) for kernel in kernels),
                calls=tuple(_mean(row.get(kernel, 0.0) for row in calls) for kernel in kernels)
                if len(calls) == len(ones)
                else None,
            )
        )
    has_steps = first.steps is not None
    counts: Counter[str] = Counter()
    for one in strata:
        counts[one.work.stage] += one.steps
    return replace_struct(
        first,
        steps=dict(counts) if has_steps else None,
        assigned_share=min(each.assigned_share for each in same),
        kernels=kernels,
        strata=tuple(strata),
        left_out_kernels=max(each.left_out_kernels for each in same),
        calls=() if has_steps or not strata else strata[0].calls or (),
    )
