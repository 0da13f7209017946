"""A user's project on the stand-in, run by a pytest of its own; and what is left of it."""

from __future__ import annotations

import gzip
import json
import os
import re
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
import zlib
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import psutil

PATIENCE = 300.0  # s; a whole run takes 20 on an idle machine

SERVERS = """
[server]
kind = "standin"
args = ["--tp", "2"]
standin_args = ["--step-ms", "4", "--layers", "1", "--crash-delay", "0.2"]

[servers.slow]
kind = "standin"
args = ["--tp", "2"]
standin_args = ["--step-ms", "4", "--layers", "1", "--slow", "rank=1,category=moe,factor=1.4"]

[[threshold]]
limit = 1.10

[[threshold]]
scope = "moe"
limit = 1.10
"""

# `drive(80)`: one request of 80 tokens, so 80 steps of 4 ms each. `load(80)`: by the driver,
# without streams: to write and read an event a token costs more than all the rest of a run.
CONFTEST = """
import httpx
import pytest

@pytest.fixture
def drive(sglang_server):
    def drive(steps=60):
        sampling = {"max_new_tokens": steps, "ignore_eos": True}
        request = {"text": "one two three", "sampling_params": sampling}
        return httpx.post(f"{sglang_server.url}/generate", json=request, timeout=60).json()
    return drive

@pytest.fixture
def load(bench_serving):
    def load(steps=60):
        return bench_serving(num_prompts=4, max_concurrency=4, random_input_len=8,
                             random_output_len=steps, random_range_ratio=1.0, warm_up=False,
                             disable_stream=True)
    return load
"""


@dataclass
class Outcome:
    """What one run left behind."""

    folder: Path
    status: int
    text: str
    seconds: float = 0.0
    _xml: Path | None = field(default=None, repr=False)
    run_folder: Path = field(init=False)

    def __post_init__(self) -> None:
        self.run_folder = (self.folder / ".sglprof" / "latest").resolve()

    @cached_property
    def results(self) -> dict[str, Any]:
        document: dict[str, Any] = json.loads((self.run_folder / "results.json").read_text())
        return document

    def test(self, name: str) -> dict[str, Any]:
        """The test of results.json whose node id ends in `::name`."""
        return next(t for t in self.results["tests"] if t["nodeid"].endswith(f"::{name}"))

    def windows(self, name: str) -> list[dict[str, Any]]:
        return [w for w in self.results["windows"] if w["nodeid"].endswith(f"::{name}")]

    @cached_property
    def cases(self) -> dict[str, ET.Element]:
        """The JUnit test cases by name."""
        assert self._xml is not None
        return {case.get("name", ""): case for case in ET.parse(self._xml).iter("testcase")}

    def properties(self, name: str) -> list[tuple[str, str]]:
        found = self.cases[name].iter("property")
        return [(p.get("name", ""), p.get("value", "")) for p in found]

    def word(self, name: str) -> str:
        """`PASSED`, `FAILED`, `XFAIL`, … as the short summary of `-rA` says."""
        found = re.findall(rf"^([A-Z]+) \S*::{re.escape(name)}(?: |$)", self.text, re.M)
        assert found, f"the summary does not name {name}"
        return str(found[-1])

    def section(self, name: str) -> str:
        """What stands below the test's heading among the failures and errors."""
        head = rf"_{{3,}} (?:ERROR at \w+ of )?{re.escape(name)} _{{3,}}\n"
        found = re.search(rf"{head}(.*?)(?=\n_{{3,}} |\n={{3,}} )", self.text, re.S)
        assert found, f"no section {name}"
        return found[1]


def _is_cut(path: Path) -> bool:
    """True for a trace whose gzip does not end."""
    if path.suffix != ".gz":
        return False
    try:
        gzip.decompress(path.read_bytes())
    except (EOFError, zlib.error):
        return True
    except FileNotFoundError:  # moved to its window meanwhile
        pass
    return False


def _words(process: psutil.Process) -> str:
    """Its command; "" once it has ended."""
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


class Project:
    """A folder with sglprof.toml, conftest.py and tests; its leases are its own."""

    def __init__(self, folder: Path, tests: str, config: str = SERVERS) -> None:
        self.folder = folder
        self.leases = folder / "leases"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "pytest.ini").write_text("[pytest]\n")
        (folder / "sglprof.toml").write_text(config)
        (folder / "conftest.py").write_text(CONFTEST)
        (folder / "test_job.py").write_text(f"import pytest\n{tests}")

    def environment(self, **more: str) -> dict[str, str]:
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("PYTEST_", "SGLPROF"))}
        nsys = os.environ.get("SGLPROF_NSYS")
        given = {"SGLPROF_NSYS": nsys} if nsys else {}
        return {**kept, **given, "SGLPROF_LEASE_DIR": str(self.leases), **more}

    def command(self, *options: str) -> list[str]:
        start = [sys.executable, "-W", "error", "-m", "pytest", "--strict-markers", "-rA"]
        # The one imports all of hypothesis at the end of a run, the other trio at its start.
        start += ["-p", "no:hypothesispytest", "-p", "no:anyio"]
        return [*start, "--sglprof", f"--junitxml={self.folder / 'junit.xml'}", *options]

    def run(self, *options: str, **environment: str) -> Outcome:
        began = time.monotonic()
        ran = subprocess.run(
            self.command(*options),
            cwd=self.folder,
            env=self.environment(**environment),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=PATIENCE,
            check=False,
        )
        print(ran.stdout)
        seconds = time.monotonic() - began
        return Outcome(self.folder, ran.returncode, ran.stdout, seconds, self.folder / "junit.xml")

    def start(self, *options: str, **environment: str) -> subprocess.Popen[str]:
        """The same run in the background, in a process group of its own."""
        with (self.folder / "output.txt").open("w") as output:
            return subprocess.Popen(
                self.command(*options),
                cwd=self.folder,
                env=self.environment(**environment),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=True,
            )

    def outcome(self, process: subprocess.Popen[str]) -> Outcome:
        """Of a run in the background, once it has ended."""
        status = process.wait(PATIENCE)
        text = (self.folder / "output.txt").read_text()
        print(text)
        return Outcome(self.folder, status, text, _xml=self.folder / "junit.xml")

    def family(self) -> list[psutil.Process]:
        """All living processes that a run of this project started."""
        found = []
        for process in psutil.process_iter():
            try:
                mine = process.environ().get("SGLPROF_LEASE_DIR") == str(self.leases)
                if mine and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except psutil.Error:
                continue
        return found

    def half_files(self) -> list[Path]:
        """Temporary files and unfinished traces below the results."""
        found = [path for path in self.folder.glob(".sglprof/**/*") if path.is_file()]
        found = [path for path in found if path.name != ".gitignore"]
        return [p for p in found if p.name.startswith(".") or "tmp" in p.parts[-4:] or _is_cut(p)]

    def left_over(self, within: float) -> list[str]:
        """What is left after at most `within` s: processes, leases, half files."""
        deadline = time.monotonic() + within
        while True:
            left = [words[:200] for words in map(_words, self.family()) if words]
            left += [path.name for path in self.leases.glob("*.lock")]
            left += [str(path) for path in self.half_files()]
            if not left or time.monotonic() > deadline:
                return left
            time.sleep(0.2)
