"""What stands beside the traces of a window: its server's settings, its experts' tokens."""

from __future__ import annotations

import json
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from pytest_sglprof._errors import TraceError
from pytest_sglprof._limits import UNDECODABLE, read_bytes, refuse_deep, refuse_large
from pytest_sglprof._server.sizes import EXPERTS, SERVER_INFO, SETTINGS_KEYS, pass_settings
from pytest_sglprof._trace.paths import is_reduced
from pytest_sglprof._trace.reduced import beside_of
from pytest_sglprof._trace.steps import with_settings
from pytest_sglprof._trace.table import (
    NO_STEP,
    ExpertRows,
    Ints,
    KernelTable,
    PassSettings,
    expert_frame,
)


def with_files_beside(
    table: KernelTable, paths: Sequence[str | Path], server_info: Path | None = None
) -> KernelTable:
    """The table with the `settings` and the `experts` that stand beside its traces.

    server_info: the settings, instead of those beside. Raises `TraceError` if that file is not
    one; a file beside that cannot be read is left out, with a note.
    """
    given = server_info or beside_of_traces(paths, SERVER_INFO)
    if given is None:
        of_reduced = [beside_of(Path(path)) for path in paths if is_reduced(Path(path))]
        infos = [each.server_info for each in of_reduced if each.server_info is not None]
        if infos:
            table = with_settings(table, pass_settings(infos[0]))
    else:
        try:
            table = with_settings(table, read_settings(given))
        except TraceError as error:
            if server_info is not None:
                raise
            table = _noted(table, f"{given.name} is left out: {error.what}")
    counts = beside_of_traces(paths, EXPERTS)
    return table if counts is None else with_experts(table, counts)


def beside_of_traces(paths: Sequence[str | Path], name: str) -> Path | None:
    """The file of that name in the folder of the first of `paths` that has one."""
    for path in map(Path, paths):
        file = (path if path.is_dir() else path.parent) / name
        if file.is_file():
            return file
    return None


def read_settings(file: Path) -> PassSettings:
    """The settings in an answer of `/server_info`; `TraceError` for anything else."""
    try:
        info = json.loads(read_bytes(file, error=TraceError))
        refuse_deep(info)
    except (OSError, *UNDECODABLE) as error:
        what = error.strerror if isinstance(error, OSError) else "is not JSON"
        raise _not_of_a_server(file, what or "cannot be read") from error
    if not isinstance(info, dict) or not info.keys() & set(SETTINGS_KEYS):
        raise _not_of_a_server(file, "has no setting of a server")
    return pass_settings(info)


def _not_of_a_server(file: Path, what: str) -> TraceError:
    return TraceError(
        f"{file}: {what}",
        expected="the answer of SGLang's /server_info",
        hint=f"curl -s http://HOST:PORT/server_info > {SERVER_INFO}",
    )


# Of a file that numpy did not write; the last for a shape that is larger than its data.
_NO_COUNTS = (
    *(OSError, ValueError, TypeError, KeyError, EOFError, RuntimeError, SyntaxError),
    *(zipfile.BadZipFile, zlib.error, MemoryError),
)
_UNPACKED = 12  # bytes of memory for one of the file: five columns of int64 for counts of int32


def with_experts(table: KernelTable, file: Path) -> KernelTable:
    """The table with the counts that `_capture/convert_experts.py` wrote.

    A count belongs to the target model's step with the forward id of its pass. Counts of no
    step are left out, and a note says how many steps have none.
    """
    try:
        with zipfile.ZipFile(file) as packed:
            size = sum(each.file_size for each in packed.infolist())
        refuse_large(file, _UNPACKED * size, error=TraceError)
        with file.open("rb") as raw, np.load(raw, allow_pickle=False) as stored:
            content = {name: stored[name] for name in ("passes", "counts", "logical", "rank_rows")}
            labels = [str(label) for label in stored["labels"]]
        _check_shapes(content, labels)
    except TraceError as error:
        return _noted(table, f"{file.name} is left out: {error.what}")
    except _NO_COUNTS as error:
        return _noted(table, f"{file.name} is left out: {type(error).__name__}: {error}")
    row_of = dict(zip(labels, content["rank_rows"].tolist(), strict=True))
    parts = [
        part
        for rank in table.ranks
        if rank in row_of
        for part in _rows_of(table, rank, row_of[rank], content)
    ]
    table = replace(table, experts=expert_frame(parts, table.ranks))
    strangers = [rank for rank in table.ranks if rank not in row_of]
    if strangers:
        table = _noted(table, f"experts: the tokens of {', '.join(strangers)} are not recorded")
    if content["passes"].tolist() == [NO_STEP]:
        return table
    targets = _targets(table)
    counted = {part.rank: len(np.unique(part.step)) for part in parts}
    without = sum(int((targets["rank"] == rank).sum()) - counted.get(rank, 0) for rank in row_of)
    if without > 0:
        table = _noted(table, f"experts: {without} of {len(targets)} steps have no counts")
    return table


def _check_shapes(content: Mapping[str, Any], labels: Sequence[str]) -> None:
    counts, logical, rows = (content[name] for name in ("counts", "logical", "rank_rows"))
    is_whole = all(content[name].dtype.kind in "iu" for name in content)
    fits = is_whole and content["passes"].ndim == rows.ndim == 1
    fits = fits and counts.ndim == 4 and counts.shape[1] == len(content["passes"]) > 0
    fits = fits and logical.shape == (counts.shape[0], *counts.shape[2:])
    if not fits or len(rows) != len(labels) or not set(rows.tolist()) <= set(range(len(counts))):
        raise ValueError("its arrays do not fit together")


def _rows_of(table: KernelTable, rank: str, row: int, content: dict[str, Any]) -> list[ExpertRows]:
    """The rows of one rank, none if no pass of its counts is a step of it."""
    passes: Ints = content["passes"]
    counts, logical = content["counts"][row], content["logical"][row]
    if passes.tolist() == [NO_STEP]:
        step, at = np.array([NO_STEP]), np.array([0])
    else:
        targets = _targets(table)
        targets = targets[targets["rank"] == rank].drop_duplicates("forward_id", keep=False)
        place = np.searchsorted(passes, targets["forward_id"]).clip(max=len(passes) - 1)
        known = passes[place] == targets["forward_id"].to_numpy()
        step, at = targets["step"].to_numpy()[known], place[known]
    if not len(at):
        return []
    shape = (len(at), *logical.shape)
    layer = np.arange(shape[1])[None, :, None]
    return [
        ExpertRows(
            rank,
            np.broadcast_to(step[:, None, None], shape).ravel(),
            np.broadcast_to(layer, shape).ravel(),
            np.broadcast_to(logical[None], shape).ravel(),
            counts[at].ravel(),
        )
    ]


def _targets(table: KernelTable) -> Any:
    """The steps of the target model that have a forward id; drafts count their own."""
    steps = table.steps
    drafts = steps["substage"].astype(str).str.startswith("DRAFT")
    return steps[(steps["forward_id"] >= 0) & ~drafts]


def _noted(table: KernelTable, note: str) -> KernelTable:
    return replace(table, notes=(*table.notes, note))
