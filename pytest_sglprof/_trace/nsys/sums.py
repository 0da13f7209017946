"""Sums by rank and kernel of an nsys report, without a row in memory: `read_sums`.

For what needs only totals. Neither pandas nor (for SQLite) numpy is imported.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pytest_sglprof._ranks import rank_order
from pytest_sglprof._trace.categories import categories_of
from pytest_sglprof._trace.kernel_names import normalise
from pytest_sglprof._trace.nsys.database import (
    KINDS,
    MISSING,
    NO_NAME,
    PID_MASK,
    PID_SHIFT,
    PREFIX,
    USABLE,
    Counted,
    Database,
    Key,
    Owner,
    ReportName,
    activity_name,
    label_owners,
    not_recorded,
    open_database,
    skipped,
    table_of,
    whole_graphs,
    whole_number,
)
from pytest_sglprof._trace.nsys.files import readable

KEYS = ("rank", "name", "full_name", "category", "kind")

_Labelled = dict[tuple[str, str, str], tuple[int, int]]  # (rank, full name, kind)


@dataclass(frozen=True)
class KernelSums:
    """Count and total time of each rank, full name and kind: columns of one length.

    rank: in rank order; within a rank the largest total first. name, full_name, category,
    kind, source and notes: as in a `KernelTable`. total_ns: sum of durations, ns.
    """

    rank: tuple[str, ...]
    name: tuple[str, ...]
    full_name: tuple[str, ...]
    category: tuple[str, ...]
    kind: tuple[str, ...]
    count: tuple[int, ...]
    total_ns: tuple[int, ...]
    source: str = "gpu"
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.rank)

    def of(self, key: str, text: str) -> KernelSums:
        """Only those whose `key` (out of `KEYS`) is `text`."""
        chosen = [at for at, value in enumerate(getattr(self, key)) if value == text]
        columns: dict[str, Any] = {
            name: tuple(getattr(self, name)[at] for at in chosen)
            for name in (*KEYS, "count", "total_ns")
        }
        return replace(self, **columns)

    def by(self, *keys: str) -> list[dict[str, str | int]]:
        """Count and total time for each combination of `keys` (out of `KEYS`).

        Ordered as by `KernelTable.by`: by rank where that is a key, then by total, largest
        first, then by the keys' texts.
        """
        columns = [getattr(self, key) for key in keys]
        sums: dict[tuple[str, ...], tuple[int, int]] = {}
        for *texts, count, total in zip(*columns, self.count, self.total_ns, strict=True):
            before = sums.get(tuple(texts), (0, 0))
            sums[tuple(texts)] = (before[0] + count, before[1] + total)
        place = {rank: number for number, rank in enumerate(rank_order(set(self.rank)))}
        at = keys.index("rank") if "rank" in keys else None

        def order(texts: tuple[str, ...]) -> tuple[int, int, tuple[str, ...]]:
            return (place[texts[at]] if at is not None else 0, -sums[texts][1], texts)

        return [
            {**dict(zip(keys, texts, strict=True)), "count": sums[texts][0],
             "total_ns": sums[texts][1]}
            for texts in sorted(sums, key=order)
        ]  # fmt: skip


def read_sums(
    path: Path,
    *,
    pid_ranks: Mapping[int, str] | None = None,
    gpu_ranks: Mapping[int, str] | None = None,
    name: ReportName = NO_NAME,
    patterns: Sequence[tuple[str, str]] = (),
    nsys: str | None = None,
) -> KernelSums:
    """The sums of a `.sqlite` export, a `.nsys-rep` or a Parquet folder.

    They are those of `read_report`, to the nanosecond, with the same arguments and errors;
    patterns: (category, regex) tried before the built-in ones. A report without GPU
    activities, or with kernels that may not be counted, is read row by row instead.
    """
    with readable(path, nsys) as export:
        counted = _counted(export)
        if counted is not None and counted.owners:
            labelled, notes = _labelled(counted, pid_ranks or {}, gpu_ranks or {}, name)
            return _sums(labelled, patterns, "gpu", notes)
        from pytest_sglprof._trace.nsys.report import read_report

        parts = read_report(export, pid_ranks=pid_ranks, gpu_ranks=gpu_ranks, name=name)
    sums: _Labelled = {}
    for part in parts:
        rows = zip(part.name_codes.tolist(), part.kind_codes.tolist(), part.dur.tolist(),
                   strict=True)  # fmt: skip
        for code, kind, dur in rows:
            _add(sums, (part.rank, part.names[code], part.kinds[kind]), 1, dur)
    notes = list(dict.fromkeys(note for part in parts for note in part.notes))
    return _sums(sums, patterns, parts[0].source if parts else "gpu", notes)


def _counted(export: Path) -> Counted | None:
    if export.is_dir():
        from pytest_sglprof._trace.nsys.sums_parquet import count_folder

        return count_folder(export)
    with open_database(export) as database:
        return count_database(database)


def _labelled(
    counted: Counted,
    pid_ranks: Mapping[int, str],
    gpu_ranks: Mapping[int, str],
    name: ReportName,
) -> tuple[_Labelled, list[str]]:
    owners = sorted(Owner(pid, device) for pid, device in counted.owners)
    labels, how = label_owners(
        owners, pid_ranks=pid_ranks, gpu_ranks=gpu_ranks, name=name, recorded=counted.recorded
    )
    sums: _Labelled = {}
    for (pid, device, kind, kernel), (count, total) in counted.sums.items():
        _add(sums, (labels[Owner(pid, device)], kernel, kind), count, total)
    seen = counted.recorded | {owner.pid for owner in owners}
    return sums, [*counted.notes, *how, *not_recorded(pid_ranks, seen)]


def _add(sums: _Labelled, key: tuple[str, str, str], count: int, total: int) -> None:
    before = sums.get(key, (0, 0))
    sums[key] = (before[0] + count, before[1] + total)


def _sums(
    labelled: _Labelled, patterns: Sequence[tuple[str, str]], source: str, notes: Sequence[str]
) -> KernelSums:
    place = {rank: at for at, rank in enumerate(rank_order({rank for rank, _, _ in labelled}))}
    keys = sorted(labelled, key=lambda key: (place[key[0]], -labelled[key][1], key))
    names = {full: normalise(full) for _, full, _ in keys}
    categories = categories_of(names, patterns)
    return KernelSums(
        rank=tuple(rank for rank, _, _ in keys),
        name=tuple(names[full] for _, full, _ in keys),
        full_name=tuple(full for _, full, _ in keys),
        category=tuple(categories[full] for _, full, _ in keys),
        kind=tuple(kind for _, _, kind in keys),
        count=tuple(labelled[key][0] for key in keys),
        total_ns=tuple(labelled[key][1] for key in keys),
        source=source,
        notes=tuple(dict.fromkeys(notes)),
    )


# Exports in Parquet: pyarrow adds up one batch of columns after the other.


# Exports in SQLite: the engine adds up, no row becomes a Python object.

# A sum's key is one integer, so that looking it up is one comparison a level: process id,
# device and id of the name, in 24, 8 and 31 bits. Rows that do not fit are not added.
_DEVICE_BITS, _NAME_BITS = 8, 31
_DEVICE_MASK, _NAME_MASK = (1 << _DEVICE_BITS) - 1, (1 << _NAME_BITS) - 1
_SQLITE_NAMES = {"kernel": ("demangledName", "shortName"), "memcpy": ("copyKind",), "memset": ()}


def count_database(database: Database) -> Counted | None:
    """Count and total time of all GPU activities; None if they must be read row by row.

    That is the case when a row holds what nsys never writes (no process, an id of more than
    31 bits), or when a kernel of a stream, in order of start, ends before the one in front of
    it: that one contains it, which is impossible and must not be counted.
    """
    sums: dict[Key, tuple[int, int]] = {}
    missing = beyond = 0
    for kind in KINDS:
        if not database.columns(table_of(kind)):
            continue
        added = _add_up_sqlite(database, kind)
        if added is None:
            return None
        summed = _sqlite_sums(database, kind)
        others = _rows(database, kind, added) - added
        whole = all(isinstance(total, int) for _, total in summed.values())
        lost = _untimed(database, kind) if others else (0, 0)
        if not whole or others != sum(lost):
            return None
        missing += lost[0]
        beyond += lost[1]
        sums.update(summed)
    if not _in_order(database, all_timed=not (missing or beyond)):
        return None
    owners, notes = _whole_graphs(database)
    owners |= {(pid, device) for pid, device, _, _ in sums}
    notes = [*skipped(missing, beyond), *notes]
    return Counted(sums, frozenset(owners), _recorded(database), tuple(notes))


def _add_up_sqlite(database: Database, kind: str) -> int | None:
    """Makes the table `temp.sums`; how many rows are in it, None where columns are missing."""
    table = table_of(kind)
    columns = database.columns(table)
    if not {"start", "end"} <= columns:
        return None
    fits = [USABLE]
    parts = []
    if "globalPid" in columns:
        fits.append('"globalPid" IS NOT NULL')
        shift = _DEVICE_BITS + _NAME_BITS - PID_SHIFT
        parts.append(f'("globalPid" & {PID_MASK << PID_SHIFT}) << {shift}')
    if "deviceId" in columns:
        parts.append(f'"deviceId" << {_NAME_BITS}')
        fits.append(f'"deviceId" BETWEEN 0 AND {_DEVICE_MASK}')
    named = [column for column in _SQLITE_NAMES[kind] if column in columns]
    if _SQLITE_NAMES[kind] and not named:
        return None
    if named:
        parts.append(f'"{named[0]}"')
        fits.append(f'"{named[0]}" BETWEEN 0 AND {_NAME_MASK}')
    key = f"({') | ('.join(parts) or '0'})"
    run = database.connection.execute
    run("DROP TABLE IF EXISTS temp.sums")
    run("CREATE TEMP TABLE sums (key INTEGER PRIMARY KEY, count, total)")
    added = run(
        f'INSERT INTO sums SELECT {key}, 1, "end" - "start" FROM "{table}" NOT INDEXED '
        f"WHERE {' AND '.join(fits)} "
        "ON CONFLICT (key) DO UPDATE SET count = count + 1, total = total + excluded.total"
    )
    return added.rowcount


def _rows(database: Database, kind: str, at_least: int) -> int:
    """Rows of a table. Counting them reads it all: where so many ids are in use, they are all."""
    table = table_of(kind)
    first, last = (
        database.connection.execute(f'SELECT {end}(rowid) FROM "{table}"').fetchone()[0]
        for end in ("MIN", "MAX")
    )
    if first is not None and last - first + 1 == at_least:
        return at_least
    return int(database.connection.execute(f'SELECT COUNT(*) FROM "{table}"').fetchone()[0])


def _sqlite_sums(database: Database, kind: str) -> dict[Key, tuple[int, int]]:
    """The sums under their names."""
    rows = database.connection.execute("SELECT key, count, total FROM temp.sums").fetchall()
    known_device = "deviceId" in database.columns(table_of(kind))
    texts = database.strings({key & _NAME_MASK for key, _, _ in rows}) if kind == "kernel" else {}
    merged: dict[Key, tuple[int, int]] = {}  # two ids may stand for one text
    for key, count, total in rows:
        pid = key >> (_DEVICE_BITS + _NAME_BITS)
        device = key >> _NAME_BITS & _DEVICE_MASK if known_device else -1
        whole = (pid, device, kind, activity_name(kind, key & _NAME_MASK, texts))
        before = merged.get(whole, (0, 0))
        merged[whole] = (before[0] + count, before[1] + total)
    return merged


def _untimed(database: Database, kind: str) -> tuple[int, int]:
    """How many rows have no time, and how many have an impossible one."""
    known = (
        f"{whole_number('start')} AND {whole_number('end')} "
        f'AND "start" <> {MISSING} AND "end" >= "start"'
    )
    lost, beyond = database.connection.execute(
        f'SELECT COUNT(*), COUNT(*) FILTER (WHERE {known}) FROM "{table_of(kind)}" '
        f"WHERE ({USABLE}) IS NOT TRUE"
    ).fetchone()
    return int(lost) - int(beyond), int(beyond)


def _in_order(database: Database, *, all_timed: bool) -> bool:
    """Whether kernels outside of graphs follow each other, stream by stream, by start and end.

    Then none contains a later one: a kernel that did would end after it, so the ends would
    fall somewhere between neighbours in order of start. Rows mostly stand in that order; nsys
    promises none since 2025.6, so where they do not, the engine sorts them.
    """
    columns = database.columns(table_of("kernel"))
    if not columns:
        return True
    # If two streams share a key, that can only look like disorder, never hide it.
    parts = ['"globalPid"'] if "globalPid" in columns else []
    parts += ['("deviceId" << 16)'] if "deviceId" in columns else []
    parts += ['COALESCE("streamId", -1)'] if "streamId" in columns else []
    where = ['IFNULL("graphNodeId", 0) = 0'] if "graphNodeId" in columns else []
    where += [] if all_timed else [USABLE]
    rows = (
        f'SELECT {" + ".join(parts) or "0"}, "start", "end" FROM "{table_of("kernel")}" '
        f"NOT INDEXED WHERE {' AND '.join(where) or 'TRUE'}"
    )
    if _ascends(database, f"{rows} ORDER BY rowid"):
        return True
    database.connection.execute("PRAGMA temp_store = FILE")  # sorts in runs: less memory and time
    try:
        return _ascends(database, f'{rows} ORDER BY "start", "end"')
    except sqlite3.OperationalError:  # no room for them in any folder of temporary files
        return False


def _ascends(database: Database, rows: str) -> bool:
    """Whether no start and no end of `rows` (key, start, end) is before the last of its key."""
    run = database.connection.execute
    run("DROP TABLE IF EXISTS temp.streams")
    run('CREATE TEMP TABLE streams (key INTEGER PRIMARY KEY, "start" NOT NULL, "end")')
    ascends = 'excluded."start" >= "start" AND excluded."end" >= "end"'
    try:  # a row out of order would store a null, which ends the statement
        run(
            f"INSERT INTO streams {rows} "
            f'ON CONFLICT (key) DO UPDATE SET "start" = IIF({ascends}, excluded."start", NULL), '
            '"end" = excluded."end"'
        )
    except sqlite3.IntegrityError:
        return False
    return True


def _whole_graphs(database: Database) -> tuple[set[tuple[int, int]], list[str]]:
    table = f"{PREFIX}GRAPH_TRACE"
    columns = database.columns(table)
    if not columns:
        return set(), []
    process, device = (
        f'IIF(TYPEOF("{name}") = \'integer\', "{name}", {otherwise})'
        if name in columns
        else str(otherwise)
        for name, otherwise in (("globalPid", 0), ("deviceId", -1))
    )
    usable = USABLE if {"start", "end"} <= columns else "FALSE"
    length = 'CAST("end" AS INTEGER) - CAST("start" AS INTEGER)' if usable == USABLE else "0"
    rows = database.connection.execute(
        f"SELECT {process} >> {PID_SHIFT} & {PID_MASK}, MAX({device}, -1), COUNT(*), "
        f'SUM({length}) FILTER (WHERE {usable}) FROM "{table}" GROUP BY 1, 2'
    ).fetchall()
    if not rows:
        return set(), []
    total = sum(ns or 0 for *_, ns in rows)
    owners = {(pid, gpu) for pid, gpu, _, _ in rows}
    return owners, [whole_graphs(sum(count for _, _, count, _ in rows), total)]


def _recorded(database: Database) -> frozenset[int]:
    if "globalPid" not in database.columns("PROCESSES"):
        return frozenset()
    pids = database.connection.execute(
        f'SELECT DISTINCT "globalPid" >> {PID_SHIFT} & {PID_MASK} FROM "PROCESSES" '
        'WHERE "globalPid" IS NOT NULL'
    )
    return frozenset(int(pid) for (pid,) in pids)
