"""A rank that used its GPU, but of which no kernel was recorded, is never compared.

Its CPU operators are no substitute: they are the work of launching, not of the GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pytest_sglprof._errors import NoKernels

if TYPE_CHECKING:
    from pytest_sglprof._trace.table import RankActivities

MAX_NAMED = 4  # ranks


@dataclass(frozen=True)
class Unrecorded:
    """What shows that kernels were not recorded.

    what: for example "40 launches". hint: known causes. certain: False where the GPU may as
    well have been idle, which the kernels of other ranks then tell.
    """

    what: str
    hint: str
    certain: bool = True


def counted(count: int, one: str, many: str) -> str:
    """`1 launch` or `40 launches`."""
    return f"{count} {one if count == 1 else many}"


def refuse_unrecorded(parts: Sequence[tuple[Path, RankActivities]]) -> None:
    """Raises `NoKernels` where a rank's kernels were not recorded. parts: with their files."""
    on_gpu = any(part.is_timeline and len(part.start) for _, part in parts)
    lost = [
        (f"{part.rank} ({file.name})", part.unrecorded)
        for file, part in parts
        if part.unrecorded is not None and (part.unrecorded.certain or not on_gpu)
    ]
    if lost:
        raise no_kernels(lost)


def no_kernels(lost: Sequence[tuple[str, Unrecorded]]) -> NoKernels:
    """The error for these ranks or files."""
    named = "; ".join(f"{name}: {reason.what}" for name, reason in lost[:MAX_NAMED])
    more = f"; and {len(lost) - MAX_NAMED} more ranks alike" if len(lost) > MAX_NAMED else ""
    return NoKernels(
        f"{named}{more}, but no kernels were recorded",
        expected="kernels of every rank that used its GPU",
        hint=" ".join(dict.fromkeys(reason.hint for _, reason in lost)),
    )
