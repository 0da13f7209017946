"""Load samples, and `RankBoard`: the current load of each DP rank, from its samples."""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Literal

from pytest_sglprof._ranks import Rank


@dataclass(frozen=True, slots=True)  # hundreds of thousands are kept
class LoadSample:
    """The load of one DP rank at one moment, as the server reported it.

    time: Unix time, s. rank: label (`DP1`, `DP0 PP1`); "" if there is only one DP rank, so
    that the server logs no DP tag. running, waiting: requests. tokens: KV tokens held; None if
    the source leaves it out (prefill lines). token_usage: share of the KV cache, 0 to 1.
    throughput: generated tokens / s; None for a prefill line. iteration: number of the rank's
    forward pass; None if not known. source: "log" or "loads".
    """

    __module__ = "pytest_sglprof"

    time: float
    rank: str
    running: int
    waiting: int
    tokens: int | None = None
    token_usage: float | None = None
    throughput: float | None = None
    iteration: int | None = None
    source: str = "log"


@dataclass(frozen=True, slots=True)
class BalanceSample:
    """A balance that the server itself measures. factor: λ = max / mean, 1.0 is perfect.

    time: Unix time, s. kind: "experts" (tokens of the GPUs that hold experts; the server
    reports mean / max, its "balancedness") or "dp_tokens" (tokens of the DP ranks in a step
    under DP attention). iteration: number of the forward pass; None if not known. source:
    "log" or "metrics".
    """

    time: float
    rank: str
    kind: Literal["experts", "dp_tokens"]
    factor: float
    iteration: int | None = None
    source: str = "log"


GAPS = 9  # of a rank between its newest samples; their median is its interval
PATIENCE = 3.0  # intervals without a line after which a rank counts as silent
MIN_PATIENCE = 2.0  # s; stamps of a log have 1 s
LOG_STAMP = 1.0  # s; resolution of a log's stamps without SGLANG_LOG_MS=1


@dataclass(frozen=True)
class RankLoad:
    """Load of one rank. running, waiting: requests; tokens, usage: of its KV cache.

    silent_since: Unix time, s, from which a rank that logs nothing counts as idle; None for a
    rank that is heard.
    """

    rank: str
    running: float
    waiting: float
    tokens: float | None = None
    usage: float | None = None
    silent_since: float | None = None


@dataclass
class _Seen:
    time: float
    load: RankLoad
    gaps: deque[float] = field(default_factory=lambda: deque(maxlen=GAPS))

    @property
    def interval(self) -> float:
        return statistics.median(self.gaps) if self.gaps else 0.0


class RankBoard:
    """The newest load of each rank of one group.

    ranks: labels of ranks that are known to exist; those never heard count as silent.
    falls_silent: True for a log, where an idle rank writes nothing. stamp: resolution of the
    samples' times, s.
    """

    def __init__(
        self, ranks: Iterable[str] = (), *, falls_silent: bool, stamp: float = 0.0
    ) -> None:
        self.falls_silent = falls_silent
        self.stamp = stamp
        self._known = dict.fromkeys(ranks)
        self._seen: dict[str, _Seen] = {}
        self._began: float | None = None
        self._newest = 0.0

    @property
    def newest(self) -> float:
        """Time of the newest sample, Unix s; 0 before the first."""
        return self._newest

    @property
    def interval(self) -> float:
        """Typical time between two samples of the same rank, s; the largest of the ranks."""
        return max((seen.interval for seen in self._seen.values()), default=0.0)

    @property
    def resolution(self) -> float:
        """How precisely these samples can date a change, s."""
        return max(self.stamp, self.interval)

    @property
    def patience(self) -> float:
        """Seconds without a line after which a rank counts as silent."""
        return max(MIN_PATIENCE, PATIENCE * self.interval, 2 * self.stamp)

    def add(self, sample: LoadSample) -> None:
        """Takes one sample; ignores it if the rank has a newer one."""
        seen = self._seen.get(sample.rank)
        if seen is not None and sample.time < seen.time:
            return
        load = RankLoad(
            sample.rank, sample.running, sample.waiting, sample.tokens, sample.token_usage
        )
        if seen is None:
            seen = self._seen[sample.rank] = _Seen(sample.time, load)
            self._know(sample.rank)
        elif sample.time > seen.time:
            if sample.time - seen.time <= self.patience or not self.falls_silent:
                seen.gaps.append(sample.time - seen.time)
            seen.time = sample.time
        if load.tokens is None:
            load = replace(load, tokens=seen.load.tokens)
        seen.load = load
        self._began = sample.time if self._began is None else self._began
        self._newest = max(self._newest, sample.time)

    def loads(self, now: float) -> tuple[RankLoad, ...]:
        """Each known rank's load at `now`, in the order of the ranks.

        In a log, silence means idleness: a rank whose next line is overdue has load 0.
        """
        heard = max(now, self._newest) if self.falls_silent else now
        loads = [self._load(rank, heard) for rank in self._known]
        return tuple(sorted(loads, key=lambda load: _order(load.rank)))

    def _load(self, rank: str, now: float) -> RankLoad:
        seen = self._seen.get(rank)
        if not self.falls_silent:
            return seen.load if seen else RankLoad(rank, 0, 0)
        last = seen.time if seen else self._began
        if last is None or (seen is not None and now - last <= self.patience):
            return seen.load if seen else RankLoad(rank, 0, 0)
        # Its next line would have come one interval later.
        since = min(now, last + (seen.interval if seen else 0.0))
        return RankLoad(
            rank, 0, 0, 0 if seen and seen.load.tokens is not None else None, 0.0, since
        )

    def _know(self, rank: str) -> None:
        """Adds the ranks that a label implies: a DP tag implies ranks 0 to n, and at least two."""
        parsed = Rank.parse(rank)
        if parsed is None or parsed.dp is None:
            self._known.setdefault(rank)
            return
        for number in range(max(2, parsed.dp + 1)):
            self._known.setdefault(replace(parsed, dp=number).label)


def group_of(rank: str) -> str:
    """The pipeline stage of a rank (`PP1`), within which load is compared; "" without stages."""
    parsed = Rank.parse(rank)
    return "" if parsed is None else replace(parsed, dp=None).label


def _order(rank: str) -> tuple[int, ...]:
    parsed = Rank.parse(rank)
    return parsed.sort_key if parsed is not None else ()
