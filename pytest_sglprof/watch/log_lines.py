"""`LineReader`: load samples from the lines of a server's log, whatever else they hold."""

from __future__ import annotations

import functools
import re
import time
from collections.abc import Iterable, Iterator, Mapping

from pytest_sglprof.ranks import Rank
from pytest_sglprof.values import BalanceSample, LoadSample

Sample = LoadSample | BalanceSample
MOST_RANKS = 4096  # a number beyond is no rank's, and all ranks below it are kept an account of

# `[2026-11-24 03:13:51.123 DP0 TP0] `, wherever it stands: Ray puts a head before it, and
# processes that share one pipe now and then glue their entries together.
_STAMP = re.compile(r"\[(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d)(?:[.,](\d{1,6}))?((?: [A-Z_]+\d+)*)\]")
_BATCH = re.compile(r"(Prefill|Decode) batch(?: \[(\d+)\])?")
_EXPERTS = re.compile(r"\[Expert Balancedness\]")
_PAIR = re.compile(r"([#A-Za-z][^:,\[\]]*?): (-?\d+(?:\.\d+)?)")
_FIELD = re.compile(r"(\w+)=(-?\d+(?:\.\d+)?)")
_USAGES = ("token usage", "full token usage", "swa token usage", "mamba usage", "gpu token usage")
# What the server itself counts as waiting (`num_waiting_reqs` of /v1/loads).
_QUEUES = ("#queue-req", "#bootstrap-req", "#prealloc-req", "#transfer-req", "#retracted-req")


class LineReader:
    """Reads line after line; never raises, and ignores what is no load.

    An entry without a stamp of its own gets the newest stamp before it. Stamps are local
    time of the server's machine, to the second unless it runs with SGLANG_LOG_MS=1.
    """

    def __init__(self) -> None:
        self._stamp: tuple[float, str] | None = None
        self._second = ("", 0.0)
        self.has_milliseconds = False

    def read(self, lines: Iterable[str]) -> list[Sample]:
        """The samples of these lines, in their order."""
        return [sample for line in lines for sample in self._samples(line)]

    def _samples(self, line: str) -> Iterator[Sample]:
        marks = [*_BATCH.finditer(line), *_EXPERTS.finditer(line)]
        if not marks:
            return
        marks.sort(key=lambda mark: mark.start())
        stamps = [(match.start(), self._read_stamp(match)) for match in _STAMP.finditer(line)]
        starts = [mark.start() for mark in marks] + [at for at, _ in stamps]
        for mark in marks:
            before = [stamp for at, stamp in stamps if stamp and at < mark.start()]
            stamp = before[-1] if before else self._stamp
            if stamp is None:
                continue
            end = min((at for at in starts if at > mark.start()), default=len(line))
            sample = _sample(mark, line[mark.end() : end], *stamp)
            if sample is not None:
                yield sample
        if stamps and stamps[-1][1]:
            self._stamp = stamps[-1][1]

    def _read_stamp(self, match: re.Match[str]) -> tuple[float, str] | None:
        text, fraction, tags = match.groups()
        if self._second[0] != text:
            try:
                moment = time.mktime(time.strptime(text, "%Y-%m-%d %H:%M:%S"))
            except (ValueError, OverflowError):
                return None
            self._second = (text, moment)
        if fraction:
            self.has_milliseconds = True
        rest = float(f"0.{fraction}") if fraction else 0.0
        return self._second[1] + rest, load_rank(tags)


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


def _sample(mark: re.Match[str], text: str, moment: float, rank: str) -> Sample | None:
    if mark.re is _EXPERTS:
        return _experts(text, moment, rank)
    values = {key.strip(): float(value) for key, value in _PAIR.findall(text)}
    if "#running-req" not in values:
        return None
    stage, iteration = mark.groups()
    usages = [values[name] for name in _USAGES if name in values]
    return LoadSample(
        time=moment,
        rank=rank,
        # Of a prefill the line counts what runs besides; its own requests run from now on.
        running=int(values["#running-req"] + values.get("#new-seq", 0)),
        waiting=int(sum(values.get(name, 0) for name in _QUEUES)),
        tokens=_tokens(values),
        token_usage=max(usages) if usages else None,
        throughput=values.get("gen throughput (token/s)") if stage == "Decode" else None,
        iteration=int(iteration) if iteration else None,
    )


def _tokens(values: Mapping[str, float]) -> int | None:
    """Hybrid models hold a full pool and a window pool, sparse ones a GPU and a CPU pool."""
    for name in ("#token", "#full token"):
        if name in values:
            return int(values[name])
    if "#gpu token" in values:
        return int(values["#gpu token"] + values.get("#cpu token", 0))
    return None


def _experts(text: str, moment: float, rank: str) -> BalanceSample | None:
    values = dict(_FIELD.findall(text))
    balancedness = float(values.get("current_pass_balancedness", 0.0))
    if not 0.0 < balancedness <= 1.0:
        return None
    iteration = values.get("forward_pass_id", "")
    return BalanceSample(
        time=moment,
        rank=rank,
        kind="experts",
        factor=1.0 / balancedness,
        iteration=int(iteration) if iteration.isdigit() else None,
    )
