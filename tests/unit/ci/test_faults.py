"""The matrix of faults: what of a run keeps a promise, and that the document is its record."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import pytest

from ci.fault_cells import PHASES, Cell, Outcome
from ci.faults import (
    PROMISES,
    Shown,
    cells,
    document,
    judged,
    read_recorded,
    recorded,
    run_all,
    sentence_of,
)
from ci.fuzz import READERS

CELL = Cell("driver", "KILL", "inside")
SAID = "E   the load driver failed (exit status 137)"


def outcome(**changes: object) -> Outcome:
    return Outcome(**{"status": 1, "seconds": 4.2, "text": SAID, **changes})


def test_the_document_is_what_the_generator_makes_of_the_recorded_cells(project_root: Path) -> None:
    assert (project_root / "docs" / "reliability.md").read_text() == document(read_recorded())


def test_the_document_has_figures_of_every_reader_that_is_fuzzed() -> None:
    rows = document({}).partition("| reader |")[2].splitlines()[2:]
    names = [row.split(" | ")[0].removeprefix("| ") for row in rows if row.startswith("| ")]
    assert names == [reader.name for reader in READERS]


def test_every_fault_has_a_cell_or_a_word_in_every_phase() -> None:
    names = {cell.name for cell in cells()}
    assert len(names) == len(cells())
    rows = [line for line in document({}).splitlines() if line.startswith("| **")]
    assert len(rows) == len(PROMISES)
    for promise, row in zip(PROMISES, rows, strict=True):
        for phase, text in zip(PHASES, row.strip("| ").split(" | ")[1:], strict=True):
            is_cell = Cell(promise.who, promise.what, phase).name in names
            assert text == ("not run" if is_cell else f"*{promise.not_in[phase]}*")
            assert is_cell or " " not in promise.not_in[phase]


def test_a_kept_promise_is_green() -> None:
    shown = judged(CELL, outcome())
    assert (shown.faults, shown.sentence) == ((), "the load driver failed (exit status 137)")
    assert "1, 4 s, [1] |" in document({CELL.name: shown})
    assert "1 of them run, 1 green" in document({CELL.name: shown})


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"status": None}, "pytest hung for 400 s"),
        ({"status": 3}, "status 3"),
        ({"status": 0}, "status 0"),
        ({"seconds": 91.0}, "91 s"),
        ({"text": "1 failed"}, "nothing names the cause"),
        ({"text": f"{SAID}\nINTERNALERROR> x"}, "INTERNALERROR"),
        ({"left": ("lock: gpu-0.lock",)}, "left: lock: gpu-0.lock"),
    ],
)
def test_a_broken_promise_is_red_and_says_how(changes: dict[str, object], fault: str) -> None:
    shown = judged(CELL, outcome(**changes))
    assert shown.faults == (fault,)
    assert f"**red: {fault}**" in document({CELL.name: shown})
    assert "1 of them run, 0 green" in document({CELL.name: shown})


def test_a_cell_that_was_not_run_is_not_green() -> None:
    shown = Shown(CELL.name, not_run="no real nsys")
    text = document({CELL.name: shown})
    assert "0 of them run, 0 green" in text
    assert "| not run |" in text


def test_what_differs_from_run_to_run_is_not_in_a_sentence() -> None:
    line = "!!! the keeper process (pid 4711) of run-20261130-074308-3f9a at 127.0.0.1:29999: 8.5 s"
    assert sentence_of("keeper", f"other\n{line}\n") == (
        "the keeper process (pid N) of RUN at PORT: N s"
    )
    assert sentence_of("keeper", "other") == ""
    assert sentence_of("", line) == ""


@dataclass
class Runs:
    """Stands for `run_cell`, which starts servers."""

    names: list[str] = field(default_factory=list)

    def __call__(self, cell: Cell, folder: Path) -> Outcome:
        self.names.append(cell.name)
        return outcome()


def test_a_cell_that_has_run_is_not_run_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = Runs()
    monkeypatch.setattr("ci.faults.run_cell", runs)
    wanted = [cell for cell in cells() if cell.who == "driver"]
    run_all(wanted[:2], tmp_path, 1)
    run_all(wanted, tmp_path, 2)
    assert sorted(runs.names) == sorted(cell.name for cell in wanted)
    assert recorded(tmp_path).keys() == set(runs.names)
