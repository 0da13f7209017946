"""Small traces for the scan, and their rows as plain values."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

from pytest_sglprof._trace.read import read_window

BASE = 1_790_857_026_000_000_000
NAME = "1-TP-0.trace.json"
Row = tuple[str, str, int, int]


def complete(cat: str, name: str, ts: Any, dur: Any, **args: Any) -> dict[str, Any]:
    event = {"ph": "X", "cat": cat, "name": name, "pid": 0, "tid": 7, "ts": ts, "dur": dur}
    return event | {"args": {"stream": 7, "correlation": 5, **args}}


def events(count: int = 40) -> list[dict[str, Any]]:
    """Kernels, copies and sets between host events, names with braces and quotes included."""
    found: list[dict[str, Any]] = [
        {"ph": "M", "name": "process_name", "ts": 1.5, "pid": 0, "tid": 0, "args": {"name": "x"}}
    ]
    for number in range(count):
        ts = 4_458_676_983_543.183 + number * 1000
        name = ('void f<4, g::{lambda()#1}>(int, "q")', "nvjet_tst", "Memcpy DtoD")[number % 3]
        cat = ("kernel", "kernel", "gpu_memcpy", "gpu_memset")[number % 4]
        found += [
            complete("cpu_op", "aten::mm", ts - 500, 90.001),
            complete("cuda_runtime", "cudaLaunchKernel", ts - 400, 3.25, kernel="f"),
            {"ph": "s", "id": number, "pid": 3, "tid": 3, "ts": ts, "cat": "ac2g", "name": "ac2g"},
            complete(cat, name, round(ts, 3), round(1.001 + number, 3), grid=[1, 1, 1]),
        ]
    return found


def truth(found: list[dict[str, Any]], base: int = BASE) -> list[Row]:
    kinds = {"kernel": "kernel", "gpu_memcpy": "memcpy", "gpu_memset": "memset"}
    rows = []
    for event in json.loads(json.dumps(found), parse_float=Decimal):
        if kind := kinds.get(event.get("cat", "")):
            ns = (int(Decimal(event["ts"]) * 1000) + base, int(Decimal(event["dur"]) * 1000))
            rows.append((event["name"], kind, *ns))
    return sorted(rows)


def document(found: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "schemaVersion": 1,
        "deviceProperties": [{"id": 0}, {"id": 1}],
        "baseTimeNanoseconds": BASE,
        "traceEvents": found,
        "traceName": "x",
    }


def write(folder: Path, content: Any, name: str = NAME, level: int = 6) -> Path:
    text = json.dumps(content) if isinstance(content, (dict, list)) else content
    data = text.encode() if isinstance(text, str) else text
    path = folder / name
    path.write_bytes(gzip.compress(data, level, mtime=0) if name.endswith(".gz") else data)
    return path


def rows_of(path: Path, **options: Any) -> list[Row]:
    frame = read_window(path, **options).frame
    columns = (frame["full_name"], frame["kind"], frame["start_ns"], frame["dur_ns"])
    rows = zip(*(column.tolist() for column in columns), strict=True)
    return sorted((str(name), str(kind), int(start), int(dur)) for name, kind, start, dur in rows)


def one_key_a_line(found: list[dict[str, Any]]) -> str:
    lines = []
    for event in found:
        parts = [f"    {json.dumps(key)}: {json.dumps(value)}" for key, value in event.items()]
        lines.append("  {\n" + ",\n    \n".join(parts) + "\n  }")
    head = f'{{\n  "baseTimeNanoseconds": {BASE},\n  "traceEvents": [\n'
    return head + ",\n".join(lines) + '\n  ],\n  "traceName": "x"\n}\n'


def reordered(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [dict(reversed(event.items())) for event in found]


def footer_first(found: list[dict[str, Any]]) -> dict[str, Any]:
    doc = document(found)
    return {"traceEvents": doc.pop("traceEvents"), **doc}


LAYOUTS: dict[str, Callable[[list[dict[str, Any]]], str]] = {
    "one line": lambda found: json.dumps(document(found)),
    "compact": lambda found: json.dumps(document(found), separators=(",", ":")),
    "indented": lambda found: json.dumps(document(found), indent=1),
    "deeply indented": lambda found: json.dumps(document(found), indent=8),
    "tabs": lambda found: json.dumps(document(found), indent="\t"),
    "sorted keys": lambda found: json.dumps(document(found), sort_keys=True),
    "sorted, indented": lambda found: json.dumps(document(found), sort_keys=True, indent=2),
    "one key a line": one_key_a_line,
    "CRLF": lambda found: json.dumps(document(found), indent=2).replace("\n", "\r\n"),
    "BOM": lambda found: "\ufeff" + json.dumps(document(found)),
    "keys reversed": lambda found: json.dumps(document(reordered(found))),
    "metadata after": lambda found: json.dumps(footer_first(found)),
    "blank before colon": lambda found: json.dumps(document(found), separators=(" , ", " : ")),
    "escaped": lambda found: json.dumps(document(found)).replace("void", "\\u0076oid"),
}
