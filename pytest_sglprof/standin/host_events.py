"""The host's side of one forward pass in a trace: annotations, operators, launches.

Without a GPU the operators themselves are the work: parents with a child inside, and
`gloo:*` annotations on a thread of their own for the collectives.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Protocol

from pytest_sglprof.standin.timeline import Launch

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
) -> Iterator[str]:
    """Events of one step. start, wall: ns; start counts from the trace's base time.

    ops: whether the CPU is recorded at all; runtime launches come with GPU recording too.
    """
    last = launches[-1].start_ns + launches[-1].dur_ns
    if ops:
        args = f'"External id": {number.external}, "Record function id": 0, "Ev Idx": 0'
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
        if on_gpu:
            yield from _issued(launch, position, start, pid, number, ops=ops, shapes=shapes)
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
