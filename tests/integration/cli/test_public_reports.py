"""Inputs after public reports (../shared/cases/traces), as its README says they are to be read.

Others of them are tested where their kind is: incomplete traces in test_completeness, foreign
files in test_foreign_files, ranks in test_whose_file_commands.
"""

from __future__ import annotations

import json
import re
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

from pytest_sglprof._cli.main import main

Capture = pytest.CaptureFixture[str]


def kernels(capsys: Capture, path: Path) -> tuple[list[dict[str, Any]], list[str]]:
    assert main(["kernels", str(path), "--by", "rank,name", "--format", "json"]) == 0
    printed = capsys.readouterr()
    notes = [line.removeprefix("note: ") for line in printed.err.splitlines()]
    return json.loads(printed.out), notes


def exact(path: Path) -> tuple[int, int]:
    """Count and ns of the kernels of a trace, by its text: exact fractions, no floats."""
    text = path.read_text()
    durations = re.findall(r'"dur": ?"?([-+.\deE]+)"?', text)
    return len(durations), sum(round(Fraction(word) * 1000) for word in durations)


@pytest.mark.parametrize("name", ["strings", "empty_last", "exponent", "exponent_big"])
def test_odd_numbers_are_read_exactly(cases: Path, capsys: Capture, name: str) -> None:
    rows, notes = kernels(capsys, cases / name)
    count, total = exact(cases / name / "rank-0.json")
    assert [(row["rank"], row["count"], row["total_ns"]) for row in rows] == [("TP0", count, total)]
    assert notes == []


def test_kernels_without_a_time_are_counted(cases: Path, capsys: Capture) -> None:
    rows, notes = kernels(capsys, cases / "notime")
    assert [(row["count"], row["total_ns"]) for row in rows] == [(6, 30_000)]
    assert notes == [
        "TP0: skipped 1 kernel events with a missing or unreadable time",
        "TP0: skipped 1 kernel events with a negative time",
    ]


@pytest.mark.parametrize(
    ("name", "steps"), [("two_devices_one_process", 40), ("two_devices_one_process_big", 12_000)]
)
def test_two_devices_have_streams_of_one_number(
    cases: Path, capsys: Capture, name: str, steps: int
) -> None:
    """Kernels that run at the same time on two devices are not impossible."""
    rows, notes = kernels(capsys, cases / name)
    totals = {row["name"]: (row["count"], row["total_ns"]) for row in rows}
    assert totals == {
        "big_gemm_kernel": (steps, steps * 90_000),
        "small_norm_kernel": (steps, steps * 20_000),
    }
    assert not [note for note in notes if "excluded" in note]


def test_a_merged_file_holds_its_ranks(cases: Path, capsys: Capture) -> None:
    rows, _ = kernels(capsys, cases / "merged_tp")
    assert {row["rank"]: row["count"] for row in rows} == {"TP0": 200, "TP1": 200}
    command = ["check", str(cases / "merged_tp"), "--limit", "1.10", "--min-steps", "30"]
    assert main(command) == 1
    assert "TP1 is 1.30x slower" in capsys.readouterr().out


def test_rows_of_nsys_without_a_time_are_counted(cases: Path, capsys: Capture) -> None:
    rows, notes = kernels(capsys, cases / "nsys_bad_rows.sqlite")
    # Of the four unsound rows two have no time; two have one, but one of these has no name.
    assert sum(row["count"] for row in rows) == 42
    assert {row["name"]: row["count"] for row in rows}["unnamed kernel"] == 1
    assert "skipped 2 GPU activities with a missing or negative duration" in notes


@pytest.mark.parametrize(
    ("skew", "words"),
    [
        ("3ms", "clocks are 3.00 ms apart, which is corrected, to within 0 ns"),
        ("5s", "clocks are 5,000 ms apart, which is corrected, to within 0 ns"),
        ("none", "clocks agree within 0 ns"),
    ],
)
def test_clocks_of_two_nodes(cases: Path, capsys: Capture, skew: str, words: str) -> None:
    path = str(cases / f"skew_{skew}_tp1_late")
    assert main(["check", path, "--metric", "lateness", "--limit", "0.1", "--min-steps", "30"]) == 1
    text = capsys.readouterr().out
    assert "TP1 arrives 33.3 % of the work later" in text
    assert words in text
