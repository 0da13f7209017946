"""`sglprof report`: pages of runs, and lanes of steps that were not chosen."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path
from typing import Any

import pytest

from pytest_sglprof import read_window
from pytest_sglprof._cli.main import main
from pytest_sglprof._report.results import write_results
from pytest_sglprof._trace.table import KernelTable
from tests.support.drawn import drawn_of
from tests.support.kineto import document, event, kineto_text
from tests.support.windows import as_run, run, window


def data(page: Path, number: int = 1) -> dict[str, Any]:
    """What the scripts of a page draw of its window."""
    return drawn_of(page.read_text(), number)


@pytest.fixture
def traces(shared_data: Path) -> list[Path]:
    return sorted((shared_data / "torch" / "sglang-cpu-tp2").glob("1*.json.gz"))


@pytest.fixture
def real(traces: list[Path], tmp_path: Path) -> tuple[Path, KernelTable]:
    """A results document of real traces that lie in its folder, and their table."""
    folder = tmp_path / "run"
    (folder / "traces").mkdir(parents=True)
    for trace in traces:
        (folder / "traces" / trace.name).write_bytes(trace.read_bytes())
    table = read_window(folder / "traces")
    document = run([window(table)])
    document["windows"][0]["artifacts"] = [
        {"path": f"traces/{trace.name}", "kind": "torch", "rank": f"TP{at}"}
        for at, trace in enumerate(traces)
    ]
    write_results(as_run(document), folder / "results.json")
    return folder, table


def test_a_run_s_folder_becomes_a_page_in_it(
    real: tuple[Path, KernelTable], capsys: pytest.CaptureFixture[str]
) -> None:
    folder, _ = real
    assert main(["report", str(folder)]) == 0
    assert capsys.readouterr().out == f"{folder / 'report.html'}\n"
    page = (folder / "report.html").read_text()
    assert page.startswith("<!doctype html>")
    assert 'href="traces/' in page
    assert not re.search(r"(src|href)=[\"']?(https?:)?//", page)


def test_links_are_those_of_the_place_where_the_page_lies(
    real: tuple[Path, KernelTable], tmp_path: Path
) -> None:
    folder, _ = real
    page = tmp_path / "pages" / "all.html"
    assert main(["report", str(folder), str(folder / "results.json"), "-o", str(page)]) == 0
    links = re.findall(r'href="([^"#]+gz)"', page.read_text())
    assert len(links) == 4
    assert all((page.parent / link).is_file() for link in links)


def test_any_step_is_drawn_from_the_traces(real: tuple[Path, KernelTable]) -> None:
    folder, table = real
    chosen = {picture["step"] for picture in _lanes(folder)}
    step = next(int(n) for n in table.steps["step"] if int(n) not in chosen)
    assert main(["report", str(folder), "--step", str(step)]) == 0
    (picture,) = data(folder / "report.html")["lanes"]["steps"]
    assert (picture["step"], picture["why"]) == (step, ["chosen"])
    assert set(data(folder / "report.html")["lanes"]["categories"]) <= set(
        table.frame["category"].cat.categories
    )
    events = sum(len(lane["name"]) for lane in picture["lanes"])
    assert events == int((table.frame["step"] == step).sum()) > 0


def test_a_step_that_is_not_there(
    real: tuple[Path, KernelTable], capsys: pytest.CaptureFixture[str]
) -> None:
    folder, table = real
    assert main(["report", str(folder), "--step", "99999"]) == 2
    error = capsys.readouterr().err
    assert "window w1 has no step 99999" in error
    assert f"one of its steps, {table.steps['step'].min()} to {table.steps['step'].max()}" in error
    assert not (folder / "report.html").exists()


def test_traces_that_were_not_kept(
    real: tuple[Path, KernelTable], capsys: pytest.CaptureFixture[str]
) -> None:
    folder, _ = real
    next((folder / "traces").iterdir()).unlink()
    assert main(["report", str(folder), "--step", "3"]) == 2
    assert "--sglprof-set=output.keep=all" in capsys.readouterr().err


def test_traces_that_lost_their_kernels_draw_nothing(
    real: tuple[Path, KernelTable], capsys: pytest.CaptureFixture[str]
) -> None:
    folder, _ = real
    trace = next((folder / "traces").glob("*TP-1*"))
    launch = event("cuda_runtime", "cudaLaunchKernel", 1, 2)
    for content, words in (
        (kineto_text(document([launch], rank=1)), "1 launch, but no kernels were recorded"),
        (kineto_text(document([], rank=1)) * 2, "holds two documents"),
    ):
        trace.write_bytes(gzip.compress(content.encode()))
        assert main(["report", str(folder), "--step", "3"]) == 2
        assert words in capsys.readouterr().err
        assert not (folder / "report.html").exists()


def test_which_window_is_meant(
    real: tuple[Path, KernelTable], capsys: pytest.CaptureFixture[str]
) -> None:
    folder, table = real
    document = run([window(table), window(table, window_id="w2")])
    write_results(as_run(document), folder / "results.json")
    assert main(["report", str(folder), "--step", "3"]) == 2
    assert "choose with --window: w1, w2" in capsys.readouterr().err
    assert main(["report", str(folder), "--step", "3", "--window", "w9"]) == 2
    assert "there is no window w9" in capsys.readouterr().err


def test_what_is_no_results_document(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "results.json").write_text("{}")
    assert main(["report", str(tmp_path)]) == 2
    assert "results.json" in capsys.readouterr().err
    assert main(["report", str(tmp_path / "nowhere.json")]) == 2
    assert "nowhere.json does not exist" in capsys.readouterr().err


def test_a_window_without_any_of_the_page_s_own_data_is_shown(tmp_path: Path) -> None:
    document = run([window(None, state="failed", reason="it died")])
    empty = {"step_times": [], "kernels": [], "lanes": None, "pid_ranks": {}, "gpu_ranks": {}}
    document["windows"][0] |= empty
    write_results(as_run(document), tmp_path / "results.json")
    assert main(["report", str(tmp_path)]) == 0
    assert "it died" in (tmp_path / "report.html").read_text()


def _lanes(folder: Path) -> list[dict[str, Any]]:
    document = json.loads((folder / "results.json").read_text())
    found: list[dict[str, Any]] = document["windows"][0]["lanes"]["steps"]
    return found
