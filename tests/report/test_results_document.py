from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pytest
from jsonschema import Draft202012Validator
from kernel_tables import KERNELS, build

from pytest_sglprof.errors import SettingsError, SglprofError
from pytest_sglprof.report.plain import plain, utc
from pytest_sglprof.report.results import (
    attempt_document,
    load_results,
    results_schema,
    validate,
    write_results,
)

from .windows import BALANCED, SHORT, SLOW, run, window


def test_the_schema_is_a_valid_schema() -> None:
    Draft202012Validator.check_schema(results_schema())
    assert results_schema()["$schema"].endswith("2020-12/schema")


def test_a_run_is_written_validated_and_read_back(tmp_path: Path) -> None:
    windows = [
        window(SLOW),
        window(SHORT, window_id="w2"),
        window(BALANCED, window_id="w3", standin=True),
        window(None, window_id="w4", state="failed", reason="it died", log=["Traceback"]),
        window(build(with_steps=False), window_id="w5"),
        window(build(("DP0 TP0", "DP1 TP1")), window_id="w6"),
    ]
    path = tmp_path / "out" / "results.json"
    write_results(run(windows), path)
    document = load_results(path)
    assert document == run(windows)
    assert document["summary"] == {
        "verdict": "fail",
        "tests": 1,
        "windows": {"fail": 1, "inconclusive": 4, "pass": 1},
        "standin": True,
    }
    assert "sk-very-secret" not in path.read_text()
    assert [item.name for item in path.parent.iterdir()] == ["results.json"]


def test_a_window_document_holds_what_was_measured() -> None:
    found = window(SLOW, expected=["TP0", "TP1"])
    assert (found["opened"], found["duration_s"]) == ("2023-11-14T22:13:20.000Z", 3.5)
    assert found["artifacts"][0]["path"] == "windows/w1/a-TP-0.trace.json.gz"
    assert found["spec"]["timeout"] is None
    assert found["spec"]["num_steps"] == 50
    assert found["ranks"] == ["TP0", "TP1"]
    assert found["steps"]["per_rank"] == {"TP0": 50, "TP1": 50}
    assert found["steps"]["groups"][0]["by_stage"] == {"decode": 50}
    rows = {(row["rank"], row["name"]): row for row in found["table"]}
    assert len(rows) == 2 * len(KERNELS)
    assert rows["TP1", "fused_moe_kernel"] == {
        "rank": "TP1",
        "name": "fused_moe_kernel",
        "category": "moe",
        "count": 50,
        "total_ns": 50 * 840_000,
    }
    decisive = found["judgements"][found["decisive"]]
    assert (decisive["scope"], decisive["verdict"], decisive["limit"]) == ("moe", "fail", 1.1)
    assert decisive["finding"]["contributors"] == [{"name": "fused_moe_kernel", "ns": 12e6}]
    scopes = [item["scope"] for item in found["findings"] if not item["kernel"]]
    assert scopes[:3] == ["compute", "communication", "moe"]


def test_kernels_beyond_the_twenty_longest_have_no_finding_but_a_row() -> None:
    kernels = [(f"k{at:02}", "gemm", 1000 * (at + 1)) for at in range(30)]
    found = window(build(steps=30, kernels=kernels))
    listed = [item["kernel"] for item in found["findings"] if item["kernel"]]
    assert listed == [f"k{at:02}" for at in range(29, 9, -1)]
    assert len(found["table"]) == 60


def test_every_attempt_is_kept_and_the_last_one_decides(tmp_path: Path) -> None:
    def attempt(number: int, outcome: str, verdict: str | None) -> dict[str, Any]:
        return attempt_document(
            nodeid="t", number=number, outcome=outcome, verdict=verdict, reason="", duration_s=-1
        )

    tests = [attempt(2, "passed", "pass"), attempt(1, "failed", "inconclusive")]
    document = run([], tests=tests)
    validate(document)
    (test,) = document["tests"]
    assert (test["outcome"], test["verdict"]) == ("passed", "pass")
    assert [item["number"] for item in test["attempts"]] == [1, 2]
    assert document["summary"]["verdict"] == "pass"
    unjudged = run([], tests=[attempt(1, "passed", None)])
    assert unjudged["summary"]["verdict"] is None


def test_loads_keep_no_infinity_and_no_secret() -> None:
    (load,) = run([])["loads"]
    assert load["output_throughput"] is None
    assert load["ttft"] == {"mean": 1.5, "p99": None}
    assert load["raw"] == {"api_key": "<redacted>", "itl": None}
    assert load["command"] == ["bench", "--api-key", "<redacted>"]


def _drop(document: dict[str, Any]) -> None:
    del document["windows"][0]["verdict"]


def _wrong_word(document: dict[str, Any]) -> None:
    document["windows"][0]["verdict"] = "ok"


def _unknown(document: dict[str, Any]) -> None:
    document["windows"][0]["surprise"] = 1


def _negative(document: dict[str, Any]) -> None:
    document["windows"][0]["table"][3]["total_ns"] = -1


def _version(document: dict[str, Any]) -> None:
    document["schema_version"] = 2


@pytest.mark.parametrize(
    ("spoil", "path"),
    [
        (_drop, "$.windows[0]: 'verdict' is a required property"),
        (_wrong_word, "$.windows[0].verdict"),
        (_unknown, "'surprise' was unexpected"),
        (_negative, "$.windows[0].table[3].total_ns"),
        (_version, "$.schema_version"),
    ],
)
def test_a_violation_is_named_and_nothing_is_written(
    tmp_path: Path, spoil: Callable[[dict[str, Any]], None], path: str
) -> None:
    document = copy.deepcopy(run([window(SLOW)]))
    spoil(document)
    with pytest.raises(SettingsError) as caught:
        write_results(document, tmp_path / "results.json")
    assert path in str(caught.value)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "old.json").write_text(json.dumps(document))
    with pytest.raises(SglprofError, match=r"old\.json: results document"):
        load_results(tmp_path / "old.json")


def test_what_is_no_results_document_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(SglprofError, match=r"none\.json cannot be read: No such file"):
        load_results(tmp_path / "none.json")
    (tmp_path / "cut.json").write_text('{"run": ')
    with pytest.raises(SglprofError, match=r"cut\.json is not JSON"):
        load_results(tmp_path / "cut.json")
    (tmp_path / "bytes.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(SglprofError, match=r"bytes\.json is not JSON"):
        load_results(tmp_path / "bytes.json")


def test_plain_data_only() -> None:
    value = {1: (np.int64(2), np.float64("nan"), True), "s": {"b", "a"}, "p": Path("a/b")}
    assert plain(value) == {"1": [2, None, True], "s": ["a", "b"], "p": "a/b"}
    assert type(plain(np.bool_(True))) is bool
    for strange in (object(), PurePosixPath, b"x"):
        with pytest.raises(TypeError, match="no place in a results document"):
            plain(strange)


def test_times_are_utc() -> None:
    assert utc(0.1234) == "1970-01-01T00:00:00.123Z"
    assert utc("2026-01-01T00:00:00Z") == "2026-01-01T00:00:00Z"
    assert utc(None) is None
