"""The load around a window, and the onset that opened it, as its document holds them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, TypeVar

from pytest_sglprof._load.samples import BalanceSample, LoadSample, WaitSample
from pytest_sglprof._report.model import (
    MAX_POINTS,
    LoadAtOnset,
    LoadSeries,
    Measured,
    MetricSeries,
    RecordedOnset,
    SampledRatios,
    utc,
)

if TYPE_CHECKING:
    from pytest_sglprof._analysis.load import LoadJoin
    from pytest_sglprof._load.onset import Onset

T = TypeVar("T")


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


def metric_series(
    samples: Iterable[BalanceSample | WaitSample], begin: float, end: float
) -> tuple[MetricSeries, ...]:
    """What the server measured of itself between `begin` and `end` (Unix s), thinned as loads."""
    series: dict[tuple[Measured, str], list[tuple[float, float]]] = {}
    for sample in samples:
        if begin <= sample.time <= end:
            kind: Measured = "sync_wait" if isinstance(sample, WaitSample) else sample.kind
            value = sample.seconds if isinstance(sample, WaitSample) else sample.factor
            series.setdefault((kind, sample.rank), []).append((round(sample.time, 3), value))
    made = []
    for (kind, rank), points in sorted(series.items()):
        times, values = zip(*_thinned(points), strict=True)
        made.append(MetricSeries(kind=kind, rank=rank, time=list(times), values=list(values)))
    return tuple(made)


def sampled_ratios(
    samples: Iterable[tuple[float, Mapping[str, float]]],
) -> tuple[SampledRatios, ...]:
    """The log ratios of the ranks in samples (Unix s, rank -> log) as ratios over time."""
    by_rank: dict[str, list[tuple[float, float]]] = {}
    for moment, ratios in samples:
        for rank, log_ratio in ratios.items():
            by_rank.setdefault(rank, []).append((round(moment, 3), math.exp(log_ratio)))
    return tuple(
        SampledRatios(
            rank=rank,
            time=[moment for moment, _ in _thinned(points)],
            ratios=[ratio for _, ratio in _thinned(points)],
        )
        for rank, points in by_rank.items()
    )


def _thinned(samples: list[T]) -> list[T]:
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
        token_ms=[_token_ms(sample) for sample in samples],
    )


def _token_ms(sample: LoadSample) -> float | None:
    if not sample.throughput or not sample.running:
        return None
    return round(1e3 * sample.running / sample.throughput, 3)
