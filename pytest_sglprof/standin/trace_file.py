"""Writes what a rank recorded as a Kineto trace, in the layout of today's PyTorch."""

from __future__ import annotations

import json
import os
import socket
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import IO, Any

from pytest_sglprof.standin.device_events import device_step
from pytest_sglprof.standin.host_events import host_step, micros
from pytest_sglprof.standin.kernels import Batch
from pytest_sglprof.standin.timeline import Model
from pytest_sglprof.standin.topology import Place, places, stage_peers

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
    """A closed window of one rank. activities: a subset of CPU and GPU."""

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


def write(recording: Recording, file: IO[str], trace_name: str) -> int:
    """Writes the whole document to `file`; the number of events."""
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
    for event in _events(recording, base_s * 1_000_000_000):
        file.write(("  ,\n" if count else "") + event)
        count += 1
    file.write(f'  ],"traceName": {json.dumps(trace_name)} }}')
    return count


def _events(recording: Recording, base_ns: int) -> Iterator[str]:
    place, pid = recording.place, os.getpid()
    begin = micros(recording.start_ns - base_ns)
    yield from _metadata(recording, pid, begin)
    peers = stage_peers(place, places(place.sizes))
    on_gpu = recording.device != "cpu"
    number = _Numbers()
    for done in recording.steps:
        launches = recording.model.step(done.step, peers, done.batches)[place.index]
        batch = done.batches[place.queue]
        name = f"step[{batch.span}]"
        if recording.detailed:
            detail = f" {batch.detail}" if batch.detail else ""
            name = f"step[{batch.span}{detail} forward_id={done.step}]"
        start = done.start_ns - base_ns
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
        )
        if on_gpu and "GPU" in recording.activities:
            annotations = "CPU" in recording.activities
            yield from device_step(launches, start, name, place, number, annotations=annotations)
        number.next_step(len(launches))
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


class _Numbers:
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
