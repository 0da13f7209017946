from __future__ import annotations

import copy
import dataclasses
import json
import math
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path, PurePosixPath
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import msgspec
import numpy as np
import pytest
from jsonschema import Draft202012Validator

import pytest_sglprof
from ci.schemas import ADDED_LATER
from pytest_sglprof._cli.options import json_value
from pytest_sglprof._config.model import WindowSpec
from pytest_sglprof._errors import SettingsError, SglprofError
from pytest_sglprof._report.model import FORMAT, RecordedSpec, Results, storable, utc
from pytest_sglprof._report.results import attempt_document, load_results, validate, write_results
from tests.support.kernel_tables import KERNELS, build
from tests.support.windows import BALANCED, SHORT, SLOW, as_run, run, window
from tests.support.windows import plain as as_plain

PACKAGE = Path(pytest_sglprof.__file__).parent
SCHEMA = json.loads((PACKAGE / "schemas" / "results.schema.json").read_text())


def test_the_schema_is_a_valid_schema() -> None:
    Draft202012Validator.check_schema(SCHEMA)
    assert SCHEMA["$schema"].endswith("2020-12/schema")
    assert SCHEMA["$id"]


def test_the_schemas_are_those_of_the_types() -> None:
    command = [sys.executable, "-m", "ci.schemas", "--check"]
    root = Path(__file__).parents[3]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"run python -m ci.schemas: {done.stderr}"


def test_documents_satisfy_the_schema_and_every_field_of_the_first_is_required() -> None:
    windows = [window(SLOW), window(None, window_id="w4", state="failed", reason="it died")]
    Draft202012Validator(SCHEMA).validate(run(windows))
    for definition in SCHEMA["$defs"].values():
        rules = definition.get("properties", {})
        added_later = [
            name
            for name, rule in rules.items()
            if rule.get("default", "") is None or name in ADDED_LATER
        ]
        assert sorted([*definition.get("required", []), *added_later]) == sorted(rules)
        assert definition.get("additionalProperties", True) is not False


def test_a_spec_is_recorded_whole() -> None:
    recorded = {field.name for field in dataclasses.fields(WindowSpec)} - {"thresholds"}
    assert set(RecordedSpec.__struct_fields__) == recorded


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
    write_results(as_run(run(windows)), path)
    read = load_results(path)
    assert read == as_run(run(windows))
    document = as_plain(read)
    assert document == json.loads(path.read_text()) == run(windows)
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
    threshold = decisive["threshold"]
    assert (threshold["scope"], decisive["verdict"], threshold["limit"]) == ("moe", "fail", 1.1)
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
    def attempt(number: int, outcome: Any, verdict: Any) -> Any:
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


def _negative(document: dict[str, Any]) -> None:
    document["windows"][0]["table"][3]["total_ns"] = -1


def _deep(document: dict[str, Any]) -> None:
    document["windows"][0]["judgements"][1]["finding"]["ranks"][0]["busy_ns"] = "many"


def _no_object(document: dict[str, Any]) -> None:
    document["summary"] = []


@pytest.mark.parametrize(
    ("spoil", "path"),
    [
        (_drop, "$.windows[0]: Object missing required field `verdict`"),
        (_wrong_word, "$.windows[0].verdict: Invalid enum value 'ok'"),
        (_negative, "$.windows[0].table[3].total_ns: Expected `int` >= 0"),
        (_deep, "$.windows[0].judgements[1].finding.ranks[0].busy_ns: Expected `int`, got `str`"),
        (_no_object, "$.summary: Expected `object`, got `array`"),
    ],
)
def test_a_violation_is_named_with_its_place(
    tmp_path: Path, spoil: Callable[[dict[str, Any]], None], path: str
) -> None:
    document = copy.deepcopy(run([window(SLOW)]))
    spoil(document)
    with pytest.raises(SettingsError) as caught:
        validate(document)
    assert path in str(caught.value)
    (tmp_path / "old.json").write_text(json.dumps(document))
    with pytest.raises(SglprofError, match=r"old\.json: results document") as read:
        load_results(tmp_path / "old.json")
    assert path in str(read.value)


def test_what_none_can_read_is_not_written(tmp_path: Path) -> None:
    made = as_run(run([window(SLOW)]))
    spoilt = msgspec.structs.replace(made.windows[0], verdict="ok")
    with pytest.raises(SettingsError, match=r"\$\.windows\[0\]\.verdict"):
        write_results(msgspec.structs.replace(made, windows=(spoilt,)), tmp_path / "results.json")
    assert list(tmp_path.iterdir()) == []


def test_a_newer_minor_version_is_read_and_a_newer_major_one_refused(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    document = run([window(SLOW)])
    document["schema_version"] = {"major": 1, "minor": 7}
    document["windows"][0]["surprise"] = 1
    path.write_text(json.dumps(document))
    assert load_results(path).windows == as_run(run([window(SLOW)])).windows
    document["schema_version"] = {"major": 2, "minor": 3}
    document["windows"] = "another thing altogether"
    path.write_text(json.dumps(document))
    with pytest.raises(SglprofError, match=r"of format 2\.3, .*cannot read") as caught:
        load_results(path)
    assert f"format 1, this version writes 1.{FORMAT.minor}" in str(caught.value)
    document["schema_version"] = 1
    path.write_text(json.dumps(document))
    with pytest.raises(SglprofError, match=r"\$\.schema_version: Expected `object`, got `int`"):
        load_results(path)


# ---- what JSON cannot hold ---------------------------------------------------------------------


def full_of(value: float, kind: Any) -> Any:
    """A value of this type in which every float that may be absent is `value`."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return "log" if arguments[1].pattern else full_of(value, arguments[0])
    if origin in (Union, UnionType):
        inner = next(one for one in arguments if one is not NoneType)
        return value if _is_float(inner) else full_of(value, inner)
    if origin is Literal:
        return arguments[0]
    if origin is tuple and arguments == (float, float):  # an interval, which may be absent
        return (value, 1.0)
    if origin is tuple:
        return tuple(full_of(value, one) for one in arguments if one is not Ellipsis)
    if origin in (list, Sequence):
        return [full_of(value, arguments[0])]
    if origin is dict:
        return {"key": full_of(value, arguments[1])}
    if kind is Any:
        return [value, {"deep": value}]
    if kind in (int, float, str, bool):
        return kind(1)
    hints = get_type_hints(kind, include_extras=True)
    return kind(**{name: full_of(value, hint) for name, hint in hints.items()})


def _is_float(kind: Any) -> bool:
    return kind is float or (get_origin(kind) is Annotated and get_args(kind)[0] is float)


def numbers_of(value: Any) -> list[float]:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        return [number for item in value for number in numbers_of(item)]
    return [value] if isinstance(value, float) else []


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_document_full_of_what_json_cannot_hold_is_read_back(
    value: float, tmp_path: Path
) -> None:
    document = full_of(value, Results)
    (finding,) = document.windows[0].findings
    assert repr(finding.slowdown) == repr(finding.interval[0]) == repr(value)
    stored = storable(document)
    write_results(stored, tmp_path / "results.json")
    read = load_results(tmp_path / "results.json")
    assert read == stored
    (finding,) = read.windows[0].findings
    assert (finding.slowdown, finding.interval, finding.p_value) == (None, None, None)
    (load,) = read.loads
    assert (load.ttft, load.raw) == ({"key": None}, {"key": [None, {"deep": None}]})
    assert numbers_of(as_plain(read)) and all(map(math.isfinite, numbers_of(as_plain(read))))


def test_a_figure_that_must_exist_is_refused_where_it_is_not_finite(tmp_path: Path) -> None:
    made = as_run(run([window(SLOW)]))
    (first, *others) = made.windows[0].findings
    spoilt = msgspec.structs.replace(first, share_of_compute=math.nan)
    spoilt_window = msgspec.structs.replace(made.windows[0], findings=(spoilt, *others))
    document = storable(msgspec.structs.replace(made, windows=(spoilt_window,)))
    with pytest.raises(SettingsError, match=r"\$\.windows\[0\]\.findings\[0\]\.share_of_compute"):
        write_results(document, tmp_path / "results.json")


def test_what_holds_nothing_to_hide_is_not_copied() -> None:
    made = as_run(run([window(SLOW)]))
    assert storable(made.windows[0]) is made.windows[0]
    assert storable({"token": "abc", "n": [1, 2]}) == {"token": "<redacted>", "n": [1, 2]}


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
    assert json_value(value) == {"1": [2, None, True], "s": ["a", "b"], "p": "a/b"}
    assert type(json_value(np.bool_(True))) is bool
    for strange in (object(), PurePosixPath, b"x"):
        with pytest.raises(TypeError, match="no place in a results document"):
            json_value(strange)


def test_times_are_utc() -> None:
    assert utc(0.1234) == "1970-01-01T00:00:00.123Z"
    assert utc("2026-01-01T00:00:00Z") == "2026-01-01T00:00:00Z"
    assert utc(None) is None
