"""Writes what a rank recorded as a Kineto trace, in the layout of today's PyTorch."""

from __future__ import annotations

import glob
import gzip
import json
import os
import re
import socket
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import IO, Any, Protocol

from pytest_sglprof.standin.model import Batch, Launch, Model, Place, places, stage_peers

_QUARTER_S = 7_776_000
"""Kineto counts time from the start of a stretch of 90 days, so that µs stay exact."""


@dataclass(frozen=True)
class Recorded:
    """One forward pass inside a window. start_ns: Unix time. batches: of every queue."""

    step: int
    start_ns: int
    wall_ns: int
    batches: tuple[Batch, ...]


@dataclass(frozen=True)
class Recording:
    """A closed window of one rank. activities: a subset of CPU and GPU. pid: of the rank.

    spans: steps are named, if detailed with what they hold, and with forward_ids numbered.
    """

    place: Place
    model: Model
    device: str
    activities: frozenset[str]
    start_ns: int
    end_ns: int
    steps: tuple[Recorded, ...]
    with_stack: bool = True
    record_shapes: bool = True
    detailed: bool = False
    spans: bool = True
    forward_ids: bool = True
    pid: int = field(default_factory=os.getpid)


Passes = Callable[[Recording, int], Iterator[str]]
"""Gives the events of all passes of a recording; the second value is the trace's base time, ns."""


def write(
    recording: Recording, file: IO[str], trace_name: str, passes: Passes | None = None
) -> int:
    """Writes the whole document to `file`; the number of events.

    passes: what ran, in place of `recording.steps` by `recording.model`.
    """
    base_s = recording.start_ns // 1_000_000_000 // _QUARTER_S * _QUARTER_S
    head = {
        "schemaVersion": 1,
        "deviceProperties": _devices(recording),
        "trace_id": uuid.uuid4().hex.upper(),
        **({"record_shapes": 1} if recording.record_shapes else {}),
        **({"with_stack": 1} if recording.with_stack else {}),
        "distributedInfo": _distributed(recording),
        "host_name": socket.gethostname(),
        "displayTimeUnit": "ms",
        "baseTimeNanoseconds": base_s * 1_000_000_000,
    }
    lines = ",\n".join(f'    "{key}": {json.dumps(value)}' for key, value in head.items())
    file.write("{\n" + lines + ',\n    "traceEvents": [\n')
    count = 0
    for event in _events(recording, base_s * 1_000_000_000, passes or _steps):
        file.write(("  ,\n" if count else "") + event)
        count += 1
    file.write(f'  ],"traceName": {json.dumps(trace_name)} }}')
    return count


def _events(recording: Recording, base_ns: int, passes: Passes) -> Iterator[str]:
    begin = micros(recording.start_ns - base_ns)
    yield from _metadata(recording, recording.pid, begin)
    yield from passes(recording, base_ns)
    duration = recording.end_ns - recording.start_ns
    yield (
        f'  {{\n    "ph": "X",\n    "cat": "Trace",\n    "name": "PyTorch Profiler (0)",\n'
        f'    "pid": "Spans",\n    "tid": "PyTorch Profiler",\n    "ts": {begin},\n'
        f'    "dur": {micros(duration)}\n    ,\n    "args": {{\n      "Op count": 0\n    }}\n  }}\n'
    )
    yield _meta("process_sort_index", "Spans", 0, begin, {"sort_index": 536870912})
    for text, owner, ts in (
        ("Iteration Start: PyTorch Profiler", "Traces", begin),
        ("Record Window End", "", micros(recording.end_ns - base_ns)),
    ):
        tid = "Trace PyTorch Profiler" if owner else ""
        yield (
            f'  {{\n    "ph": "i",\n    \n    "s": "g",\n    "name": "{text}",\n'
            f'    "pid": "{owner}",\n    "tid": "{tid}",\n    "ts": {ts}\n    \n  }}\n'
        )


def _steps(recording: Recording, base_ns: int) -> Iterator[str]:
    place, pid = recording.place, recording.pid
    peers = stage_peers(place, places(place.sizes))
    on_gpu = recording.device != "cpu"
    number = Counters()
    for done in recording.steps:
        launches = recording.model.step(done.step, peers, done.batches)[place.index]
        batch = done.batches[place.queue]
        name = f"step[{batch.span}]" if recording.spans else ""
        if recording.detailed:
            number_of = f"forward_id={done.step}" if recording.forward_ids else ""
            name = f"step[{' '.join(filter(None, (batch.span, batch.detail, number_of)))}]"
        start = done.start_ns - base_ns
        nodes = _graph_nodes(recording, done, launches)
        yield from host_step(
            launches,
            start,
            done.wall_ns,
            name,
            pid,
            number,
            on_gpu=on_gpu,
            ops="CPU" in recording.activities,
            stack=recording.with_stack,
            shapes=recording.record_shapes,
            nodes=nodes,
        )
        if on_gpu and "GPU" in recording.activities:
            annotations = "CPU" in recording.activities and recording.spans
            yield from device_step(
                launches, start, name, place, number, annotations=annotations, nodes=nodes
            )
        number.next_step(len(launches))


def _graph_nodes(recording: Recording, done: Recorded, launches: Sequence[Launch]) -> range:
    """Positions of the launches that are nodes of a graph: the model of a decode pass.

    Only with DP attention, where it matters whether a pass replays one; else they are
    launched one by one.
    """
    eager = any(batch.mode == "EXTEND" for batch in done.batches)
    if recording.place.sizes.queues == 1 or eager or not recording.model.has_graphs:
        return range(0)
    nodes = [
        position
        for position, launch in enumerate(launches)
        if launch.kernel.kind in ("kernel", "collective") and launch.kernel.law != "head sample"
    ]
    return range(nodes[0], nodes[-1] + 1)


class Counters:
    """Correlation ids, external ids and event indices of one trace."""

    def __init__(self) -> None:
        self.correlation = 1024
        self.external = 2048

    def next_step(self, launches: int) -> None:
        """Moves past the launches of a step, whose ids lie at the counters plus position."""
        self.correlation += launches
        self.external += 2 * launches + 8


def _meta(name: str, pid: int | str, tid: int, ts: str, args: dict[str, Any]) -> str:
    shown = ",\n".join(f"      {json.dumps(k)}: {json.dumps(v)}" for k, v in args.items())
    return (
        f'  {{\n    "name": "{name}",\n    "ph": "M",\n    "ts": {ts},\n'
        f'    "pid": {json.dumps(pid)},\n    "tid": {tid},\n    "args": {{\n{shown}\n    }}\n  }}\n'
    )


def _metadata(recording: Recording, pid: int, begin: str) -> Iterator[str]:
    title = recording.place.title
    yield _meta("process_name", pid, 0, begin, {"name": title})
    yield _meta("process_labels", pid, 0, begin, {"labels": "CPU"})
    yield _meta("process_sort_index", pid, 0, begin, {"sort_index": pid})
    yield _meta("thread_name", pid, pid, begin, {"name": f"thread {pid} ({title[:15]})"})
    yield _meta("thread_sort_index", pid, pid, begin, {"sort_index": pid})
    if recording.device != "cpu":
        gpu = recording.place.gpu
        yield _meta("process_name", gpu, 0, begin, {"name": title})
        yield _meta("process_labels", gpu, 0, begin, {"labels": f"GPU {gpu}"})
        yield _meta("process_sort_index", gpu, 0, begin, {"sort_index": gpu + 5_000_000})
        yield _meta("thread_name", gpu, 7, begin, {"name": "stream 7 "})


def _devices(recording: Recording) -> list[dict[str, Any]]:
    if recording.device == "cpu":
        return []
    return [
        {
            "id": place.gpu,
            "name": "stand-in GPU (no hardware)",
            "totalGlobalMem": 85_029_158_912,
            "computeMajor": 9,
            "computeMinor": 0,
            "maxThreadsPerBlock": 1024,
            "maxThreadsPerMultiprocessor": 2048,
            "regsPerBlock": 65536,
            "warpSize": 32,
            "sharedMemPerBlock": 49152,
            "numSms": 132,
            "regsPerMultiprocessor": 65536,
            "sharedMemPerBlockOptin": 232448,
            "sharedMemPerMultiprocessor": 233472,
        }
        for place in places(recording.place.sizes)
    ]


def _distributed(recording: Recording) -> dict[str, Any]:
    """As torch sees it: replicas of plain data parallel each believe to be alone."""
    place = recording.place
    sizes = place.sizes
    world = sizes.tp * sizes.pp
    backend = "gloo" if recording.device == "cpu" else "nccl"
    config = [
        ("default_pg", f"cuda:{backend}", _world(world)),
        ("tp:device", f"cuda:{backend}", [place.pp * sizes.tp + t for t in range(sizes.tp)]),
    ]
    return {
        "backend": backend,
        "rank": place.pp * sizes.tp + place.tp,
        "world_size": world,
        "pg_count": len(config),
        "pg_config": [
            {
                "pg_name": str(number),
                "pg_desc": name,
                "backend_config": of,
                "pg_size": len(ranks),
                "ranks": ranks,
            }
            for number, (name, of, ranks) in enumerate(config)
        ],
    }


def _world(size: int) -> Sequence[int]:
    return list(range(size))


# The host's side of one forward pass in a trace: annotations, operators, launches.
#
# Without a GPU the operators themselves are the work: parents with a child inside, and
# `gloo:*` annotations on a thread of their own for the collectives.


_LAUNCH = {
    "kernel": ("cudaLaunchKernel", 211),
    "collective": ("cudaLaunchKernelExC", 430),
    "memcpy": ("cudaMemcpyAsync", 41),
    "memset": ("cudaMemsetAsync", 51),
}

RUN_AHEAD = 0.4
"""The host issues work this much faster than the device does it."""

_FRAMES = (
    "sglang/srt/managers/scheduler.py(4614): run_batch",
    "sglang/srt/managers/tp_worker.py(520): forward_batch_generation",
    "sglang/srt/model_executor/model_runner.py(1836): forward",
)


class Numbers(Protocol):
    """Where the ids of a step begin; the launch at position i adds i."""

    correlation: int
    external: int


def host_step(
    launches: Sequence[Launch],
    start: int,
    wall: int,
    name: str,
    pid: int,
    number: Numbers,
    *,
    on_gpu: bool,
    ops: bool,
    stack: bool,
    shapes: bool,
    nodes: range,
) -> Iterator[str]:
    """Events of one step. start, wall: ns; start counts from the trace's base time.

    name: of its span, "" for none.
    ops: whether the CPU is recorded at all; runtime launches come with GPU recording too.
    nodes: positions of the launches that one launch of a graph stands for.
    """
    last = launches[-1].start_ns + launches[-1].dur_ns
    if ops:
        args = f'"External id": {number.external}, "Record function id": 0, "Ev Idx": 0'
        if name:
            yield complete("user_annotation", "scheduler.run_batch", pid, pid, start, wall, args)
            inner = (start + wall // 200, max(last, wall * 9 // 10) - wall // 200)
            yield complete("user_annotation", name, pid, pid, *inner, args)
        if stack:
            for depth, frame in enumerate(_FRAMES, start=1):
                text = f'"Python id": {number.external + depth}, "Ev Idx": {depth}'
                at = start + wall * depth // 1000
                length = wall - 2 * wall * depth // 1000
                yield complete("python_function", frame, pid, pid, at, length, text)
    for position, launch in enumerate(launches):
        if on_gpu and position in nodes[:1]:
            yield from _replayed(launch, position, start, pid, number)
        elif on_gpu and position not in nodes:
            yield from _issued(launch, position, start, pid, number, ops=ops, shapes=shapes)
        elif on_gpu:
            continue
        else:
            yield from _worked(launch, position, start, pid, number, shapes=shapes)


def _issued(
    launch: Launch,
    position: int,
    start: int,
    pid: int,
    number: Numbers,
    *,
    ops: bool,
    shapes: bool,
) -> Iterator[str]:
    at = start + int(launch.start_ns * RUN_AHEAD)
    length = max(4, int(launch.dur_ns * RUN_AHEAD * 0.8))
    correlation, external = number.correlation + position, number.external + 8 + position
    if ops:
        extra = _shapes(launch) if shapes else ""
        yield complete(
            "cpu_op",
            launch.kernel.cpu_name.replace("gloo:", "c10d::"),
            pid,
            pid,
            at,
            length,
            f'"External id": {external}, "Record function id": 0{extra}, "Ev Idx": {position}',
        )
    name, cbid = _LAUNCH[launch.kernel.kind]
    at += length // 4
    args = f'"External id": {external}, "cbid": {cbid}, "correlation": {correlation}'
    yield complete("cuda_runtime", name, pid, pid, at, length // 2, args)
    yield flow("s", correlation, pid, pid, at)


def _replayed(
    launch: Launch, position: int, start: int, pid: int, number: Numbers
) -> Iterator[str]:
    at = start + int(launch.start_ns * RUN_AHEAD)
    correlation = number.correlation + position
    args = f'"External id": {number.external + 8 + position}, '
    args += f'"cbid": 311, "correlation": {correlation}'
    yield complete("cuda_runtime", "cudaGraphLaunch", pid, pid, at, 2000, args)
    yield flow("s", correlation, pid, pid, at)


def _worked(
    launch: Launch, position: int, start: int, pid: int, number: Numbers, *, shapes: bool
) -> Iterator[str]:
    at, length = start + launch.start_ns, launch.dur_ns
    external = number.external + 8 + 2 * position
    extra = _shapes(launch) if shapes else ""
    args = f'"External id": {external}, "Record function id": 0{extra}, "Ev Idx": {position}'
    name = launch.kernel.cpu_name
    if name.startswith("gloo:"):
        issue = name.replace("gloo:", "c10d::") + "_"
        yield complete("cpu_op", issue, pid, pid, at, max(1, length // 20), args)
        yield complete("user_annotation", name, pid, pid + 1, at, length, args)
    elif name == "aten::mm":
        yield complete("cpu_op", "aten::linear", pid, pid, at, length, args)
        inside = (at + length // 20, length - length // 10)
        yield complete("cpu_op", "aten::mm", pid, pid, *inside, args)
    else:
        yield complete("cpu_op", name, pid, pid, at, length, args)


def _shapes(launch: Launch) -> str:
    return (
        ', "Concrete Inputs": [""], "Input type": ["c10::BFloat16"], '
        f'"Input Dims": [[{max(1, int(launch.kernel.weight))}, 4096]]'
    )


def complete(
    cat: str, name: str, pid: int, tid: int, start: int, dur: int, args: str, ph: str = "X"
) -> str:
    """One event with a duration; `args` is the inside of its JSON object."""
    inside = args.replace(', "', ',\n      "') if cat != "python_function" else args
    return (
        f'  {{\n    "ph": "{ph}",\n    "cat": "{cat}",\n    "name": {quoted(name)},\n'
        f'    "pid": {pid},\n    "tid": {tid},\n    "ts": {micros(start)},\n'
        f'    "dur": {micros(dur)}\n    ,\n    "args": {{\n      {inside}\n    }}\n  }}\n'
    )


def flow(ph: str, correlation: int, pid: int, tid: int, at: int) -> str:
    """One end of the arrow from a launch ("s") to its kernel ("f")."""
    bind = ',\n    "bp": "e"' if ph == "f" else ""
    return (
        f'  {{\n    "ph": "{ph}",\n    "id": {correlation},\n    "pid": {pid},\n'
        f'    "tid": {tid},\n    "ts": {micros(at)},\n    "cat": "ac2g",\n'
        f'    "name": "ac2g"{bind}\n  }}\n'
    )


def micros(ns: int) -> str:
    """Nanoseconds as the µs with three decimals that Kineto writes."""
    return f"{ns // 1000}.{ns % 1000:03d}"


@cache
def quoted(text: str) -> str:
    """A JSON string."""
    return json.dumps(text)


# The device's side of one forward pass in a trace: kernels, copies and step spans.


STREAM = 7
GRAPH_ID = 5


def device_step(
    launches: Sequence[Launch],
    start: int,
    name: str,
    place: Place,
    number: Numbers,
    *,
    annotations: bool,
    nodes: range,
) -> Iterator[str]:
    """Events of one step on one stream. start: ns from the trace's base time.

    annotations: the spans of the host's annotations on the device; they contain kernels.
    nodes: positions of the launches that are nodes of a graph.
    """
    gpu = place.gpu
    if annotations:
        begin = start + launches[0].start_ns
        length = launches[-1].start_ns + launches[-1].dur_ns - launches[0].start_ns
        args = f'"External id": {number.external}'
        for span in ("scheduler.run_batch", name):
            yield complete("gpu_user_annotation", span, gpu, STREAM, begin, length, args)
    for position, launch in enumerate(launches):
        correlation = number.correlation + (nodes[0] if position in nodes else position)
        at = start + launch.start_ns
        args = f'"External id": {number.external + 8 + position}, ' + kernel_args(launch, place)
        if position in nodes:
            args += node_args(position)
        yield complete(
            _CATEGORY.get(launch.kernel.kind, "kernel"),
            launch.kernel.name,
            gpu,
            STREAM,
            at,
            launch.dur_ns,
            args.replace("@", str(correlation)),
        )
        yield flow("f", correlation, gpu, STREAM, at)


_CATEGORY = {"memcpy": "gpu_memcpy", "memset": "gpu_memset"}


def kernel_args(launch: Launch, place: Place) -> str:
    """The inside of a device event's arguments; its correlation is still `@`."""
    where = f'"device": {place.gpu}, "context": 1, "stream": {STREAM}, "correlation": @'
    if launch.kernel.kind in _CATEGORY:
        size = max(1, launch.dur_ns)
        return f'{where}, "bytes": {size}, "memory bandwidth (GB/s)": {size / launch.dur_ns:.3f}'
    text = (
        f'"queued": 0, {where}, "registers per thread": 96, "shared memory": 0, '
        '"blocks per SM": 1.0, "warps per SM": 8.0, "grid": [132, 1, 1], "block": [256, 1, 1], '
        '"est. achieved occupancy %": 12'
    )
    if launch.kernel.name.startswith("nccl"):
        group = range(place.sizes.tp)
        text += (
            f', "Collective name": "{_collective(launch.kernel.name)}", "In msg nelems": 4096, '
            f'"Out msg nelems": 4096, "Group size": {len(group)}, "dtype": "BFloat16", '
            '"Process Group Name": "1", "Process Group Description": "tp:device", '
            f'"Process Group Ranks": "{list(group)}"'
        )
    return text


def node_args(position: int) -> str:
    """What the arguments of a kernel have besides where it is a node of a graph."""
    return f', "graph id": {GRAPH_ID}, "graph node id": {GRAPH_ID << 20 | position + 1}'


def _collective(name: str) -> str:
    for word in ("AllReduce", "AllGather", "ReduceScatter"):
        if word in name:
            return word.lower()
    return "unknown"


# The server's own merge of the files of all ranks into one.


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
    """False while the file is being written; `gzip` takes an empty file for a whole one."""
    size = 0
    try:
        with gzip.open(path, "rb") as file:
            while chunk := file.read(1 << 20):
                size += len(chunk)
    except (EOFError, OSError):
        return False
    return size > 0


def _read(path: Path) -> dict[str, Any]:
    try:
        with gzip.open(path, "rt", encoding="utf-8") as file:
            trace: dict[str, Any] = json.load(file)
    except (EOFError, OSError, ValueError):  # still being written by another replica
        return {"traceEvents": []}
    return trace


def _label(name: str) -> str:
    parts = dict(re.findall(r"(TP|DP|PP|EP)-(\d+)", name))
    tags = [f"{key}{int(parts[key]):02d}" for key in ("TP", "DP", "PP", "EP") if key in parts]
    return f"[{'-'.join(tags)}]"
