"""A real SGLang in both roles: prefill and decode of two ranks each, behind the real router.

The KV cache goes from one to the other by Mooncake over TCP.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.real_env import CPU_ARGUMENTS, real_mooncake, real_router, real_sglang
from tests.support.real_project import FAR, Outcome, left_over, run_project

pytestmark = pytest.mark.real_server

SERVER = """
[servers.{role}]
kind = "sglang"
model_path = {model}
python = {python}
args = {args}
env = {env}
ready_timeout = 400
"""
DEPLOYMENT = f"""
[deployments.pd]
prefill = ["prefill"]
decode = ["decode"]
router_python = "ROUTER"

[gate]
min_steps = 10

[[threshold]]
limit = {FAR}

[[threshold]]
role = "decode"
limit = {FAR / 2}
"""
TEST = """
import pytest

@pytest.mark.sglang_server("pd")
@pytest.mark.profile_window("w", num_steps=15)
def test_pd(bench_serving):
    load = bench_serving(num_prompts=80, max_concurrency=4, random_input_len=32,
                         random_output_len=64, random_range_ratio=1.0)
    assert load.completed == 80
"""
# Copies of retracted requests are kept in pinned memory, which there is none of.
ROLES = {"prefill": [], "decode": ["--disaggregation-decode-retraction-backup", "none"]}


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Outcome]:
    sglang, mooncake, router = real_sglang(), real_mooncake(), real_router()
    folder = tmp_path_factory.mktemp("roles")
    variables = {
        **sglang.environment(2),
        "PYTHONPATH": mooncake,
        "MOONCAKE_PROTOCOL": "tcp",
        "SGLANG_HOST_IP": "127.0.0.1",
    }
    shared = ["--tp", "2", *CPU_ARGUMENTS, "--disaggregation-transfer-backend", "mooncake"]
    pairs = ", ".join(f"{name} = {json.dumps(value)}" for name, value in variables.items())
    servers = [
        SERVER.format(
            role=role,
            model=json.dumps(sglang.model("llama")),
            python=json.dumps(sglang.python),
            args=json.dumps([*shared, "--disable-overlap-schedule", *more]),
            env=f"{{ {pairs} }}",
        )
        for role, more in ROLES.items()
    ]
    text = "".join([*servers, DEPLOYMENT.replace("ROUTER", router)])
    Path(folder / "sglprof.toml").write_text(text)
    Path(folder / "test_job.py").write_text(TEST)
    Path(folder / "pytest.ini").write_text("[pytest]\n")
    yield run_project(folder)
    assert left_over(folder) == []


def test_requests_go_through_both_roles(ran: Outcome) -> None:
    assert ran.status == 0, ran.output
    servers = {each["key"]: each for each in ran.results["servers"]}
    assert servers["pd.prefill"]["version"] == servers["pd.decode"]["version"] != ""
    logs = {
        role: (ran.folder / "servers" / f"pd.{role}.1" / "server.log").read_text(errors="replace")
        for role in ROLES
    }
    assert "Decode batch" not in logs["prefill"]
    assert "Prefill batch" not in logs["decode"]


@pytest.mark.parametrize("role", ROLES)
def test_each_role_has_a_window_of_its_ranks(ran: Outcome, role: str) -> None:
    window = ran.windows()[f"w-{role}"]
    assert (window["role"], window["server"]) == (role, f"pd.{role}")
    assert (window["state"], window["verdict"]) == ("complete", "pass"), window["reason"]
    assert window["ranks"] == ["TP0", "TP1"]
    by_stage = {name for group in window["steps"]["groups"] for name in group["by_stage"]}
    assert by_stage == {role}


def test_each_role_has_its_threshold_and_the_test_one_verdict(ran: Outcome) -> None:
    limits = {
        name: [each["threshold"]["limit"] for each in window["judgements"]]
        for name, window in ran.windows().items()
    }
    assert limits == {"w-prefill": [FAR], "w-decode": [FAR / 2]}
    assert ran.tests()["test_pd"]["verdict"] == "pass"
