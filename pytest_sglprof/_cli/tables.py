"""Write records as an aligned table, CSV or JSON, and never over anything recorded."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import math
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pytest_sglprof._cli.options import Format
from pytest_sglprof._errors import SettingsError
from pytest_sglprof._verdict.wording import text_table

Record = Mapping[str, Any]


@dataclass(frozen=True)
class Column:
    """One column. key: of the record. head: title in the table, by default the key.

    cell: turns a value into the text of the table. left: aligned left.
    """

    key: str
    head: str = ""
    cell: Callable[[Any], str] = str
    left: bool = False


def write_text(text: str, output: Path | None, inputs: Iterable[str | Path]) -> None:
    """Prints `text`, or writes it to `output`, which must not be one of the `inputs`."""
    if output is None:
        sys.stdout.write(text)
        return
    from pytest_sglprof._files import atomic_write

    refuse_inputs(output, inputs)
    atomic_write(output, text)
    sys.stdout.write(f"{output}\n")


def milliseconds(ns: Any) -> str:
    """Milliseconds with three decimals; `wording.milliseconds` rounds them for prose."""
    return f"{int(ns) / 1e6:.3f}"


def render(records: Sequence[Record], columns: Sequence[Column], form: Format) -> str:
    """The records as text that ends in a newline. JSON also has the keys without a column."""
    if form == "json":
        return to_json(records)
    if form == "csv":
        return to_csv(records, [column.key for column in columns])
    rows = [[column.cell(record[column.key]) for column in columns] for record in records]
    left = [at for at, column in enumerate(columns) if column.left]
    lines = text_table([column.head or column.key for column in columns], rows, left=left)
    return "\n".join(lines) + "\n"


def to_json(value: Any) -> str:
    """Indented JSON; numbers that are not finite become null."""

    return json.dumps(json_value(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def to_csv(records: Sequence[Record], keys: Sequence[str]) -> str:
    """CSV with a header line; None is an empty cell."""

    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(keys)
    for record in records:
        values = (json_value(record[key]) for key in keys)
        writer.writerow("" if value is None else value for value in values)
    return stream.getvalue()


# Where a command may write: never over its input, nor over a page that it did not write.

GENERATOR = b'<meta name="generator" content="pytest-sglprof">'  # in the head of our pages
_HEAD = 4096  # bytes of a page that are searched for it

# What runs and servers record. No command writes such a file.
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
    """Raises `SettingsError` if writing `output` would replace something that is read.

    inputs: files, and folders with everything recorded in them; links are followed.
    """
    for path in map(Path, inputs):
        if _is_same(output, path) or _is_record_in(output, path):
            raise SettingsError(
                f"{option} {output} is one of the files {which}",
                expected="a new file",
                hint="choose another name or another folder",
            )


def refuse_foreign(page: Path, *, hint: str) -> None:
    """Raises `SettingsError` if the default page would replace a file of somebody else."""
    if os.path.lexists(page) and not _is_our_page(page):
        raise SettingsError(
            f"{page} exists, and sglprof did not write it",
            expected="no file of that name, or a page of sglprof",
            hint=hint,
        )


def _is_same(output: Path, path: Path) -> bool:
    try:
        return output.samefile(path)
    except OSError:  # one of them does not exist
        return False


def _is_record_in(output: Path, folder: Path) -> bool:
    resolved = Path(os.path.realpath(output))
    if not folder.is_dir() or Path(os.path.realpath(folder)) not in resolved.parents:
        return False
    is_record = resolved.name in _RECORDS or resolved.name.endswith(_RECORD_ENDINGS)
    return is_record and resolved.exists()


def _is_our_page(page: Path) -> bool:
    try:
        with page.open("rb") as stream:
            return GENERATOR in stream.read(_HEAD)
    except OSError:
        return False


def json_value(value: Any) -> Any:
    """A copy that JSON can hold: str keys, lists, finite numbers; NaN and ±inf become None.

    Takes dataclasses, mappings, sequences, sets, paths and numpy scalars. Raises TypeError
    for anything else, so that nothing enters a document by its `repr`.
    """
    if value is None or isinstance(value, str | bool | int):
        return value if not isinstance(value, int) or type(value) in (bool, int) else int(value)
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): json_value(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [json_value(item) for item in value]
    if isinstance(value, set | frozenset):
        return sorted((json_value(item) for item in value), key=str)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {
            field.name: json_value(getattr(value, field.name))
            for field in dataclasses.fields(value)
        }
    if isinstance(value, Path):
        return value.as_posix()
    if hasattr(value, "item") and getattr(value, "ndim", None) == 0:
        return json_value(value.item())
    raise TypeError(f"{type(value).__name__} has no place in a results document")
