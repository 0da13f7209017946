"""Which rank a process of an nsys report is: the report itself has lost that.

nsys cuts the title of a process to 15 characters, the same for every scheduler. So the
rank comes from what was known while the server lived, and whatever was used is said.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass

NO_DEVICE = -1


@dataclass(frozen=True, order=True)
class Owner:
    """One process on one device (`NO_DEVICE` for what ran on the CPU)."""

    pid: int
    device: int = NO_DEVICE


def label_owners(
    owners: Sequence[Owner],
    *,
    pid_ranks: Mapping[int, str],
    gpu_ranks: Mapping[int, str],
    recorded: Set[int],
) -> tuple[dict[Owner, str], list[str]]:
    """A label for each owner, and notes on how they were found.

    By process id, else by device where exactly one unknown process uses it and its rank
    is not one of a recorded process, else `GPU<device>` (`GPU<device> pid <pid>` where
    processes share it) or `pid <pid>`. recorded: pids that stand in the report.
    """
    labels = {owner: pid_ranks[owner.pid] for owner in owners if owner.pid in pid_ranks}
    notes = ["ranks of nsys activities: by process id"] if labels else []
    unknown = [owner for owner in owners if owner not in labels]
    if pid_ranks and unknown and not labels:
        notes.append("none of the known process ids has an activity in the nsys report")
    taken = {label for pid, label in pid_ranks.items() if pid in recorded}
    by_device = {
        owner: label
        for owner in unknown
        if (label := gpu_ranks.get(owner.device, "")) and label not in taken
        if _alone(owner, unknown)
    }
    if by_device:
        pairs = ", ".join(f"GPU{owner.device} is {by_device[owner]}" for owner in by_device)
        notes.append(f"ranks of nsys activities: by device, no process id was known: {pairs}")
    labels |= by_device
    for owner in unknown:
        if owner not in labels:
            labels[owner], note = _unknown_rank(owner, _alone(owner, unknown))
            notes.append(note)
    return labels, notes


def not_recorded(pid_ranks: Mapping[int, str], seen: Set[int]) -> list[str]:
    """Notes on ranks whose process is not among those `seen` in the report."""
    return [
        f"process {pid} ({label}) is not in the nsys report"
        for pid, label in pid_ranks.items()
        if pid not in seen
    ]


def _alone(owner: Owner, unknown: Sequence[Owner]) -> bool:
    return sum(other.device == owner.device for other in unknown) == 1


def _unknown_rank(owner: Owner, alone: bool) -> tuple[str, str]:
    if owner.device == NO_DEVICE:
        return f"pid {owner.pid}", f"rank unknown: process {owner.pid} is named by its id"
    if alone:
        label = f"GPU{owner.device}"
        return label, f"rank unknown: {label} is device {owner.device} of process {owner.pid}"
    label = f"GPU{owner.device} pid {owner.pid}"
    return label, f"rank unknown: {label} is one of several processes on that device number"
