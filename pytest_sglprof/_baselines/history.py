"""The lives of all runs: one file a run, so that no writer disturbs another.

They lie in `history` beside the folders of the runs, and stay when these are removed.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import msgspec

from pytest_sglprof._baselines.records import RECORD_FORMAT, LifeRecord
from pytest_sglprof._errors import SglprofError
from pytest_sglprof._files import atomic_write, safe_name
from pytest_sglprof._limits import UNDECODABLE, read_bytes, why_undecodable

HISTORY = "history"


def append_run(folder: Path, run_id: str, records: Sequence[LifeRecord]) -> Path | None:
    """Adds the records of a run to its file, one a line; None without records.

    folder: for results (`.sglprof`). Raises OSError.
    """
    if not records:
        return None
    path = history_file(folder, run_id)
    before = path.read_bytes() if path.exists() else b""
    lines = [msgspec.json.encode(record, order="sorted") + b"\n" for record in records]
    atomic_write(path, b"".join([before, *lines]))
    return path


def history_file(folder: Path, run_id: str) -> Path:
    """Where the lives of a run are."""
    return folder / HISTORY / f"{safe_name(run_id)}.jsonl"


def read_history(folder: Path, *, problems: list[str] | None = None) -> list[LifeRecord]:
    """The lives of every run in a folder for results, the oldest first; of equal ids the last.

    problems: gets a line for each file and line that cannot be read.
    """
    by_id: dict[str, LifeRecord] = {}
    lost: list[str] = [] if problems is None else problems
    for path in sorted((folder / HISTORY).glob("*.jsonl")):
        for record in read_lives(path, lost):
            by_id[record.id] = record
    return sorted(by_id.values(), key=lambda record: (record.recorded, record.id))


def read_lives(path: Path, problems: list[str]) -> list[LifeRecord]:
    """The lives in the file of one run; broken lines go to `problems`."""
    try:
        lines = read_bytes(path).splitlines()
    except OSError as error:
        problems.append(f"{path} cannot be read: {error.strerror or error}")
        return []
    except SglprofError as error:
        problems.append(error.what)
        return []
    records = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            major, _ = msgspec.json.decode(line, type=_Head).format
            if major == RECORD_FORMAT[0]:
                records.append(msgspec.json.decode(line, type=LifeRecord))
            else:
                problems.append(f"{path}, line {number}: of format {major}, left out")
        except UNDECODABLE as error:
            why = why_undecodable(error)
            problems.append(f"{path}, line {number}: damaged, left out: {why}")
    return records


class _Head(msgspec.Struct):
    format: tuple[int, int]
