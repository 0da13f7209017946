"""An export of nsys as SQLite: opening it, its columns, which rank owns what. No numpy here."""

from __future__ import annotations

import contextlib
import re
import sqlite3
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from pytest_sglprof._errors import NotATrace, TraceError
from pytest_sglprof._trace.foreign import HEAD, kind_of
from pytest_sglprof._trace.torch.events import LARGEST_NS, LONGEST_NS

KNOWN_TABLES = frozenset(
    {
        "META_DATA_EXPORT",
        "EXPORT_META_DATA",  # its name up to schema 2
        "StringIds",
        "PROCESSES",
        "NVTX_EVENTS",
        "CUPTI_ACTIVITY_KIND_KERNEL",
        "CUPTI_ACTIVITY_KIND_RUNTIME",
    }
)


KINDS = ("kernel", "memcpy", "memset")


PREFIX = "CUPTI_ACTIVITY_KIND_"


ACTIVITIES = tuple(PREFIX + kind.upper() for kind in (*KINDS, "graph_trace"))


MISSING = -(2**63)
LONGEST_TEXT = 65_536  # characters of a name that are read


PID_SHIFT, PID_MASK = 24, 0xFFFFFF


# ENUM_CUDA_MEMCPY_OPER; older exports do not bring it along.
_COPIES = (
    "Unknown",
    "Host-to-Device",
    "Device-to-Host",
    "Host-to-Array",
    "Array-to-Host",
    "Array-to-Array",
    "Array-to-Device",
    "Device-to-Array",
    "Device-to-Device",
    "Host-to-Host",
    "Peer-to-Peer",
    "Unified Host-to-Device",
    "Unified Device-to-Host",
    "Unified Device-to-Device",
)


USABLE = (
    f'+"start" > {-LARGEST_NS} AND +"end" >= +"start" AND +"end" < {LARGEST_NS} '
    f'AND "end" - "start" < {LONGEST_NS}'
)


def whole_number(column: str) -> str:
    """Whether a row has a whole number in this column, in SQL."""
    return (
        f"(TYPEOF(\"{column}\") = 'integer' OR "
        f'(TYPEOF("{column}") = \'real\' AND CAST("{column}" AS INTEGER) = "{column}"))'
    )


def table_of(kind: str) -> str:
    """The table of one of `KINDS`."""
    return PREFIX + kind.upper()


def activity_name(kind: str, key: int, texts: dict[int, str]) -> str:
    """The full name of an activity. key: the id of a kernel's name, or a copy's kind."""
    if kind == "kernel":
        return texts.get(key, "") or "unnamed kernel"
    if kind == "memset":
        return "[CUDA memset]"
    return f"[CUDA memcpy {_COPIES[key] if 0 <= key < len(_COPIES) else _COPIES[0]}]"


def skipped(missing: int, beyond: int) -> list[str]:
    """Notes on rows that are left out: without a time, and with one that cannot be."""
    notes = []
    if missing:
        notes.append(f"skipped {missing} GPU activities with a missing or negative duration")
    if beyond:
        days = LONGEST_NS // (86_400 * 10**9)
        notes.append(
            f"skipped {beyond} GPU activities that last {days} days or lie outside of time"
        )
    return notes


def whole_graphs(count: int, total_ns: int) -> str:
    """The note on what `--cuda-graph-trace=graph` leaves instead of kernels."""
    return (
        f"{count} launches of CUDA graphs ({total_ns / 1e6:.3f} ms) were recorded as a whole, "
        "their kernels are missing: nsys needs --cuda-graph-trace=node"
    )


_IDS = 500  # in one statement; old SQLite allows 999 variables


@contextlib.contextmanager
def open_database(path: Path) -> Iterator[Database]:
    """The export at `path`, whose file is only ever read.

    Raises `NotATrace` when it is no export, `TraceError` when it cannot be read; also for
    errors that show only while the body reads.
    """
    uri = f"{path.absolute().as_uri()}?mode=ro&immutable=1"
    try:
        with contextlib.closing(sqlite3.connect(uri, uri=True)) as connection:
            connection.text_factory = _text
            connection.isolation_level = None
            database = Database(connection)
            refuse_unknown_schema(path, database.names)
            if not KNOWN_TABLES & database.names:
                raise _not_an_export(path, _whose(database.names))
            if posing := sorted(database.views & {*KNOWN_TABLES, *ACTIVITIES}):
                raise TraceError(
                    f"{path}: {posing[0]} is a view instead of a table",
                    expected="an export as nsys writes it",
                    hint="export the .nsys-rep again",
                )
            for table in ACTIVITIES:
                refuse_without_times(path, table, database.columns(table))
            yield database
    except (sqlite3.Error, UnicodeError) as error:  # the latter: in SQLite's own message
        if "not a database" in str(error):
            raise _no_database(path) from error
        raise TraceError(
            f"{path} cannot be read: it is damaged or cut off, or it cannot be opened",
            expected="a complete SQLite export of an nsys report",
            hint="the file may be cut off: export the .nsys-rep again",
        ) from error


# `CUPTI_ACTIVITY_KIND_KERNEL_V3`: a schema in which columns may mean something else.
_VERSIONED = re.compile(PREFIX + r"(?:CONCURRENT_)?(?:KERNEL|MEMCPY|MEMSET)_?V?\d+")


def refuse_unknown_schema(path: Path, names: Iterable[str]) -> None:
    """Raises `TraceError` where activities stand in tables that we do not know."""
    unknown = sorted(name for name in names if _VERSIONED.fullmatch(name))
    if unknown:
        raise TraceError(
            f"{path} has a schema that sglprof does not know: its activities are in the table "
            f"{unknown[0]}",
            expected=f"{table_of('kernel')}, as nsys 2022 to 2026 write it",
            hint="export the .nsys-rep with another version of nsys (--nsys), and please report "
            "this version",
        )


def refuse_without_times(path: Path, table: str, columns: Set[str]) -> None:
    """Raises `TraceError` for a table of activities without times. columns: none if it is absent.

    Each of its rows would be left out, and the sums of the others would pass for those of all.
    """
    missing = sorted({"start", "end"} - columns) if columns else []
    if missing:
        raise TraceError(
            f"{path}: its table {table} has no column {' and no column '.join(missing)}",
            expected="an export as nsys writes it, with the start and the end of each activity",
            hint="export the .nsys-rep again",
        )


def _whose(names: Iterable[str]) -> str:
    """Why a database is no export of nsys."""
    if any(name.startswith("rocpd_") for name in names):
        return "it is a database of rocprofv3 (rocpd)"
    return "it has none of an nsys export's tables"


class Database:
    """An open export. names: its tables; `temp` ones may be made, in memory. views: not read."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        connection.execute("PRAGMA temp_store = MEMORY")
        # Of temporary tables, in which a sum is then found within one page.
        connection.execute("PRAGMA page_size = 16384")
        self.connection = connection
        rows = connection.execute("SELECT name, type FROM sqlite_master").fetchall()
        self.names = frozenset(str(name) for name, kind in rows if kind == "table")
        # A view may take for ever, and is not what nsys recorded.
        self.views = frozenset(str(name) for name, kind in rows if kind == "view")

    def columns(self, table: str) -> frozenset[str]:
        """The columns of a table; none where there is no such table."""
        if table not in self.names:
            return frozenset()
        rows = self.connection.execute(f'PRAGMA table_info("{table}")')
        return frozenset(str(row[1]) for row in rows)

    def strings(self, ids: Iterable[int]) -> dict[int, str]:
        """The texts of `StringIds` under these ids; unknown ids are left out."""
        texts: dict[int, str] = {}
        if not {"id", "value"} <= self.columns("StringIds"):
            return texts
        left = iter(ids)
        while some := list(islice(left, _IDS)):
            marks = ", ".join("?" * len(some))
            value = f'SUBSTR("value", 1, {LONGEST_TEXT})'
            words = f'SELECT "id", {value} FROM "StringIds" WHERE "id" IN ({marks})'
            for number, value in self.connection.execute(words, some):
                texts[int(number)] = "" if value is None else str(value)
        return texts


def _text(raw: bytes) -> str:
    return raw.decode("utf-8", errors="replace")


def _not_an_export(
    path: Path, why: str, hint: str = "give the .nsys-rep itself, or export it"
) -> NotATrace:
    return NotATrace(
        f"{path} is not an export of an nsys report: {why}",
        expected="what `nsys export --type=sqlite` writes",
        hint=hint,
    )


def _no_database(path: Path) -> NotATrace:
    why = "it is not an SQLite database"
    with path.open("rb") as stream:
        head = stream.read(HEAD)
    kind = None if head.startswith(b"SQLite") else kind_of(head)  # that one is damaged
    return (
        _not_an_export(path, f"{why}, it {kind[0]}", kind[1]) if kind else _not_an_export(path, why)
    )


Key = tuple[int, int, str, str]


@dataclass(frozen=True)
class Counted:
    """sums: count and total ns of each key. owners: every (process id, device) with an activity.

    owners include those of whole graphs, which have no rows. recorded: process ids that
    stand in the report. notes: what was left out.
    """

    sums: Mapping[Key, tuple[int, int]]
    owners: frozenset[tuple[int, int]]
    recorded: frozenset[int]
    notes: tuple[str, ...] = ()


NO_DEVICE = -1


@dataclass(frozen=True, order=True)
class Owner:
    """One process on one device (`NO_DEVICE` for what ran on the CPU)."""

    pid: int
    device: int = NO_DEVICE


@dataclass(frozen=True)
class ReportName:
    """What is known of a report as a whole.

    rank: the label of its process, if it is the only one and nothing else tells it. node: what
    stands before the labels of those whose rank nothing tells. is_given: somebody said so.
    """

    rank: str = ""
    node: str = ""
    is_given: bool = False


NO_NAME = ReportName()


def label_owners(
    owners: Sequence[Owner],
    *,
    pid_ranks: Mapping[int, str],
    gpu_ranks: Mapping[int, str],
    name: ReportName,
    recorded: Set[int],
) -> tuple[dict[Owner, str], list[str]]:
    """A label for each owner, and notes on how they were found.

    By process id, else by device where exactly one unknown process uses it and its rank
    is not one of a recorded process, else by the report's name where it has one owner, else
    `GPU<device>` (`GPU<device> pid <pid>` where processes share it) or `pid <pid>`, after the
    report's node. recorded: pids that stand in the report.
    """
    labels = {owner: pid_ranks[owner.pid] for owner in owners if owner.pid in pid_ranks}
    notes = ["ranks of nsys activities: by process id"] if labels else []
    unknown = [owner for owner in owners if owner not in labels]
    if pid_ranks and unknown and not labels:
        notes.append("none of the known process ids has an activity in the nsys report")
    taken = {label for pid, label in pid_ranks.items() if pid in recorded}
    by_name = {owner: name.rank for owner in unknown if name.rank and len(owners) == 1}
    by_device = {
        owner: label
        for owner in unknown
        if not (by_name and name.is_given)
        if (label := gpu_ranks.get(owner.device, "")) and label not in taken
        if _alone(owner, unknown)
    }
    if by_device:
        pairs = ", ".join(f"GPU{owner.device} is {by_device[owner]}" for owner in by_device)
        notes.append(f"ranks of nsys activities: by device, no process id was known: {pairs}")
    elif by_name and not name.is_given:
        notes.append(f"ranks of nsys activities: by the report's name: {name.rank}")
    labels = by_name | labels | by_device
    for owner in unknown:
        if owner not in labels:
            labels[owner], note = _unknown_rank(owner, _alone(owner, unknown), name.node)
            notes.append(note)
    return labels, notes


def not_recorded(pid_ranks: Mapping[int, str], seen: Set[int]) -> list[str]:
    """Notes on ranks whose process is not among those `seen` in the report."""
    return [
        f"process {pid} ({label}) is not in the nsys report"
        for pid, label in pid_ranks.items()
        if pid not in seen
    ]


def _alone(owner: Owner, unknown: Sequence[Owner]) -> bool:
    return sum(other.device == owner.device for other in unknown) == 1


def _unknown_rank(owner: Owner, alone: bool, node: str) -> tuple[str, str]:
    before = f"{node} " if node else ""
    if owner.device == NO_DEVICE:
        label = f"{before}pid {owner.pid}"
        return label, f"rank unknown: process {owner.pid} is named by its id"
    if alone:
        label = f"{before}GPU{owner.device}"
        return label, f"rank unknown: {label} is device {owner.device} of process {owner.pid}"
    label = f"{before}GPU{owner.device} pid {owner.pid}"
    return label, f"rank unknown: {label} is one of several processes on that device number"
