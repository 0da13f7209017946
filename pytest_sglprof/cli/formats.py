"""Records as an aligned table, as CSV or as JSON."""

from __future__ import annotations

import argparse
import csv
import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from pytest_sglprof.patterns import compiled
from pytest_sglprof.report.plain import plain
from pytest_sglprof.report.text_table import text_table

Format = Literal["table", "csv", "json"]
FORMATS: tuple[Format, ...] = get_args(Format)

Record = Mapping[str, Any]


@dataclass(frozen=True)
class Column:
    """One column: `key` of the record, `head` and `cell` only for the table.

    cell: makes the table's text of a value. left: aligned left, as text should be.
    """

    key: str
    head: str = ""
    cell: Callable[[Any], str] = str
    left: bool = False


def add_format_option(parser: argparse.ArgumentParser) -> None:
    """`--format table|csv|json`."""
    parser.add_argument(
        "--format",
        choices=FORMATS,
        default="table",
        help="table for people, csv or json for programs (default: table)",
    )


def add_step_delimiter(parser: argparse.ArgumentParser) -> None:
    """`--step-delimiter REGEX`; `SettingsError` for what does not compile."""
    parser.add_argument(
        "--step-delimiter",
        type=_regex,
        default="",
        metavar="REGEX",
        help="the kernel that begins a step, for traces that tell no steps",
    )


def _regex(text: str) -> str:
    return compiled(text, f"--step-delimiter {text!r}").pattern


def render(records: Sequence[Record], columns: Sequence[Column], form: Format) -> str:
    """All records as text that ends in a line break. JSON keeps keys without a column."""
    if form == "json":
        return to_json(records)
    if form == "csv":
        return to_csv(records, [column.key for column in columns])
    rows = [[column.cell(record[column.key]) for column in columns] for record in records]
    left = [at for at, column in enumerate(columns) if column.left]
    lines = text_table([column.head or column.key for column in columns], rows, left=left)
    return "\n".join(lines) + "\n"


def to_json(value: Any) -> str:
    """Indented JSON; what is not finite becomes null."""
    return json.dumps(plain(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def to_csv(records: Sequence[Record], keys: Sequence[str]) -> str:
    """CSV with a head line; None is an empty cell."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(keys)
    for record in records:
        values = (plain(record[key]) for key in keys)
        writer.writerow("" if value is None else value for value in values)
    return stream.getvalue()
