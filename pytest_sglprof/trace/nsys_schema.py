"""What the tables and columns of an nsys export are called, and what their numbers mean."""

from __future__ import annotations

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


def skipped(count: int) -> str:
    """The note on rows that have no time."""
    return f"skipped {count} GPU activities with a missing or negative duration"


def whole_graphs(count: int, total_ns: int) -> str:
    """The note on what `--cuda-graph-trace=graph` leaves instead of kernels."""
    return (
        f"{count} launches of CUDA graphs ({total_ns / 1e6:.3f} ms) were recorded as a whole, "
        "their kernels are missing: nsys needs --cuda-graph-trace=node"
    )
