"""What the page draws of ranks with different input: bars of the cost and of each rank.

Places on a bar are percents of its width, so that templates only place them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pytest_sglprof._analysis.sync import RankSplit, SyncCost, SyncFinding
from pytest_sglprof._ranks import short_labels
from pytest_sglprof._report.page.jinja import NONE, in_percent
from pytest_sglprof._verdict.sync import (
    COST_PARTS,
    cost_words,
    heads_words,
    in_order,
    microseconds,
    passes_words,
    ratio_words,
    reach_words,
    share_words,
)

SPLIT_PARTS = ("load", "speed", "rest", "not known")
THIN_ABOVE = 24  # ranks: then only those at the ends have a row with text
LABELLED = (8, 4)  # of many ranks, at the top and at the bottom


@dataclass(frozen=True)
class Segment:
    """A piece of a bar. part: its class in the style sheet. left, width: percents of the bar."""

    part: str
    left: float
    width: float


@dataclass(frozen=True)
class CostBar:
    """The wall of all passes and ranks. words: all of it; key: part and its share in words."""

    words: str
    segments: tuple[Segment, ...]
    key: tuple[tuple[str, str, str], ...]


@dataclass(frozen=True)
class SyncRow:
    """A rank. is_thin: only its bar is shown. words: what the bar shows; figures: of the table
    of all ranks, in its order."""

    rank: str
    name: str
    is_latest: bool
    is_thin: bool
    difference: str
    segments: tuple[Segment, ...]
    words: str
    ratio: str
    waited: str
    figures: tuple[str, ...]


@dataclass(frozen=True)
class SyncPicture:
    """One sync group. zero: where a difference of 0 is, in percent; low, high: the ends of the
    scale in words, "" where there is no room for it. cost: None where it is not known. heads: of
    waiting before a pass by two measures, "" without the second."""

    finding: SyncFinding
    cost: CostBar | None
    cost_words: str
    passes: str
    heads: str
    zero: float
    low: str
    high: str
    rows: tuple[SyncRow, ...]

    @property
    def thin(self) -> int:
        """How many rows have no text."""
        return sum(row.is_thin for row in self.rows)


def sync_pictures(findings: Sequence[SyncFinding]) -> list[SyncPicture] | None:
    """A picture of each sync group; None without any."""
    return [_picture(finding) for finding in findings] or None


def _picture(finding: SyncFinding) -> SyncPicture:
    ranks = in_order(finding.ranks)
    names = short_labels([each.rank for each in ranks])
    parts = [_parts(each) for each in ranks]
    low = min([0.0, *(sum(min(ns, 0.0) for ns in each.values()) for each in parts)])
    high = max([0.0, *(sum(max(ns, 0.0) for ns in each.values()) for each in parts)])
    span = (high - low) or 1.0
    first, last = LABELLED
    is_long = len(ranks) > THIN_ABOVE
    return SyncPicture(
        finding=finding,
        cost=_cost_bar(finding.cost),
        cost_words=cost_words(finding.cost),
        passes=passes_words(finding),
        heads=heads_words(finding.heads) if finding.heads else "",
        zero=-100 * low / span,
        low=microseconds(low) if -low > 0.2 * span else "",
        high=microseconds(high) if high > 0.2 * span else "",
        rows=tuple(
            _row(
                rank,
                names[rank.rank],
                _segments(of_rank, low, span),
                is_latest=rank.rank == finding.latest,
                is_thin=is_long and first <= at < len(ranks) - last,
            )
            for at, (rank, of_rank) in enumerate(zip(ranks, parts, strict=True))
        ),
    )


def _cost_bar(cost: SyncCost | None) -> CostBar | None:
    if cost is None:
        return None
    left, segments, key = 0.0, [], []
    for name, what in COST_PARTS:
        share = getattr(cost, name)
        key.append((name, what, share_words(share)))
        if share:
            segments.append(Segment(name, left, 100 * share))
            left += 100 * share
    return CostBar(cost_words(cost), tuple(segments), tuple(key))


def _parts(rank: RankSplit) -> dict[str, float]:
    """The parts of a rank's difference that are drawn, ns a pass."""
    known = (rank.load.ns, rank.speed.ns, rank.rest.ns, rank.unknown_ns)
    return dict(zip(SPLIT_PARTS, known, strict=True))


def _segments(parts: dict[str, float], low: float, span: float) -> tuple[Segment, ...]:
    """More to the right of 0, less to the left, in the order of the parts from 0 on."""
    less = more = 0.0
    segments = []
    for name, ns in parts.items():
        begin = more if ns > 0 else less + ns
        more, less = more + max(ns, 0.0), less + min(ns, 0.0)
        if ns:
            left, width = 100 * (begin - low) / span, 100 * abs(ns) / span
            segments.append(Segment(name.replace(" ", "-"), left, width))
    return tuple(segments)


def _row(
    rank: RankSplit, name: str, segments: tuple[Segment, ...], *, is_latest: bool, is_thin: bool
) -> SyncRow:
    has_load, has_speed = rank.is_load_known, rank.is_speed_known
    figures = {
        "load": _with_reach(rank, "load") if has_load else NONE,
        "speed": _with_reach(rank, "speed") if has_speed else NONE,
        "rest": _with_reach(rank, "rest") if has_load else NONE,
        "not known": microseconds(rank.unknown_ns),
    }
    difference = microseconds(rank.difference_ns)
    ratio, reach = ratio_words(rank)
    ratio = ratio.removesuffix("x")
    waited = in_percent(rank.waits_for)
    listed = ", ".join(f"{part} {words}" for part, words in figures.items())
    return SyncRow(
        rank=rank.rank,
        name=name,
        is_latest=is_latest,
        is_thin=is_thin,
        difference=difference,
        segments=segments,
        words=f"{name}: {difference} µs a pass: {listed}; waited for {waited} %",
        ratio=ratio,
        waited=waited,
        figures=(
            difference,
            *figures.values(),
            f"{ratio} ({reach})" if reach else ratio,
            ", ".join(rank.slower_in) or NONE,
            waited,
        ),
    )


def _with_reach(rank: RankSplit, part: str) -> str:
    of_part = getattr(rank, part)
    return f"{microseconds(of_part.ns)} {reach_words(of_part)}"
