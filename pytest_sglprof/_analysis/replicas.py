"""Replicas of plain data parallel, which never meet: compared by passes of one kind."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from pytest_sglprof._analysis.busy import Ints
from pytest_sglprof._analysis.groups import (
    ComparedSteps,
    RankGroup,
    never_meet,
    replica_groups,
    replica_of,
    step_spans,
)
from pytest_sglprof._analysis.passes import (
    STAGE_OF,
    STATIC,
    Passes,
    PassKind,
    equal_calls,
    whole_passes,
    why_other_work,
)
from pytest_sglprof._analysis.times import GroupCells, Rows, cells_of_steps, rows_of

if TYPE_CHECKING:
    from pytest_sglprof._trace.table import KernelTable

MIN_UNPAIRED = 20  # passes of one kind and batch that every replica has


def replica_cells(table: KernelTable, kind: str, scope: str, kernel: str) -> tuple[GroupCells, ...]:
    """Shape-static kernels of replicas of one rank each, in as many passes of each kind and batch.

    One for each stage of their pipelines. The replicas never meet, so which pass stands beside
    which means nothing: of independent series the mean of differences is the difference of the
    means, and so is its error. kind: of the estimate; only the typical ratio has a meaning. Where
    there are no replicas, the reason is all that there is.
    """
    rows = rows_of(table)
    rows_of_static = rows.of_kernels(np.isin([each for each, _ in rows.kernels], STATIC))
    cells = []
    for group in replica_groups(table.ranks) or (RankGroup("", tuple(table.ranks)),):
        doubt = _why_no_replicas(table, kind) or why_other_work(scope, kernel)
        alone = [RankGroup(replica_of(rank), (rank,)) for rank in group.ranks]
        passes = [] if doubt else [whole_passes(table, each, rows)[0] for each in alone]
        idle = [each.group.label for each in passes if not len(each.numbers)]
        if idle:
            doubt = f"{never_meet(table.ranks)}; {', '.join(idle)} had no pass"
        beside = _cells_side_by_side(rows_of_static, group, [] if idle else passes)
        count = len(beside.steps.numbers)
        if count < MIN_UNPAIRED and not doubt:
            doubt = (
                f"{never_meet(table.ranks)}; {count} passes of one kind and batch on each, "
                f"{MIN_UNPAIRED} are needed"
            )
        cells.append(replace(beside, doubt=doubt))
    return tuple(cells)


def _why_no_replicas(table: KernelTable, kind: str) -> str:
    apart = never_meet(table.ranks)
    if step_spans(table).empty:
        return "no step markers in the trace: ranks with different input are compared by passes"
    if not apart:
        return "no ranks meet in collectives"
    return "" if kind == "typical_ratio" else f"{apart}, so none waits for another"


def _cells_side_by_side(rows: Rows, group: RankGroup, alone: Sequence[Passes]) -> GroupCells:
    """The cells of passes of replicas that call each kernel equally often; none without `alone`."""
    chosen, kinds = _side_by_side(alone)
    most = max((len(passes.numbers) for passes in alone), default=0)
    stages = tuple(STAGE_OF[kind] for kind in kinds)
    steps = ComparedSteps(tuple(range(len(kinds))), stages, 0, 0, excluded=most - len(kinds))
    numbered = _renumbered(rows, group.ranks, chosen)
    cells = cells_of_steps(group, numbered, steps)
    equal, _ = equal_calls(cells)
    if not equal.all():
        numbers = tuple(np.flatnonzero(equal).tolist())
        stages = tuple(stages[number] for number in numbers)
        steps = replace(steps, numbers=numbers, stages=stages, excluded=most - len(numbers))
        cells = cells_of_steps(group, numbered, steps)
    active = frozenset(group.ranks)
    return replace(cells, across="sync", is_paired=False, assigned_share=1.0, active=active)


def _side_by_side(alone: Sequence[Passes]) -> tuple[list[Ints], tuple[PassKind, ...]]:
    """As many passes of each kind and rows of every replica, spread over the window, and kinds."""
    works = [
        [(kind, int(rows)) for kind, rows in zip(passes.kinds, passes.rows[:, 0], strict=True)]
        for passes in alone
    ]
    counts = [Counter(each) for each in works]
    common = {
        work: min(count[work] for count in counts)
        for work in sorted({work for each in works for work in each})
        if work[0] != "idle" and work[1] >= 0
    }
    chosen = []
    for passes, of_passes in zip(alone, works, strict=True):
        taken = [np.zeros(0, np.int64)]
        for work, number in common.items():
            at = np.flatnonzero([each == work for each in of_passes])
            taken.append(passes.numbers[at[np.arange(number) * len(at) // max(number, 1)]])
        chosen.append(np.concatenate(taken))
    return chosen, tuple(work[0] for work, number in common.items() for _ in range(number))


def _renumbered(rows: Rows, ranks: Sequence[str], chosen: Sequence[Ints]) -> Rows:
    """The activities of the chosen passes of each rank, numbered by their places; others -1."""
    import pandas as pd

    step = np.full(len(rows.step), -1, np.int64)
    for rank, numbers in zip(ranks, chosen, strict=False):
        of_rank = rows.rank == (rows.ranks.index(rank) if rank in rows.ranks else -1)
        step[of_rank] = pd.Index(numbers).get_indexer(pd.Index(rows.step[of_rank]))
    return replace(rows, step=step)
