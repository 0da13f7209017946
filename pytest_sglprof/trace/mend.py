"""One event out of the bytes around it: where it ends, and what can be mended in it."""

from __future__ import annotations

import re

import msgspec

from pytest_sglprof.trace.kineto import FullEvent
from pytest_sglprof.trace.repair import mended

# Unrolled: an alternation inside a repetition runs for minutes on a truncated file.
_TOKEN = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"|[{}]|"', re.DOTALL)
_DECODER = msgspec.json.Decoder(FullEvent)


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
            return _DECODER.decode(text)
        except (msgspec.DecodeError, UnicodeDecodeError):
            continue
    return None
