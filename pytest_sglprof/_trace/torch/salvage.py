"""Read a whole trace, and repair one that is not valid JSON as far as possible.

Kineto copies names into the file without escaping, so one Python function with a quote in its
name makes the whole file invalid, though its GPU events are sound. Then the file is split by
Kineto's layout, in which every event begins with `"ph"`, and events are read one by one.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Generic, TypeVar

import msgspec

from pytest_sglprof._errors import NotATrace, TraceError, TraceTruncated
from pytest_sglprof._trace.torch.events import FullEvent
from pytest_sglprof._trace.torch.stream import inflated

_EVENTS = re.compile(rb'"traceEvents"\s*:\s*\[')
_NEXT_EVENT = re.compile(rb'\{\s*"ph"\s*:')
_PHASE = re.compile(rb'\{\s*"ph"\s*:\s*"[^X"]"')
_CATEGORY = re.compile(rb'"cat"\s*:\s*"([^"\\]{0,60})"')
_GPU = frozenset({b"kernel", b"gpu_memcpy", b"gpu_memset", b"memcpy", b"memset"})
_NOT_A_NUMBER = re.compile(rb"([:,\[]\s*)-?(?:inf(?:inity)?|nan)\b", re.IGNORECASE)
_STRAY_BACKSLASH = re.compile(rb'\\(?!["\\/bfnrtu])')
_CONTROL = re.compile(rb"[\x00-\x1f]")  # a space means the same where whitespace is allowed
_TRAILING_COMMA = re.compile(rb",(\s*[}\]])")
# Unrolled: an alternation inside a repetition runs for minutes on a truncated file.
_TOKEN = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"|[{}]|"', re.DOTALL)
_FULL_EVENT = msgspec.json.Decoder(FullEvent)

E = TypeVar("E")


class Document(msgspec.Struct, Generic[E]):
    """A whole trace. events: None where it has no list of them; base, distributed: JSON text."""

    events: list[E] | None = msgspec.field(name="traceEvents", default=None)
    base: msgspec.Raw = msgspec.field(name="baseTimeNanoseconds", default=msgspec.Raw(b""))
    distributed: msgspec.Raw = msgspec.field(name="distributedInfo", default=msgspec.Raw(b""))


class Whole(msgspec.Struct, Generic[E]):
    """What could be read of a file.

    base, distributed: JSON text of `baseTimeNanoseconds` and `distributedInfo`, "" for none.
    valid: whether it was valid JSON. skipped: how many events could not be read. truncated:
    its end is missing.
    """

    events: list[E]
    base: str
    distributed: str
    valid: bool
    skipped: int
    truncated: bool


def read_whole(
    path: Path, decoder: msgspec.json.Decoder[Document[E]], *, allow_partial: bool = False
) -> Whole[E]:
    """Reads a file the exact way, which needs memory for all of it; repairs it if need be.

    Raises `NotATrace`, `TraceTruncated` or `TraceError`, all naming the file.
    """
    data, truncated = inflated(path, partial=allow_partial)
    valid, skipped = True, 0
    try:
        if not data.isascii():
            data.decode()  # in keys that are not asked for, msgspec takes any bytes
        document = decoder.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        document, repair = _decode_repaired(path, bytes(data), decoder, error, allow_partial)
        valid, skipped, truncated = False, repair.skipped, truncated or repair.cut
    if document.events is None:
        raise NotATrace(
            f"{path} is JSON, but not a trace: it has no traceEvents",
            expected="a Kineto trace of the torch profiler",
            hint="give the *.trace.json.gz files that the server wrote, or an nsys report",
        )
    base, distributed = (
        bytes(raw).decode("utf-8", "replace") for raw in (document.base, document.distributed)
    )
    return Whole(document.events, base, distributed, valid, skipped, truncated)


def _decode_repaired(
    path: Path,
    data: bytes,
    decoder: msgspec.json.Decoder[Document[E]],
    error: Exception,
    allow_partial: bool,
) -> tuple[Document[E], Repaired]:
    try:
        repair = repaired(data)
    except Unrepairable as reason:
        raise _refusal(path, data, f"{error}; {reason}") from error
    if repair.cut and not allow_partial:
        raise _cut(path) from error
    try:
        return decoder.decode(repair.data), repair
    except (msgspec.DecodeError, UnicodeDecodeError) as second:
        raise _refusal(path, data, str(second)) from error


def _refusal(path: Path, data: bytes, why: str) -> TraceError:
    """The error of a file that no way of reading understands."""
    if b'"traceEvents"' not in data:
        return NotATrace(
            f"{path} is not a torch trace: {why}",
            expected="a Kineto trace of the torch profiler (JSON)",
            hint="give the *.trace.json.gz files that the server wrote, or an nsys report",
        )
    if not data.rstrip().endswith(b"}"):
        return _cut(path)
    return TraceError(
        f"{path} is not valid JSON: {why}",
        expected="a Kineto trace of the torch profiler (JSON), at least its GPU events",
        hint="record the window again with with_stack=False",
    )


def _cut(path: Path) -> TraceTruncated:
    return TraceTruncated(
        f"{path} ends in the middle of its JSON",
        expected="a complete file; the profiler writes it in place and grows it",
        hint="wait until the profiler is done, or read what is there with allow_partial=True "
        "(commands: --allow-partial)",
    )


class Unrepairable(ValueError):
    """It is not clear where events end, or one that counts is unreadable."""


class Repaired(msgspec.Struct, frozen=True):
    """data: valid JSON with the events that could be read. skipped: how many could not.

    cut: the file ends before its JSON does.
    """

    data: bytes
    skipped: int
    cut: bool


def repaired(data: bytes) -> Repaired:
    """Skips events that are no GPU activities and cannot be read.

    Raises `Unrepairable` where that would lose a GPU event, or what is none is unclear.
    """
    opening = _EVENTS.search(data)
    starts = [m.start() for m in _NEXT_EVENT.finditer(data, opening.end())] if opening else []
    if opening is None or not starts:
        raise Unrepairable("it has no events in Kineto's layout")
    chunks = [data[a:b] for a, b in zip(starts, [*starts[1:], len(data)], strict=True)]
    head = mended(data[: opening.end()])
    last, tail = _split_last(chunks[-1], head)
    if tail is None and not _is_object(head + b"]}"):
        raise Unrepairable("what stands before its events is damaged")
    chunks[-1] = last
    sound: list[bytes] = []
    skipped = 0
    for chunk in chunks:
        text = _event(chunk)
        if text is not None:
            sound.append(text)
        elif _is_harmless(chunk) or (tail is None and chunk is last):
            skipped += 1
        else:
            raise Unrepairable("a GPU event, or one of unknown kind, cannot be read")
    body = head + b",".join(sound) + (b"]}" if tail is None else tail)
    return Repaired(body, skipped, cut=tail is None)


def _split_last(chunk: bytes, head: bytes) -> tuple[bytes, bytes | None]:
    """The last event, and the rest of the file from the end of the list of events on.

    The rest is None where nothing closes what `head` opened: the file was cut there.
    """
    end = chunk.find(b"]")
    while end >= 0:
        tail = mended(chunk[end:])
        if _is_object(head + tail):
            return chunk[:end], tail
        end = chunk.find(b"]", end + 1)
    return chunk, None


def _event(chunk: bytes) -> bytes | None:
    """The one event in `chunk` as valid JSON; None when there is none."""
    text = chunk.rstrip(b", \t\r\n")
    for candidate in (text, mended(text)):
        if _is_object(candidate):
            return candidate
    return None


def _is_object(text: bytes) -> bool:
    try:
        return isinstance(msgspec.json.decode(text), dict)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return False


def _is_harmless(chunk: bytes) -> bool:
    """True when the event's kind can be read and is no GPU activity."""
    kinds = [kind.lower() for kind in _CATEGORY.findall(chunk)]
    return not _GPU.intersection(kinds) and (bool(kinds) or _PHASE.match(chunk) is not None)


def mended(event: bytes) -> bytes:
    """`event` with the defects seen in real traces made harmless."""
    text = event.decode("utf-8", "replace").encode()
    text = _CONTROL.sub(b" ", text)
    text = _NOT_A_NUMBER.sub(rb"\1null", text)
    text = _STRAY_BACKSLASH.sub(rb"\\\\", text)
    return _TRAILING_COMMA.sub(rb"\1", text)


def object_end(data: bytes, start: int, limit: int | None = None) -> int:
    """The offset behind the object that opens at `start`; -1 when it does not close."""
    depth = 0
    for match in _TOKEN.finditer(data, start, len(data) if limit is None else limit):
        token = match[0]
        if token == b"{":
            depth += 1
        elif token == b"}":
            depth -= 1
            if depth == 0:
                return match.end()
        elif token == b'"':
            return -1
        if depth == 0:
            return -1
    return -1


def read_event(data: bytes) -> FullEvent | None:
    """The event in `data`, mended where it is no valid JSON; None when that fails."""
    for text in (data, mended(data)):
        try:
            return _FULL_EVENT.decode(text)
        except (msgspec.DecodeError, UnicodeDecodeError):
            continue
    return None
