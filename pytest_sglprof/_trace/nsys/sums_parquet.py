"""Kernel time summed over a Parquet export. Apart from `sums`, since it loads pyarrow and numpy."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from pytest_sglprof._trace.nsys.database import (
    KINDS,
    MISSING,
    PID_MASK,
    PID_SHIFT,
    Counted,
    Key,
    activity_name,
    skipped,
    table_of,
)
from pytest_sglprof._trace.nsys.rows import read_whole_graphs
from pytest_sglprof._trace.nsys.tables import ParquetTables, pid_of
from pytest_sglprof._trace.torch.events import LARGEST_NS, LONGEST_NS

_COLUMNS = ("start", "end", "globalPid", "deviceId", "streamId", "graphNodeId")


_PARQUET_NAMES: dict[str, tuple[str, ...]] = {
    "kernel": ("demangledName", "shortName"),
    "memcpy": ("copyKind",),
    "memset": (),
}


_Sums = dict[tuple[int, int, int], tuple[int, int]]  # (process id, device, id of the name)


def count_folder(folder: Path) -> Counted | None:
    """As `count_database`, of a folder of Parquet files. Raises the errors of `ParquetTables`."""
    tables = ParquetTables(folder)
    sums: dict[Key, tuple[int, int]] = {}
    missing = beyond = 0
    order, in_order = _Order(), True
    for kind in KINDS:
        summed: _Sums = {}
        columns = (*_COLUMNS, *_PARQUET_NAMES[kind])
        for batch in tables.batches(table_of(kind), columns):
            known, timed = _timed(batch)
            missing += batch.num_rows - known.num_rows
            beyond += known.num_rows - timed.num_rows
            _add_up_parquet(timed, _PARQUET_NAMES[kind], summed)
            if kind == "kernel":
                in_order = in_order and order.holds(timed)
        sums.update(_named(tables, kind, summed))
    if not in_order and not _Order().holds(_by_start(tables)):
        return None
    graphs = read_whole_graphs(tables)
    owners = graphs.owners | {(pid, device) for pid, device, _, _ in sums}
    (recorded,) = tables.integers("PROCESSES", ["globalPid"])
    pids = frozenset(pid_of(recorded[recorded != MISSING]).tolist())
    notes = (*skipped(missing, beyond), *graphs.notes)
    return Counted(sums, frozenset(owners), pids, notes)


def _by_start(tables: ParquetTables) -> Any:
    """All kernels at once in order of start and end: nsys promises no order since 2025.6."""
    import pyarrow

    batches = tables.batches(table_of("kernel"), _COLUMNS)
    rows = pyarrow.concat_tables([_timed(batch)[1] for batch in batches])
    return rows.sort_by([("start", "ascending"), ("end", "ascending")])


def _timed(batch: Any) -> tuple[Any, Any]:
    """The rows with times, and those of them whose times are possible: see `usable`."""
    import pyarrow.compute as pc

    known = batch.filter(pc.greater_equal(batch["end"], batch["start"]))
    inside = pc.and_(pc.greater(known["start"], -LARGEST_NS), pc.less(known["end"], LARGEST_NS))
    timed = known.filter(inside)
    short = pc.less(pc.subtract(timed["end"], timed["start"]), LONGEST_NS)
    return known, timed.filter(short)


def _add_up_parquet(rows: Any, names: tuple[str, ...], sums: _Sums) -> None:
    import pyarrow.compute as pc

    keys = ["globalPid", "deviceId", *names]
    table = rows.select(keys).append_column("dur", pc.subtract(rows["end"], rows["start"]))
    summed = table.group_by(keys, use_threads=False).aggregate([("dur", "count"), ("dur", "sum")])
    columns = [summed[name].to_pylist() for name in (*keys, "dur_count", "dur_sum")]
    for process, device, *ids, count, total in zip(*columns, strict=True):
        pid = (process or 0) >> PID_SHIFT & PID_MASK
        number = next((one for one in ids if one is not None), MISSING)
        key = (pid, -1 if device is None or device < 0 else device, number)
        before = sums.get(key, (0, 0))
        sums[key] = (before[0] + count, before[1] + total)


def _named(tables: ParquetTables, kind: str, summed: _Sums) -> Iterator[tuple[Key, Any]]:
    """The sums under their names; two ids may stand for one text."""
    texts = tables.strings(number for _, _, number in summed) if kind == "kernel" and summed else {}
    merged: dict[Key, tuple[int, int]] = {}
    for (pid, device, number), (count, total) in summed.items():
        key = (pid, device, kind, activity_name(kind, number, texts))
        before = merged.get(key, (0, 0))
        merged[key] = (before[0] + count, before[1] + total)
    yield from merged.items()


class _Order:
    """Whether kernels outside of graphs come, stream by stream, in order of start and of end.

    Then none contains a later one (see `count_database`).
    """

    def __init__(self) -> None:
        self._last: dict[int, tuple[int, int]] = {}

    def holds(self, rows: Any) -> bool:
        """Whether this is so of these rows, which follow those of the calls before."""
        import pyarrow.compute as pc

        node = rows["graphNodeId"]
        rows = rows.filter(pc.or_kleene(pc.is_null(node), pc.equal(node, 0)))
        if not rows.num_rows:
            return True
        # If two streams share a key, that can only look like disorder, never hide it.
        parts = (pc.fill_null(rows[name], -1) for name in ("globalPid", "deviceId", "streamId"))
        process, device, stream = parts
        key = pc.add(process, pc.add(pc.shift_left(device, 16), stream))
        coded = key.combine_chunks().dictionary_encode()
        keys = coded.dictionary.to_pylist()
        codes = coded.indices.to_numpy()
        by_stream = np.argsort(codes.astype(np.uint16 if len(keys) < 2**16 else np.int64),
                               kind="stable")  # fmt: skip
        start, end = (rows[name].to_numpy()[by_stream] for name in ("start", "end"))
        edges = np.flatnonzero(np.diff(codes[by_stream])) + 1
        falls = (np.diff(start) < 0) | (np.diff(end) < 0)
        falls[edges - 1] = False
        if falls.any():
            return False
        firsts, lasts = [0, *edges.tolist()], [*(edges - 1).tolist(), len(codes) - 1]
        for number, (first, last) in enumerate(zip(firsts, lasts, strict=True)):
            before = self._last.get(keys[number], (MISSING, MISSING))
            if start[first] < before[0] or end[first] < before[1]:
                return False
            self._last[keys[number]] = (int(start[last]), int(end[last]))
        return True
