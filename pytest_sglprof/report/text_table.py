"""Plain aligned text tables, as a terminal shows them."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence


def text_table(
    head: Sequence[str], rows: Sequence[Sequence[str]], *, left: Sequence[int] = (0,)
) -> list[str]:
    """Lines of a table: head, rule, rows; two blanks between columns, no trailing blanks.

    left: indices of left-aligned columns; the others hold figures, aligned to the right.
    """
    widths = [max(map(_width, column)) for column in zip(head, *rows, strict=True)]
    rule = ["-" * width for width in widths]
    return [_line(cells, widths, left) for cells in (head, rule, *rows)]


def shorten(text: str, limit: int) -> str:
    """`text` with its middle left out where it is longer: both ends of a name tell most."""
    if len(text) <= limit:
        return text
    front = (limit - 1 + 1) // 2
    return f"{text[:front]}…{text[len(text) - (limit - 1 - front) :]}"


def _line(cells: Sequence[str], widths: Sequence[int], left: Sequence[int]) -> str:
    padded = []
    for at, (cell, width) in enumerate(zip(cells, widths, strict=True)):
        blanks = " " * (width - _width(cell))
        padded.append(cell + blanks if at in left else blanks + cell)
    return "  ".join(padded).rstrip()


def _width(text: str) -> int:
    """Columns on a terminal: wide characters take two, combining ones none."""
    return sum(
        0 if unicodedata.combining(char) else 2 if unicodedata.east_asian_width(char) in "WF" else 1
        for char in text
    )
