"""The model that the stand-in pretends to run: the kernels of one forward pass.

A decoder with experts, as it looks on NVIDIA hardware: names are those that real traces
hold, weights are rough shares of a decode step. A rank's true time in a category is the
sum of `nominal_ns` over its kernels times the planted factor, plus jitter whose mean is 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

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
    replica. cpu_name: the operator that does this work on a server without GPU.
    """

    name: str
    category: str
    weight: float
    cpu_name: str = "aten::copy_"
    kind: Kind = "kernel"
    scope: Scope = "all"


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

_NORM = (
    "void flashinfer::norm::FusedAddRMSNormKernel<8u, __nv_bfloat16>(__nv_bfloat16*, "
    "__nv_bfloat16*, __nv_bfloat16*, unsigned int, unsigned int, unsigned int, float, float)"
)
_ROPE = (
    "void flashinfer::BatchQKApplyRotaryPosIdsCosSinCacheKernel<true, 128u, 8u, 16u, "
    "__nv_bfloat16, long>(__nv_bfloat16*, __nv_bfloat16*, __nv_bfloat16*, __nv_bfloat16*, "
    "float*, long*, unsigned int, unsigned int)"
)
_DECODE_ATTENTION = (
    "void flashinfer::BatchDecodeWithPagedKVCacheKernel<(flashinfer::PosEncodingMode)0, 2u, "
    "4u, 8u, 16u, 2u, 4u, flashinfer::DefaultAttention<false, false, false, false>, "
    "flashinfer::BatchDecodeParams<__nv_bfloat16, __nv_bfloat16, __nv_bfloat16, int> >"
    "(flashinfer::BatchDecodeParams<__nv_bfloat16, __nv_bfloat16, __nv_bfloat16, int>)"
)
_PREFILL_ATTENTION = (
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
_SAMPLING = (
    "void flashinfer::sampling::TopKTopPSamplingFromProbKernel<1024u, "
    "(cub::BlockScanAlgorithm)2, (cub::BlockReduceAlgorithm)0, 4u, true, float, int>"
    "(float*, int*, float*, int*, int*, int, float, unsigned int, unsigned long, unsigned long)"
)
_CUSTOM_REDUCE = (
    "void sglang::cross_device_reduce_1stage<__nv_bfloat16, {size}>(sglang::RankData*, "
    "sglang::RankSignals, sglang::Signal*, __nv_bfloat16*, int, int)"
)
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
    return Kernel(name, "communication", weight, cpu, "collective", scope)


def layer(*, prefill: bool, attention_ranks: int, ranks: int) -> tuple[Kernel, ...]:
    """The kernels of one decoder layer, in order; collectives only where ranks meet.

    attention_ranks: ranks that share attention. ranks: all of the replica. Where they
    differ (DP attention) tokens are gathered before the experts and scattered after.
    """
    together = attention_ranks == ranks
    kernels = [
        Kernel(_NORM, "norm", 2, "aten::rms_norm"),
        Kernel("nvjet_tst_64x8_64x16_4x1_v_bz_TNT", "gemm", 10, "aten::mm"),
        Kernel(_ROPE, "attention", 2, "sgl_kernel::rotary_embedding_cpu"),
        Kernel(
            "void store_kvcache<256l, 4, true, long>(StoreKVCacheParams)",
            "attention",
            1,
            "aten::index_put_",
        ),
        Kernel(
            _PREFILL_ATTENTION if prefill else _DECODE_ATTENTION,
            "attention",
            16,
            "aten::scaled_dot_product_attention",
        ),
        Kernel("nvjet_tst_64x8_64x16_2x1_v_bz_splitK_TNT", "gemm", 6, "aten::mm"),
    ]
    if attention_ranks > 1:
        small = not prefill
        kernels.append(_collective("AllReduce", attention_ranks, 4, "attention", small=small))
    kernels.append(Kernel(_NORM, "norm", 2, "aten::rms_norm"))
    if not together:
        kernels.append(_collective("AllGather", ranks, 4, "all", small=False))
    kernels += [
        Kernel("nvjet_tst_16x64_64x16_1x4_h_bz_TNN", "gemm", 2, "aten::mm"),
        Kernel(
            "void moe::topkGatingSoftmax<float, 2, 64, 4, 16>(float const*, bool const*, "
            "float*, int, int*, int*, int, int, int)",
            "moe",
            2,
            "sgl_kernel::topk_softmax_cpu",
        ),
        Kernel(
            "void moe_align_block_size_kernel<int>(int const*, int*, int*, int*, int, int, "
            "int, unsigned long, int*)",
            "moe",
            2,
            "sgl_kernel::moe_align_cpu",
        ),
        Kernel("fused_moe_kernel", "moe", 24, "sgl_kernel::fused_experts_cpu"),
        Kernel(_ACTIVATION, "activation", 2, "aten::silu"),
        Kernel("fused_moe_kernel", "moe", 13, "sgl_kernel::fused_experts_cpu"),
        Kernel(
            "void moe_sum_reduce_warp_per_token_vec_kernel<4>(__nv_bfloat16 const*, "
            "__nv_bfloat16*, long, long, long, float)",
            "moe",
            2,
            "sgl_kernel::moe_sum_cpu",
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
        Kernel(_EMBEDDING, "elementwise", 1, "aten::embedding"),
    )
    tail = [
        Kernel(_NORM, "norm", 2, "aten::rms_norm"),
        Kernel(
            "sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize64x64x64_warpgroupsize1x1x1_"
            "execute_segment_k_off_kernel__5x_cublas",
            "gemm",
            14,
            "aten::mm",
        ),
    ]
    if attention_ranks > 1:
        tail.append(_collective("AllGather", attention_ranks, 3, "attention", small=False))
    tail += [
        Kernel(_SAMPLING, "sampling", 4, "aten::multinomial"),
        Kernel(_ELEMENTWISE, "elementwise", 1, "aten::add_"),
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
