"""Read the files of a window into one kernel table.

`read_window` finds the files and asks the reader of each (`_trace.paths.READERS`) for the
activities of its ranks; `build_table` joins those of all ranks into one table.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from pytest_sglprof._errors import TraceError
from pytest_sglprof._limits import matching
from pytest_sglprof._ranks import rank_order
from pytest_sglprof._trace.categories import categories_of, words
from pytest_sglprof._trace.completeness import comparable, refuse_unrecorded
from pytest_sglprof._trace.kernel_names import normalise
from pytest_sglprof._trace.one_window import by_force, copies, different_runs, facts_of_run
from pytest_sglprof._trace.passes import DRAFTS, EPOCH
from pytest_sglprof._trace.paths import (
    Activities,
    Reader,
    ReadOptions,
    given_labels,
    is_reduced,
    reader_of,
    window_files,
)
from pytest_sglprof._trace.reduced import beside_of
from pytest_sglprof._trace.steps import StepIndex
from pytest_sglprof._trace.table import (
    COLUMNS,
    GPU,
    NO_STEP,
    UNKNOWN_STAGE,
    Ints,
    KernelTable,
    RankActivities,
    Step,
    collective_frame,
    step_frame,
)
from pytest_sglprof._trace.torch.collect import Interner
from pytest_sglprof._trace.torch.events import COMMUNICATION


def read_window(
    paths: str | Path | Sequence[str | Path],
    *,
    pid_ranks: Mapping[int, str] | None = None,
    gpu_ranks: Mapping[int, str] | None = None,
    file_ranks: Mapping[str, str] | None = None,
    allow_partial: bool = False,
    settle_s: float = 0.0,
    patterns: Sequence[tuple[str, str]] = (),
    step_delimiter: str = "",
    nsys: str | None = None,
    processes: int | None = None,
    launches: bool = True,
    force: bool = False,
    executor: Executor | None = None,
) -> KernelTable:
    """Reads traces, reports, exports, or folders of them into one `KernelTable`.

    pid_ranks, gpu_ranks: the rank of a process id, else of a device, for nsys reports.
    file_ranks: that of a file (its name, its path, or the end of it) whose rank nothing tells;
    an nsys report of several ranks takes the name of its node.
    allow_partial: whether to read what is left of a truncated trace; the table is then
    `partial`. settle_s: seconds to drop from the front. patterns: (category, regex) tried
    before the built-in ones. step_delimiter: regex of the kernel that begins a step, for
    sources without step markers; "" for none. nsys: the command that exports `.nsys-rep`.
    processes: how many processes read at most, this one included. launches: whether to read the
    calls that launch kernels and the numbers of collectives. Without them it is not known
    whether kernels are missing, and those of some torch traces have no step. force: whether to
    compare ranks of which something says that they are not of one window; a note then says what.
    executor: whose workers read the files, with `paths` as they see them, and send back what
    figures need; this process by default.

    Raises `TraceError` (`NotATrace`, `TraceTruncated`, `NoKernels`), naming the file or the
    rank, and what to do.
    """
    options = ReadOptions(
        pid_ranks=pid_ranks or {},
        gpu_ranks=gpu_ranks or {},
        allow_partial=allow_partial,
        nsys=nsys,
        processes=processes,
        launches=launches,
    )
    with ExitStack() as meanwhile:
        if executor is not None:
            from pytest_sglprof._trace.tasks import gathered

            given = [paths] if isinstance(paths, str | Path) else paths
            files = gathered(given, executor, options, file_ranks=file_ranks)
            paths, file_ranks = meanwhile.enter_context(files).paths, None
        listed, parts = read_parts(paths, options, file_ranks)
        besides = [beside_of(file) for file in listed if is_reduced(file)]
    return build_table(
        parts,
        settle_s=max([settle_s, *(each.settle_s for each in besides)]),
        patterns=patterns,
        step_delimiter=step_delimiter,
        unlike=[*copies(listed), *(why for each in besides for why in each.unlike)],
        force=force,
    )


def read_parts(
    paths: str | Path | Sequence[str | Path],
    options: ReadOptions,
    file_ranks: Mapping[str, str] | None = None,
) -> tuple[list[Path], Activities]:
    """The files of a window, and the activities of the ranks in each; see `read_window`."""
    listed = window_files(paths)
    options = replace(options, file_ranks=given_labels(listed, file_ranks or {}))
    files: dict[Reader, list[Path]] = {}
    for file in listed:
        files.setdefault(reader_of(file), []).append(file)
    return listed, [part for reader, same in files.items() for part in reader.read(same, options)]


def build_table(
    parts_by_file: list[tuple[Path, RankActivities]],
    *,
    settle_s: float = 0.0,
    patterns: Sequence[tuple[str, str]] = (),
    step_delimiter: str = "",
    unlike: Sequence[str] = (),
    force: bool = False,
) -> KernelTable:
    """Joins the activities of all ranks. unlike: why they are not of one window, so far.

    Raises `TraceError` for a rank that is in two files, `NoKernels` for one whose kernels were
    not recorded.
    Empties `parts_by_file`, so that activities are not held twice for longer than necessary.
    """
    files = tuple(dict.fromkeys(str(file) for file, _ in parts_by_file))
    refuse_unrecorded(parts_by_file)
    merged = joined(parts_by_file)
    parts_by_file.clear()
    source, parts, left_out = one_source(merged)
    parts, by_repetition = with_repetition(parts, step_delimiter)
    ranks = rank_order({activities.rank for activities in merged})
    parts.sort(key=lambda part: ranks.index(part.rank))
    unlike, run = [*unlike, *different_runs(parts)], facts_of_run(parts)
    parts, lost, missing, front = comparable(parts)
    steps = [(part.rank, step) for part in parts for step in part.steps]
    notes = list(dict.fromkeys([*(note for part in merged for note in part.notes), *left_out]))
    notes += [*by_repetition, *lost, *(by_force(unlike) if force else ())]
    partial = any(part.partial for part in merged)
    hosts = {part.rank: part.host for part in merged if part.host}
    del merged
    collectives = collective_frame([(len(part.start), part.calls) for part in parts])
    frame = _frame(parts, ranks, patterns)
    settled = 0
    if settle_s > 0 and len(frame):
        frame, steps, settled, note = _settle(frame, steps, settle_s)
        notes.append(note)
        left = pd.Series(np.arange(len(frame)), index=frame.index)
        collectives = collectives.set_axis(left.reindex(collectives.index), axis=0)
        collectives = collectives[collectives.index.notna()]
        frame = frame.reset_index(drop=True)
    return KernelTable(
        frame=frame,
        ranks=ranks,
        steps=step_frame(steps, ranks),
        source=source,
        partial=partial,
        notes=tuple(notes),
        files=files,
        collectives=collectives,
        settled=settled,
        incomparable="; ".join(filter(None, [*(() if force else unlike), missing])),
        front=front,
        hosts=hosts,
        run=run,
    )


def _frame(
    parts: list[RankActivities], ranks: Sequence[str], patterns: Sequence[tuple[str, str]]
) -> pd.DataFrame:
    """One row for each activity. Empties `parts`: each is freed once its rows are copied."""
    full_names, kinds, stages = Interner(), Interner(), Interner({UNKNOWN_STAGE: 0})
    size = sum(len(part.start) for part in parts)
    numbers = {key: np.empty(size, np.int64) for key in ("step", "stream", "start_ns", "dur_ns")}
    rank = np.empty(size, np.int16)
    full = np.empty(size, np.int32)
    kind = np.empty(size, np.int8)
    stage = np.empty(size, np.int16)
    end = 0
    while parts:
        part = parts.pop(0)
        rows = slice(end, end := end + len(part.start))
        rank[rows] = ranks.index(part.rank)
        full[rows] = _codes(full_names, part.names)[part.name_codes]
        kind[rows] = _codes(kinds, part.kinds)[part.kind_codes]
        stage[rows] = _stages(part, stages)
        numbers["step"][rows], numbers["stream"][rows] = part.step, part.stream
        numbers["start_ns"][rows], numbers["dur_ns"][rows] = part.start, part.dur
    categories = categories_of(full_names, patterns)
    texts = {
        "rank": pd.Categorical.from_codes(rank, categories=pd.Index(list(ranks)), ordered=True),
        "name": _mapped_text(full, [normalise(name) for name in full_names]),
        "full_name": pd.Categorical.from_codes(full, categories=pd.Index(list(full_names))),
        "category": _mapped_text(full, [_category(name, categories[name]) for name in full_names]),
        "kind": pd.Categorical.from_codes(kind, categories=pd.Index(list(kinds))),
        "stage": pd.Categorical.from_codes(stage, categories=pd.Index(list(stages))),
    }
    columns: dict[str, Any] = {**texts, **numbers}
    return pd.DataFrame({key: columns[key] for key in COLUMNS}, copy=False)


def _codes(numbers: Interner, texts: Sequence[str]) -> Ints:
    return np.array([numbers[text] for text in texts], dtype=np.int64)


def _category(name: str, category: str) -> str:
    return "communication" if name.startswith(COMMUNICATION) else category


def _mapped_text(codes: Any, texts: Sequence[str]) -> Any:
    """A categorical of `texts[code]`; equal texts become one category."""
    unique = Interner()
    numbers = _codes(unique, texts).astype(np.int32)
    return pd.Categorical.from_codes(numbers[codes], categories=pd.Index(list(unique)))


def _stages(part: RankActivities, stages: Interner) -> Ints:
    """The code of each activity's stage; outside of steps that of `UNKNOWN_STAGE`."""
    at = StepIndex(part.steps).numbered(part.step)
    codes = np.full(len(part.step), stages[UNKNOWN_STAGE], dtype=np.int64)
    codes[at >= 0] = _codes(stages, [step.stage for step in part.steps])[at[at >= 0]]
    return codes


def _settle(
    frame: pd.DataFrame, steps: list[Any], seconds: float
) -> tuple[Any, list[Any], int, str]:
    """The remaining activities and steps, the number of dropped steps, and a note."""
    starts = [step.start_ns for _, step in steps] or [int(frame["start_ns"].min())]
    edge = min(starts) + round(seconds * 1e9)
    kept = [(rank, step) for rank, step in steps if step.start_ns >= edge]
    early = {(rank, step.step) for rank, step in steps if step.start_ns < edge}
    drop = frame["start_ns"] < edge
    if early:
        pairs = zip(frame["rank"], frame["step"], strict=True)
        drop |= pd.Series([pair in early for pair in pairs], index=frame.index, dtype=bool)
    settled = len({number for _, number in early})
    note = f"settle: dropped the first {seconds:g} s, {settled} steps, {int(drop.sum())} activities"
    return frame.loc[~drop], kept, settled, note


# Combine the files of one window: one file for each rank, one numbering of steps, one source.

_STAGE_PART = re.compile(r"-(EXTEND|DECODE)(?=\.)")


def joined(parts_by_file: Sequence[tuple[Path, RankActivities]]) -> list[RankActivities]:
    """All parts of a window, with step numbers that mean the same on every rank.

    A window by stage has two files for each rank: steps of the second stage are numbered after
    those of the first. Raises `TraceError` for a rank that is in two files otherwise.
    """
    refuse_twice([(file, part.rank) for file, part in parts_by_file])
    parts = _one_numbering([part for _, part in parts_by_file])
    stages = [_stage(file) for file, _ in parts_by_file]
    offsets = _offsets(parts, stages)
    return [_moved(part, offsets[s]) for part, s in zip(parts, stages, strict=True)]


def one_source(
    parts: Sequence[RankActivities],
) -> tuple[str, list[RankActivities], list[str]]:
    """The table's source, the parts of that source (or without activities), and notes.

    The source is the GPU if any rank has GPU activities: the table of an idle rank is then
    empty instead of holding CPU operators. The notes name what was left out.
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


def refuse_twice(ranks_by_file: Sequence[tuple[Path, str]]) -> None:
    """Raises `TraceError` for a rank that is in two files, unless they are of two stages."""
    seen: dict[str, dict[str, Path]] = {}
    for file, rank in ranks_by_file:
        stage = _stage(file)
        files = seen.setdefault(rank, {})
        other = files.get(stage) or files.get("")
        if (
            not stage and files
        ):  # a file of all stages cannot belong to the window of files by stage
            other = next(iter(files.values()))
        if other is not None:
            where = (
                f"is given twice: {file}"
                if other == file
                else f"is in two files: {other.name} and {file.name}"
            )
            raise TraceError(
                f"rank {rank} {where}",
                expected="one file for each rank, all of one window",
                hint="give the files of one window only, each once; where the names hide that they "
                "are of several ranks, name these: --rank FILE=LABEL",
            )
        files[stage] = file


def _one_numbering(parts: Sequence[RankActivities]) -> list[RankActivities]:
    """Numbers the steps of all ranks by forward id, or else of all ranks by order, never mixed."""
    by_id = [any(s.forward_id >= 0 for s in part.steps) for part in parts if part.steps]
    if not any(by_id):
        return list(parts)
    if not all(by_id):
        return [_renumbered(part, range(len(part.steps))) for part in parts]
    parts = _one_count_of_epochs(parts)
    starts: dict[int, list[int]] = {}
    for part in parts:
        for step in part.steps:
            starts.setdefault(step.step, []).append(step.start_ns)
    if max(starts) < DRAFTS:
        return list(parts)
    # Target and draft model take turns, so their steps are numbered in the order they ran.
    ordered = sorted(starts, key=lambda key: (sum(starts[key]) / len(starts[key]), key))
    number_of = {key: number for number, key in enumerate(ordered)}
    return [_renumbered(part, [number_of[step.step] for step in part.steps]) for part in parts]


def _one_count_of_epochs(parts: Sequence[RankActivities]) -> list[RankActivities]:
    """The parts with equal epochs of one number: a window that opened late may lack the first.

    Passes of one number that are one begin at about the same moment; those of two epochs do not.
    """
    if max(step.step for part in parts for step in part.steps) < EPOCH:
        return list(parts)
    numbers = [np.array([step.step for step in part.steps], np.int64) for part in parts]
    starts = [np.array([step.start_ns for step in part.steps], np.int64) for part in parts]
    for draft in (0, 1):
        rows = [np.flatnonzero(each % EPOCH // DRAFTS == draft) for each in numbers]
        epochs = [np.unique(each[at] // EPOCH) for each, at in zip(numbers, rows, strict=True)]
        most = max(range(len(parts)), key=lambda place: len(epochs[place]))
        if len(epochs[most]) < 2:
            continue
        known = dict(zip(numbers[most][rows[most]], starts[most][rows[most]], strict=True))
        late = [
            _epochs_late(each[at], start[at], known, len(epochs[most]))
            for each, start, at in zip(numbers, starts, rows, strict=True)
        ]
        for each, at, epoch in zip(numbers, rows, late, strict=True):
            each[at] += (epoch - min(late)) * EPOCH
    return [_renumbered(part, new.tolist()) for part, new in zip(parts, numbers, strict=True)]


def _epochs_late(numbers: Ints, starts: Ints, known: Mapping[int, int], epochs: int) -> int:
    """How many epochs after that of `known` (number -> start, ns) these numbers begin."""
    apart: list[tuple[float, int]] = []
    for late in range(1 - epochs, epochs):
        shared = [
            abs(start - known[number])
            for number, start in zip(
                (numbers + late * EPOCH).tolist(), starts.tolist(), strict=True
            )
            if number in known
        ]
        if shared:
            apart.append((float(np.median(shared)), late))
    return min(apart, default=(0.0, 0))[1]


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


MIN_REPETITIONS = 3
FEW_OF = 4  # a quarter of the most kernels between two samplings is few: those of one pass


# Without a delimiter, a repetition is searched in at most so many kernels (0.1 KB for each).
MAX_KERNELS = 2_000_000
_SAMPLES = re.compile(r"\b(sampling|arg ?max|multinomial|top ?p|min ?p)\b")


@dataclass(frozen=True)
class _Stream:
    """The kernels of a rank's main stream in order. keys: numbers of a table of all ranks."""

    start: Ints
    end: Ints
    keys: Ints


def with_repetition(
    parts: Sequence[RankActivities], delimiter: str = ""
) -> tuple[list[RankActivities], list[str]]:
    """The parts with steps by repetition, or unchanged, and a note that says why.

    Only for GPU activities, and only if no rank has step markers. delimiter: a regular
    expression; a kernel whose full name it matches begins a step. Raises what `matching` does.
    """
    active = [part for part in parts if len(part.start)]
    if not active or any(part.steps for part in parts) or not active[0].is_timeline:
        return list(parts), []
    if not delimiter and sum(len(part.start) for part in active) > MAX_KERNELS:
        note = f"no steps: a window with more than {MAX_KERNELS:,} kernels is not searched"
        return list(parts), [f"{note} for a repetition; set step_delimiter to find steps"]
    names = list(dict.fromkeys(name for part in active for name in part.names))
    keys = {name: normalise(name) for name in names}
    number = {key: n for n, key in enumerate(dict.fromkeys(keys.values()))}
    streams = [_main_stream(part, {name: number[keys[name]] for name in names}) for part in active]
    if delimiter:
        matches = matching(delimiter, names, f"the step delimiter {delimiter!r}")
        begins = {number[keys[name]] for name in matches}
        cuts = [np.flatnonzero(np.isin(stream.keys, list(begins))) for stream in streams]
        how = f"the kernel /{delimiter}/ that begins each"
    else:
        samplers = {n for key, n in number.items() if _SAMPLES.search(words(key))}
        cuts, how = _derived(streams, samplers)
        if not cuts:
            return list(parts), []
    steps, doubt = _steps(streams, cuts)
    if doubt:
        return list(parts), [f"no steps by {how}: {doubt}"]
    steps_by_rank = iter(steps)
    whole = [_assigned(part, next(steps_by_rank)) if len(part.start) else part for part in parts]
    return whole, [f"steps are {len(steps[0])} repetitions: found by {how}, without step markers"]


def _main_stream(part: RankActivities, number: dict[str, int]) -> _Stream:
    """The stream with the most kernels, without copies and sets, which differ between steps."""
    kernel = part.kinds.index("kernel") if "kernel" in part.kinds else -1
    rows = np.flatnonzero(part.kind_codes == kernel)
    if len(rows):
        streams, counts = np.unique(part.stream[rows], return_counts=True)
        rows = rows[part.stream[rows] == streams[np.argmax(counts)]]
    rows = rows[np.argsort(part.start[rows], kind="stable")]
    numbers = np.array([number[name] for name in part.names], dtype=np.int64)
    start = part.start[rows]
    return _Stream(start, start + part.dur[rows], numbers[part.name_codes[rows]])


def _derived(streams: Sequence[_Stream], samplers: set[int]) -> tuple[list[Ints], str]:
    """Where each step begins on each rank, [] if nothing tells; and what tells it."""
    if cuts := _cycles(streams, samplers):
        return cuts, "the sequence of kernels, which repeats exactly on every rank"
    return _samplings(streams, samplers) or [], "the sampling of tokens, which ends each"


def _cycles(streams: Sequence[_Stream], samplers: set[int]) -> list[Ints] | None:
    """Where each repetition begins on each rank; None unless all ranks repeat the same cycle."""
    first = streams[0]
    period = _period(first.keys)
    if period is None or any(_period(stream.keys) != period for stream in streams):
        return None
    cycle = first.keys[:period]
    if sum(int(key) in samplers for key in cycle) != 1:
        return None
    # A pass begins after the longest pause of the stream.
    gaps = first.start[1:] - first.end[:-1]
    whole = len(gaps) // period * period
    typical = np.median(gaps[:whole].reshape(-1, period), axis=0)
    phase = (int(np.argmax(typical)) + 1) % period
    begin = np.roll(cycle, -phase)
    cuts = []
    for stream in streams:
        turns = [n for n in range(period) if np.array_equal(stream.keys[n : n + period], begin)]
        if len(turns) != 1:
            return None
        cuts.append(np.arange(turns[0], len(stream.keys) + 1, period))
    return cuts


def _samplings(streams: Sequence[_Stream], samplers: set[int]) -> list[Ints] | None:
    """The kernels after each sampling of tokens; None where a rank samples too seldom.

    One sampling may be several kernels, with few others between them. Where that is wrong, ranks
    are compared in other parts of a pass, or of several, but still in the same parts: `_steps`
    sees to it. One rank alone has no such check.
    """
    if len(streams) < 2:
        return None
    cuts = []
    for stream in streams:
        at = np.flatnonzero(np.isin(stream.keys, list(samplers)))
        if len(at) <= MIN_REPETITIONS:
            return None
        distances = np.diff(at)
        is_last = distances * FEW_OF > distances.max()
        cuts.append(np.append(at[:-1][is_last], at[-1]) + 1)
    return cuts


def _period(keys: Ints) -> int | None:
    """The shortest distance at which the whole sequence repeats, at least three times."""
    listed = keys.tolist()
    borders = [0] * len(listed)  # of each prefix, as in Knuth, Morris and Pratt's string search
    border = 0
    for n in range(1, len(listed)):
        while border and listed[n] != listed[border]:
            border = borders[border - 1]
        border += listed[n] == listed[border]
        borders[n] = border
    period = len(listed) - border
    return period if listed and len(listed) >= MIN_REPETITIONS * period else None


def _steps(streams: Sequence[_Stream], cuts: Sequence[Ints]) -> tuple[list[list[Step]], str]:
    """The steps between cuts, aligned across ranks by time; or a reason why there are none."""
    spans: list[list[tuple[int, int]]] = []
    for cut in cuts:
        spans.append(list(zip(cut[:-1].tolist(), cut[1:].tolist(), strict=True)))
    if min(len(pairs) for pairs in spans) < MIN_REPETITIONS:
        return [], f"there are fewer than {MIN_REPETITIONS} of them on some rank"
    begins = [
        [int(stream.start[a]) for a, _ in pairs]
        for stream, pairs in zip(streams, spans, strict=True)
    ]
    lengths = np.diff(np.array(begins[0]))
    half = int(np.median(lengths)) // 2
    latest = max(pairs[0] for pairs in begins)
    for pairs, times in zip(spans, begins, strict=True):
        early = sum(time < latest - half for time in times)
        del pairs[:early], times[:early]
    count = min(len(pairs) for pairs in spans)
    if count < MIN_REPETITIONS:
        return [], "the ranks' windows hardly overlap"
    steps: list[list[Step]] = [[] for _ in streams]
    for n in range(count):
        at = [times[n] for times in begins]
        if max(at) - min(at) > half // 2:  # else the neighbour would fit nearly as well
            return [], "the ranks do not run them at the same time"
        kernels = {
            stream.keys[slice(*pairs[n])].tobytes()
            for stream, pairs in zip(streams, spans, strict=True)
        }
        if len(kernels) > 1:
            return [], "the ranks run different kernels in them"
        for rank_steps, stream, pairs in zip(steps, streams, spans, strict=True):
            first, after = pairs[n]
            last = after < len(stream.start)
            end = int(stream.start[after]) if last else int(stream.end[after - 1])
            rank_steps.append(Step(n, UNKNOWN_STAGE, int(stream.start[first]), end))
    return steps, ""


def _assigned(part: RankActivities, steps: list[Step]) -> RankActivities:
    """All activities of the rank, also of other streams, by the time of their start."""
    return replace(part, steps=steps, step=StepIndex(steps).of(part.start))
