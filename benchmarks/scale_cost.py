"""What 1,024 ranks x 1 GB cost on N workers: `python -m benchmarks.scale_cost`.

Generates traces of `--megabytes` of JSON, and reduces each several times in two processes that have
started before. The plan is arithmetic for workers with a core each: files x GB x mean seconds of
CPU / workers. A simulation draws each file's seconds from the measured ones, hands files to
whichever worker is free, and lets workers die and stall as often as is assumed below. Of the
measured tasks themselves it has to say, without that, how long they took on their two processes.
"""

from __future__ import annotations

import argparse
import heapq
import random
import statistics
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

from benchmarks.generate import torch_window
from pytest_sglprof._trace.paths import ReadOptions
from pytest_sglprof._trace.reduced import Beside
from pytest_sglprof._trace.tasks import PATIENCE, PATIENCE_S, reduced_bytes

FILES, GB = 1024, 1.0
STARTS_S = 2.0  # until a worker has imported what it needs, with its first file
DIES = 0.001  # share of the tasks with which their worker is lost; it does not come back
STALLS = 0.001  # share of the tasks that take 100 times as long
ROUNDS = 200


class Task(NamedTuple):
    """What the task of one file took. size: bytes of the reduced file."""

    wall_s: float
    cpu_s: float
    size: int


def task(file: Path, files: Sequence[Path]) -> Task:
    began, before = time.monotonic(), time.process_time()
    content = reduced_bytes([file], ReadOptions(among=files, processes=1), Beside())
    return Task(time.monotonic() - began, time.process_time() - before, len(content))


def measured(files: Sequence[Path], repeats: int) -> tuple[list[Task], float]:
    """All tasks, and their seconds together, by two processes."""
    with ProcessPoolExecutor(2, get_context("spawn")) as pool:
        list(pool.map(task, files[:2], [files] * 2))
        began = time.monotonic()
        tasks = list(pool.map(task, [*files] * repeats, [files] * (len(files) * repeats)))
        return tasks, time.monotonic() - began


def simulated(
    seconds: Sequence[float], files: int, workers: int, random_: random.Random, *, faults: bool
) -> float:
    """Seconds until all files are reduced. seconds: those of one file, to draw from."""
    free = [STARTS_S if faults else 0.0] * workers
    heapq.heapify(free)
    todo = files
    ended = 0.0
    longest = max(seconds)
    while todo:
        begins = heapq.heappop(free)
        lasts = random_.choice(seconds)
        fate = random_.random() if faults else 1.0
        if fate < DIES and len(free) > workers // 2:
            continue  # its file is still to do, and this worker never takes another one
        todo -= 1
        if fate > 1 - STALLS and faults:  # another worker gets the file once nothing else ends
            heapq.heappush(free, begins + 100 * lasts)
            ended = max(ended, begins + max(PATIENCE_S, PATIENCE * longest) + lasts)
            continue
        heapq.heappush(free, begins + lasts)
        ended = max(ended, begins + lasts)
    return ended


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--megabytes", type=int, default=207)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--workers", type=int, nargs="+", default=[8, 16, 64, 128, 256, 1024])
    args = parser.parse_args()
    random_ = random.Random(1)
    with tempfile.TemporaryDirectory() as folder:
        window = torch_window(Path(folder), ranks=args.ranks, megabytes=args.megabytes)
        files = sorted(window.glob("*.gz"))
        tasks, together = measured(files, args.repeats)
        packed = files[0].stat().st_size
    gb, size = args.megabytes / 1e3, tasks[0].size
    seconds = [each.wall_s for each in tasks]
    per_gb = [each.cpu_s / gb for each in tasks]
    mean, wall = statistics.mean(per_gb), statistics.mean(seconds) / gb
    print(
        f"{mean:.2f} s of CPU per GB of JSON ({min(per_gb):.2f} to {max(per_gb):.2f}, "
        f"{len(per_gb)} tasks), {wall:.2f} s on this machine as busy as it was"
    )
    print(f"{args.megabytes} MB of JSON, {packed / 1e6:.1f} MB packed: {size / 1e6:.2f} MB reduced")
    rounds = [simulated(seconds, len(seconds), 2, random_, faults=False) for _ in range(ROUNDS)]
    print(
        f"these tasks on 2 processes: {together:.2f} s measured, "
        f"{statistics.median(rounds):.2f} s simulated"
    )
    for workers in args.workers:
        plan = FILES * GB * mean / workers
        one = [GB * each for each in per_gb]
        every = sorted(simulated(one, FILES, workers, random_, faults=True) for _ in range(ROUNDS))
        print(
            f"{workers:5} workers: plan {plan:7.1f} s, simulated {statistics.median(every):7.1f} s "
            f"(one in 20 above {every[int(0.95 * ROUNDS)]:.1f} s)"
        )


if __name__ == "__main__":
    main()
