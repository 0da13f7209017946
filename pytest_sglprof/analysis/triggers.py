"""What opens a window while a test's load runs: `ImbalanceOnset` and its kin, and a callable.

Cheap to import: test modules name these in their markers.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, Protocol, TypeVar, cast

from pytest_sglprof.analysis.onset import OnsetDetector
from pytest_sglprof.analysis.rank_board import RankLoad
from pytest_sglprof.analysis.unequal import Kind, Onset, OnsetRule
from pytest_sglprof.errors import SettingsError
from pytest_sglprof.spelling import did_you_mean
from pytest_sglprof.values import BalanceSample, LoadSample

Samples = Iterable[LoadSample | BalanceSample]
NoOnset = Literal["pass", "inconclusive", "fail"]
Made = TypeVar("Made")
_WORDS = {"source": ("loads", "log"), "on_no_onset": ("pass", "inconclusive", "fail")}
WITHIN = 120.0  # s that a trigger waits by default, from the start of the test's load


class Detector(Protocol):
    """Fed by the watching thread; see `OnsetDetector`."""

    @property
    def judged_s(self) -> float: ...  # noqa: D102
    @property
    def worst(self) -> float: ...  # noqa: D102
    def add(self, samples: Samples, now: float) -> list[Onset]: ...  # noqa: D102


class Trigger(Protocol):
    """within: s to wait for it. on_no_onset: the verdict when it never comes.

    compares_ranks: True for what a server with one DP rank cannot show.
    """

    @property
    def within(self) -> float: ...  # noqa: D102
    @property
    def on_no_onset(self) -> NoOnset: ...  # noqa: D102
    @property
    def compares_ranks(self) -> bool: ...  # noqa: D102
    def detector(self, ranks: Sequence[str]) -> Detector: ...  # noqa: D102


@dataclass(frozen=True)
class _Arguments:
    """Refuses unknown arguments with the nearest one, which Python's own error does not name."""

    def __new__(cls: type[Made], *args: object, **keywords: object) -> Made:
        known = [item.name for item in fields(cls)]  # type: ignore[arg-type]  # a dataclass
        if unknown := [name for name in keywords if name not in known]:
            raise SettingsError(
                f"{cls.__name__}: unknown argument {', '.join(unknown)}",
                expected="one of " + ", ".join(known),
                hint=did_you_mean(unknown, known, "correct the spelling"),
            )
        made: Made = object.__new__(cls)
        return made


@dataclass(frozen=True)
class ImbalanceOnset(_Arguments):
    """Opens when the load of DP ranks has been unequal for `hold` seconds.

    factor, hold, min_running, min_gap, min_gap_usage: see `OnsetRule`. within: s, from the
    start of the test's load. source: "loads" (`/v1/loads`) or "log". on_no_onset: the
    verdict when the load stays balanced.
    """

    factor: float = 1.5
    hold: float = 2.0
    within: float = WITHIN
    min_running: float = 8.0
    min_gap: float = 4.0
    min_gap_usage: float = 0.05
    source: Literal["loads", "log"] = "loads"
    on_no_onset: NoOnset = "pass"

    compares_ranks = True

    def __post_init__(self) -> None:
        _check(self, factor=1.0)

    def detector(self, ranks: Sequence[str]) -> OnsetDetector:
        """Looks for it among these ranks."""
        rule = OnsetRule(self.factor, self.hold, self.min_running, self.min_gap, self.min_gap_usage)
        return OnsetDetector(rule, ranks=ranks, source=self.source)


@dataclass(frozen=True)
class QueueGrowth(_Arguments):
    """Opens when the queues of all ranks together have grown by `requests` for `hold` s.

    Growth is counted from the shortest queue that was seen since the load began.
    """

    requests: int = 16
    hold: float = 2.0
    within: float = WITHIN
    source: Literal["loads", "log"] = "loads"
    on_no_onset: NoOnset = "pass"

    compares_ranks = False

    def __post_init__(self) -> None:
        _check(self, requests=0)

    def detector(self, ranks: Sequence[str]) -> Detector:
        """Looks for it over all ranks."""
        return _TotalDetector(self.source, self.hold, "queue_growth", self._judge)

    def _judge(self, history: _History) -> tuple[float, str] | None:
        waiting = history.now("waiting")
        least = min(point.waiting for point in history.points)
        if waiting - least < self.requests:
            return None
        text = f"{waiting:.0f} requests wait, {waiting - least:.0f} more than the fewest before"
        return waiting / max(least, 1.0), text


@dataclass(frozen=True)
class ThroughputDrop(_Arguments):
    """Opens when all ranks together have generated `share` less than before for `hold` s.

    Compared with the best mean over 5 s so far; only while at least half as many requests
    run as then, so that the end of a load is no drop. share: 0 to 1.
    """

    share: float = 0.3
    hold: float = 3.0
    within: float = WITHIN
    source: Literal["loads", "log"] = "loads"
    on_no_onset: NoOnset = "pass"

    compares_ranks = False

    def __post_init__(self) -> None:
        _check(self, share=0.0)
        if self.share >= 1.0:
            raise SettingsError(f"ThroughputDrop(share={self.share})", expected="0 < share < 1")

    def detector(self, ranks: Sequence[str]) -> Detector:
        """Looks for it over all ranks."""
        return _TotalDetector(self.source, self.hold, "throughput_drop", self._judge)

    def _judge(self, history: _History) -> tuple[float, str] | None:
        best = history.best
        rate = history.now("throughput")
        if best is None or best.throughput <= 0 or history.now("running") < best.running / 2:
            return None
        if rate > (1.0 - self.share) * best.throughput:
            return None
        text = f"{rate:.0f} tokens/s are generated, {best.throughput:.0f} were before"
        return best.throughput / max(rate, 1e-9), text


@dataclass(frozen=True)
class CallableTrigger:
    """Opens when `function(newest sample of each rank)` is true. Errors in it are raised."""

    function: Callable[[Mapping[str, LoadSample]], object]
    within: float = WITHIN
    source: Literal["loads", "log"] = "loads"
    on_no_onset: NoOnset = "pass"

    compares_ranks = False

    def detector(self, ranks: Sequence[str]) -> Detector:
        """Asks the function after every look at the server."""
        return _CallableDetector(self)


def as_trigger(given: Any) -> Trigger:
    """A trigger, or a callable as one. Raises `SettingsError` for anything else."""
    if callable(getattr(given, "detector", None)) and not isinstance(given, type):
        parts = ("within", "on_no_onset", "compares_ranks")
        if missing := [name for name in parts if not hasattr(given, name)]:
            raise SettingsError(
                f"trigger={given!r} has no {', '.join(missing)}",
                expected="the attributes of pytest_sglprof.analysis.triggers.Trigger",
            )
        return cast("Trigger", given)
    if callable(given) and not isinstance(given, type):
        return CallableTrigger(given)
    raise SettingsError(
        f"trigger={given!r}",
        expected="ImbalanceOnset(…), QueueGrowth(…), ThroughputDrop(…), or a function of the "
        "newest samples",
        hint="from pytest_sglprof import ImbalanceOnset",
    )


def describe_trigger(given: Any) -> str | None:
    """A trigger as text for results; None for none."""
    if given is None:
        return None
    trigger = as_trigger(given)
    if isinstance(trigger, CallableTrigger):
        return getattr(trigger.function, "__qualname__", type(trigger.function).__name__)
    return repr(trigger)


def _check(trigger: Any, **above: float) -> None:
    limits = {"hold": 0.0, "within": 0.0, **above}
    for item in fields(trigger):
        value = getattr(trigger, item.name)
        where = f"{type(trigger).__name__}({item.name}={value!r})"
        if item.name in _WORDS:
            if value not in _WORDS[item.name]:
                words = _WORDS[item.name]
                expected = " or ".join(f'"{word}"' for word in words)
                raise SettingsError(where, expected=expected, hint=did_you_mean([value], words))
            continue
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not math.isfinite(value) or value < 0:
            raise SettingsError(where, expected="a number, 0 or more")
        if item.name in limits and value <= limits[item.name]:
            raise SettingsError(where, expected=f"more than {limits[item.name]:g}")


@dataclass(frozen=True)
class _Point:
    """Sums over all ranks at one moment."""

    time: float
    running: float
    waiting: float
    throughput: float


class _History:
    """Sums since the load began, and the best throughput over a while."""

    best_over = 5.0  # s

    def __init__(self) -> None:
        self.points: deque[_Point] = deque(maxlen=10_000)
        self.best: _Point | None = None

    def add(self, point: _Point) -> None:
        self.points.append(point)
        recent = [p for p in self.points if p.time > point.time - self.best_over]
        if point.time - self.points[0].time < self.best_over:
            return  # not so much has been seen yet
        mean = _Point(
            point.time,
            sum(p.running for p in recent) / len(recent),
            0.0,
            sum(p.throughput for p in recent) / len(recent),
        )
        if self.best is None or mean.throughput > self.best.throughput:
            self.best = mean

    def now(self, name: str) -> float:
        value: float = getattr(self.points[-1], name)
        return value


class _TotalDetector:
    """Declares what `judge` has found true for `hold` s; it ends when it is not any more."""

    worst = 1.0

    def __init__(
        self,
        source: str,
        hold: float,
        kind: Kind,
        judge: Callable[[_History], tuple[float, str] | None],
    ) -> None:
        self.judged_s = 0.0
        self._source = source
        self._hold = hold
        self._kind: Kind = kind
        self._judge = judge
        self._newest: dict[str, LoadSample] = {}
        self._history = _History()
        self._since: float | None = None
        self._declared = False

    def add(self, samples: Samples, now: float) -> list[Onset]:
        mine = [s for s in samples if isinstance(s, LoadSample) and s.source == self._source]
        if not mine:
            return []
        for sample in mine:
            before = self._newest.get(sample.rank)
            if sample.throughput is None and before is not None:  # a prefill line
                sample = replace(sample, throughput=before.throughput)
            self._newest[sample.rank] = sample
        loads = list(self._newest.values())
        if self._history.points:
            self.judged_s += max(0.0, now - self._history.points[-1].time)
        self._history.add(
            _Point(
                now,
                sum(load.running for load in loads),
                sum(load.waiting for load in loads),
                sum(load.throughput or 0.0 for load in loads),
            )
        )
        found = self._judge(self._history)
        if found is None:
            self._since, self._declared = None, False
            return []
        self._since = now if self._since is None else self._since
        if self._declared or now - self._since < self._hold:
            return []
        self._declared = True
        return [_onset(self._since, now, self._kind, found, self._source, loads)]


class _CallableDetector:
    worst = 1.0

    def __init__(self, trigger: CallableTrigger) -> None:
        self.judged_s = 0.0
        self._trigger = trigger
        self._newest: dict[str, LoadSample] = {}
        self._at: float | None = None

    def add(self, samples: Samples, now: float) -> list[Onset]:
        for sample in samples:
            if isinstance(sample, LoadSample) and sample.source == self._trigger.source:
                self._newest[sample.rank] = sample
        if not self._newest:
            return []
        self.judged_s += 0.0 if self._at is None else max(0.0, now - self._at)
        self._at = now
        if not self._trigger.function(dict(self._newest)):
            return []
        text = f"{describe_trigger(self._trigger)} was true"
        loads = list(self._newest.values())
        return [_onset(now, now, "custom", (1.0, text), self._trigger.source, loads)]


def _onset(
    since: float,
    now: float,
    kind: Kind,
    found: tuple[float, str],
    source: str,
    loads: Sequence[LoadSample],
) -> Onset:
    ranks = tuple(
        RankLoad(load.rank, load.running, load.waiting, load.tokens, load.token_usage)
        for load in sorted(loads, key=lambda load: load.rank)
    )
    resolution = 1.0 if source == "log" else 0.5
    return Onset(since, now, kind, found[0], resolution, source, ranks, sentence=found[1])
