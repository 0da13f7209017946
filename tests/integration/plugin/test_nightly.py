"""The recipes for CI: linted, and run on the stand-in as a nightly job and a pull request do."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

RECIPE = "github-nightly.yml"
SERVER = """
kind = "standin"
args = ["--tp", "2"]
standin_args = ["--step-ms", "2", "--layers", "1"]
"""
CONFIG = f"""
[server]{SERVER}
[servers.before]{SERVER}
[servers.now]{SERVER}
[[threshold]]
metric = "regression"
limit = 1.05
"""
TESTS = """
import os
import pytest

def test_shapes(profile_shapes):
    profile_shapes(batch=[1, 4], input=1024, output=60)

def test_of_the_users_own():
    assert "BROKEN" not in os.environ
"""


@pytest.fixture(scope="module")
def ci(project_root: Path) -> Path:
    return project_root / "ci"


@pytest.fixture
def tool() -> Any:
    def find(name: str) -> str:
        found = shutil.which(name, path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
        if not found:
            pytest.skip(f"{name} is not installed: pip install -e '.[test]'")
        return found

    return find


def workflow(ci: Path) -> dict[str, Any]:
    document: dict[str, Any] = yaml.safe_load((ci / RECIPE).read_text())
    return document


def run_blocks(ci: Path) -> list[str]:
    jobs = workflow(ci)["jobs"].values()
    return [step["run"] for job in jobs for step in job["steps"] if "run" in step]


def test_scripts_are_clean(ci: Path, tool: Any) -> None:
    scripts = [*sorted(ci.glob("*.sh")), ci.parent / ".ci" / "run"]
    assert {"nightly.sh", "ab.sh"} <= {script.name for script in scripts}
    ran = subprocess.run(
        [tool("shellcheck"), "--severity=warning", *scripts], capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stdout


def test_every_command_of_the_workflow_is_clean(ci: Path, tool: Any) -> None:
    blocks = run_blocks(ci)
    assert len(blocks) >= 5
    for block in blocks:
        assert "${{" not in block, "an expression inside of a script is an injection: use env"
        ran = subprocess.run(
            [tool("shellcheck"), "--shell=bash", "-"], input=block, capture_output=True, text=True
        )
        assert ran.returncode == 0, f"{block}\n{ran.stdout}"


def test_the_workflow_is_one_that_github_understands(ci: Path, tool: Any) -> None:
    check = [tool("check-jsonschema"), "--builtin-schema", "vendor.github-workflows", ci / RECIPE]
    ran = subprocess.run(check, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr


def test_results_are_kept_also_after_a_failure_and_baselines_only_of_a_green_night(
    ci: Path,
) -> None:
    jobs = workflow(ci)["jobs"]

    def uploads(job: str) -> dict[str, str]:
        steps = jobs[job]["steps"]
        kept = [step for step in steps if "upload-artifact" in step.get("uses", "")]
        return {step["with"]["name"]: step.get("if", "success()") for step in kept}

    always, of_green = "always()", "success()"
    assert uploads("nightly") == {
        "perf-baselines": of_green,
        "perf-history": always,
        "perf-results": always,
    }
    assert uploads("pull_request") == {"perf-ab": always}
    # This run is the next night's last green one, and its newest: it hands both on.
    assert uploads("accept") == {"perf-baselines": of_green, "perf-history": of_green}
    # What a self-hosted runner executes was written by somebody of the repository.
    assert "head.repo.full_name == github.repository" in jobs["pull_request"]["if"]


@dataclass
class Job:
    """A checkout in which scripts of ci/ run."""

    folder: Path
    ci: Path

    def run(self, script: str, *arguments: str, **environment: str) -> tuple[int, str]:
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("PYTEST_", "SGLPROF"))}
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        leases = {"SGLPROF_LEASE_DIR": str(self.folder / "leases"), "PATH": path}
        ran = subprocess.run(
            ["bash", str(self.ci / script), *arguments],
            cwd=self.folder,
            env={**kept, **leases, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=300,
        )
        print(ran.stdout)
        return ran.returncode, ran.stdout

    def lives(self) -> dict[str, int]:
        """Accepted lives by window."""
        files = (self.folder / "perf-state" / "baselines").glob("*.json")
        baselines = [json.loads(file.read_text()) for file in files]
        return {each["key"]["window"]: len(each["lives"]) for each in baselines}

    def history(self) -> int:
        return len([*(self.folder / "perf-state" / "history").iterdir()])


@pytest.fixture
def job(tmp_path: Path, ci: Path) -> Job:
    (tmp_path / "sglprof.toml").write_text(CONFIG)
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    tests = tmp_path / "tests" / "perf"
    tests.mkdir(parents=True)
    (tests / "test_perf.py").write_text(TESTS)
    return Job(tmp_path, ci)


def test_three_nights(job: Job) -> None:
    status, text = job.run("nightly.sh")
    assert status == 0, text
    assert re.search(r"candidate", text)
    assert job.lives() == {"bs1": 1, "bs4": 1}
    assert job.history() == 1
    results = job.folder / "perf-results"
    assert "test_shapes" in (results / "junit.xml").read_text()
    assert "bs4" in (results / "nights.csv").read_text()
    assert (results / "nights.html").read_text().startswith("<!")

    # Each night begins with an empty workspace and what was carried over.
    shutil.rmtree(results)
    status, text = job.run("nightly.sh", "tests/perf", BROKEN="1")
    assert status == 1, text
    assert "test_of_the_users_own" in (results / "junit.xml").read_text()
    assert [*results.glob("runs/run-*/results.json")]
    assert [*results.glob("runs/run-*/report.html")]
    assert not [path for path in results.rglob("*") if path.is_symlink()]
    assert job.history() == 2

    before = job.lives()
    shutil.rmtree(results)
    status, text = job.run("nightly.sh", "tests/perf", SGLPROF_ACCEPT="none")
    assert status == 0, text
    assert job.lives() == before
    assert job.history() == 3
    nights = (results / "nights.csv").read_text().splitlines()
    assert len([line for line in nights if "bs1" in line]) == 3


def test_a_pull_request_of_too_few_lives_is_a_warning(job: Job) -> None:
    summary = job.folder / "summary.md"
    sizes = ["--lives", "1", "--num-prompts", "4", "--concurrency", "2", "--input", "16"]
    status, text = job.run(
        "ab.sh", "before", "now", *sizes, "--output-len", "80", GITHUB_STEP_SUMMARY=str(summary)
    )
    assert status == 0, text
    assert "::warning::the comparison is inconclusive" in text
    results = job.folder / "perf-results"
    assert (results / "ab.txt").read_text().startswith("inconclusive: 1 + 1 lives cannot reach")
    assert "inconclusive: 1 + 1 lives" in summary.read_text()
    assert [*(results / "ab").iterdir()]


def test_a_fault_of_a_comparison_is_no_warning(job: Job) -> None:
    status, text = job.run("ab.sh", "before", "no_such_server", "--lives", "2")
    assert status == 2, text
