"""Documents that earlier versions wrote, as `tests/data/results-MAJOR.MINOR.json`, are read.

1.0: two tests on the stand-in with `--slow rank=1,category=moe,factor=1.4`, a window of the whole
body of one of them, `pytest --sglprof -n 2`; folders and host are renamed.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator

import pytest_sglprof
from pytest_sglprof._report.ci import step_summary
from pytest_sglprof._report.page.page import page
from pytest_sglprof._report.results import load_results, write_results
from pytest_sglprof._report.terminal import rank_table, summary_lines

DATA = Path(__file__).parents[2] / "data"
SCHEMA = Path(pytest_sglprof.__file__).parent / "schemas" / "results.schema.json"


@pytest.mark.parametrize("path", sorted(DATA.glob("results-*.json")), ids=lambda path: path.stem)
def test_a_recorded_document_is_read_and_shown(path: Path, tmp_path: Path) -> None:
    results = load_results(path)
    (window,) = results.windows
    assert (window.verdict, results.summary.verdict, results.summary.tests) == ("fail", "fail", 2)
    (straggler,) = window.stragglers
    assert (straggler.latest, straggler.verdict) == ("TP1", "inconclusive")
    assert any(line.startswith("TP1") for line in rank_table(window))
    assert "1 fail" in summary_lines(results)[0]
    assert "fused\\_moe\\_kernel" in step_summary(results)
    assert "fused_moe_kernel" in page([results])
    write_results(results, tmp_path / "again.json")
    assert load_results(tmp_path / "again.json") == results


@pytest.mark.parametrize("path", sorted(DATA.glob("results-*.json")), ids=lambda path: path.stem)
def test_it_satisfies_the_schema_and_is_written_the_same_today(path: Path, tmp_path: Path) -> None:
    recorded = json.loads(path.read_text())
    Draft202012Validator(json.loads(SCHEMA.read_text())).validate(recorded)
    write_results(load_results(path), tmp_path / "again.json")
    again = json.loads((tmp_path / "again.json").read_text())
    assert without_additions(again, recorded) == recorded


DEFAULTS = (
    ("across", ""),
    ("across", "peers"),
    ("min_us", 0.0),
    ("role", ""),
)  # of what was added and is not null


def without_additions(document: Any, recorded: Any) -> Any:
    """`document` without the keys that are null or a default there and missing in `recorded`."""
    if isinstance(document, dict) and isinstance(recorded, dict):
        return {
            key: without_additions(value, recorded.get(key))
            for key, value in document.items()
            if key in recorded or (value is not None and (key, value) not in DEFAULTS)
        }
    if isinstance(document, list) and isinstance(recorded, list):
        return [without_additions(*pair) for pair in zip(document, recorded, strict=True)]
    return document


def test_a_judgement_that_a_file_names_and_does_not_have(tmp_path: Path) -> None:
    path = sorted(DATA.glob("results-*.json"))[-1]
    document = json.loads(path.read_text())
    document["windows"][0]["decisive"] = 10**6
    (tmp_path / "results.json").write_text(json.dumps(document))
    results = load_results(tmp_path / "results.json")
    assert results.windows[0].deciding is None
    assert results.windows[0].reason.partition(";")[0] in page([results])
