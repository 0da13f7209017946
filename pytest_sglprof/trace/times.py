"""Exact times from the text of a trace."""

from __future__ import annotations

import re
from pathlib import Path

_NUMBER = re.compile(r'^"?\s*(-?)(\d{1,30})(?:\.(\d{0,40}))?(?:[eE]([+-]?\d{1,3}))?\s*"?$')
LARGEST_NS = 2**62  # two of them can be added in int64
LONGEST_NS = 2**50  # of a duration, 13 days: thousands of them can be added in int64


def unfit(start: int | None, dur: int | None) -> str:
    """What is wrong with the time of an event, in ns; "" of one that is used."""
    if start is None or dur is None:
        return "a missing or unreadable"
    if dur < 0:
        return "a negative"
    return "an impossible" if dur >= LONGEST_NS else ""


def ns(raw: bytes) -> int | None:
    """Exact ns of a time in µs from its JSON text (a number or a quoted one).

    None when it is absent or not a finite number. Digits below 1 ns are rounded half up.
    """
    match = _NUMBER.match(bytes(raw).decode("ascii", "replace").strip())
    if match is None:
        return None
    sign, whole, fraction, exponent = match.groups()
    fraction = fraction or ""
    shift = 3 + int(exponent or 0) - len(fraction)
    if abs(shift) > 60:
        return None
    value: int = int(whole + fraction)
    if shift >= 0:
        value *= int(10**shift)
    else:
        value = (2 * value + 10**-shift) // (2 * 10**-shift)
    if value >= LARGEST_NS:
        return None
    return -value if sign else value


def base_time(path: Path, text: str) -> tuple[int, list[str]]:
    """ns to add to every time, which newer files write relative to this; and notes.

    text: the JSON text of `baseTimeNanoseconds`, "" for none.
    """
    number = text.strip('" ')
    if number.isdecimal() and number.isascii() and len(number) <= 19 and int(number) < LARGEST_NS:
        return int(number), []
    if number in ("", "null"):
        return 0, []
    note = (
        f"{path.name}: baseTimeNanoseconds {number[:40]} is no time; this rank's clock is its own"
    )
    return 0, [note]
