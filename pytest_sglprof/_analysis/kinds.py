"""What kind of communication each call is, and whether all of its ranks wait for the last.

The name of the kernel says it, but for NCCL's SendRecv: a transfer between two ranks and an
all-to-all are both made of it. What these are follows, in this order, from what
torch.distributed recorded of the call, from the parallel sizes of the server, and from how
symmetric the calls are.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from pytest_sglprof._analysis.busy import Ints, busy_parts
from pytest_sglprof._analysis.clocks import MIN_ENDS, fit_clocks
from pytest_sglprof._analysis.groups import group_of_each, sync_groups
from pytest_sglprof._analysis.matching import match, meetings
from pytest_sglprof._ranks import Rank
from pytest_sglprof._trace.categories import CollectiveKind, collective_kind, is_meeting
from pytest_sglprof._trace.table import BOTH_WAYS

Flags = npt.NDArray[np.bool_]
Objects = npt.NDArray[np.object_]

if TYPE_CHECKING:
    import pandas as pd

    from pytest_sglprof._trace.table import KernelTable

_EXCHANGE = re.compile(r"send_?recv|all_?to_?all", re.IGNORECASE)
# What an operation must be called to say of which kind it is: "coalesced" does not.
_TELLING = re.compile(r"reduce|gather|scatter|broadcast|barrier|all_?to_?all|^send$|^recv$", re.I)
EVEN_SHARE = 0.9  # of the calls: as many must be on every rank as often in the same step
# Calls end together whose ends lie apart by less than these parts of how far apart their starts
# lie, or of the duration of the shortest.
CLOSER = 0.25
TOGETHER_SHARE = 0.1


def communication(table: KernelTable) -> pd.DataFrame:
    """All communication of a table, with the index of `table.frame`.

    Columns `rank, name, step, stream, start_ns, dur_ns`, `arrived_ns` (when the rank has done
    all that it does before the call), `kind` (a `CollectiveKind`), `waits`
    (True if all ranks wait for the last to arrive, and the step is known if the table has
    steps), `process_group` ("" if unknown), `sequence` (number in the group, -1 if unknown).
    """
    frame = table.frame
    rows = frame.loc[frame["category"] == "communication"]
    texts = ["rank", "name", "full_name"]
    rows = rows[[*texts, "step", "stream", "start_ns", "dur_ns"]].astype(
        dict.fromkeys(texts, object)
    )
    if (frame["kind"] == "collective").any():
        # The server's operators wrap these annotations: each collective would count twice.
        rows = rows[(frame.loc[rows.index, "kind"] == "collective").to_numpy(bool)]
    recorded = table.collectives.reindex(rows.index)
    operation = _column(recorded, "operation", "")
    names = rows["full_name"].to_numpy(object)
    of_exchange = _where(names, _EXCHANGE.search)
    is_recorded = of_exchange & _where(operation, _TELLING.search)
    says = np.where(is_recorded, operation, names)
    known = (rows["step"] >= 0).to_numpy(bool) | (frame["step"] < 0).all()
    rows = rows.assign(
        arrived_ns=_arrivals(table, rows.index),
        kind=_of_each(says, collective_kind),
        waits=_where(says, is_meeting) & known,
        process_group=_column(recorded, "process_group", ""),
        sequence=_column(recorded, "sequence", -1).astype(np.int64),
        both_ways=operation == BOTH_WAYS,
    )
    size = _column(recorded, "group_size", -1).astype(np.int64)
    undecided = of_exchange & known & ~(is_recorded & (rows["kind"] != "all_to_all").to_numpy(bool))
    groups = sync_groups(table.ranks)
    number = group_of_each(rows["rank"], groups)
    sizes = np.array([len(group.ranks) for group in groups], np.int64)
    rows.loc[(size > 0) & (size < sizes[number]), "waits"] = False
    exchanges: Any = rows[undecided].groupby([number[undecided], says[undecided]])
    for (at, _), calls in exchanges:
        kind, waits = _exchange(calls, groups[at].ranks, table.ranks)
        rows.loc[calls.index, "kind"] = kind
        rows.loc[calls.index, "waits"] = waits
    return rows.drop(columns=["full_name", "both_ways"])


def _arrivals(table: KernelTable, calls: pd.Index[int]) -> Ints:
    """When the ranks of these calls arrived: at their start, or when the stream was done.

    A kernel that is launched early (programmatic dependent launch) starts while the one before it
    on its stream still runs, and waits for it.
    """
    frame = table.frame
    start, dur = frame["start_ns"].to_numpy(np.int64), frame["dur_ns"].to_numpy(np.int64)
    at = frame.index.get_indexer(calls)
    if not table.is_timeline or not len(at):
        return start[at]
    stream = frame["stream"].to_numpy(np.int64)
    rank = frame["rank"].cat.codes.to_numpy(np.int64)
    owner: Ints = stream * np.int64(len(table.ranks)) + rank
    rows = np.flatnonzero((stream >= 0) & np.isin(owner, np.unique(owner[at])))
    alone = dur.copy()
    alone[rows] = busy_parts(owner[rows], start[rows], dur[rows])
    arrived: Ints = (start + dur - alone)[at]
    return arrived


def _column(recorded: pd.DataFrame, name: str, otherwise: object) -> Objects:
    """A column of what was recorded of the calls; `otherwise` where nothing was."""
    if name not in recorded:
        return np.full(len(recorded), otherwise, object)
    values = recorded[name].astype(object)
    known: Objects = values.where(values.notna(), otherwise).to_numpy(object)
    return known


def _where(texts: Objects, is_so: Callable[[str], object]) -> Flags:
    """In which of these texts something is so."""
    return _of_each(texts, is_so).astype(bool)


def _of_each(texts: Objects, answer: Callable[[str], object]) -> Objects:
    """The answer for each of these texts, of which few differ."""
    answers = {text: answer(text) for text in set(texts)}
    return np.array([answers[text] for text in texts], object)


def _exchange(
    calls: pd.DataFrame, ranks: Sequence[str], everyone: Sequence[str]
) -> tuple[CollectiveKind, bool]:
    """The kind of calls of one SendRecv or all-to-all, and whether all wait for the last.

    everyone: the ranks of the table, whose labels tell the parallel sizes of the server.
    """
    matched = match(calls.assign(waits=True), ranks)
    is_even = len(matched) >= EVEN_SHARE * len(calls)
    is_enough = len(matched) >= MIN_ENDS * len(ranks)
    together = is_even and is_enough and _end_together(matched, ranks)
    parsed = [Rank.parse(label) for label in everyone]
    has_stages = any(rank is not None and rank.pp for rank in parsed)
    has_experts = any(rank is not None and rank.ep for rank in parsed)
    if (calls["kind"] == "all_to_all").all() or (has_experts and not has_stages):
        return "all_to_all", together
    if has_stages:
        return ("unknown" if has_experts else "p2p"), False
    if not is_even:
        return "p2p", False
    if not is_enough:
        return "unknown", False
    if not together:
        return "p2p", False
    # Two stages that hand on their results end together as well, and one always waits.
    are_named = all(rank is not None and rank.gpu is None for rank in parsed)
    if len(ranks) == 2 and not are_named and not calls["both_ways"].all():
        return "unknown", False
    return "all_to_all", True


def _end_together(matched: pd.DataFrame, ranks: Sequence[str]) -> bool:
    """Whether each of these calls ends on all ranks at about the same moment.

    Their ends lie closer together than their starts, or within a small part of the shortest.
    """
    _, start, dur, *_ = meetings(matched, ranks)
    origin = int(start.min())
    begun, ended = ((each - origin).astype(np.float64) for each in (start, start + dur))
    fit = fit_clocks(ended)
    if fit is None:
        return False
    apart = [float(np.percentile(np.ptp(at - fit.offsets, axis=1), 95)) for at in (ended, begun)]
    shortest = float(np.median(dur.min(axis=1)))
    return apart[0] <= max(CLOSER * apart[1], TOGETHER_SHARE * shortest)
