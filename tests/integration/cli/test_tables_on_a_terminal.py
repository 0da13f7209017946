"""Order and length of tables, and colour on a terminal."""

from __future__ import annotations

import csv
import io
import json
import os
import pty
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pytest_sglprof._cli.colour import coloured, wants_colour
from pytest_sglprof._cli.main import main
from pytest_sglprof._cli.options import ordered
from tests.integration.cli.test_inputs import nsys_files, torch_files

Output = pytest.CaptureFixture[str]
RED_TP1 = "\x1b[31mTP1\x1b[0m  "


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return torch_files(tmp_path / "w")


def rows(capsys: Output, *words: object) -> list[dict[str, Any]]:
    assert main([*map(str, words), "--format", "json"]) in (0, 1)
    document: list[dict[str, Any]] = json.loads(capsys.readouterr().out)
    return document


def test_numbers_fall_text_rises_ranks_are_counted_and_none_is_last() -> None:
    records = [{"rank": rank, "ns": ns} for rank, ns in (("TP10", 1), ("TP2", None), ("TP1", 3))]
    assert [each["rank"] for each in ordered(records, "rank")] == ["TP1", "TP2", "TP10"]
    assert [each["ns"] for each in ordered(records, "ns")] == [3, 1, None]
    assert [each["ns"] for each in ordered(records, "ns", 1)] == [3]
    assert ordered(records, None) == records


def test_kernels_are_sorted_by_any_column(folder: Path, capsys: Output) -> None:
    by = ("kernels", folder, "--by", "rank,name")
    names = [row["name"] for row in rows(capsys, *by, "--sort", "name")]
    assert names == sorted(names)
    totals = [row["total_ns"] for row in rows(capsys, *by, "--sort", "total_ns", "--top", "3")]
    assert len(totals) == 3
    assert totals == sorted(totals, reverse=True)
    assert rows(capsys, *by, "--top", "3")[0]["total_ns"] == totals[0]


def test_a_column_that_the_table_lacks_is_refused(folder: Path, capsys: Output) -> None:
    assert main(["kernels", str(folder), "--sort", "stream"]) == 2
    assert "--by rank,name,category,stream" in capsys.readouterr().err
    assert main(["kernels", str(folder), "--sort", "colour"]) == 2
    assert main(["check", str(folder), "--top", "0"]) == 2


def test_check_lists_the_slowest_ranks_first(folder: Path, capsys: Output) -> None:
    words = ["check", str(folder), "--limit", "1.1", "--format", "csv"]
    assert main([*words, "--sort", "total_ns"]) == 1
    ranks = [row["rank"] for row in csv.DictReader(io.StringIO(capsys.readouterr().out))]
    assert ranks == ["TP1", "TP0"]
    assert main([*words, "--sort", "total_ns", "--top", "1"]) == 1
    assert len(capsys.readouterr().out.splitlines()) == 2


def test_compare_sorts_and_cuts(folder: Path, tmp_path: Path, capsys: Output) -> None:
    before = torch_files(tmp_path / "before", slow=1.0)
    words = ["compare", str(before), str(folder), "--format", "json", "--sort", "name"]
    assert main(words) == 0
    (pair,) = json.loads(capsys.readouterr().out)["pairs"]
    names = [kernel["name"] for kernel in pair["stages"][0]["kernels"]]
    assert names == sorted(names)
    assert main([*words[:3], "--top", "1"]) == 0
    assert "more kernels; --format csv has all" in capsys.readouterr().out


def test_rows_to_pin_are_sorted(tmp_path: Path, capsys: Output) -> None:
    export = ("export", nsys_files(tmp_path / "w"), "--to", "nsight")
    assert [row["pid"] for row in rows(capsys, *export, "--sort", "rank")] == [29815, 29814]
    assert len(rows(capsys, *export, "--sort", "rank", "--top", "1")) == 1


# Colour.


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("environment", "on_terminal", "in_file"),
    [
        ({}, True, False),
        ({"TERM": "dumb"}, False, False),
        ({"NO_COLOR": "1"}, False, False),
        ({"NO_COLOR": ""}, True, False),
        ({"FORCE_COLOR": "1"}, True, True),
        ({"FORCE_COLOR": ""}, True, False),
        ({"NO_COLOR": "1", "FORCE_COLOR": "1"}, False, False),
    ],
)
def test_when_there_is_colour(
    environment: dict[str, str], on_terminal: bool, in_file: bool
) -> None:
    assert wants_colour(Terminal(), environment) is on_terminal
    assert wants_colour(io.StringIO(), environment) is in_file


def test_only_verdicts_and_the_slow_rank_have_colour() -> None:
    text = "fail: TP1 is slow\nDP0: pass: fine\nTP1  12\nTP10  3\nfailure: none\nTP1 fail: x\n"
    assert coloured(text, {"TP1"}) == (
        "\x1b[31mfail\x1b[0m: TP1 is slow\nDP0: \x1b[32mpass\x1b[0m: fine\n"
        "\x1b[31mTP1\x1b[0m  12\nTP10  3\nfailure: none\nTP1 fail: x\n"
    )


def test_forced_colour_is_all_that_changes(
    folder: Path, capsys: Output, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["check", str(folder), "--limit", "1.1"]
    assert main(words) == 1
    unpainted = capsys.readouterr().out
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert main(words) == 1
    painted = capsys.readouterr().out
    assert painted.startswith("\x1b[31mfail\x1b[0m: TP1 is ")
    assert RED_TP1 in painted
    assert "mTP0" not in painted
    assert re.sub(r"\x1b\[\d+m", "", painted) == unpainted
    assert main([*words, "--format", "json"]) == 1
    assert "\x1b" not in capsys.readouterr().out


def test_a_real_terminal_gets_colour(folder: Path) -> None:
    controller, terminal = pty.openpty()
    environment = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "FORCE_COLOR")}
    words = [sys.executable, "-m", "pytest_sglprof", "check", str(folder), "--limit", "1.1"]
    process = subprocess.run(words, stdout=terminal, env={**environment, "TERM": "xterm"})
    os.close(terminal)
    shown = b""
    try:
        while piece := os.read(controller, 4096):
            shown += piece
    except OSError:  # the end, on Linux
        pass
    os.close(controller)
    assert process.returncode == 1
    assert b"\x1b[31mfail\x1b[0m: TP1" in shown
