from __future__ import annotations

import pytest

from pytest_sglprof._trace.categories import collective_kind, is_symmetric


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("ncclDevKernel_AllReduce_Sum_bf16_RING_LL(ncclDevKernelArgs)", "collective"),
        ("ncclDevKernel_AllGather_RING_LL(ncclDevComm*)", "collective"),
        ("ncclKernel_ReduceScatter_RING_LL_Sum_half", "collective"),
        ("void sglang::cross_device_reduce_1stage<__nv_bfloat16, 8>(...)", "collective"),
        ("void quickreduce::allreduce_prototype_twoshot<...>", "collective"),
        ("gloo:all_reduce", "collective"),
        ("gloo:broadcast", "collective"),
        ("mscclpp::allreduce_kernel", "collective"),
        ("ncclDevKernel_SendRecv(ncclDevKernelArgsStorage<4096ul>)", "p2p"),
        ("gloo:send", "p2p"),
        ("gloo:recv", "p2p"),
        ("void deep_ep::intranode::dispatch<8, 768, 8192>(...)", "all_to_all"),
        ("deep_ep::internode_ll::combine<7168>", "all_to_all"),
        ("gloo:all_to_all", "all_to_all"),
        ("moe_dispatch_kernel", "all_to_all"),
        ("flashinfer::trtllm_allreduce_fusion::allreduce_fusion_kernel_oneshot_lamport", "fused"),
        ("fused_allreduce_rmsnorm_kernel", "fused"),
        ("fused_all_gather_matmul_kernel", "fused"),
        ("void aiter::local_device_load_rmsnorm_naive<1>(...)", "fused"),
        ("void hybrid_ep::combine_kernel<1>(...)", "all_to_all"),
        ("void c10d::symmetric_memory::put_signal_kernel(...)", "p2p"),
        ("wait_signal_kernel", "p2p"),
        ("void nvshmem::put_nbi<1>(...)", "p2p"),
        ("void c10d::symmetric_memory::barrier_kernel(...)", "collective"),
    ],
)  # fmt: skip
def test_the_name_tells_the_kind(name: str, kind: str) -> None:
    assert collective_kind(name) == kind


@pytest.mark.parametrize(
    ("name", "symmetric"),
    [
        ("gloo:all_reduce", True),
        ("gloo:all_gather", True),
        ("ncclDevKernel_ReduceScatter_Sum_bf16_RING_LL", True),
        ("void sglang::cross_device_reduce_2stage<float, 2>", True),
        ("void quickreduce::allreduce_prototype_twoshot<...>", True),
        ("gloo:broadcast", False),
        ("gloo:gather", False),
        ("ncclDevKernel_Broadcast_RING_LL", False),
        ("ncclDevKernel_Reduce_Sum_f32_RING_LL", False),
        ("ncclDevKernel_SendRecv", False),
        ("put_signal_kernel", False),
        ("wait_signal_kernel", False),
        ("nvshmemi_proxy_progress_kernel", False),
        ("nvshmem_barrier_all_on_stream_kernel", True),
    ],
)
def test_only_where_all_wait_for_the_last_can_a_wait_be_told(name: str, symmetric: bool) -> None:
    assert is_symmetric(name) is symmetric
