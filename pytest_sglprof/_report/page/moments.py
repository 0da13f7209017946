"""Before, at and after an onset: the ranks in each of these windows, side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, median

from pytest_sglprof._config.model import Moment
from pytest_sglprof._ranks import Rank
from pytest_sglprof._report.model import RecordedWindow, unix_ns
from pytest_sglprof._report.page.history import PlacedHead
from pytest_sglprof._report.stored import whole
from pytest_sglprof._trace.categories import NOT_COMPUTE


@dataclass(frozen=True)
class RankThen:
    """A rank in one window. compute_ns: of a step, else of the window; ratio: to its peers' median.

    running: requests of its DP rank meanwhile. Each is None where it is not known.
    """

    compute_ns: float | None
    ratio: float | None
    running: float | None


@dataclass(frozen=True)
class MomentWindow:
    """One window. steps: of the rank with most of them."""

    moment: Moment
    anchor: str
    opened: str
    steps: int


@dataclass(frozen=True)
class RankOverTime:
    """A rank, with a figure for each window."""

    rank: str
    then: tuple[RankThen, ...]


@dataclass(frozen=True)
class Moments:
    """The windows around one onset in order of time. sentence: what the onset was, if it came."""

    nodeid: str
    name: str
    sentence: str
    windows: tuple[MomentWindow, ...]
    rows: tuple[RankOverTime, ...]


def moments(windows: Sequence[PlacedHead]) -> list[Moments]:
    """One for each window with short ones beside it."""
    around: dict[tuple[int, str], list[PlacedHead]] = {}
    for window in windows:
        if window.doc.moment in ("before", "at", "after") and window.doc.moment_of is not None:
            around.setdefault((id(window.run), window.doc.moment_of), []).append(window)
    return [_moments(each) for each in around.values() if any(not w.doc.is_judged for w in each)]


def _moments(placed: Sequence[PlacedHead]) -> Moments:
    in_order = sorted(placed, key=lambda window: window.doc.opened)
    docs = [whole(window.doc, window.run) for window in in_order]
    judged = next((doc for doc in docs if doc.is_judged), None)
    ranks = list(dict.fromkeys(rank for doc in docs for rank in doc.ranks))
    figures = [_figures(doc) for doc in docs]
    return Moments(
        nodeid=docs[0].nodeid,
        name=judged.name if judged is not None else docs[0].name,
        sentence=judged.onset.sentence if judged is not None and judged.onset is not None else "",
        windows=tuple(
            MomentWindow(
                window.doc.moment or "at",
                window.anchor,
                window.doc.opened,
                max(window.doc.steps.per_rank.values(), default=0),
            )
            for window in in_order
        ),
        rows=tuple(
            RankOverTime(rank, tuple(of.get(rank, RankThen(None, None, None)) for of in figures))
            for rank in ranks
        ),
    )


def _figures(doc: RecordedWindow) -> dict[str, RankThen]:
    compute = dict.fromkeys(doc.ranks, 0.0)
    for row in doc.table:
        if row.category not in NOT_COMPUTE:
            compute[row.rank] = compute.get(row.rank, 0.0) + row.total_ns
    if compute and all(doc.steps.per_rank.get(rank) for rank in compute):
        compute = {rank: ns / doc.steps.per_rank[rank] for rank, ns in compute.items()}
    return {
        rank: RankThen(
            ns or None,
            _ratio(ns, [other for name, other in compute.items() if name != rank]),
            _running(doc, rank),
        )
        for rank, ns in compute.items()
    }


def _ratio(compute_ns: float, others: Sequence[float]) -> float | None:
    middle = median(others) if others else 0.0
    return compute_ns / middle if middle > 0 else None


def _running(doc: RecordedWindow, rank: str) -> float | None:
    parsed = Rank.parse(rank)
    dp = None if parsed is None else parsed.dp
    begin, end = unix_ns(doc.opened) / 1e9, unix_ns(doc.closed) / 1e9
    for series in doc.load_samples:
        of = Rank.parse(series.rank) if series.rank else Rank()
        if of is not None and of.dp == dp:
            pairs = list(zip(series.time, series.running, strict=True))
            inside = [running for moment, running in pairs if begin <= moment <= end]
            before = [running for moment, running in pairs if moment < begin]
            return fmean(inside) if inside else (float(before[-1]) if before else None)
    return None
