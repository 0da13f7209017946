"""Decide whether files are of one window: of one run, of one time, and each of its own rank.

Kernels of different GPUs or versions differ whoever is slow, and two runs share nothing at all.
So ranks whose files contradict each other (`FACTS` in `_trace.torch.events`) are not compared. A
server that runs on several kinds of GPUs on purpose looks the same: `force` says that one knows.
"""

from __future__ import annotations

import filecmp
from collections.abc import Sequence
from itertools import combinations, pairwise
from pathlib import Path

from pytest_sglprof._trace.table import RankActivities

APART_NS = 60 * 10**9  # between the end of one rank's window and the start of another's: two
# nodes whose clocks are seconds apart can still have recorded one window


def different_runs(parts: Sequence[RankActivities]) -> list[str]:
    """Why these are not the ranks of one window, with the values that say so."""
    facts = []
    for name in dict.fromkeys(name for part in parts for name in part.run):
        ranks: dict[str, str] = {}  # the first rank with each value
        for part in parts:
            if value := part.run.get(name):
                ranks.setdefault(value, part.rank)
        if len(ranks) > 1:
            values = " and ".join(f"{value} ({rank})" for value, rank in ranks.items())
            facts.append(f"{name} {values}")
    reasons = [f"these files are not of one run: {', '.join(facts)}"] if facts else []
    if apart := _apart(parts):
        reasons.append(f"these files are not of one window: {apart}")
    return reasons


def _apart(parts: Sequence[RankActivities]) -> str:
    spans = sorted(
        (int(part.start.min()), int((part.start + part.dur).max()), part.rank)
        for part in parts
        if part.is_timeline and len(part.start)
    )
    for (_, end, before), (start, _, after) in pairwise(spans):
        if start - end > APART_NS:
            return f"{after} begins {(start - end) / 1e9:,.0f} s after {before} ended"
    return ""


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
