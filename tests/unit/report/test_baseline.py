"""Against the baseline: which windows are pairs, what is refused, what is warned of."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from pytest_sglprof._analysis.strata import StepWork
from pytest_sglprof._cli.main import main
from pytest_sglprof._report.page.baseline import (
    Pair,
    against_baseline,
    environment,
    load_figures,
    load_options,
    paired_by,
    stable,
    work_words,
)
from pytest_sglprof._report.page.page import page
from pytest_sglprof._report.results import write_results
from pytest_sglprof._verdict.wording import percent
from tests.support.kernel_tables import build, slow
from tests.support.windows import BALANCED, SLOW, as_load, as_run, run, window

Documents = dict[str, Any]


def document(*windows: Documents, name: str = "now", **more: Any) -> Documents:
    """A run of these windows, which all belong to the last attempt of one test."""
    made = run(list(windows), **more)
    made["run"]["id"] = name
    found: Documents = json.loads(json.dumps(made))
    return found


def only_pair(before: Documents, now: Documents) -> Pair:
    (pair,) = against_baseline(as_run(before), [as_run(now)]).pairs
    return pair


BEFORE = document(window(build()), name="before")


def test_the_slower_kernel_comes_first() -> None:
    pair = only_pair(BEFORE, document(window(build(scale=slow("TP0", "gemm", 1.5)))))
    (stage,) = pair.stages
    assert pair.reason is None
    assert stage.compute is not None
    assert stage.compute.ratio == f"{(600 + 375 + 200) / 1100:.3f}"
    first, *rest = stage.kernels
    assert (first.name, first.before, first.now) == ("gemm_kernel", "300", "375")
    assert (first.ratio, first.difference) == ("1.250", "+75.0")
    assert (first.share, first.bar, first.direction) == ("+6.8", 1.0, "slower")
    assert rest == []
    assert stage.others == "4 more kernels differ by less than 0.05 % of compute"
    assert stage.most is not None
    assert stage.most.name == "gemm_kernel"


def test_waiting_longer_is_no_slower_kernel() -> None:
    now = document(window(build(scale=slow("TP0", "communication", 2.0))))
    (stage,) = only_pair(BEFORE, now).stages
    assert stage.kernels[0].outside is True
    assert stage.most is None
    assert stage.compute is not None
    assert stage.compute.ratio == "1.000"
    # Equal values have no difference.
    assert (stage.compute.before, stage.compute.difference, stage.compute.share) == (
        stage.compute.now,
        "=",
        "=",
    )


def test_kernels_of_one_run_only() -> None:
    kernels = [("fused_moe_v2", "moe", 500_000), ("gemm_kernel", "gemm", 300_000)]
    (stage,) = only_pair(BEFORE, document(window(build(kernels=kernels)))).stages
    words = {row.name: row.ratio for row in stage.kernels}
    assert words["fused_moe_v2"] == "new"
    assert words["fused_moe_kernel"] == words["flash_attention"] == "gone"
    assert "gemm_kernel" not in words


# ---- what is compared with what ---------------------------------------------------------------


def test_windows_are_pairs_by_test_name_and_order() -> None:
    first, second = window(build(), window_id="a"), window(build(), window_id="b")
    other = {**window(build(), window_id="c"), "name": "other"}
    keys = list(paired_by(as_run(document(first, second, other))))
    assert [(name, at) for _, name, at in keys] == [("steady", 0), ("steady", 1), ("other", 0)]
    found = against_baseline(
        as_run(document(first, other, name="before")), [as_run(document(first, second))]
    )
    assert len(found.pairs) == 1
    assert [(u.window.name, u.where) for u in found.unpaired] == [
        ("steady", "only in now"),
        ("other", "only in the baseline"),
    ]


def test_earlier_attempts_are_not_compared() -> None:
    again = document(window(build(), window_id="a"), window(build(), window_id="b", attempt=2))
    again["tests"][0]["attempts"].append({**again["tests"][0]["attempts"][0], "number": 2})
    assert [w.id for w in paired_by(as_run(again)).values()] == ["b"]


REPEATS = {"count": 3, "typical": "c", "own_verdict": "pass", "own_reason": "", "spread": []}


def test_of_repeats_the_typical_one() -> None:
    windows = [window(build(), window_id=name) for name in "abc"]
    for at, one in enumerate(windows):
        one |= {"repeat_of": "a", "repeat_index": at + 1, "repeats": REPEATS}
    assert [w.id for w in paired_by(as_run(document(*windows))).values()] == ["c"]


GPU = {
    "rank": "TP1",
    "uuid": "GPU-1",
    "median_sm_mhz": 1400.0,
    "power_limit_w": 700.0,
    "throttled": False,
}


def changed(**values: Any) -> Documents:
    found = copy.deepcopy(BEFORE)
    found["windows"][0] |= values
    return found


@pytest.mark.parametrize(
    ("before", "reason"),
    [
        (changed(standin=True), "the baseline ran on the stand-in"),
        (changed(backend="nsys"), "recorded by nsys before and by torch now"),
        (changed(source="cpu_op"), "times of cpu_op before and of gpu now"),
        (changed(partial=True), "the baseline's window was read from a truncated trace"),
        (changed(strata=[]), "did not sort steps by work"),
        (
            changed(gpus=[{**GPU, "throttled": True}]),
            "the baseline's window ran on throttled GPUs: TP1",
        ),
        (
            document(window(None, state="failed", reason="it died")),
            "the baseline's window has no kernels: it died",
        ),
    ],
    ids=["stand-in", "backend", "source", "truncated", "old", "throttled", "failed"],
)
def test_what_says_nothing_about_the_other_is_refused(before: Documents, reason: str) -> None:
    pair = only_pair(before, document(window(build())))
    assert pair.reason is not None
    assert reason in pair.reason
    assert pair.stages == []


def test_a_baseline_that_did_not_pass_is_warned_of() -> None:
    failed = document(window(SLOW), name="before")
    pair = only_pair(failed, document(window(BALANCED)))
    assert any(w.startswith("The baseline's window failed: ") for w in pair.warnings)
    assert pair.stages[0].kernels  # a view, not a gate
    short = document(window(build(steps=5)), name="before")
    pair = only_pair(short, document(window(BALANCED)))
    assert any("was inconclusive: 5 steps" in warning for warning in pair.warnings)
    assert "Few steps are compared: 5 before, 50 now" in pair.stages[0].cautions


def test_windows_that_record_other_things_are_warned_of() -> None:
    with_stacks = copy.deepcopy(BEFORE)
    with_stacks["windows"][0]["spec"]["with_stack"] = True
    pair = only_pair(with_stacks, document(window(build())))
    assert any("with_stack true before and false now" in text for text in pair.warnings)


def test_runs_that_are_no_baseline_of_this_one_are_warned_of() -> None:
    found = against_baseline(as_run(BEFORE), [as_run(changed())])
    assert found.warnings == ["before is the baseline itself."]
    newer = copy.deepcopy(BEFORE)
    newer["run"]["started"] = "2030-01-01T00:00:00.000Z"
    found = against_baseline(as_run(newer), [as_run(document(window(build())))])
    assert found.warnings == ["now is older than the baseline."]
    standin = document(window(build(), standin=True), name="before", standin=True)
    found = against_baseline(as_run(standin), [as_run(document(window(build(), standin=True)))])
    assert "they say nothing about SGLang" in found.warnings[0]
    assert found.pairs[0].stages


# ---- what the runs were made with -------------------------------------------------------------


def test_what_differs_is_marked() -> None:
    now = document(window(build()))
    now["run"]["versions"]["sglang"] = "0.5.24"
    now["servers"][0]["version"] = "0.5.24"
    now["windows"][0]["gpus"] = [GPU, {**GPU, "rank": "TP0", "uuid": "GPU-0"}]
    rows = {row.name: row for row in environment([as_run(BEFORE), as_run(now)])}
    assert rows["sglang version"].values == ["not recorded", "0.5.24"]
    assert rows["GPUs"].values == ["not recorded", "GPU-0 (700 W), GPU-1 (700 W)"]
    marked = {name for name, row in rows.items() if row.differs}
    assert marked == {"sglang version", "server default", "GPUs"}


def test_places_are_no_difference() -> None:
    words = ["/usr/bin/python3", "-m", "serve", "--port", "80", "--host=x", "--tp", "2"]
    assert stable(words) == ["python3", "-m", "serve", "--tp", "2"]


def test_load_figures_and_options() -> None:
    old = copy.deepcopy(BEFORE["loads"][0]) | {"output_throughput": 100.0, "completed": 10}
    new = copy.deepcopy(old) | {"output_throughput": 80.0, "ttft": {"mean": 3.0}}
    rows = {row.name: row for row in load_figures(as_load(old), as_load(new))}
    assert rows["Output tokens/s"].ratio == "0.800"
    assert rows["TTFT, mean, ms"].ratio == "2.000"
    assert "TPOT, mean, ms" not in rows
    assert load_options(as_load(old), as_load(new)) == []
    new["command"] = ["bench", "--num-prompts", "20", "--flush"]
    new["completed"] = 9
    differ, ended = load_options(as_load(old), as_load(new))
    assert "--num-prompts absent before, 20 now" in differ
    assert "--flush absent before, set now" in differ
    assert ended == "Of the run's load 9 of 10 requests ended."
    assert load_options(None, as_load(new)) == ["Only this run has a load for it."]


@pytest.mark.parametrize(
    ("work", "words"),
    [
        (
            StepWork("decode", "DECODE", 8, 9, -1),
            "decode, batch 8, KV cache 512 to 1,023 tokens a request",
        ),
        (StepWork("decode", "TARGET_VERIFY", 8, -1, -1), "decode (target verify), batch 8"),
        (StepWork("prefill", "EXTEND", 2, -1, 13), "prefill, batch 2, 8,192 to 16,383 new tokens"),
        (StepWork("unknown", "", -1, -1, -1), "unknown, batch unknown"),
        (StepWork("decode", "", 1, 0, -1), "decode, batch 1, KV cache 0 to 1 tokens a request"),
    ],
)  # fmt: skip
def test_work_in_words(work: StepWork, words: str) -> None:
    assert work_words(work) == words


def test_shares_have_a_sign_only_where_there_is_a_change() -> None:
    texts = [percent(share, 1, sign=True, none="–") for share in (None, 0.0001, -0.0123, 0.5)]
    assert texts == ["–", "0.0 %", "−1.2 %", "+50.0 %"]


# ---- the command and the page -----------------------------------------------------------------


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, one in (("old", BEFORE), ("new", document(window(SLOW))), ("empty", run([]))):
        (tmp_path / name).mkdir()
        write_results(as_run(one), tmp_path / name / "results.json")
    new = str(tmp_path / "new")
    assert main(["report", new]) == 0
    assert 'id="baseline"' not in (tmp_path / "new" / "report.html").read_text()
    assert main(["report", new, "--baseline", str(tmp_path / "old")]) == 0
    text = (tmp_path / "new" / "report.html").read_text()
    assert "this is not a verdict" in text
    assert "fused_moe_kernel" in text
    capsys.readouterr()
    assert main(["report", new, "--baseline", str(tmp_path / "empty")]) == 2
    assert "has no profile window" in capsys.readouterr().err
    assert main(["report", new, "--baseline", str(tmp_path / "nowhere")]) == 2
    assert "nowhere does not exist" in capsys.readouterr().err


def test_several_runs_against_one_baseline_and_nothing_to_compare() -> None:
    runs = [document(window(build()), name=f"night-{at}") for at in range(2)]
    text = page([*map(as_run, runs)], baseline=as_run(BEFORE))
    assert text.count('class="pair"') == 2
    other = copy.deepcopy(BEFORE)
    other["windows"][0]["nodeid"] = "tests/test_z.py::test_z"
    assert "No window of this run has a window of the same test" in page(
        [*map(as_run, runs)], baseline=as_run(other)
    )
