"""The passes of ranks that meet in collectives but have different input.

Under data-parallel attention a forward pass is run by all ranks together, each with its own
requests: one may prefill while another decodes and a third has nothing to do. The unit is the pass,
by its number, whatever each rank does in it; its kind follows from all ranks:

- `decode`: nobody prefills, so all replay a graph, in the gather regime the one whose batch is the
  next above the largest batch of all ranks, in the local regime each its own;
- `eager decode`: nobody prefills, but no graph is replayed;
- `prefill`: who has requests prefills. `prefill beside decode`: others decode, without a graph;
- `verify`, `draft`: of speculative decoding. `idle`: nobody has requests;
- `unknown`: what a rank does is not recorded, as in nsys reports.

Source: `model_runner.py`, `dp_attn.py` and `step_span_utils.py` of SGLang 0.5.23.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Literal

import numpy as np
import numpy.typing as npt

from pytest_sglprof._analysis.alignment import aligned, renumbered
from pytest_sglprof._analysis.busy import Ints, Mask
from pytest_sglprof._analysis.collectives import Waits, waits
from pytest_sglprof._analysis.groups import (
    WHOLE_STEP_SHARE,
    ComparedSteps,
    RankGroup,
    never_meet,
    replicas,
    step_spans,
    sync_groups,
    work_groups,
)
from pytest_sglprof._analysis.times import GroupCells, Rows, cells_of_steps, rows_of
from pytest_sglprof._analysis.work import matrix_places, step_matrix

if TYPE_CHECKING:
    import pandas as pd

    from pytest_sglprof._trace.table import KernelTable, PassSettings

PassKind = Literal[
    "decode",
    "eager decode",
    "prefill",
    "prefill beside decode",
    "verify",
    "draft",
    "idle",
    "unknown",
]
Texts = npt.NDArray[np.object_]

PREFILLS = ("EXTEND", "PREFILL", "SPLIT_PREFILL", "DLLM_EXTEND", "MIXED")
STATIC = ("gemm", "norm", "quantization")  # categories whose shapes follow from the rows of a pass
GRAPH_SHARE = 0.5  # of the kernels of a pass that replays a graph are nodes of it, at least
UNKNOWN = -1
# Stages, so that thresholds of a stage choose passes.
STAGE_OF: dict[PassKind, str] = {
    "decode": "decode",
    "eager decode": "decode",
    "verify": "decode",
    "draft": "decode",
    "prefill": "prefill",
    "prefill beside decode": "mixed",
    "idle": "idle",
    "unknown": "unknown",
}


@dataclass(frozen=True)
class Passes:
    """The passes that every rank of a sync group has, in order.

    numbers: shape (passes,). kinds: of each. local: what each rank does in it, SGLang's word
    ("DECODE", "EXTEND", "IDLE", …), shape (passes, ranks). batch, tokens, kv_tokens, query_keys:
    requests, new tokens, tokens in the KV cache, Σ query · key of each rank, same shape. rows: rows
    that shape-static kernels compute on the rank, after padding; has_same_rows: whether these are
    equally many on all ranks, which can be known where they are not. expert_tokens: tokens that
    came to the rank's experts, over all layers. All of these are -1 where not known. missing:
    passes that some rank lacks; cut, excluded: as in `ComparedSteps`. reason: why there are no
    passes; "" if there are.
    """

    group: RankGroup
    numbers: Ints
    kinds: tuple[PassKind, ...]
    local: Texts
    batch: Ints
    tokens: Ints
    kv_tokens: Ints
    query_keys: Ints
    rows: Ints
    has_same_rows: Mask
    expert_tokens: Ints
    settings: PassSettings | None
    missing: int = 0
    cut: int = 0
    excluded: int = 0
    reason: str = ""

    def of_kind(self, kind: str) -> Mask:
        """Mask of the passes of a kind, shape (passes,)."""
        return np.array([each == kind for each in self.kinds], bool)

    @property
    def counts(self) -> dict[str, int]:
        """Number of passes of each kind, the most frequent first."""
        return dict(Counter(self.kinds).most_common())

    @property
    def pushed_out(self) -> int:
        """How many passes of a rank that decodes run without graph since another prefills."""
        beside = self.of_kind("prefill beside decode")
        return int((self.local[beside] == "DECODE").any(axis=1).sum())

    def steps(self, chosen: Mask | None = None) -> ComparedSteps:
        """The chosen passes (all by default) as the steps that are compared."""
        kept = np.ones(len(self.numbers), bool) if chosen is None else chosen
        stages = tuple(STAGE_OF[kind] for kind in self.kinds)
        every = Counter(stages)
        return ComparedSteps(
            numbers=tuple(int(number) for number in self.numbers[kept]),
            stages=tuple(np.array(stages, object)[kept].tolist()),
            unmatched=self.missing,
            cut=self.cut,
            excluded=self.excluded + int((~kept).sum()),
            counts=tuple((stage, count, count) for stage, count in every.items()),
        )


@dataclass(frozen=True)
class SyncGroup:
    """The passes of one sync group and their times, in all passes and in those of equal work.

    table: with equal numbers for equal passes. rows: its activities, those between two passes
    counted to the first. same_work: only passes and kernels whose shapes are
    the same on all ranks. differing: kernels (normalised names) that ranks call differently often
    in passes of equal rows, with the number of calls of each rank. given: its waits, if known.
    """

    table: KernelTable
    rows: Rows
    passes: Passes
    cells: GroupCells
    same_work: GroupCells
    differing: tuple[tuple[str, tuple[float, ...]], ...] = ()
    given: Waits | None = None

    @cached_property
    def waited(self) -> Waits:
        """The waits in collectives, by the numbers of its passes."""
        return self.given or _of_ranks(waits(self.table), self.passes.group)


def sync_passes(table: KernelTable, waited: Sequence[Waits] = ()) -> tuple[SyncGroup, ...]:
    """The sync groups of at least two ranks, in the order of the table.

    waited: `waits(table)`, if already computed.
    """
    groups = [group for group in sync_groups(table.ranks) if len(group.ranks) > 1]
    if not groups or step_spans(table).empty:
        return ()
    synced = (_sync_group(table, group) for group in groups)
    return tuple(
        replace(each, given=_of_ranks(waited, each.passes.group))
        if waited and each.table is table
        else each
        for each in synced
    )


def _of_ranks(waited: Sequence[Waits], group: RankGroup) -> Waits:
    return next(each for each in waited if each.group.ranks == group.ranks)


def is_without_peers(table: KernelTable) -> bool:
    """Whether no rank has a peer with its input, while ranks meet or are replicas."""
    if any(len(group.ranks) > 1 for group in work_groups(table.ranks)):
        return False
    meet = any(len(group.ranks) > 1 for group in sync_groups(table.ranks))
    return meet or bool(replicas(table.ranks))


def _sync_group(table: KernelTable, group: RankGroup) -> SyncGroup:
    alignment = aligned(table, group.ranks)
    table = renumbered(table, alignment)
    rows = _with_tails(rows_of(table))
    passes, cells = whole_passes(table, group, rows, alignment.reason)
    static = np.isin([category for category, _ in rows.kernels], STATIC)
    narrowed = rows.of_kernels(static)
    same = cells_of_steps(group, narrowed, passes.steps(passes.has_same_rows))
    is_equal, differing = equal_calls(same)
    if not is_equal.all():
        at = np.flatnonzero(passes.has_same_rows)[is_equal]
        chosen = np.zeros(len(passes.numbers), bool)
        chosen[at] = True
        same = cells_of_steps(group, narrowed, passes.steps(chosen))
    return SyncGroup(table, rows, passes, cells, same, differing)


def _with_tails(rows: Rows) -> Rows:
    """The activities with those between two passes counted to the first of them.

    SGLang's span of a pass ends before the next tokens are sampled. Self times are left as they
    are: between passes the CPU also waits.
    """
    if not rows.is_timeline:
        return rows
    step = rows.step.copy()
    for rank in range(len(rows.ranks)):
        at = np.flatnonzero(rows.rank == rank)
        at = at[np.argsort(rows.start[at], kind="stable")]
        numbers = step[at]
        inside = np.flatnonzero(numbers >= 0)
        if not len(inside):
            continue
        latest = np.maximum.accumulate(np.where(numbers >= 0, np.arange(len(at)), -1))
        between = (numbers < 0) & (latest >= 0) & (np.arange(len(at)) < inside[-1])
        step[at[between]] = numbers[latest[between]]
    return replace(rows, step=step)


def whole_passes(
    table: KernelTable, group: RankGroup, rows: Rows, unaligned: str = ""
) -> tuple[Passes, GroupCells]:
    """The passes of a group that no edge of the window cuts off, and their times.

    rows: of the table. unaligned: see `passes_of`.
    """
    passes = passes_of(table, group, unaligned)
    cells = cells_of_steps(group, rows, passes.steps())
    if len(passes.numbers) > 2:
        whole = _whole(passes, cells)
        if not whole.all():
            passes = _take(passes, whole, cut=int((~whole).sum()))
            cells = cells_of_steps(group, rows, passes.steps())
    return passes, cells


def passes_of(table: KernelTable, group: RankGroup, unaligned: str = "") -> Passes:
    """The passes of a group by their numbers. unaligned: why these mean nothing; then none."""
    spans = step_spans(table)
    spans = spans[spans["rank"].isin(list(group.ranks))]
    every = spans.groupby("step", sort=True)["rank"].nunique()
    unlike = spans.loc[spans["excluded"], "step"].unique()
    common = every[every == len(group.ranks)].index
    numbers = common[~common.isin(unlike)].to_numpy(np.int64)
    reason = _who_had_none(table, group) or unaligned
    if not reason and not len(numbers):
        reason = f"no pass was recorded on all of {', '.join(group.ranks)}"
    if reason:
        numbers = numbers[:0]
    steps = table.steps[table.steps["rank"].isin(list(group.ranks))]
    steps = steps.drop_duplicates(["rank", "step"])
    values = {
        name: step_matrix(steps, name, numbers.tolist(), group.ranks)
        for name in ("batch_size", "tokens", "kv_tokens", "query_keys", "graph_share")
    }
    local = _local(steps, numbers, group.ranks)
    idle = local == "IDLE"
    batch, tokens, kv, pairs = (
        np.where(idle, 0, values[name]).astype(np.int64)
        for name in ("batch_size", "tokens", "kv_tokens", "query_keys")
    )
    is_graph = _is_graph(values["graph_share"], table.settings, batch)
    extends: Mask = np.isin(local, PREFILLS).max(axis=1, initial=False)
    rows = _rows(batch, tokens, is_graph, extends, table.settings)
    kinds = tuple(_kind(local[at], bool(is_graph[at] == 1)) for at in range(len(numbers)))
    return Passes(
        group=group,
        numbers=numbers,
        kinds=kinds,
        local=local,
        batch=batch,
        tokens=tokens,
        kv_tokens=kv,
        query_keys=pairs,
        rows=rows,
        has_same_rows=_has_same(rows) | _is_gathered(is_graph, table.settings),
        expert_tokens=_expert_tokens(table.experts, numbers, group.ranks),
        settings=table.settings,
        missing=int((every < len(group.ranks)).sum()),
        excluded=len(common) - len(numbers) if not reason else 0,
        reason=reason,
    )


def _who_had_none(table: KernelTable, group: RankGroup) -> str:
    """The ranks without a pass; "" if all have one."""
    with_any = set(table.steps["rank"].astype(object))
    silent = [rank for rank in group.ranks if rank not in with_any]
    if not silent:
        return ""
    who = group.label if group.label and len(silent) == len(group.ranks) else ", ".join(silent)
    return "; ".join(filter(None, (never_meet(table.ranks), f"{who} had no pass")))


def _local(steps: pd.DataFrame, numbers: Ints, ranks: Sequence[str]) -> Texts:
    """What each rank does in each pass, shape (passes, ranks)."""
    words = np.full((len(numbers), len(ranks)), "", object)
    row, column, inside = matrix_places(numbers, ranks, steps["step"], steps["rank"])
    stage = steps["stage"].astype(object).map(_WORD_OF).fillna("")
    word = steps["substage"].astype(object) if "substage" in steps else stage
    words[row, column] = word.where(word != "", stage).to_numpy()[inside]
    return words


_WORD_OF = {"decode": "DECODE", "prefill": "EXTEND", "mixed": "MIXED", "idle": "IDLE"}


def _kind(local: Texts, is_graph: bool) -> PassKind:
    words = {str(word) for word in local} - {"IDLE"}
    if not words:
        return "idle"
    if "" in words:
        return "unknown"
    if any(word.startswith("DRAFT") for word in words):
        return "draft"
    prefills = {word for word in words if word in PREFILLS}
    if prefills:
        return "prefill" if words == prefills and "MIXED" not in words else "prefill beside decode"
    if any("VERIFY" in word for word in words):
        return "verify"
    return "decode" if is_graph else "eager decode"


def _is_graph(shares: npt.NDArray[np.float64], settings: PassSettings | None, batch: Ints) -> Ints:
    """Whether a pass replays a graph: 1 or 0, -1 where not known; shape (passes,)."""
    known = np.full(len(shares), UNKNOWN, np.int64)
    if settings is not None and settings.graphs is not None:
        known[:] = int(settings.graphs)
        if settings.graphs and settings.capture_sizes:
            known[batch.max(axis=1, initial=0) > max(settings.capture_sizes)] = 0
    is_recorded = (shares >= 0).any(axis=1)
    known[is_recorded] = (shares[is_recorded].max(axis=1) > GRAPH_SHARE).astype(np.int64)
    return known


def _rows(
    batch: Ints, tokens: Ints, is_graph: Ints, extends: Mask, settings: PassSettings | None
) -> Ints:
    """The rows that shape-static kernels compute on each rank, shape (passes, ranks).

    With a graph: the batch that was captured, of the largest batch of all ranks or, in the local
    regime, of the rank's own. Without: the rank's own new tokens, but in the gather regime, where
    no rank extends, those of the rank with most, unless that doubles the rows of all
    (`DpPaddingMode.get_dp_padding_mode`). Where the regime or whether a graph is replayed is not
    known, rows are known only if all ranks have the same batch.
    """
    regime = settings.regime if settings is not None else None
    sizes = settings.capture_sizes if settings is not None else ()
    ranks = batch.shape[1]
    needed, eager = batch, tokens.copy()
    if regime == "gather":
        needed = np.broadcast_to(batch.max(axis=1, initial=0)[:, None], batch.shape)
        most = tokens.max(axis=1, initial=0)
        is_padded = ~extends & (tokens >= 0).all(axis=1) & (2 * tokens.sum(axis=1) >= most * ranks)
        eager[is_padded] = most[is_padded, None]
    padded = needed
    if sizes:
        known = np.array([*sorted(sizes), UNKNOWN], np.int64)
        padded = np.where(needed < 0, UNKNOWN, known[np.searchsorted(known[:-1], needed)])
    rows: Ints = np.where((is_graph == 1)[:, None], padded, eager)
    is_alike = (batch >= 0).all(axis=1) & (batch == batch[:, :1]).all(axis=1)
    if regime is None:
        rows[(is_graph == 1) & ~is_alike] = UNKNOWN
    is_unsure = is_graph == UNKNOWN
    rows[is_unsure] = np.where((is_alike & ~extends)[is_unsure, None], tokens[is_unsure], UNKNOWN)
    return rows


def _expert_tokens(experts: pd.DataFrame, numbers: Ints, ranks: Sequence[str]) -> Ints:
    """Tokens of the experts of each rank in each pass, shape (passes, ranks); -1 if unknown."""
    tokens = np.full((len(numbers), len(ranks)), UNKNOWN, np.int64)
    experts = experts[experts["step"] >= 0]
    row, column, inside = matrix_places(numbers, ranks, experts["step"], experts["rank"])
    tokens[np.unique(row)] = 0  # a rank whose experts got none in a recorded pass
    np.add.at(tokens, (row, column), experts["tokens"].to_numpy(np.int64)[inside])
    return tokens


def _take(passes: Passes, chosen: Mask, *, cut: int) -> Passes:
    shaped = (
        "numbers",
        "local",
        "batch",
        "tokens",
        "kv_tokens",
        "query_keys",
        "rows",
        "has_same_rows",
        "expert_tokens",
    )
    kinds = tuple(kind for kind, keep in zip(passes.kinds, chosen, strict=True) if keep)
    return replace(
        passes,
        kinds=kinds,
        cut=cut,
        **{name: getattr(passes, name)[chosen] for name in shaped},
    )


def _whole(passes: Passes, cells: GroupCells) -> Mask:
    """Passes that are not cut off at an edge of the window, shape (passes,).

    Cut: a rank has clearly fewer kernels than it usually has in passes of that kind.
    """
    every = np.ones(len(cells.kernels), bool)
    counts = cells.count_matrix(every).astype(np.float64)
    whole = np.ones(len(counts), bool)
    inner = np.arange(1, len(counts) - 1)
    for edge in (0, len(counts) - 1):
        alike = inner[[passes.kinds[at] == passes.kinds[edge] for at in inner]]
        if len(alike):
            usual = np.median(counts[alike], axis=0)
            whole[edge] = not (counts[edge] < WHOLE_STEP_SHARE * usual).any()
    return whole


def _has_same(rows: Ints) -> Mask:
    same: Mask = (rows >= 0).all(axis=1) & (rows == rows[:, :1]).all(axis=1)
    return same


def _is_gathered(is_graph: Ints, settings: PassSettings | None) -> Mask:
    """Passes in which all ranks replay the graph of one batch, whichever it is."""
    if settings is None or settings.regime != "gather":
        return np.zeros(len(is_graph), bool)
    gathered: Mask = is_graph == 1
    return gathered


def why_other_work(scope: str, kernel: str) -> str:
    """Why ranks with different input cannot be compared in a scope; "" if they can."""
    if kernel or scope in ("compute", "all", *STATIC):
        return ""
    return (
        f"{scope} has other work on each rank; across sync the slowdown of {', '.join(STATIC)} "
        "is judged"
    )


MANY_DIFFER = 0.5  # of the passes: then ranks do not run the same kernels at all
MAX_DIFFERING = 5


def equal_calls(
    cells: GroupCells,
) -> tuple[Mask, tuple[tuple[str, tuple[float, ...]], ...]]:
    """Passes in which all ranks call each shape-static kernel equally often; what differs.

    What differs in most passes is no accident of one pass: its kernels are named, with the calls
    a pass of each rank.
    """
    length = len(cells.steps.numbers)
    equal = np.ones(length, bool)
    differing: list[tuple[float, str, tuple[float, ...]]] = []
    for at, (_, name) in enumerate(cells.kernels):
        chosen = np.zeros(len(cells.kernels), bool)
        chosen[at] = True
        calls = cells.count_matrix(chosen)
        differs = np.ptp(calls, axis=1) > 0 if len(calls) else np.zeros(0, bool)
        if not differs.any():
            continue
        equal &= ~differs
        if differs.mean() >= MANY_DIFFER:
            mean = calls.mean(axis=0)
            differing.append((float(np.ptp(mean)), name, tuple(mean.tolist())))
    differing.sort(key=lambda each: (-each[0], each[1]))
    return equal, tuple((name, calls) for _, name, calls in differing[:MAX_DIFFERING])
