"""Records as an aligned table, as CSV or as JSON."""

from __future__ import annotations

import csv
import io
import json
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pytest_sglprof._cli.options import Format
from pytest_sglprof._errors import SettingsError
from pytest_sglprof._report.model import json_value
from pytest_sglprof._report.terminal import text_table

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
    from pytest_sglprof._files import atomic_write

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
    return json.dumps(json_value(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def to_csv(records: Sequence[Record], keys: Sequence[str]) -> str:
    """CSV with a head line; None is an empty cell."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(keys)
    for record in records:
        values = (json_value(record[key]) for key in keys)
        writer.writerow("" if value is None else value for value in values)
    return stream.getvalue()


# Where a command may write: never over what it reads, nor over what it did not make itself.


# Stands in the head of every page that we write.
GENERATOR = b'<meta name="generator" content="pytest-sglprof">'
_HEAD = 4096  # bytes of a page in which it must stand

# What a run or a server recorded: never a view, so never ours to write over.
_RECORDS = ("results.json", "run.json", "journal.jsonl")
_RECORD_ENDINGS = (
    *(".trace.json", ".trace.json.gz", ".trace.json.zst"),
    *(".nsys-rep", ".qdstrm", ".sqlite", ".parquet", ".log", ".jsonl"),
)


def refuse_inputs(
    output: Path,
    inputs: Iterable[str | Path],
    *,
    option: str = "-o",
    which: str = "that are read",
) -> None:
    """Raises `SettingsError` where writing `output` would replace what the command reads.

    inputs: files, and folders with all that was recorded in them; links are followed.
    """
    for given in inputs:
        if _is_same(output, Path(given)) or _is_record_in(output, Path(given)):
            raise SettingsError(
                f"{option} {output} is one of the files {which}",
                expected="a name of its own",
                hint="write it under another name, or into another folder",
            )


def refuse_foreign(page: Path, *, hint: str) -> None:
    """Raises `SettingsError` where a page that nobody named would replace another's file."""
    if os.path.lexists(page) and not _is_our_page(page):
        raise SettingsError(
            f"{page} is there already, and sglprof did not write it",
            expected="no file of that name, or a page of sglprof",
            hint=hint,
        )


def _is_same(output: Path, given: Path) -> bool:
    try:
        return output.samefile(given)
    except OSError:  # one of them is not there
        return False


def _is_record_in(output: Path, folder: Path) -> bool:
    place = Path(os.path.realpath(output))
    if not folder.is_dir() or Path(os.path.realpath(folder)) not in place.parents:
        return False
    is_record = place.name in _RECORDS or place.name.endswith(_RECORD_ENDINGS)
    return is_record and place.exists()


def _is_our_page(page: Path) -> bool:
    try:
        with page.open("rb") as stream:
            return GENERATOR in stream.read(_HEAD)
    except OSError:
        return False
