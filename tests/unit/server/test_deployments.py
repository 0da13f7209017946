"""The servers that a deployment consists of, and the thresholds of a role."""

from __future__ import annotations

import pytest

from pytest_sglprof._config.model import ServerSpec, Threshold
from pytest_sglprof._config.servers import members_of, servers_from
from pytest_sglprof._config.thresholds import merge_thresholds, of_role
from pytest_sglprof._errors import ServerMissing, SettingsError
from pytest_sglprof._server.command import find_entry, server_words
from pytest_sglprof._server.deployment import _refuse_shared_gpus

SERVERS = {
    "p": ServerSpec("p", args=("--tp", "2"), gpus=(0, 1)),
    "d": ServerSpec("d", args=("--disaggregation-mode=decode",), gpus=(2, 3, 4, 5)),
}


def router(*members, **changes):
    return ServerSpec("pd", kind="router", members=members, **changes)


def test_members_start_prefill_first_and_share_out_the_gpus_of_their_server():
    document = {
        "servers": {"p": {"gpus": [0, 1]}, "d": {"gpus": [2, 3, 4, 5], "args": ["--tp", "2"]}},
        "deployments": {"pd": {"decode": ["d", "d"], "prefill": ["p"], "router": ["--policy=x"]}},
    }
    servers = servers_from(document, base=None)
    members = members_of(servers["pd"], servers)
    assert [(each.label, each.spec.key, each.spec.gpus) for each in members] == [
        ("prefill", "pd.prefill", (0, 1)),
        ("decode-1", "pd.decode-1", (2, 3)),
        ("decode-2", "pd.decode-2", (4, 5)),
    ]
    assert members[1].spec.args == ("--tp", "2", "--disaggregation-mode", "decode")
    assert servers["pd"].args == ("--policy=x",)


def test_what_the_args_say_already_is_not_added_and_nsys_is_of_all_members():
    members = members_of(router(("decode", "d"), nsys=True), SERVERS)
    assert members[0].spec.args == ("--disaggregation-mode=decode",)
    assert members[0].spec.nsys and members[0].spec.key == "pd.decode+nsys"


@pytest.mark.parametrize(
    ("members", "servers", "words"),
    [
        ([("decode", "x")], SERVERS, "server x is none that could be started"),
        ([("decode", "d")], {"d": ServerSpec(url="http://h:1")}, "is none that could be started"),
        ([("decode", "d")] * 2, {"d": ServerSpec(port=3)}, "started 2 times and has a port"),
        ([("decode", "d")] * 2, {"d": ServerSpec(args=("--port=3",))}, "2 times and has a port"),
        ([("decode", "d")] * 3, SERVERS, "started 3 times and has 4 GPUs"),
    ],
)
def test_servers_that_cannot_be_started_together_are_refused(members, servers, words):
    with pytest.raises(SettingsError, match=words):
        members_of(router(*members), servers)


def test_two_servers_on_one_gpu_are_refused_before_one_waits_for_the_other(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5")
    monkeypatch.setattr("pytest_sglprof._server.deployment.find_launcher", lambda spec: Hardware)
    servers = {name: ServerSpec(name) for name in ("p", "d")}
    members = members_of(router(("prefill", "p"), ("decode", "d")), servers)
    with pytest.raises(
        SettingsError, match="prefill and decode of a deployment would both take GPU 4"
    ):
        _refuse_shared_gpus(members)
    apart = {"p": ServerSpec("p", gpus=(0,)), "d": ServerSpec("d", gpus=(1,))}
    _refuse_shared_gpus(members_of(router(("prefill", "p"), ("decode", "d")), apart))


class Hardware:
    uses_hardware = True


def test_a_router_gets_a_port_for_its_metrics_and_none_is_started_without_its_package():
    import sys

    from pytest_sglprof._server.command import Entry

    words = server_words(router(args=("--port", "7")), Entry("router", "x", "module"), 5, 6)
    assert words[:4] == ["--host", "127.0.0.1", "--prometheus-port", "6"]
    assert words[-2:] == ["--port", "7"]
    with pytest.raises(ServerMissing, match="sglang-router is not installed"):
        find_entry(router(python=f"{sys.base_prefix}/bin/python3"))


GENERAL = Threshold("slowdown", 1.05)
STRICT = Threshold("slowdown", 1.02, role="decode")


def limits(thresholds):
    return [(each.metric, each.limit) for each in thresholds]


def test_a_threshold_of_a_role_replaces_the_general_one_there_alone():
    both = merge_thresholds((GENERAL, STRICT))
    assert limits(of_role(both, "decode")) == [("slowdown", 1.02)]
    assert limits(of_role(both, "prefill")) == limits(of_role(both, "")) == [("slowdown", 1.05)]
    again = of_role(of_role(both, "decode"), "decode")
    assert again == of_role(both, "decode")


def test_a_marker_replaces_what_is_configured_for_a_role():
    marked = merge_thresholds((GENERAL, STRICT), (Threshold("slowdown", 1.5),))
    assert limits(of_role(marked, "decode")) == [("slowdown", 1.5)]


def test_where_all_thresholds_are_of_other_roles_the_default_one_holds():
    assert limits(of_role((STRICT,), "prefill")) == [("slowdown", 1.05)]
    assert of_role((), "prefill") == ()
