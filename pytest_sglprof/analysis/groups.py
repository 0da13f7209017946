"""Which ranks are compared: those with identical input, and those that meet in a collective.

Work groups have identical input, so that slower means slower; sync groups wait for each other.

Plain data-parallel replicas and data-parallel attention give each `dp` its own requests,
pipeline stages hold other layers, context-parallel ranks other tokens: across those,
load is compared by other means, never kernel time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pytest_sglprof.ranks import Rank


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
