"""``python -m ci.gpu_recordings NAME FOLDER``: makes one recording of a GPU, for `ci.gpu_check`.

Needs torch and a GPU. What is recorded is a decode loop in small: some kernels one by one, then the
replay of a graph that was captured before any profiler started, as in SGLang. The folder
gets the recorded files, and `facts.json`: what was planned and measured, or why nothing was.
"""

from __future__ import annotations

import contextlib
import gzip
import importlib.util
import json
import os
import re
import sqlite3
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from ci.gpu_answers import REPORTS, TRACE, NotRun
from pytest_sglprof import __version__
from pytest_sglprof._errors import NsysError, SglprofError
from pytest_sglprof._nsys import NsysSession, find_nsys, profile_prefix, started
from pytest_sglprof._nsys_export import export
from pytest_sglprof._server.nvml import Nvml, NvmlError

GRAPHS = {4: 20, 8: 30}  # batch size -> kernels of its captured graph
FORKED = 5  # of these on a second stream
EAGER = 6  # kernels of a step that are launched one by one, beside a matrix product
STEPS = 24  # of a window
BEHIND, SPIN_CYCLES = 6, 1 << 30  # steps, and about 0.6 s, that a GPU has still to do
SMALL, LARGE = 1 << 16, 1 << 24  # floats: a kernel of about 3 us, and one of about 40 us
TIMED = 1000  # steps of which the median is taken
WINDOWS = (1000, 200, 20)  # steps of the windows whose writing is timed; the last is kept
READY_S, OPEN_S, PAUSE_S, LIFE_S = 60.0, 1.0, 0.02, 100.0  # of the process under nsys


def _torch() -> Any:
    """The module torch. Raises `NotRun` without it or without a GPU."""
    try:
        import torch
    except ImportError as error:
        raise NotRun(f"torch cannot be imported: {error}") from error
    if not torch.cuda.is_available():
        raise NotRun("no CUDA device")
    return torch


class DecodeLoop:
    """Forward passes of known kernels on one GPU. elements: size of what each kernel changes."""

    def __init__(self, torch: Any, elements: int = SMALL) -> None:
        self.torch = torch
        self._side = torch.cuda.Stream()
        self._x, self._y, self._z = (torch.zeros(elements, device="cuda") for _ in range(3))
        self._factor = torch.zeros(512, 512, device="cuda", dtype=torch.bfloat16)
        self._product = torch.zeros_like(self._factor)
        self._launch_eagerly()
        for kernels in GRAPHS.values():
            self._launch_graph_kernels(kernels)  # loads them: this cannot be captured
        torch.cuda.synchronize()
        self._graphs = {batch: self._captured(kernels) for batch, kernels in GRAPHS.items()}
        torch.cuda.synchronize()

    def run(
        self, steps: int, *, ahead: int = 1, after_launch: Callable[[], None] | None = None
    ) -> None:
        """Runs steps; the CPU is so many of them ahead of the GPU, as in the overlap schedule."""
        ends = []
        for number in range(steps):
            self.step(number)
            if after_launch is not None:
                after_launch()
            ends.append(self.torch.cuda.Event())
            ends[-1].record()
            if number >= ahead:
                ends[number - ahead].synchronize()

    def step(self, number: int) -> None:
        """One forward pass, in the annotations of SGLang for torch traces and for nsys."""
        batch = [*GRAPHS][number % len(GRAPHS)]
        with self.torch.profiler.record_function(f"step[DECODE bs={batch}]"):
            self.torch.cuda.nvtx.range_push("scheduler.run_batch")
            self._launch_eagerly()
            self._graphs[batch].replay()
            self.torch.cuda.nvtx.range_pop()

    def median_us(self) -> float:
        """The median time of a step that is waited for, with its launches; us."""
        times = []
        for number in range(TIMED):
            begin = time.perf_counter()
            self.step(number)
            self.torch.cuda.synchronize()
            times.append(1e6 * (time.perf_counter() - begin))
        return statistics.median(times)

    def _launch_eagerly(self) -> None:
        for _ in range(EAGER):
            self.torch.mul(self._x, 1, out=self._x)
        self.torch.mm(self._factor, self._factor, out=self._product)

    def _launch_graph_kernels(self, kernels: int) -> None:
        """So many kernels on two streams, and a copy, which is not a kernel."""
        stream = self.torch.cuda.current_stream()
        self._side.wait_stream(stream)
        with self.torch.cuda.stream(self._side):
            for _ in range(FORKED):
                self.torch.add(self._y, 1, out=self._y)
        for _ in range(kernels - FORKED):
            self.torch.add(self._x, 1, out=self._x)
        stream.wait_stream(self._side)
        self._z.copy_(self._x)

    def _captured(self, kernels: int) -> Any:
        graph = self.torch.cuda.CUDAGraph()
        with self.torch.cuda.graph(graph):
            self._launch_graph_kernels(kernels)
        return graph


def _record(
    torch: Any, folder: Path, work: Callable[[], None], activities: Sequence[str] = ("CPU", "CUDA")
) -> dict[str, Any]:
    """Profiles some work as SGLang does; stop_s, export_s: time of the two calls, s."""
    chosen = [getattr(torch.profiler.ProfilerActivity, name) for name in activities]
    profiler = torch.profiler.profile(activities=chosen, with_stack=False, record_shapes=False)
    profiler.start()
    work()
    begin = time.perf_counter()
    profiler.stop()
    stopped = time.perf_counter()
    profiler.export_chrome_trace(str(folder / TRACE))
    exported = time.perf_counter()
    return {"stop_s": stopped - begin, "export_s": exported - stopped}


# The recordings of torch.


def machine(folder: Path) -> dict[str, Any]:
    """What the checks run on."""
    torch = _torch()
    driver = Path("/proc/driver/nvidia/version")
    version = re.search(r"\d{3}\.\d+(\.\d+)?", driver.read_text() if driver.exists() else "")
    try:
        nsys_version = find_nsys().version
    except NsysError as error:
        nsys_version = error.what
    return {
        "gpu": torch.cuda.get_device_name(0),
        "capability": ".".join(map(str, torch.cuda.get_device_capability(0))),
        "torch": torch.__version__,
        "cuda": torch.version.cuda or "",
        "driver": version[0] if version else "",
        "nsys": nsys_version,
        "python": sys.version.split()[0],
        "pytest-sglprof": __version__,
    }


def window(folder: Path) -> dict[str, Any]:
    """A torch window over replays of graphs that were captured before it."""
    torch = _torch()
    loop = DecodeLoop(torch)
    return {"graphs": GRAPHS, **_record(torch, folder, lambda: loop.run(STEPS))}


def triton(folder: Path) -> dict[str, Any]:
    """A torch window whose steps launch kernels of Triton."""
    torch = _torch()
    if importlib.util.find_spec("triton") is None:
        raise NotRun("triton is not installed")
    from ci.gpu_triton import add_one

    values = torch.zeros(SMALL, device="cuda")

    def launch() -> None:
        for _ in range(EAGER):
            add_one[(SMALL // 1024,)](values, SMALL, block=1024)

    def work() -> None:
        for _ in range(STEPS):
            with torch.profiler.record_function("step[DECODE bs=4]"):
                launch()
            torch.cuda.synchronize()

    launch()  # compiles
    torch.cuda.synchronize()
    return _record(torch, folder, work)


def busy_edges(folder: Path) -> dict[str, Any]:
    """A torch window that begins and ends while the GPU is several steps behind the CPU."""
    torch = _torch()
    loop = DecodeLoop(torch, LARGE)
    _record(torch, folder, torch.cuda.synchronize)  # the first one takes too long to start
    torch.cuda._sleep(SPIN_CYCLES)
    loop.run(BEHIND, ahead=BEHIND)
    return {"graphs": GRAPHS, **_record(torch, folder, lambda: loop.run(STEPS, ahead=STEPS))}


def gpu_only(folder: Path) -> dict[str, Any]:
    """A torch window of GPU activities alone."""
    torch = _torch()
    loop = DecodeLoop(torch)
    return {"graphs": GRAPHS, **_record(torch, folder, lambda: loop.run(STEPS), ["CUDA"])}


def speed(folder: Path) -> dict[str, Any]:
    """The time of a step before a torch window, twice, and after it."""
    torch = _torch()
    loop = DecodeLoop(torch)
    loop.median_us()  # warms the GPU up
    first, second = loop.median_us(), loop.median_us()
    _record(torch, folder, lambda: loop.run(STEPS))
    return {"first_us": first, "second_us": second, "after_us": loop.median_us()}


def stall(folder: Path) -> dict[str, Any]:
    """How long stopping and writing takes, for windows of several lengths."""
    torch = _torch()
    loop = DecodeLoop(torch)
    measured = []
    for steps in WINDOWS:
        times = _record(torch, folder, partial(loop.run, steps))
        with gzip.open(folder / TRACE) as trace:
            size = sum(len(piece) for piece in iter(lambda: trace.read(1 << 20), b""))
        measured.append({"steps": steps, "bytes": size, **times})
    return {"windows": measured}


def nvml(folder: Path) -> dict[str, Any]:
    """What NVML says of the GPUs while this process uses one."""
    torch = _torch()
    DecodeLoop(torch).run(STEPS)
    try:
        connection = Nvml()
    except ImportError as error:
        raise NotRun("nvidia-ml-py is not installed: pip install 'pytest-sglprof[gpu]'") from error
    except NvmlError as error:
        return {"error": str(error)}
    try:
        gpus = []
        for uuid in connection.uuids():
            reading = connection.reading(uuid)
            gpus.append(
                {
                    "pids": connection.pids(uuid),
                    "sm_mhz": reading.sm_mhz,
                    "power_limit_w": reading.power_limit_w,
                    "reasons": hex(reading.reasons),
                }
            )
        return {"pid": os.getpid(), "gpus": gpus}
    except NvmlError as error:
        return {"error": str(error)}
    finally:
        connection.close()


# The recordings of nsys.


def nsys(folder: Path) -> dict[str, Any]:
    """Two windows of one nsys session over replays of graphs captured before both of them."""
    _torch()
    return nsys_windows(folder, [sys.executable, "-m", "ci.gpu_recordings", "replays", str(folder)])


def nsys_windows(folder: Path, command: Sequence[str]) -> dict[str, Any]:
    """Two windows of a command, reduced and exported to `REPORTS`, and what the command planned.

    command: writes `planned.json` into the folder when it has captured its graphs, and ends when
    there is a file `stop`. Raises `NsysError`; `NotRun` where the command does not get ready.
    """
    tool = find_nsys()
    session = NsysSession(tool, f"gpu-check-{os.getpid()}")
    words = profile_prefix(tool, session.name, folder / "first.nsys-rep", (), gpu=True)
    with started([*words, *command]) as process:
        try:
            planned = _wait_for(folder / "planned.json", process)
            for name in REPORTS:
                report = (folder / name).with_suffix(".nsys-rep")
                session.start(report)
                time.sleep(OPEN_S)
                _export(tool, session.stop(timeout=READY_S), folder / name)
        finally:
            (folder / "stop").touch()
            with contextlib.suppress(NsysError):
                session.shutdown(discard=True)
    result: dict[str, Any] = json.loads(planned)
    return result


def _wait_for(file: Path, process: Any) -> str:
    deadline = time.monotonic() + READY_S
    while not file.exists():
        if process.poll() is not None or time.monotonic() > deadline:
            raise NotRun(
                f"the process under nsys was not ready within {READY_S:.0f} s, or it ended"
            )
        time.sleep(0.1)
    return file.read_text()


def _export(tool: Any, report: Path, target: Path) -> None:
    whole = target.with_name(f"whole-{target.name}")
    export(tool, report, "sqlite", whole, READY_S)
    reduce(whole, target)
    whole.unlink()
    report.unlink()  # it holds the environment of the process


KEPT = (
    *(f"CUPTI_ACTIVITY_KIND_{kind}" for kind in ("KERNEL", "MEMCPY", "MEMSET", "RUNTIME")),
    *("CUPTI_ACTIVITY_KIND_GRAPH_TRACE", "META_DATA_EXPORT", "NVTX_EVENTS", "PROCESSES"),
)
TEXT_IDS = {"demangledName", "shortName", "mangledName", "nameId", "textId"}


def reduce(database: Path, target: Path) -> None:
    """Copies of an nsys export what the readers read: it gets small, and has no environment."""
    target.unlink(missing_ok=True)
    with contextlib.closing(sqlite3.connect(database)) as connection:
        connection.execute("ATTACH ? AS kept", (str(target),))
        tables = {name for (name,) in connection.execute("SELECT name FROM main.sqlite_master")}
        used = ["SELECT NULL"]
        for table in tables.intersection(KEPT):
            connection.execute(f'CREATE TABLE kept."{table}" AS SELECT * FROM main."{table}"')
            columns = {row[1] for row in connection.execute(f'PRAGMA kept.table_info("{table}")')}
            used += [f'SELECT "{column}" FROM kept."{table}"' for column in columns & TEXT_IDS]
        if "StringIds" in tables:
            connection.execute(
                "CREATE TABLE kept.StringIds AS SELECT * FROM main.StringIds "
                f"WHERE id IN ({' UNION '.join(used)})"
            )
        connection.commit()


def replays(folder: Path) -> None:
    """What runs under nsys: captures its graphs, says so, and replays them until it shall stop."""
    loop = DecodeLoop(_torch())
    planned, partial = folder / "planned.json", folder / "planned.json.partial"
    partial.write_text(json.dumps({"graphs": GRAPHS}))
    partial.replace(planned)
    deadline = time.monotonic() + LIFE_S
    while planned.exists() and not (folder / "stop").exists() and time.monotonic() < deadline:
        loop.run(len(GRAPHS), after_launch=lambda: time.sleep(PAUSE_S))


RECORDINGS: dict[str, Callable[[Path], dict[str, Any]]] = {
    each.__name__: each
    for each in (machine, window, triton, busy_edges, gpu_only, speed, stall, nvml, nsys)
}


def main(name: str, folder: Path) -> None:
    """Makes a recording, and writes its facts."""
    if name == replays.__name__:
        replays(folder)
        return
    try:
        facts = RECORDINGS[name](folder)
    except (NotRun, SglprofError) as error:
        facts = {"not_run": str(error)}
    (folder / "facts.json").write_text(json.dumps(facts, indent=2) + "\n")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
