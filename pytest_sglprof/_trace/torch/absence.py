"""What shows that a trace without kernels is not one of a CPU, and not one of torch at all."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from pytest_sglprof._trace.foreign import refuse_dialect
from pytest_sglprof._trace.torch.events import (
    KERNEL,
    KIND_OF_CATEGORY,
    LAUNCH,
    OTHER_DEVICES,
    Columns,
    FileFacts,
)
from pytest_sglprof._trace.unrecorded import Unrecorded, counted

SAMPLE = 2_000  # events whose names and arguments are searched for those of other programs

# Calls that start work on a GPU: `cudaLaunchKernelExC`, `cuGraphLaunch`, `hipModuleLaunchKernel`.
LAUNCHES = re.compile(r"(?:cuda|cu|hip|musa)[A-Za-z]*Launch(?!HostFunc)")
CAUSES = (
    "the profiler did not get the GPU's activities: CUPTI failed to attach (look for CUPTI in "
    "the server's log: another profiler such as nsys, ncu or DCGM holds it, no rights to GPU "
    "counters, a CUPTI that does not fit the driver), or only activities of the CPU were asked "
    "for. Record the window again, or with nsys."
)
_NAMED = " If this server runs on its CPU, hide the GPUs from it: CUDA_VISIBLE_DEVICES=''."
_NOT_READ = (
    "sglprof reads kernels, copies and sets of the categories kernel, gpu_memcpy and gpu_memset, "
    "which Kineto writes for NVIDIA, AMD, Intel and PrivateUse1 devices."
)
# Of categories that are not looked at otherwise; lower case.
_OTHERS = frozenset(
    {
        *("python_function", "trace", "overhead", "ac2g", "fwdbwd", "cpu_instant_event"),
        *("cuda_sync", "cuda_event", "cuda_profiler_range", "collective_comm"),
        *("external_correlation", "glow_runtime"),
    }
)
TORCH_CATEGORIES = _OTHERS | {name.lower() for name in KIND_OF_CATEGORY} | OTHER_DEVICES.keys()


class EventText(Protocol):
    """What is looked at of an event, whichever way it was decoded."""

    ph: Any
    cat: Any
    name: Any
    args: Any


def refuse_other_programs(
    path: Path, events: Sequence[EventText], categories: Counter[str]
) -> None:
    """Raises `NotATrace` for a file of another program. categories: of its spans, lower case."""
    texts = [b"%b %b" % (str(e.name).encode(), bytes(e.args)) for e in _telling(events)]
    is_torch = not TORCH_CATEGORIES.isdisjoint(categories)
    refuse_dialect(path, texts, is_torch=is_torch, count=categories.total())


def _telling(events: Sequence[EventText]) -> Iterable[EventText]:
    """Events that name processes, and the first ones."""
    yield from events[:SAMPLE]
    yield from (event for event in events[SAMPLE:] if event.name == "process_name")


def unrecorded(
    columns: Columns, facts: FileFacts, launches: Columns, names: Sequence[str]
) -> Unrecorded | None:
    """Why a rank's kernels are missing; None where it has some, or where it ran on a CPU.

    columns, facts: its activities. launches: its calls of the runtime; names: what they are
    called.
    """
    if (columns.kind == KERNEL).any():
        return None
    calls = [code for code, name in enumerate(names) if LAUNCHES.match(name)]
    rows = (launches.kind == LAUNCH) & np.isin(launches.name, calls)
    if count := int(rows.sum()):
        return Unrecorded(counted(count, "launch", "launches"), CAUSES)
    if facts.elsewhere:
        pairs = [f"{count} {category}" for category, count in facts.elsewhere.items()]
        device = OTHER_DEVICES[next(iter(facts.elsewhere))]
        return Unrecorded(f"events of {device} ({', '.join(pairs)})", _NOT_READ)
    if spans := sum(span.gpu for span in facts.annotations):
        return Unrecorded(counted(spans, "span on the GPU", "spans on the GPU"), CAUSES)
    if facts.devices and (columns.kind > LAUNCH).any():
        return Unrecorded(counted(facts.devices, "GPU", "GPUs"), CAUSES + _NAMED, certain=False)
    return None
