"""Find steps in windows without step markers: the kernels of forward passes repeat.

Two ways, both without guessing. With a delimiter kernel, a step reaches from one delimiter to
the next. Without, the sequence of a rank's main stream must repeat exactly from its first
kernel to its last, and each repetition must sample a token exactly once: layers repeat too,
and part of a long prefill would otherwise look like many steps. Either way all ranks must run
the same sequence, at about the same time.
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
    expression; a kernel whose full name it matches begins a step. Raises `SettingsError` for
    one that is not a regular expression.
    """
    pattern = compiled(delimiter, f"the step delimiter {delimiter!r}") if delimiter else None
    active = [part for part in parts if len(part.start)]
    if not active or any(part.steps for part in parts) or not active[0].is_timeline:
        return list(parts), []
    if pattern is None and sum(len(part.start) for part in active) > MAX_KERNELS:
        note = f"no steps: a window with more than {MAX_KERNELS:,} kernels is not searched"
        return list(parts), [f"{note} for a repetition; set step_delimiter to find steps"]
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
        cycles = _cycles(streams, samplers)
        if cycles is None:
            return list(parts), []
        cuts, how = cycles, "the sequence of kernels, which repeats exactly on every rank"
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
