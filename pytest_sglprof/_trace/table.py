"""The kernel table, and the types from which every reader builds it.

A reader returns one `RankActivities` for each rank; `_trace.read` joins them into one
`KernelTable`, with one row for each activity and all times on one clock. Below them: look-ups
in sorted arrays, and the numbers of collectives.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING

import msgspec
import numpy as np
import numpy.typing as npt

from pytest_sglprof._server.log_lines import ServerFacts
from pytest_sglprof._server.sizes import PassSettings as PassSettings

if TYPE_CHECKING:
    import pandas as pd
    from numpy.typing import NDArray

    from pytest_sglprof._trace.completeness import Unrecorded
    from pytest_sglprof._trace.torch.events import Columns, FileFacts


TEXT_COLUMNS = ("rank", "name", "full_name", "category", "kind", "stage")
COLUMNS = (*TEXT_COLUMNS, "step", "stream", "start_ns", "dur_ns")
STEP_COLUMNS = (
    "rank",
    "step",
    "stage",
    "start_ns",
    "end_ns",
    "batch_size",
    "tokens",
    "forward_id",
    "substage",
    "padded_batch",
    "kv_tokens",
    "query_keys",
    "graph_share",
    "accept_length",
    "excluded",
)
_EXPERT_NUMBERS = {"step": np.int64, "layer": np.int32, "expert": np.int32, "tokens": np.int64}
EXPERT_COLUMNS = ("rank", *_EXPERT_NUMBERS)
_STEP_TEXTS = ("stage", "substage", "excluded")
_STEP_SHARES = ("graph_share", "accept_length")
GPU, CPU_OPERATORS, NVTX = "gpu", "cpu_op", "nvtx"  # sources
NO_STEP = -1
_GROUPED = 131_072  # rows that are grouped at once
UNKNOWN_STAGE = "unknown"


class Step(msgspec.Struct, frozen=True):
    """One forward pass of one rank. Times in ns; numbers are -1 where they are unknown.

    substage: SGLang's name of it (DECODE, VERIFY, DRAFT, EXTEND, ...), "" if unknown.
    padded_batch: the batch size of the CUDA graph that was replayed. kv_tokens: tokens in the
    KV cache that the batch attends to. query_keys: of each request its query tokens times its KV
    tokens, summed. graph_share: share of the step's kernels that are graph nodes, 0 to 1.
    accept_length: mean tokens accepted per request in a verify step.
    excluded: why the step must not be compared ("jit compilation"), "" if it may be.
    """

    step: int
    stage: str
    start_ns: int
    end_ns: int
    batch_size: int = -1
    tokens: int = -1
    forward_id: int = -1
    substage: str = ""
    padded_batch: int = -1
    kv_tokens: int = -1
    query_keys: int = -1
    graph_share: float = -1.0
    accept_length: float = -1.0
    excluded: str = ""

    def shifted(self, offset_ns: int) -> Step:
        """The same step on a clock that is `offset_ns` ahead."""
        return self.changed(start_ns=self.start_ns + offset_ns, end_ns=self.end_ns + offset_ns)

    def changed(self, **values: float | str) -> Step:
        """The same step with other values."""
        return msgspec.structs.replace(self, **values)


@dataclass(frozen=True)
class ExpertRows:
    """What the experts of one rank got: parallel columns, shape (rows,); see `KernelTable`."""

    rank: str
    step: NDArray[np.int64]
    layer: NDArray[np.int64]
    expert: NDArray[np.int64]
    tokens: NDArray[np.int64]


@dataclass(frozen=True)
class Launches:
    """Calls of one rank that launch kernels, in any order: parallel columns, shape (calls,).

    step: index of the step of the call, int64, -1 outside of steps. start: ns. recorded: number of
    kernels with its correlation id. is_graph: whether it launches a whole graph. graph: the id of
    that graph, 0 where it is not known.
    """

    step: NDArray[np.int64]
    start: NDArray[np.int64]
    recorded: NDArray[np.int64]
    is_graph: NDArray[np.bool_]
    graph: NDArray[np.int64]


@dataclass(frozen=True)
class RankActivities:
    """The activities of one rank in one file: parallel columns, shape (activities,).

    name_codes, kind_codes: indices into names (full, as recorded) and kinds. start, dur:
    int64 ns. step: the number of a `Step`, or `NO_STEP`. stream: -1 if unknown. source: `GPU`,
    `CPU_OPERATORS` or `NVTX`. notes: what was skipped, for the reader of the report. calls:
    collectives whose process group is known. launches: calls that launch kernels, None if they
    were not recorded or not read. unusable: number of kernels that were recorded but left out,
    since their times cannot be. run: what the file says of the run that recorded it, by the
    names of `torch.events.FACTS`; recording: the id of that profile, "" if it has none. clock_ns:
    what its times lack to those of the wall clock (ns since 1970), None if that is not known.
    unrecorded: why its kernels are missing. host: the machine that recorded it, "" if unknown.
    """

    rank: str
    names: Sequence[str]
    name_codes: NDArray[np.int64]
    kinds: Sequence[str]
    kind_codes: NDArray[np.int64]
    start: NDArray[np.int64]
    dur: NDArray[np.int64]
    stream: NDArray[np.int64]
    step: NDArray[np.int64]
    steps: Sequence[Step] = ()
    source: str = GPU
    notes: Sequence[str] = ()
    partial: bool = False
    calls: CollectiveCalls | None = None
    launches: Launches | None = None
    unusable: int = 0
    run: Mapping[str, str] = field(default_factory=dict)
    recording: str = ""
    clock_ns: int | None = 0
    unrecorded: Unrecorded | None = None
    host: str = ""

    @property
    def is_kernel(self) -> Flags:
        """Which activities are kernels, shape (activities,)."""
        if "kernel" not in self.kinds:
            return np.zeros(len(self.start), bool)
        chosen: Flags = self.kind_codes == self.kinds.index("kernel")
        return chosen

    @property
    def is_timeline(self) -> bool:
        """See `KernelTable.is_timeline`."""
        return self.source == GPU


@dataclass(frozen=True)
class KernelTable:
    """All activities of a window.

    frame: one row for each activity, with the columns `rank, name, full_name, category, kind,
    stage` (categorical text), `step, stream, start_ns, dur_ns` (int64; ns). step is `NO_STEP`
    outside of steps; equal numbers mean the same forward pass on every rank. kind is
    "kernel", "memcpy", "memset", "op", "range" or "collective".
    ranks: labels in rank order, including ranks without any activity. steps: one row for each
    rank and forward pass. source: "gpu", "cpu_op" (self time of CPU operators) or "nvtx" (self
    time of NVTX ranges). partial: whether a truncated file was read. notes: what was skipped,
    and how the files were read. files: the paths that were read. collectives: `process_group`
    and `operation` (categorical text), `sequence` and `group_size` (int64, -1 if unknown) of the
    activities for which the trace has them, indexed by row label of `frame`. settled: number of
    steps that were dropped because they began within the settle time. incomparable: why its
    ranks cannot be compared (kernels are missing, files of different runs); "" if they can.
    front: number of leading steps that are not compared, since a rank's kernels are missing in
    all of them. hosts: the machine of each rank of which it is known. settings: how the server
    ran its passes, None if nothing says so. experts: the rows of `EXPERT_COLUMNS`, one for each
    expert of a layer that a rank computed in a step (its `rank` and `step` as in `steps`; step is
    `NO_STEP` for the total of a window) with the tokens that it got; empty if not recorded.
    facts: what the server's log and metrics say about the window. run: what the files say of the
    run that recorded them, by the names of `torch.events.FACTS`; several values are joined by ", ".
    """

    __module__ = "pytest_sglprof"

    frame: pd.DataFrame
    ranks: tuple[str, ...]
    steps: pd.DataFrame
    source: str = GPU
    partial: bool = False
    notes: tuple[str, ...] = ()
    files: tuple[str, ...] = field(default=())
    collectives: pd.DataFrame = field(default_factory=lambda: collective_frame(()))
    settled: int = 0
    incomparable: str = ""
    front: int = 0
    hosts: Mapping[str, str] = field(default_factory=dict)
    settings: PassSettings | None = None
    experts: pd.DataFrame = field(default_factory=lambda: expert_frame(()))
    facts: ServerFacts = field(default_factory=ServerFacts)
    run: Mapping[str, str] = field(default_factory=dict)

    @property
    def is_timeline(self) -> bool:
        """Whether activities are intervals on a GPU; otherwise they are self times."""
        return self.source == GPU

    @property
    def has_idle_ranges(self) -> bool:
        """Whether activities outside of steps include the scheduler's loop, which also waits."""
        return self.source == NVTX

    @cached_property
    def places(self) -> Mapping[str, Ints]:
        """The activities of each rank: positions in `frame`, ascending."""
        rank = self.frame["rank"].astype("category").cat
        codes: Ints = rank.codes.to_numpy().astype(np.int64)
        places = places_of(codes, len(rank.categories))
        by_label = dict(zip(map(str, rank.categories), places, strict=True))
        return {label: by_label.get(label, np.zeros(0, np.int64)) for label in self.ranks}

    def by(self, *keys: str) -> pd.DataFrame:
        """Count and total time for each combination of `keys`.

        Columns: the keys, `count`, `total_ns` (int64). Ordered by rank where that is a
        key, then by total, largest first, then by the other keys.
        """
        sums = _sums(self.frame, list(keys))
        first = [key for key in keys if key == "rank"]
        rest = [key for key in keys if key != "rank"]
        texts = {key: sums[key].astype(str) for key in rest if key in TEXT_COLUMNS}
        ascending = [True] * len(first) + [False] + [True] * len(rest)
        order = sums.assign(**texts).sort_values([*first, "total_ns", *rest], ascending=ascending)
        result: pd.DataFrame = sums.loc[order.index].reset_index(drop=True)
        return result


def _sums(frame: pd.DataFrame, keys: list[str]) -> pd.DataFrame:
    """The keys, `count` and `total_ns`; in parts, since grouping needs 50 bytes for each row."""
    import pandas as pd

    parts = []
    for at in range(0, max(len(frame), 1), _GROUPED):
        grouped = frame.iloc[at : at + _GROUPED].groupby(keys, observed=True, sort=False)
        parts.append(grouped["dur_ns"].agg(count="size", total_ns="sum").reset_index())
    if len(parts) == 1:
        return parts[0]
    together = pd.concat(parts, ignore_index=True).groupby(keys, observed=True, sort=False)
    sums: pd.DataFrame = together[["count", "total_ns"]].sum().reset_index()
    return sums


def step_frame(steps: Sequence[tuple[str, Step]], ranks: Sequence[str]) -> pd.DataFrame:
    """The `steps` of a table: one row for each rank and step."""
    import pandas as pd

    values: dict[str, object] = {
        "rank": pd.Categorical([rank for rank, _ in steps], categories=list(ranks), ordered=True)
    }
    for name in STEP_COLUMNS[1:]:
        listed = [getattr(step, name) for _, step in steps]
        if name in _STEP_TEXTS:
            values[name] = pd.Categorical(listed)
        else:
            values[name] = np.asarray(listed, np.float64 if name in _STEP_SHARES else np.int64)
    return pd.DataFrame(values, columns=list(STEP_COLUMNS))


def expert_frame(parts: Sequence[ExpertRows], ranks: Sequence[str] = ()) -> pd.DataFrame:
    """The `experts` of a table of these ranks."""
    import pandas as pd

    lengths = [len(part.step) for part in parts]
    codes = np.repeat(np.array([ranks.index(part.rank) for part in parts], np.int16), lengths)
    values: dict[str, object] = {
        "rank": pd.Categorical.from_codes(codes, pd.Index(list(ranks)), ordered=True)
    }
    for name, kind in _EXPERT_NUMBERS.items():
        columns = [np.zeros(0, kind), *(np.asarray(getattr(part, name), kind) for part in parts)]
        values[name] = np.concatenate(columns)
    return pd.DataFrame(values, columns=list(EXPERT_COLUMNS))


# Look-ups that all readers need.

Ints = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]


def places_of(codes: Ints, number: int) -> list[Ints]:
    """Where each of the codes 0 … number - 1 stands, ascending: all at once, not one by one."""
    order = np.argsort(codes, kind="stable").astype(np.int64)
    edges = np.searchsorted(codes[order], np.arange(number + 1)).tolist()
    return [order[first:end] for first, end in pairwise(edges)]


def first_of(ids: Ints, wanted: Ints) -> Ints:
    """The first index of each of `wanted` in `ids` (ascending); -1 if it is not there."""
    if not len(ids):
        return np.full(len(wanted), -1, dtype=np.int64)
    at = np.searchsorted(ids, wanted).clip(max=len(ids) - 1)
    return np.where(ids[at] == wanted, at, -1)


def holding(starts: Ints, ends: Ints, times: Ints) -> Ints:
    """Which interval [start, end) holds each time; -1 for none.

    starts: ascending. Of overlapping intervals only the one that began last counts.
    """
    if not len(starts):
        return np.full(len(times), -1, dtype=np.int64)
    at = np.searchsorted(starts, times, side="right") - 1
    inside = (at >= 0) & (times < ends[at.clip(min=0)])
    return np.where(inside, at, -1)


# Which collective each call of a rank is: its process group, and its number in that group.

NO_SEQUENCE = -1
BOTH_WAYS = "send and receive"  # the operation of a call in which its rank does both


@dataclass(frozen=True)
class CollectiveCalls:
    """The activities of a rank whose process group is known; parallel columns.

    row: index of the activity. group: name of the process group, which torch.distributed
    assigns alike on every rank. sequence: number of the collective in its group, or
    `NO_SEQUENCE`. operation: what was asked for ("allreduce", "all_to_all"), "" if unknown.
    size: number of ranks in the group, -1 if unknown.
    """

    row: Ints
    group: Sequence[str]
    sequence: Ints
    operation: Sequence[str]
    size: Ints


def calls_of(
    columns: Columns, facts: FileFacts, sequences: Mapping[int, int]
) -> CollectiveCalls | None:
    """The calls in a file's columns. sequences: external id -> number, for kernels without."""
    if columns.call is None or columns.calls is None:
        return None
    row = np.flatnonzero(columns.call >= 0).astype(np.int64)
    at = columns.call[row]
    sequence = columns.calls.sequence[at].tolist()
    external = columns.calls.external[at].tolist()
    operation = columns.calls.operation[at].tolist()
    return CollectiveCalls(
        row=row,
        group=[facts.groups[code] for code in columns.calls.group[at].tolist()],
        sequence=numbered(sequence, external, sequences),
        operation=[facts.operations[code] for code in operation],
        size=columns.calls.size[at].astype(np.int64),
    )


def numbered(
    in_kernel: Sequence[int], external: Sequence[int], sequences: Mapping[int, int]
) -> Ints:
    """The number of each collective: from its kernel, else from its announcement."""
    pairs = zip(in_kernel, external, strict=True)
    numbers = [number if number >= 0 else sequences.get(key, NO_SEQUENCE) for number, key in pairs]
    return np.array(numbers, np.int64)


def collective_frame(parts: Sequence[tuple[int, CollectiveCalls | None]]) -> pd.DataFrame:
    """The `collectives` of a table. parts: (number of rows, calls) of each rank, in order."""
    import pandas as pd

    rows, sequences = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    sizes = [np.zeros(0, np.int64)]
    groups: list[str] = []
    operations: list[str] = []
    before = 0
    for size, calls in parts:
        if calls is not None:
            rows.append(calls.row + before)
            groups += calls.group
            sequences.append(calls.sequence)
            operations += calls.operation
            sizes.append(calls.size)
        before += size
    values = {
        "process_group": pd.Categorical(groups),
        "sequence": np.concatenate(sequences),
        "operation": pd.Categorical(operations),
        "group_size": np.concatenate(sizes),
    }
    return pd.DataFrame(values, index=pd.Index(np.concatenate(rows)))
