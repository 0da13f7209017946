"""Measures a command as a process of its own: CPU, wall clock, peak memory."""

from __future__ import annotations

import contextlib
import json
import os
import re
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")


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


def report(
    way: Callable[[Path], T],
    folder: Path,
    judged: Callable[[T, Path], tuple[bool | None, str]],
) -> None:
    """Runs `way` in this process and prints its figures, for `measured` to read.

    judged: whether the result is right, and a note.
    """
    begin = time.monotonic()
    with _watched() as peaks:
        sums = way(folder)
    wall = time.monotonic() - begin
    itself, children = (
        resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    )
    right, note = judged(sums, folder)
    figures = {
        "cpu_s": itself.ru_utime + itself.ru_stime + children.ru_utime + children.ru_stime,
        "wall_s": wall,
        "parent_mb": peak_mb("self"),
        "child_mb": max(peaks.values(), default=0.0),
        "right": right,
        "note": note,
    }
    sys.stdout.write(json.dumps(figures) + "\n")


@contextlib.contextmanager
def _watched() -> Iterator[dict[int, float]]:
    """Peak resident memory of each child process, MB, as the kernel counts it.

    Looked up while they live.
    """
    peaks: dict[int, float] = {}
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.1):
            for task in Path("/proc/self/task").iterdir():
                for pid in map(int, _text(task / "children").split()):
                    # The latest: before it begins its program, it shares this one's memory.
                    peaks[pid] = peak_mb(pid) or peaks.get(pid, 0.0)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield peaks
    finally:
        done.set()
        thread.join()


def peak_mb(process: int | str) -> float:
    """Peak memory of a process since its program began, in MB; 0 if it has exited.

    What `getrusage` reports includes the memory of the process from which it was forked.
    """
    peak = re.search(r"VmHWM:\s*(\d+)", _text(Path(f"/proc/{process}/status")))
    return int(peak[1]) / 1024 if peak is not None else 0.0


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:  # the process is gone
        return ""


def measured(command: Sequence[str], root: Path) -> Figures:
    """The figures that a command prints in its last line. Raises RuntimeError when it fails."""
    environment = {**os.environ, "PYTHONPATH": str(root)}
    done = subprocess.run(command, capture_output=True, text=True, cwd=root, env=environment)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    return Figures(**json.loads(done.stdout.splitlines()[-1]))
