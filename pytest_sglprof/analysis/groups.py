"""Work groups: the ranks that get identical input, so that slower means slower.

Plain data-parallel replicas and data-parallel attention give each `dp` its own requests,
pipeline stages hold other layers, context-parallel ranks other tokens: across those,
load is compared by other means, never kernel time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pytest_sglprof.ranks import Rank


@dataclass(frozen=True)
class WorkGroup:
    """Ranks with identical input (attention-TP peers), in the order of the table.

    label: what its ranks share (`DP0 PP1`); "" when the table holds one group only.
    ranks: their labels.
    """

    label: str
    ranks: tuple[str, ...]


def work_groups(ranks: Sequence[str]) -> tuple[WorkGroup, ...]:
    """Splits rank labels by `dp`, `pp` and `attn_cp`; order of first appearance.

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
        return tuple(WorkGroup("", tuple(found)) for found in members.values())
    return tuple(WorkGroup(names[key], tuple(found)) for key, found in members.items())
