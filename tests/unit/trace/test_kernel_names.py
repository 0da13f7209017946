"""Keys and categories of real kernel names, NVIDIA and AMD."""

from __future__ import annotations

import pytest

from pytest_sglprof._errors import SettingsError
from pytest_sglprof._trace.categories import CATEGORY_NAMES, category
from pytest_sglprof._trace.kernel_names import normalise

BF16 = "__nv_bfloat16"
NAMES = {
    "communication": (
        "ncclDevKernel_AllReduce_Sum_bf16_RING_LL(ncclDevKernelArgsStorage<4096ul>)",
        "ncclSymDevKernel_AllReduce_RSxLDMC_AGxSTMC_sum_bf16(ncclSymDevArgs)",
        "ncclKernel_SendRecv_RING_SIMPLE_Sum_int8_t(ncclDevComm*, unsigned long, ncclWork*)",
        "void sglang::cross_device_reduce_1stage<__nv_bfloat16, 2>(sglang::RankData*, int)",
        "void vllm::cross_device_reduce_2stage<half, 8>(vllm::RankData*, int)",
        "void flashinfer::trtllm_allreduce_fusion::allreduce_fusion_kernel_oneshot_lamport<"
        "(AllReduceFusionPattern)1, __nv_bfloat16, 4, false>(AllReduceFusionParams<__nv_bfloat16>)",
        "void tensorrt_llm::kernels::ar_fusion::allreduce_fusion_kernel_twoshot_sync<Pattern>()",
        "fused_allreduce_rmsnorm_kernel",
        "void aiter::allreduce_fusion_kernel_2stage_rmsnorm<bf16>(Args)",
        "void quickreduce::allreduce_prototype_twoshot<quickreduce::AllReduceTwoshot<half>>()",
        "void deep_ep::intranode::dispatch<8, 768, 4096>(int4*, float*)",
        "void deep_ep::internode_ll::combine<true, 7168>(void*, void*)",
        "void internode::dispatch<false, 4>()",
        "void mscclpp::allreduce7<__half>(__half*)",
        "nvshmemi_transfer_rma_p2p",
        "void mooncake::ep_dispatch<7168>()",
        "multimem_all_reduce_kernel",
        "void all_gather_kernel<__nv_bfloat16>()",
        "gloo:all_reduce",
    ),
    "moe": (
        "fused_moe_kernel",
        "void moe_align_block_size_kernel<int>(int*, int*)",
        "void vllm::moe::topkGatingSoftmax<8, 128, 4, 16>(float const*)",
        "void moe_fused_gate_kernel_dynamic<float>(void*)",
        "ck_tile::MoeSortingKernel",
        "_ZN2ck15kernel_moe_gemmINS_27GridwiseMoeGemmBPreShuffleEEvT_",
        "void cutlass::device_kernel<cutlass::gemm::kernel::GroupedGemmKernel<cutlass::half_t>>()",
        "moe_sum_reduce_kernel",
        "aiter::fmoe_bf16_pertokenFp8_g1u1_silu",
        "bmm_Bfloat16_MxE2m1_dynBatch_expert_routing",
    ),
    "attention": (
        "void flash::flash_fwd_splitkv_kernel<Flash_fwd_kernel_traits<128, 64, 128, 4, false,"
        " false, cutlass::bfloat16_t>, false>(flash::Flash_fwd_params)",
        "void cutlass::device_kernel<flash::enable_sm90_or_later<flash::FlashAttnFwdSm90<flash::"
        "CollectiveMainloopFwdSm90<2, cute::tuple<cute::C<1>>, cutlass::bfloat16_t>>>>(Params)",
        "void flashinfer::BatchDecodeWithPagedKVCacheKernel<(PosEncodingMode)0, 2u, 8u>(Params)",
        "void flashinfer::BatchPrefillWithRaggedKVCacheKernel<KTraits>(Params)",
        "fmhaSm100fKernel_QkvBfloat16OBfloat16H128PagedKvCausalVarSeqQ128Kv128",
        "_fwd_grouped_kernel_stage1",
        "_fwd_kernel_stage2",
        "paged_attention_ll4mi_QKV_mfma16_kernel",
        "void flashinfer::BatchQKApplyRotaryPosIdsCosSinCacheEnhancedKernel<true, 128u>(Params)",
        "void flash_fwd_mla_combine_kernel<cutlass::bfloat16_t, float, long, 512>(Params)",
        "set_mla_kv_buffer_kernel",
        "create_flashinfer_kv_indices_triton",
        "void store_kvcache<256>(void*)",
        "void merge_attn_states_kernel<float, 128>()",
        "chunk_gated_delta_rule_fwd_kernel_h_blockdim64",
    ),
    "gemm": (
        "nvjet_tst_128x8_64x12_4x1_v_bz_TNT",
        "ampere_bf16_s16816gemm_bf16_128x64_ldg8_f2f_stages_64x3_tn",
        "sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64_warpgroupsize1x1x1_cublas",
        "void gemv2T_kernel_val<int, int, __nv_bfloat16, __nv_bfloat16, float, 128, 16>(Params)",
        "void cublasLt::splitKreduce_kernel<32, 16, int, float, __nv_bfloat16>(Params)",
        "Cijk_Alik_Bljk_BBS_BH_Bias_HAS_SAV_UserArgs_MT256x32x64_MI16x16x1_SN_LDSB0",
        "void cutlass::Kernel2<cutlass_80_tensorop_bf16_s16816gemm_relu_bf16_64x64_64x6_tn_align8>"
        "(cutlass_80_tensorop_bf16_s16816gemm_relu_bf16_64x64_64x6_tn_align8::Params)",
        "void marlin::Marlin<__nv_bfloat16, 256, 1, 8, 8, 4>(int4 const*)",
        "void deep_gemm::sm90_fp8_gemm_1d2d_impl<0u, 4096u, 7168u, 1u, 64u, 128u>(float*)",
        "_w8a8_block_fp8_matmul",
        "_ZN7ck_tile6kentryILi1ENS_10GemmKernelINS_13TilePartitionEEEEEvT0_",
        "aten::mm",
        "aten::addmm",
    ),
    "norm": (
        "void flashinfer::norm::FusedAddRMSNormKernel<8u, __nv_bfloat16>(__nv_bfloat16*)",
        "void rms_norm_kernel<cutlass::bfloat16_t>(cutlass::bfloat16_t*)",
        "_ZN5aiter24add_rmsnorm_quant_kernelIDF16bDF16bLi256ELi16ELb1ELb0ELb1ELi1EEEvPT0_",
        "void at::native::(anonymous namespace)::vectorized_layer_norm_kernel<float, float>(int)",
    ),
    "quantization": (
        "void per_token_group_quant_8bit_kernel<__nv_bfloat16, c10::Float8_e4m3fn>(void*)",
        "_per_token_group_quant_fp8",
        "void vllm::scaled_fp8_quant_kernel<float>(float*)",
        "void tensorrt_llm::kernels::cvt_fp16_to_fp4<__nv_bfloat16>(int)",
        "_ZN5aiter31dynamic_per_token_scaled_quant_kernelI14__hip_bfloat16EEvPT_",
    ),
    "activation": (
        "void flashinfer::activation::act_and_mul_kernel<__nv_bfloat16, silu>(__nv_bfloat16*)",
        "void act_and_mul_kernel<cutlass::half_t, gelu_tanh>(cutlass::half_t*)",
        "_ZN7sgl_hip10activation18act_and_mul_kernelI14__hip_bfloat16XadL_ZN4siluEEEEvPT_",
        "void at::native::vectorized_elementwise_kernel<4, at::native::(anonymous namespace)::"
        "silu_kernel(at::TensorIteratorBase&)::{lambda()#1}, std::array<char*, 2ul>>(int)",
    ),
    "sampling": (
        "void flashinfer::sampling::TopKTopPSamplingFromProbKernel<1024u>(float*)",
        "void at::native::reduce_kernel<512, 1, at::native::ReduceOp<float, at::native::"
        "ArgMaxOps<float>, unsigned int, long, 4, 4>>(Params)",
        "void at::native::(anonymous namespace)::cunn_SoftMaxForward<4, float>(float*)",
        "void at_cuda_detail::cub::DeviceRadixSortOnesweepKernel<Policy, true, float>(bool*)",
        "void at::native::radixSortKVInPlace<2, -1, 32, 4>(Info)",
        "apply_penalties_kernel",
    ),
    "elementwise": (
        "void at::native::vectorized_elementwise_kernel<4, at::native::FillFunctor<int>,"
        " std::array<char*, 1ul>>(int, at::native::FillFunctor<int>, std::array<char*, 1ul>)",
        "void at::native::index_elementwise_kernel<128, 4, Fn>(long, Fn)",
        "void at::native::(anonymous namespace)::CatArrayBatchedCopy<OpaqueType<2u>, 2>(void*)",
        "void at_cuda_detail::cub::DeviceScanKernel<Policy, int*, int*>(int*)",
        "triton_poi_fused_add_mul_0",
        "write_req_to_token_pool_triton",
        "rocprim::ROCPRIM_400200_NS::detail::trampoline_kernel<Config>",
        "aten::copy_",
    ),
    "memory": (
        "Memcpy DtoD (Device -> Device)",
        "Memcpy HtoD (Pageable -> Device)",
        "Memset (Device)",
        "[CUDA memcpy Device-to-Host]",
        "__amd_rocclr_copyBuffer",
        "__amd_rocclr_fillBufferAligned",
    ),
    "other": ("TorchDynamo Cache Lookup", "detach", "zzz", ""),
}


def test_every_category_is_exercised() -> None:
    assert sorted(NAMES) == sorted(CATEGORY_NAMES)


@pytest.mark.parametrize(
    ("expected", "name"), [(word, name) for word, names in NAMES.items() for name in names]
)
def test_category(expected: str, name: str) -> None:
    assert category(name) == expected


def test_users_patterns_win_in_their_order() -> None:
    name = "fused_moe_kernel"
    assert category(name, [("gemm", "fused_moe"), ("norm", "moe")]) == "gemm"
    assert category(name, [("norm", "nothing")]) == "moe"
    assert category("my_attention_free_thing", [("own", r"^my_")]) == "own"


def test_a_bad_pattern_is_quoted() -> None:
    with pytest.raises(SettingsError, match=r"'\(' of category moe") as caught:
        category("x", [("moe", "(")])
    assert caught.value.hint


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("fused_moe_kernel", "fused_moe_kernel"),
        (NAMES["communication"][0], "ncclDevKernel_AllReduce_Sum_bf16_RING_LL"),
        (NAMES["communication"][3], "sglang::cross_device_reduce_1stage"),
        (NAMES["attention"][0], "flash::flash_fwd_splitkv_kernel"),
        (NAMES["norm"][2], "aiter::add_rmsnorm_quant_kernel"),
        (NAMES["activation"][2], "sgl_hip::activation::act_and_mul_kernel"),
        (NAMES["gemm"][5], "Cijk_Alik_Bljk_BBS_BH_MT256x32x64"),
        (
            NAMES["gemm"][6],
            "cutlass_80_tensorop_bf16_s16816gemm_relu_bf16_64x64_64x6_tn_align8",
        ),
        (NAMES["elementwise"][0], "at::native::vectorized_elementwise_kernel[FillFunctor]"),
        (NAMES["sampling"][1], "at::native::reduce_kernel[ArgMaxOps]"),
        (NAMES["norm"][3], "at::native::vectorized_layer_norm_kernel"),
        ("Memcpy DtoD (Device -> Device)", "Memcpy DtoD"),
        ("aten::mm", "aten::mm"),
        ("a->b<c>(d)", "a->b"),
        ("_Z3fooi", "foo"),
        ("_Zweird", "_Zweird"),
        ("<lambda>", "<lambda>"),
        ("", ""),
        ("triton_kernel_0d1d2de3c", "triton_kernel"),
        (
            "_ZN7ck_tile6kentryILi1ENS_10GemmKernelINS_13TilePartitionEEEEEvT0_",
            "ck_tile::kentry[GemmKernel]",
        ),
    ],
)
def test_key(name: str, key: str) -> None:
    assert normalise(name) == key


@pytest.mark.parametrize("name", [name for names in NAMES.values() for name in names])
def test_keys_are_stable_and_short(name: str) -> None:
    key = normalise(name)
    assert normalise(key) == key
    assert len(key) <= len(name)


def test_arguments_and_types_are_one_key() -> None:
    keys = {
        normalise(f"void flashinfer::norm::RMSNormKernel<{width}u, {kind}>({kind}*, int)")
        for width in (4, 8)
        for kind in (BF16, "half", "cutlass::bfloat16_t")
    }
    assert keys == {"flashinfer::norm::RMSNormKernel"}


def test_every_category_has_a_pattern_that_python_takes() -> None:
    assert category("x" * 5_000) == "other"
    assert normalise("<" * 5_000 + "x") != ""
