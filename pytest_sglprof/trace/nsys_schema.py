"""What the tables and columns of an nsys export are called, and what their numbers mean."""

from __future__ import annotations

from pytest_sglprof.trace.times import LARGEST_NS, LONGEST_NS

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
"""At least one of these stands in every export; nsys leaves out tables without rows."""

KINDS = ("kernel", "memcpy", "memset")
PREFIX = "CUPTI_ACTIVITY_KIND_"
MISSING = -(2**63)
"""Stands for NULL and for columns that this version of nsys does not write."""
PID_SHIFT, PID_MASK = 24, 0xFFFFFF
"""Where the operating system's process id stands in a globalPid or globalTid."""

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
"""The rows whose times are used, in SQL: the same as `nsys_tables.usable`.

A text is more than any number, so that it fails one of the comparisons; the plus keeps SQLite
from comparing as the column's type would want it. Fractions pass.
"""


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
