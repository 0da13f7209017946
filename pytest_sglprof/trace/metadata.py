"""What stands before and after the list of events of a torch trace."""

from __future__ import annotations

import re

import msgspec

from pytest_sglprof.trace.kineto import FileFacts

_LIST_END = re.compile(rb'\}\s*\]\s*(?=,\s*"|\}\s*$)')


class _Outside(msgspec.Struct):
    base: msgspec.Raw = msgspec.field(name="baseTimeNanoseconds", default=msgspec.Raw(b""))
    distributed: msgspec.Raw = msgspec.field(name="distributedInfo", default=msgspec.Raw(b""))


_OUTSIDE = msgspec.json.Decoder(_Outside)


def read_header(data: bytes, facts: FileFacts) -> bool:
    """Takes facts from the bytes before ``"traceEvents"``; False when they are no JSON."""
    text = data.removeprefix(b"\xef\xbb\xbf").strip().rstrip(b",")
    return _take(text + b"}", facts)


def read_footer(data: bytes, facts: FileFacts) -> int | None:
    """Finds the end of the event list and takes facts from what follows.

    data: the last bytes of the file. Returns the offset behind the last event's brace,
    or None when no rest of `data` closes the document. Of several candidates (a list of
    objects after the events ends alike) the first one is right: what lies deeper cannot
    close the document.
    """
    for match in _LIST_END.finditer(data):
        if _take(b'{"":0' + data[match.end() :], facts):
            return match.start() + 1
    return None


def _take(document: bytes, facts: FileFacts) -> bool:
    try:
        document.decode()  # in keys that are not asked for, msgspec takes any bytes
        found = _OUTSIDE.decode(document)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return False
    facts.base = bytes(found.base).decode() or facts.base
    facts.distributed = bytes(found.distributed).decode() or facts.distributed
    return True
