"""Load samples, and `RankBoard`: the current load of each DP rank, from its samples."""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Iterable, Mapping
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
    forward pass; None if not known. source: "log" or "loads". server: what stands before the
    stamp in a log, to tell who wrote the line (a container, a pod, a label of srun); "" for
    nothing.
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
    server: str = ""


@dataclass(frozen=True, slots=True)
class BalanceSample:
    """A balance that the server itself measures. factor: λ = max / mean, 1.0 is perfect.

    time: Unix time, s. kind: "experts" (tokens of the GPUs that hold experts; the server
    reports mean / max, its "balancedness") or "dp_tokens" (tokens of the DP ranks in a step
    under DP attention). iteration: number of the forward pass; None if not known. source:
    "log" or "metrics". server: as for `LoadSample`.
    """

    time: float
    rank: str
    kind: Literal["experts", "dp_tokens"]
    factor: float
    iteration: int | None = None
    source: str = "log"
    server: str = ""


@dataclass(frozen=True, slots=True)
class WaitSample:
    """How long the scheduler of a DP rank waited for the others before a pass, on average.

    time: Unix time, s. seconds: the mean of the passes since the sample before. From `/metrics`.
    source: "metrics". server: as for `LoadSample`.
    """

    time: float
    rank: str
    seconds: float
    source: str = "metrics"
    server: str = ""


@dataclass(frozen=True)
class KnownRanks:
    """DP ranks that a server's log tells of. here: those whose load it holds.

    total: of the server, which other nodes may log; 0 if not known.
    """

    here: frozenset[int] = frozenset()
    total: int = 0

    def __or__(self, other: KnownRanks) -> KnownRanks:
        """What both tell."""
        return KnownRanks(self.here | other.here, max(self.total, other.total))


NO_NAME = "(no prefix)"  # a server whose lines have none, beside those of others


class Servers:
    """Tells the servers apart whose lines stand in one log, by what stands before the stamps.

    That differs between the nodes of one server (srun) and its actors (Ray), too. So all lines
    are of one server until the same rank is seen behind two different prefixes. known: the DP
    ranks that lines with a prefix tell of.
    """

    def __init__(self) -> None:
        self.several = False
        self.known: Mapping[str, KnownRanks] = {}
        self._of_rank: dict[str, str] = {}

    def add(self, sample: LoadSample) -> None:
        """Takes the next sample."""
        if self._of_rank.setdefault(sample.rank, sample.server) != sample.server:
            self.several = True

    def name(self, server: str) -> str:
        """The server that a sample's `server` stands for; "" if there is only one."""
        return (server or NO_NAME) if self.several else ""

    def group(self, sample: LoadSample) -> str:
        """Within which load is compared: the server, if there are several, and its stage."""
        return f"{self.name(sample.server)} {group_of(sample.rank)}".strip()

    def board(self, sample: LoadSample, ranks: Iterable[str], stamp: float) -> RankBoard:
        """An empty board of a log for the group of `sample`.

        ranks: labels of the DP ranks, if they are known from elsewhere. stamp: see `RankBoard`.
        """
        known = KnownRanks()
        for server, more in self.known.items():
            if not self.several or server == sample.server:
                known |= more
        stage = Rank.parse(sample.rank) or Rank()
        labels = [replace(stage, dp=number).label for number in sorted(known.here)]
        ranks = [rank for rank in ranks if group_of(rank) == group_of(sample.rank)]
        return RankBoard(ranks or labels, falls_silent=True, stamp=stamp, total=known.total)


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

    ranks: labels of ranks that are known to exist; those never heard count as silent. Without
    them a DP rank implies those between it and the others that are heard, and DP0 implies DP1:
    the ranks before may be in the log of another node. total: how many DP ranks the server
    has, if known. falls_silent: True for a log, where an idle rank writes nothing. stamp:
    resolution of the samples' times, s.
    """

    def __init__(
        self,
        ranks: Iterable[str] = (),
        *,
        falls_silent: bool,
        stamp: float = 0.0,
        total: int = 0,
    ) -> None:
        self.falls_silent = falls_silent
        self.stamp = stamp
        self._total = total
        self._known = dict.fromkeys(ranks)
        self._are_given = bool(self._known)
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
        """Adds the rank that is heard, and those that it implies."""
        self._known.setdefault(rank)
        parsed = Rank.parse(rank)
        if self._are_given or parsed is None or parsed.dp is None:
            return
        heard = self.numbers
        highest = max(1, *heard) if 0 in heard else max(heard)
        for number in range(min(heard), highest + 1):
            self._known.setdefault(replace(parsed, dp=number).label)

    @property
    def numbers(self) -> set[int]:
        """The DP ranks that are known."""
        ranks = (Rank.parse(label) for label in self._known)
        return {rank.dp for rank in ranks if rank is not None and rank.dp is not None}

    @property
    def elsewhere(self) -> list[str]:
        """Labels of the DP ranks that exist, but whose load is not known: other nodes log it."""
        numbers = self.numbers
        count = max(self._total, max(numbers) + 1) if numbers else 0
        like = next((Rank.parse(label) for label in self._known), None) or Rank()
        return [replace(like, dp=number).label for number in range(count) if number not in numbers]


def group_of(rank: str) -> str:
    """The pipeline stage of a rank (`PP1`), within which load is compared; "" without stages."""
    parsed = Rank.parse(rank)
    return "" if parsed is None else replace(parsed, dp=None).label


def _order(rank: str) -> tuple[int, ...]:
    parsed = Rank.parse(rank)
    return parsed.sort_key if parsed is not None else ()
