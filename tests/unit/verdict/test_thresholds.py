from __future__ import annotations

from typing import Any

import pytest

from pytest_sglprof._config.model import Threshold
from pytest_sglprof._config.thresholds import (
    default_thresholds,
    merge_thresholds,
    thresholds_from_keywords,
)
from pytest_sglprof._errors import SettingsError


def test_a_number_limits_compute() -> None:
    assert thresholds_from_keywords({"slowdown": 1.2}, "marker") == (
        Threshold("slowdown", 1.2, "compute", origin="marker"),
    )


def test_a_mapping_names_scopes_kernels_and_stages() -> None:
    found = thresholds_from_keywords(
        {
            "slowdown": {"moe": 1.1, "compute in Decode": 1.2, "/flash.*/ in prefill": 2},
            "lost_share": 0.05,
        },
        "marker",
    )
    assert [(t.metric, t.scope, t.kernel, t.stage, t.limit) for t in found] == [
        ("slowdown", "moe", "", "", 1.1),
        ("slowdown", "compute", "", "decode", 1.2),
        ("slowdown", "compute", "flash.*", "prefill", 2.0),
        ("lost_share", "compute", "", "", 0.05),
    ]


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"slowdwn": 1.1}, "did you mean slowdown?"),
        ({"wait": 1.1}, "'wait' is not a metric"),
        ({"slowdown": "1.1"}, "slowdown is '1.1', not a number"),
        ({"slowdown": True}, "slowdown is True, not a number"),
        ({"slowdown": None}, "slowdown is None, not a number"),
        ({"slowdown": float("nan")}, "a ratio that is ≥ 1.0"),
        ({"slowdown": float("inf")}, "a ratio that is ≥ 1.0"),
        ({"slowdown": 0.9}, "slowdown is 0.9, but a limit of slowdown must be ≥ 1.0"),
        ({"imbalance_factor": 0}, "1.10 allows 10 %"),
        ({"lost_share": 5}, "a share that is ≥ 0.0 and < 1.0"),
        ({"lost_share": -0.1}, "0.05 allows 5 %"),
        ({"slowdown": {}}, "slowdown is an empty mapping"),
        ({"slowdown": {"moe": "x"}}, "slowdown['moe'] is 'x', not a number"),
        ({"slowdown": {3: 1.1}}, "3 is not a scope"),
        ({"slowdown": {" ": 1.1}}, "' ' is not a scope"),
        ({"slowdown": {"/(/": 1.1}}, "not a regular expression"),
        ({"slowdown": {"mode": 1.1}}, "did you mean moe?"),
        ({"slowdown": {"xyz": 1.1}}, "'xyz' is not a scope"),
    ],
)
def test_a_mistake_is_refused_with_its_place(keywords: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError) as caught:
        thresholds_from_keywords(keywords, "test_a.py::test_b", categories=("moe", "gemm"))
    assert message in str(caught.value)
    assert str(caught.value).startswith("test_a.py::test_b: ")


def test_own_categories_are_accepted_where_none_are_known() -> None:
    assert thresholds_from_keywords({"slowdown": {"rope": 1.1}}, "marker")[0].scope == "rope"


def test_a_later_threshold_replaces_its_equal_in_place() -> None:
    first, second = Threshold(limit=1.1), Threshold(scope="moe", limit=1.2)
    replaced = Threshold(limit=1.5, origin="marker")
    decode = Threshold(stage="decode")
    merged = merge_thresholds((first, second), (replaced,), (decode,))
    assert merged == (replaced, second, decode)
    assert merge_thresholds() == ()


def test_by_default_compute_may_be_ten_percent_slower() -> None:
    assert default_thresholds() == (Threshold("slowdown", 1.10, "compute"),)
