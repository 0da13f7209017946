"""Decide whether files are of one window: of one run, of one time, and each of its own rank.

Kernels of different GPUs or versions differ whoever is slow, and two runs share nothing at all.
So ranks whose files contradict each other (`FACTS` in `_trace.torch.events`) are not compared. A
server that runs on several kinds of GPUs on purpose looks the same: `force` says that one knows.
"""

from __future__ import annotations

import filecmp
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

import numpy as np

from pytest_sglprof._ranks import work_group
from pytest_sglprof._trace.table import NO_SEQUENCE, RankActivities

APART_NS = 60 * 10**9  # between the end of one rank's window and the start of another's
# The same between ranks that wait for each other. Clocks of two machines differ by less, as a rule;
# if they do not, collectives tell, whose ends then differ by always the same.
CLOCKS_NS = 10**9
MIN_COLLECTIVES = 3
SAME_OFFSET_NS = 10**6


def different_runs(parts: Sequence[RankActivities]) -> list[str]:
    """Why these are not the ranks of one window, with the values that say so."""
    facts = []
    for name, ranks in _run_facts(parts).items():
        if len(ranks) > 1:
            values = " and ".join(f"{value} ({rank})" for value, rank in ranks.items())
            facts.append(f"{name} {values}")
    reasons = [f"these files are not of one run: {', '.join(facts)}"] if facts else []
    if apart := _apart(parts):
        reasons.append(f"these files are not of one window: {apart}")
    return [*reasons, *_same_recordings(parts)]


def facts_of_run(parts: Sequence[RankActivities]) -> dict[str, str]:
    """See `KernelTable.run`."""
    return {name: ", ".join(sorted(ranks)) for name, ranks in _run_facts(parts).items()}


def _run_facts(parts: Sequence[RankActivities]) -> dict[str, dict[str, str]]:
    """Of each fact of a run its values, with the first rank that has each."""
    facts: dict[str, dict[str, str]] = {}
    for part in parts:
        for name, value in part.run.items():
            if value:
                facts.setdefault(name, {}).setdefault(value, part.rank)
    return facts


class _Ran(NamedTuple):
    """When a rank ran, by the wall clock, ns. parts: two of them where each stage has a file."""

    start: int
    end: int
    parts: Sequence[RankActivities]


class _Gap(NamedTuple):
    """A time in which no rank ran, between that which ended last and that which begins next."""

    ns: int
    before: _Ran
    after: _Ran


def _apart(parts: Sequence[RankActivities]) -> str:
    groups: dict[tuple[int, ...] | None, list[RankActivities]] = {}
    for part in parts:
        groups.setdefault(work_group(part.rank), []).append(part)
    gaps = [gap for gap in _gaps(parts) if gap.ns > APART_NS]
    gaps += [
        gap
        for group in groups.values()
        for gap in _gaps(group)
        if CLOCKS_NS < gap.ns <= APART_NS and not _only_clocks_differ(gap.before, gap.after)
    ]
    return ", ".join(
        f"{gap.after.parts[0].rank} begins {gap.ns / 1e9:,.0f} s after "
        f"{gap.before.parts[0].rank} ended"
        for gap in gaps
    )


def _gaps(parts: Sequence[RankActivities]) -> list[_Gap]:
    of_rank: dict[str, list[RankActivities]] = {}
    for part in parts:
        if part.is_timeline and len(part.start) and part.clock_ns is not None:
            of_rank.setdefault(part.rank, []).append(part)
    gaps: list[_Gap] = []
    latest: _Ran | None = None  # of those that began so far, which one ended last
    for ran in sorted(map(_ran, of_rank.values()), key=lambda ran: ran[:2]):
        if latest is not None and ran.start > latest.end:
            gaps.append(_Gap(ran.start - latest.end, latest, ran))
        if latest is None or ran.end > latest.end:
            latest = ran
    return gaps


def _ran(parts: Sequence[RankActivities]) -> _Ran:
    starts = [int(part.start.min()) + (part.clock_ns or 0) for part in parts]
    ends = [int((part.start + part.dur).max()) + (part.clock_ns or 0) for part in parts]
    return _Ran(min(starts), max(ends), parts)


def _only_clocks_differ(one: _Ran, other: _Ran) -> bool:
    """Whether both took part in the same collectives, whose ends differ by always the same."""
    before, after = _ends_of_collectives(one.parts), _ends_of_collectives(other.parts)
    offsets = [after[key] - before[key] for key in before.keys() & after.keys()]
    if len(offsets) < MIN_COLLECTIVES:
        return False
    low, high = np.percentile(offsets, [25, 75])
    return bool(high - low < SAME_OFFSET_NS)


def _ends_of_collectives(parts: Sequence[RankActivities]) -> dict[tuple[str, int], int]:
    """When each numbered collective ended, by its process group and number; ns."""
    ends: dict[tuple[str, int], int] = {}
    for part in parts:
        if part.calls is not None:
            rows = part.calls.row
            times = (part.start[rows] + part.dur[rows]).tolist()
            keys = zip(part.calls.group, part.calls.sequence.tolist(), strict=True)
            pairs = zip(keys, times, strict=True)
            ends |= {key: time for key, time in pairs if key[1] != NO_SEQUENCE}
    return ends


def _same_recordings(parts: Sequence[RankActivities]) -> list[str]:
    ranks: dict[str, list[str]] = {}
    for part in parts:
        if part.recording and part.rank not in ranks.setdefault(part.recording, []):
            ranks[part.recording].append(part.rank)
    return [
        f"{' and '.join(labels)} are of one recording ({recording})"
        for recording, labels in ranks.items()
        if len(labels) > 1
    ]


def copies(files: Sequence[Path]) -> list[str]:
    """Which files have the same contents under two names; folders are not looked into."""
    by_size: dict[int, list[Path]] = {}
    for file in files:
        if file.is_file():
            by_size.setdefault(file.stat().st_size, []).append(file)
    return [
        f"{first.name} and {second.name} have the same contents"
        for same in by_size.values()
        for first, second in combinations(same, 2)
        if first != second and filecmp.cmp(first, second, shallow=False)
    ]


def by_force(reasons: Sequence[str]) -> list[str]:
    """The notes that stand for reasons which somebody said not to count."""
    return [f"compared by --force although {reason}" for reason in reasons]
