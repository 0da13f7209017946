from __future__ import annotations

import pytest

from pytest_sglprof.trace.collectives import collective_kind


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
    ],
)  # fmt: skip
def test_the_name_tells_the_kind(name: str, kind: str) -> None:
    assert collective_kind(name) == kind
