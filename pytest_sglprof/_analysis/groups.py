"""Which ranks are compared: those with identical input, and those that meet in a collective.

The ranks of a work group have identical input, so more time means a slower rank. The ranks of
a sync group wait for each other.

Kernel time is never compared across `dp` (own requests each), pipeline stages (other layers)
or context-parallel ranks (other tokens); load is compared there instead.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from pytest_sglprof._ranks import Rank, work_group

if TYPE_CHECKING:
    import pandas as pd

    from pytest_sglprof._trace.table import KernelTable


@dataclass(frozen=True)
class RankGroup:
    """Ranks that are compared with each other, in the order of the table.

    label: what they share (`DP0 PP1`); "" if the table has only one group. ranks: their
    labels.
    """

    label: str
    ranks: tuple[str, ...]


def work_groups(ranks: Sequence[str]) -> tuple[RankGroup, ...]:
    """Groups of ranks with the same `dp`, `pp` and `attn_cp`, in order of appearance.

    An absent dimension counts as 0, since sources leave out dimensions of size 1. Labels that
    are not a rank's name form one group, since nothing says how they differ.
    """
    members: dict[tuple[int, ...] | None, list[str]] = {}
    names: dict[tuple[int, ...] | None, str] = {}
    for label in ranks:
        rank = Rank.parse(label)
        key = work_group(label)
        members.setdefault(key, []).append(label)
        names.setdefault(key, (rank.work_group.label or "DP0") if rank else "unnamed")
    if len(members) == 1:
        return tuple(RankGroup("", tuple(labels)) for labels in members.values())
    return tuple(RankGroup(names[key], tuple(labels)) for key, labels in members.items())


def sync_groups(ranks: Sequence[str]) -> tuple[RankGroup, ...]:
    """Groups of ranks that meet in collectives: one for each `pp`, and for each plain replica.

    Under data-parallel attention every rank has its own `tp` *and* `dp`, and all of them
    meet. Plain replicas each count `tp` from 0 and never meet. Labels that are not a rank's
    name form one group.
    """
    parsed = {label: Rank.parse(label) for label in ranks}
    tensor: dict[int, list[int]] = {}
    for rank in parsed.values():
        if rank is not None:
            tensor.setdefault(rank.pp or 0, []).append(rank.tp or 0)
    replicas = {pp for pp, numbers in tensor.items() if len(set(numbers)) < len(numbers)}
    members: dict[Rank | None, list[str]] = {}
    for label, rank in parsed.items():
        key = None
        if rank is not None:
            key = Rank(dp=(rank.dp or 0) if (rank.pp or 0) in replicas else None, pp=rank.pp or 0)
        members.setdefault(key, []).append(label)
    if len(members) == 1:
        return tuple(RankGroup("", tuple(labels)) for labels in members.values())
    names = {key: _sync_label(key, members) for key in members}
    return tuple(RankGroup(names[key], tuple(labels)) for key, labels in members.items())


def group_of_each(rank: pd.Series, groups: Sequence[RankGroup]) -> npt.NDArray[np.int64]:
    """The index of the group of each of these labels."""
    numbers = {label: at for at, group in enumerate(groups) for label in group.ranks}
    of_each: npt.NDArray[np.int64] = rank.map(numbers).to_numpy().astype(np.int64)
    return of_each


def replicas(ranks: Sequence[str]) -> tuple[str, ...]:
    """`DP0`, `DP1`, …: the replicas of plain data parallel, which never meet; () without any."""
    parsed = [Rank.parse(label) for label in ranks]
    places = {(rank.pp or 0, rank.tp or 0) for rank in parsed if rank is not None}
    numbers = sorted({rank.dp or 0 for rank in parsed if rank is not None})
    if None in parsed or len(places) == len(ranks) or len(numbers) < 2:
        return ()
    return tuple(Rank(dp=number).label for number in numbers)


def replica_groups(ranks: Sequence[str]) -> tuple[RankGroup, ...]:
    """The ranks that have the same place in their replicas, by replica; () without replicas."""
    members: dict[Rank, list[str]] = {}
    for label in ranks if replicas(ranks) else ():
        rank = Rank.parse(label)
        assert rank is not None
        members.setdefault(replace(rank, dp=None), []).append(label)
    alone = len(members) == 1
    return tuple(
        RankGroup("" if alone else place.label, tuple(labels)) for place, labels in members.items()
    )


def replica_of(label: str) -> str:
    """`DP1` of a rank; `DP0` where it says nothing."""
    rank = Rank.parse(label)
    return Rank(dp=rank.dp or 0 if rank is not None else 0).label


def never_meet(ranks: Sequence[str]) -> str:
    """`replicas that never meet: DP0, DP1`; "" where there are no replicas."""
    labels = replicas(ranks)
    return f"replicas that never meet: {', '.join(labels)}" if labels else ""


def _sync_label(key: Rank | None, others: Mapping[Rank | None, object]) -> str:
    """`DP0`, `PP1` or `DP0 PP1`: no more than distinguishes it from the other groups."""
    if key is None:
        return "unnamed"
    staged = len({other.pp for other in others if other is not None}) > 1
    return Rank(dp=key.dp, pp=key.pp if staged or key.dp is None else None).label


# The compared steps of a window are those that every rank of a group has in full.

# A step at the edge of a window counts as cut if a rank has less than this share of the
# activities expected. Whole steps of one stage differ by a few percent (a sampling kernel more
# or less), while a cut step lacks about half of them on average.
WHOLE_STEP_SHARE = 0.9

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class ComparedSteps:
    """The steps of one work group that can be compared.

    numbers: step numbers, ascending. stages: the stage of each, same length.
    unmatched: number of steps that some rank lacks, or has in another stage.
    cut: number of steps at the window's edges that some rank recorded only in part.
    excluded: number of common steps that some rank marks as unlike its peers (JIT
    compilation, graph capture, a rebalance of experts).
    counts: (stage, steps that any rank has in it, steps that all ranks have in it).
    """

    numbers: tuple[int, ...]
    stages: tuple[str, ...]
    unmatched: int
    cut: int
    excluded: int = 0
    counts: tuple[tuple[str, int, int], ...] = ()

    @property
    def dropped(self) -> int:
        """Number of steps that some rank has but that are not compared."""
        return self.unmatched + self.cut + self.excluded

    @property
    def seen(self) -> int:
        """Number of steps that any rank of the group has."""
        return len(self.numbers) + self.dropped

    def matched(self, stage: str = "") -> tuple[int, int]:
        """Number of steps that all ranks have in the same stage, and that any rank has.

        Excluded and cut steps count as matched. stage: "" for all stages.
        """
        if not stage:
            return self.seen - self.unmatched, self.seen
        pairs = [(common, seen) for word, seen, common in self.counts if word == stage]
        return pairs[0] if pairs else (0, 0)


def steps_per_rank(table: KernelTable) -> dict[str, int]:
    """Number of steps that each rank of the table has; 0 for ranks without any."""
    counts = step_spans(table).groupby("rank", observed=True)["step"].nunique()
    return {rank: int(counts.get(rank, 0)) for rank in table.ranks}


def step_spans(table: KernelTable) -> pd.DataFrame:
    """One row for each step of each rank: `rank, step, stage, excluded`.

    excluded: True if the step must not be compared. Taken from the table's steps, or, if it
    has none, from the step numbers of its activities.
    """
    source = table.steps
    if source.empty:
        source = table.frame.loc[table.frame["step"] >= 0, ["rank", "step", "stage"]]
    spans = source.drop_duplicates(["rank", "step"])
    spans = spans[spans["step"] >= 0]
    typed: pd.DataFrame = spans[["rank", "step", "stage"]].astype(
        {"rank": object, "step": np.int64, "stage": object}
    )
    marks = spans["excluded"].astype(object) if "excluded" in spans else ""
    typed["excluded"] = marks != ""
    return typed


def compared_steps(
    spans: pd.DataFrame, activities: pd.DataFrame, ranks: Sequence[str]
) -> ComparedSteps:
    """Matches the steps of `ranks` by number and stage; drops excluded and cut ones.

    spans: from `step_spans`. activities: `rank, step, count`, the number of activities
    of each rank in each step. Only the first and the last common step can be cut.
    """
    group_spans = spans[spans["rank"].isin(list(ranks))]
    by_step = group_spans.groupby("step", sort=True)["stage"].agg(["size", "nunique", "first"])
    matched = by_step[(by_step["size"] == len(ranks)) & (by_step["nunique"] == 1)]
    unlike = group_spans.loc[group_spans["excluded"], "step"].unique()
    common = matched[~matched.index.isin(unlike)]
    numbers = common.index.to_numpy(np.int64)
    stages = common["first"].to_numpy(object)
    keep = np.ones(len(numbers), bool)
    counts = _count_matrix(activities, numbers, ranks)
    for edge in {0, len(numbers) - 1} if len(numbers) > 2 else ():
        keep[edge] = not _is_cut(counts, stages, edge)
    return ComparedSteps(
        numbers=tuple(int(number) for number in numbers[keep]),
        stages=tuple(str(stage) for stage in stages[keep]),
        unmatched=len(by_step) - len(matched),
        cut=int((~keep).sum()),
        excluded=len(matched) - len(common),
        counts=_counts(group_spans, matched),
    )


def _counts(group_spans: pd.DataFrame, matched: pd.DataFrame) -> tuple[tuple[str, int, int], ...]:
    seen = group_spans.groupby("stage", sort=False)["step"].nunique()
    common = matched["first"].value_counts()
    return tuple((str(stage), int(n), int(common.get(stage, 0))) for stage, n in seen.items())


def _count_matrix(
    activities: pd.DataFrame, numbers: npt.NDArray[np.int64], ranks: Sequence[str]
) -> Floats:
    """Number of activities, shape (steps, ranks)."""
    wide = activities.pivot_table(
        index="step", columns="rank", values="count", aggfunc="sum", observed=True
    )
    counts: Floats = wide.reindex(index=numbers, columns=list(ranks)).fillna(0).to_numpy(float)
    return counts


def _is_cut(counts: Floats, stages: npt.NDArray[np.object_], edge: int) -> bool:
    """True if a rank has less in this step than its peers *and* less than it usually has.

    Either alone proves nothing: a rank may always run fewer kernels than its peers, and an
    odd step may be short on all ranks alike.
    """
    inner = np.arange(1, len(stages) - 1)
    inner = inner[stages[inner] == stages[edge]]
    here = counts[edge]
    less_than_peers = here < WHOLE_STEP_SHARE * here.max(initial=0.0)
    if len(inner) == 0:
        return False
    less_than_usual = here < WHOLE_STEP_SHARE * np.median(counts[inner], axis=0)
    return bool((less_than_peers & less_than_usual).any())
