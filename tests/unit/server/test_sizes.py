from __future__ import annotations

import json

import pytest

from pytest_sglprof._ranks import Rank
from pytest_sglprof._server.sizes import (
    PassSettings,
    ServerSizes,
    flat_info,
    invalid_size,
    pass_settings,
    role_of,
    settings_part,
    write_settings,
)


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
    sizes = ServerSizes.from_info({"tp_size": 1, "dp_size": "2", "pp_size": True})
    assert sizes == ServerSizes()


@pytest.mark.parametrize("info", [{}, {"tp_size": None}, {"dp_size": 2, "version": "0.5.3"}])
def test_sizes_that_are_not_told_are_unknown_not_one(info):
    sizes = ServerSizes.from_info(info)
    assert not sizes.is_known
    assert sizes.ranks() == ()
    assert sizes.gpu_ranks() == {}
    assert "tp" not in sizes.shown()
    assert sizes.shown()["device"] == "cuda"


def test_known_sizes_are_shown_as_they_are():
    shown = ServerSizes(tp=4, version="0.5.23").shown()
    assert (shown["tp"], shown["dp"], shown["version"]) == (4, 1, "0.5.23")
    assert "is_known" not in shown


def test_settings_below_server_args_count_like_the_rest():
    info = {"server_args": {"tp_size": 4, "version": "0.4.6"}, "version": "0.5.3"}
    assert flat_info(info) == {"tp_size": 4, "version": "0.5.3"}
    assert ServerSizes.from_info(flat_info(info)).tp == 4


@pytest.mark.parametrize(
    ("info", "problem"),
    [
        ({"tp_size": -2}, "tp_size is -2"),
        ({"pp_size": 0}, "pp_size is 0"),
        ({"tp_size": [4]}, "tp_size is '[4]'"),
        ({"dp_size": "2"}, "dp_size is '2'"),
        ({"nnodes": float("nan")}, "nnodes is 'nan'"),
        ({"ep_size": True}, "ep_size is 'True'"),
        ({"server_args": [1]}, "server_args is a list"),
        ({"tp_size": 2, "dp_size": None}, ""),
        ({}, ""),
    ],
)
def test_a_size_that_is_no_number_of_ranks_is_named(info, problem):
    assert invalid_size(flat_info(info)) == problem


@pytest.mark.parametrize("states", [7, "none", {"a": 1}, [3, None]])
def test_odd_internal_states_are_no_states(states):
    assert pass_settings({"tp_size": 1, "internal_states": states}).capture_sizes == ()


@pytest.mark.parametrize(
    ("info", "role"),
    [
        ({"disaggregation_mode": "prefill"}, "prefill"),
        ({"disaggregation_mode": "decode"}, "decode"),
        ({"disaggregation_mode": "null", "is_embedding": True}, "embedding"),
        ({"disaggregation_mode": None, "is_embedding": False}, ""),
        ({}, ""),
    ],
)
def test_the_role_of_a_server(info, role):
    assert role_of(info) == role


def test_batch_sizes_of_decode_graphs(shared_data):
    info = json.loads((shared_data / "logs/tp2/server_info.json").read_text())
    assert pass_settings(info).capture_sizes == ()  # a CPU server: its backend is "disabled"
    assert pass_settings(info).graphs is False
    decode = info["cuda_graph_config"]["decode"]
    decode["backend"] = "full"
    for state in info["internal_states"]:
        del state["decode_cuda_graph_bs"]
        state["effective_max_running_requests_per_dp"] = 4096
    assert pass_settings(info).capture_sizes == tuple(sorted(decode["bs"]))
    for key in ("disable_cuda_graph", "disable_cuda_graph_padding"):
        assert pass_settings({**info, key: True}).capture_sizes == ()
    old = {"cuda_graph_bs": [4, 1, 2], "disable_cuda_graph": False}
    assert pass_settings(old).capture_sizes == (1, 2, 4)
    assert pass_settings({}) == PassSettings()


DEEPEP = {
    "version": "0.5.23",
    "tp_size": 8,
    "attn_dp_size": 8,
    "enable_dp_attention": True,
    "moe_a2a_backend": "deepep",
    "moe_dense_tp_size": 1,
    "enable_dp_lm_head": True,
    "elastic_ep_backend": None,
}


@pytest.mark.parametrize(
    ("change", "regime"),
    [
        ({}, "local"),
        ({"moe_dense_tp_size": None}, "gather"),
        ({"moe_dense_tp_size": 2}, "gather"),  # above tp / dp
        ({"moe_dense_tp_size": 2, "attn_dp_size": 4}, "local"),
        ({"enable_dp_lm_head": False}, "gather"),
        ({"moe_a2a_backend": "none"}, "gather"),
        ({"moe_a2a_backend": None}, "gather"),  # as older versions say it
        ({"moe_a2a_backend": "flashinfer"}, "gather"),
        ({"moe_a2a_backend": "flashinfer", "version": "0.5.9"}, None),  # another rule then
        ({"moe_a2a_backend": "mori"}, None),  # an environment variable decides
        ({"elastic_ep_backend": "mooncake"}, None),
        ({"elastic_ep_backend": "mooncake", "moe_dense_tp_size": None}, "gather"),
        ({"enable_dp_attention": False}, None),
    ],
)
def test_by_whose_batch_a_graph_is_chosen(change, regime):
    assert pass_settings({**DEEPEP, **change}).regime == regime


@pytest.mark.parametrize("absent", ["moe_a2a_backend", "moe_dense_tp_size", "enable_dp_lm_head"])
def test_a_regime_is_unknown_without_one_of_its_keys(absent):
    info = {key: value for key, value in DEEPEP.items() if key != absent}
    assert pass_settings(info).regime is None


def test_before_attn_dp_size_the_regime_is_that_of_the_same_server():
    info = {key: value for key, value in DEEPEP.items() if key != "attn_dp_size"}
    old = pass_settings({**info, "dp_size": 8, "version": "0.5.9"})
    assert (old.regime, old.dp_attention) == ("local", True)


def graphs(sizes, **more):
    """A server whose decode graphs are configured."""
    return {"cuda_graph_config": {"decode": {"backend": "full", "bs": sizes}}, **more}


def brute_force_sizes(sizes, most, rows, align):
    """`get_batch_sizes_to_capture` of SGLang 0.5.23, word by word."""
    capture = list(sizes)
    most = (most + align - 1) // align * align
    if max(capture) > most:
        capture += [most]
    capture = [size for size in capture if size * rows % align == 0]
    return tuple(sorted({size for size in capture if size <= most}))


@pytest.mark.parametrize("draft_tokens", [None, 3, 4])
@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("most", [3, 10, 14, 16, 99])
@pytest.mark.parametrize("attn_dp", [2, 8])
def test_captured_sizes_as_sglang_derives_them(draft_tokens, overlap, most, attn_dp):
    sizes = [1, 2, 4, 6, 8, 12, 16, 24]
    info = graphs(
        sizes,
        version="0.5.23",
        tp_size=8,
        attn_dp_size=attn_dp,
        enable_dp_attention=True,
        moe_dense_tp_size=None,
        enable_two_batch_overlap=overlap,
        speculative_algorithm="EAGLE" if draft_tokens else None,
        speculative_num_draft_tokens=draft_tokens,
        internal_states=[{"effective_max_running_requests_per_dp": most}],
    )
    rows = 1 if overlap else draft_tokens or 1
    align = 8 // attn_dp * (2 if overlap else 1)
    found = pass_settings(info)
    assert found.capture_sizes == brute_force_sizes(sizes, most, rows, align)
    assert found.speculative == bool(draft_tokens)
    assert found.graphs is True


def test_what_the_server_says_it_captured_counts_most():
    states = [{"decode_cuda_graph_bs": [8, 4]}] * 2
    assert pass_settings(graphs([1, 2], internal_states=states)).capture_sizes == (4, 8)
    states = [{"decode_cuda_graph_bs": [8]}, {"decode_cuda_graph_bs": [4]}]
    assert pass_settings(graphs([1, 2], internal_states=states)).capture_sizes == ()


def test_sizes_are_unknown_where_their_rule_is():
    old = graphs([1, 2, 4], version="0.5.9", tp_size=2, moe_a2a_backend="deepep")
    assert pass_settings(old).capture_sizes == (2, 4)
    spec = {"speculative_algorithm": "EAGLE", "speculative_num_draft_tokens": 2}
    assert pass_settings({**old, **spec}).capture_sizes == ()
    assert pass_settings(graphs([1, 2], attn_cp_size=2)).capture_sizes == ()
    assert pass_settings(graphs(["1", True, -2])).capture_sizes == ()


def test_a_custom_all_reduce_works_inside_one_node():
    for info, expected in [
        ({}, None),
        ({"disable_custom_all_reduce": False}, True),
        ({"disable_custom_all_reduce": True}, False),
        ({"disable_custom_all_reduce": False, "device": "cpu"}, False),
        ({"disable_custom_all_reduce": False, "nnodes": 2}, False),
        ({"disable_custom_all_reduce": False, "nnodes": 2, "pp_size": 2}, True),
    ]:
        assert pass_settings(info).custom_all_reduce is expected


def test_what_is_kept_of_the_answer_has_no_secret_and_the_same_settings(shared_data, tmp_path):
    info = json.loads((shared_data / "logs/tp2/server_info.json").read_text())
    info |= {"api_key": "sk-verysecret", "launch_command": "serve --api-key sk-verysecret"}
    write_settings(tmp_path, info)
    text = (tmp_path / "server_info.json").read_text()
    assert "sk-verysecret" not in text
    assert info["model_path"] not in text
    assert pass_settings(json.loads(text)) == pass_settings(info)
    assert settings_part(json.loads(text)) == json.loads(text)
