"""Which ranks are compared: those with identical input, and those that meet in a collective.

Work groups have identical input, so that slower means slower; sync groups wait for each other.

Plain data-parallel replicas and data-parallel attention give each `dp` its own requests,
pipeline stages hold other layers, context-parallel ranks other tokens: across those,
load is compared by other means, never kernel time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import pandas as pd

from pytest_sglprof._ranks import Rank

if TYPE_CHECKING:
    from pytest_sglprof._trace.table import KernelTable


@dataclass(frozen=True)
class RankGroup:
    """Ranks that are compared with each other, in the order of the table.

    label: what they share (`DP0 PP1`); "" when the table holds one group only. ranks: their
    labels.
    """

    label: str
    ranks: tuple[str, ...]


def work_groups(ranks: Sequence[str]) -> tuple[RankGroup, ...]:
    """Ranks with identical input: those of one `dp`, `pp` and `attn_cp`; order of appearance.

    An absent dimension counts as 0, since sources leave out sizes of 1. Labels that are
    no rank's name form one group: a report that tells less has no finer truth.
    """
    members: dict[tuple[int, ...] | None, list[str]] = {}
    names: dict[tuple[int, ...] | None, str] = {}
    for label in ranks:
        rank = Rank.parse(label)
        shared = Rank(dp=rank.dp, pp=rank.pp, attn_cp=rank.attn_cp) if rank else None
        key = shared.sort_key if shared else None
        members.setdefault(key, []).append(label)
        names.setdefault(key, (shared.label or "DP0") if shared else "unnamed")
    if len(members) == 1:
        return tuple(RankGroup("", tuple(labels)) for labels in members.values())
    return tuple(RankGroup(names[key], tuple(labels)) for key, labels in members.items())


def sync_groups(ranks: Sequence[str]) -> tuple[RankGroup, ...]:
    """Ranks that meet: those of one `pp`, and of one `dp` where each has its own TP ranks.

    Under data-parallel attention every rank has another `tp` *and* `dp`, and all of them
    meet; plain replicas count their `tp` from 0 again and never do. Labels that are no
    rank's name form one group.
    """
    parsed = {label: Rank.parse(label) for label in ranks}
    tensor: dict[int, list[int]] = {}
    for rank in parsed.values():
        if rank is not None:
            tensor.setdefault(rank.pp or 0, []).append(rank.tp or 0)
    replicas = {pp for pp, found in tensor.items() if len(set(found)) < len(found)}
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


def _sync_label(key: Rank | None, others: Mapping[Rank | None, object]) -> str:
    """`DP0`, `PP1` or `DP0 PP1`: only what tells it from the other groups."""
    if key is None:
        return "unnamed"
    staged = len({other.pp for other in others if other is not None}) > 1
    found = Rank(dp=key.dp, pp=key.pp if staged or key.dp is None else None)
    return found.label


# Which steps of a window may be compared: those that every rank of a group has, whole.


# A step at the edge of a window counts as cut when a rank has fewer than this share of
# the activities that it should have. Whole steps of one stage differ by a few percent
# (a sampling kernel more or less); a cut one lacks about half on average.
WHOLE_STEP_SHARE = 0.9

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class ComparedSteps:
    """The steps of one work group that can be compared.

    numbers: their numbers, ascending. stages: the stage of each, same length.
    unmatched: steps that some rank of the group lacks, or has in another stage.
    cut: steps at the window's edges of which a rank has only a part.
    excluded: common steps that some rank marks as unlike its peers (JIT compilation, graph
    capture, a rebalance of experts).
    counts: (stage, steps that some rank has in it, those of them that are matched).
    """

    numbers: tuple[int, ...]
    stages: tuple[str, ...]
    unmatched: int
    cut: int
    excluded: int = 0
    counts: tuple[tuple[str, int, int], ...] = ()

    @property
    def dropped(self) -> int:
        """How many steps were seen on some rank but are not compared."""
        return self.unmatched + self.cut + self.excluded

    @property
    def seen(self) -> int:
        """How many steps some rank of the group has."""
        return len(self.numbers) + self.dropped

    def matched(self, stage: str = "") -> tuple[int, int]:
        """How many steps all ranks have in the same stage, out of how many some rank has.

        Excluded and cut ones are matched. stage: "" for all of them.
        """
        if not stage:
            return self.seen - self.unmatched, self.seen
        mine = [(found, seen) for word, seen, found in self.counts if word == stage]
        return mine[0] if mine else (0, 0)


def steps_per_rank(table: KernelTable) -> dict[str, int]:
    """Number of steps that each rank of the table has; 0 for ranks without any."""
    counts = step_spans(table).groupby("rank", observed=True)["step"].nunique()
    return {rank: int(counts.get(rank, 0)) for rank in table.ranks}


def step_spans(table: KernelTable) -> pd.DataFrame:
    """`rank, step, stage, excluded`, one row a step of a rank, as plain columns.

    excluded: whether the step may not be compared. From the table's own steps; where it has
    none, from the rows that carry a number.
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
    """Matches the steps of `ranks` by number and stage; drops the excluded and the cut ones.

    spans: from `step_spans`. activities: `rank, step, count`, the number of activities
    of each rank in each step. Only the first and the last common step can be cut.
    """
    mine = spans[spans["rank"].isin(list(ranks))]
    by_step = mine.groupby("step", sort=True)["stage"].agg(["size", "nunique", "first"])
    matched = by_step[(by_step["size"] == len(ranks)) & (by_step["nunique"] == 1)]
    unlike = mine.loc[mine["excluded"], "step"].unique()
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
        counts=_counts(mine, matched),
    )


def _counts(mine: pd.DataFrame, matched: pd.DataFrame) -> tuple[tuple[str, int, int], ...]:
    seen = mine.groupby("stage", sort=False)["step"].nunique()
    found = matched["first"].value_counts()
    return tuple((str(stage), int(n), int(found.get(stage, 0))) for stage, n in seen.items())


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
    """True when a rank has less in this step than its peers *and* than it usually has.

    Either alone proves nothing: one rank may always run fewer kernels than another, and
    an odd step may be short on all of them alike.
    """
    inner = np.arange(1, len(stages) - 1)
    inner = inner[stages[inner] == stages[edge]]
    here = counts[edge]
    less_than_peers = here < WHOLE_STEP_SHARE * here.max(initial=0.0)
    if len(inner) == 0:
        return False
    less_than_usual = here < WHOLE_STEP_SHARE * np.median(counts[inner], axis=0)
    return bool((less_than_peers & less_than_usual).any())
