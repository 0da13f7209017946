"""Traces that are not valid JSON: their events are told apart and read one by one.

Kineto copies names into the file as they are, so one Python function with a quote in its
name makes the whole file invalid, though its GPU events are sound. Only Kineto's own layout
is handled, in which every event begins with `"ph"`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import msgspec

_EVENTS = re.compile(rb'"traceEvents"\s*:\s*\[')
_NEXT_EVENT = re.compile(rb'\{\s*"ph"\s*:')
_BASE = re.compile(rb'"baseTimeNanoseconds"\s*:\s*(\d+)')
_RANK = re.compile(rb'"distributedInfo"\s*:\s*\{[^{}]*?"rank"\s*:\s*(\d+)')
_GPU = re.compile(rb'"cat"\s*:\s*"(?:kernel|gpu_mem|Kernel|Memcpy|Memset)')
_NOT_A_NUMBER = re.compile(rb"(:\s*)-?(?:inf(?:inity)?|nan)\b", re.IGNORECASE)
_STRAY_BACKSLASH = re.compile(rb'\\(?!["\\/bfnrtu])')
_CONTROL = re.compile(rb"[\x00-\x08\x0b\x0c\x0e-\x1f]")
_TRAILING_COMMA = re.compile(rb",(\s*[}\]])")


@dataclass(frozen=True)
class Repaired:
    """data: valid JSON with the events that could be read. skipped: how many could not.

    cut: the file ends inside its events.
    """

    data: bytes
    skipped: int
    cut: bool


def repaired(data: bytes) -> Repaired | None:
    """None when events cannot be told apart, or when a GPU event itself is unreadable."""
    opening = _EVENTS.search(data)
    if opening is None:
        return None
    starts = [match.start() for match in _NEXT_EVENT.finditer(data, opening.end())]
    if not starts:
        return None
    chunks = [data[a:b] for a, b in zip(starts, [*starts[1:], len(data)], strict=True)]
    last, tail = _split_last(chunks.pop())
    sound: list[bytes] = []
    skipped = 0
    for chunk in [*chunks, last]:
        text = _valid(chunk.rstrip(b", \t\r\n")) if chunk else None
        if text is not None:
            sound.append(text)
        elif _GPU.search(chunk) and chunk is not last:
            return None
        else:
            skipped += bool(chunk)
    facts = _facts(data[: starts[0]] + (tail or b""))
    body = b'{"traceEvents":[' + b",".join(sound) + b"]" + facts + b"}"
    return Repaired(body, skipped, cut=tail is None)


def _split_last(chunk: bytes) -> tuple[bytes, bytes | None]:
    """The last event, and what follows the list of events; None when nothing closes it."""
    end = chunk.find(b"]")
    while end >= 0:
        event = chunk[:end].rstrip(b", \t\r\n")
        if _valid(event) is not None and chunk.rstrip().endswith((b"}", b"]")):
            return event, chunk[end:]
        end = chunk.find(b"]", end + 1)
    return chunk, None


def _valid(event: bytes) -> bytes | None:
    for text in (event, _mended(event)):
        try:
            decoded = msgspec.json.decode(text)
        except (msgspec.DecodeError, UnicodeDecodeError):
            continue
        if isinstance(decoded, dict):
            return text
    return None


def _mended(event: bytes) -> bytes:
    text = event.decode("utf-8", "replace").encode()
    text = _CONTROL.sub(b" ", text)
    text = _NOT_A_NUMBER.sub(rb"\1null", text)
    text = _STRAY_BACKSLASH.sub(rb"\\\\", text)
    return _TRAILING_COMMA.sub(rb"\1", text)


def _facts(outside: bytes) -> bytes:
    parts = b""
    base, rank = _BASE.search(outside), _RANK.search(outside)
    if base:
        parts += b',"baseTimeNanoseconds":' + base[1]
    if rank:
        parts += b',"distributedInfo":{"rank":' + rank[1] + b"}"
    return parts
