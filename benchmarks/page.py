"""How the page of a large window opens: `python -m benchmarks.page [--ranks 64 --steps 1000]`.

Prints the size of the page of 64 ranks x 1,000 steps x 300 kernels and, median of five loads
in headless Chromium against an empty chart of the same library, taken in turn: the time to
interactive (from the start of the navigation until the document is parsed, two frames were painted
and the main thread is free), the time of `load`, for which the page draws the charts of open
windows, the JavaScript heap and the renderer's memory. Then once: how
long it takes until every part is drawn, and until a row of the kernel table is open.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import psutil

from pytest_sglprof._capture.recording import WindowCapture
from pytest_sglprof._config.model import Threshold, WindowSpec
from pytest_sglprof._report.build import window_document
from pytest_sglprof._report.model import Run, utc
from pytest_sglprof._report.page.page import SCRIPTS, STYLES, write_page
from pytest_sglprof._report.results import load_results, run_document, write_results
from pytest_sglprof._trace.table import KernelTable
from pytest_sglprof._verdict.judge import judge
from tests.support.browser import Browser, chromium

CATEGORIES = ("attention", "gemm", "moe", "norm", "activation", "elementwise", "communication",
              "memory")  # fmt: skip
BASE_NS = 1_790_857_026_000_000_000
STEP_NS = 12_000_000
LOADS = 5
ASSETS = Path("pytest_sglprof/_report/page/assets")
# Sets window.interactive and window.loaded in the page, whatever page it is.
CLOCK = """
addEventListener("load", () => { window.loaded = performance.now(); });
addEventListener("DOMContentLoaded", () => requestAnimationFrame(() => requestAnimationFrame(() => {
  setTimeout(() => { window.interactive = performance.now(); }, 0); })));
"""
EMPTY = """<!doctype html><html lang="en"><head><meta charset="utf-8"><title>empty</title>
<style>{style}</style></head><body><div id="chart"></div><script>{script}</script>
<script>new uPlot({{width: 800, height: 300, series: [{{}}, {{}}]}}, [[], []],
document.getElementById("chart"));</script></body></html>"""


def large_table(ranks: int, steps: int, kernels: int) -> KernelTable:
    """Every kernel once a step; the middle rank is 1.4 times slower in `moe`."""
    rng = np.random.default_rng(0)
    shape = (ranks, steps, kernels)
    of_kernel = np.arange(kernels) % len(CATEGORIES)
    dur = (rng.integers(2_000, 60_000, kernels) * rng.uniform(0.99, 1.01, shape)).astype(np.int64)
    moe = of_kernel == CATEGORIES.index("moe")
    dur[ranks // 2][:, moe] = (dur[ranks // 2][:, moe] * 1.4).astype(np.int64)
    start = BASE_NS + np.arange(steps)[None, :, None] * STEP_NS + np.cumsum(dur, 2) - dur
    names = [f"void {CATEGORIES[c]}_kernel_{k}<bf16, 128>" for k, c in enumerate(of_kernel)]
    labels = [f"TP{rank}" for rank in range(ranks)]

    def text(codes: Any, words: Sequence[str]) -> pd.Categorical:
        return pd.Categorical.from_codes(np.broadcast_to(codes, shape).ravel(), list(words))

    name = text(np.arange(kernels)[None, None, :], names)
    frame = pd.DataFrame(
        {
            "rank": text(np.arange(ranks)[:, None, None], labels),
            "name": name,
            "full_name": name,
            "category": text(of_kernel[None, None, :], CATEGORIES),
            "kind": text(0, ["kernel"]),
            "stage": text(0, ["decode"]),
            "step": np.broadcast_to(np.arange(steps)[None, :, None], shape).ravel(),
            "stream": np.full(dur.size, 7),
            "start_ns": start.ravel(),
            "dur_ns": dur.ravel(),
        }
    )
    first = BASE_NS + np.arange(steps) * STEP_NS
    spans = pd.DataFrame(
        {
            "rank": pd.Categorical(np.repeat(labels, steps)),
            "step": np.tile(np.arange(steps), ranks),
            "stage": pd.Categorical(["decode"] * (ranks * steps)),
            "start_ns": np.tile(first, ranks),
            "end_ns": np.tile(first + STEP_NS, ranks),
            "batch_size": np.tile(rng.integers(8, 64, steps), ranks),
            "tokens": 8,
            "forward_id": -1,
        }
    )
    return KernelTable(frame, tuple(labels), spans)


def make_page(folder: Path, ranks: int, steps: int, kernels: int) -> Path:
    """Writes results.json and report.html of one large window; prints what each took."""
    table = large_table(ranks, steps, kernels)
    began = time.perf_counter()
    verdict = judge(table, [Threshold()])
    judged = time.perf_counter()
    document = window_document(
        WindowCapture("large", WindowSpec(name="large"), "complete", 1.79e9, 1.79e9 + 12),
        table,
        verdict,
        nodeid="benchmarks/page.py::large",
        attempt=1,
        server_key="none",
        standin=False,
        load=None,
    )
    header = Run(
        id="large",
        started=utc(1.79e9),
        ended=utc(1.79e9),
        host="",
        command=(),
        versions={},
        min_steps=30,
        exit_status=0,
    )
    write_results(run_document(header, [], [document], [], []), folder / "results.json")
    written = time.perf_counter()
    write_page([load_results(folder / "results.json")], [folder], folder / "report.html")
    done = time.perf_counter()
    print(
        f"{ranks} ranks x {steps} steps x {kernels} kernels ({len(table.frame):,} activities): "
        f"judged in {judged - began:.1f} s, results.json in {written - judged:.1f} s more "
        f"({_megabytes(folder / 'results.json')}), page in {done - written:.1f} s"
    )
    return folder / "report.html"


def empty_page(folder: Path) -> Path:
    page = folder / "empty.html"
    style, script = ((ASSETS / name).read_text() for name in (STYLES[0], SCRIPTS[0]))
    page.write_text(EMPTY.format(style=style, script=script))
    return page


@contextmanager
def fresh_browser() -> Iterator[Browser]:
    with chromium() as browser:
        browser.driver.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": CLOCK})
        yield browser


def one_load(browser: Browser, page: Path) -> dict[str, float]:
    """Time to interactive and of `load`, ms; heap and memory of the renderer, MB."""
    browser.driver.get("about:blank")
    browser.driver.get(page.as_uri())
    while (at := browser.js("return window.interactive")) is None:
        time.sleep(0.01)
    browser.driver.execute_cdp_cmd("Performance.enable", {})
    browser.driver.execute_cdp_cmd("HeapProfiler.collectGarbage", {})
    metrics = browser.driver.execute_cdp_cmd("Performance.getMetrics", {})["metrics"]
    heap = next(m["value"] for m in metrics if m["name"] == "JSHeapUsedSize")
    family = psutil.Process(browser.driver.service.process.pid).children(recursive=True)
    renderers = [p for p in family if "--type=renderer" in " ".join(p.cmdline())]
    return {
        "interactive ms": float(at),
        "load ms": float(browser.js("return window.loaded")),
        "heap MB": heap / 1e6,
        "renderer MB": max(p.memory_full_info().uss for p in renderers) / 1e6,
    }


def compare(large: Path, empty: Path) -> None:
    loads: dict[Path, list[dict[str, float]]] = {large: [], empty: []}
    with fresh_browser() as browser:
        one_load(browser, empty)  # the first load of a browser warms its own caches
        for _ in range(LOADS):
            for page in loads:
                loads[page].append(one_load(browser, page))
    for figure in ("interactive ms", "load ms", "heap MB", "renderer MB"):
        ours, theirs = (
            statistics.median(load[figure] for load in loads[page]) for page in (large, empty)
        )
        print(f"{figure:>15}  page {ours:8.1f}  empty {theirs:8.1f}  ratio {ours / theirs:6.2f}")


def work(page: Path) -> None:
    """What a person waits for after that: all parts drawn, a row opened."""
    timed = (
        "return (async () => {{ const began = performance.now(); {}; document.body.offsetHeight;"
        "return performance.now() - began; }})()"
    )
    with fresh_browser() as browser:
        browser.open(page)
        drawn = browser.js(
            timed.format(
                "await Promise.all([...document.querySelectorAll('[data-part]')].map(sglprof.draw))"
            )
        )
        opened = browser.js(timed.format("document.querySelector('button.opens').click()"))
    print(f"all parts drawn in {drawn:.0f} ms, a row opened in {opened:.0f} ms")


def _megabytes(path: Path) -> str:
    return f"{path.stat().st_size / 1e6:.2f} MB"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, default=64)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--kernels", type=int, default=300)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        page = make_page(folder, args.ranks, args.steps, args.kernels)
        print(f"page {_megabytes(page)}, limit 10 MB")
        compare(page, empty_page(folder))
        work(page)


if __name__ == "__main__":
    main()
