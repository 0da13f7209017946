"""Sums of an nsys export in SQLite: the engine adds them up, no row becomes an object."""

from __future__ import annotations

from collections.abc import Iterator

from pytest_sglprof.trace.nsys_counted import Counted, Key
from pytest_sglprof.trace.nsys_database import Database
from pytest_sglprof.trace.nsys_schema import (
    KINDS,
    PID_MASK,
    PID_SHIFT,
    PREFIX,
    activity_name,
    skipped,
    table_of,
    whole_graphs,
)

# A sum's key is one integer, so that looking it up is one comparison a level: process id,
# device + 1 and id of the name, in 24, 8 and 31 bits. Rows that do not fit are not added.
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
    untimed = 0
    for kind in KINDS:
        if not database.columns(table_of(kind)):
            continue
        if not _add_up(database, kind):
            return None
        found = list(_sums(database, kind))
        if not all(isinstance(total, int) for _, (_, total) in found):
            return None
        left = _rows(database, kind) - sum(count for _, (count, _) in found)
        if left and left != _untimed(database, kind):
            return None
        untimed += left
        sums.update(found)
    if not _in_order(database):
        return None
    owners, notes = _whole_graphs(database)
    owners |= {(pid, device) for pid, device, _, _ in sums}
    if untimed:
        notes.insert(0, skipped(untimed))
    return Counted(sums, frozenset(owners), _recorded(database), tuple(notes))


def _add_up(database: Database, kind: str) -> bool:
    """Makes the table `temp.sums`; False where columns are missing that it needs."""
    table = table_of(kind)
    columns = database.columns(table)
    if not {"start", "end"} <= columns:
        return False
    where = ['"end" >= "start"']
    pid, device, name = "0", "0", "0"
    if "globalPid" in columns:
        pid = f'("globalPid" >> {PID_SHIFT} & {PID_MASK})'
        where.append('"globalPid" IS NOT NULL')
    if "deviceId" in columns:
        device = '("deviceId" + 1)'
        where.append(f'"deviceId" BETWEEN 0 AND {_DEVICE_MASK - 1}')
    named = [column for column in _NAME_COLUMNS[kind] if column in columns]
    if named:
        name = f'"{named[0]}"'
        where.append(f"{name} BETWEEN 0 AND {_NAME_MASK}")
    elif _NAME_COLUMNS[kind]:
        return False
    key = f"({pid} << {_DEVICE_BITS + _NAME_BITS}) | ({device} << {_NAME_BITS}) | {name}"
    run = database.connection.execute
    run("DROP TABLE IF EXISTS temp.sums")
    run("CREATE TEMP TABLE sums (key INTEGER PRIMARY KEY, count INTEGER, total INTEGER)")
    run(
        f'INSERT INTO sums SELECT {key}, 1, "end" - "start" FROM "{table}" NOT INDEXED '
        f"WHERE {' AND '.join(where)} "
        "ON CONFLICT (key) DO UPDATE SET count = count + 1, total = total + excluded.total"
    )
    return True


def _sums(database: Database, kind: str) -> Iterator[tuple[Key, tuple[int, int]]]:
    rows = database.connection.execute("SELECT key, count, total FROM temp.sums").fetchall()
    ids = {key & _NAME_MASK for key, _, _ in rows}
    texts = database.strings(ids) if kind == "kernel" else {}
    merged: dict[Key, tuple[int, int]] = {}  # two ids may stand for one text
    for key, count, total in rows:
        pid = key >> (_DEVICE_BITS + _NAME_BITS)
        device = (key >> _NAME_BITS & _DEVICE_MASK) - 1
        whole = (pid, device, kind, activity_name(kind, key & _NAME_MASK, texts))
        before = merged.get(whole, (0, 0))
        merged[whole] = (before[0] + count, before[1] + total)
    yield from merged.items()


def _rows(database: Database, kind: str) -> int:
    found = database.connection.execute(f'SELECT COUNT(*) FROM "{table_of(kind)}"')
    return int(found.fetchone()[0])


def _untimed(database: Database, kind: str) -> int:
    found = database.connection.execute(
        f'SELECT COUNT(*) FROM "{table_of(kind)}" '
        'WHERE "start" IS NULL OR "end" IS NULL OR "end" < "start"'
    )
    return int(found.fetchone()[0])


def _in_order(database: Database) -> bool:
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
    where = ['"end" >= "start"']
    if "graphNodeId" in columns:
        where.insert(0, '("graphNodeId" IS NULL OR "graphNodeId" = 0)')
    run = database.connection.execute
    run("DROP TABLE IF EXISTS temp.streams")
    run('CREATE TEMP TABLE streams (key INTEGER PRIMARY KEY, "start", "end", disorder INTEGER)')
    run(
        f'INSERT INTO streams SELECT {" + ".join(parts) or "0"}, "start", "end", 0 '
        f'FROM "{table}" NOT INDEXED WHERE {" AND ".join(where)} ORDER BY rowid '
        'ON CONFLICT (key) DO UPDATE SET "start" = excluded."start", "end" = excluded."end", '
        'disorder = disorder OR excluded."start" < "start" OR excluded."end" < "end"'
    )
    (disorder,) = run("SELECT MAX(disorder) FROM temp.streams").fetchone()
    return not disorder


def _whole_graphs(database: Database) -> tuple[set[tuple[int, int]], list[str]]:
    table = f"{PREFIX}GRAPH_TRACE"
    columns = database.columns(table)
    start, end, process, device = (
        f'"{name}"' if name in columns else "NULL"
        for name in ("start", "end", "globalPid", "deviceId")
    )
    if not columns:
        return set(), []
    rows = database.connection.execute(
        f"SELECT COALESCE({process}, 0) >> {PID_SHIFT} & {PID_MASK}, "
        f'MAX(COALESCE({device}, -1), -1), COUNT(*), SUM({end} - {start}) FROM "{table}" '
        "GROUP BY 1, 2"
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
