"""Times as traces write them: which can be true, and how many ns a string means."""

from __future__ import annotations

import re
from pathlib import Path

_NUMBER = re.compile(r'^"?\s*(-?)(\d{1,30})(?:\.(\d{0,40}))?(?:[eE]([+-]?\d{1,3}))?\s*"?$')


LARGEST_NS = 2**62  # two of them can be added in int64


LONGEST_NS = 2**50  # of one duration, 13 days: thousands of them can be added in int64


def unfit(start: int | None, dur: int | None) -> str:
    """What is wrong with the times (ns) of an event; "" if nothing is."""
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
    """The ns to add to every time of a file, and notes.

    Newer files write times relative to `baseTimeNanoseconds`. text: its JSON text, "" if the
    file has none.
    """
    number = text.strip('" ')
    if number.isdecimal() and number.isascii() and len(number) <= 19 and int(number) < LARGEST_NS:
        return int(number), []
    if number in ("", "null"):
        return 0, []
    note = (
        f"{path.name}: baseTimeNanoseconds {number[:40]} is not a time; "
        "this rank's clock is not aligned with the others"
    )
    return 0, [note]
