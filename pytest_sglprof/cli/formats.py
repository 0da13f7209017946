"""Records as an aligned table, as CSV or as JSON."""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pytest_sglprof.cli.options import Format
from pytest_sglprof.report.plain import plain
from pytest_sglprof.report.text_table import text_table

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


def write_text(text: str, output: Path | None, inputs: Iterable[str | Path]) -> None:
    """Prints `text`, or writes it to `output`, which must be none of the `inputs`."""
    if output is None:
        sys.stdout.write(text)
        return
    from pytest_sglprof.cli.output import refuse_inputs
    from pytest_sglprof.files import atomic_write

    refuse_inputs(output, inputs)
    atomic_write(output, text)
    sys.stdout.write(f"{output}\n")


def milliseconds(ns: Any) -> str:
    """All of its thousandths, which `wording.milliseconds` rounds away."""
    return f"{int(ns) / 1e6:.3f}"


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
