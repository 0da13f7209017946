"""What no command overwrites: what it reads, and what somebody else made."""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from pytest_sglprof._cli.main import main
from pytest_sglprof._cli.options import GENERATOR
from pytest_sglprof._cli.recording import fresh
from pytest_sglprof._report.results import write_results
from tests.integration.cli.test_perfetto_command import trace
from tests.support.windows import BALANCED, SLOW, as_run, run, window

MERGE = ("export", "--to", "perfetto")
Output = pytest.CaptureFixture[str]

RECORDED = (
    "results.json",
    "run.json",
    "journal.jsonl",
    "servers/default.1/server.log",
    "loads/a.1/load-1.jsonl",
    "windows/w1/p-1-TP-0.trace.json.gz",
    "windows/w1/odd.bin",
    "windows/w2/w2.nsys-rep",
    "windows/w2/w2.sqlite",
    "windows/w2/export/KERNELS.parquet",
)


def recorded_run(folder: Path) -> Path:
    """A run with everything that a real one leaves: results, journal, traces, reports, logs."""
    document = run([window(SLOW)])
    document["windows"][0]["artifacts"] = [
        {"path": "windows/w1/p-1-TP-0.trace.json.gz", "kind": "torch", "rank": "TP0"},
        {"path": "windows/w1/odd.bin", "kind": "torch", "rank": "TP1"},
    ]
    write_results(as_run(document), folder / "results.json")
    for name in RECORDED[1:]:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"precious {name}")
    return folder


def content(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.mark.parametrize("name", RECORDED)
@pytest.mark.parametrize("given", ["", "results.json"], ids=["folder", "file"])
def test_fault_f_a_page_never_replaces_what_its_run_recorded(
    tmp_path: Path, capsys: Output, name: str, given: str
) -> None:
    folder = recorded_run(tmp_path / "run")
    before = content(folder)
    assert main(["report", str(folder / given), "-o", str(folder / name)]) == 2
    assert "is one of the files that are read" in capsys.readouterr().err
    assert content(folder) == before


def by_a_link(target: Path, place: Path) -> Path:
    place.symlink_to(target)
    return place


def by_a_second_name(target: Path, place: Path) -> Path:
    os.link(target, place)
    return place


def through_a_linked_folder(target: Path, place: Path) -> Path:
    place.symlink_to(target.parent)
    return place / target.name


def by_dots(target: Path, place: Path) -> Path:
    return target.parent / ".." / target.parent.name / target.name


@pytest.mark.parametrize(
    "another_way", [by_a_link, by_a_second_name, through_a_linked_folder, by_dots]
)
@pytest.mark.parametrize("name", ["results.json", "windows/w1/p-1-TP-0.trace.json.gz"])
def test_fault_f_an_input_is_known_whatever_way_leads_to_it(
    tmp_path: Path, another_way: Callable[[Path, Path], Path], name: str
) -> None:
    folder = recorded_run(tmp_path / "run")
    output = another_way(folder / name, tmp_path / "page.html")
    before = content(folder)
    assert main(["report", str(folder), "-o", str(output)]) == 2
    assert content(folder) == before


def test_fault_f_a_baseline_and_every_further_run_are_inputs_too(tmp_path: Path) -> None:
    first, second = recorded_run(tmp_path / "first"), recorded_run(tmp_path / "second")
    before = content(tmp_path)
    old = str(second / "results.json")
    assert main(["report", str(first), str(second), "-o", old]) == 2
    assert main(["report", str(first), "--baseline", str(second), "-o", old]) == 2
    assert content(tmp_path) == before


def test_fault_f_a_picture_never_replaces_what_is_read(tmp_path: Path) -> None:
    folder = recorded_run(tmp_path / "run")
    (tmp_path / "heat.svg").symlink_to(folder / "results.json")
    assert main(["export", "--to", "svg", str(folder), "-o", str(tmp_path / "heat.svg")]) == 2
    assert (tmp_path / "heat.svg").is_symlink()
    assert main(["export", "--to", "svg", str(folder), "-o", str(folder / "heat.svg")]) == 0
    assert main(["export", "--to", "svg", str(folder), "-o", str(folder / "heat.svg")]) == 0


def test_fault_f_a_page_that_nobody_named_replaces_only_our_own(
    tmp_path: Path, capsys: Output
) -> None:
    folder = recorded_run(tmp_path / "run")
    page = folder / "report.html"
    page.write_text("<!doctype html><title>my notes</title>")
    assert main(["report", str(folder)]) == 2
    error = capsys.readouterr().err
    assert f"{page} exists, and sglprof did not write it" in error
    assert "next: choose another file with -o" in error
    assert "my notes" in page.read_text()
    assert main(["report", str(folder), "-o", str(page)]) == 0
    assert GENERATOR in page.read_bytes()
    assert main(["report", str(folder)]) == 0


@pytest.mark.parametrize("kind", ["folder", "dangling", "link"])
def test_fault_f_what_is_no_file_is_not_ours_either(tmp_path: Path, kind: str) -> None:
    folder = recorded_run(tmp_path / "run")
    page = folder / "report.html"
    if kind == "folder":
        page.mkdir()
    else:
        (tmp_path / "notes.html").write_text("notes")
        page.symlink_to(tmp_path / ("notes.html" if kind == "link" else "nowhere"))
    before = page.lstat()
    assert main(["report", str(folder)]) == 2
    assert page.lstat().st_ino == before.st_ino


def test_fault_f_a_named_file_that_is_no_input_is_replaced_as_before(tmp_path: Path) -> None:
    folder = recorded_run(tmp_path / "run")
    for other in (tmp_path / "page.html", tmp_path / "notes.txt", folder / "mine.html"):
        other.write_text("something else")
        assert main(["report", str(folder), "-o", str(other)]) == 0
        assert GENERATOR in other.read_bytes()


# ---- Perfetto ----------------------------------------------------------------------------------


@pytest.fixture
def traces(tmp_path: Path) -> Path:
    folder = tmp_path / "window"
    folder.mkdir()
    for rank in range(2):
        text = json.dumps(trace(rank))
        (folder / f"p-1-TP-{rank}.trace.json.gz").write_bytes(gzip.compress(text.encode()))
    (folder / "merged-p-1.trace.json.gz").write_bytes(b"the server's own")
    return folder


def test_fault_f_a_foreign_open_html_stays(traces: Path, tmp_path: Path, capsys: Output) -> None:
    out = tmp_path / "merged.json.gz"
    page = tmp_path / "merged.open.html"
    page.write_text("<title>of somebody else</title>")
    assert main([*MERGE, str(traces), "-o", str(out)]) == 2
    assert "merged.open.html exists" in capsys.readouterr().err
    assert page.read_text() == "<title>of somebody else</title>"
    assert not out.exists()


def test_fault_f_our_own_open_html_and_trace_are_written_again(traces: Path) -> None:
    words = [*MERGE, str(traces), "-o", str(traces / "merged.json.gz")]
    assert main(words) == 0
    assert GENERATOR in (traces / "merged.open.html").read_bytes()
    assert main(words) == 0


@pytest.mark.parametrize(
    ("name", "way"),
    [
        ("p-1-TP-0.trace.json.gz", "itself"),
        ("p-1-TP-0.trace.json.gz", "link"),
        ("p-1-TP-0.trace.json.gz", "second name"),
        ("merged-p-1.trace.json.gz", "itself"),
        ("merged-p-1.trace.json.gz", "link"),
    ],
)
def test_fault_f_traces_of_a_folder_are_never_the_output(
    traces: Path, tmp_path: Path, name: str, way: str
) -> None:
    out = traces / name
    if way == "link":
        out = by_a_link(traces / name, tmp_path / "out.json.gz")
    elif way == "second name":
        out = by_a_second_name(traces / name, tmp_path / "out.json.gz")
    before = content(traces)
    assert main([*MERGE, str(traces), "-o", str(out)]) == 2
    assert content(traces) == before


# ---- watch -------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["itself", "link", "second name"])
@pytest.mark.parametrize("options", [(), ("--follow", "--for", "1")], ids=["finished", "follow"])
def test_fault_f_lines_for_programs_never_replace_the_log(
    tmp_path: Path, capsys: Output, way: str, options: tuple[str, ...]
) -> None:
    log = tmp_path / "server.log"
    log.write_text("precious\n")
    target = log
    if way == "link":
        target = by_a_link(log, tmp_path / "out.jsonl")
    elif way == "second name":
        target = by_a_second_name(log, tmp_path / "out.jsonl")
    assert main(["watch", str(log), "--jsonl", str(target), *options]) == 2
    assert f"--jsonl {target} is one of the files that are read" in capsys.readouterr().err
    assert log.read_text() == "precious\n"


def test_fault_f_a_window_that_nobody_named_goes_into_a_folder_of_its_own(tmp_path: Path) -> None:
    assert fresh(tmp_path / "sglprof-window") == tmp_path / "sglprof-window"
    (tmp_path / "sglprof-window").mkdir()
    (tmp_path / "sglprof-window-2").touch()
    assert fresh(tmp_path / "sglprof-window") == tmp_path / "sglprof-window-3"
    (tmp_path / "onset.nsys-rep").touch()
    assert fresh(tmp_path / "onset") == tmp_path / "onset-2"


def test_fault_f_the_pages_that_pytest_writes_carry_the_mark_too(tmp_path: Path) -> None:
    from pytest_sglprof._report.page.page import write_page

    write_page([as_run(run([window(BALANCED)]))], [tmp_path], tmp_path / "report.html")
    assert GENERATOR in (tmp_path / "report.html").read_bytes()[:1000]
