from __future__ import annotations

import pytest
from msgspec import structs

from pytest_sglprof._metrics import VerdictWord
from pytest_sglprof._report.ci import (
    MAX_BYTES,
    escape,
    properties,
    properties_of_test,
    step_summary,
)
from pytest_sglprof._report.page.page import page
from pytest_sglprof._report.regression import RecordedRegression
from pytest_sglprof._report.results import attempt_document
from pytest_sglprof._report.terminal import STANDIN_NOTE, baseline_line, rank_table, summary_lines
from pytest_sglprof._verdict.wording import shorten, text_table
from tests.support.kernel_tables import build, slow
from tests.support.regressions import regression
from tests.support.windows import BALANCED, SHORT, SLOW, as_run, as_window, run, window


def test_the_rank_table_of_a_failing_window() -> None:
    lines = rank_table(as_window(window(SLOW, standin=True)))
    assert lines[0] == 'window "steady" (torch, 50 steps, stand-in): fail'
    assert lines[1].startswith("TP1 is 1.40x slower than its peers in moe (limit 1.10)")
    assert lines[2:] == [
        "",
        "rank  compute ms  communication ms  moe ms  slowest in",
        "----  ----------  ----------------  ------  ----------",
        "TP0         55.0              7.50    30.0         0 %",
        "TP1         67.0              7.50    42.0       100 %",
        "",
        "most of it: fused_moe_kernel, 12.0 ms longer on TP1 than on its peers",
    ]


def test_a_bad_night_that_passes_says_so_in_full() -> None:
    recorded = regression()
    assert recorded.figures[1].ratio is not None
    assert recorded.figures[1].limit is not None
    assert recorded.figures[1].ratio > recorded.figures[1].limit
    assert baseline_line(recorded) == recorded.sentence
    good = structs.replace(recorded, figures=recorded.figures[:1])
    assert good.figures[0].ratio is not None
    assert good.figures[0].ratio < (good.figures[0].limit or 0)
    line = baseline_line(good)
    assert line.startswith(f"compute {good.figures[0].ratio:.3g} (")
    assert recorded.detection in line


def test_the_summary_says_how_to_accept_what_only_accepted_lives_speak_against() -> None:
    slower = regression()
    plain = as_run(run([window(SLOW)]))
    hint = f'if this change is intended: sglprof baseline accept {plain.run.id} --reason "…"'

    def shown(recorded: RecordedRegression, word: VerdictWord) -> list[str]:
        changed = structs.replace(plain.windows[0], regression=recorded, verdict=word)
        return summary_lines(structs.replace(plain, windows=(changed,)))

    assert hint in shown(slower, "fail")
    assert hint not in shown(slower, "pass")
    assert hint not in summary_lines(plain)
    figures = [structs.replace(each, verdict="inconclusive") for each in slower.figures]
    unsure = structs.replace(slower, figures=tuple(figures))
    assert hint not in shown(unsure, "inconclusive")
    assert hint in shown(structs.replace(unsure, not_comparable="gpu: A, B"), "inconclusive")


def test_a_window_without_data_shows_its_reason_and_the_servers_own_words() -> None:
    lines = rank_table(
        as_window(window(None, state="failed", reason="it died", log=["OOM", "bye"]))
    )
    assert lines == ['window "steady" (torch): inconclusive', "it died", "  | OOM", "  | bye"]


def test_a_window_without_common_steps_shows_the_whole_window() -> None:
    table = build(steps=20, scale=slow("TP1", "gemm", 2.0))
    table.steps.loc[table.steps["rank"] == "TP1", "step"] += 100
    table.frame.loc[table.frame["rank"] == "TP1", "step"] += 100
    lines = rank_table(as_window(window(table)))
    assert "TP0         22.0              3.00           -" in lines
    assert "TP1         28.0              3.00           -" in lines
    assert lines[-1] == "no step could be compared: times are kernel times of the whole window"


def test_kernels_and_stages_get_a_column_of_their_own() -> None:
    kernel = window(SLOW, keywords={"slowdown": {"/fused.*/": 1.1}})
    assert "/fused.*/ ms" in rank_table(as_window(kernel))[3]
    stage = window(SLOW, keywords={"slowdown": {"compute in decode": 1.1}})
    assert "compute in decode ms" in rank_table(as_window(stage))[3]
    both = window(SLOW, keywords={"slowdown": {"compute": 1.1}})
    assert rank_table(as_window(both))[3] == "rank  compute ms  communication ms  slowest in"


def test_several_groups_stand_in_one_table_and_many_ranks_are_cut() -> None:
    four = ("DP0 TP0", "DP0 TP1", "DP1 TP0", "DP1 TP1")
    lines = rank_table(as_window(window(build(four, scale=slow("DP1 TP1", "moe", 1.4)))))
    assert any(line.startswith("DP0 TP0 ") and "-" in line for line in lines)
    assert any(line.startswith("DP1 TP1 ") and "42.0" in line for line in lines)
    many = tuple(f"TP{at}" for at in range(64))
    table = build(many, steps=50, scale=lambda rank, c, s: 1 + int(rank[2:]) / 100)
    shown = [
        line.split()[0] for line in rank_table(as_window(window(table))) if line.startswith("TP")
    ]
    assert shown[1:] == [f"TP{at}" for at in (*range(8), *range(56, 64))]


def test_other_sources_attempts_and_repeats_are_named() -> None:
    document = window(BALANCED, attempt=2)
    document["source"] = "cpu_op"
    head = rank_table(as_window(document))[0]
    assert head == 'window "steady" (torch, 50 steps, CPU operators, attempt 2): pass'
    document["source"] = "nvtx"
    assert "NVTX ranges" in rank_table(as_window(document))[0]


def test_an_incomplete_window_that_was_read_says_so() -> None:
    document = window(SLOW, state="incomplete", reason="TP3 wrote nothing")
    assert rank_table(as_window(document))[1] == "TP3 wrote nothing"
    document["reason"] = "something else"
    assert rank_table(as_window(document))[2] == "window incomplete: TP3 wrote nothing"


def test_the_summary_counts_and_names_what_did_not_pass() -> None:
    windows = [window(SLOW), window(SHORT, window_id="w2"), window(BALANCED, window_id="w3")]
    lines = summary_lines(as_run(run(windows, left_behind=["process 17"])))
    assert lines[0] == "3 profile windows: 1 pass, 1 fail, 1 inconclusive"
    assert lines[1] == 'FAIL tests/test_a.py::test_b[x|y] window "steady" (torch, 50 steps)'
    assert lines[2].startswith("  TP1 is 1.40x slower")
    assert lines[3].startswith("INCONCLUSIVE")
    assert lines[-1] == "server default left behind: process 17"
    assert STANDIN_NOTE not in lines


def test_a_window_without_a_limit_is_measured_and_did_not_pass() -> None:
    passed = attempt_document(
        nodeid="t", number=1, outcome="passed", verdict="pass", reason="", duration_s=1
    )
    document = as_run(run([window(SLOW, keywords={})], tests=[passed]))
    why = "no threshold is set: figures are recorded, not judged"
    title = 'window "steady" (torch, 50 steps)'
    assert rank_table(document.windows[0])[:2] == [f"{title}: measured", why]
    assert summary_lines(document)[:2] == [
        "1 profile window: 1 measured",
        f"MEASURED tests/test_a.py::test_b[x|y] {title}: {why}",
    ]
    assert "| measured | tests/" in step_summary(document)
    text = page([document])
    assert '<h1><span class="word measured">– measured</span>' in text
    assert "1 window: 1 measured" in text
    assert "✓ pass" not in text
    both = as_run(run([window(SLOW, keywords={}), window(BALANCED)], tests=[passed]))
    assert '<h1><span class="word pass">✓ pass</span>' in page([both])
    assert document.windows[0].verdict == "pass"  # what scripts read, as before


def test_the_summary_marks_the_stand_in_and_shows_every_attempt() -> None:
    attempts = [
        attempt_document(
            nodeid="t", number=at, outcome="failed", verdict=word, reason="", duration_s=1
        )
        for at, word in enumerate(("inconclusive", "fail", None), start=1)
    ]
    lines = summary_lines(as_run(run([window(BALANCED)], tests=attempts, standin=True)))
    assert lines == [
        "1 profile window: 1 pass",
        STANDIN_NOTE,
        'PASS tests/test_a.py::test_b[x|y] window "steady" (torch, 50 steps): '
        "slowdown of compute 1.01 (limit 1.10), slowdown of moe 1.02 (limit 1.10)",
        "t: 3 attempts: inconclusive, fail, failed",
    ]
    assert summary_lines(as_run(run([]))) == []


def test_junit_properties_tell_the_verdict_and_its_figures() -> None:
    found = dict(properties(as_window(window(SLOW, standin=True))))
    assert found.pop("reason").startswith("TP1 is 1.40x slower")
    assert found == {
        "verdict": "fail",
        "slowest_rank": "TP1",
        "slowdown": "1.4",
        "metric": "slowdown",
        "value": "1.4",
        "limit": "1.1",
        "scope": "moe",
        "slowest_kernel": "fused_moe_kernel",
        "window": "w1",
        "standin": "true",
    }
    nothing = dict(properties(as_window(window(None, reason="it died"))))
    assert (nothing["verdict"], nothing["reason"]) == ("inconclusive", "it died")
    assert "slowdown" not in nothing
    staged = dict(
        properties(as_window(window(SLOW, keywords={"slowdown": {"/fused/ in decode": 1.1}})))
    )
    assert (staged["scope"], staged["stage"]) == ("/fused/", "decode")
    unjudged = dict(properties(as_window(window(SLOW, keywords={}))))
    assert "limit" not in unjudged


def test_the_worst_window_of_a_test_gives_the_plain_properties() -> None:
    windows = [window(BALANCED, window_id="a"), window(SLOW, window_id="b")]
    found = properties_of_test([*map(as_window, windows)])
    names = [name for name, _ in found]
    assert len(names) == len(set(names))
    assert dict(found)["verdict"] == "fail"
    assert dict(found)["verdict[a]"] == "pass"


def test_the_step_summary_is_markdown_that_no_name_can_break() -> None:
    document = window(SLOW, standin=True)
    document["reason"] += " <script> ``` "
    document["log"] = ["````"]
    text = step_summary(as_run(run([document, window(BALANCED)], standin=True)))
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    assert len(rows) == 7
    assert [line.replace("\\|", "").count("|") for line in rows] == [8] * 4 + [7] * 3
    assert rows[4].startswith("| kernel | category |")
    assert rows[6].startswith(r"| fused\_moe\_kernel | moe | TP1 | 1.40 | 6.00 |")
    assert rows[2].startswith(r"| ❌ fail | tests/test\_a.py::test\_b\[x\|y\] |")
    assert rows[2].endswith("| TP1 | slowdown | 1.40 | 1.10 |")
    assert "**Stand-in.**" in text
    assert "&lt;script&gt;" in text
    assert "\n`````text\n" in text
    assert text.count("<details>") == 1


def test_the_step_summary_stays_below_the_limit_of_its_host() -> None:
    windows = [window(SLOW)]
    windows[0]["log"] = ["x" * 1000] * 300
    text = step_summary(as_run(run(windows * 5)))
    assert len(text.encode()) < MAX_BYTES + 1000
    assert "3 more windows did not pass" in text
    assert "No profile window" in step_summary(as_run(run([])))
    assert escape("a\n|b") == r"a \|b"


def test_a_window_that_judged_nothing_has_dashes() -> None:
    text = step_summary(as_run(run([window(None, keywords={}, reason="it died")])))
    assert "| - | - | - | - |" in text


def test_tables_are_aligned_also_with_wide_letters() -> None:
    lines = text_table(["名前", "n"], [["a", "1"], ["é", "22"]])
    assert lines == ["名前   n", "----  --", "a      1", "é     22"]


@pytest.mark.parametrize(("limit", "text"), [(11, "abcdefghijk"), (5, "abc…k"), (4, "ab…k")])
def test_a_long_name_loses_its_middle(limit: int, text: str) -> None:
    found = shorten("abcdefghijk", limit)
    assert len(found) == limit
    if limit == 11:
        assert found == text
    assert found[0] == "a"
    assert found[-1] == "k"
