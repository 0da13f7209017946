"""What several files tell of one window is made to fit: ranks, step numbers, one source."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from pytest_sglprof.errors import TraceError
from pytest_sglprof.trace.steps import DRAFTS, StepIndex, step_key
from pytest_sglprof.trace.table import GPU, NO_STEP, RankActivities

_STAGE_PART = re.compile(r"-(EXTEND|DECODE)(?=\.)")


def joined(found: Sequence[tuple[Path, RankActivities]]) -> list[RankActivities]:
    """All parts of a window, with step numbers that mean the same on every rank.

    A by-stage window has two files a rank: the steps of the second stage are numbered after
    those of the first. Raises `TraceError` for a rank that stands in two files.
    """
    refuse_twice([(file, part.rank) for file, part in found])
    parts = _one_numbering([part for _, part in found])
    stages = [_stage(file) for file, _ in found]
    offsets = _offsets(parts, stages)
    return [_moved(part, offsets[s]) for part, s in zip(parts, stages, strict=True)]


def one_source(
    parts: Sequence[RankActivities],
) -> tuple[str, list[RankActivities], list[str]]:
    """The table's source, the parts that have it (or nothing), and notes on the others.

    GPU activities where any rank has them: idle ranks then have none, not CPU operators.
    """
    sources = {part.source for part in parts if len(part.start)}
    source = GPU if GPU in sources or not sources else sorted(sources)[0]
    kept = [part for part in parts if part.source == source or not len(part.start)]
    notes = [
        f"{part.rank}: no {source} activities; its {part.source} rows are left out"
        for part in parts
        if part.source != source and len(part.start)
    ]
    return source, kept, notes


def _stage(file: Path) -> str:
    match = _STAGE_PART.search(file.name)
    return match[1] if match else ""


def refuse_twice(found: Sequence[tuple[Path, str]]) -> None:
    """Raises TraceError when a rank stands in two files that are not of different stages."""
    seen: dict[str, dict[str, Path]] = {}
    for file, rank in found:
        stage = _stage(file)
        files = seen.setdefault(rank, {})
        other = files.get(stage) or files.get("")
        if not stage and files:  # beside files by stage, one of all stages is another window's
            other = next(iter(files.values()))
        if other is not None:
            where = (
                f"is given twice: {file}"
                if other == file
                else f"stands in two files: {other.name} and {file.name}"
            )
            raise TraceError(
                f"rank {rank} {where}",
                expected="one file a rank, of one window",
                hint="give the files of one window only, each once",
            )
        files[stage] = file


def _one_numbering(parts: Sequence[RankActivities]) -> list[RankActivities]:
    """Steps of all ranks by forward id, or of all by order: a mix means nothing."""
    by_id = [all(s.step == step_key(s) for s in part.steps) for part in parts if part.steps]
    if not any(by_id):
        return list(parts)
    if not all(by_id):
        return [_by_order(part) for part in parts]
    starts: dict[int, list[int]] = {}
    for part in parts:
        for step in part.steps:
            starts.setdefault(step.step, []).append(step.start_ns)
    if max(starts) < DRAFTS:
        return list(parts)
    # Target and draft take turns: numbered in the order in which they ran.
    ordered = sorted(starts, key=lambda key: (sum(starts[key]) / len(starts[key]), key))
    number_of = {key: number for number, key in enumerate(ordered)}
    return [_renumbered(part, [number_of[step.step] for step in part.steps]) for part in parts]


def _by_order(part: RankActivities) -> RankActivities:
    return _renumbered(part, range(len(part.steps)))


def _renumbered(part: RankActivities, new: Sequence[int]) -> RankActivities:
    """The part with `new` as the numbers of its steps, in their order."""
    if not part.steps:
        return part
    moved = np.array([*new, NO_STEP], dtype=np.int64)[StepIndex(part.steps).numbered(part.step)]
    steps = [step.changed(step=number) for step, number in zip(part.steps, new, strict=True)]
    return replace(part, steps=steps, step=moved)


def _offsets(parts: Sequence[RankActivities], stages: Sequence[str]) -> dict[str, int]:
    """How far the step numbers of each stage's files move, so that no two are the same."""
    numbers: dict[str, set[int]] = {}
    for part, stage in zip(parts, stages, strict=True):
        numbers.setdefault(stage, set()).update(step.step for step in part.steps)
    offsets: dict[str, int] = {}
    taken: set[int] = set()
    for stage in sorted(numbers, reverse=True):  # EXTEND before DECODE, as requests run
        offsets[stage] = max(taken, default=-1) + 1 if taken & numbers[stage] else 0
        taken |= {number + offsets[stage] for number in numbers[stage]}
    return offsets


def _moved(part: RankActivities, offset: int) -> RankActivities:
    if not offset:
        return part
    steps = [step.changed(step=step.step + offset) for step in part.steps]
    return replace(
        part, steps=steps, step=np.where(part.step == NO_STEP, NO_STEP, part.step + offset)
    )
