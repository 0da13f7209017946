"""How cost grows with ranks: `python -m benchmarks.scale [--ranks 64 256 1024] [--wide]`.

Plants windows of so many ranks, on nodes of eight: replicas of eight ranks (`--wide`: one group of
all ranks, as with wide expert parallelism) that run 64 decode steps, one of them 1.25 times slower
in its experts from the first step on. Each node's traces are reduced, as the node would do it;
then `check` and `report` read the reduced files. It prints seconds of CPU, peak memory and
bytes of each part, what they are for one rank in proportion to the fewest ranks, and of the page
how long headless Chromium takes to open it and whether the slow rank is on its first screen.
"""

from __future__ import annotations

import argparse
import gzip
import io
import json
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from pytest_sglprof._cli.main import main as sglprof
from pytest_sglprof.standin.model import Batch, Launch, Model, Place, Sizes, Slow, places
from pytest_sglprof.standin.traces import Recorded, Recording, write
from tests.support.browser import Browser, chromium

A_NODE = 8  # ranks
STEPS = 64
STEP_NS = 8_000_000
BEGIN_NS = 1_790_857_026_000_000_000
SLOW_BY = 1.25
BATCH = Batch("DECODE", 32, 32, 32_000)
SCREEN = (1400, 900)  # px
IN_SIGHT = """
const [label, width, height] = arguments;
const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
while (walker.nextNode()) {
  const range = document.createRange();
  range.selectNodeContents(walker.currentNode);
  const at = range.getBoundingClientRect();
  const seen = at.width > 0 && at.top >= 0 && at.bottom <= height && at.right <= width;
  if (seen && new RegExp(label + "(?![0-9])").test(walker.currentNode.data)) return true;
}
return false;
"""


@dataclass(frozen=True)
class Cost:
    """cpu_s, wall_s: with children. mb: peak resident memory. size: bytes that it wrote."""

    cpu_s: float
    wall_s: float
    mb: float
    size: int


class Planted(Model):
    """A model whose steps are computed once for all ranks of a replica."""

    _known: ClassVar[dict[tuple[int, int], dict[int, list[Launch]]]] = {}

    def step(
        self, step: int, peers: Sequence[Place], batches: Sequence[Batch], *, jitter: bool = True
    ) -> dict[int, list[Launch]]:
        key = (peers[0].index, step)
        if key not in self._known:
            if step == 1:  # of the next replica
                self._known.clear()
            self._known[key] = super().step(step, peers, batches, jitter=jitter)
        return self._known[key]


def slow_rank(sizes: Sizes) -> Place:
    """Not the first, nor one of the first node's."""
    every = places(sizes)
    return every[len(every) * 5 // 8 + 3]


def plant(folder: Path, sizes: Sizes) -> None:
    """A folder of each node, `node17`, with the trace of each of its ranks."""
    every = places(sizes)
    slow = slow_rank(sizes)
    model = Planted(STEP_NS, 1, slow=(Slow(slow.label, "moe", SLOW_BY),))
    steps = tuple(
        Recorded(number, BEGIN_NS + number * STEP_NS, STEP_NS * 9 // 10, (BATCH,))
        for number in range(1, STEPS + 1)
    )
    for place in every:
        node = folder / f"node{place.index // A_NODE}"
        node.mkdir(exist_ok=True)
        recording = Recording(
            place,
            model,
            device="cuda",
            activities=frozenset({"CPU", "GPU"}),
            start_ns=BEGIN_NS,
            end_ns=BEGIN_NS + (STEPS + 2) * STEP_NS,
            steps=steps,
            with_stack=False,
            record_shapes=False,
            detailed=True,
            pid=4001 + place.index % A_NODE,
        )
        name = f"1790857026-{place.file_part}.trace.json"
        text = io.StringIO()
        write(recording, text, name)
        trace = text.getvalue().replace(socket.gethostname(), node.name, 1)
        (node / f"{name}.gz").write_bytes(gzip.compress(trace.encode(), 3, mtime=0))


def reduce_nodes(traces: str, nodes: str) -> None:
    """What each node does, one after the other in this process: it starts once, not each time."""
    for node in sorted(Path(traces).iterdir()):
        with redirect_stdout(io.StringIO()):
            if sglprof(["reduce", str(node), "-o", f"{nodes}/{node.name}.parquet"]):
                raise SystemExit(f"{node} was not reduced")


# Figures of the process that it ends with: `getrusage` counts the memory of its parent as well.
RUN = """
import resource, sys, time
began = time.monotonic()
if sys.argv[1] == "nodes":
    from benchmarks.scale import reduce_nodes
    status = reduce_nodes(*sys.argv[2:])
else:
    from pytest_sglprof._cli.main import main
    status = main(sys.argv[1:])
from benchmarks.child import peak_mb
spent = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
cpu = sum(each.ru_utime + each.ru_stime for each in spent)
print()
print(int(status or 0), cpu, time.monotonic() - began, peak_mb("self"))
"""


def cost_of(*words: str | Path, output: Path) -> Cost:
    """Of a command in a process of its own, whose status may be that of a verdict."""
    command = [sys.executable, "-c", RUN, *map(str, words)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    status, cpu, wall, mb = done.stdout.splitlines()[-1].split()
    if int(status) not in (0, 1):
        raise SystemExit(f"{words[0]} ended with status {status}")
    files = output.iterdir() if output.is_dir() else [output]
    return Cost(float(cpu), float(wall), float(mb), sum(each.stat().st_size for each in files))


def measure(folder: Path, sizes: Sizes) -> Iterator[tuple[str, Cost]]:
    """The cost of each part for one window, in `folder`."""
    traces, nodes = folder / "traces", folder / "nodes"
    for each in (traces, nodes):
        each.mkdir(parents=True)
    plant(traces, sizes)
    yield "reduce", cost_of("nodes", traces, nodes, output=nodes)
    answer, page = folder / "check.json", folder / "report.html"
    limit = ("--limit", "1.05")
    json_to = ("--format", "json", "-o", answer)
    yield "check", cost_of("check", nodes, *limit, *json_to, output=answer)
    yield "report", cost_of("report", nodes, *limit, "-o", page, output=page)
    refuse_wrong(json.loads(answer.read_text()), slow_rank(sizes).label)


def refuse_wrong(document: Mapping[str, Any], label: str) -> None:
    slowest = document["checks"][0]["slowest"]
    if document["verdict"] != "fail" or slowest != label:
        raise SystemExit(f"{label} is slow, but: {document['verdict']}: {document['reason']}")


def opened(browser: Browser, page: Path, label: str) -> tuple[float, bool]:
    """Seconds until the page is ready, the shortest of three; and whether the rank is in sight."""
    seconds = []
    with browser.screen(*SCREEN):
        for _ in range(3):
            began = time.monotonic()
            browser.open(page)
            seconds.append(time.monotonic() - began)
        return min(seconds), bool(browser.js(IN_SIGHT, label, *SCREEN))


def words(cost: Cost, first: Cost, times: float) -> str:
    """The cost, and what it is for one rank in proportion to the first. times: as many ranks."""
    return (
        f"{cost.cpu_s:7.1f} s CPU (x {cost.cpu_s / first.cpu_s / times:.2f} a rank) "
        f"{cost.wall_s:7.1f} s  {cost.mb:6.0f} MB (x {cost.mb / first.mb / times:.2f} a rank)  "
        f"writes {cost.size / 1e6:7.2f} MB"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, nargs="+", default=[64, 256, 1024])
    parser.add_argument("--wide", action="store_true", help="one group of all ranks")
    parser.add_argument("--keep", type=Path, help="an empty folder for traces and pages")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary, chromium() as browser:
        least: dict[str, tuple[int, Cost]] = {}
        for ranks in args.ranks:
            folder = (args.keep or Path(temporary)) / str(ranks)
            sizes = Sizes(tp=ranks) if args.wide else Sizes(tp=A_NODE, dp=ranks // A_NODE)
            for part, cost in measure(folder, sizes):
                fewest, first = least.setdefault(part, (ranks, cost))
                print(
                    f"{ranks:5} ranks  {part:6}  {words(cost, first, ranks / fewest)}", flush=True
                )
            label = slow_rank(sizes).label
            seconds, in_sight = opened(browser, folder / "report.html", label)
            where = "is" if in_sight else "is NOT"
            print(f"{ranks:5} ranks  opens in {seconds:.2f} s; {label} {where} on the first screen")


if __name__ == "__main__":
    main()
