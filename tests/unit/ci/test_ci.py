"""What CI leans on: the README's commands can be found, and what must be real is never skipped."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support import real_env

VARIABLES = ("SGLPROF_REAL_PYTHON", "SGLPROF_REAL_MODELS", "SGLPROF_NSYS",
             "SGLPROF_ROUTER_PYTHON", "SGLPROF_REQUIRE_REAL")  # fmt: skip


@pytest.fixture(autouse=True)
def nothing_real(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))


@pytest.mark.parametrize("ask", [real_env.real_sglang, real_env.real_nsys, real_env.real_router])
def test_what_is_missing_skips_or_fails(
    ask: Callable[[], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(pytest.skip.Exception, match=r"no real .*ci/real_env\.py"):
        ask()
    monkeypatch.setenv("SGLPROF_REQUIRE_REAL", "1")
    with pytest.raises(pytest.fail.Exception, match="SGLPROF_REQUIRE_REAL is set"):
        ask()


def test_an_old_nsys_is_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    nsys = tmp_path / "nsys"
    nsys.write_text("#!/bin/sh\necho '--no-later'\n")
    nsys.chmod(0o755)
    monkeypatch.setenv("SGLPROF_NSYS", str(nsys))
    with pytest.raises(pytest.skip.Exception, match="does not know --start-later"):
        real_env.real_nsys()


def test_what_is_there_is_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    nsys, python, config = tmp_path / "nsys", tmp_path / "python", tmp_path / "m/llama/config.json"
    config.parent.mkdir(parents=True)
    config.touch()
    for tool in (nsys, python):
        tool.write_text("#!/bin/sh\necho '  -Y, --start-later=true'\n")
        tool.chmod(0o755)
    monkeypatch.setenv("SGLPROF_NSYS", str(nsys))
    monkeypatch.setenv("SGLPROF_REAL_PYTHON", str(python))
    monkeypatch.setenv("SGLPROF_REAL_MODELS", str(tmp_path / "m"))
    assert real_env.real_nsys() == str(nsys)
    assert real_env.real_sglang().model("llama") == str(config.parent)


def test_a_file_says_once_what_is_missing(
    project_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-rs"]
    command += ["tests/real/test_nsys_command.py"]
    once = subprocess.run(command, cwd=project_root, capture_output=True, text=True)
    assert "no real nsys: neither SGLPROF_NSYS nor PATH has one" in once.stdout
    assert "; 6 more tests of this file wait for it" in once.stdout
    assert "1 skipped, 6 deselected" in once.stdout
    monkeypatch.setenv("SGLPROF_REQUIRE_REAL", "1")
    each = subprocess.run(command, cwd=project_root, capture_output=True, text=True)
    assert "7 errors" in each.stdout
    assert "skipped" not in each.stdout.splitlines()[-1]


def test_every_rank_of_a_cpu_server_has_a_core() -> None:
    sglang = real_env.RealSglang("python", Path("models"))
    assert sglang.environment(4)["SGLANG_CPU_OMP_THREADS_BIND"].count("|") == 3
    assert "SGLANG_CPU_OMP_THREADS_BIND" not in sglang.environment(1)


@pytest.mark.parametrize(
    ("letter", "end"), [("a", "conftest_examples/quickstart"), ("b", "-n 4 --dist loadfile")]
)
def test_ci_finds_the_commands_of_the_readme(project_root: Path, letter: str, end: str) -> None:
    run = (project_root / ".ci" / "run").read_text()
    function = re.search(r"^readme_command\(\) \{.*?^\}", run, re.M | re.S)
    assert function
    script = f"{function[0]}\nreadme_command {letter}"
    found = subprocess.run(
        ["/bin/bash", "-c", script],
        cwd=project_root,
        capture_output=True,
        text=True,
        env={"PATH": "/usr/bin:/bin"},
    )
    assert found.stdout.startswith("python3 -m venv .venv && ")
    assert found.stdout.endswith(f"{end}\n")
    assert found.stdout.count("\n") == 1


def test_no_host_of_a_registry_and_no_path_of_a_machine(project_root: Path) -> None:
    files = [project_root / ".ci" / "run", *(project_root / "ci").rglob("*")]
    for file in files:
        if file.is_file() and file.suffix != ".pyc":
            assert not re.search(r"https?://|/(home|root)/", file.read_text()), file
