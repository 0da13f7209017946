"""One number of each server life for a figure, over the kinds of steps that all of them have.

Lives are compared on equal work only: each kind of step that every one of them has weighs
equally, whatever its number of steps. A figure of steps is in ns a step; one of the load as in
`LoadFigures`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from msgspec.structs import replace

from pytest_sglprof._analysis.imbalance import MIN_ASSIGNED_SHARE, MIN_MATCHED_SHARE
from pytest_sglprof._analysis.strata import UNKNOWN, GroupStrata, StepWork, Stratum
from pytest_sglprof._baselines.records import LifeRecord, LoadFigures
from pytest_sglprof._limits import matching
from pytest_sglprof._trace.categories import NOT_COMPUTE

Floats = npt.NDArray[np.float64]
COMMUNICATION = "communication"
PASS_WALL, IDLE_SHARE = "pass_wall", "idle_share"
_OF_LOAD = re.compile(r"(ttft|tpot|itl|e2e)_.+|.+_throughput|goodput|accept_length")
Kind = tuple[str, StepWork]  # label of the work group, work of the steps


@dataclass(frozen=True)
class Figure:
    """What is compared between lives.

    name: a scope ("compute"; "communication": the transfer without waits; "all") or category, ns a
    step; `pass_wall`, ns; `idle_share`, 0 to 1; or a figure of the load. kernel: a regular
    expression searched in normalised names, instead of the scope. stage: of the steps, "" for all.
    """

    name: str
    kernel: str = ""
    stage: str = ""

    @property
    def is_of_load(self) -> bool:
        """Whether the load driver measured it."""
        return not self.kernel and _OF_LOAD.fullmatch(self.name) is not None


class KernelMatrix(NamedTuple):
    """Kernels of lives: (category, name), and of each life what is typical of their time (ns) and
    calls a step, mean of the shared kinds of steps, shape (lives, kernels).

    0 where a life does not have the kernel; NaN where its list was cut, so that this is not known.
    """

    names: tuple[tuple[str, str], ...]
    ns: Floats
    calls: Floats


def life_values(records: Sequence[LifeRecord], figure: Figure) -> list[float | None] | str:
    """The figure of each life, None where it has none; else why they cannot be compared."""
    if figure.is_of_load:
        return [_of_load(record.load, figure.name) for record in records]
    lives = shared(records, figure.stage)
    if isinstance(lives, str):
        return lives
    if figure.name == IDLE_SHARE and not figure.kernel:
        idle = _means(lives, lambda _, stratum: stratum.idle_ns)
        wall = _means(lives, lambda _, stratum: stratum.wall_ns)
        return [None if not w or i is None else i / w for i, w in zip(idle, wall, strict=True)]
    return _means(lives, lambda group, stratum: _of_kind(group, stratum, figure))


def kernel_matrix(
    records: Sequence[LifeRecord], stage: str = "", *, with_communication: bool = False
) -> KernelMatrix | str:
    """All kernels of these lives; else why they cannot be compared.

    with_communication: otherwise without collectives, whose time is mostly that of waiting.
    """
    lives = shared(records, stage)
    if isinstance(lives, str):
        return lives
    names: dict[str, str] = {}  # of the newest life: patterns may move a kernel to another category
    for life in lives:
        names |= {name: category for group, _ in life for category, name in group.kernels}
    if not with_communication:
        names = {name: word for name, word in names.items() if word != COMMUNICATION}
    place = {name: at for at, name in enumerate(names)}
    figures = np.zeros((2, len(lives), len(names)))
    for row, life in enumerate(lives):
        for group, stratum in life:
            listed = [
                (at, place[name]) for at, (_, name) in enumerate(group.kernels) if name in place
            ]
            if group.left_out_kernels:
                absent = sorted(set(place.values()) - {to for _, to in listed})
                figures[:, row, absent] = np.nan
            calls = stratum.calls or (0.0,) * len(group.kernels)
            for at, to in listed:
                figures[:, row, to] += (stratum.kernels[at], calls[at])
        figures[:, row] /= len(life)
    kept = (np.nan_to_num(figures[0]) > 0).any(axis=0)
    return KernelMatrix(
        names=tuple((names[name], name) for name, at in place.items() if kept[at]),
        ns=figures[0][:, kept],
        calls=figures[1][:, kept],
    )


def why_load_does_not_count(load: LoadFigures | None) -> str:
    """Why the figures of a life's load must not be compared; "" if they may be."""
    if load is None:
        return "no load was complete before its first window"
    if load.driven == "unlimited":
        return "its load was sent as fast as possible, not at a fixed rate or concurrency"
    if load.completed < load.requested:
        return f"{load.requested - load.completed} of {load.requested} requests did not complete"
    return "its requests waited longer and longer" if load.queue_grows else ""


def _of_load(load: LoadFigures | None, name: str) -> float | None:
    if load is None or why_load_does_not_count(load):
        return None
    return load.figures.get(name)


Life = list[tuple[GroupStrata, Stratum]]  # the shared kinds of one life, in one order for all


def shared(records: Sequence[LifeRecord], stage: str = "") -> list[Life] | str:
    """Of each life the kinds of steps that all of them have; else why there are none."""
    if reason := _why_not(records):
        return reason
    lives = [_kinds(record, stage) for record in _by_call(records)]
    common = list(lives[0]) if lives else []
    for life, record in zip(lives, records, strict=True):
        before, common = common, [kind for kind in common if kind in life]
        if not common:
            return _nothing_shared(before, list(life), record, stage)
    return [[life[kind] for kind in common] for life in lives]


def _kinds(record: LifeRecord, stage: str) -> dict[Kind, tuple[GroupStrata, Stratum]]:
    return {
        (group.group, stratum.work): (group, stratum)
        for group in record.groups
        for stratum in group.strata
        if stage in ("", stratum.work.stage)
    }


def time_of_kinds(record: LifeRecord, stage: str = "") -> dict[Kind, float]:
    """The compute time of all steps of each kind, ns."""
    kinds = _kinds(record, stage).items()
    return {kind: stratum.steps * stratum.compute_ns for kind, (_, stratum) in kinds}


class Covered(NamedTuple):
    """How much of the steps of lives is compared.

    shares: of each life, of the time of its steps, in kinds that all lives have. others: kinds
    that not all have, in words; the one that takes most comes first.
    """

    shares: tuple[float, ...]
    others: str


def covered(records: Sequence[LifeRecord], stage: str = "") -> Covered:
    """How much of these lives `life_values` compares."""
    times = [time_of_kinds(record, stage) for record in records]
    common = set.intersection(*map(set, times))
    shares = []
    others: dict[Kind, float] = {}
    for life in times:
        total = sum(life.values()) or 1.0
        shares.append(sum(life[kind] for kind in common) / total)
        for kind in life.keys() - common:
            others[kind] = others.get(kind, 0.0) + life[kind] / total
    ordered = sorted(others, key=lambda kind: (-others[kind], kind))
    return Covered(tuple(shares), _words(ordered) if ordered else "")


def _why_not(records: Sequence[LifeRecord]) -> str:
    """Why lives cannot be compared, whatever their steps; "" if they can."""
    seen: dict[str, tuple[GroupStrata, LifeRecord]] = {}
    for record in records:
        if record.apart:
            return f"life {record.id} is kept apart: {record.apart}"
        for group in record.groups:
            if group.assigned_share < MIN_ASSIGNED_SHARE:
                return f"less than half of the compute of life {record.id} lies in known steps"
            other, of = seen.setdefault(group.group, (group, record))
            if other.ranks != group.ranks:
                here, there = (", ".join(each.ranks) for each in (group, other))
                return f"other ranks: {there} in life {of.id}, {here} in life {record.id}"
            if (other.steps is None) != (group.steps is None):
                without, having = (record, of) if group.steps is None else (of, record)
                return f"the traces of life {without.id} have no steps, those of {having.id} do"
    return ""


def _nothing_shared(before: list[Kind], now: list[Kind], record: LifeRecord, stage: str) -> str:
    of_stage = f"{stage} step" if stage else "step"
    if any(group.steps is None for group in record.groups):
        if stage:
            return f"the traces of life {record.id} have no steps, so none are {of_stage}s"
        return (
            f"less than half of the compute of life {record.id} is in kernels that all lives have"
        )
    if not now:
        return f"life {record.id} has no kind of {of_stage} with enough steps"
    return (
        f"no kind of {of_stage} is in all lives: {_words(now)} in life {record.id}, "
        f"{_words(before)} in those before it"
    )


def _words(kinds: Sequence[Kind]) -> str:
    """`decode of 4 requests`; the first three of them."""
    names = list(dict.fromkeys(describe(work) for _, work in kinds))
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def describe(work: StepWork) -> str:
    """`decode of 4 requests, 1024 to 2047 KV tokens each`."""
    parts = [work.substage or work.stage or "the whole window"]
    if work.batch != UNKNOWN:
        parts[0] += f" of {work.batch} request{'s' * (work.batch != 1)}"
    for bucket, what in ((work.kv_bucket, "KV tokens each"), (work.token_bucket, "new tokens")):
        if bucket != UNKNOWN:
            parts.append(f"{2**bucket} to {2 ** (bucket + 1) - 1} {what}")
    return ", ".join(parts)


def _means(
    lives: Sequence[Life], figure: Callable[[GroupStrata, Stratum], float | None]
) -> list[float | None]:
    """Mean over the kinds of steps of each life; None where one of them is not known.

    Kinds of which no life knows it, such as drafts, whose time is that of their iteration, are
    left out.
    """
    table = [[figure(*each) for each in life] for life in lives]
    kinds = len(lives[0]) if lives else 0
    kept = [at for at in range(kinds) if any(row[at] is not None for row in table)]
    means: list[float | None] = []
    for row in table:
        known = [value for at in kept if (value := row[at]) is not None]
        means.append(sum(known) / len(known) if known and len(known) == len(kept) else None)
    return means


def _of_kind(group: GroupStrata, stratum: Stratum, figure: Figure) -> float | None:
    if figure.kernel:
        matches = matching(figure.kernel, (name for _, name in group.kernels))
        rows = zip(group.kernels, stratum.kernels, strict=True)
        chosen = [ns for (_, name), ns in rows if name in matches]
        return sum(chosen) if chosen or not group.left_out_kernels else None
    if figure.name == "compute":
        return stratum.compute_ns
    if figure.name == "all":
        return sum(stratum.categories.values())
    if figure.name == COMMUNICATION:
        return stratum.transfer_ns
    if figure.name == PASS_WALL:
        return stratum.wall_ns
    return stratum.categories.get(figure.name, 0.0)


# Without steps, the amount of work in a window is not known: calls are compared.


def _by_call(records: Sequence[LifeRecord]) -> list[LifeRecord]:
    """The records, in which groups without steps hold the time of equal numbers of calls.

    Each kernel that all lives have is called as often as in the mean of them.
    """
    without = {g.group for record in records for g in record.groups if g.steps is None}
    changed = {
        label: _equal_calls([_group(record, label) for record in records]) for label in without
    }
    lives = []
    for at, record in enumerate(records):
        groups = [changed[g.group][at] if g.group in changed else g for g in record.groups]
        lives.append(replace(record, groups=tuple(g for g in groups if g is not None)))
    return lives


def _group(record: LifeRecord, label: str) -> GroupStrata | None:
    return next((each for each in record.groups if each.group == label and each.strata), None)


def _equal_calls(groups: Sequence[GroupStrata | None]) -> list[GroupStrata | None]:
    """None for a life without the group, and where half of its compute is in no common kernel."""
    known = [_per_call(group) for group in groups if group is not None]
    common = [name for name in known[0] if all(name in each for each in known)] if known else []
    calls = {name: sum(each[name][1] for each in known) / len(known) for name in common}
    return [None if group is None else _of_calls(group, calls) for group in groups]


def _of_calls(group: GroupStrata, calls: dict[tuple[str, str], float]) -> GroupStrata | None:
    by_call = _per_call(group)
    ns = {name: by_call[name][0] * number for name, number in calls.items()}
    matched = sum(by_call[name][0] * by_call[name][1] for name in ns if name[0] not in NOT_COMPUTE)
    (stratum,) = group.strata
    if matched < MIN_MATCHED_SHARE * stratum.compute_ns:
        return None
    categories: dict[str, float] = {}
    for (category, _), value in ns.items():
        categories[category] = categories.get(category, 0.0) + value
    return replace(
        group,
        kernels=tuple(ns),
        calls=tuple(calls.values()),
        left_out_kernels=max(1, group.left_out_kernels),  # those that not all lives have
        strata=(
            replace(
                stratum,
                kernels=tuple(ns.values()),
                calls=tuple(calls.values()),
                categories=categories,
                compute_ns=sum(v for name, v in categories.items() if name not in NOT_COMPUTE),
            ),
        ),
    )


def _per_call(group: GroupStrata) -> dict[tuple[str, str], tuple[float, float]]:
    """ns a call, and calls, of each kernel."""
    rows = zip(group.kernels, group.strata[0].kernels, group.calls, strict=True)
    return {name: (ns / calls, calls) for name, ns, calls in rows if calls}
