"""The device's side of one forward pass in a trace: kernels, copies and step spans."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from pytest_sglprof.standin.host_events import Numbers, complete, flow
from pytest_sglprof.standin.timeline import Launch
from pytest_sglprof.standin.topology import Place

STREAM = 7


def device_step(
    launches: Sequence[Launch],
    start: int,
    name: str,
    place: Place,
    number: Numbers,
    *,
    annotations: bool,
) -> Iterator[str]:
    """Events of one step on one stream. start: ns from the trace's base time.

    annotations: the spans of the host's annotations on the device; they contain kernels.
    """
    gpu = place.gpu
    if annotations:
        begin = start + launches[0].start_ns
        length = launches[-1].start_ns + launches[-1].dur_ns - launches[0].start_ns
        args = f'"External id": {number.external}'
        for span in ("scheduler.run_batch", name):
            yield complete("gpu_user_annotation", span, gpu, STREAM, begin, length, args)
    for position, launch in enumerate(launches):
        correlation = number.correlation + position
        at = start + launch.start_ns
        args = f'"External id": {number.external + 8 + position}, ' + _args(launch, place)
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


def _args(launch: Launch, place: Place) -> str:
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


def _collective(name: str) -> str:
    for word in ("AllReduce", "AllGather", "ReduceScatter"):
        if word in name:
            return word.lower()
    return "unknown"
