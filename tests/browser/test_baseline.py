"""The page of a run against a baseline: what it says is what the traces hold."""

from __future__ import annotations

import gzip
import json
import re
import sqlite3
from bisect import bisect_right
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import pytest
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

from pytest_sglprof._cli.main import main
from tests.browser.conftest import PLANTED, PairPage
from tests.support.browser import Browser

pytestmark = pytest.mark.browser

TEXT = "[...{}.cells].map((c) => c.textContent.trim())"
KERNELS = (
    "return [...[...document.querySelectorAll('#baseline .pair')].find((p) => "
    "p.querySelector('summary').textContent.includes(arguments[0]))"
    f".querySelector('table.changes').tBodies[0].rows].map((r) => {TEXT.format('r')})"
)
Means = dict[tuple[str, ...], dict[str, float]]


def overview(browser: Browser) -> list[list[str]]:
    found: list[list[str]] = browser.js(
        "return [...document.querySelectorAll('#baseline .overview tbody tr')].map((r) => "
        f"{TEXT.format('r')})"
    )
    return found


def nanoseconds(text: str) -> float:
    """`1,250`, µs, in ns."""
    return 1e3 * float(text.replace(",", ""))


def true_means(folder: Path, window: dict[str, Any]) -> Means:
    """By batch and KV length the time of kernels in a typical step, by plain json.

    A kernel belongs to the step in whose span on the GPU it starts. Of each step the mean of the
    ranks counts, and of these the middle 60 %.
    """
    of_step: dict[str, list[Counter[str]]] = defaultdict(list)  # one counter a rank
    works = {}
    for artifact in window["artifacts"]:
        trace = json.loads(gzip.decompress((folder / artifact["path"]).read_bytes()))
        events = [e for e in trace["traceEvents"] if e.get("ph") == "X"]
        spans = sorted(
            (e["ts"], e["name"])
            for e in events
            if e["cat"] == "gpu_user_annotation" and e["name"].startswith("step[")
        )
        sums: dict[str, Counter[str]] = {name: Counter() for _, name in spans}
        for event in events:
            if event["cat"] == "kernel":
                at = bisect_right([ts for ts, _ in spans], event["ts"]) - 1
                sums[spans[at][1]][event["name"]] += round(event["dur"] * 1000)
        for name, kernels in sums.items():
            step = re.findall(r"forward_id=(\d+)", name)[0]
            of_step[step].append(kernels)
            works[step] = _work(name)
    by_work: dict[tuple[str, ...], list[Counter[str]]] = defaultdict(list)
    for step, ranks in of_step.items():
        by_work[works[step]].append(sum(ranks, Counter()))
    ranks_seen = len(window["artifacts"])
    return {
        work: {
            name: _middle([step[name] / ranks_seen for step in steps])
            for name in set().union(*steps)
        }
        for work, steps in by_work.items()
    }


def _middle(values: list[float]) -> float:
    cut = int(0.2 * len(values))
    kept = sorted(values)[cut : len(values) - cut]
    return sum(kept) / len(kept)


def _work(name: str) -> tuple[str, ...]:
    told = dict(re.findall(r"(\w+)=(\d+)", name))
    length = int(told["g_sk"]) // int(told["bs"])
    return told["bs"], f"{length:b}"[1:].replace("1", "0")  # its number of binary digits


def equal_weights(means: Means, works: set[tuple[str, ...]], part: str) -> float:
    every = [sum(ns for name, ns in means[w].items() if part in name) for w in works]
    return sum(every) / len(every)


def test_the_planted_kernels_have_the_ratio_of_the_traces(
    browser: Browser, standin_pair: PairPage
) -> None:
    truth = [
        true_means(folder, next(w for w in results["windows"] if "test_decode" in w["nodeid"]))
        for folder, results in zip(
            standin_pair.folders, (standin_pair.before, standin_pair.results), strict=True
        )
    ]
    common = set(truth[0]) & set(truth[1])
    assert common
    browser.open(standin_pair.path)
    rows = {row[0]: row for row in browser.js(KERNELS, "test_decode")}
    for name in ("fused_moe_kernel", "moe_align_block_size_kernel"):
        before, now = (equal_weights(means, common, name) for means in truth)
        _, category, shown_before, shown_now, ratio, difference, *_ = rows[name]
        assert category == "moe"
        assert nanoseconds(shown_before) == pytest.approx(before, rel=0.005)
        assert nanoseconds(shown_now) == pytest.approx(now, rel=0.005)
        assert ratio == f"{now / before:.3f}"
        assert nanoseconds(difference.lstrip("+")) == pytest.approx(now - before, rel=0.005)
        assert now / before == pytest.approx(PLANTED, abs=0.05)
    assert next(iter(rows)) == "fused_moe_kernel"


def test_the_overview_says_what_is_compared_and_what_is_not(
    browser: Browser, standin_pair: PairPage
) -> None:
    browser.open(standin_pair.path)
    decode, mix = overview(browser)
    assert decode[0].endswith("test_job.py::test_decode")
    assert float(decode[4]) > 1.08
    assert decode[6].startswith("fused_moe_kernel")
    assert mix[0].startswith("other work")
    assert re.search(r"inconclusive other work: 0% of the baseline's and 0%", mix[2])
    text = browser.js("return document.querySelector('#baseline').textContent")
    assert "One run against one run: this is not a verdict" in text
    assert "they say nothing about SGLang" in text
    assert "“renamed before”: only in the baseline" in text
    assert "“renamed now”: only in run-" in text
    assert (
        "The loads differ: --max-concurrency 8 before, 3 now; --num-prompts 8 before, 3 now."
        in text
    )


def test_bars_point_to_the_side_that_they_mean(browser: Browser, standin_pair: PairPage) -> None:
    browser.open(standin_pair.path)
    bars = browser.js(
        "return [...document.querySelectorAll('#baseline .changes tbody tr')].map((r) => {"
        "const line = r.querySelector('line'), bar = r.querySelector('rect');"
        "const ratio = [...r.cells].map((c) => c.textContent.trim()).find("
        "(t) => /^\\d+\\.\\d{3}$/.test(t));"
        "return bar && ratio && [parseFloat(ratio), bar.getBoundingClientRect().x"
        " - line.getBoundingClientRect().x, bar.getBoundingClientRect().width]; }).filter(Boolean)"
    )
    assert len(bars) > 4
    for ratio, left, width in bars:
        assert (left >= 0) == (ratio > 1)
        assert width >= 1
    assert max(width for *_, width in bars) == pytest.approx(80, abs=1)


def test_what_differs_between_the_runs_is_marked(browser: Browser, standin_pair: PairPage) -> None:
    browser.open(standin_pair.path)
    rows = browser.js(
        f"return [...document.querySelectorAll('#baseline .beside tbody tr')].map((r) => "
        f"{TEXT.format('r')})"
    )
    marked = {row[1]: row[0] for row in rows}
    assert marked["server default, command"] == "≠ differs"
    assert marked["python version"] == marked["server default"] == ""
    command = next(row for row in rows if row[1] == "server default, command")
    assert "--slow" not in command[2]
    assert "--slow rank=0,category=moe,factor=1.3" in command[3]


def test_load_figures_stand_beside_each_other(browser: Browser, standin_pair: PairPage) -> None:
    browser.open(standin_pair.path)
    rows = browser.js(
        "return [...document.querySelector('#baseline .pair .small').tBodies[0].rows].map((r) => "
        f"{TEXT.format('r')})"
    )
    loads = [
        next(load for load in results["loads"] if "test_decode" in load["nodeid"])
        for results in (standin_pair.before, standin_pair.results)
    ]
    shown = {row[0]: row[1:] for row in rows}
    before, now = (load["tpot"]["mean"] for load in loads)
    assert shown["TPOT, mean, ms"] == [
        f"{before:.2f}", f"{now:.2f}", f"{now / before:.3f}", "less"
    ]  # fmt: skip
    assert shown["Output tokens/s"][3] == "more"


def test_reports_without_steps_are_compared_call_by_call(
    browser: Browser, gpu_pair: PairPage, shared_data: Path
) -> None:
    """The truth is SQL's mean of a kernel's calls; sums would follow the number of calls."""
    ask = (
        "select count(*), avg(end - start) from CUPTI_ACTIVITY_KIND_KERNEL k join StringIds s "
        "on s.id = k.demangledName where s.value like ?"
    )
    truth = {}
    for word in ("before", "after"):
        with sqlite3.connect(shared_data / "nsys" / f"mfu_2gpu_{word}.sqlite") as database:
            for name in ("flash_fwd_kernel", "ncclDevKernel_SendRecv"):
                truth[word, name] = database.execute(ask, (f"%{name}%",)).fetchone()
        database.close()
    assert truth["before", "flash_fwd_kernel"][0] != truth["after", "flash_fwd_kernel"][0]
    browser.open(gpu_pair.path)
    browser.draw_all()
    rows = browser.js(KERNELS, "steady")
    for name in ("flash_fwd_kernel", "ncclDevKernel_SendRecv"):
        row = next(row for row in rows if name in row[0])
        before, now = (truth[word, name][1] for word in ("before", "after"))
        assert nanoseconds(row[2]) == pytest.approx(before, rel=0.005)
        assert row[4] == f"{now / before:.3f}"
    text = browser.js("return document.querySelector('#baseline').innerText")
    assert "times per call are compared, whatever their batch size" in text
    assert overview(browser)[0][1] == "Whole window"


def test_history_draws_a_point_for_each_run(browser: Browser, standin_pair: PairPage) -> None:
    page = standin_pair.path.with_name("history.html")
    command = ["report", *map(str, standin_pair.folders), "-o", str(page)]
    assert main(command) == 0
    browser.open(page)
    browser.draw_all()
    titles = browser.js(
        "return [...document.querySelector('#history [data-part]').querySelectorAll('.figure')]"
        ".map((f) => [f.querySelector('p').textContent, f.querySelectorAll('canvas').length])"
    )
    assert [title.split(";")[0] for title, _ in titles] == [
        "Compute of equal work / first run",
        "Slowdown of compute, slowest rank",
        "TTFT, mean, ms",
        "TPOT, mean, ms",
        "Output tokens/s",
    ]
    assert {canvases for _, canvases in titles} == {1}
    box = browser.driver.find_element(By.CSS_SELECTOR, "#history .chart")
    browser.js("arguments[0].scrollIntoView({block: 'center'})", box)
    box.send_keys(Keys.ARROW_RIGHT)
    told = browser.js("return document.querySelector('#history .readout').textContent")
    assert told.startswith(f"2: {standin_pair.results['run']['id']} · ")
    shown = browser.js(
        "return [...document.querySelectorAll('#history table.runs')][0].tBodies[0].rows[1]"
        ".cells[10].textContent"
    )
    assert f"first run (decode) {float(shown):.3f}" in told
    assert float(shown) > 1.08
    assert browser.console() == []
