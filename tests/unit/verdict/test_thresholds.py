from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pytest_sglprof._config.load import Settings, load_config, thresholds_from
from pytest_sglprof._config.model import Across, Threshold
from pytest_sglprof._config.thresholds import (
    check_threshold,
    default_thresholds,
    listed_thresholds,
    merge_thresholds,
    thresholds_from_keywords,
)
from pytest_sglprof._config.windows import window_spec
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
        ({"slowdown": {"moe across snyc": 1.1}}, "did you mean sync?"),
        ({"slowdown": {"moe across all": 1.1}}, "'all' does not say which ranks are compared"),
        ({"slowdown": {"moe across sync in decode": 1.1}}, "is not a scope"),
        ({"sync_lost_share": {"compute across peers": 0.1}}, "lose by waiting for each other"),
        ({"sync_lost_share": {"moe": 0.1}}, "sync_lost_share is of whole steps"),
        ({"pass_wall": {"decode across sync": 20}}, "pass_wall is of each rank alone"),
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


def test_by_default_compute_may_be_five_percent_slower() -> None:
    assert default_thresholds() == (Threshold("slowdown", 1.05, "compute"),)


# Who is compared.


def test_a_key_says_who_is_compared_after_the_stage() -> None:
    limits = {"moe across sync": 1.1, "/a across b/ in decode  across Peers": 1.2, "gemm": 1.3}
    found = thresholds_from_keywords({"slowdown": limits}, "marker")
    assert [(t.scope, t.kernel, t.stage, t.across) for t in found] == [
        ("moe", "", "", "sync"),
        ("compute", "a across b", "decode", "peers"),
        ("gemm", "", "", ""),
    ]
    assert found[0].describe() == "slowdown of moe across sync <= 1.1"
    (lost,) = thresholds_from_keywords({"sync_lost_share": {"decode": 0.1}}, "marker")
    assert (lost.scope, lost.stage, lost.across) == ("compute", "decode", "")
    assert lost.describe() == "sync_lost_share of steps in decode <= 0.1"


def marked(*configured: Threshold, **keywords: Any) -> list[tuple[str, float, str]]:
    """Metric, limit and who is compared of the thresholds of a window."""
    settings = Settings(Path("out"), thresholds=configured)
    spec = window_spec(settings, keywords, origin="marker")
    return [(t.metric, t.limit, t.across) for t in spec.thresholds]


def test_across_beside_limits_holds_for_all_that_compare_ranks() -> None:
    keywords = {"slowdown": {"moe": 1.1, "gemm across peers": 1.2}, "idle_share": 0.2}
    assert marked(**keywords, across="sync") == [
        ("slowdown", 1.1, "sync"),
        ("slowdown", 1.2, "peers"),
        ("idle_share", 0.2, ""),
    ]
    listed = [Threshold("slowdown", 1.3, across="peers"), Threshold("slowdown", 1.4)]
    assert marked(slowdown=1.1, thresholds=listed, across="sync") == [
        ("slowdown", 1.1, "sync"),
        ("slowdown", 1.3, "peers"),
        ("slowdown", 1.4, ""),
    ]


def test_a_limit_that_says_who_is_compared_replaces_a_configured_one_that_does_not() -> None:
    default = default_thresholds()
    assert marked(*default, slowdown=1.2, across="sync") == [("slowdown", 1.2, "sync")]
    assert marked(*default, slowdown={"moe": 1.2}, across="sync") == [
        ("slowdown", 1.05, ""),
        ("slowdown", 1.2, "sync"),
    ]
    both = (Threshold(limit=1.1, across="peers"), Threshold(limit=1.2, across="sync"))
    assert marked(*both, slowdown=1.3, across="sync") == [
        ("slowdown", 1.1, "peers"),
        ("slowdown", 1.3, "sync"),
    ]
    lost = Threshold("sync_lost_share", 0.1)
    assert marked(lost, sync_lost_share=0.2, across="sync") == [("sync_lost_share", 0.2, "sync")]


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"slowdown": 1.1, "across": "sink"}, "marker: slowdown: 'sink' does not say which"),
        ({"slowdown": 1.1, "across": None}, "one of peers, sync"),
        ({"slowdown": 1.1, "across": ["sync"]}, "does not say which ranks are compared"),
        ({"across": "sync"}, "across='sync' without a metric that compares ranks"),
        ({"across": "sync", "idle_share": 0.1}, "without a metric that compares ranks"),
        ({"across": "peers", "sync_lost_share": 0.1}, "across sync, or no across"),
        ({"slowdown": 1.1, "acros": "sync"}, "did you mean across?"),
    ],
)
def test_a_mistake_beside_limits_is_refused(keywords: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError) as caught:
        marked(**keywords)
    assert message in str(caught.value)


@pytest.mark.parametrize("across", ["peers", "sync", ""])
def test_the_configuration_and_lists_say_who_is_compared(across: Across, tmp_path: Path) -> None:
    path = tmp_path / "sglprof.toml"
    path.write_text(f'[[threshold]]\nlimit = 1.1\nacross = "{across}"\n')
    (threshold,) = thresholds_from(load_config(path), "sglprof.toml")
    assert threshold.across == across
    assert listed_thresholds([threshold], "marker", ())[0].across == across
    path.write_text('[[threshold]]\nlimit = 1.1\nacross = "peer"\n')
    with pytest.raises(SettingsError, match="did you mean peers"):
        load_config(path)
    with pytest.raises(SettingsError, match=r"threshold\[0\].across: pass_wall across peers"):
        check_threshold(Threshold("pass_wall", 9, across="peers"), (), "here", "threshold[0].")
