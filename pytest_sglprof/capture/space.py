"""How large a torch window may become, against the disk and the server's watchdog."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path

from pytest_sglprof.errors import Inconclusive, WindowRefused
from pytest_sglprof.server.sizes import ServerSizes
from pytest_sglprof.values import WindowSpec

# Uncompressed JSON of one step of one rank: about 3,000 GPU activities and their launches,
# which is what a decode step of a large model without stacks has.
STEP_BYTES = 4_000_000
STACK_FACTOR = 5.0  # measured: stacks make a trace 3 to 6 times larger
SHAPES_FACTOR = 1.5
STEPS_BY_HAND = 100  # a window without a number of steps is reckoned as this many
STEPS_PER_SECOND = 50  # and one of a duration as this many a second
EXPORT_BYTES_PER_SECOND = 20_000_000  # one rank writes its own file: serialise and compress


class TooLittleSpace(WindowRefused, Inconclusive):
    """The disk is too full for the window's traces: not opened, so nothing can be said."""

    exit_status = Inconclusive.exit_status


def bytes_per_rank(spec: WindowSpec) -> int:
    """Estimate of one rank's trace before compression."""
    if spec.num_steps is not None:
        steps = spec.num_steps * (2 if spec.profile_by_stage else 1)
    elif spec.duration is not None:
        steps = max(int(spec.duration * STEPS_PER_SECOND), 1)
    else:
        steps = STEPS_BY_HAND
    factor = (STACK_FACTOR if spec.with_stack else 1.0) * (
        SHAPES_FACTOR if spec.record_shapes else 1.0
    )
    return int(steps * STEP_BYTES * factor)


def check_space(spec: WindowSpec, sizes: ServerSizes, folders: Iterable[Path]) -> None:
    """Raises `TooLittleSpace` when a folder's disk cannot hold the traces of all ranks.

    Torch writes uncompressed JSON into the server's TMPDIR before it compresses.
    """
    needed = bytes_per_rank(spec) * len(sizes.ranks())
    for folder in folders:
        free = shutil.disk_usage(folder).free
        if free < needed:
            raise TooLittleSpace(
                f"{folder} has {_gigabytes(free)} free, the window is estimated at "
                f"{_gigabytes(needed)} before compression",
                expected="room for the traces of all ranks",
                hint="take fewer steps, turn with_stack and record_shapes off, or free space",
            )


def check_watchdog(spec: WindowSpec, limit: float | None) -> None:
    """Refuses a window whose export may outlast half of ``--watchdog-timeout`` (s).

    The export runs inside the scheduler's loop: one that outlasts the watchdog kills the
    server.
    """
    seconds = bytes_per_rank(spec) / EXPORT_BYTES_PER_SECOND
    if limit and limit > 0 and seconds > limit / 2:
        raise WindowRefused(
            f"writing this window is estimated at {seconds:.0f} s, and the server's watchdog "
            f"kills it after {limit:.0f} s without progress",
            expected="an export of less than half of the watchdog's limit",
            hint="take fewer steps or no stacks, or start the server with a larger "
            "--watchdog-timeout",
        )


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.1f} GB"
