"""One run's window against another's: the same work before and now, stratum by stratum.

One run against one run: there is no verdict here, and no statistics over repeats.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from pytest_sglprof.analysis.imbalance import MIN_ASSIGNED_SHARE, MIN_MATCHED_SHARE
from pytest_sglprof.analysis.strata import UNKNOWN, GroupStrata, StepWork, Stratum
from pytest_sglprof.metrics import MIN_STEPS
from pytest_sglprof.trace.kernels import NOT_COMPUTE


@dataclass(frozen=True)
class Change:
    """Kernel time before and now, ns a step (or a call), mean of the group's ranks.

    before_ns, now_ns: 0.0 where that run has none; None where it has more kernels than it
    lists, so that this one may be among the others. share: (now - before) x weight / compute
    before, where weight is 1 for steps and for calls the mean number of calls of both runs.
    """

    name: str
    category: str
    before_ns: float | None
    now_ns: float | None
    share: float | None = None

    @property
    def ratio(self) -> float | None:
        """now / before; None where either is unknown or there was none before."""
        if self.before_ns is None or self.now_ns is None or self.before_ns <= 0:
            return None
        return self.now_ns / self.before_ns

    @property
    def difference_ns(self) -> float | None:
        """now - before; None where either is unknown."""
        if self.before_ns is None or self.now_ns is None:
            return None
        return self.now_ns - self.before_ns


@dataclass(frozen=True)
class StratumChange:
    """Compute of one stratum, ns a step; None and 0 steps where a run has no such work."""

    work: StepWork
    before_steps: int
    now_steps: int
    before_ns: float | None
    now_ns: float | None


@dataclass(frozen=True)
class StageChange:
    """A stage of one work group in two runs.

    unit: "step", or "call" where the source tells no steps. matched_before, matched_now: share
    of each run's steps of the stage whose stratum the other has too (by call: share of compute
    in kernels that both have). reason: why it is inconclusive; "" where it is not, else there
    are no kernels and categories. cautions: what the figures do not take into account.
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
    """Every stage of every work group, those with the most steps now first.

    Strata that both have count equally, whatever their numbers of steps: so another mix of
    batch sizes is no difference. Less than half matched in either run is inconclusive.
    """
    old = {group.group: group for group in before}
    new = {group.group: group for group in now}
    found: list[StageChange] = []
    for label in {**new, **old}:
        found += _group(label, old.get(label), new.get(label))
    return tuple(sorted(found, key=lambda stage: -sum(one.now_steps for one in stage.strata)))


def _group(label: str, before: GroupStrata | None, now: GroupStrata | None) -> list[StageChange]:
    if before is None or now is None:
        missing = "the baseline" if before is None else "this run"
        return [StageChange(label, "", "step", 0.0, 0.0, f"{missing} has no such group of ranks")]
    reason = _other_ground(before, now)
    if reason:
        return [StageChange(label, "", "step", 0.0, 0.0, reason)]
    if now.steps is None:
        return [_by_call(before, now)]
    stages = dict.fromkeys([*now.steps, *(before.steps or ())])
    return [_by_step(stage, before, now) for stage in stages]


def _other_ground(before: GroupStrata, now: GroupStrata) -> str:
    """Why the group cannot be compared at all; "" where it can."""
    if before.ranks != now.ranks:
        return f"other ranks: {', '.join(before.ranks)} before, {', '.join(now.ranks)} now"
    if (before.steps is None) != (now.steps is None):
        without = "the baseline" if before.steps is None else "this run"
        return f"the source of {without} tells no steps, that of the other does"
    for which, side in (("the baseline", before), ("this run", now)):
        if side.assigned_share < MIN_ASSIGNED_SHARE:
            return f"of {which} less than half of compute lies in known steps"
        if not side.strata:
            return f"{which} has no step that could be compared"
    return ""


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
    group: GroupStrata, mine: Mapping[StepWork, Stratum], common: Sequence[StepWork]
) -> float:
    """Steps of strata that were left out count as unmatched."""
    every = sum((group.steps or {}).get(stage, 0) for stage in {one.stage for one in mine})
    return sum(mine[work].steps for work in common) / every if every else 0.0


def _few_steps(olds: Sequence[Stratum], news: Sequence[Stratum]) -> tuple[str, ...]:
    before, now = (sum(one.steps for one in side) for side in (olds, news))
    if min(before, now) >= MIN_STEPS:
        return ()
    return (f"Few steps are compared: {before} before, {now} now",)


def _unknown_work(works: Sequence[StepWork]) -> tuple[str, ...]:
    found = []
    if any(work.batch == UNKNOWN for work in works):
        found.append("The source does not tell the batch size of every step")
    if any(work.kv_bucket == UNKNOWN for work in works):
        found.append("The source does not tell how long the KV cache of the requests was")
    return tuple(found)


def _kernel_means(group: GroupStrata, chosen: Sequence[Stratum]) -> dict[str, tuple[str, float]]:
    """By name its category and its mean over the strata; names may stand in two categories."""
    found: dict[str, tuple[str, float]] = {}
    for at, (category, name) in enumerate(group.kernels):
        earlier = found[name][1] if name in found else 0.0
        found[name] = (category, earlier + _mean(one.kernels[at] for one in chosen))
    return found


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
    """Time a call: windows of unknown lengths hold unknown amounts of work, calls do not."""
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
            # A kernel that only one run calls is no slower or faster one.
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
            "The source tells no steps: the time of a call is compared, whatever batch it was for",
        ),
    )


def _call_means(group: GroupStrata) -> dict[str, tuple[str, float, float]]:
    """By name: category, ns a call, calls a rank."""
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
