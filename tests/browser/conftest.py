"""A browser, and the pages that it opens."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from pytest_sglprof import read_window
from pytest_sglprof._cli.main import main
from pytest_sglprof._report.page.page import write_page
from tests.support.browser import Browser, chromium
from tests.support.dp_windows import planted, read_back
from tests.support.project import Project
from tests.support.windows import as_run, run, window

SLOW_RANK = "TP5"
CONFIG = """
[server]
kind = "standin"
args = ["--tp", "2"]
standin_args = ["--step-ms", "4", "--layers", "1"]

[servers.slow]
kind = "standin"
args = ["--tp", "8"]
standin_args = ["--step-ms", "8", "--slow", "rank=5,category=moe,factor=1.4"]

[[threshold]]
limit = 1.10

[[threshold]]
scope = "moe"
limit = 1.10
"""
TESTS = """
@pytest.mark.profile_window(num_steps=60)
def test_clean(load):
    load(600)

@pytest.mark.profile_window(whole_body=True)
def test_too_short(drive):
    drive(10)

@pytest.mark.sglang_server("slow")
@pytest.mark.profile_window(num_steps=60)
def test_slow(load):
    load(500)
"""


# Two runs of the same tests; in the later one MoE kernels take longer, on all ranks alike. Long
# prompts keep the length of the KV cache within one bucket, whenever the windows open.
PAIR_CONFIG = """
[server]
kind = "standin"
args = ["--tp", "2"]
standin_args = ["--step-ms", "4", "--layers", "1"{more}]

[[threshold]]
limit = 1.10
"""
PLANTED = 1.3
SLOWER = ", ".join(f'"--slow", "rank={rank},category=moe,factor={PLANTED}"' for rank in (0, 1))
PAIR_TESTS = """
def drive(bench_serving, requests):
    bench_serving(num_prompts=requests, max_concurrency=requests, random_input_len=1100,
                  random_output_len=600, random_range_ratio=1.0, warm_up=False)

@pytest.mark.profile_window(num_steps=60)
def test_decode(bench_serving):
    drive(bench_serving, 4)

@pytest.mark.profile_window("other work", num_steps=60)
def test_mix(bench_serving):
    drive(bench_serving, {requests})

@pytest.mark.profile_window("{name}", num_steps=60)
def test_short(bench_serving):
    drive(bench_serving, 2)
"""


@dataclass(frozen=True)
class RunPage:
    """The page of a run and the results that it was made of."""

    path: Path
    results: dict[str, Any]

    def anchor(self, test: str) -> str:
        """The id of the window of a test."""
        numbers = [w["nodeid"].endswith(f"::{test}") for w in self.results["windows"]]
        return f"window-{numbers.index(True) + 1}"

    def window(self, test: str) -> dict[str, Any]:
        return next(w for w in self.results["windows"] if w["nodeid"].endswith(f"::{test}"))


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    with chromium() as found:
        yield found


@pytest.fixture(scope="session")
def standin_run(tmp_path_factory: pytest.TempPathFactory) -> RunPage:
    """A run on the stand-in: one clean window, one that is too short, one with a slow rank."""
    project = Project(tmp_path_factory.mktemp("page"), TESTS, CONFIG)
    outcome = project.run("--sglprof-set=output.keep=all")
    assert f"report:  {outcome.run_folder / 'report.html'}" in outcome.text
    return RunPage(outcome.run_folder / "report.html", outcome.results)


@pytest.fixture(scope="session")
def gpu_page(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> RunPage:
    """Two nsys reports of two GPUs, before and after a change; they tell no steps."""
    folder = tmp_path_factory.mktemp("gpu")
    documents = []
    for at, word in enumerate(("before", "after")):
        table = read_window(shared_data / "nsys" / f"mfu_2gpu_{word}.sqlite")
        document = run([window(table, window_id=f"w-{word}")])
        document["run"]["id"] = word
        document["windows"][0]["opened"] = f"2026-11-2{at}T00:00:00.000Z"
        documents.append(json.loads(json.dumps(document)))
    write_page([*map(as_run, documents)], [folder, folder], folder / "report.html")
    both = {**documents[0], "windows": [w for d in documents for w in d["windows"]]}
    return RunPage(folder / "report.html", both)


@pytest.fixture(scope="session")
def cpu_page(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> RunPage:
    """Windows of a real CPU server: tensor parallel, two replicas of it, one of them idle."""
    folder = tmp_path_factory.mktemp("cpu")
    torch = shared_data / "torch"
    tables = {
        "tp2": read_window(sorted((torch / "sglang-cpu-tp2").glob("1*.json.gz"))),
        "tp2dp2": read_window(torch / "sglang-cpu-tp2dp2"),
    }
    document = run([window(table, window_id=name) for name, table in tables.items()])
    write_page([as_run(document)], [folder], folder / "report.html")
    return RunPage(folder / "report.html", document)


@pytest.fixture(scope="session")
def dp_page(tmp_path_factory: pytest.TempPathFactory) -> RunPage:
    """Eight ranks with different input, one of them on a slow GPU and with more KV."""
    return page_of_dp("e", 8, tmp_path_factory.mktemp("dp"))


def page_of_dp(case: str, ranks: int, folder: Path) -> RunPage:
    """The page of a planted window of DP attention."""
    table = read_back(planted(case, ranks, passes=60 if ranks <= 8 else 30), folder / "traces")
    document = run([window(table)])
    write_page([as_run(document)], [folder], folder / "report.html")
    return RunPage(folder / "report.html", document)


@dataclass(frozen=True)
class PairPage(RunPage):
    """The page of a run against a baseline. folders: of the runs, before and now."""

    before: dict[str, Any]
    folders: tuple[Path, Path]


@pytest.fixture(scope="session")
def standin_pair(tmp_path_factory: pytest.TempPathFactory) -> PairPage:
    """Two runs on the stand-in, the later one with slower MoE kernels."""
    runs = []
    for more, requests, name in (("", 8, "renamed before"), (f", {SLOWER}", 3, "renamed now")):
        project = Project(
            tmp_path_factory.mktemp("pair"),
            PAIR_TESTS.replace("{requests}", str(requests)).replace("{name}", name),
            PAIR_CONFIG.replace("{more}", more),
        )
        runs.append(project.run("--sglprof-set=output.keep=all", "--sglprof-allow-inconclusive"))
    before, now = (run.run_folder for run in runs)
    page = now / "against.html"
    command = ["report", str(now), "--baseline", str(before), "-o", str(page)]
    assert main(command) == 0
    return PairPage(page, runs[1].results, runs[0].results, (before, now))


@pytest.fixture(scope="session")
def gpu_pair(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> PairPage:
    """One nsys report of two GPUs against another one; they tell no steps."""
    folder = tmp_path_factory.mktemp("gpu-pair")
    documents = []
    for word in ("before", "after"):
        document = run([window(read_window(shared_data / "nsys" / f"mfu_2gpu_{word}.sqlite"))])
        document["run"]["id"] = word
        documents.append(json.loads(json.dumps(document)))
    page = folder / "report.html"
    write_page([as_run(documents[1])], [folder], page, baseline=as_run(documents[0]))
    return PairPage(page, documents[1], documents[0], (folder, folder))
