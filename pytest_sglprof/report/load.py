"""An onset and the load around a window as plain documents."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from pytest_sglprof.report.plain import utc
from pytest_sglprof.values import LoadSample

if TYPE_CHECKING:
    from pytest_sglprof.analysis.load_join import LoadJoin
    from pytest_sglprof.analysis.unequal import Onset

MAX_POINTS = 600  # of a rank in a document; a strip on a page is no wider


def onset_document(onset: Onset | None, join: LoadJoin | None = None) -> dict[str, Any] | None:
    """`onset` of a window in results.json; None where none was looked for or found."""
    if onset is None:
        return None
    return {
        "time": utc(onset.time),
        "declared": utc(onset.declared),
        "kind": onset.kind,
        "factor": onset.factor,
        "resolution_s": onset.resolution_s,
        "source": onset.source,
        "ranks": [
            {
                "rank": load.rank,
                "running": load.running,
                "waiting": load.waiting,
                "tokens": load.tokens,
            }
            for load in onset.ranks
        ],
        "sentence": onset.sentence if join is None else f"{onset.sentence}; {join.sentence}",
        "correlation": None if join is None else join.correlation,
    }


def load_strip(
    samples: Iterable[LoadSample], source: str, begin: float, end: float
) -> list[dict[str, Any]]:
    """`load_samples` of a window: one object a rank with columns of at most 600 points.

    Samples of `source` between `begin` and `end` (Unix s). Where there are more, points are
    left out at even distances and the last one stays.
    """
    by_rank: dict[str, list[LoadSample]] = {}
    for sample in samples:
        if sample.source == source and begin <= sample.time <= end:
            by_rank.setdefault(sample.rank, []).append(sample)
    return [_columns(rank, source, _thinned(mine)) for rank, mine in sorted(by_rank.items())]


def _thinned(samples: list[LoadSample]) -> list[LoadSample]:
    if len(samples) <= MAX_POINTS:
        return samples
    last = len(samples) - 1
    return [samples[round(at * last / (MAX_POINTS - 1))] for at in range(MAX_POINTS)]


def _columns(rank: str, source: str, samples: list[LoadSample]) -> dict[str, Any]:
    return {
        "rank": rank,
        "source": source,
        "time": [round(sample.time, 3) for sample in samples],
        "running": [sample.running for sample in samples],
        "waiting": [sample.waiting for sample in samples],
        "tokens": [sample.tokens for sample in samples],
    }
