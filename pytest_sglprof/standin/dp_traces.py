"""Writes a planted window as the files that a server's ranks write, and what it says of itself."""

from __future__ import annotations

import gzip
import io
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pytest_sglprof.standin import laws
from pytest_sglprof.standin import model as kernels
from pytest_sglprof.standin.dp_model import DpWindow
from pytest_sglprof.standin.dp_plan import DpPlan
from pytest_sglprof.standin.model import Kernel, Launch, Model, Sizes, places
from pytest_sglprof.standin.traces import (
    STREAM,
    Counters,
    Recording,
    complete,
    flow,
    kernel_args,
    node_args,
    write,
)

BEGIN_NS = 1_760_000_000_000_000_000  # Unix time of a window's first moment
FIRST_PID = 4001
HOST_NS = 600_000  # of the host's launches for a pass, at most
EAGER_CALL_NS = 2_500  # from one launch to the next
CALL_NS = 2_000  # of a launch

NAMES = {
    "input norm": kernels.NORM,
    "quantize": "void per_token_group_quant_8bit_kernel<__nv_bfloat16, c10::Float8_e4m3fn, true, "
    "false, float>(__nv_bfloat16 const*, void*)",
    "qkv": "nvjet_tst_64x8_64x16_4x1_v_bz_TNT",
    "attention": kernels.DECODE_ATTENTION,
    "o": "nvjet_tst_64x8_64x16_2x1_v_bz_splitK_TNT",
    "post norm": kernels.NORM,
    "router": "nvjet_tst_16x64_64x16_1x4_h_bz_TNN",
    "top k": "void moe::topkGatingSoftmax<float, 2, 64, 4, 16>(float const*, bool const*, "
    "float*, int, int*, int*, int, int, int)",
    "up": "fused_moe_kernel",
    "down": "fused_moe_kernel",
    "shared": "nvjet_tst_128x64_64x16_1x2_h_bz_TNN",
    "final norm": kernels.NORM,
    "logits": "sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize64x64x64_warpgroupsize1x1x1_"
    "execute_segment_k_off_kernel__5x_cublas",
    "sample": kernels.SAMPLING,
}
"""The kernel of each row of `laws.WORKS`; a prompt has another attention."""

_NCCL = "ncclDevKernel_{}(ncclDevKernelArgsStorage<4096ul>)"
COLLECTIVES = {
    "padded": (_NCCL.format("AllGather_RING_LL"), _NCCL.format("ReduceScatter_Sum_bf16_RING_LL")),
    "ragged": (_NCCL.format("AllReduce_Sum_bf16_RING_LL"),) * 2,
    "local": (
        "void deep_ep::internode_ll::dispatch<true, false, 7168>(void*, void*, int*, long*, "
        "int*, int*)",
        "void deep_ep::internode_ll::combine<true, 7168, 9, 9>(void*, void*, int*, int, int*, "
        "long*)",
    ),
}
"""Before the experts and after them. ragged: eager passes that are not padded (SUM_LEN)."""


def sizes_of(plan: DpPlan) -> Sizes:
    """Each rank has its own attention and a share of the experts."""
    return Sizes(tp=plan.ranks, dp=plan.ranks, ep=plan.ranks, dp_attention=True)


def write_traces(
    window: DpWindow,
    folder: Path,
    profile_id: str = "1760000000.0",
    *,
    detailed: bool = True,
    has_ids: bool = True,
) -> list[Path]:
    """One file a rank, `{profile_id}-TP-1-DP-1-EP-1.trace.json.gz`, as SGLang names them.

    detailed: as `detailed_annotations`, else spans have neither sums nor ids. has_ids: False as
    before SGLang 0.5.23. Only passes that are `recorded` are written.
    """
    written = []
    for place in places(sizes_of(window.plan)):
        passes = np.flatnonzero(window.recorded[:, place.index]).tolist()
        first, last = passes[0], passes[-1]
        recording = Recording(
            place,
            Model(step_ns=0),  # not asked: `_passes` says what ran
            device="cuda",
            activities=frozenset({"CPU", "GPU"}),
            start_ns=BEGIN_NS + int(window.synced[first]) - 1000,
            end_ns=BEGIN_NS + int(window.end[last].max()) + 1000,
            steps=(),
            with_stack=False,
            record_shapes=False,
            detailed=detailed,
            pid=FIRST_PID + place.index,
        )
        path = folder / f"{profile_id}-{place.file_part}.trace.json.gz"
        text = io.StringIO()
        given = partial(_passes, window=window, passes=passes, has_ids=has_ids)
        write(recording, text, path.name.removesuffix(".gz"), given)
        path.write_bytes(gzip.compress(text.getvalue().encode(), 3, mtime=0))
        written.append(path)
    return written


def span_name(
    window: DpWindow, number: int, rank: int, *, detailed: bool = True, has_ids: bool = True
) -> str:
    """`step[DECODE bs=64 g_sq=64 ... forward_id=7]` (`profile_utils.build_step_span_name`)."""
    kind, identity = str(window.kind[number, rank]), int(window.forward_id[number, rank])
    is_draft = bool(window.is_draft[number, rank]) and identity > 0
    words = [f"{'DRAFT' if is_draft else kind} bs={window.batch[number, rank]}"]
    if kind == "EXTEND":
        words.append(f"toks={window.tokens[number, rank]}")
    if detailed:
        words += _sums(window, number, rank)
        if identity and has_ids:
            words.append(f"forward_id={identity}")
    return f"step[{' '.join(words)}]"


def _sums(window: DpWindow, number: int, rank: int) -> list[str]:
    """The sums of a span (`step_span_utils.build_detailed_annotation_suffix`)."""
    order = ("sq", "sk", "sqsq", "sqsk")
    sums_of = {
        group: dict(zip(order, sums[number, rank].tolist(), strict=True))
        for group, sums in (("c", window.context), ("g", window.generation))
    }
    if window.kind[number, rank] == "MIXED":
        prompts, generating = window.groups[number, rank].tolist()
        sums = [f"{group}_{key}={sums_of[group][key]}" for group in "cg" for key in order]
        return [f"c={prompts}", f"g={generating}", *sums]
    return [
        f"{group}_{key}={of[key]}"
        for group, of in sums_of.items()
        if of["sq"]
        for key in ("sq", "sqsq", "sqsk", "sk")
    ]


class _Pass(NamedTuple):
    """What a rank runs. spanned: the launches inside the step's span; sampling comes after."""

    launches: list[Launch]
    spanned: int


def launches_of(window: DpWindow, number: int, rank: int) -> list[Launch]:
    """All kernels of a pass on a rank, ns from `window.start`; collectives end together."""
    return _launches(window, number, rank).launches


def _launches(window: DpWindow, number: int, rank: int) -> _Pass:
    """Plays the pass on all ranks, and keeps one of them."""
    plan = window.plan
    extends = bool(np.any(window.context[number, :, 0])) and not window.is_graph[number]
    ragged = extends or bool(np.ptp(window.rows[number]))
    how = "local" if plan.regime == "local" else "ragged" if ragged else "padded"
    gather, scatter = COLLECTIVES[how]
    transfer = window.transfer[number].tolist()
    clock = window.start[number].copy()
    launches: list[Launch] = []

    def run(part: str, layer: int, names: tuple[str, ...] = ()) -> None:
        for work, durations in zip(laws.WORKS, window.durations, strict=True):
            if work.part != part or (names and work.name not in names):
                continue
            lasts = durations[number, :, layer if durations.shape[2] > 1 else 0]
            if lasts[rank]:
                prompt = work.driver == "attention" and window.context[number, rank, 0] > 0
                name = kernels.PREFILL_ATTENTION if prompt else NAMES[work.name]
                add(Kernel(name, work.category, 1), int(lasts[rank]))
            clock[:] += lasts

    def add(kernel: Kernel, lasts: int) -> None:
        launches.append(Launch(kernel, int(clock[rank] - window.start[number, rank]), lasts))

    def meet(name: str, takes: int) -> None:
        end = int(clock.max()) + takes
        add(Kernel(name, "communication", 1, kind="collective"), end - int(clock[rank]))
        clock[:] = end

    for layer in range(int(window.layer_count[number])):
        run("attention", layer)
        meet(gather, transfer[0])
        run("experts", layer)
        meet(scatter, transfer[1])
    run("head", 0, ("final norm",))
    if transfer[2]:
        meet(gather, transfer[2])
    run("head", 0, ("logits", "sample"))
    samples = bool(window.batch[number, rank])
    return _Pass(launches, len(launches) - samples)


# The events of a rank. The host issues a pass, and the device runs it a little later or, with
# the overlap schedule, once it is done with the pass before.


class _Issued(NamedTuple):
    """A pass in a trace; ns from its base time. calls: when each launch is called."""

    name: str
    launches: list[Launch]
    spanned: int
    is_graph: bool
    calls: list[int]
    start: int  # of the first kernel

    @property
    def ended(self) -> int:
        """When the host is done."""
        return self.calls[-1] + CALL_NS


def _iterations(window: DpWindow, passes: list[int]) -> list[list[int]]:
    """Passes by scheduler iteration: one gloo all-gather precedes each."""
    cuts = np.flatnonzero(np.diff(window.synced[passes])) + 1
    return [part.tolist() for part in np.split(np.array(passes), cuts)]


def _passes(
    recording: Recording, base_ns: int, *, window: DpWindow, passes: list[int], has_ids: bool
) -> Iterator[str]:
    rank, number = recording.place.index, Counters()
    zero = BEGIN_NS - base_ns
    for iteration in _iterations(window, passes):
        host = zero + int(window.synced[iteration[0]])
        issued = []
        for each in iteration:
            name = span_name(window, each, rank, detailed=recording.detailed, has_ids=has_ids)
            start = zero + int(window.start[each, rank])
            run = _launches(window, each, rank)
            is_graph = bool(window.is_graph[each])
            issued.append(_Issued(name, *run, is_graph, _calls(run, host, is_graph), start))
            host = issued[-1].ended + 1_000
        yield from _spans(recording, issued, zero + int(window.synced[iteration[0]]), number)
        for of in issued:
            yield from _pass(recording, of, number)
            number.next_step(len(of.launches))


def _calls(run: _Pass, host: int, is_graph: bool) -> list[int]:
    """When the host launches each kernel: all of a graph at once, else one after the other."""
    step = min(EAGER_CALL_NS, HOST_NS // len(run.launches))
    calls = [host + 1_000 + (0 if is_graph else step * i) for i in range(run.spanned)]
    after = calls[-1] + CALL_NS + 2_000
    return [*calls, *(after + step * i for i in range(len(run.launches) - run.spanned))]


def _spans(
    recording: Recording, issued: list[_Issued], begin: int, number: Counters
) -> Iterator[str]:
    """The annotations of an iteration, on the host and above the kernels on the device."""
    pid, gpu = recording.pid, recording.place.gpu
    batch = ("scheduler.run_batch", begin, issued[-1].ended + 500, _kernel_times(issued, all_=True))
    steps = [
        (of.name, of.calls[0] - 500, of.calls[of.spanned - 1] + CALL_NS, _kernel_times([of]))
        for of in issued
    ]
    for at, (name, start, end, (first, last)) in enumerate([batch, *steps]):
        external = f'"External id": {number.external + at}'
        args = f'{external}, "Record function id": 0, "Ev Idx": {at}'
        yield complete("user_annotation", name, pid, pid, start, end - start, args)
        yield complete("gpu_user_annotation", name, gpu, STREAM, first, last - first, external)


def _kernel_times(issued: list[_Issued], *, all_: bool = False) -> tuple[int, int]:
    """Start of the first kernel and end of the last; without all_ of those in the span."""
    first, last = issued[0], issued[-1]
    final = last.launches[-1 if all_ else last.spanned - 1]
    return first.start + first.launches[0].start_ns, last.start + final.start_ns + final.dur_ns


def _pass(recording: Recording, of: _Issued, number: Counters) -> Iterator[str]:
    """Launches and kernels. All nodes of a graph have the correlation of its launch."""
    pid, place = recording.pid, recording.place
    for at, (launch, call) in enumerate(zip(of.launches, of.calls, strict=True)):
        is_node = of.is_graph and at < of.spanned
        correlation = number.correlation + (0 if is_node else at)
        external = f'"External id": {number.external + 8 + at}'
        if not is_node or at == 0:
            name, cbid = ("cudaGraphLaunch", 311) if is_node else ("cudaLaunchKernel", 211)
            args = f'{external}, "cbid": {cbid}, "correlation": {correlation}'
            yield complete("cuda_runtime", name, pid, pid, call, CALL_NS, args)
            yield flow("s", correlation, pid, pid, call)
        args = kernel_args(launch, place).replace("@", str(correlation))
        if is_node:
            args += node_args(at)
        start = of.start + launch.start_ns
        cat, args = "kernel", f"{external}, {args}"
        yield complete(cat, launch.kernel.name, place.gpu, STREAM, start, launch.dur_ns, args)
        yield flow("f", correlation, place.gpu, STREAM, start)


def server_info(window: DpWindow) -> dict[str, Any]:
    """What `/server_info` says of the sizes, the regime and the graphs of this server."""
    plan = window.plan
    is_local, how = plan.regime == "local", plan.speculative
    return {
        "tp_size": plan.ranks,
        "dp_size": 1,
        "attn_dp_size": plan.ranks,
        "pp_size": 1,
        "ep_size": plan.ranks,
        "attn_cp_size": 1,
        "moe_dp_size": 1,
        "nnodes": max(1, plan.ranks // 8),
        "enable_dp_attention": True,
        "enable_dp_lm_head": is_local,
        "moe_dense_tp_size": 1 if is_local else None,
        "moe_a2a_backend": "deepep" if is_local else "none",
        "disable_custom_all_reduce": True,
        "disable_overlap_schedule": not plan.has_overlap,
        "disable_cuda_graph": False,
        "cuda_graph_config": {
            "decode": {
                "backend": "full",
                "max_bs": max(plan.graph_sizes),
                "bs": list(plan.graph_sizes),
            },
            "prefill": {"backend": "disabled"},
        },
        "max_running_requests": max(plan.graph_sizes) * plan.ranks,
        "chunked_prefill_size": max((p.chunk for p in plan.prefills), default=2048),
        "enable_mixed_chunk": plan.is_mixed,
        "speculative_algorithm": "EAGLE" if how else None,
        "speculative_num_steps": how.steps if how else None,
        "speculative_eagle_topk": 1 if how else None,
        "speculative_num_draft_tokens": how.width if how else None,
        "enable_multi_layer_eagle": bool(how and how.is_extend_anonymous),
        "expert_distribution_recorder_mode": None,
        "device": "cuda",
        "version": "0.5.23",
    }
