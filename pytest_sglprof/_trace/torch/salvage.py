"""Read a whole trace, and repair one that is not valid JSON as far as possible.

Kineto copies names into the file without escaping, so one Python function with a quote in its
name makes the whole file invalid, though its GPU events are sound. Then the file is split by
Kineto's layout, in which every event begins with `"ph"`, and events are read one by one.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Generic, TypeAlias, TypeVar

import msgspec

from pytest_sglprof._errors import NotATrace, TraceError, TraceTruncated
from pytest_sglprof._limits import UNDECODABLE, refuse_large, why_undecodable
from pytest_sglprof._trace.foreign import EXPECTED, refuse_document, refuse_empty
from pytest_sglprof._trace.torch.events import FullEvent, Header
from pytest_sglprof._trace.torch.stream import inflated

_EVENTS = re.compile(rb'"traceEvents"\s*:\s*\[')
_LIST = re.compile(rb"\s*\[")  # a document that is only the list of its events
_BYTE = re.compile(r"\(byte (\d+)\)")  # in msgspec's messages
_PLACE = re.compile(r" - at `\$\.?(.+)`")
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
# Memory, measured: of what an event becomes, for each brace that opens (an event has two as a
# rule, its own and that of its arguments); and how often a repair holds the whole text.
_BRACE = 450  # bytes
_COPIES = 5

E = TypeVar("E")


class Document(Header, Generic[E]):
    """A whole trace. events: None where it has no list of them."""

    events: list[E] | None = msgspec.field(name="traceEvents", default=None)


class Whole(msgspec.Struct, Generic[E]):
    """What could be read of a file.

    header: what stands beside the events. valid: whether it was valid JSON. skipped: how many
    events could not be read. truncated: its end is missing.
    """

    events: list[E]
    header: Header
    valid: bool
    skipped: int
    truncated: bool


# Some tools write the list of events alone, which is a trace as well.
AnyDocument: TypeAlias = Document[E] | list[E]


def read_whole(
    path: Path, decoder: msgspec.json.Decoder[AnyDocument[E]], *, allow_partial: bool = False
) -> Whole[E]:
    """Reads a file the exact way, which needs memory for all of it; repairs it if need be.

    Raises `NotATrace`, `TraceTruncated` or `TraceError`, all naming the file.
    """
    data, truncated = inflated(path, partial=allow_partial)
    if not data or data.isspace():
        refuse_empty(path, packed=path.stat().st_size > len(data))
    valid, skipped = True, 0
    events = _BRACE * data.count(b"{")
    refuse_large(path, len(data) + events, error=TraceError)
    try:
        if not data.isascii():
            data.decode()  # in keys that are not asked for, msgspec takes any bytes
        document = decoder.decode(data)
    except UNDECODABLE as error:
        refuse_large(path, _COPIES * len(data) + events, error=TraceError)
        document, repair = _decode_repaired(path, bytes(data), decoder, error, allow_partial)
        valid, skipped, truncated = False, repair.skipped, truncated or repair.cut
    if isinstance(document, list):
        document = Document(events=document or None)
    if document.events is None:
        refuse_document(path, data)
    return Whole(document.events, document, valid, skipped, truncated)


def _decode_repaired(
    path: Path,
    data: bytes,
    decoder: msgspec.json.Decoder[AnyDocument[E]],
    error: Exception,
    allow_partial: bool,
) -> tuple[AnyDocument[E], Repaired]:
    _refuse_more(path, data, error)
    try:
        repair = repaired(data)
    except Unrepairable as reason:
        raise _refusal(path, data, error, f"; {reason}") from error
    if repair.cut and not allow_partial:
        raise _cut(path) from error
    try:
        return decoder.decode(repair.data), repair
    except UNDECODABLE as second:
        raise _refusal(path, data, second) from error


def _refuse_more(path: Path, data: bytes, error: Exception) -> None:
    """Raises `TraceError` for a file that goes on behind the end of its document."""
    at = _BYTE.search(str(error)) if "trailing characters" in str(error) else None
    rest = data[int(at[1]) - 1 :] if at is not None else b""  # the first one was read already
    if rest[:1] in (b"{", b"[") or len(_EVENTS.findall(data)) > 1:
        raise TraceError(
            f"{path} holds two documents, one behind the other",
            expected="one trace of one rank in each file",
            hint="two processes wrote into one file, or files were joined: record the window "
            "again, or split the file",
        )
    if rest:
        raise TraceError(
            f"{path} has text behind the end of its JSON: {_shown(rest)}",
            expected="nothing behind the trace",
            hint="the file was damaged or written twice; copy or record it again",
        )


def _refusal(path: Path, data: bytes, error: Exception, reason: str = "") -> TraceError:
    """The error of a file that no way of reading understands."""
    is_list = data.lstrip().startswith(b"[")
    if not data.rstrip().endswith(b"]" if is_list else b"}"):
        return _cut(path)
    if b'"traceEvents"' not in data and not (is_list and b'"ph"' in data):
        return NotATrace(
            f"{path} is not a torch trace: {_fault(data, error)}{reason}",
            expected=EXPECTED,
            hint="give the *.trace.json.gz files that the server wrote, or an nsys report",
        )
    what = "a valid trace" if _PLACE.search(str(error)) else "valid JSON"
    return TraceError(
        f"{path} is not {what}: {_fault(data, error)}{reason}",
        expected="a Kineto trace of the torch profiler (JSON), at least its GPU events",
        hint="record the window again with with_stack=False",
    )


def _fault(data: bytes, error: Exception) -> str:
    """What is wrong with the JSON, in our words."""
    if isinstance(error, UnicodeDecodeError):
        return f"its text is not UTF-8 at byte {error.start}"
    if isinstance(error, RecursionError):
        return why_undecodable(error)
    if at := _BYTE.search(str(error)):
        number = int(at[1])
        return f"its JSON is broken at byte {number}, before {_shown(data[number:])}"
    if place := _PLACE.search(str(error)):
        return f"{place[1]} is not what the torch profiler writes there"
    return "its JSON is broken"


def _shown(text: bytes) -> str:
    return repr(text[:20].decode("utf-8", "replace"))


def _cut(path: Path) -> TraceTruncated:
    return TraceTruncated(
        f"{path} ends in the middle of its JSON",
        expected="a complete file; the profiler writes it in place and grows it",
        hint="wait until the profiler is done, or read what is there with allow_partial=True",
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
    opening = _LIST.match(data) or _EVENTS.search(data)
    starts = [m.start() for m in _NEXT_EVENT.finditer(data, opening.end())] if opening else []
    if opening is None or not starts:
        raise Unrepairable("it has no events in Kineto's layout")
    chunks = [data[a:b] for a, b in zip(starts, [*starts[1:], len(data)], strict=True)]
    head = mended(data[: opening.end()])
    closing = b"]" if head.lstrip() == b"[" else b"]}"
    last, tail = _split_last(chunks[-1], head)
    if tail is None and not _is_valid(head + closing):
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
    body = head + b",".join(sound) + (closing if tail is None else tail)
    return Repaired(body, skipped, cut=tail is None)


# Lists in the last event of which each may be that of the events; each attempt reads all of it.
_MOST_ENDS = 200


def _split_last(chunk: bytes, head: bytes) -> tuple[bytes, bytes | None]:
    """The last event, and the rest of the file from the end of the list of events on.

    The rest is None where nothing closes what `head` opened: the file was cut there.
    """
    end = chunk.find(b"]")
    for _ in range(_MOST_ENDS):
        if end < 0:
            return chunk, None
        tail = mended(chunk[end:])
        if _is_valid(head + tail):
            return chunk[:end], tail
        end = chunk.find(b"]", end + 1)
    raise Unrepairable("it is not clear where its last event ends")


def _event(chunk: bytes) -> bytes | None:
    """The one event in `chunk` as valid JSON; None when there is none."""
    text = chunk.rstrip(b", \t\r\n")
    for candidate in (text, mended(text)):
        if _is_object(candidate):
            return candidate
    return None


def _is_object(text: bytes) -> bool:
    return _is_valid(text, dict)


def _is_valid(text: bytes, kind: type | tuple[type, ...] = (dict, list)) -> bool:
    try:
        return isinstance(msgspec.json.decode(text), kind)
    except UNDECODABLE:
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
        except UNDECODABLE:
            continue
    return None
