"""Where a command may write: never over what it reads, nor over what it did not make itself."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from pytest_sglprof.errors import SettingsError

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
