"""Why a server died: from the lines of its log, and from its exit status.

A cause stands before its aftermath. What a rank died of is logged once, and then, louder, what
the other ranks and the parent process make of it: lost connections, ends of pipes, signals.
"""

from __future__ import annotations

import re
import signal
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from pytest_sglprof._server.log_lines import begins_entry

_EXCEPTION = re.compile(r"^[A-Za-z_][\w.]*(?:Error|Exception|Interrupt|Exit|Warning|Timeout)\b")
_TRACEBACK = "Traceback (most recent call last)"
# The server continues after these: only a request failed.
_HARMLESS = re.compile(r"Exception in ASGI application|Profiling is not in progress")
# What the other ranks log after one of them has died.
_AFTERMATH = re.compile(
    r"Connection (?:closed|reset|was likely closed|aborted)|Connection(?:Reset|Aborted)|EOFError|"
    r"Broken ?pipe|remote process exited|ncclRemoteError|failed to recv|"
    r"KeyboardInterrupt|Connection refused|Socket closed|IncompleteReadError",
    re.I,
)
# A process that ended by itself, as its parent, Ray or the kernel tells it.
_ENDED = (
    r"scheduler (?:is dead|died)|exit ?code:? -?[1-9]|(?:crashed|failed) with (?:an )?exit code|"
    r"terminated with -?[1-9]|(?:actor|worker)\S* (?:died|crashed|unexpectedly exit)|"
    r"oom-?kill|Killed|core dumped|SIG(?:SEGV|BUS|ILL|ABRT|FPE|KILL)\b"
)
_CAUSES = re.compile(
    r"out of memory|OutOfMemory|not enough memory|address already in use|errno 98|"
    r"port \d+ is (?:not available|in use)|watchdog|segmentation fault|"
    r"bus error|illegal instruction|unrecognized arguments|: error: |"
    r"No module named|no such file or directory|can't open file|permission denied|"
    r"no space left|CUDA error|NCCL error|illegal memory access|device-side assert|"
    r"terminate called|^\s*what\(\):|Assertion [`'].{0,400}failed|double free|free\(\): |"
    r"malloc\(\)|"
    rf"{_ENDED}",
    re.I,
)
_ENDINGS = re.compile(r"SIGQUIT received|kill_process_tree called|Received sigterm", re.I)
_NOISE = re.compile(
    r"server_args=|\"(?:GET|POST) /|Decode batch|Prefill batch|^USDT:|UserWarning|"
    r"Ignore import error|disabled:|^\s*$|%\|"
)


def reason_of(lines: Sequence[str], limit: int) -> list[str]:
    """At most `limit` of the lines of a log's end, those that say why the server died.

    Lines that name a cause (memory, a port, an argument, an exit code); of each exception that
    ended a process the innermost frame and the exception, and of a fault (a signal) the frame
    that ran. If there are none, what the server logged about its end. Failing that, the last
    lines that are not about requests.
    """
    blocks = _blocks(lines)
    inside = {number for block in blocks for number in block.numbers}
    causes = [
        line
        for number, line in enumerate(lines)
        if number not in inside and _CAUSES.search(line) and not _NOISE.search(line)
    ]
    first = [line for line in causes if not _AFTERMATH.search(line)]
    shown = _distinct(first or causes)[-max(limit // 3, 1) :]
    reason = shown + _deadly(blocks, has_cause=bool(first))
    if not reason:
        reason = _distinct(line for line in lines if _ENDINGS.search(line))
    if not reason:
        outside = (line for number, line in enumerate(lines) if number not in inside)
        reason = [line for line in outside if not _NOISE.search(line)][-limit // 2 :]
    return reason[-limit:]


# What an exit status says.

_SIGNALS = {
    signal.SIGKILL: "which a server does not send to itself: most often the kernel did, because "
    "the host (or the container's limit) ran out of memory; dmesg -T | grep -i oom says so",
    signal.SIGBUS: "most often because /dev/shm is full, as with a small --shm-size of a container",
}
_FAILED_SCHEDULER = "Scheduler hit an exception"
_KILLED_RANK = re.compile(r"(?:exit ?code:?|terminated with) (-\d{1,9})", re.I)


def describe_status(status: int | None) -> str:
    """`exit status 1`, or `exit status -9, SIGKILL`."""
    if status is None:
        return "exit status unknown"
    number = _signal(status)
    return f"exit status {status}" + (f", {number.name}" if number else "")


def explain_status(status: int | None, reason: Iterable[str]) -> str:
    """What the exit status of the server, or that of a rank in `reason`, means; "" if nothing."""
    lines = [*reason]
    if status == -signal.SIGKILL and any(_FAILED_SCHEDULER in line for line in lines):
        return "SGLang ends itself by SIGKILL when a scheduler has failed: the log says why"
    codes = [int(match[1]) for line in lines for match in _KILLED_RANK.finditer(line)]
    for code in (*codes, *([] if status is None else [status])):
        number = _signal(code)
        if number in _SIGNALS:
            return f"{code} is {number.name}, {_SIGNALS[number]}"
    return ""


def _signal(status: int) -> signal.Signals | None:
    """The signal that ended a process; a shell and a container report 128 + its number."""
    number = -status if status < 0 else status - 128
    return signal.Signals(number) if number in set(signal.Signals) else None


# Tracebacks, groups of exceptions and faults.


@dataclass(frozen=True)
class _Part:
    """One exception: its innermost frame ("" without any), and its line with its message."""

    frame: str
    exception: str

    @property
    def lines(self) -> list[str]:
        return [self.frame, self.exception] if self.frame else [self.exception]

    @property
    def is_aftermath(self) -> bool:
        return bool(_AFTERMATH.search(self.exception))


@dataclass(frozen=True)
class _Block:
    """What ended a process, or a request. numbers: of its lines. parts: of a chain, in order."""

    numbers: range | Sequence[int]
    head: str
    parts: tuple[_Part, ...]
    harmless: bool
    ended_rank: bool

    @property
    def shown(self) -> tuple[_Part, ...]:
        """The parts to show: what it became, then the first cause; not what follows a death."""
        parts = [part for part in self.parts if not part.is_aftermath] or list(self.parts)
        return tuple(dict.fromkeys((parts[-1], parts[0])))

    @property
    def lines(self) -> list[str]:
        """The lines to show."""
        head = [self.head] if self.ended_rank and self.head else []
        return [*head, *(line for part in self.shown for line in part.lines)]


def _deadly(blocks: Sequence[_Block], *, has_cause: bool) -> list[str]:
    """The lines to show of at most two blocks; aftermath only where nothing else says why."""
    harmful = [block for block in blocks if not block.harmless]
    primary = [block for block in harmful if not block.shown[-1].is_aftermath]
    ended = [block for block in primary if block.ended_rank]
    chosen: dict[str, _Block] = {}
    for block in ended or primary or ([] if has_cause else harmful):
        chosen.setdefault(block.shown[-1].exception, block)
    distinct = list(chosen.values())
    # The first process to end took the others with it. What ended none may be of long before.
    return [line for block in (distinct[:2] if ended else distinct[-2:]) for line in block.lines]


# What Ray, srun, compose and Kubernetes put before a line of each of their processes.
_PREFIX = re.compile(
    r"(?:\d{4}-\d\d-\d\dT[\d:.]+(?:Z|[+-][\d:]+) (?:std(?:out|err) [FP] )?)?"
    r"(?P<who>(?:\([\w.:]+ pid=\d+[^)]*\) ?|\d+: ?|[\w./-]+ +\| ?|\[pod/[^\]]+\] ?)?)"
)


def _blocks(lines: Sequence[str]) -> list[_Block]:
    """In the order in which they begin; those of each process are read by themselves."""
    streams: dict[str, list[tuple[int, str]]] = {}
    for number, line in enumerate(lines):
        prefix = _PREFIX.match(line)
        assert prefix is not None, "it matches an empty prefix as well"
        streams.setdefault(prefix["who"], []).append((number, line[prefix.end() :]))
    blocks = [block for stream in streams.values() for block in _read_stream(stream)]
    return sorted(blocks, key=lambda block: block.numbers[0])


def _read_stream(stream: Sequence[tuple[int, str]]) -> Iterator[_Block]:
    texts = [text for _, text in stream]
    at = 0
    while at < len(texts):
        first, parts = at, []
        while begins := _part_at(texts, at):
            at, more = begins
            parts += more
            following = _next_text(texts, at)
            if following < len(texts) and _CHAIN.match(texts[following]):
                at = _next_text(texts, following + 1)
            else:
                break
        if not parts:
            at += 1
            continue
        around = "\n".join([*texts[max(0, first - 3) : first + 1], parts[-1].exception])
        is_fault = _FATAL in texts[first]
        yield _Block(
            numbers=[number for number, _ in stream[first:at]],
            head="" if is_fault else texts[first].strip(),
            parts=tuple(parts),
            harmless=bool(_HARMLESS.search(around)),
            ended_rank=is_fault or "hit an exception" in texts[first],
        )


_CHAIN = re.compile(
    r"The above exception was the direct cause|During handling of the above exception"
)
_FATAL = "Fatal Python error:"
_GROUP = f"Exception Group {_TRACEBACK}"


def _part_at(texts: Sequence[str], at: int) -> tuple[int, list[_Part]] | None:
    """What begins at this line: the number of the line after it, and its exceptions."""
    text = texts[at] if at < len(texts) else ""
    if _FATAL in text:
        return _read_fault(texts, at)
    if _GROUP in text:
        return _read_group(texts, at)
    if _TRACEBACK in text:
        end, part = _read_traceback(texts, at)
        return end, [part]
    return None


def _next_text(texts: Sequence[str], at: int) -> int:
    while at < len(texts) and not texts[at].strip():
        at += 1
    return at


def _read_traceback(texts: Sequence[str], first: int) -> tuple[int, _Part]:
    end = first + 1
    while end < len(texts) and (texts[end].startswith(" ") or not texts[end]):
        end += 1
    # A message may have several lines, until the next entry of the log.
    last = end
    while last + 1 < len(texts) and last < end + 3 and _continues_message(texts[last + 1]):
        last += 1
    frames = [text for text in texts[first + 1 : end] if text.lstrip().startswith("File ")]
    exception = " ".join(text.strip() for text in texts[end : last + 1]) or texts[first].strip()
    return min(last + 1, len(texts)), _Part(frames[-1] if frames else "", exception)


def _continues_message(text: str) -> bool:
    return bool(text.strip()) and not (
        begins_entry(text)
        or _NOISE.search(text)
        or _TRACEBACK in text
        or _FATAL in text
        or _EXCEPTION.match(text)
    )


# A group draws its exceptions in a margin: `  | ` before each line, `  +-+--- 1 ---` above each.
_MARGIN = re.compile(r"\s*[|+] ?")
_SECTION = re.compile(r"\s*\+(?:-\+)?-{8,}(?: (?:\d+|\.\.\.) -+)?$")
_IS_GROUP = re.compile(r"\(\d+ sub-exceptions?\)")


def _read_group(texts: Sequence[str], first: int) -> tuple[int, list[_Part]]:
    """The exceptions of a group that are none themselves; the innermost one last."""
    end = first + 1
    sections: list[tuple[int, list[str]]] = [(0, [_TRACEBACK])]
    while end < len(texts) and (margin := _MARGIN.match(texts[end])):
        if _SECTION.match(texts[end]):
            sections.append((texts[end].rindex("+"), []))
        else:
            sections[-1][1].append(texts[end][margin.end() :])
        end += 1
    leaves = []
    for depth, section in sections:
        part = _of_section(section)
        if part is not None and not _IS_GROUP.search(part.exception):
            leaves.append((part.is_aftermath, -depth, part))
    if leaves:
        return end, [min(leaves, key=lambda leaf: leaf[:2])[2]]
    return end, [_of_section(sections[0][1]) or _Part("", texts[first].strip())]


def _of_section(section: Sequence[str]) -> _Part | None:
    heads = [at for at, text in enumerate(section) if _TRACEBACK in text]
    if heads:
        return _read_traceback(section, heads[0])[1]
    return _Part("", " ".join(text.strip() for text in section)) if section else None


def _read_fault(texts: Sequence[str], first: int) -> tuple[int, list[_Part]]:
    """faulthandler's words about a signal, and the frame that the current thread was in."""
    end, frame, is_current = first + 1, "", False
    while end < len(texts) and (not texts[end].strip() or _FAULT.match(texts[end])):
        if "(most recent call first)" in texts[end]:
            is_current = texts[end].startswith("Current thread")
        elif is_current and not frame and texts[end].strip():
            frame = texts[end]
        end += 1
    fault = texts[first][texts[first].index(_FATAL) :].strip()
    return end, [_Part(frame, fault)]


_FAULT = re.compile(
    r"\s|Current thread |Thread 0x|Python runtime state: |Extension modules: |<no Python frame>|"
    r"Garbage-collecting"
)


def _distinct(lines: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(lines))
