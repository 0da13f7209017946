"""Where a word stands in large pieces of bytes.

StringZilla looks at 25 GB a second, `bytes.find`, which is the way without it, at 2 to 4.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

_Find = Callable[[bytes, bytes, int, int], int]


class Search(NamedTuple):
    """The ways of a library to look for a word in `data[begin:end]`: (data, word, begin, end).

    find, rfind: the first and the last offset, -1 for none. tally: its `count`, which is no
    name for a tuple's field.
    """

    find: _Find
    rfind: _Find
    tally: _Find


def _quickest() -> Search:
    try:
        # Not installed where it has no wheel, and it has no types.
        import stringzilla  # type: ignore[import-not-found, unused-ignore]
    except ImportError:
        return Search(bytes.find, bytes.rfind, bytes.count)
    return Search(stringzilla.find, stringzilla.rfind, stringzilla.count)


QUICKEST = _quickest()


def offsets(word: bytes, data: bytes, begin: int, end: int) -> list[int]:
    """The offsets of `word` in `data`, ascending; all of it lies between begin and end."""
    found = []
    find = QUICKEST.find
    at = find(data, word, begin, end)
    while at >= 0:
        found.append(at)
        at = find(data, word, at + 1, end)
    return found


def survey(
    words: Sequence[bytes], data: bytes, begin: int, end: int
) -> tuple[int, int, int] | None:
    """The first and the last offset of all words, and how often they stand in all."""
    first, last, count = end, -1, 0
    for word in words:
        at = QUICKEST.find(data, word, begin, end)
        if at >= 0:
            stop = QUICKEST.rfind(data, word, at, end)
            count += QUICKEST.tally(data, word, at, stop + len(word))
            first, last = min(first, at), max(last, stop)
    return (first, last, count) if count else None
