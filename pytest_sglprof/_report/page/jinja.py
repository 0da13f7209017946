"""The templates of pages and pictures, with what all of them may call."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable
from functools import cache, partial
from typing import TYPE_CHECKING

from markupsafe import Markup

from pytest_sglprof._metrics import MEASURED, METRICS, UNITS, Metric, metrics_of
from pytest_sglprof._verdict.reasons import subject
from pytest_sglprof._verdict.wording import count, duration, milliseconds, percent, ratio

if TYPE_CHECKING:
    from jinja2 import Environment, Template

    from pytest_sglprof._report.page.figures import TextCell

NONE = "–"  # where there is no figure
SIGNS = {"pass": "✓", "fail": "✗", "inconclusive": "?", MEASURED: "–"}


def template(name: str) -> Template:
    """A file of `templates/`. What is put into it is escaped."""
    return _environment().get_template(name)


@cache
def _environment() -> Environment:
    from jinja2 import Environment, PackageLoader

    environment = Environment(
        loader=PackageLoader("pytest_sglprof._report.page", "templates"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "ms": milliseconds,
        "duration": duration,
        "percent": partial(percent, none=NONE),
        "in_percent": in_percent,
        "ratio": partial(ratio, none=NONE),
        "column": _column,
        "cells": _cells,
        "moment": moment,
    }
    environment.globals |= {
        "signs": SIGNS,
        "count": count,
        "metrics": METRICS,
        "metrics_of": metrics_of,
        "figure": figure_alone,
        "unit": head_unit,
        "subject": subject,
    }
    return environment


def _cells(cells: Iterable[TextCell]) -> Markup:
    """The cells of a row: as a template of their own they take four times as long."""
    return Markup(
        "".join(
            f'<td class="{cell.of}">{html.escape(cell.text)}</td>'
            if cell.of
            else f"<td>{html.escape(cell.text)}</td>"
            for cell in cells
        )
    )


def figure_alone(metric: Metric, value: float | None) -> str:
    """`1.400`, `14.20`, without the unit, which stands in the head (`head_unit`)."""
    return metric.format(value, finer=1, none=NONE).removesuffix(UNITS[metric.unit].suffix)


def head_unit(metric: Metric) -> str:
    """`, %` to put after the name of a metric; "" for a ratio."""
    suffix = UNITS[metric.unit].suffix.strip()
    return f", {suffix}" if suffix else ""


def in_microseconds(ns: float) -> str:
    """`41.2`, `0.412`, `1,234` for a column whose head says µs: three significant digits."""
    return milliseconds(1e3 * ns)


def in_percent(share: float | None, digits: int = 0) -> str:
    """`64` for a column whose head says %."""
    return NONE if share is None else f"{100 * share:.{digits}f}"


def moment(text: str | None) -> str:
    """`2026-11-24 14:35:51 UTC` from the form of results; any other text unchanged."""
    match = re.fullmatch(r"(\d{4}-\d\d-\d\d)T(\d\d:\d\d:\d\d)(?:\.\d+)?Z", text or "")
    return f"{match[1]} {match[2]} UTC" if match else text or ""


def _column(text: str) -> str:
    """`text` as wide as five digits, so that figures beside each other line up."""
    return text.rjust(5, "\u2007")
