"""Sums of an nsys export in SQLite: the engine adds them up, no row becomes an object."""

from __future__ import annotations

import sqlite3

from pytest_sglprof.trace.nsys_counted import Counted, Key
from pytest_sglprof.trace.nsys_database import Database
from pytest_sglprof.trace.nsys_schema import (
    KINDS,
    MISSING,
    PID_MASK,
    PID_SHIFT,
    PREFIX,
    USABLE,
    activity_name,
    skipped,
    table_of,
    whole_graphs,
    whole_number,
)

# A sum's key is one integer, so that looking it up is one comparison a level: process id,
# device and id of the name, in 24, 8 and 31 bits. Rows that do not fit are not added.
_DEVICE_BITS, _NAME_BITS = 8, 31
_DEVICE_MASK, _NAME_MASK = (1 << _DEVICE_BITS) - 1, (1 << _NAME_BITS) - 1
_NAME_COLUMNS = {"kernel": ("demangledName", "shortName"), "memcpy": ("copyKind",), "memset": ()}


def count_database(database: Database) -> Counted | None:
    """All GPU activities, added up; None where only reading row by row gives the right sums.

    That is when a row holds what no nsys writes (no process, an id of more than 31 bits),
    or when kernels of a stream are not in order of start *and* of end: one of them may then
    contain a whole later one, which is impossible and must not be counted.
    """
    sums: dict[Key, tuple[int, int]] = {}
    missing = beyond = 0
    for kind in KINDS:
        if not database.columns(table_of(kind)):
            continue
        added = _add_up(database, kind)
        if added is None:
            return None
        found = _sums(database, kind)
        others = _rows(database, kind, added) - added
        whole = all(isinstance(total, int) for _, total in found.values())
        lost = _untimed(database, kind) if others else (0, 0)
        if not whole or others != sum(lost):
            return None
        missing += lost[0]
        beyond += lost[1]
        sums.update(found)
    if not _in_order(database, all_timed=not (missing or beyond)):
        return None
    owners, notes = _whole_graphs(database)
    owners |= {(pid, device) for pid, device, _, _ in sums}
    notes = [*skipped(missing, beyond), *notes]
    return Counted(sums, frozenset(owners), _recorded(database), tuple(notes))


def _add_up(database: Database, kind: str) -> int | None:
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
    named = [column for column in _NAME_COLUMNS[kind] if column in columns]
    if _NAME_COLUMNS[kind] and not named:
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


def _sums(database: Database, kind: str) -> dict[Key, tuple[int, int]]:
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
    """How many rows lack a time, and how many have one that cannot be."""
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
    """Whether kernels outside of graphs come, stream by stream, in order of start and of end.

    Then none contains a later one. Of two kernels of which one contains a later one, the
    ends fall; so they fall somewhere between neighbours in order of start, too.
    """
    table = table_of("kernel")
    columns = database.columns(table)
    if not columns:
        return True
    # Should two streams get one key, that can only look like disorder, never hide it.
    parts = ['"globalPid"'] if "globalPid" in columns else []
    parts += ['("deviceId" << 16)'] if "deviceId" in columns else []
    parts += ['COALESCE("streamId", -1)'] if "streamId" in columns else []
    where = ['IFNULL("graphNodeId", 0) = 0'] if "graphNodeId" in columns else []
    where += [] if all_timed else [USABLE]
    run = database.connection.execute
    run("DROP TABLE IF EXISTS temp.streams")
    run('CREATE TEMP TABLE streams (key INTEGER PRIMARY KEY, "start" NOT NULL, "end")')
    in_order = 'excluded."start" >= "start" AND excluded."end" >= "end"'
    try:  # a row out of order would store a null, which ends the statement
        run(
            f'INSERT INTO streams SELECT {" + ".join(parts) or "0"}, "start", "end" '
            f'FROM "{table}" NOT INDEXED WHERE {" AND ".join(where) or "TRUE"} ORDER BY rowid '
            f'ON CONFLICT (key) DO UPDATE SET "start" = IIF({in_order}, excluded."start", NULL), '
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
    found = database.connection.execute(
        f'SELECT DISTINCT "globalPid" >> {PID_SHIFT} & {PID_MASK} FROM "PROCESSES" '
        'WHERE "globalPid" IS NOT NULL'
    )
    return frozenset(int(pid) for (pid,) in found)
