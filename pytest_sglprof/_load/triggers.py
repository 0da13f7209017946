"""The triggers that open a window while a test's load runs: `ImbalanceOnset`, … or a function.

Cheap to import, since test modules use these in their markers. A new trigger is a class here,
an export of `pytest_sglprof`, and a row in docs/watch.md.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar, Literal, Protocol, TypeVar, cast

from pytest_sglprof._errors import SettingsError, did_you_mean
from pytest_sglprof._load.cusum import KernelDetector
from pytest_sglprof._load.disturbance import Detector, Samples
from pytest_sglprof._load.onset import Onset, OnsetDetector, OnsetRule
from pytest_sglprof._load.samples import LoadSample, RankLoad

NoOnset = Literal["pass", "inconclusive", "fail"]
Made = TypeVar("Made")
_WORDS = {"source": ("loads", "log"), "on_no_onset": ("pass", "inconclusive", "fail")}
WITHIN = 120.0  # s from the start of the test's load that a trigger waits by default
SUSPICION = 0.5  # of `hold`: for so long it lasts until the first window is opened
MAX_SHARE = 0.02  # of the time for which windows of a few steps may stall a server
MOST_SHARE = 0.1  # of a ring
BEST_OVER = 5.0  # s over which the best throughput is averaged


class Trigger(Protocol):
    """What opens a window. within: s to wait for it. on_no_onset: the verdict if it never comes.

    compares_ranks: True if a server with only one DP rank cannot show it.
    """

    @property
    def within(self) -> float: ...
    @property
    def on_no_onset(self) -> NoOnset: ...
    @property
    def compares_ranks(self) -> bool: ...
    def detector(self, ranks: Sequence[str]) -> Detector: ...


class _Arguments:
    """Checks the arguments of a frozen dataclass, and shows them as they are written."""

    above: ClassVar[Mapping[str, float]] = {}  # argument -> the value that it must exceed

    def __new__(cls: type[Made], *args: object, **keywords: object) -> Made:
        """Suggests the nearest argument for an unknown one, which Python's error does not."""
        known = [item.name for item in fields(cls)]  # type: ignore[arg-type]  # a dataclass
        if unknown := [name for name in keywords if name not in known]:
            raise SettingsError(
                f"{cls.__name__}: unknown argument {', '.join(unknown)}",
                expected="one of " + ", ".join(known),
                hint=did_you_mean(unknown, known, "correct the spelling"),
            )
        made: Made = object.__new__(cls)
        return made

    def __post_init__(self) -> None:
        limits = {"hold": 0.0, "within": 0.0, **self.above}
        for item in fields(self):  # type: ignore[arg-type]  # a dataclass
            _check(item.name, getattr(self, item.name), type(self).__name__, limits)

    def __repr__(self) -> str:
        """As it is written in code, with the arguments of this class first."""
        listed = fields(self)  # type: ignore[arg-type]  # a dataclass
        arguments = sorted(listed, key=lambda item: item.kw_only is True)
        written = (f"{item.name}={getattr(self, item.name)!r}" for item in arguments)
        return f"{type(self).__name__}({', '.join(written)})"


@dataclass(frozen=True, repr=False)
class _Trigger(_Arguments):
    """Arguments that all built-in triggers share. source: "loads" (`/v1/loads`) or "log".

    suspicion: whether short windows are opened beside the one at the onset: once what it looks
    for has lasted for half of `hold`, and when the load goes on afterwards.
    """

    within: float = field(default=WITHIN, kw_only=True)
    source: Literal["loads", "log"] = field(default="loads", kw_only=True)
    on_no_onset: NoOnset = field(default="pass", kw_only=True)
    suspicion: bool = field(default=True, kw_only=True)

    compares_ranks: ClassVar[bool] = False

    def detector(self, ranks: Sequence[str]) -> Detector:
        """A fresh detector for these ranks."""
        raise NotImplementedError

    def suspecting(self, ranks: Sequence[str]) -> Detector | None:
        """What suspects an onset before it has held for long enough; None if nothing is to."""
        hold = getattr(self, "hold", 0.0)
        if not (self.suspicion and hold):
            return None
        sooner: dict[str, Any] = {"hold": SUSPICION * hold}
        return replace(self, **sooner).detector(ranks)


@dataclass(frozen=True, repr=False)
class ImbalanceOnset(_Trigger, OnsetRule):
    """Opens once the load of the DP ranks has been unequal for `hold` seconds.

    factor, hold, min_running, min_gap, min_gap_usage: see `OnsetRule`. within: s, from the
    start of the test's load. source: "loads" (`/v1/loads`) or "log". on_no_onset: the
    verdict if the load stays balanced.
    """

    compares_ranks = True
    above: ClassVar[Mapping[str, float]] = {"factor": 1.0}

    def detector(self, ranks: Sequence[str]) -> OnsetDetector:
        """A fresh detector for these ranks."""
        return OnsetDetector(self, ranks=ranks, source=self.source)


@dataclass(frozen=True, repr=False)
class Ring(_Arguments):
    """Windows of a few steps, one after another, until a trigger fires or the test ends.

    steps: of each. every: s from one to the next. keep: as many of the newest stay on disk.
    max_share: of the time for which serving may stand still because of them, at most 0.1: where a
    window stalls the server for longer, they are farther apart.
    """

    steps: int = 10
    every: float = 60.0
    keep: int = 3
    max_share: float = MAX_SHARE

    above: ClassVar[Mapping[str, float]] = {"steps": 0, "every": 0.0, "keep": 0, "max_share": 0.0}

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_share > MOST_SHARE:
            raise SettingsError(
                f"Ring(max_share={self.max_share!r})",
                expected=f"at most {MOST_SHARE}: load counts again only after twice the stall, so "
                "that no onset would be seen between the windows",
            )


@dataclass(frozen=True, repr=False)
class KernelImbalance(_Trigger):
    """Opens once a rank has become slower than its peers, by samples of their kernels.

    For ranks with the same input (tensor parallelism), whose load cannot differ. every: s between
    two samples; steps: of each. limit: how many times slower is too slow; samples add up until it
    is certain (`Cusum`), and the window that is opened then is judged alone. max_share: as for
    `Ring`. within: s, a day.
    """

    every: float = 60.0
    steps: int = 5
    limit: float = 1.1
    max_share: float = MAX_SHARE
    within: float = field(default=86_400.0, kw_only=True)

    above: ClassVar[Mapping[str, float]] = {
        "every": 0.0,
        "steps": 2,
        "limit": 1.0,
        "max_share": 0.0,
    }

    def detector(self, ranks: Sequence[str]) -> KernelDetector:
        """A fresh detector, which is given samples of kernels instead of load."""
        return KernelDetector(self.limit)


@dataclass(frozen=True, repr=False)
class _SumTrigger(_Trigger):
    """A trigger that judges sums over all ranks. kind: that of its onsets."""

    kind: ClassVar[str]

    def judge(self, load: SummedLoad) -> tuple[float, str] | None:
        """The ratio that it looks at, and a sentence about it; None while it is not met."""
        raise NotImplementedError

    def detector(self, ranks: Sequence[str]) -> Detector:
        """A fresh detector, over all ranks."""
        return _SumDetector(self, hold=getattr(self, "hold", 0.0))


@dataclass(frozen=True, repr=False)
class QueueGrowth(_SumTrigger):
    """Opens once the queues of all ranks together have been `requests` longer for `hold` s.

    Longer than the shortest total queue since the load began.
    """

    requests: int = 16
    hold: float = 2.0

    above: ClassVar[Mapping[str, float]] = {"requests": 0}
    kind = "queue_growth"

    def judge(self, load: SummedLoad) -> tuple[float, str] | None:
        """See `_SumTrigger`."""
        waiting = load.sums[-1].waiting
        fewest = min(moment.waiting for moment in load.sums)
        if waiting - fewest < self.requests:
            return None
        text = f"{waiting:.0f} requests wait, {waiting - fewest:.0f} more than the fewest before"
        return waiting / max(fewest, 1.0), text


@dataclass(frozen=True, repr=False)
class ThroughputDrop(_SumTrigger):
    """Opens once the throughput of all ranks together has dropped by `share` for `hold` s.

    Compared with the best mean over 5 s so far, and only while at least half as many requests
    run as then, so that the end of a load does not count as a drop. share: 0 to 1.
    """

    share: float = 0.3
    hold: float = 3.0

    above: ClassVar[Mapping[str, float]] = {"share": 0.0}
    kind = "throughput_drop"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.share >= 1.0:
            raise SettingsError(f"ThroughputDrop(share={self.share})", expected="0 < share < 1")

    def judge(self, load: SummedLoad) -> tuple[float, str] | None:
        """See `_SumTrigger`."""
        rate = load.sums[-1].throughput or 0.0
        best_rate, running_then = load.best
        if best_rate <= 0 or load.sums[-1].running < running_then / 2:
            return None
        if rate > (1.0 - self.share) * best_rate:
            return None
        text = f"{rate:.0f} tokens/s are generated, {best_rate:.0f} were before"
        return best_rate / max(rate, 1e-9), text


@dataclass(frozen=True, repr=False)
class CallableTrigger(_SumTrigger):
    """Opens once `function(newest sample of each rank)` is true. Its errors are raised."""

    function: Callable[[Mapping[str, LoadSample]], object]

    kind = "custom"

    def judge(self, load: SummedLoad) -> tuple[float, str] | None:
        """Calls the function, at each look that has new samples."""
        is_true = self.function(dict(load.newest))
        return (1.0, f"{describe_trigger(self)} was true") if is_true else None

    def __repr__(self) -> str:
        """The function's name."""
        return getattr(self.function, "__qualname__", type(self.function).__name__)


def as_trigger(given: Any) -> Trigger:
    """Returns a trigger; wraps a function as one. Raises `SettingsError` for anything else."""
    if callable(getattr(given, "detector", None)) and not isinstance(given, type):
        parts = ("within", "on_no_onset", "compares_ranks")
        if missing := [name for name in parts if not hasattr(given, name)]:
            raise SettingsError(
                f"trigger={given!r} has no {', '.join(missing)}",
                expected=f"detector, {', '.join(parts)}",
            )
        return cast("Trigger", given)
    if callable(given) and not isinstance(given, type):
        return CallableTrigger(given, suspicion=False)
    raise SettingsError(
        f"trigger={given!r}",
        expected="ImbalanceOnset(…), KernelImbalance(…), QueueGrowth(…), ThroughputDrop(…), or a "
        "function of the newest samples",
        hint="from pytest_sglprof import ImbalanceOnset",
    )


def describe_trigger(given: Any) -> str | None:
    """A trigger as text, for results; None for None."""
    if given is None:
        return None
    return repr(as_trigger(given))


def _check(name: str, value: Any, trigger: str, limits: Mapping[str, float]) -> None:
    what = f"{trigger}({name}={value!r})"
    if words := _WORDS.get(name):
        if value not in words:
            expected = " or ".join(f'"{word}"' for word in words)
            raise SettingsError(what, expected=expected, hint=did_you_mean([value], words))
    elif name == "suspicion":
        if not isinstance(value, bool):
            raise SettingsError(what, expected="True or False")
    elif not callable(value):
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not math.isfinite(value) or value < 0:
            raise SettingsError(what, expected="a number, 0 or more")
        if name in ("steps", "keep") and not isinstance(value, int):
            raise SettingsError(what, expected="a whole number")
        if name == "max_share" and value > 1:
            raise SettingsError(what, expected="a share, at most 1")
        if name in limits and value <= limits[name]:
            raise SettingsError(what, expected=f"more than {limits[name]:g}")


class SummedLoad:
    """The load of all ranks together since it began.

    newest: the newest sample of each rank, by label. sums: sums over the ranks, one a look.
    best: the highest mean throughput over `BEST_OVER` s, and the mean number of running
    requests then; zeros before that.
    """

    def __init__(self) -> None:
        self.newest: dict[str, LoadSample] = {}
        self.sums: deque[LoadSample] = deque(maxlen=10_000)
        self.best = (0.0, 0.0)

    def add(self, samples: Sequence[LoadSample], now: float) -> None:
        """Takes the samples of one look, at `now` (Unix s)."""
        for sample in samples:
            before = self.newest.get(sample.rank)
            if sample.throughput is None and before is not None:  # a prefill line
                sample = replace(sample, throughput=before.throughput)
            self.newest[sample.rank] = sample
        loads = self.newest.values()
        throughput = math.fsum(load.throughput or 0.0 for load in loads)
        running = sum(load.running for load in loads)
        waiting = sum(load.waiting for load in loads)
        self.sums.append(LoadSample(now, "", running, waiting, throughput=throughput))
        if now - self.sums[0].time < BEST_OVER:
            return  # too short for a mean
        recent = [moment for moment in self.sums if moment.time > now - BEST_OVER]
        rate = math.fsum(moment.throughput or 0.0 for moment in recent) / len(recent)
        if rate > self.best[0]:
            self.best = (rate, sum(moment.running for moment in recent) / len(recent))


class _SumDetector:
    """Declares an onset once its trigger has been met for `hold` s, then waits until it is not."""

    largest_factor = 1.0

    def __init__(self, trigger: _SumTrigger, *, hold: float) -> None:
        self.judged_s = 0.0
        self._trigger = trigger
        self._hold = hold
        self._load = SummedLoad()
        self._since: float | None = None
        self._declared = False

    def add(self, samples: Samples, now: float) -> list[Onset]:
        source = self._trigger.source
        new = [s for s in samples if isinstance(s, LoadSample) and s.source == source]
        if not new:
            return []
        if self._load.sums:
            self.judged_s += max(0.0, now - self._load.sums[-1].time)
        self._load.add(new, now)
        judged = self._trigger.judge(self._load)
        if judged is None:
            self._since, self._declared = None, False
            return []
        self._since = now if self._since is None else self._since
        if self._declared or now - self._since < self._hold:
            return []
        self._declared = True
        factor, sentence = judged
        ranks = tuple(
            RankLoad(load.rank, load.running, load.waiting, load.tokens, load.token_usage)
            for load in sorted(self._load.newest.values(), key=lambda load: load.rank)
        )
        resolution = 1.0 if source == "log" else 0.5
        kind = self._trigger.kind
        return [Onset(self._since, now, kind, factor, resolution, source, ranks, sentence=sentence)]


# Not in their bodies: dataclasses look for `ClassVar` in the module that a class names.
for _public in (ImbalanceOnset, KernelImbalance, QueueGrowth, Ring, ThroughputDrop):
    _public.__module__ = "pytest_sglprof"
