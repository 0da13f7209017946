"""What the page's scripts draw of one window, packed so that a large page opens at once."""

from __future__ import annotations

import base64
import gzip
from collections.abc import Sequence
from itertools import chain, islice
from typing import Any

import msgspec
import numpy as np

from pytest_sglprof._report.model import RecordedWindow, unix_ns
from pytest_sglprof._report.series import KernelGroup, Lane, Picture, StepSeries
from pytest_sglprof._trace.categories import CATEGORIES

COLOURS = {row.name: row.colour for row in CATEGORIES}
DIGITS = 4  # significant ones of a time; the page shows three
_SIZES = 10 ** np.arange(17, dtype=np.int64)


class DrawnKernel(msgspec.Struct, frozen=True, omit_defaults=True):
    """A kernel's figures, as in `KernelSpread`."""

    name: str
    quantiles: list[list[int] | None]
    by_step: list[list[int]] | None = None
    by_call: list[list[int]] | None = None


class DrawnKernels(msgspec.Struct, frozen=True):
    """The kernels of one work group, as in `KernelGroup`."""

    ranks: tuple[str, ...]
    numbers: list[int]
    rows: tuple[DrawnKernel, ...]


class DrawnLane(msgspec.Struct, frozen=True):
    """A lane. gap_ns: from the end of the activity before, exactly."""

    rank: str
    stream: int
    name: list[int]
    gap_ns: list[int]
    dur_ns: list[int]
    match: list[int]


class DrawnPicture(msgspec.Struct, frozen=True):
    """A step, as in `Picture`."""

    group: str
    ranks: tuple[str, ...]
    step: int | None
    stage: str
    why: tuple[str, ...]
    origin_ns: int
    dropped: int
    lanes: tuple[DrawnLane, ...]


class DrawnLanes(msgspec.Struct, frozen=True):
    """As `Lanes`. colours: of each category, see `Category`."""

    names: tuple[str, ...]
    categories: tuple[str, ...]
    colours: dict[str, tuple[int, int]]
    left_out: int
    steps: tuple[DrawnPicture, ...]


class DrawnOnset(msgspec.Struct, frozen=True):
    """ms: Unix time of the onset."""

    ms: float
    sentence: str


def embedded(value: Any, *, at_once: bool = False) -> str:
    """JSON, packed by gzip, as base64: no letter of a name can end the element that holds it.

    at_once: in a twentieth of the time, to 1.15 of the size.
    """
    text = msgspec.json.encode(value)
    packed = _packed_at_once(text) if at_once else gzip.compress(text, 9, mtime=0)
    return base64.b64encode(packed).decode("ascii")


def _packed_at_once(text: bytes) -> bytes:
    """By isal, by the standard library where isal is not installed."""
    try:
        from isal import igzip
    except ImportError:
        return gzip.compress(text, 4, mtime=0)
    packed: bytes = igzip.compress(text, 3, mtime=0)
    return packed


def step_times(window: RecordedWindow) -> tuple[StepSeries, ...]:
    """The steps of each work group, their times cut after four significant digits."""
    return tuple(
        msgspec.structs.replace(
            series, compute_ns=_short(series.compute_ns), wait_ns=_short(series.wait_ns)
        )
        for series in window.step_times
    )


def kernels(window: RecordedWindow) -> tuple[DrawnKernels, ...]:
    """The kernels of each work group, their times cut after four significant digits."""
    return tuple(map(_kernels, window.kernels))


def lanes(window: RecordedWindow) -> DrawnLanes | None:
    """The lanes of the steps that are shown. Starts stand as gaps: see `DrawnLane`."""
    if window.lanes is None:
        return None
    return DrawnLanes(
        window.lanes.names,
        window.lanes.categories,
        COLOURS,
        window.lanes.left_out,
        tuple(map(_picture, window.lanes.steps)),
    )


def onset(window: RecordedWindow) -> DrawnOnset | None:
    """The moment at which load between ranks began to differ."""
    if window.onset is None:
        return None
    return DrawnOnset(unix_ns(window.onset.time) / 1e6, window.onset.sentence)


def _kernels(group: KernelGroup) -> DrawnKernels:
    """All rows at once: of each alone, there are too few to cut them quickly."""
    parts = (part for row in group.rows for part in (row.by_step, row.by_call) if part)
    cut = iter(_short([*chain.from_iterable(parts)]))
    called = (points for row in group.rows for points in row.quantiles if points)
    quantiles = iter(_short([*called]))

    def next_rows(part: list[list[int]] | None) -> list[list[int]] | None:
        return None if part is None else [*islice(cut, len(part))]

    rows = (
        DrawnKernel(
            row.name,
            [points and next(quantiles) for points in row.quantiles],
            next_rows(row.by_step),
            next_rows(row.by_call),
        )
        for row in group.rows
    )
    return DrawnKernels(group.ranks, group.numbers, tuple(rows))


def _short(value: Any) -> Any:
    """Integers of a nested list, cut after four significant digits.

    Cut, not rounded: then the three that the page shows are those of the exact value.
    """
    if isinstance(value, list):
        try:
            (width,) = set(map(len, value))
        except (TypeError, ValueError):  # numbers, None, rows of several widths
            return [*map(_short, value)]
        return _short_rows(value, width)
    if value is None or abs(value) < 10**DIGITS:
        return value
    size = 10 ** (len(str(abs(value))) - DIGITS)
    return value - value % size


def _short_rows(rows: list[list[int]], width: int) -> list[list[int]]:
    """The same for rows of one width: a window has thousands."""
    numbers = np.fromiter(chain.from_iterable(rows), np.int64)
    sizes = _SIZES[np.searchsorted(_SIZES, np.abs(numbers) // 10**DIGITS, side="right")]
    cut: list[list[int]] = (numbers - numbers % sizes).reshape(len(rows), width).tolist()
    return cut


def _picture(picture: Picture) -> DrawnPicture:
    return DrawnPicture(
        group=picture.group,
        ranks=picture.ranks,
        step=picture.step,
        stage=picture.stage,
        why=picture.why,
        origin_ns=picture.origin_ns,
        dropped=picture.dropped,
        lanes=tuple(map(_lane, picture.lanes)),
    )


def _lane(lane: Lane) -> DrawnLane:
    gaps = _gaps(lane.start_ns, lane.dur_ns)
    return DrawnLane(lane.rank, lane.stream, lane.name, gaps, lane.dur_ns, lane.match)


def _gaps(starts: Sequence[int], durations: Sequence[int]) -> list[int]:
    ends = [0, *(start + dur for start, dur in zip(starts, durations, strict=True))]
    return [start - end for start, end in zip(starts, ends, strict=False)]
