"""Steps where no source tells any: the kernels of forward passes repeat.

Two ways, both only where nothing is left to guess. With a delimiter kernel, a step reaches
from one to the next. Without, the sequence of a rank's main stream must repeat exactly from
its first kernel to its last, and each repetition must sample a token once: layers repeat as
well, and a part of one long prefill would otherwise look like many steps. In both ways every
rank must run the same sequence, at about the same time.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from pytest_sglprof._config.options import compiled
from pytest_sglprof._trace.categories import words
from pytest_sglprof._trace.kernel_names import normalise
from pytest_sglprof._trace.steps import StepIndex
from pytest_sglprof._trace.table import UNKNOWN_STAGE, Ints, RankActivities, Step

MIN_REPETITIONS = 3
# Kernels of all ranks up to which a period is looked for unasked: it takes 0.1 KB for each.
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
    """The parts with steps by repetition, or as they are, and a note on what was decided.

    Only for GPU activities of which no rank tells any step. delimiter: a regular expression
    that is searched in full kernel names; the kernel that it finds begins a step. Raises
    `SettingsError` for one that is no regular expression.
    """
    pattern = compiled(delimiter, f"the step delimiter {delimiter!r}") if delimiter else None
    active = [part for part in parts if len(part.start)]
    if not active or any(part.steps for part in parts) or not active[0].is_timeline:
        return list(parts), []
    if pattern is None and sum(len(part.start) for part in active) > MAX_KERNELS:
        note = f"no steps: a repetition is looked for in up to {MAX_KERNELS:,} kernels"
        return list(parts), [f"{note}; a step_delimiter has no such limit"]
    names = list(dict.fromkeys(name for part in active for name in part.names))
    keys = {name: normalise(name) for name in names}
    number = {key: n for n, key in enumerate(dict.fromkeys(keys.values()))}
    streams = [_main_stream(part, {name: number[keys[name]] for name in names}) for part in active]
    if pattern is not None:
        begins = {number[keys[name]] for name in names if pattern.search(name)}
        cuts = [np.flatnonzero(np.isin(stream.keys, list(begins))) for stream in streams]
        how = f"the kernel /{delimiter}/ that begins each"
    else:
        samplers = {n for key, n in number.items() if _SAMPLES.search(words(key))}
        found = _cycles(streams, samplers)
        if found is None:
            return list(parts), []
        cuts, how = found, "the sequence of kernels, which repeats exactly on every rank"
    steps, doubt = _steps(streams, cuts)
    if doubt:
        return list(parts), [f"no steps by {how}: {doubt}"]
    told = iter(steps)
    whole = [_assigned(part, next(told)) if len(part.start) else part for part in parts]
    return whole, [f"steps are {len(steps[0])} repetitions: told by {how}, not by the trace itself"]


def _main_stream(part: RankActivities, number: dict[str, int]) -> _Stream:
    """The stream with the most kernels; copies and sets come and go between steps."""
    kernel = part.kinds.index("kernel") if "kernel" in part.kinds else -1
    rows = np.flatnonzero(part.kind_codes == kernel)
    if len(rows):
        streams, counts = np.unique(part.stream[rows], return_counts=True)
        rows = rows[part.stream[rows] == streams[np.argmax(counts)]]
    rows = rows[np.argsort(part.start[rows], kind="stable")]
    numbers = np.array([number[name] for name in part.names], dtype=np.int64)
    start = part.start[rows]
    return _Stream(start, start + part.dur[rows], numbers[part.name_codes[rows]])


def _cycles(streams: Sequence[_Stream], samplers: set[int]) -> list[Ints] | None:
    """Where a cycle begins on each rank; None unless all ranks run one and the same."""
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


def _period(keys: Ints) -> int | None:
    """The shortest distance at which the whole sequence repeats, at least three times."""
    listed = keys.tolist()
    borders = [0] * len(listed)  # of each prefix, as Knuth, Morris and Pratt count them
    border = 0
    for n in range(1, len(listed)):
        while border and listed[n] != listed[border]:
            border = borders[border - 1]
        border += listed[n] == listed[border]
        borders[n] = border
    period = len(listed) - border
    return period if listed and len(listed) >= MIN_REPETITIONS * period else None


def _steps(streams: Sequence[_Stream], cuts: Sequence[Ints]) -> tuple[list[list[Step]], str]:
    """Steps between cuts, aligned across ranks by time; or why they cannot be told."""
    spans: list[list[tuple[int, int]]] = []
    for cut in cuts:
        spans.append(list(zip(cut[:-1].tolist(), cut[1:].tolist(), strict=True)))
    if min(len(found) for found in spans) < MIN_REPETITIONS:
        return [], f"there are fewer than {MIN_REPETITIONS} of them on some rank"
    begins = [
        [int(stream.start[a]) for a, _ in found]
        for stream, found in zip(streams, spans, strict=True)
    ]
    lengths = np.diff(np.array(begins[0]))
    half = int(np.median(lengths)) // 2
    latest = max(found[0] for found in begins)
    for found, times in zip(spans, begins, strict=True):
        early = sum(time < latest - half for time in times)
        del found[:early], times[:early]
    count = min(len(found) for found in spans)
    if count < MIN_REPETITIONS:
        return [], "the ranks' windows hardly overlap"
    steps: list[list[Step]] = [[] for _ in streams]
    for n in range(count):
        at = [times[n] for times in begins]
        if max(at) - min(at) > half // 2:  # else the neighbour would fit nearly as well
            return [], "the ranks do not run them at the same time"
        kernels = {
            stream.keys[slice(*found[n])].tobytes()
            for stream, found in zip(streams, spans, strict=True)
        }
        if len(kernels) > 1:
            return [], "the ranks run different kernels in them"
        for own, stream, found in zip(steps, streams, spans, strict=True):
            first, after = found[n]
            last = after < len(stream.start)
            end = int(stream.start[after]) if last else int(stream.end[after - 1])
            own.append(Step(n, UNKNOWN_STAGE, int(stream.start[first]), end))
    return steps, ""


def _assigned(part: RankActivities, steps: list[Step]) -> RankActivities:
    """All activities of the rank, also of other streams, by the time of their start."""
    return replace(part, steps=steps, step=StepIndex(steps).of(part.start))
