"""An onset and the load around a window, as a document holds them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated

import msgspec

from pytest_sglprof.figures import Amount, Count
from pytest_sglprof.report.plain import utc
from pytest_sglprof.values import LoadSample

if TYPE_CHECKING:
    from pytest_sglprof.analysis.load_join import LoadJoin
    from pytest_sglprof.analysis.unequal import Onset

MAX_POINTS = 600  # of a rank in a document; a strip on a page is no wider
_Correlation = Annotated[float, msgspec.Meta(ge=-1.000001, le=1.000001)]
_Source = Annotated[str, msgspec.Meta(pattern="^(loads|log|metrics)$")]


class LoadAtOnset(msgspec.Struct, frozen=True, kw_only=True):
    """The load of one rank when an imbalance was declared: requests, and KV tokens held."""

    rank: str
    running: Amount
    waiting: Amount
    tokens: Amount | None


class RecordedOnset(msgspec.Struct, frozen=True, kw_only=True):
    """What opened a window; fields as in `analysis.unequal.Onset`, times as text.

    sentence: with what the trace says about it. correlation: as in `LoadJoin`.
    """

    time: str
    declared: str
    kind: str
    factor: Amount
    resolution_s: Amount
    source: _Source
    ranks: tuple[LoadAtOnset, ...]
    sentence: str
    correlation: _Correlation | None


class LoadSeries(msgspec.Struct, frozen=True, kw_only=True):
    """The load of one rank over time, one item of each list a moment. time: Unix time, s."""

    rank: str
    source: _Source
    time: list[float]
    running: list[Count]
    waiting: list[Count]
    tokens: list[Count | None]


def onset_document(onset: Onset | None, join: LoadJoin | None = None) -> RecordedOnset | None:
    """`onset` of a window; None where none was looked for or found."""
    if onset is None:
        return None
    return RecordedOnset(
        time=utc(onset.time),
        declared=utc(onset.declared),
        kind=onset.kind,
        factor=onset.factor,
        resolution_s=onset.resolution_s,
        source=onset.source,
        ranks=tuple(
            LoadAtOnset(
                rank=load.rank, running=load.running, waiting=load.waiting, tokens=load.tokens
            )
            for load in onset.ranks
        ),
        sentence=onset.sentence if join is None else f"{onset.sentence}; {join.sentence}",
        correlation=None if join is None else join.correlation,
    )


def load_strip(
    samples: Iterable[LoadSample], source: str, begin: float, end: float
) -> tuple[LoadSeries, ...]:
    """The load of each rank in at most 600 points.

    Samples of `source` between `begin` and `end` (Unix s). Where there are more, points are
    left out at even distances and the last one stays.
    """
    by_rank: dict[str, list[LoadSample]] = {}
    for sample in samples:
        if sample.source == source and begin <= sample.time <= end:
            by_rank.setdefault(sample.rank, []).append(sample)
    return tuple(_series(rank, _thinned(of_rank)) for rank, of_rank in sorted(by_rank.items()))


def _thinned(samples: list[LoadSample]) -> list[LoadSample]:
    if len(samples) <= MAX_POINTS:
        return samples
    last = len(samples) - 1
    return [samples[round(at * last / (MAX_POINTS - 1))] for at in range(MAX_POINTS)]


def _series(rank: str, samples: list[LoadSample]) -> LoadSeries:
    return LoadSeries(
        rank=rank,
        source=samples[0].source,
        time=[round(sample.time, 3) for sample in samples],
        running=[sample.running for sample in samples],
        waiting=[sample.waiting for sample in samples],
        tokens=[sample.tokens for sample in samples],
    )
