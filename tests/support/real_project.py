"""A project of a user, written to a folder and run by `pytest --sglprof` for real."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.support.real_env import CPU_ARGUMENTS, RealSglang

LIMIT_S = 900
# A slowdown that no figure of a window comes near, its upper end included: sixty steps on cores
# that are busy elsewhere have had one of 25.
FAR = 1e9


@dataclass
class Outcome:
    """What a run left: its exit status, its output, and its one results document."""

    status: int
    output: str
    results: dict[str, Any] = field(default_factory=dict)
    folder: Path = Path()

    def windows(self) -> dict[str, dict[str, Any]]:
        return {window["name"]: window for window in self.results["windows"]}

    def tests(self) -> dict[str, dict[str, Any]]:
        return {test["nodeid"].rsplit("::", 1)[1]: test for test in self.results["tests"]}


def write_project(
    folder: Path,
    sglang: RealSglang,
    body: str,
    *,
    model: str,
    args: tuple[str, ...],
    ranks: int,
    env: Mapping[str, str] | None = None,
    more: str = "",
    threshold: str = f"limit = {FAR}",
) -> None:
    """`sglprof.toml` for a CPU server of so many ranks, and one module of tests.

    env: added to the server's environment. more: lines of the table [server]. threshold: those of
    the only threshold; unless given, every complete window passes.
    """
    variables = {**sglang.environment(ranks), **(env or {})}
    environment = ", ".join(f"{name} = {json.dumps(value)}" for name, value in variables.items())
    (folder / "sglprof.toml").write_text(
        "[server]\n"
        f'model_path = "{sglang.model(model)}"\n'
        f"python = {json.dumps(sglang.python)}\n"
        f"args = {json.dumps([*CPU_ARGUMENTS, *args])}\n"
        f"env = {{ {environment} }}\n"
        f"ready_timeout = 400\n{more}"
        f"[[threshold]]\n{threshold}\n",
        encoding="utf-8",
    )
    (folder / "pytest.ini").write_text("[pytest]\n", encoding="utf-8")
    (folder / "test_job.py").write_text(body, encoding="utf-8")


def run_project(folder: Path, *options: str, **variables: str) -> Outcome:
    """Runs the project and reads what it left."""
    environment = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("PYTEST_", "SGLPROF_"))
    }
    environment["SGLPROF_LEASE_DIR"] = str(folder / "leases")
    environment["SGLPROF_NSYS"] = os.environ.get("SGLPROF_NSYS", "")
    environment.update(variables)
    ran = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "--sglprof",
            "--sglprof-set=output.keep=all",
            "-v",
            *options,
        ],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )
    print(ran.stdout)
    latest = folder / ".sglprof" / "latest"
    path = latest / "results.json"
    results = json.loads(path.read_text()) if path.exists() else {}
    return Outcome(ran.returncode, ran.stdout, results, latest.resolve())


def left_over(folder: Path) -> list[str]:
    """Command lines of processes that still belong to the project in `folder`."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            words = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            environ = (entry / "environ").read_bytes().decode("utf-8", "replace")
        except OSError:
            continue
        if str(folder) in words or f"SGLPROF_LEASE_DIR={folder}" in environ:
            found.append(words[:200])
    return found
