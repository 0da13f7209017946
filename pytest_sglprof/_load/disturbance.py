"""What profile windows do to the load that is watched, and detectors that look away meanwhile.

A server that writes its traces serves nobody. The queues that this leaves behind are uneven, so
that a trigger which counted them would fire at its own profiler.
"""

from __future__ import annotations

import bisect
import contextlib
import itertools
import math
import statistics
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from pytest_sglprof._load.onset import Onset
from pytest_sglprof._load.samples import BalanceSample, LoadSample, WaitSample

AFTER = 2.0  # x the stall, after the close, for which samples do not count
FEWEST_LINES = 3  # of a rank before a window, to know how long its forward passes take
IDLE = 1.0  # s without a batch line, beside twice their usual gap, that only an idle server has
MOST_LINES = 500  # of a rank that are remembered
METRICS_SPAN = 2.0  # s before a sample of `/metrics` that it is a mean of, see `METRICS_INTERVAL`

Samples = Iterable[LoadSample | BalanceSample | WaitSample]
Line = tuple[float, int]  # time of a batch line, Unix s, and the number of its forward pass


class Detector(Protocol):
    """What the watching thread passes samples to; see `OnsetDetector`."""

    @property
    def judged_s(self) -> float: ...
    @property
    def largest_factor(self) -> float: ...
    def add(self, samples: Samples, now: float) -> list[Onset]: ...


@dataclass(frozen=True)
class Disturbance:
    """One window. Times in Unix s.

    closed: when its files were there; infinite while it is open. stopped_s: how long the request
    that ended it took; of a window that ended by its steps, how long it was open. stall_s: how
    long serving stood still, as the log's passes show; None where they do not.
    """

    opened: float
    closed: float = math.inf
    stopped_s: float = 0.0
    stall_s: float | None = None

    @property
    def stall(self) -> float:
        """How long serving stood still, s, as far as it is known."""
        return self.stopped_s if self.stall_s is None else self.stall_s

    @property
    def until(self) -> float:
        """From when on samples count again."""
        return self.closed + AFTER * self.stall


class Disturbances:
    """The windows that were opened while a load was watched.

    Windows are opened in one thread and samples come in another. clock: gives Unix s.
    """

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._windows: list[Disturbance] = []
        self._lines: dict[str, deque[Line]] = {}
        self._stopping = 0.0

    @contextlib.contextmanager
    def window(self) -> Iterator[None]:
        """Around a window, from its opening until its files are there."""
        with self._lock:
            self._windows.append(Disturbance(self._clock()))
            self._stopping = self._windows[-1].opened
        try:
            yield
        finally:
            with self._lock:
                closed = self._clock()
                self._windows[-1] = replace(
                    self._windows[-1], closed=closed, stopped_s=closed - self._stopping
                )

    def stopping(self) -> None:
        """The window did not end by itself: the request that ends it is sent now."""
        with self._lock:
            self._stopping = self._clock()

    def hear(self, samples: Samples) -> None:
        """Takes the samples of a look: numbered passes of the log show for how long it stalled."""
        with self._lock:
            for sample in samples:
                if isinstance(sample, LoadSample) and sample.iteration is not None:
                    lines = self._lines.setdefault(sample.rank, deque(maxlen=MOST_LINES))
                    lines.append((sample.time, sample.iteration))
            if self._windows and self._windows[-1].stall_s is None:
                newest = self._windows[-1]
                stall = stall_of(self._lines, newest.opened, newest.closed)
                self._windows[-1] = replace(newest, stall_s=stall)

    @property
    def windows(self) -> tuple[Disturbance, ...]:
        """All of them, in order of time."""
        with self._lock:
            return tuple(self._windows)

    def covers(self, moment: float) -> bool:
        """Whether the load at this moment (Unix s) is what a window did to it."""
        return any(window.opened <= moment < window.until for window in self.windows)

    def undisturbed(self, moment: float) -> float:
        """The time of a clock that stands still while windows disturb the load."""
        windows = self.windows
        ends = [*(window.opened for window in windows[1:]), math.inf]
        spans = (
            min(moment, window.until, end) - window.opened
            for window, end in zip(windows, ends, strict=True)
        )
        return moment - math.fsum(max(0.0, span) for span in spans)

    def wall_time(self, undisturbed: float) -> float:
        """The Unix time, s, at which that clock showed `undisturbed` for the last time."""
        moment = undisturbed
        windows = self.windows
        ends = [*(window.opened for window in windows[1:]), math.inf]
        for window, end in zip(windows, ends, strict=True):
            if moment >= window.opened and math.isfinite(min(window.until, end)):
                moment += min(window.until, end) - window.opened
        return moment


MOST_GAP = 600.0  # s between two windows: farther apart, they would miss what they look for
SETTLED = 10.0  # s after a window until its stall counts as known, whatever the log says later


def gap_after(window: Disturbance, every: float, max_share: float) -> float:
    """How long after it was opened the next may be, s, so that stalls take `max_share` at most."""
    return max(every, window.stall / max_share)


def stall_of(lines: Mapping[str, Sequence[Line]], opened: float, closed: float) -> float | None:
    """For how long a server stood still around a window, s; None where its log does not tell.

    The longest gap between two batch lines of a rank, less what as many forward passes took
    before the window. It needs passes that are numbered, times with milliseconds, and lines
    shortly before and after the window: an idle server logs none, which is no stall.
    """
    stalls = [_stall_of_rank(list(each), opened, closed) for each in lines.values()]
    known = [stall for stall in stalls if stall is not None]
    return max(known, default=None)


def _stall_of_rank(lines: Sequence[Line], opened: float, closed: float) -> float | None:
    moments = [moment for moment, _ in lines]
    if not moments or moments[-1] <= closed or all(moment % 1 == 0 for moment in moments):
        return None
    gaps = [
        (old, new, new - old, passes - before)
        for (old, before), (new, passes) in itertools.pairwise(lines)
        if passes > before
    ]
    usual = [gap / passes for _, new, gap, passes in gaps if new <= opened]
    if len(usual) < FEWEST_LINES:
        return None
    pass_s = statistics.median(usual)
    line_s = statistics.median(gap for _, new, gap, _ in gaps if new <= opened)
    first_after = moments[bisect.bisect_right(moments, closed)]
    last_before = moments[bisect.bisect_right(moments, opened) - 1]
    if max(opened - last_before, first_after - closed) > IDLE + 2 * line_s:
        return None
    around = [
        gap - passes * pass_s
        for old, new, gap, passes in gaps
        if new > opened and old < closed and new <= first_after
    ]
    return max([0.0, *around])


class Undisturbed:
    """A detector for which time stands still while a window disturbs the load.

    So no sample of then counts, and a `hold` that a window interrupts goes on after it.
    """

    def __init__(self, detector: Detector, disturbances: Disturbances) -> None:
        self._detector = detector
        self._disturbances = disturbances

    @property
    def judged_s(self) -> float:
        """That of the detector."""
        return self._detector.judged_s

    @property
    def largest_factor(self) -> float:
        """That of the detector."""
        return self._detector.largest_factor

    def add(self, samples: Samples, now: float) -> list[Onset]:
        """What the detector declares of the samples that count; its times are Unix s."""
        calm = self._disturbances
        if not calm.windows:
            return self._detector.add(samples, now)
        counted = [
            replace(sample, time=calm.undisturbed(sample.time))
            for sample in samples
            if not self._is_lost(sample)
        ]
        if calm.covers(now) and not counted:
            return []
        onsets = self._detector.add(counted, calm.undisturbed(now))
        return [
            replace(
                onset,
                time=calm.wall_time(onset.time),
                declared=calm.wall_time(onset.declared),
            )
            for onset in onsets
        ]

    def _is_lost(self, sample: LoadSample | BalanceSample | WaitSample) -> bool:
        if self._disturbances.covers(sample.time):
            return True
        is_mean = isinstance(sample, BalanceSample) and sample.source == "metrics"
        return is_mean and self._disturbances.covers(sample.time - METRICS_SPAN)
