"""Why a report of nsys has no kernels: each way in which that happens has its own sentence."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from pytest_sglprof._trace.nsys.database import MISSING, PREFIX
from pytest_sglprof._trace.nsys.tables import ReportTables, coded, pid_of
from pytest_sglprof._trace.table import Ints
from pytest_sglprof._trace.unrecorded import Unrecorded, counted

# `cudaLaunchKernel_v7000`, `cuGraphLaunch`; not functions that run on the host.
_LAUNCHES = re.compile(r"cu(?:da)?[A-Za-z]*Launch(?!HostFunc)")
CAUSES = (
    "known causes: collection that began later (--capture-range, nsys start) on Blackwell with "
    "some versions of nsys; the option CuptiUseRawGpuTimestamps of nsys's config.ini; no rights "
    "to GPU activities (a container, MIG, another profiler that holds CUPTI); a process that was "
    "killed before nsys had its buffers. Record again, with another version of nsys or with the "
    "torch profiler."
)
_NO_CUDA = (
    "record with --trace=cuda,nvtx, and start the server itself under nsys: processes that "
    "are there already are not traced."
)
_GRAPHS = "record with --cuda-graph-trace=node."


def unrecorded(tables: ReportTables, pids: Sequence[int] = ()) -> Unrecorded | None:
    """Why a report, or these processes of it, have no GPU activity.

    Calls of CUDA tell that there was some, graphs that were recorded as a whole as well. None
    for a report of a CPU server: NVTX ranges without launches. `certain` is False where a GPU
    may have been idle.
    """
    thread, name = tables.integers(f"{PREFIX}RUNTIME", ["globalTid", "nameId"])
    if pids:
        name = name[np.isin(pid_of(thread), list(pids))]
    launches = _launches(tables, name)
    if launches:
        return Unrecorded(counted(launches, "launch", "launches"), CAUSES)
    if pids:
        return None
    (graphs,) = tables.integers(f"{PREFIX}GRAPH_TRACE", ["start"])
    if len(graphs):
        return Unrecorded(
            counted(len(graphs), "launch", "launches") + " of whole CUDA graphs", _GRAPHS
        )
    (ranges,) = tables.integers("NVTX_EVENTS", ["start"])
    if len(ranges):
        return None
    if calls := len(name):
        return Unrecorded(counted(calls, "CUDA call", "CUDA calls"), CAUSES)
    return Unrecorded("recorded without CUDA, or while nothing ran", _NO_CUDA, certain=False)


def _launches(tables: ReportTables, names: Ints) -> int:
    """How many of the calls of these names start work on a GPU."""
    known = names[names != MISSING]
    if not len(known):
        return 0
    ids, at = coded(known)
    texts = tables.strings(int(number) for number in ids)
    starts = [bool(_LAUNCHES.match(texts.get(int(number), ""))) for number in ids]
    return int(np.array(starts)[at].sum())
