"""Windows of an SGLang server as a model plants them, and what profilers do to their traces.

A window has tensor-parallel ranks in lockstep: each pass is made of segments of compute that end
in an all-reduce, whose end is common to all ranks and whose start is the rank's own. Decode passes
replay one CUDA graph for each batch bucket, on two streams; prefill passes launch each kernel. The
host launches pass n + 1 while pass n runs, so a window begins with kernels whose launch is not in
the file, and ends with a launch whose kernels are not.

Nothing here knows how the plugin finds out that kernels are missing.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]
Rng = np.random.Generator

BASE_NS = 1_790_857_026_000_000_000
SLOWDOWN = 1.15  # of the slow rank's compute
STEP_NOISE, KERNEL_NOISE = 0.02, 0.01  # standard deviations, as a share
MAIN, SIDE = 7, 20  # streams
GAP_NS = 20_000  # between passes
LAUNCH_GAP_NS = 300  # between kernels
TRANSFER_NS = 9_000  # of an all-reduce
IDS_A_PASS = 10_000  # correlation ids; a graph has its first one
SEGMENT = 10  # kernels
SIDE_KERNELS = 2  # of a segment of a graph
BUCKET = 8  # requests; a graph is captured for each multiple

ALL_REDUCE = "void cross_device_reduce_1stage<__nv_bfloat16, 2>(RankData*, RankSignals)"
COPY = "Memcpy HtoD (Pinned -> Device)"
COMPUTE = (
    "nvjet_tst_192x192_64x4_2x1_v_bz_coopB_TNN",
    "void flashinfer::norm::FusedAddRMSNormKernel<8u, __nv_bfloat16>(__nv_bfloat16*)",
    "void flash::flash_fwd_splitkv_kernel<Flash_fwd_kernel_traits<128, 64, 128, 4> >()",
    "void act_and_mul_kernel<__nv_bfloat16, &silu>(__nv_bfloat16*, __nv_bfloat16 const*)",
    "fused_moe_kernel",
)
NAMES = (*COMPUTE, ALL_REDUCE, COPY)
GRAPH_CALL, COPY_CALL = 0, 1  # indices into a row of CALLS; those after launch one kernel
CALLS = {
    "cuda": (
        *("cudaGraphLaunch", "cudaMemcpyAsync"),
        *("cudaLaunchKernel", "cuLaunchKernel", "cuLaunchKernelEx", "cudaLaunchKernelExC"),
    ),
    "hip": (
        *("hipGraphLaunch", "hipMemcpyAsync"),
        *("hipLaunchKernel", "hipModuleLaunchKernel", "hipExtModuleLaunchKernel"),
    ),
}


@dataclass(frozen=True)
class Kernels:
    """Kernels and copies of one rank: parallel columns.

    name: index into `NAMES`. start, dur: ns. launch: number of the pass. correlation: that of the
    call. is_node: of a graph. is_readable: whether `dur` was written and is not negative.
    """

    name: Ints
    stream: Ints
    start: Ints
    dur: Ints
    launch: Ints
    correlation: Ints
    is_node: Mask
    is_readable: Mask

    def take(self, chosen: Mask) -> Kernels:
        """The rows of a mask."""
        return Kernels(**{key: column[chosen] for key, column in vars(self).items()})

    @property
    def end(self) -> Ints:
        """ns."""
        return self.start + self.dur


class Span(NamedTuple):
    """A step on the CPU; ns. number: that of its pass."""

    name: str
    start: int
    dur: int
    number: int


@dataclass(frozen=True)
class Calls:
    """Calls of one rank: parallel columns. name: index into the vendor's row of `CALLS`."""

    name: Ints
    start: Ints
    correlation: Ints


@dataclass(frozen=True)
class RankTrace:
    """What the profiler of one rank writes. base: ns, added to every time.

    outside: number of launched kernels that ran after the rank's window had ended. has_nodes:
    whether nodes of graphs are marked. is_projected: whether steps are written on the GPU's
    streams, too.
    """

    rank: int
    world_size: int
    gpu: str
    vendor: str
    kernels: Kernels
    calls: Calls
    spans: Sequence[Span]
    outside: int
    is_projected: bool
    base: int = BASE_NS

    @property
    def has_nodes(self) -> bool:
        """AMD's traces do not mark the nodes of graphs."""
        return self.vendor == "cuda"

    @property
    def is_launched(self) -> Mask:
        """Which kernels have their launch in the file; not copies."""
        known = np.isin(self.kernels.correlation, self.calls.correlation)
        return known & (self.kernels.name != NAMES.index(COPY))


@dataclass(frozen=True)
class Window:
    """Traces of ranks 0, 1, …; slow: the rank that computes `SLOWDOWN` times as long, or None."""

    traces: tuple[RankTrace, ...]
    slow: int | None

    def with_trace(self, place: int, trace: RankTrace) -> Window:
        """The window with another trace of one rank."""
        traces = [*self.traces]
        traces[place] = trace
        return replace(self, traces=tuple(traces))


# A sound window.


class Plan(NamedTuple):
    """steps: of the window. fan_out: kernels of the smallest graph. model: seed of what its kernels
    are. has_ids, is_padded: whether steps have a forward id, and the batch size of their graph.
    """

    steps: int
    fan_out: int
    model: int
    vendor: str
    is_projected: bool
    has_ids: bool
    is_padded: bool


FAN_OUTS = (50, 60, 80, 120, 250, 1000)
FAN_OUT_SHARES = {2: (0.3, 0.25, 0.2, 0.15, 0.07, 0.03), 8: (0.4, 0.3, 0.2, 0.08, 0.015, 0.005)}


def planned(rng: Rng, ranks: int, vendor: str, *, is_small: bool = False) -> Plan:
    """A random kind of window. is_small: for one that is written as files."""
    shares = FAN_OUT_SHARES[ranks]
    return Plan(
        steps=60 if is_small else int(rng.integers(60, 101)),
        fan_out=50 if is_small else int(rng.choice(FAN_OUTS, p=shares)),
        model=int(rng.integers(2**31)),
        vendor=vendor,
        is_projected=bool(rng.random() < 0.4),
        has_ids=bool(rng.random() < 0.5),
        is_padded=bool(rng.random() < 0.5),
    )


class _Passes(NamedTuple):
    """Passes of one kind. at: their numbers, shape (passes,). length: ns, same shape.

    start, dur: ns, shape (passes, ranks, kernels), start after that of the pass. name, stream:
    shape (kernels,).
    """

    at: Ints
    length: Ints
    start: Ints
    dur: Ints
    name: Ints
    stream: Ints
    is_graph: bool


def sound_window(
    rng: Rng, plan: Plan, *, ranks: int, slow: int | None, pace: float = 1.0
) -> Window:
    """A window in which everything was recorded. pace: factor of all compute time."""
    count = plan.steps + 2  # the first was launched before the window, the last ends after it
    batches = _batches(rng, count)
    factor = np.full(ranks, pace)
    if slow is not None:
        factor[slow] *= SLOWDOWN
    kinds: dict[int, list[int]] = {}
    for number, batch in enumerate(batches):
        kinds.setdefault(-(-batch // BUCKET), []).append(number)
    first = min(filter(None, kinds))
    groups = []
    for bucket, numbers in kinds.items():
        size = plan.fan_out // SEGMENT + bucket - first if bucket else 8
        model = np.random.default_rng([plan.model, bucket])
        groups.append(_passes(rng, model, np.array(numbers), size, factor, is_graph=bucket > 0))
    length = np.empty(count, np.int64)
    for group in groups:
        length[group.at] = group.length
    begin = np.cumsum(length + GAP_NS) - length
    in_last = rng.random() if rng.random() < 0.5 else 0.0  # of the last pass, before the end
    spans = _spans(plan, batches, begin, length)
    traces = []
    for rank in range(ranks):
        kernels = _kernels(groups, begin, rank)
        stop = begin[-1] + int(in_last * length[-1]) + int(rng.integers(-5000, 5000)) - 6_000
        is_inside = kernels.start < stop
        outside = int((~is_inside & (kernels.name != NAMES.index(COPY))).sum())
        calls = _calls(rng, kernels, spans, plan.vendor)
        traces.append(
            RankTrace(rank, ranks, "NVIDIA H100 80GB HBM3", plan.vendor, kernels.take(is_inside),
                      calls, spans, outside, plan.is_projected)
        )  # fmt: skip
    return Window(tuple(traces), slow)


def _batches(rng: Rng, count: int) -> list[int]:
    """The batch size of each pass; 0 for prefill. It drifts by one request at a time."""
    batches, batch = [], int(rng.integers(20, 29))
    for _ in range(count):
        if rng.random() < 0.15:
            batch = min(max(batch + int(rng.choice((-1, 1))), 17), 40)
        batches.append(0 if rng.random() < 0.12 else batch)
    batches[count // 2] = batch  # at least one pass of decode
    return batches


def _passes(
    rng: Rng, model: Rng, at: Ints, segments: int, factor: Any, *, is_graph: bool
) -> _Passes:
    """All passes of one kind. model: draws its kernels and their mean times; rng: the rest.

    factor: of each rank's compute time, shape (ranks,).
    """
    side = SIDE_KERNELS if is_graph else 0
    main = SEGMENT - 1 - side
    mean = model.lognormal(np.log(8_000), 0.5, (segments, main + side))
    mean[:, main:] *= 0.25  # the side stream never decides how long a segment takes
    shape = (len(at), len(factor), segments, main + side)
    noise = 1 + STEP_NOISE * rng.standard_normal((*shape[:2], 1, 1))
    noise = noise * (1 + KERNEL_NOISE * rng.standard_normal(shape, np.float32))
    compute = (mean * noise * factor[:, None, None]).astype(np.int64)
    after = np.cumsum(compute[..., :main] + LAUNCH_GAP_NS, axis=-1)
    lead = after[..., -1]  # when the rank begins its all-reduce
    segment = lead.max(axis=1) + TRANSFER_NS
    origin = (np.cumsum(segment, axis=-1) - segment)[:, None, :, None]
    beside = np.cumsum(compute[..., main:] + LAUNCH_GAP_NS, axis=-1)
    dur = np.concatenate((compute, (segment[:, None] - lead)[..., None]), axis=-1)
    start = np.concatenate((after, beside, lead[..., None] + dur[..., -1:]), axis=-1) - dur
    start[..., :-1] -= LAUNCH_GAP_NS
    start += origin
    names = model.integers(0, len(COMPUTE), (segments, SEGMENT))
    names[:, -1] = NAMES.index(ALL_REDUCE)
    stream = np.full((segments, SEGMENT), MAIN)
    stream[:, main : main + side] = SIDE
    flat = (len(at), len(factor), -1)
    return _Passes(at, segment.sum(axis=-1), start.reshape(flat), dur.reshape(flat),
                   names.ravel(), stream.ravel(), is_graph)  # fmt: skip


def _kernels(groups: Sequence[_Passes], begin: Ints, rank: int) -> Kernels:
    """All kernels of a rank, and one copy before each pass."""
    parts = []
    for group in groups:
        shape = group.start[:, rank].shape
        ids = np.zeros(shape[1], np.int64) if group.is_graph else np.arange(1, shape[1] + 1)
        numbers = np.broadcast_to(group.at[:, None], shape)
        parts.append((
            np.broadcast_to(group.name, shape),
            np.broadcast_to(group.stream, shape),
            group.start[:, rank] + begin[group.at][:, None],
            group.dur[:, rank],
            numbers,
            1 + numbers * IDS_A_PASS + ids,
            np.full(shape, group.is_graph),
        ))  # fmt: skip
    count = len(begin)
    at = np.arange(count)
    parts.append((
        np.full(count, NAMES.index(COPY)),
        np.full(count, MAIN),
        begin - 5_000,
        np.full(count, 1_500),
        at,
        at * IDS_A_PASS + IDS_A_PASS - 1,
        np.zeros(count, bool),
    ))  # fmt: skip
    columns = [np.concatenate([part.ravel() for part in same]) for same in zip(*parts, strict=True)]
    order = np.lexsort((columns[2], columns[1]))
    columns = [column[order] for column in columns]
    return Kernels(*columns, is_readable=np.ones(len(order), bool))


def _spans(plan: Plan, batches: Sequence[int], begin: Ints, length: Ints) -> list[Span]:
    """The steps but the first pass, each while the pass before it runs."""
    spans = []
    for number in range(1, len(batches)):
        batch = batches[number]
        if batch == 0:
            name = "EXTEND bs=2 toks=4096"
        elif plan.is_padded:
            name = f"DECODE bs={-(-batch // BUCKET) * BUCKET} raw_bs={batch}"
        else:
            name = f"DECODE bs={batch}"
        key = f" forward_id={number}" if plan.has_ids else ""
        before = int(length[number - 1])
        start = int(begin[number - 1]) + before // 20
        spans.append(Span(f"step[{name}{key}]", start, before // 2, number))
    return spans


def _calls(rng: Rng, kernels: Kernels, spans: Sequence[Span], vendor: str) -> Calls:
    """One call for each correlation id of the passes that have a span."""
    ids, first = np.unique(kernels.correlation, return_index=True)
    number = kernels.launch[first]
    ids, first, number = ids[number > 0], first[number > 0], number[number > 0]
    begins = np.array([0, *(span.start for span in spans)])[number]
    length = np.array([0, *(span.dur for span in spans)])[number]
    place = ids - 1 - number * IDS_A_PASS
    is_copy = kernels.name[first] == NAMES.index(COPY)
    inside = np.where(is_copy, 0.02, 0.1 + 0.8 * place / 1000)
    name = rng.choice(np.arange(2, len(CALLS[vendor])), len(ids))
    name[kernels.is_node[first]] = GRAPH_CALL
    name[is_copy] = COPY_CALL
    return Calls(name, begins + (inside * length).astype(np.int64), ids)


# What a profiler does to the trace of one rank. share: from 0 to 1.


def lost_front(trace: RankTrace, share: float, rng: Rng) -> RankTrace:
    """Without the kernels that start before a moment, in the first `share` of the steps."""
    kernels = trace.kernels
    steps = share * len(trace.spans) * rng.uniform(0.9, 1.0)
    if steps > 1:  # so that no more steps than that are touched
        steps = int(steps) - rng.random()
    at = 1 + steps
    number = int(at)
    of_pass = kernels.launch == number
    first, last = kernels.start[of_pass].min(), kernels.end[of_pass].max()
    moment = first + (at - number) * (last - first)
    return _kept(trace, kernels.start >= moment)


def lost_stream(trace: RankTrace, share: float, rng: Rng) -> RankTrace:
    """Without `share` of one stream's kernels, in one to three runs of consecutive ones."""
    rows = np.flatnonzero(trace.is_launched & (trace.kernels.stream == rng.choice((MAIN, SIDE))))
    runs = int(rng.integers(1, 4))
    pieces = np.array_split(np.arange(len(rows)), runs)
    gone = np.zeros(len(trace.kernels.start), bool)
    for piece in pieces:
        size = max(round(share * len(piece)), 1)
        begin = int(rng.integers(0, len(piece) - size + 1))
        gone[rows[piece[begin : begin + size]]] = True
    return _kept(trace, ~gone)


def lost_every_nth(trace: RankTrace, share: float, rng: Rng) -> RankTrace:
    """Without every n-th kernel in order of start, n = 1 / share."""
    every = round(1 / share)
    rows = np.flatnonzero(trace.is_launched)
    rows = rows[np.argsort(trace.kernels.start[rows], kind="stable")]
    gone = np.zeros(len(trace.kernels.start), bool)
    gone[rows[int(rng.integers(every)) :: every]] = True
    return _kept(trace, ~gone)


def scattered(trace: RankTrace, share: float, rng: Rng) -> Mask:
    """A random `share` of the launched kernels."""
    rows = np.flatnonzero(trace.is_launched)
    chosen = np.zeros(len(trace.kernels.start), bool)
    chosen[rng.choice(rows, max(round(share * len(rows)), 1), replace=False)] = True
    return chosen


def lost_scattered(trace: RankTrace, share: float, rng: Rng) -> RankTrace:
    """Without a random `share` of the kernels."""
    return _kept(trace, ~scattered(trace, share, rng))


def bad_durations(trace: RankTrace, share: float, rng: Rng) -> RankTrace:
    """With a random `share` of the kernels whose duration is negative or not written."""
    readable = ~scattered(trace, share, rng)
    return replace(trace, kernels=replace(trace.kernels, is_readable=readable))


def over_the_next(trace: RankTrace, share: float, rng: Rng) -> RankTrace:
    """With a random `share` of the kernels that last until the next sound one has ended."""
    kernels = trace.kernels
    bad = scattered(trace, share, rng)
    dur = kernels.dur.copy()
    for stream in (MAIN, SIDE):
        rows = np.flatnonzero(kernels.stream == stream)
        sound = rows[~bad[rows]]
        long = rows[bad[rows] & (rows < sound[-1])]
        after = sound[np.searchsorted(sound, long)]
        dur[long] = kernels.end[after] + 1_000 - kernels.start[long]
    return replace(trace, kernels=replace(kernels, dur=dur))


def _kept(trace: RankTrace, kept: Mask) -> RankTrace:
    return replace(trace, kernels=trace.kernels.take(kept))


# What another run of the same model writes for a rank, in place of its own trace.

HOUR_NS = 3600 * 10**9


class Foreign(NamedTuple):
    """pace: factor of its compute time. apply: what else is different."""

    pace: float
    apply: Callable[[RankTrace, Rng], RankTrace]


def _larger(trace: RankTrace, rng: Rng) -> RankTrace:
    """Of twice as many processes, at the same time."""
    return replace(trace, world_size=2 * trace.world_size)


def _away(trace: RankTrace, rng: Rng) -> RankTrace:
    """Some minutes to days before or after."""
    hours = float(np.exp(rng.uniform(np.log(0.05), np.log(50))))
    return replace(trace, base=trace.base + round(HOUR_NS * hours) * int(rng.choice((-1, 1))))


def _newer(trace: RankTrace, rng: Rng) -> RankTrace:
    """On another model of GPU, at the same time."""
    return replace(trace, gpu="NVIDIA H200")


OF_ANOTHER_SIZE = Foreign(0.55, _larger)
AT_ANOTHER_TIME = Foreign(0.8, _away)
ON_ANOTHER_GPU = Foreign(0.75, _newer)

Apply = Callable[[RankTrace, float, Rng], RankTrace]


def counts_of(sound: RankTrace, damaged: RankTrace) -> set[int]:
    """What may be counted as missing or impossible on a damaged rank.

    The launched kernels that are not in the file, or those whose times cannot be; each with or
    without the launched ones that ran after the end of the window.
    """
    known = damaged.is_launched & damaged.kernels.is_readable
    counts = {int(sound.is_launched.sum()) - int(known.sum())}
    if len(sound.kernels.dur) == len(damaged.kernels.dur):
        changed = (sound.kernels.dur != damaged.kernels.dur) | ~damaged.kernels.is_readable
        counts.add(int(changed.sum()))
    counts.discard(0)
    return counts | {count + sound.outside for count in counts}


# The traces as files, in the layout of today's Kineto.


def file_name(rank: int) -> str:
    """As SGLang names the trace of a rank."""
    return f"1790857026-TP-{rank}.trace.json"


def projections(trace: RankTrace) -> list[tuple[int, int, int, Span]]:
    """(stream, start, end, span) of each step on each stream on which it has kernels; ns."""
    if not trace.is_projected:
        return []
    kernels, of = trace.kernels, {span.number: span for span in trace.spans}
    key = kernels.launch * 2 + (kernels.stream == SIDE)
    order = np.argsort(key, kind="stable")
    keys, first = np.unique(key[order], return_index=True)
    starts = np.minimum.reduceat(kernels.start[order], first)
    ends = np.maximum.reduceat(kernels.end[order], first)
    listed = zip(keys.tolist(), starts.tolist(), ends.tolist(), strict=True)
    return [
        (SIDE if at % 2 else MAIN, start, end, of[at // 2])
        for at, start, end in listed
        if at // 2 in of
    ]


def write_trace(trace: RankTrace, path: Path, rng: Rng) -> None:
    """Writes one rank's file; unreadable durations are negative or left out."""
    events = [*_span_events(trace), *_call_events(trace), *_kernel_events(trace, rng)]
    document = {
        "schemaVersion": 1,
        "deviceProperties": [{"id": trace.rank, "name": trace.gpu}],
        "distributedInfo": {
            "backend": "nccl",
            "rank": trace.rank,
            "world_size": trace.world_size,
        },
        "baseTimeNanoseconds": trace.base,
        "traceEvents": events,
    }
    path.write_text(json.dumps(document))


def _event(cat: str, name: str, tid: int, start: int, dur: int, **args: int) -> dict[str, Any]:
    return {"ph": "X", "cat": cat, "name": name, "pid": 1, "tid": tid,
            "ts": start / 1000, "dur": dur / 1000, "args": args}  # fmt: skip


def _span_events(trace: RankTrace) -> list[dict[str, Any]]:
    on_cpu = [
        _event(
            "user_annotation", span.name, 1, span.start, span.dur, **{"External id": span.number}
        )
        for span in trace.spans
    ]
    on_gpu = [
        _event("gpu_user_annotation", span.name, stream, start, end - start,
               **{"External id": span.number})
        for stream, start, end, span in projections(trace)
    ]  # fmt: skip
    return [*on_cpu, *on_gpu]


def _call_events(trace: RankTrace) -> list[dict[str, Any]]:
    columns = (trace.calls.name, trace.calls.start, trace.calls.correlation)
    names = CALLS[trace.vendor]
    events = []
    for code, start, correlation in zip(*(column.tolist() for column in columns), strict=True):
        cat = "cuda_driver" if names[code].startswith("cuLaunch") else "cuda_runtime"
        events.append(_event(cat, names[code], 1, start, 2_000, correlation=correlation))
    return events


def _kernel_events(trace: RankTrace, rng: Rng) -> list[dict[str, Any]]:
    kernels = trace.kernels
    columns = [column.tolist() for column in vars(kernels).values()]
    events = []
    for name, stream, start, dur, _, correlation, is_node, is_readable in zip(
        *columns, strict=True
    ):
        cat = "gpu_memcpy" if NAMES[name] == COPY else "kernel"
        event = _event(cat, NAMES[name], stream, start, dur,
                       device=trace.rank, context=1, stream=stream,
                       correlation=correlation)  # fmt: skip
        if is_node and trace.has_nodes:
            event["args"]["graph node id"] = correlation * 7 + 1
        if not is_readable:
            event["dur"] = -event["dur"] - 1
            if rng.random() < 0.5:
                del event["dur"]
        events.append(event)
    return events
