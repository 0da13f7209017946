"""Why a rank arrives late: what share of its lateness each cause makes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt

from pytest_sglprof._analysis.certainty import Share
from pytest_sglprof._analysis.imbalance import KernelTime
from pytest_sglprof._analysis.work import Work, compare_work, step_inputs
from pytest_sglprof._server.nvml import GpuClocks

if TYPE_CHECKING:
    from pytest_sglprof._analysis.collectives import Segments
    from pytest_sglprof._trace.table import KernelTable

Floats = npt.NDArray[np.float64]
Cause = Literal["kernel", "more_work", "host_late", "throttled", "unexplained"]

NAMED_SHARE = 0.2  # of the lateness: what makes less is not named in the sentence


class CauseShare(msgspec.Struct, frozen=True, kw_only=True):
    """A cause, and the share of a straggler's lateness that it makes."""

    cause: Cause
    share: Share


def causes_of(
    table: KernelTable,
    parts: Segments,
    top: int,
    excess: float,
    kernels: Sequence[KernelTime],
    clocks: Sequence[GpuClocks],
) -> tuple[tuple[CauseShare, ...], str]:
    """The causes why rank `top` arrived late, largest first, and a phrase that names them.

    excess: how much later than the median of the others it arrived in all, ns, above 0.
    kernels: in which it exceeds the others, largest first. The shares add up to 1; causes
    without a share are left out.
    """
    compute = parts.compute.sum(axis=0).astype(np.float64)
    idle = (parts.span.sum(axis=0) - compute).astype(np.float64)
    parted = _parted(over_others(compute, top), over_others(idle, top), excess)
    slower = float(compute[top] / max(float(np.median(np.delete(compute, top))), 1.0))
    work = _work(table, parts, top, slower)
    more = parted.compute * _explained(work, slower)
    rank = parts.waits.group.ranks[top]
    hot = next((clock for clock in clocks if clock.rank == rank and clock.throttled), None)
    made: tuple[tuple[Cause, float, str], ...] = (
        ("more_work", more, f"it has {work.ratio or 0:.2f}x the {work.by}"),
        ("throttled", bool(hot) * (parted.compute - more), _throttled(hot)),
        ("kernel", (not hot) * (parted.compute - more), _slower(work, slower, kernels)),
        ("host_late", parted.idle, "its host is late"),
        ("unexplained", parted.neither, "neither its compute nor its idle time explains it"),
    )
    made = tuple(sorted((each for each in made if each[1] > 0), key=lambda each: -each[1]))
    whys = [why for _, share, why in made if share >= NAMED_SHARE]
    named = [
        f"{100 * share:.0f} % {name}"
        for name, share in parted._asdict().items()
        if share >= NAMED_SHARE
    ]
    named[0] = named[0].replace(" %", " % of it", 1)
    shares = tuple(CauseShare(cause=cause, share=min(1.0, share)) for cause, share, _ in made)
    return shares, f"{', '.join(named)} ({'; '.join(whys)})"


class _Parted(NamedTuple):
    """Shares of a lateness: what more compute makes, what more idle time, and the rest."""

    compute: float
    idle: float
    neither: float


def _parted(compute: float, idle: float, excess: float) -> _Parted:
    """Parts a lateness. compute, idle: by how much the rank exceeds the others', ns."""
    shares = [max(0.0, ns) / excess for ns in (compute, idle)]
    # Each is above its own median: together they may exceed the lateness.
    computing, idling = (share / max(1.0, sum(shares)) for share in shares)
    return _Parted(computing, idling, max(0.0, 1.0 - computing - idling))


def _work(table: KernelTable, parts: Segments, top: int, slower: float) -> Work:
    ranks = parts.waits.group.ranks
    numbers = np.unique(parts.waits.step)
    inputs = step_inputs(table.steps, numbers.tolist(), ranks)
    calls = np.bincount(parts.rank, minlength=len(ranks))
    return compare_work(inputs, np.ones(len(numbers), bool), top, slower, calls=calls)


def _explained(work: Work, slower: float) -> float:
    """Which share of its longer compute a rank's greater input explains, 0 to 1."""
    if work.ratio is None or slower <= 1.0:
        return 0.0
    return float(np.clip((work.ratio - 1.0) / (slower - 1.0), 0.0, 1.0))


def _throttled(clock: GpuClocks | None) -> str:
    return f"its GPU was throttled ({clock.reason})" if clock else ""


def _slower(work: Work, slower: float, kernels: Sequence[KernelTime]) -> str:
    of = "" if work.ratio is None else f" with {work.ratio:.4g}x the {work.by}"
    of = " for the same work" if work.ratio == 1.0 else of
    first = f", most of all {kernels[0].name}" if kernels else ""
    return f"it computes {slower:.2f}x as long{of}{first}"


def over_others(values: Floats, top: int) -> float:
    """How far rank `top` is above the median of the others."""
    return float(values[top] - np.median(np.delete(values, top)))
