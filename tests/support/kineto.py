"""Small traces in the layouts that Kineto had and has."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

from pytest_sglprof._trace.table import KernelTable

BASE = 1_790_857_026_000_000_000
Event = dict[str, Any]


def event(cat: str, name: str, ts: Any, dur: Any, pid: Any = 0, tid: Any = 7, **args: Any) -> Event:
    return {
        "ph": "X",
        "cat": cat,
        "name": name,
        "pid": pid,
        "tid": tid,
        "ts": ts,
        "dur": dur,
        "args": args,
    }


def kernel(name: str, ts: Any, dur: Any, stream: int = 7, *, pid: Any = 0, **args: Any) -> Event:
    return event("kernel", name, ts, dur, pid, stream, stream=stream, device=0, **args)


def document(events: list[Event], *, rank: int | None = None, size: int = 2, **more: Any) -> Event:
    found: Event = {"schemaVersion": 1, "baseTimeNanoseconds": BASE}
    if rank is not None:
        found["distributedInfo"] = {"backend": "nccl", "rank": rank, "world_size": size}
    return {**found, **more, "traceEvents": events, "traceName": "trace.json"}


def kineto_text(doc: Event) -> str:
    """As Kineto writes it: two lines an event, one an argument list."""
    head = {key: value for key, value in doc.items() if key not in ("traceEvents", "traceName")}
    lines = [json.dumps(head, indent=2)[:-2] + ',\n  "traceEvents": [']
    texts = []
    for entry in doc["traceEvents"]:
        first = {key: entry[key] for key in entry if key not in ("ts", "dur", "args")}
        times = {key: entry[key] for key in ("ts", "dur") if key in entry}
        args = json.dumps(entry.get("args", {}))[1:-1]
        parts = [json.dumps(first)[1:-1], json.dumps(times)[1:-1]]
        parts.append(f'"args": {{\n      {args}\n    }}')
        texts.append("  {\n    " + ",\n    ".join(filter(None, parts)) + "\n  }")
    lines.append(",\n".join(texts))
    lines.append('  ],\n  "traceName": "trace.json"\n}\n')
    return "\n".join(lines)


def write(
    folder: Path, content: Event | str | bytes, name: str = "1-TP-0.trace.json", **kw: Any
) -> Path:
    """Writes a document (in Kineto's layout), a text or bytes; packed when the name says so."""
    if isinstance(content, dict):
        content = kineto_text(content)
    data = content.encode(**kw) if isinstance(content, str) else content
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(data, mtime=0) if name.endswith(".gz") else data)
    return path


KERNELS = [kernel("gemm_kernel", 10.001, 5.002, correlation=1), kernel("silu_kernel", 20, 7.25)]
ROWS = [("gemm_kernel", 10_001, 5_002), ("silu_kernel", 20_000, 7_250)]


def rows(table: KernelTable, base: int = BASE) -> list[tuple[str, int, int]]:
    frame = table.frame
    return sorted(
        (str(name), int(start) - base, int(dur))
        for name, start, dur in zip(
            frame["full_name"], frame["start_ns"], frame["dur_ns"], strict=True
        )
    )
