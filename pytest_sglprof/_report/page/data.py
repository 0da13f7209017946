"""What the page's scripts draw of one window, packed so that a large page opens at once."""

from __future__ import annotations

import base64
import gzip
from collections.abc import Sequence
from typing import Any

import msgspec

from pytest_sglprof._report.model import RecordedWindow, unix_ns
from pytest_sglprof._report.series import KernelSpread, Lane, Picture, StepSeries
from pytest_sglprof._trace.categories import CATEGORIES

COLOURS = {row.name: row.colour for row in CATEGORIES}
DIGITS = 4  # significant ones of a time; the page shows three


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


def embedded(value: Any) -> str:
    """JSON, packed by gzip, as base64: no letter of a name can end the element that holds it."""
    packed = gzip.compress(msgspec.json.encode(value), 9, mtime=0)
    return base64.b64encode(packed).decode("ascii")


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
    return tuple(
        DrawnKernels(group.ranks, group.numbers, tuple(map(_kernel, group.rows)))
        for group in window.kernels
    )


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


def _kernel(row: KernelSpread) -> DrawnKernel:
    return DrawnKernel(row.name, _short(row.quantiles), _short(row.by_step), _short(row.by_call))


def _short(value: Any) -> Any:
    """Integers of a nested list, cut after four significant digits.

    Cut, not rounded: then the three that the page shows are those of the exact value.
    """
    if isinstance(value, list):
        return [_short(item) for item in value]
    if value is None or abs(value) < 10**DIGITS:
        return value
    size = 10 ** (len(str(abs(value))) - DIGITS)
    return value - value % size


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
