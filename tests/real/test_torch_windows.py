"""The main job on a real SGLang with torch windows: `--tp 2`, and `--tp 2 --dp 2`."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.real.project import Outcome, left_over, run_project, write_project
from tests.real_env import real_sglang

pytestmark = pytest.mark.real_server

LOAD = """
LOAD = dict(max_concurrency=4, random_input_len=32, random_output_len=64, random_range_ratio=1.0)
"""
TP2 = f"""
import pytest
{LOAD}

@pytest.mark.profile_window("steady", num_steps=40)
def test_a_window_at_steady_load(sglang_server, bench_serving):
    result = bench_serving(num_prompts=40, **LOAD)
    assert result.completed == 40
    assert result.ttft["p99"] > 0


def test_two_windows_by_hand(sglang_server, bench_serving, profile_window):
    with bench_serving.running(num_prompts=160, **LOAD):
        with profile_window("steps", num_steps=40) as steps:
            steps.wait()
        with profile_window("seconds", duration=2.0) as seconds:
            seconds.wait()
    assert steps.check("slowdown", 50) >= 1.0
    assert seconds.check("slowdown", 1.0) >= 1.0  # every real pair of ranks differs: this fails
"""
TP2_DP2 = f"""
import pytest
{LOAD}

@pytest.mark.profile_window("both_replicas", num_steps=40)
def test_two_replicas(sglang_server, bench_serving):
    bench_serving(num_prompts=64, **LOAD)
"""


@pytest.fixture(scope="module")
def tp2(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    folder = tmp_path_factory.mktemp("tp2")
    write_project(folder, real_sglang(), TP2, model="llama", args=("--tp", "2"), ranks=2)
    return run_project(folder, "--junitxml=junit.xml")


def test_the_right_test_fails(tp2: Outcome) -> None:
    assert tp2.status == 1, tp2.output
    tests = tp2.tests()
    assert tests["test_a_window_at_steady_load"]["verdict"] == "pass"
    assert tests["test_two_windows_by_hand"]["verdict"] == "fail"
    assert "TP" in tests["test_two_windows_by_hand"]["reason"]
    assert tp2.results["run"]["versions"]["sglang"]
    assert not tp2.results["summary"]["standin"]


def test_every_window_has_the_file_of_every_rank(tp2: Outcome) -> None:
    assert set(tp2.windows()) == {"steady", "steps", "seconds"}
    for name, window in tp2.windows().items():
        assert window["state"] == "complete", window["state_reason"]
        assert window["source"] == "cpu_op"
        assert [artifact["rank"] for artifact in window["artifacts"]] == ["TP0", "TP1"]
        for artifact in window["artifacts"]:
            assert (tp2.folder / artifact["path"]).stat().st_size > 1000
            print(f"torch window {name}: {artifact['rank']} {Path(artifact['path']).name}")
    for name in ("steady", "steps"):
        assert min(tp2.windows()[name]["steps"]["per_rank"].values()) >= 38


def test_ranks_of_a_window_meet_in_the_same_steps(tp2: Outcome) -> None:
    steps = tp2.windows()["steady"]["steps"]
    assert set(steps["per_rank"]) == {"TP0", "TP1"}
    assert steps["groups"][0]["compared"] >= 30


def test_nothing_is_left(tp2: Outcome) -> None:
    project = tp2.folder.parents[1]
    assert left_over(project) == []
    assert list((project / "leases").glob("*")) == []


def test_two_replicas_of_two_ranks(tmp_path: Path) -> None:
    sglang = real_sglang()
    write_project(
        tmp_path, sglang, TP2_DP2, model="llama", args=("--tp", "2", "--dp", "2"), ranks=4
    )
    outcome = run_project(tmp_path)
    assert outcome.status == 0, outcome.output
    window = outcome.windows()["both_replicas"]
    labels = ["DP0 TP0", "DP0 TP1", "DP1 TP0", "DP1 TP1"]
    assert window["ranks"] == labels
    assert sorted(artifact["rank"] for artifact in window["artifacts"]) == labels
    print("torch window of tp 2 x dp 2:", ", ".join(labels))
    assert [group["ranks"] for group in window["steps"]["groups"]] == [labels[:2], labels[2:]]
    assert left_over(tmp_path) == []
