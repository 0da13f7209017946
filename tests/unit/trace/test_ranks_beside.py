"""The ranks of an nsys report's processes, from the file that its window left beside it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pytest_sglprof import read_window
from pytest_sglprof._cli.main import main
from pytest_sglprof._errors import TraceError
from pytest_sglprof._trace.nsys.ranks import ReportRanks, ranks_beside, write_ranks
from tests.support.nsys_exports import STRINGS, global_id, kernel, make_export, to_parquet

Output = pytest.CaptureFixture[str]


@pytest.fixture
def export(tmp_path: Path) -> Path:
    """Processes 7 and 8 on devices 0 and 1, of which 8 has three kernels."""
    rows = [kernel(at, at + 5, globalPid=global_id(8), deviceId=1) for at in (0, 10, 20)]
    rows.append(kernel(40, 45, globalPid=global_id(7)))
    tables = {"CUPTI_ACTIVITY_KIND_KERNEL": rows, "StringIds": STRINGS}
    return make_export(tmp_path / "window.2.sqlite", **tables)


def counts(path: Path, capsys: Output, *words: str) -> dict[str, int]:
    assert main(["kernels", str(path), "--by", "rank", "--format", "json", *words]) == 0
    return {row["rank"]: row["count"] for row in json.loads(capsys.readouterr().out)}


def test_without_the_file_ranks_are_devices(export: Path, capsys: Output) -> None:
    assert counts(export, capsys) == {"GPU0": 1, "GPU1": 3}


@pytest.mark.parametrize("of", ["window.2.nsys-rep", "window.2.sqlite"])
def test_every_reader_names_the_ranks(export: Path, of: str, capsys: Output) -> None:
    write_ranks(export.with_name(of), ReportRanks({8: "TP0", 7: "TP1"}))
    assert counts(export, capsys) == {"TP0": 3, "TP1": 1}
    assert counts(export.parent, capsys) == {"TP0": 3, "TP1": 1}
    by_stream = ["kernels", str(export), "--by", "rank,stream", "--format", "json"]
    assert main(by_stream) == 0
    assert {row["rank"] for row in json.loads(capsys.readouterr().out)} == {"TP0", "TP1"}
    assert main(["export", "--to", "nsight", str(export), "--format", "json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert {(row["pid"], row["rank"]) for row in rows} == {(8, "TP0"), (7, "TP1")}
    assert read_window(export.parent).ranks == ("TP0", "TP1")


def test_a_folder_of_parquet_has_them_too(export: Path, tmp_path: Path, capsys: Output) -> None:
    folder = to_parquet(export, tmp_path / "parquet.1")
    write_ranks(folder, ReportRanks({}, {0: "TP1", 1: "TP0"}))
    assert counts(folder, capsys) == {"TP0": 3, "TP1": 1}


def test_ranks_that_are_given_count_first(export: Path, capsys: Output) -> None:
    write_ranks(export, ReportRanks({8: "TP0", 7: "TP1"}))
    assert counts(export, capsys, "--rank", "8=TP3") == {"TP3": 3, "TP1": 1}


def test_the_rank_of_a_whole_report_may_be_given(tmp_path: Path, capsys: Output) -> None:
    rows = [kernel(0, 5, globalPid=global_id(8))]
    tables = {"CUPTI_ACTIVITY_KIND_KERNEL": rows, "StringIds": STRINGS}
    report = make_export(tmp_path / "a.sqlite", **tables)
    write_ranks(report, ReportRanks({8: "TP0"}))
    assert counts(report, capsys, "--rank", "a.sqlite=TP5") == {"TP5": 1}


def test_a_damaged_file_is_named(export: Path, capsys: Output) -> None:
    file = export.with_name("window.2.ranks.json")
    file.write_text('{"pid_ranks": {"x": 1}}')
    with pytest.raises(TraceError, match=r"window\.2\.ranks\.json"):
        ranks_beside(export)
    assert main(["kernels", str(export)]) == 2
    assert "correct or remove it" in capsys.readouterr().err


def test_nothing_is_written_where_no_rank_is_known(tmp_path: Path) -> None:
    write_ranks(tmp_path / "w.nsys-rep", ReportRanks())
    assert not [*tmp_path.iterdir()]
