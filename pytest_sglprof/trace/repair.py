"""Traces that are not valid JSON: their events are told apart and read one by one.

Kineto copies names into the file as they are, so one Python function with a quote in its
name makes the whole file invalid, though its GPU events are sound. Only Kineto's own layout
is handled, in which every event begins with `"ph"`.
"""

from __future__ import annotations

import re

import msgspec

_EVENTS = re.compile(rb'"traceEvents"\s*:\s*\[')
_NEXT_EVENT = re.compile(rb'\{\s*"ph"\s*:')
_PHASE = re.compile(rb'\{\s*"ph"\s*:\s*"[^X"]"')
_CATEGORY = re.compile(rb'"cat"\s*:\s*"([^"\\]{0,60})"')
_GPU = frozenset({b"kernel", b"gpu_memcpy", b"gpu_memset", b"memcpy", b"memset"})
_NOT_A_NUMBER = re.compile(rb"([:,\[]\s*)-?(?:inf(?:inity)?|nan)\b", re.IGNORECASE)
_STRAY_BACKSLASH = re.compile(rb'\\(?!["\\/bfnrtu])')
_CONTROL = re.compile(rb"[\x00-\x1f]")  # a space means the same where whitespace is allowed
_TRAILING_COMMA = re.compile(rb",(\s*[}\]])")


class Unrepairable(ValueError):
    """The events cannot be told apart, or one that counts is itself unreadable."""


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
