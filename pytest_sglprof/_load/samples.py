"""`RankBoard`: what each DP rank has to do now, as far as samples have told."""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Literal

from pytest_sglprof._ranks import Rank


@dataclass(frozen=True, slots=True)  # hundreds of thousands are kept
class LoadSample:
    """What one DP rank had to do at one moment, as the server told it.

    time: Unix time, s. rank: label (`DP1`, `DP0 PP1`); "" where the server logs no DP tag,
    since there is one DP rank. running, waiting: requests. tokens: KV tokens held, None
    where the source leaves it out (prefill lines). token_usage: share of the KV cache, 0 to
    1. throughput: generated tokens / s, None of a prefill line. iteration: the rank's own
    forward pass, None where it is not told. source: "log" or "loads".
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
    """A balance that the server measures itself. factor: λ = max / mean, 1.0 is perfect.

    time: Unix time, s. kind: "experts" (tokens of the GPUs that hold experts; the server
    tells mean / max, its "balancedness") or "dp_tokens" (tokens of the DP ranks in a step
    under DP attention). iteration: forward pass, where told. source: "log" or "metrics".
    """

    time: float
    rank: str
    kind: Literal["experts", "dp_tokens"]
    factor: float
    iteration: int | None = None
    source: str = "log"


GAPS = 9  # of each rank's newest gaps the median is its interval
PATIENCE = 3.0  # intervals without a line after which a rank counts as silent
MIN_PATIENCE = 2.0  # s; stamps of a log have 1 s
LOG_STAMP = 1.0  # s; resolution of a log's stamps without SGLANG_LOG_MS=1


@dataclass(frozen=True)
class RankLoad:
    """Load of one rank. running, waiting: requests; tokens, usage: of its KV cache.

    silent_since: Unix time, s, since which a rank that logs nothing has been without work;
    None for a rank that tells of itself.
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

    ranks: labels that are known to exist; a rank that was never heard of counts as silent.
    falls_silent: True for a log, where a rank without work writes nothing. stamp: s, the
    resolution of the samples' times.
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
        """Typical time between two samples of a rank, s: of the slowest one that is heard."""
        return max((seen.interval for seen in self._seen.values()), default=0.0)

    @property
    def resolution(self) -> float:
        """How exactly a moment can be known from these samples, s."""
        return max(self.stamp, self.interval)

    @property
    def patience(self) -> float:
        """Seconds without a line after which a rank counts as silent."""
        return max(MIN_PATIENCE, PATIENCE * self.interval, 2 * self.stamp)

    def add(self, sample: LoadSample) -> None:
        """Takes one sample; an older one than is known of its rank is ignored."""
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

        A rank is only silent while another is heard: when all of them stop writing, each
        is idle, or the log has ended.
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
        """A DP tag is only logged where there are more: at least those below it, and one."""
        parsed = Rank.parse(rank)
        if parsed is None or parsed.dp is None:
            self._known.setdefault(rank)
            return
        for number in range(max(2, parsed.dp + 1)):
            self._known.setdefault(replace(parsed, dp=number).label)


def group_of(rank: str) -> str:
    """What ranks must share to be compared: the pipeline stage (`PP1`), "" without stages."""
    parsed = Rank.parse(rank)
    return "" if parsed is None else replace(parsed, dp=None).label


def _order(rank: str) -> tuple[int, ...]:
    parsed = Rank.parse(rank)
    return parsed.sort_key if parsed is not None else ()
