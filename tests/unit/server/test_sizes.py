from __future__ import annotations

import json

import pytest

from pytest_sglprof._ranks import Rank
from pytest_sglprof._server.sizes import ServerSizes


def labels(**info: object) -> list[str]:
    return [rank.label for rank in ServerSizes.from_info(info).ranks()]


@pytest.mark.parametrize("case", ["tp1", "tp2", "dp2", "tp2dp2"])
def test_ranks_of_real_servers(shared_data, case):
    info = json.loads((shared_data / "logs" / case / "server_info.json").read_text())
    sizes = ServerSizes.from_info(info)
    expected = {
        "tp1": ["TP0"],
        "tp2": ["TP0", "TP1"],
        "dp2": ["DP0 TP0", "DP1 TP0"],
        "tp2dp2": ["DP0 TP0", "DP0 TP1", "DP1 TP0", "DP1 TP1"],
    }
    assert [rank.label for rank in sizes.ranks()] == expected[case]
    assert sizes.is_cpu
    assert sizes.gpu_ranks() == {}
    assert sizes.version == "0.5.23"


@pytest.mark.parametrize("folder", ["sglang-cpu-tp2", "sglang-cpu-tp2dp2"])
def test_ranks_are_those_of_real_file_names(shared_data, folder):
    names = [path.name for path in (shared_data / "torch" / folder).glob("[!m]*.gz")]
    sizes = ServerSizes(tp=2, dp=2 if "dp2" in folder else 1)
    assert {Rank.from_file_name(name) for name in names} == set(sizes.ranks())


def test_expert_parallel_file_names(shared_data):
    names = [p.name for p in (shared_data / "torch" / "sglang-cpu-mixtral-tp2ep2").iterdir()]
    assert {Rank.from_file_name(name) for name in names} == set(ServerSizes(tp=2, ep=2).ranks())


def test_dp_attention_ranks_old_and_new_spelling_agree():
    new = labels(tp_size=4, dp_size=1, attn_dp_size=2, enable_dp_attention=True)
    old = labels(tp_size=4, dp_size=2, enable_dp_attention=True)
    assert new == old == ["DP0 TP0", "DP0 TP1", "DP1 TP2", "DP1 TP3"]


def test_experts_are_divided_within_a_moe_replica():
    sizes = ServerSizes(tp=8, ep=2, moe_dp=2)
    assert [rank.ep for rank in sizes.ranks()] == [0, 0, 1, 1, 0, 0, 1, 1]


def test_devices_of_plain_data_parallel_replicas():
    sizes = ServerSizes(tp=2, dp=2, base_gpu_id=4)
    assert sizes.gpu_ranks() == {4: "DP0 TP0", 5: "DP0 TP1", 6: "DP1 TP0", 7: "DP1 TP1"}


def test_devices_with_pipeline_stages_and_steps():
    assert ServerSizes(tp=2, pp=2).gpu_ranks() == {
        0: "PP0 TP0",
        1: "PP0 TP1",
        2: "PP1 TP0",
        3: "PP1 TP1",
    }
    assert ServerSizes(tp=2, gpu_id_step=2).gpu_ranks() == {0: "TP0", 2: "TP1"}


def test_dp_attention_takes_no_further_devices():
    sizes = ServerSizes(tp=4, attn_dp=4, dp_attention=True)
    assert list(sizes.gpu_ranks()) == [0, 1, 2, 3]


def test_each_node_knows_its_own_devices():
    second = ServerSizes(tp=4, nnodes=2, node_rank=1)
    assert second.gpu_ranks() == {0: "TP2", 1: "TP3"}
    assert ServerSizes(tp=2, pp=2, nnodes=2, node_rank=1).gpu_ranks() == {
        0: "PP1 TP0",
        1: "PP1 TP1",
    }
    assert len(second.ranks()) == 4


def test_a_shared_device_names_nobody():
    assert ServerSizes(tp=2, gpu_id_step=0).gpu_ranks() == {}


def test_odd_values_become_the_defaults():
    sizes = ServerSizes.from_info({"tp_size": None, "dp_size": "2", "pp_size": True})
    assert sizes == ServerSizes()


def test_batch_sizes_of_decode_graphs(shared_data):
    from pytest_sglprof._server.sizes import graph_batches

    info = json.loads((shared_data / "logs/tp2/server_info.json").read_text())
    assert graph_batches(info) == ()  # a CPU server: its backend is "disabled"
    decode = info["cuda_graph_config"]["decode"]
    decode["backend"] = "full"
    assert graph_batches(info) == tuple(sorted(decode["bs"]))
    for key in ("disable_cuda_graph", "disable_cuda_graph_padding", "enable_dp_attention"):
        assert graph_batches({**info, key: True}) == ()
    assert graph_batches({"cuda_graph_bs": [4, 1, 2]}) == (1, 2, 4)
    assert graph_batches({}) == ()
