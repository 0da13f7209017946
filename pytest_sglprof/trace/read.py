"""Files of a window become one kernel table: `read_window`."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from pytest_sglprof.errors import NotATrace
from pytest_sglprof.trace.arrays import first_of
from pytest_sglprof.trace.join import joined, one_source
from pytest_sglprof.trace.kernels import category, normalise
from pytest_sglprof.trace.table import (
    COLUMNS,
    UNKNOWN_STAGE,
    KernelTable,
    RankActivities,
    rank_order,
    step_frame,
)
from pytest_sglprof.trace.torch_trace import COMMUNICATION
from pytest_sglprof.trace.torch_window import read_traces

TORCH_ENDINGS = (".json", ".json.gz", ".json.zst")
POOL_BYTES = 8 * 2**20  # stored bytes; below, starting processes costs more than it saves
NSYS_ENDINGS = (".sqlite", ".nsys-rep", ".qdstrm")

Progress = Callable[[int, int], None]


def read_window(
    paths: str | Path | Sequence[str | Path],
    *,
    pid_ranks: Mapping[int, str] | None = None,
    gpu_ranks: Mapping[int, str] | None = None,
    allow_partial: bool = False,
    settle_s: float = 0.0,
    patterns: Sequence[tuple[str, str]] = (),
    nsys: str | None = None,
    progress: Progress | None = None,
    processes: int | None = None,
) -> KernelTable:
    """Reads traces, reports, exports, or folders of them into one `KernelTable`.

    pid_ranks, gpu_ranks: which process, else which device, is which rank, for nsys
    reports. allow_partial: reads what a truncated trace still holds, and marks the table.
    settle_s: seconds dropped from the front. patterns: (category, regex) tried before the
    built-in ones. nsys: command that exports `.nsys-rep`. progress: (bytes read, bytes in
    all). processes: at most so many readers at once.

    Raises `TraceError` (`NotATrace`, `TraceTruncated`), naming the file and what to do.
    """
    files = window_files(paths)
    torch = [file for file in files if not is_nsys(file)]
    found = _read_torch(torch, allow_partial, progress, processes)
    for file in files:
        if is_nsys(file):
            from pytest_sglprof.trace.nsys_report import read_report

            read = read_report(file, pid_ranks=pid_ranks, gpu_ranks=gpu_ranks, nsys=nsys)
            found += [(file, activities) for activities in read]
    return build_table(found, settle_s=settle_s, patterns=patterns)


def window_files(paths: str | Path | Sequence[str | Path]) -> list[Path]:
    """The files that `read_window` reads of `paths`. Raises NotATrace where there is none."""
    listed = [paths] if isinstance(paths, str | Path) else list(paths)
    files = [file for path in listed for file in _files(Path(path))]
    if not files:
        raise NotATrace(
            "there is no trace to read" + (f" in {listed[0]}" if listed else ""),
            expected="*.trace.json.gz, *.json, *.nsys-rep, *.sqlite or a folder of them",
            hint="check the path",
        )
    return files


def is_nsys(path: Path) -> bool:
    """Whether it is a report, an export or a folder of Parquet files, by its name."""
    return path.is_dir() or path.suffix in NSYS_ENDINGS


def build_table(
    found: Sequence[tuple[Path, RankActivities]],
    *,
    settle_s: float = 0.0,
    patterns: Sequence[tuple[str, str]] = (),
) -> KernelTable:
    """Joins what was read of each rank; refuses a rank that stands in two files."""
    merged = joined(found)
    source, parts, left_out = one_source(merged)
    ranks = rank_order({activities.rank for activities in merged})
    steps = [(part.rank, step) for part in parts for step in part.steps]
    frame = _frame(parts, ranks, patterns)
    notes = list(dict.fromkeys([*(note for part in merged for note in part.notes), *left_out]))
    if settle_s > 0 and len(frame):
        frame, steps, note = _settle(frame, steps, settle_s)
        notes.append(note)
    return KernelTable(
        frame=frame,
        ranks=ranks,
        steps=step_frame(steps, ranks),
        source=source,
        partial=any(part.partial for part in merged),
        notes=tuple(notes),
        files=tuple(dict.fromkeys(str(file) for file, _ in found)),
    )


def _files(path: Path) -> list[Path]:
    if not path.exists():
        raise NotATrace(
            f"{path} does not exist",
            expected="a trace, a report, an export or a folder of a window",
            hint="check the path",
        )
    if not path.is_dir():
        return [path]
    inside = sorted(path.iterdir())
    if any(file.suffix == ".parquet" for file in inside):
        return [path]
    traces = [file for file in inside if file.name.endswith(TORCH_ENDINGS)]
    traces = [file for file in traces if ".trace.json" in file.name] or traces
    ranked = [file for file in traces if not file.name.startswith("merged-")]
    exports = [file for file in inside if file.suffix == ".sqlite"]
    stems = {file.stem for file in exports}
    reports = [f for f in inside if f.suffix == ".nsys-rep" and f.stem not in stems]
    return (ranked or traces) + exports + reports


def _read_torch(
    files: Sequence[Path],
    allow_partial: bool,
    progress: Progress | None,
    processes: int | None,
) -> list[tuple[Path, RankActivities]]:
    total = sum(file.stat().st_size for file in files)
    done = 0

    def tell(count: int) -> None:
        nonlocal done
        done = min(done + count, total)
        if progress is not None:
            progress(done, total)

    workers = (processes or os.cpu_count() or 1) if total >= POOL_BYTES else 1
    return read_traces(files, allow_partial=allow_partial, progress=tell, processes=workers)


def _frame(
    parts: Sequence[RankActivities], ranks: Sequence[str], patterns: Sequence[tuple[str, str]]
) -> pd.DataFrame:
    full_names = list(dict.fromkeys(name for part in parts for name in part.names))
    keys = {name: normalise(name) for name in full_names}
    categories = {name: _category(name, patterns) for name in full_names}
    full = _coded(parts, "names", "name_codes", full_names)
    kinds = list(dict.fromkeys(kind for part in parts for kind in part.kinds))
    columns: dict[str, Any] = {
        "rank": pd.Categorical.from_codes(
            np.repeat(
                np.array([ranks.index(p.rank) for p in parts], dtype=np.int16),
                [len(p.start) for p in parts],
            ),
            categories=pd.Index(list(ranks)),
            ordered=True,
        ),
        "name": _mapped_text(full, [keys[name] for name in full_names]),
        "full_name": pd.Categorical.from_codes(full, categories=pd.Index(full_names)),
        "category": _mapped_text(full, [categories[name] for name in full_names]),
        "kind": _mapped_text(_coded(parts, "kinds", "kind_codes", kinds), kinds),
        "stage": _stages(parts),
        "step": _concat([part.step for part in parts]),
        "stream": _concat([part.stream for part in parts]),
        "start_ns": _concat([part.start for part in parts]),
        "dur_ns": _concat([part.dur for part in parts]),
    }
    return pd.DataFrame({key: columns[key] for key in COLUMNS}, copy=False)


def _category(name: str, patterns: Sequence[tuple[str, str]]) -> str:
    return "communication" if name.startswith(COMMUNICATION) else category(name, patterns)


def _concat(arrays: Sequence[Any], dtype: Any = np.int64) -> Any:
    """One array of `dtype`, without the copies in between that a window can ill afford."""
    whole = np.empty(sum(len(array) for array in arrays), dtype=dtype)
    at = 0
    for array in arrays:
        whole[at : at + len(array)] = array
        at += len(array)
    return whole


def _coded(parts: Sequence[RankActivities], texts: str, codes: str, whole: Sequence[str]) -> Any:
    at = {text: number for number, text in enumerate(whole)}
    arrays = []
    for part in parts:
        own = np.array([at[text] for text in getattr(part, texts)], dtype=np.int32)
        arrays.append(own[getattr(part, codes)] if len(own) else np.empty(0, dtype=np.int32))
    return _concat(arrays, np.int32)


def _mapped_text(codes: Any, texts: Sequence[str]) -> Any:
    """Categorical of `texts[code]`, equal texts being one category."""
    unique = list(dict.fromkeys(texts))
    at = {text: number for number, text in enumerate(unique)}
    table = np.array([at[text] for text in texts], dtype=np.int32)
    own = table[codes] if len(table) else codes
    return pd.Categorical.from_codes(own, categories=pd.Index(unique))


def _stages(parts: Sequence[RankActivities]) -> Any:
    texts: dict[str, int] = {UNKNOWN_STAGE: 0}
    arrays = []
    for part in parts:
        numbers = np.array([s.step for s in part.steps], dtype=np.int64)
        stages = np.array(
            [texts.setdefault(s.stage, len(texts)) for s in part.steps], dtype=np.int64
        )
        order = np.argsort(numbers, kind="stable")
        codes = np.zeros(len(part.step), dtype=np.int16)
        at = first_of(numbers[order], part.step)
        codes[at >= 0] = stages[order][at[at >= 0]]
        arrays.append(codes)
    return pd.Categorical.from_codes(_concat(arrays, np.int16), categories=pd.Index(list(texts)))


def _settle(frame: pd.DataFrame, steps: list[Any], seconds: float) -> tuple[Any, list[Any], str]:
    starts = [step.start_ns for _, step in steps] or [int(frame["start_ns"].min())]
    edge = min(starts) + round(seconds * 1e9)
    kept = [(rank, step) for rank, step in steps if step.start_ns >= edge]
    early = {(rank, step.step) for rank, step in steps if step.start_ns < edge}
    drop = frame["start_ns"] < edge
    if early:
        pairs = zip(frame["rank"], frame["step"], strict=True)
        drop |= pd.Series([pair in early for pair in pairs], index=frame.index, dtype=bool)
    note = f"settle: dropped the first {seconds:g} s, {int(drop.sum())} activities"
    return frame.loc[~drop].reset_index(drop=True), kept, note
