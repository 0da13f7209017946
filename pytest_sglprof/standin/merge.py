"""The server's own merge of the files of all ranks into one."""

from __future__ import annotations

import glob
import gzip
import json
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def merge_traces(
    folder: Path, profile_id: str, peers: Sequence[str] = (), patience: float = 10.0
) -> tuple[Path, int, int]:
    """Merges `{profile_id}*.trace.json.gz`: the merged file, its events, the files read.

    peers: file parts (`TP-1`) of the own replica, whose files are waited for, `patience`
    seconds at most; other replicas' files may lack, as in the real server.
    Process ids become `"[TP00-DP01] 83"`. ValueError when no file begins with the id, as
    when a prefix was asked for.
    """
    if any(folder.glob(f"{glob.escape(profile_id)}*")):
        deadline = time.monotonic() + patience
        expected = [folder / f"{profile_id}-{part}.trace.json.gz" for part in peers]
        while not all(map(_is_whole, expected)) and time.monotonic() < deadline:
            time.sleep(0.02)
    files = sorted(
        path for path in folder.glob("*.trace.json.gz") if path.name.startswith(profile_id)
    )
    if not files:
        raise ValueError(f"No trace files found for profile_id: {profile_id}")
    merged: dict[str, Any] = {"traceEvents": []}
    devices: list[Any] = []
    for path in files:
        trace = _read(path)
        label = _label(path.name)
        for event in trace.pop("traceEvents"):
            merged["traceEvents"].append({**event, "pid": f"{label} {event['pid']}"})
        devices += trace.pop("deviceProperties", [])
        for key, value in trace.items():
            merged.setdefault(key, value)
    if devices:
        merged["deviceProperties"] = devices
    target = folder / f"merged-{profile_id}.trace.json.gz"
    with gzip.open(target, "wt", encoding="utf-8") as file:
        json.dump(merged, file)
    return target, len(merged["traceEvents"]), len(files)


def _is_whole(path: Path) -> bool:
    try:
        with gzip.open(path, "rb") as file:
            while file.read(1 << 20):
                pass
    except (EOFError, OSError):
        return False
    return True


def _read(path: Path) -> dict[str, Any]:
    try:
        with gzip.open(path, "rt", encoding="utf-8") as file:
            trace: dict[str, Any] = json.load(file)
    except (EOFError, OSError, ValueError):  # still being written by another replica
        return {"traceEvents": []}
    return trace


def _label(name: str) -> str:
    parts = dict(re.findall(r"(TP|DP|PP|EP)-(\d+)", name))
    found = [f"{key}{int(parts[key]):02d}" for key in ("TP", "DP", "PP", "EP") if key in parts]
    return f"[{'-'.join(found)}]"
