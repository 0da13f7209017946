"""A real SGLang of two ranks on two nodes of a real Slurm: a window by each backend."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.real_env import real_nsys, real_sglang
from tests.support.real_project import Outcome, left_over, run_project, write_project
from tests.support.slurm import two_nodes

pytestmark = [pytest.mark.real_server, pytest.mark.real_nsys]

TESTS = """
import pytest

LOAD = dict(max_concurrency=4, random_input_len=32, random_output_len=64, random_range_ratio=1.0)


@pytest.mark.profile_window("by-torch", num_steps=60)
def test_torch(sglang_server, bench_serving):
    assert [node.name for node in sglang_server.nodes] == ["n1", "n2"]
    bench_serving(num_prompts=40, **LOAD)


@pytest.mark.profile_window("by-nsys", backend="nsys", duration=4)
def test_nsys(sglang_server, bench_serving):
    bench_serving(num_prompts=60, **LOAD)
"""
NODES = """
nsys = true
nodes = 2
launcher = "slurm"
"""


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Outcome]:
    sglang, nsys = real_sglang(), real_nsys()
    folder = tmp_path_factory.mktemp("nodes")
    with two_nodes(tmp_path_factory.mktemp("slurm")) as slurm:
        # Each node has one of the two ranks, and this machine's cores are those of both.
        one = {"GLOO_SOCKET_IFNAME": "lo", "SGLANG_CPU_OMP_THREADS_BIND": "0"}
        write_project(
            folder, sglang, TESTS, model="llama", args=("--tp", "2", "--host", "127.0.0.1"),
            ranks=1, env=one, more=NODES,
        )  # fmt: skip
        outcome = run_project(folder, SGLPROF_NSYS=nsys, **slurm.variables)
        assert slurm.jobs() == []
        yield outcome
    assert left_over(folder) == []


@pytest.mark.parametrize("name", ["by-torch", "by-nsys"])
def test_the_ranks_of_both_nodes_are_judged(ran: Outcome, name: str) -> None:
    assert ran.status == 0
    window = ran.windows()[name]
    assert window["state"] == "complete", window["state_reason"]
    assert window["verdict"] == "pass"
    assert window["ranks"] == ["TP0", "TP1"]
    assert window["nodes"] == {"TP0": "n1", "TP1": "n2"}
    assert window["missing_ranks"] == []


def test_each_node_has_a_report_and_the_sessions_began_together(ran: Outcome) -> None:
    window = ran.windows()["by-nsys"]
    reports = [each["path"] for each in window["artifacts"] if each["kind"] == "nsys-rep"]
    assert [Path(path).name.rsplit(".", 2)[1] for path in reports] == ["n1", "n2"]
    (note,) = [note for note in window["notes"] if "sessions of its nodes" in note]
    assert float(note.split()[-2]) < 2


def test_each_node_has_a_log(ran: Outcome) -> None:
    logs = [ran.folder / "servers" / name / "server.log" for name in
            ("default+nsys.1", "default+nsys.1.n2")]  # fmt: skip
    texts = [log.read_text(errors="replace") for log in logs]
    assert " TP0]" in texts[0]
    assert " TP1]" in texts[1]
