"""The grammar of SGLang's log: time stamps, tags of ranks, and the entries that are used.

    [2026-11-24 03:13:51.250 DP1 TP0] Decode batch [7], #running-req: 3, #token: 70, …

A new kind of entry is one row of `_HEADS`, a new figure of a batch one field of `Batch`. The
logs of SGLang 0.4 to 0.5.23 are understood. Only ranks with attention-TP rank 0 log batches;
all ranks log the rest.
"""

from __future__ import annotations

import functools
import re
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal, cast

import msgspec

from pytest_sglprof._ranks import Rank


@dataclass(frozen=True)
class AcceptLength:
    """Tokens that speculative decoding accepted per request, mean of the passes before `time`.

    time: Unix time in s. dp: the replica that logged it, None if there is only one.
    """

    time: float
    dp: int | None
    length: float


@dataclass(frozen=True)
class SyncWait:
    """How long the scheduler of a DP rank waited for its peers before a pass, by its own measure.

    seconds: mean over `passes`. long: how many of the waits were longer than 0.1 s.
    """

    dp: int
    seconds: float
    passes: int
    long: int = 0


@dataclass(frozen=True)
class ServerFacts:
    """What the server's log and metrics say about a window's forward passes.

    rebalances: (start, end) of each rebalance of experts, Unix times in s, not overlapping.
    captures: how often a capture of graphs began. balancedness: mean / max of the tokens that the
    experts of each GPU got, mean of the passes, above 0 to 1; None if not known. sync_waits: of
    each DP rank of which it is known.
    """

    rebalances: tuple[tuple[float, float], ...] = ()
    accepted: tuple[AcceptLength, ...] = ()
    captures: int = 0
    balancedness: float | None = None
    sync_waits: tuple[SyncWait, ...] = ()


SECOND = 1.0  # resolution of a stamp without SGLANG_LOG_MS=1

Kind = Literal[
    "prefill", "decode", "experts", "rebalance_start", "rebalance_end", "capture",
    "profile_start", "profile_end",
]  # fmt: skip
_HEADS: dict[Kind, str] = {
    "prefill": r"Prefill batch",
    "decode": r"Decode batch",
    "experts": r"\[Expert Balancedness\]",
    "rebalance_start": r"\[EPLBManager\] rebalance start",
    "rebalance_end": r"\[EPLBManager\] rebalance end",
    "capture": r"Capture \w[^\[]*? begin\b|Capture (?:cuda|cpu) graph",
    "profile_start": r"Profiling starts",
    "profile_end": r"Profiling done",
}
# These count even without a stamp, which an entry loses when processes that share a pipe write
# into each other's lines. The others need one, since a string that quotes them must not count.
_ANYWHERE = frozenset({"prefill", "decode", "experts"})

# Not only at the start of a line: Ray puts a prefix before it, and lines may hold two entries.
_SECOND = r"\[(?P<second>\d{4}-\d\d-\d\d \d\d:\d\d:\d\d)"
_STAMP = rf"{_SECOND}(?:[.,](?P<fraction>\d{{1,6}}))?(?P<tags>(?: [A-Z_]+\d{{1,18}})*)\]"
_ITERATION = r" \[(\d{1,18})\]"
_HEAD = "|".join(f"(?P<{kind}>{head})" for kind, head in _HEADS.items())
_TOKEN = re.compile(f"(?P<stamp>{_STAMP})|{_HEAD}")
_ENTRY = re.compile(rf"{_STAMP} (?:{_HEAD})(?: \[\d+\])?")
_WORDS = (" batch", "[E", "Profiling ", "Capture ")  # each head has one of them
_BEGIN = re.compile(_SECOND)
_STEP = re.compile(  # of bytes, and with one group: a log of gigabytes is searched with it
    rf"^{re.sub(r'[?]P<[a-z]+>', '?:', _STAMP)} (?:Prefill|Decode) batch{_ITERATION}".encode(), re.M
)
_BATCH_STEP = re.compile(_ITERATION)
_PAIR = re.compile(r"[,.] ([#A-Za-z][^:,\[\]]*): (-?\d{1,18}(?:\.\d+)?)")
_USAGES = ("token usage", "full token usage", "swa token usage", "mamba usage", "gpu token usage")
_QUEUES = ("#queue-req", "#bootstrap-req", "#prealloc-req", "#transfer-req", "#retracted-req")
_FIELD = re.compile(r"(\w+)=(-?\d{1,18}(?:\.\d+)?)")
_PROFILE_ID = re.compile(r"\(with profile id: (.*)\)")


class Entry(msgspec.Struct, frozen=True, gc=False):
    """One entry of the log.

    time: Unix time in s; stamps are taken as this machine's local time, as the server
    writes them. resolution: s that the moment may lie later; 0 with SGLANG_LOG_MS=1.
    tags: of its rank, as written (" DP1 TP0"), "" for none. text: what follows the head that
    gives its kind.
    """

    kind: Kind
    time: float
    resolution: float
    tags: str
    text: str

    @property
    def rank(self) -> Rank | None:
        """The rank that wrote it; None without tags, or with tags that SGLang does not use."""
        return _rank(self.tags)

    @property
    def profile_id(self) -> str | None:
        """The window's id in a "profile_start"; None in the logs of older servers."""
        named = _PROFILE_ID.search(self.text)
        return named[1] if named else None

    @property
    def is_batch(self) -> bool:
        """True for a forward pass. All prefills are logged, and every nth decode."""
        return self.kind in ("prefill", "decode")


class Batch(msgspec.Struct, frozen=True, gc=False):
    """The figures of a batch entry; None for one that is absent.

    running: requests, including those that a prefill adds. waiting: requests in all queues
    that `num_waiting_reqs` of /v1/loads counts. tokens: KV tokens in use.
    token_usage: share of the fullest KV pool, 0 to 1. throughput: generated tokens / s.
    accept_length: tokens per verify step, mean since the rank's last line. iteration: number
    of the rank's forward pass, only logged with SGLANG_LOG_FORWARD_ITERS=1.
    """

    running: int | None
    waiting: int
    tokens: int | None
    token_usage: float | None
    throughput: float | None
    accept_length: float | None
    iteration: int | None


class ExpertBalance(msgspec.Struct, frozen=True, gc=False):
    """An "experts" entry. balancedness: mean / max of the GPUs' tokens, above 0 to 1."""

    balancedness: float
    iteration: int | None


class EntryReader:
    """Reads the entries of a log; skips all other lines and never raises.

    An entry that has lost its stamp gets that of the entry before it.
    """

    def __init__(self) -> None:
        self._stamp: tuple[float, float, str] | None = None

    def read(self, lines: Iterable[str]) -> Iterator[Entry]:
        """The entries of these lines, in their order."""
        for line in lines:
            for word in _WORDS:
                if word in line:
                    break
            else:
                continue
            entry = _ENTRY.match(line)
            rest = line[entry.end() :] if entry else ""
            # Most lines are one entry. A second one needs one of these texts.
            if entry is None or "]" in rest or " batch" in rest:
                yield from self._glued(line)
            elif stamp := _read_stamp(entry):
                self._stamp = stamp
                kind = cast("Kind", entry.lastgroup)
                yield Entry(kind, *stamp, line[entry.end(kind) :])

    def _glued(self, line: str) -> Iterator[Entry]:
        tokens = [*_TOKEN.finditer(line)]
        if all(token.lastgroup == "stamp" for token in tokens):
            return
        stamped = -1  # where the last stamp ends
        for number, token in enumerate(tokens, start=1):
            kind = cast("Kind | Literal['stamp']", token.lastgroup)
            if kind == "stamp":
                stamped = token.end()
                self._stamp = _read_stamp(token) or self._stamp
            elif self._stamp and (kind in _ANYWHERE or token.start() == stamped + 1):
                end = tokens[number].start() if number < len(tokens) else len(line)
                yield Entry(kind, *self._stamp, line[token.end() : end])


def read_batch(entry: Entry) -> Batch:
    """The figures of a "prefill" or "decode" entry."""
    values = {key: float(value) for key, value in _PAIR.findall(entry.text)}
    get = values.get
    running, iteration = get("#running-req"), _BATCH_STEP.match(entry.text)
    # Hybrid models hold a full pool and a window pool, sparse ones a GPU and a CPU pool.
    tokens = get("#token", get("#full token"))
    if tokens is None and "#gpu token" in values:
        tokens = values["#gpu token"] + get("#cpu token", 0)
    return Batch(
        # A prefill logs what runs besides it; the requests that it adds run from now on.
        running=None if running is None else int(running + get("#new-seq", 0)),
        waiting=int(sum(get(name, 0) for name in _QUEUES)),
        tokens=None if tokens is None else int(tokens),
        token_usage=max((values[name] for name in _USAGES if name in values), default=None),
        throughput=get("gen throughput (token/s)") if entry.kind == "decode" else None,
        accept_length=get("accept len"),
        iteration=int(iteration[1]) if iteration else None,
    )


def read_balance(entry: Entry) -> ExpertBalance | None:
    """The figures of an "experts" entry; None without a valid balancedness."""
    values = dict(_FIELD.findall(entry.text))
    balancedness = float(values.get("current_pass_balancedness", 0.0))
    if not 0.0 < balancedness <= 1.0:
        return None
    iteration = values.get("forward_pass_id", "")
    return ExpertBalance(balancedness, int(iteration) if iteration.isdigit() else None)


def begins_entry(line: str) -> bool:
    """True for a line that begins with a stamp."""
    return _BEGIN.match(line) is not None


def highest_iteration(lines: bytes) -> int | None:
    """The highest forward pass in these complete lines. 100 times as fast as `read_batch`."""
    return max((int(number) for number in _STEP.findall(lines)), default=None)


def _read_stamp(token: re.Match[str]) -> tuple[float, float, str] | None:
    second, fraction, tags = token.group("second", "fraction", "tags")
    moment = _unix_second(second)
    if moment is None:
        return None
    return (moment + float(f"0.{fraction}"), 0.0, tags) if fraction else (moment, SECOND, tags)


@functools.lru_cache(maxsize=64)
def _unix_second(text: str) -> float | None:
    try:
        return time.mktime(time.strptime(text, "%Y-%m-%d %H:%M:%S"))
    except (ValueError, OverflowError):
        return None


@functools.lru_cache(maxsize=4096)  # one entry per rank, however many lines it writes
def _rank(tags: str) -> Rank | None:
    return Rank.parse(tags)


# Facts about a window's forward passes: rebalances, accept lengths, captures.


def read_log_facts(lines: Iterable[str], until: float, since: float = 0.0) -> ServerFacts:
    """The facts in `lines`, which were written before Unix time `until` (s).

    since: Unix time, s, from which on the balance of experts counts. Overlapping rebalances of
    several ranks count as one. A rebalance that has no end yet lasts until `until`.
    """
    spans: list[tuple[float, float]] = []
    running: dict[str, float] = {}
    accepted: list[AcceptLength] = []
    captures = 0
    balances: list[float] = []
    for entry in EntryReader().read(lines):
        latest = entry.time + entry.resolution
        if entry.kind == "rebalance_start":
            running.setdefault(entry.tags, entry.time)
        elif entry.kind == "rebalance_end":
            spans.append((running.pop(entry.tags, entry.time), latest))
        elif entry.kind == "capture":
            captures += 1
        elif entry.kind == "experts":
            balance = read_balance(entry)
            if balance is not None and latest >= since:
                balances.append(balance.balancedness)
        elif entry.kind == "decode" and (length := read_batch(entry).accept_length) is not None:
            rank = entry.rank
            accepted.append(AcceptLength(latest, rank.dp if rank else None, length))
    spans += [(begins, until) for begins in running.values()]
    balancedness = sum(balances) / len(balances) if balances else None
    return ServerFacts(tuple(_merged(spans)), tuple(accepted), captures, balancedness)


def _merged(spans: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    whole: list[tuple[float, float]] = []
    for begins, ends in sorted(spans):
        if whole and begins <= whole[-1][1]:
            whole[-1] = (whole[-1][0], max(ends, whole[-1][1]))
        else:
            whole.append((begins, ends))
    return whole
