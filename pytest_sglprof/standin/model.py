"""The model that the stand-in pretends to run: the kernels of one forward pass.

A decoder with experts, as it looks on NVIDIA hardware: kernel names are taken from real
traces, weights are rough shares of a decode step. A rank's true time in a category is the
sum of `nominal_ns` over its kernels times the planted factor, plus jitter whose mean is 0. Noise
of steps (`StepNoise`) makes all kernels of a rank longer or shorter in a step. With DP attention
the times follow the laws of `laws.py` instead, and what varies is the noise of steps alone.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from pytest_sglprof.standin.laws import TRANSFER, Running, asked, growth
from pytest_sglprof.standin.noise import LifeNoise, StepNoise
from pytest_sglprof.standin.speech import NEWEST

Kind = Literal["kernel", "memcpy", "memset", "collective"]
Scope = Literal["attention", "all"]

SLOWABLE = (
    "compute",
    "attention",
    "gemm",
    "moe",
    "norm",
    "activation",
    "sampling",
    "elementwise",
    "memory",
)
"""What a fault may slow: a category, or `compute`, all kernels but collectives and copies."""

FILL = 0.85
"""Share of a step's wall time in which the device works."""


@dataclass(frozen=True)
class Kernel:
    """One launch. weight: share of a decode layer's time, in percent.

    scope: which ranks meet in a collective: those that share attention, or all of the
    replica. cpu_name: the operator that does this work on a server without GPU. law: the row of
    `laws.LAWS` that it follows with DP attention; none: it lasts as long whatever is asked.
    """

    name: str
    category: str
    weight: float
    cpu_name: str = "aten::copy_"
    kind: Kind = "kernel"
    scope: Scope = "all"
    law: str = ""


@dataclass(frozen=True)
class Batch:
    """What one replica runs in a step. tokens: computed now; kv: held by the batch."""

    mode: Literal["DECODE", "EXTEND", "IDLE"]
    size: int
    tokens: int
    kv: int

    @property
    def span(self) -> str:
        """The text between `step[` and the detailed part."""
        if self.mode == "EXTEND":
            return f"EXTEND bs={self.size} toks={self.tokens}"
        return f"{self.mode} bs={self.size}"

    @property
    def detail(self) -> str:
        """Aggregates of `detailed_annotations`, as if all requests were equally long."""
        if not self.size:
            return ""
        if self.mode == "EXTEND":
            square = self.tokens * self.tokens // self.size
            cross = self.tokens * self.kv // self.size
            return f"c_sq={self.tokens} c_sqsq={square} c_sqsk={cross} c_sk={self.kv}"
        return f"g_sq={self.size} g_sqsq={self.size} g_sqsk={self.kv} g_sk={self.kv}"


IDLE = Batch("IDLE", 0, 0, 0)

NORM = (
    "void flashinfer::norm::FusedAddRMSNormKernel<8u, __nv_bfloat16>(__nv_bfloat16*, "
    "__nv_bfloat16*, __nv_bfloat16*, unsigned int, unsigned int, unsigned int, float, float)"
)
_ROPE = (
    "void flashinfer::BatchQKApplyRotaryPosIdsCosSinCacheKernel<true, 128u, 8u, 16u, "
    "__nv_bfloat16, long>(__nv_bfloat16*, __nv_bfloat16*, __nv_bfloat16*, __nv_bfloat16*, "
    "float*, long*, unsigned int, unsigned int)"
)
DECODE_ATTENTION = (
    "void flashinfer::BatchDecodeWithPagedKVCacheKernel<(flashinfer::PosEncodingMode)0, 2u, "
    "4u, 8u, 16u, 2u, 4u, flashinfer::DefaultAttention<false, false, false, false>, "
    "flashinfer::BatchDecodeParams<__nv_bfloat16, __nv_bfloat16, __nv_bfloat16, int> >"
    "(flashinfer::BatchDecodeParams<__nv_bfloat16, __nv_bfloat16, __nv_bfloat16, int>)"
)
PREFILL_ATTENTION = (
    "void flashinfer::BatchPrefillWithRaggedKVCacheKernel<flashinfer::KernelTraits"
    "<(flashinfer::MaskMode)1, 128u, 2u, 1u, 8u, 8u, 4u, 1u, __nv_bfloat16, __nv_bfloat16, "
    "__nv_bfloat16, float, int> >(flashinfer::BatchPrefillRaggedParams<__nv_bfloat16, "
    "__nv_bfloat16, __nv_bfloat16, int>)"
)
_ACTIVATION = (
    "void flashinfer::activation::act_and_mul_kernel<__nv_bfloat16, &(silu(float const&))>"
    "(__nv_bfloat16*, __nv_bfloat16 const*, int)"
)
_EMBEDDING = (
    "void at::native::(anonymous namespace)::indexSelectLargeIndex<c10::BFloat16, long, "
    "unsigned int, 2, 2, -2, true>(at::cuda::detail::TensorInfo<c10::BFloat16, unsigned int>)"
)
_ELEMENTWISE = (
    "void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctorOnSelf_add<long>, "
    "std::array<char*, 2ul> >(int, at::native::CUDAFunctorOnSelf_add<long>, "
    "std::array<char*, 2ul>)"
)
SAMPLING = (
    "void flashinfer::sampling::TopKTopPSamplingFromProbKernel<1024u, "
    "(cub::BlockScanAlgorithm)2, (cub::BlockReduceAlgorithm)0, 4u, true, float, int>"
    "(float*, int*, float*, int*, int*, int, float, unsigned int, unsigned long, unsigned long)"
)
_CUSTOM_REDUCE = (
    "void sglang::cross_device_reduce_1stage<__nv_bfloat16, {size}>(sglang::RankData*, "
    "sglang::RankSignals, sglang::Signal*, __nv_bfloat16*, int, int)"
)
_O_GEMM = "nvjet_tst_64x8_64x16_2x1_v_bz_splitK_TNT"
_OWN_ROWS = "attention input norm"
_EXPERTS_CPU = "sgl_kernel::fused_experts_cpu"
_NCCL = "ncclDevKernel_{what}(ncclDevKernelArgsStorage<4096ul>)"


def _collective(what: str, ranks: int, weight: float, scope: Scope, *, small: bool) -> Kernel:
    if what == "AllReduce" and small:
        name, cpu = _CUSTOM_REDUCE.format(size=min(8, max(2, ranks))), "gloo:all_reduce"
    else:
        full = {"AllReduce": "AllReduce_Sum_bf16_RING_LL", "AllGather": "AllGather_RING_LL"}
        name = _NCCL.format(what=full.get(what, f"{what}_Sum_bf16_RING_LL"))
        cpu = {"AllGather": "gloo:all_gather", "ReduceScatter": "gloo:reduce_scatter"}.get(
            what, "gloo:all_reduce"
        )
    return Kernel(name, "communication", weight, cpu, "collective", scope, TRANSFER)


def layer(*, prefill: bool, attention_ranks: int, ranks: int) -> tuple[Kernel, ...]:
    """The kernels of one decoder layer, in order; collectives only where ranks meet.

    attention_ranks: ranks that share attention. ranks: all of the replica. Where they
    differ (DP attention) tokens are gathered before the experts and scattered after.
    """
    together = attention_ranks == ranks
    kernels = [
        Kernel(NORM, "norm", 2, "aten::rms_norm", law="attention input norm"),
        Kernel("nvjet_tst_64x8_64x16_4x1_v_bz_TNT", "gemm", 10, "aten::mm", law="attention qkv"),
        Kernel(_ROPE, "attention", 2, "sgl_kernel::rotary_embedding_cpu", law=_OWN_ROWS),
        Kernel(
            "void store_kvcache<256l, 4, true, long>(StoreKVCacheParams)",
            "attention",
            1,
            "aten::index_put_",
            law=_OWN_ROWS,
        ),
        Kernel(
            PREFILL_ATTENTION if prefill else DECODE_ATTENTION,
            "attention",
            16,
            "aten::scaled_dot_product_attention",
            law="attention attention",
        ),
        Kernel(
            "nvjet_tst_64x8_64x16_2x1_v_bz_splitK_TNT", "gemm", 6, "aten::mm", law="attention o"
        ),
    ]
    if attention_ranks > 1:
        small = not prefill
        kernels.append(_collective("AllReduce", attention_ranks, 4, "attention", small=small))
    kernels.append(Kernel(NORM, "norm", 2, "aten::rms_norm", law="attention post norm"))
    if not together:
        kernels.append(_collective("AllGather", ranks, 4, "all", small=False))
    kernels += [
        Kernel("nvjet_tst_16x64_64x16_1x4_h_bz_TNN", "gemm", 2, "aten::mm", law="experts router"),
        Kernel(
            "void moe::topkGatingSoftmax<float, 2, 64, 4, 16>(float const*, bool const*, "
            "float*, int, int*, int*, int, int, int)",
            "moe",
            2,
            "sgl_kernel::topk_softmax_cpu",
            law="experts top k",
        ),
        Kernel(
            "void moe_align_block_size_kernel<int>(int const*, int*, int*, int*, int, int, "
            "int, unsigned long, int*)",
            "moe",
            2,
            "sgl_kernel::moe_align_cpu",
            law="experts top k",
        ),
        Kernel("fused_moe_kernel", "moe", 24, _EXPERTS_CPU, law="experts up"),
        Kernel(_ACTIVATION, "activation", 2, "aten::silu", law="experts up"),
        Kernel("fused_moe_kernel", "moe", 13, _EXPERTS_CPU, law="experts down"),
        Kernel(
            "void moe_sum_reduce_warp_per_token_vec_kernel<4>(__nv_bfloat16 const*, "
            "__nv_bfloat16*, long, long, long, float)",
            "moe",
            2,
            "sgl_kernel::moe_sum_cpu",
            law="experts top k",
        ),
    ]
    if not together:
        kernels.append(_collective("ReduceScatter", ranks, 4, "all", small=False))
    elif ranks > 1:
        kernels.append(_collective("AllReduce", ranks, 4, "all", small=not prefill))
    return tuple(kernels)


def forward(*, prefill: bool, layers: int, attention_ranks: int, ranks: int) -> tuple[Kernel, ...]:
    """All launches of one forward pass of a rank, in order."""
    head = (
        Kernel("Memcpy HtoD (Pinned -> Device)", "memory", 1, "aten::copy_", "memcpy"),
        Kernel("Memset (Device)", "memory", 0.5, "aten::zero_", "memset"),
        Kernel(_EMBEDDING, "elementwise", 1, "aten::embedding", law=_OWN_ROWS),
    )
    tail = [
        Kernel(NORM, "norm", 2, "aten::rms_norm", law="head final norm"),
        Kernel(
            "sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize64x64x64_warpgroupsize1x1x1_"
            "execute_segment_k_off_kernel__5x_cublas",
            "gemm",
            14,
            "aten::mm",
            law="head logits",
        ),
    ]
    if attention_ranks > 1:
        tail.append(_collective("AllGather", attention_ranks, 3, "attention", small=False))
    tail += [
        Kernel(SAMPLING, "sampling", 4, "aten::multinomial", law="head sample"),
        Kernel(_ELEMENTWISE, "elementwise", 1, "aten::add_", law="head sample"),
        Kernel("Memcpy DtoH (Device -> Pinned)", "memory", 1, "aten::copy_", "memcpy"),
    ]
    body = layer(prefill=prefill, attention_ranks=attention_ranks, ranks=ranks) * layers
    return (*head, *body, *tail)


def nominal_ns(kernel: Kernel, batch: Batch, step_ns: int, total_weight: float) -> float:
    """Duration without jitter and faults, ns (of a collective: its pure transfer).

    step_ns: wall time of a small decode step. Work grows once a batch has more than 256
    tokens; attention also with the tokens it looks back on.
    """
    share = FILL * step_ns * kernel.weight / total_weight
    if batch.mode == "IDLE":
        return share * (1.0 if kernel.kind == "collective" else 0.2)
    growth = max(1.0, batch.tokens / 256)
    if kernel.category == "attention":
        growth *= 1 + batch.kv / 65536
    return share * growth


# When each kernel of one forward pass runs, on every rank of a replica.
#
# A collective starts on a rank when the rank arrives there and ends on all of its group at
# the same moment: the last arrival plus the transfer. So waits follow from compute, and the
# rank that arrives last spends the least time in it. Every rank derives the same timeline
# by itself, because all randomness is seeded by (seed, rank, step).


JITTER = 0.01
"""Each kernel lasts its nominal time ± at most this share, evenly spread around 0."""

DP_STEP_NOISE = (0.02, 0.6)
"""sd and phi of the noise of steps that DP attention has where none is asked for."""

LEAD = 0.02
"""Share of a step's nominal wall time before the first kernel."""

GAP = 0.0002
"""Share of a step's nominal wall time between two kernels of a stream."""


EVERY_RANK = "all"
"""In the place of a rank."""


@dataclass(frozen=True)
class Slow:
    """A planted fault: `category` of rank `rank` takes `factor` times as long.

    rank: a label such as `TP1`, the rank's number, or `EVERY_RANK`. Steps are forward passes
    counted since the server's start; the fault holds in [from_step, until_step).
    """

    rank: str
    category: str = "compute"
    factor: float = 1.0
    from_step: int = 0
    until_step: int | None = None

    def hits(self, place: Place, kernel: Kernel, step: int) -> bool:
        """True when the kernel of this rank in this step is slowed."""
        if self.rank not in (EVERY_RANK, place.label, str(place.index)):
            return False
        if step < self.from_step or (self.until_step is not None and step >= self.until_step):
            return False
        if self.category == "compute":
            return kernel.kind == "kernel"
        return kernel.category == self.category


@dataclass(frozen=True)
class Launch:
    """One kernel on the device. start_ns counts from the step's start."""

    kernel: Kernel
    start_ns: int
    dur_ns: int


@dataclass(frozen=True)
class Model:
    """Everything that decides a timeline besides the batches. step_ns: a decode step.

    has_graphs: whether decode steps replay graphs (with DP attention their bucket counts).
    """

    step_ns: int
    layers: int = 4
    seed: int = 0
    slow: tuple[Slow, ...] = ()
    step_noise: StepNoise | None = None
    has_graphs: bool = True
    life_noise: LifeNoise | None = None

    def step(
        self,
        step: int,
        peers: Sequence[Place],
        batches: Sequence[Batch],
        *,
        jitter: bool = True,
    ) -> dict[int, list[Launch]]:
        """Launches of every rank of one replica and stage, by `Place.index`.

        batches: of each queue of the replica. A batch without tokens runs too where a
        peer of another queue works (DP attention), since all meet in the collectives.
        """
        sizes = peers[0].sizes
        weight = sum(kernel.weight for kernel in self._kernels(sizes, prefill=False))
        nominal = self._nominal(sizes, batches, weight)
        prefill = any(batch.mode == "EXTEND" for batch in batches)
        run = {
            place.index: self._kernels(
                sizes,
                prefill=batches[place.queue].mode == "EXTEND" if sizes.queues > 1 else prefill,
            )
            for place in peers
        }
        jitter = jitter and sizes.queues == 1
        gap = int(self.step_ns * GAP)
        clock = {place.index: int(self.step_ns * LEAD) for place in peers}
        noise = {place.index: self._noise(place, step, jitter) for place in peers}
        level = {place.index: self._level(place, step) for place in peers}
        launches: dict[int, list[Launch]] = {place.index: [] for place in peers}
        groups = _attention_groups(peers)
        for position, first in enumerate(run[peers[0].index]):
            if first.kind == "collective":
                for group in groups if first.scope == "attention" else [list(peers)]:
                    kernel = run[group[0].index][position]
                    busiest = max((p.queue for p in group), key=lambda q: batches[q].tokens)
                    transfer = max(1, int(nominal(kernel, busiest)))
                    end = max(clock[p.index] for p in group) + transfer
                    for place in group:
                        start = clock[place.index]
                        launches[place.index].append(Launch(kernel, start, end - start))
                        clock[place.index] = end + gap
                continue
            for place in peers:
                kernel = run[place.index][position]
                length = nominal(kernel, place.queue)
                if not length:  # an idle rank that runs eagerly has no rows of its own
                    continue
                for fault in self.slow:
                    if fault.hits(place, kernel, step):
                        length *= fault.factor
                if kernel.kind == "kernel":
                    length *= level[place.index]
                if jitter:
                    length *= 1 + noise[place.index].uniform(-JITTER, JITTER)
                start, dur = clock[place.index], max(1, round(length))
                launches[place.index].append(Launch(kernel, start, dur))
                clock[place.index] = start + dur + gap
        return launches

    def _kernels(self, sizes: Sizes, *, prefill: bool) -> tuple[Kernel, ...]:
        return forward(
            prefill=prefill,
            layers=self.layers,
            attention_ranks=sizes.attention_tp,
            ranks=sizes.tp,
        )

    def _nominal(
        self, sizes: Sizes, batches: Sequence[Batch], weight: float
    ) -> Callable[[Kernel, int], float]:
        """Gives the nominal ns of a kernel that a queue runs, in this life."""
        life = self.life_noise

        def of_life(kernel: Kernel) -> float:
            return life.factor(kernel.name) if life is not None else 1.0

        if sizes.queues == 1:
            return lambda kernel, queue: (
                nominal_ns(kernel, batches[queue], self.step_ns, weight) * of_life(kernel)
            )
        running = [Running(b.size, b.tokens, b.kv, b.mode == "EXTEND") for b in batches]
        asks = asked(running, has_graphs=self.has_graphs)
        unit = FILL * self.step_ns / weight
        return lambda kernel, queue: (
            unit * kernel.weight * growth(kernel.law, asks[queue]) * of_life(kernel)
        )

    def wall_ns(self, step: int, peers: Sequence[Place], batches: Sequence[Batch]) -> int:
        """How long the step takes on the wall, ns: its longest rank leaves some idle time."""
        launches = self.step(step, peers, batches, jitter=False)
        last = max(rank[-1].start_ns + rank[-1].dur_ns for rank in launches.values())
        return int(last / (FILL + LEAD + GAP * max(map(len, launches.values()))))

    def _noise(self, place: Place, step: int, jitter: bool) -> random.Random:
        return random.Random(f"{self.seed}/{place.index}/{step}" if jitter else 0)

    def _level(self, place: Place, step: int) -> float:
        noise = self.step_noise
        if noise is None and place.sizes.queues > 1:
            noise = StepNoise(*DP_STEP_NOISE)
        return noise.factor(self.seed, place.index, step) if noise is not None else 1.0


def _attention_groups(peers: Sequence[Place]) -> list[list[Place]]:
    groups: dict[int, list[Place]] = {}
    for place in peers:
        groups.setdefault(place.queue, []).append(place)
    return list(groups.values())


def is_idle(batches: Sequence[Batch]) -> bool:
    """True when no queue of a replica has anything to run."""
    return all(batch == IDLE for batch in batches)


# Which ranks there are, how they are called, and which of them meet.


@dataclass(frozen=True)
class Sizes:
    """Parallel sizes. dp: as given on the command line, of replicas or of attention.

    tags, file_parts: how a version names a rank in its log and in file names.
    """

    tp: int = 1
    dp: int = 1
    pp: int = 1
    ep: int = 1
    dp_attention: bool = False
    tags: tuple[str, ...] = NEWEST.tags
    file_parts: tuple[str, ...] = NEWEST.file_parts

    @property
    def engines(self) -> int:
        """Replicas that never meet: several only in plain data parallel."""
        return 1 if self.dp_attention else self.dp

    @property
    def queues(self) -> int:
        """Batches that one engine runs side by side: several only with DP attention."""
        return self.dp if self.dp_attention else 1

    @property
    def attention_tp(self) -> int:
        """Ranks that share the attention of one batch."""
        return self.tp // self.queues


@dataclass(frozen=True)
class Place:
    """One scheduler process. dp is None where there is no data parallelism at all.

    index: position among all ranks. engine: its replica. queue: its batch within it.
    """

    index: int
    engine: int
    queue: int
    tp: int
    pp: int
    ep: int
    dp: int | None
    sizes: Sizes

    @property
    def tags(self) -> tuple[str, ...]:
        """`("DP0", "TP1")`, in the order of the server's log; size 1 leaves a tag out."""
        shown = self._indices(self.dp is not None)
        return tuple(f"{name}{shown[name]}" for name in self.sizes.tags if name in shown)

    def _indices(self, dp: bool) -> dict[str, int | None]:
        """By dimension, of those that have a size; dp: whether data parallelism is shown."""
        sizes = self.sizes
        every = {
            "DP": (self.dp, dp),
            "PP": (self.pp, sizes.pp > 1),
            "TP": (self.tp, sizes.tp > 1),
            "EP": (self.ep, sizes.ep > 1),
        }
        return {name: index for name, (index, shown) in every.items() if shown}

    @property
    def title(self) -> str:
        """The process title, `sglang::scheduler_DP0_TP1`."""
        return "_".join(("sglang::scheduler", *self.tags))

    @property
    def label(self) -> str:
        """`DP0 TP1`; `TP0` for the only rank."""
        return " ".join(self.tags) or "TP0"

    @property
    def file_part(self) -> str:
        """`TP-1-DP-0`, the order and rules of trace file names."""
        shown = {**self._indices(self.dp is not None and self.sizes.dp > 1), "TP": self.tp}
        parts = self.sizes.file_parts
        return "-".join(f"{name}-{shown[name]}" for name in parts if name in shown)

    @property
    def attention_rank(self) -> int:
        """Place within the ranks that share attention; 0 is the one that logs batches."""
        return self.tp % self.sizes.attention_tp

    @property
    def gpu(self) -> int:
        """Device index on this node, with base 0 and step 1."""
        sizes = self.sizes
        return (self.engine * sizes.pp + self.pp) * sizes.tp + self.tp

    @property
    def logs_batches(self) -> bool:
        """True for the ranks that write `Prefill batch` and `Decode batch` lines."""
        return self.attention_rank == 0 and self.pp == 0


def places(sizes: Sizes) -> tuple[Place, ...]:
    """All ranks: by replica, then pipeline stage, then tensor rank."""
    everyone: list[Place] = []
    for engine in range(sizes.engines):
        for pp in range(sizes.pp):
            for tp in range(sizes.tp):
                queue = tp // sizes.attention_tp
                dp = queue if sizes.dp_attention else engine if sizes.dp > 1 else None
                ep = tp * sizes.ep // sizes.tp
                everyone.append(Place(len(everyone), engine, queue, tp, pp, ep, dp, sizes))
    return tuple(everyone)


def stage_peers(place: Place, everyone: tuple[Place, ...]) -> tuple[Place, ...]:
    """The ranks of the same replica and pipeline stage, `place` among them."""
    return tuple(p for p in everyone if (p.engine, p.pp) == (place.engine, place.pp))
