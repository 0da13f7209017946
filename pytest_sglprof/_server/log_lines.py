"""The grammar of SGLang's log: time stamps, tags of ranks, and the entries that are used.

    [2026-11-24 03:13:51.250 DP1 TP0] Decode batch [7], #running-req: 3, #token: 70, …

A new kind of entry is one row of `_HEADS`, a new figure of a batch one field of `Batch`, what
somebody else writes before an entry one row of `_LEADS`. The logs of SGLang 0.4 to 0.5.23 are
understood. Only ranks with attention-TP rank 0 log batches; all ranks log the rest.
"""

from __future__ import annotations

import calendar
import functools
import re
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, cast

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
    "profile_start", "profile_end", "arguments",
]  # fmt: skip
_HEADS: dict[Kind, str] = {
    "prefill": r"Prefill batch",
    "decode": r"Decode batch",
    "experts": r"\[Expert Balancedness\]",
    "rebalance_start": r"\[EPLBManager\] rebalance start",
    "rebalance_end": r"\[EPLBManager\] rebalance end",
    "capture": r"Capture \w[^\[]{0,80}? begin\b|Capture (?:cuda|cpu) graph",
    "profile_start": r"Profiling starts",
    "profile_end": r"Profiling done",
    "arguments": r"server_args=",
}
# These count even without a stamp, which an entry loses when processes that share a pipe write
# into each other's lines. The others need one, since a string that quotes them must not count.
_ANYWHERE = frozenset({"prefill", "decode", "experts"})

_SECOND = r"\[(?P<second>\d{4}-\d\d-\d\d \d\d:\d\d:\d\d)"
_STAMP = rf"{_SECOND}(?:[.,](?P<fraction>\d{{1,6}}))?(?P<tags>(?: [A-Z_]+\d{{1,18}})*)\]"
_ITERATION = r" \[(\d{1,18})\]"
_HEAD = "|".join(f"(?P<{kind}>{head})" for kind, head in _HEADS.items())
_TOKEN = re.compile(f"(?P<stamp>{_STAMP})|{_HEAD}")
_ENTRY = re.compile(rf"{_STAMP} (?:{_HEAD})(?: \[\d+\])?")
_FIRST = re.compile(_HEAD)
_BATCH = re.compile(r"(?:Prefill|Decode) batch(?: \[\d+\])?[,.] #")
_BEGIN = re.compile(_SECOND)
_STEP = re.compile(  # of bytes, and with one group: a log of gigabytes is searched with it
    rf"^{re.sub(r'[?]P<[a-z]+>', '?:', _STAMP)} (?:Prefill|Decode) batch{_ITERATION}".encode(), re.M
)
_BATCH_STEP = re.compile(_ITERATION)
_PAIR = re.compile(r"[,.] ([#A-Za-z][^:,\[\]]*): (-?\d{1,18}(?:\.\d+)?)")
_USAGES = ("token usage", "full token usage", "swa token usage", "mamba usage", "gpu token usage")
# As /v1/loads counts them. `#unbootstrapped-req` and `#bootstrap-req` are older and newer names.
_QUEUES = (
    "#queue-req", "#unbootstrapped-req", "#bootstrap-req", "#prealloc-req", "#transfer-req",
    "#retracted-req",
)  # fmt: skip
# What a prefill adds to `#running-req`: its requests, and those whose KV cache is being sent.
_HELD = ("#new-seq", "#transferring-req", "#inflight-req")
_LONGEST_BATCH = 4_000  # characters of an entry in which figures are looked for
_FIELD = re.compile(r"(\w+)=(-?\d{1,18}(?:\.\d+)?)")
_PROFILE_ID = re.compile(r"\(with profile id: (.*)\)")
_SIZE = re.compile(r"\b(dp_size|attn_dp_size|pp_size|nnodes|node_rank)'?[=:] ?(\d{1,9})")


class Entry(msgspec.Struct, frozen=True, gc=False):
    """One entry of the log.

    time: Unix time in s; stamps are taken as this machine's local time, as the server
    writes them. resolution: s that the moment may lie later; 0 with SGLANG_LOG_MS=1.
    tags: of its rank, as written (" DP1 TP0"), "" for none. text: what follows the head that
    gives its kind. server: what a wrapper put before the stamp to tell who wrote the line (the
    name of a container or a pod, Ray's actor, a label of srun), "" for nothing.
    """

    kind: Kind
    time: float
    resolution: float
    tags: str
    text: str
    server: str = ""

    @property
    def rank(self) -> Rank | None:
        """The rank that wrote it; None without tags that are known."""
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

    running: requests, including `held`; prefill servers up to 0.5.2 leave it out. held: requests
    that a prefill adds, or that a prefill server holds until their KV cache is sent. waiting:
    requests in all queues that `num_waiting_reqs` of /v1/loads counts. tokens: KV tokens in use.
    token_usage: share of the fullest KV pool, 0 to 1. throughput: generated tokens / s.
    accept_length: tokens per verify step, mean since the rank's last line. iteration: number
    of the rank's forward pass, only logged with SGLANG_LOG_FORWARD_ITERS=1.
    """

    running: int | None
    held: int
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

    An entry counts at the start of a line, after what a wrapper or a format of the user's put
    there, and where it was glued to another. An entry that has lost its stamp gets that of the
    entry before it. unreadable: batch lines without a stamp that can be read. is_own_format:
    whether an entry had a level or a module, in a format of the user's, before it.
    """

    def __init__(self) -> None:
        self.unreadable = 0
        self.is_own_format = False
        self._stamp: Stamp | None = None

    def read(self, lines: Iterable[str]) -> Iterator[Entry]:
        """The entries of these lines, in their order."""
        for line in lines:
            # Each head of `_HEADS` has one of these words, and few other lines do.
            if not (
                " batch" in line
                or "[E" in line
                or "Profiling " in line
                or "Capture " in line
                or "server_args=" in line
            ):
                continue
            entry = _ENTRY.match(line)
            rest = line[entry.end() :] if entry else ""
            # Most lines are one entry. A second one needs one of these texts; the arguments of a
            # server hold both.
            if entry is None or (
                ("]" in rest or " batch" in rest) and entry.lastgroup != "arguments"
            ):
                yield from self._record(line)
            elif stamp := _read_stamp(entry):
                self._stamp = stamp
                kind = cast("Kind", entry.lastgroup)
                yield Entry(kind, *stamp, line[entry.end(kind) :])
            else:
                self.unreadable += 1

    def _record(self, line: str, server: str = "", stamp: Stamp | None = None) -> Iterator[Entry]:
        """The entries of one line. server, stamp: what the JSON says that holds it."""
        line = _COLOUR.sub("", line) if "\x1b" in line else line
        lead = _read_lead(line, stamp)
        server = " ".join(filter(None, (server, lead.server)))
        if line.startswith("{", lead.end):
            if wrapped := _unwrap(line[lead.end :]):
                server = f"{server} {wrapped.server}".strip()
                yield from self._record(wrapped.text, server, wrapped.stamp or lead.stamp)
            return
        begin = -1 if lead.is_timed and lead.stamp is None else lead.end
        count = 0
        for entry in self._entries(line, lead.end, begin, server, lead.stamp):
            count += 1
            self.is_own_format |= lead.is_own
            yield entry
        batch = None if count else _BATCH.search(line, lead.end)
        self.unreadable += bool(batch and not _QUOTE.search(line, lead.end, batch.start()))

    def _entries(
        self, line: str, at: int, begin: int, server: str, stamp: Stamp | None
    ) -> Iterator[Entry]:
        """The entries after `at`. begin: where the head of one may stand; stamp: its own."""
        tokens = [*_TOKEN.finditer(line, at)]
        quote = _first_quote(line, at)
        after_batch = False  # the text of a batch quotes nobody
        for number, token in enumerate(tokens, start=1):
            kind = cast("Kind | Literal['stamp']", token.lastgroup)
            if kind == "stamp":
                if after_batch or _is_glued(line, at, token.start(), quote):
                    stamp = _read_stamp(token)
                    begin, after_batch = (token.end() + 1 if stamp else -1), False
                continue
            if token.start() == begin:
                if stamp is None and kind in _ANYWHERE:  # lost, which happens to one at a time
                    stamp, self._stamp = self._stamp, None
                else:
                    self._stamp = stamp
            elif not after_batch or kind not in _ANYWHERE:
                continue
            if stamp is not None:
                after_batch = kind in _ANYWHERE
                end = tokens[number].start() if number < len(tokens) else len(line)
                yield Entry(kind, *stamp, line[token.end() : end], server)


def read_batch(entry: Entry) -> Batch:
    """The figures of a "prefill" or "decode" entry."""
    # Most of them are not needed as numbers.
    values = dict(_PAIR.findall(entry.text, 0, _LONGEST_BATCH))
    get = values.get
    running, accepted = get("#running-req"), get("accept len")
    is_decode = entry.kind == "decode"
    rate = get("gen throughput (token/s)") if is_decode else None
    held = 0 if is_decode else int(sum([float(values[name]) for name in _HELD if name in values]))
    iteration = _BATCH_STEP.match(entry.text)
    # Hybrid models hold a full pool and a window pool, sparse ones a GPU and a CPU pool.
    tokens = get("#token") or get("#full token")
    if tokens is None and "#gpu token" in values:
        tokens = float(values["#gpu token"]) + float(get("#cpu token", 0))
    usages = [float(values[name]) for name in _USAGES if name in values]
    return Batch(
        # A prefill logs what runs besides it; the requests that it adds run from now on.
        running=None if running is None else int(float(running)) + held,
        held=held,
        waiting=int(sum([float(values[name]) for name in _QUEUES if name in values])),
        tokens=None if tokens is None else int(float(tokens)),
        token_usage=max(usages) if usages else None,
        throughput=None if rate is None else float(rate),
        accept_length=None if accepted is None else float(accepted),
        iteration=int(iteration[1]) if iteration else None,
    )


def read_balance(entry: Entry) -> ExpertBalance | None:
    """The figures of an "experts" entry; None without a valid balancedness."""
    values = dict(_FIELD.findall(entry.text, 0, _LONGEST_BATCH))
    balancedness = float(values.get("current_pass_balancedness", 0.0))
    if not 0.0 < balancedness <= 1.0:
        return None
    iteration = values.get("forward_pass_id", "")
    return ExpertBalance(balancedness, int(iteration) if iteration.isdigit() else None)


class LoggedSizes(NamedTuple):
    """How many DP ranks a server has, on how many nodes, and the node that logged it."""

    total: int
    nodes: int
    node: int

    @property
    def here(self) -> frozenset[int]:
        """The DP ranks of this node."""
        ranks = range(self.total)
        return frozenset(rank for rank in ranks if rank * self.nodes // self.total == self.node)


def read_sizes(entry: Entry) -> LoggedSizes | None:
    """What an "arguments" entry says of DP ranks; None where it says nothing."""
    sizes: dict[str, int] = {}
    for name, value in _SIZE.findall(entry.text):
        sizes.setdefault(name, int(value))
    get = sizes.get
    total = get("dp_size", 0) * get("attn_dp_size", 1)
    # The nodes of one pipeline stage share its DP ranks.
    nodes = max(1, get("nnodes", 1) // max(1, get("pp_size", 1)))
    return LoggedSizes(total, nodes, get("node_rank", 0) % nodes) if total > 1 else None


def begins_entry(line: str) -> bool:
    """True for a line that begins with a stamp."""
    return _BEGIN.match(line) is not None


def highest_iteration(lines: bytes) -> int | None:
    """The highest forward pass in these complete lines. 100 times as fast as `read_batch`."""
    return max((int(number) for number in _STEP.findall(lines)), default=None)


Stamp = tuple[float, float, str]  # time, resolution and tags of an entry


def _read_stamp(token: re.Match[str]) -> Stamp | None:
    second, fraction, tags = token.group("second", "fraction", "tags")
    return _stamp(second, fraction, "", tags)


def _stamp(second: str, fraction: str | None, zone: str, tags: str) -> Stamp | None:
    moment = _unix_second(second, zone)
    if moment is None:
        return None
    return (moment + float(f"0.{fraction}"), 0.0, tags) if fraction else (moment, SECOND, tags)


@functools.lru_cache(maxsize=64)
def _unix_second(text: str, zone: str = "") -> float | None:
    """Unix time; local time without a zone, as the server writes it."""
    try:
        parts = time.strptime(text, "%Y-%m-%d %H:%M:%S")
        if not zone:
            return time.mktime(parts)
        digits = zone.strip().replace(":", "")
        minutes = int(digits[1:3]) * 60 + int(digits[3:5]) if digits[1:].isdigit() else 0
        return calendar.timegm(parts) - 60 * (-minutes if digits[0] == "-" else minutes)
    except (ValueError, OverflowError):
        return None


@functools.lru_cache(maxsize=4096)  # one entry per rank, however many lines it writes
def _rank(tags: str) -> Rank | None:
    return Rank.from_tags(tags)


# What stands before an entry: what a wrapper adds, and formats of the user's
# (SGLANG_LOGGING_CONFIG_PATH). Texts that a server quotes must not look like it.

_MOST_PIECES = 16
_LONGEST_PIECE = 1_000  # characters
_CLOCK = (
    r"(?P<date>\d{4}[-/]\d\d[-/]\d\d)[T ](?P<clock>\d\d:\d\d:\d\d)(?:[.,](?P<part>\d{1,9}))?"
    r"(?P<zone> ?(?:Z|UTC|GMT|[+-]\d\d:?\d\d)\b)?"
)
_LEADS = {
    "time": rf"(?P<open>\[)?{_CLOCK}(?(open)(?P<words>(?: [^\s\[\]'\"]{{1,32}})*)\]|(?![\w.]))",
    # Says nothing: a level, the stream of a container.
    "noise": r"\[?(?i:trace|debug|info|notice|warn|warning|error|critical|fatal)\]?(?!\w):?"
    r"|std(?:out|err) [FP](?= )",
    # Tells who wrote the line, where a stamp follows: Ray, compose, kubectl --prefix and mpirun,
    # journald, srun and pdsh, stern.
    "label": r"\((?:[^()'\"]|\([^()'\"]*\))*\bpid=\d+[^()'\"]*\)"
    r"|[\w./-]+ *\|(?= )"
    r"|\[(?=[^\]]*[\d/-])[\w./:@,-]+\](?:<\w+>)?:?"
    r"|(?:[A-Z][a-z]{2} [ \d]\d \d\d:\d\d:\d\d )?[\w.-]+ [\w./-]+\[\d+\]:"
    r"|[\w.-]*\d[\w.-]*:(?= )"
    r"|[a-z0-9]+(?:[.-][a-z0-9]+)+(?: [\w.-]+)?(?= \[\d{4}-)",
    # Of a user's format, after the stamp: module, line, logger, process, separators.
    "fill": r"\[[^\[\]'\"]*\]|\([^()'\"]*\)|[-|:>]+|\d+\b|[A-Z_]{2,8}\d{1,9}\b"
    r"|[A-Za-z_]\w*(?:[.:/-]\w+)+[\]:]?|(?:root|sglang|scheduler|Main(?:Process|Thread))\b:?",
}
_LEAD = re.compile(
    "(?:" + "|".join(f"(?P<{kind}>{lead})" for kind, lead in _LEADS.items()) + r")[ \t]*"
)
_TAG = re.compile(r"(?<![^\s\[])[A-Z_]{2,8}\d{1,9}(?![^\s\]])")
_COLOUR = re.compile(r"\x1b\[[\d;]*[A-Za-z]")
_QUOTE = re.compile("['\"`]")
_QUOTED = re.compile(r'"[A-Z]+ \S+ HTTP/[\d.]+"|' + _QUOTE.pattern)
_TEXTS = ("log", "message", "msg", "MESSAGE", "event", "line", "textPayload")
_TIMES = ("time", "timestamp", "@timestamp", "asctime", "ts", "date")
_NAMES = ("pod_name", "pod", "container_name", "container")


class _Lead(NamedTuple):
    """end: where it ends. is_timed: whether it has a stamp; `stamp` is None if unreadable.

    is_own: whether a format of the user's put more between the stamp and the text.
    """

    end: int
    server: str
    stamp: Stamp | None
    is_timed: bool
    is_own: bool


def _read_lead(line: str, stamp: Stamp | None = None) -> _Lead:
    """What stands at the start of a line before the head of its entry, or before its text.

    stamp: what an object of JSON around the line says.
    """
    end = len(line) - len(line.lstrip())
    labels: list[str] = []
    server, is_timed, is_own, is_filled, tags = "", stamp is not None, False, False, ""
    for _ in range(_MOST_PIECES):
        piece = _LEAD.match(line, end, end + _LONGEST_PIECE)
        if piece is None or _FIRST.match(line, end):
            break
        kind, text = piece.lastgroup, piece[0]
        if (kind == "time" and is_filled) or (kind == "fill" and not is_timed):
            break  # text, perhaps that of a request
        if kind == "time":
            server, is_timed, is_own, tags = " ".join(labels), True, False, piece["words"] or ""
            second = f"{piece['date'].replace('/', '-')} {piece['clock']}"
            stamp = _stamp(second, piece["part"], piece["zone"] or "", "")
        elif kind == "label" and not is_timed:
            labels.append(text.strip(" \t|:()[]"))
        elif kind == "noise":
            is_own |= is_timed
        else:
            labels.append(text.strip(" \t|:()[]"))
            is_own, is_filled = True, is_filled or kind == "fill"
            tags += "".join(f" {tag}" for tag in _TAG.findall(text))
        end = piece.end()
    stamp = (*stamp[:2], tags) if stamp else None
    return _Lead(end, server if is_timed else " ".join(labels), stamp, is_timed, is_own)


class _Wrapped(NamedTuple):
    text: str
    server: str
    stamp: Stamp | None


def _unwrap(text: str) -> _Wrapped | None:
    """The line that an object of JSON holds, by Docker, Kubernetes or a user's format."""
    try:
        fields = msgspec.json.decode(text)
    except (msgspec.MsgspecError, ValueError, RecursionError):
        return None
    if not isinstance(fields, dict):
        return None
    line = next((fields[key] for key in _TEXTS if isinstance(fields.get(key), str)), None)
    if line is None:
        return None
    pod = fields.get("kubernetes")
    names = {**fields, **pod} if isinstance(pod, dict) else fields
    server = " ".join(names[key] for key in _NAMES if isinstance(names.get(key), str))
    stamps = (_json_stamp(fields[key]) for key in _TIMES if key in fields)
    return _Wrapped(line, server, next((stamp for stamp in stamps if stamp), None))


def _json_stamp(value: Any) -> Stamp | None:
    if isinstance(value, int | float) and 1e9 < value < 1e10:  # Unix time in s
        return (float(value), 0.0, "")
    return _read_lead(value).stamp if isinstance(value, str) else None


def _first_quote(line: str, begin: int) -> int:
    """Where the first quote after `begin` stands that is not one of an access log's."""
    quotes = (match for match in _QUOTED.finditer(line, begin) if len(match[0]) == 1)
    return next((match.start() for match in quotes), len(line))


def _is_glued(line: str, begin: int, at: int, quote: int) -> bool:
    """Whether a stamp inside of a line begins an entry, rather than stands in what a request says.

    Its own newline is missing, or that of the entry before it, so no blank is there; and a
    server writes texts of requests in quotes. quote: where the first of these stands.
    """
    if at == begin:
        return True
    before = line[at - 1]
    return not (before.isspace() or before in "([{<'\"=:`") and quote >= at


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
