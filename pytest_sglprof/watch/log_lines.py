"""`LineReader`: load samples from the lines of a server's log, whatever else they hold."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator

from pytest_sglprof.ranks import Rank
from pytest_sglprof.server.log_lines import Entry, EntryReader, read_balance, read_batch
from pytest_sglprof.values import BalanceSample, LoadSample

Sample = LoadSample | BalanceSample
MOST_RANKS = 4096  # a number beyond is no rank's, and all ranks below it are kept an account of


class LineReader:
    """Reads line after line; never raises, and ignores what is no load.

    has_milliseconds: the server runs with SGLANG_LOG_MS=1, so stamps are that fine.
    """

    def __init__(self) -> None:
        self._entries = EntryReader()
        self.has_milliseconds = False

    def read(self, lines: Iterable[str]) -> list[Sample]:
        """The samples of these lines, in their order."""
        return [*self._samples(lines)]

    def _samples(self, lines: Iterable[str]) -> Iterator[Sample]:
        for entry in self._entries.read(lines):
            sample: Sample | None = None
            if entry.is_batch:
                sample = _load(entry)
            elif entry.kind == "experts":
                sample = _experts(entry)
            if sample is not None:
                self.has_milliseconds = self.has_milliseconds or not entry.resolution
                yield sample


@functools.lru_cache(maxsize=4096)  # one text a rank, however many samples it has
def load_rank(tags: str) -> str:
    """`DP1` of ` DP1 PP0 TP4 EP4`: the parts that say whose requests they are.

    The TP, CP and EP ranks of one DP rank share its requests; the stages of a pipeline log
    each on their own. "" where no DP tag stands, and for tags that are none of SGLang's.
    """
    rank = Rank.parse(tags)
    if rank is None or rank.dp is None or rank.dp >= MOST_RANKS:
        return ""
    return Rank(dp=rank.dp, pp=rank.pp).label


def _load(entry: Entry) -> LoadSample | None:
    batch = read_batch(entry)
    if batch.running is None:
        return None
    return LoadSample(
        time=entry.time,
        rank=load_rank(entry.tags),
        running=batch.running,
        waiting=batch.waiting,
        tokens=batch.tokens,
        token_usage=batch.token_usage,
        throughput=batch.throughput,
        iteration=batch.iteration,
    )


def _experts(entry: Entry) -> BalanceSample | None:
    balance = read_balance(entry)
    if balance is None:
        return None
    return BalanceSample(
        time=entry.time,
        rank=load_rank(entry.tags),
        kind="experts",
        factor=1.0 / balance.balancedness,
        iteration=balance.iteration,
    )
