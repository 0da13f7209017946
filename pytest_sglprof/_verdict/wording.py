"""Formats times, shares and ratios for people, the same way everywhere."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Mapping, Sequence

from pytest_sglprof._metrics import UNITS, Metric


def duration(ns: float) -> str:
    """`41.2 ms`, `412 µs`, `12.3 s`: three significant figures, always with a unit."""
    for limit, unit, size in ((1e3, "ns", 1.0), (1e6, "µs", 1e3), (1e10, "ms", 1e6)):
        if abs(ns) < limit:
            return f"{_three(ns / size)} {unit}"
    return f"{_three(ns / 1e9)} s"


def signed_duration(ns: float | None, *, none: str = "-") -> str:
    """`+1.20 µs`, `−340 ns`; `none` for None."""
    return none if ns is None else f"{_sign(ns)}{duration(abs(ns))}"


def milliseconds(ns: float) -> str:
    """A figure for a column whose head says ms: `41.2`, `0.412`, `1234`."""
    return _three(ns / 1e6)


def mebibytes(size: int) -> str:
    """`34 MiB` of a number of bytes; with a digit more below 10."""
    mib = size / 2**20
    return f"{mib:.0f} MiB" if mib >= 10 or not size else f"{mib:.1f} MiB"


def percent(share: float | None, digits: int = 0, *, sign: bool = False, none: str = "-") -> str:
    """`64 %`, of a change `+1.2 %`; `none` for None."""
    if share is None:
        return none
    text = f"{100 * abs(share):.{digits}f}"
    shown = _sign(share if float(text) else 0) if sign else "-" * (share < 0)
    return f"{shown}{text} %"


def ratio(value: float | None, digits: int = 2, *, none: str = "-") -> str:
    """`1.39`; `none` for None."""
    return none if value is None else f"{value:.{digits}f}"


def against_limit(value: float, limit: float, *, unit: str = "") -> tuple[str, str]:
    """A value, and its limit in brackets: `("1.39", " (limit 1.10)")`.

    With as many digits as it takes to show that they differ (1.104 against 1.10). An infinite
    limit means no limit and gives "".
    """
    shown = f"{value:.2f}"
    for digits in (3, 4, 5):
        if value == limit or float(shown) != round(limit, digits - 1):
            break
        shown = f"{value:.{digits}f}"
    if not math.isfinite(limit):
        return f"{shown}{unit}", ""
    text = f"{limit:.2f}" if round(limit, 2) == round(limit, 9) else f"{limit:g}"
    return f"{shown}{unit}", f" (limit {text}{unit})"


def beside_limit(metric: Metric, value: float, limit: float) -> tuple[str, str]:
    """`against_limit` for a figure of a metric, in the metric's unit."""
    unit = UNITS[metric.unit]
    return against_limit(value * unit.scale, limit * unit.scale, unit=unit.suffix)


def sentence_of(metric: Metric, known: Mapping[str, str]) -> str:
    """The sentence of a metric with its fields; `at_best` where the figure is written like that.

    known: has `value` and `limit` of `beside_limit`; `within`, `, limit 1.10`, follows from these.
    """
    is_best = metric.at_best and known["value"] == beside_limit(metric, metric.best, math.inf)[0]
    within = f", {known['limit'][2:-1]}" if known["limit"] else ""
    return (metric.at_best if is_best else metric.sentence).format(**known, within=within)


def count(number: int, singular: str, plural: str = "") -> str:
    """`1 step`, `50 steps`."""
    return f"{number:,} {singular if number == 1 else plural or singular + 's'}"


def work_words(word: str | None, ratio: float | None, by: str | None) -> str:
    """`with the same work`, `with 1.50x the tokens: more work`; "" if it is not known.

    If extra work explains only part of the slowdown, the phrase reports both.
    """
    if not word or ratio is None:
        return ""
    if word == "more_work":
        return f"with {ratio:.2f}x the {by}: more work"
    if by == "kernel calls":
        return f"which its {ratio:.4g}x the {by} do not explain"
    if f"{ratio:.2f}" == "1.00":
        return "with the same work"
    return f"which its {ratio:.2f}x the {by} do not explain"


def _sign(value: float) -> str:
    return "+" if value > 0 else "−" if value < 0 else ""


def _three(value: float) -> str:
    if value == 0:
        return "0"
    size = abs(value)
    digits = 0 if size >= 99.95 else 1 if size >= 9.995 else 2 if size >= 0.9995 else 3
    return f"{value:,.{digits}f}"


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
