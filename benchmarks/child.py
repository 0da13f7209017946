"""Measures a command as a process of its own: CPU, wall clock, peak memory."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

Sums = dict[tuple[str, str], tuple[int, int]]
"""(rank or device, full kernel name) -> (count, total ns)."""


@dataclass(frozen=True)
class Figures:
    """cpu_s: of the process and its children; from its start, imports included. parent_mb,
    child_mb: peak resident memory of the process, and of the largest of its children.
    right: whether every count and sum was equal to the truth; None where nothing was summed.
    note: what was wrong.
    """

    cpu_s: float
    wall_s: float
    parent_mb: float
    child_mb: float
    right: bool | None
    note: str = ""


def report(way: Callable[[Path], Sums], folder: Path, truth: Callable[[Path], Sums]) -> None:
    """Runs `way` in this process and prints its figures, for `measured` to read."""
    begin = time.monotonic()
    sums = way(folder)
    wall = time.monotonic() - begin
    own, others = (
        resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    )
    expected = truth(folder)
    right = sums == expected if sums else None
    figures = {
        "cpu_s": own.ru_utime + own.ru_stime + others.ru_utime + others.ru_stime,
        "wall_s": wall,
        "parent_mb": own.ru_maxrss / 1024,
        "child_mb": others.ru_maxrss / 1024,
        "right": right,
        "note": "" if right in (True, None) else difference(sums, expected),
    }
    sys.stdout.write(json.dumps(figures) + "\n")


def difference(sums: Sums, truth: Sums) -> str:
    """How far the sums are from the truth, in words."""
    total, whole = sum(ns for _, ns in sums.values()), sum(ns for _, ns in truth.values())
    worst = min((sums.get(key, (0, 0))[1] / ns - 1 for key, (_, ns) in truth.items()), default=0)
    return f"total {100 * (total / whole - 1):+.1f} %, worst name {100 * worst:+.0f} %"


def measured(command: Sequence[str], root: Path) -> Figures:
    """The figures that a command prints in its last line. Raises RuntimeError when it fails."""
    environment = {**os.environ, "PYTHONPATH": str(root)}
    done = subprocess.run(command, capture_output=True, text=True, cwd=root, env=environment)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    return Figures(**json.loads(done.stdout.splitlines()[-1]))
