"""The page of a history: nights of two keys, a version that got slower, accepted lives."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pytest_sglprof._baselines.records import AcceptedLife, LifeRecord
from pytest_sglprof._report.page.nights import write_history_page
from tests.support.browser import Browser
from tests.support.lives import group, key, kind, life, load, provenance

pytestmark = pytest.mark.browser

NIGHTS, SLOWER_SINCE, FACTOR = 30, 18, 1.08


def nights() -> list[LifeRecord]:
    draw = np.random.default_rng(3)
    records = []
    for at in range(NIGHTS):
        slow = at >= SLOWER_SINCE
        scale = float(np.exp(0.008 * draw.standard_normal())) * (FACTOR if slow else 1.0)
        records.append(
            life(
                group(kind([3e5 * scale, 5e5 * scale, 8e4])),
                night=1 + at,
                life=f"night-{at:02}",
                load=load(figures={"ttft_mean": 200.0, "output_throughput": 1500.0 / scale}),
                provenance=provenance(versions={"sglang": "0.5.23" if slow else "0.5.22"}),
                verdict="fail" if at == SLOWER_SINCE else "pass",
            )
        )
    return records


def accepted(records: list[LifeRecord]) -> dict[str, AcceptedLife]:
    chosen = [*records[:10], records[SLOWER_SINCE]]
    return {
        record.id: AcceptedLife(
            record=record,
            accepted="2026-12-01T00:00:00Z",
            reason="<b>FP8</b> by default" if record is chosen[-1] else "",
            begins_level=record is chosen[-1],
        )
        for record in chosen
    }


@pytest.fixture
def page(tmp_path: Path) -> Path:
    records = nights()
    other = [life(night=1 + at, key=key(window="bs1")) for at in range(2)]
    path = tmp_path / "history.html"
    write_history_page(path, [*other, *reversed(records)], accepted(records))
    return path


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_it_draws_every_figure_asks_for_nothing_and_is_accessible(
    browser: Browser, page: Path, dark: bool
) -> None:
    browser.open(page, dark=dark)
    browser.draw_all()
    titles = browser.js(
        "return [...document.querySelectorAll('[data-index=\"0\"] .figure')]"
        ".map((e) => e.textContent.trim())"
    )
    steady = browser.js(
        "return [...document.querySelectorAll('[data-index=\"1\"] .figure')]"
        ".map((e) => e.textContent.trim())"
    )
    names = ["compute, µs a step", "moe, µs a step", "gemm, µs a step", "communication, µs a step",
             "pass_wall, µs a step", "idle_share, %"]  # fmt: skip
    assert [title.split(";")[0] for title in titles] == [*names, "output_throughput, tokens/s"]
    assert [title.split(";")[0] for title in steady] == [
        *names,
        "ttft_mean, ms",
        "output_throughput, tokens/s",
    ]
    assert steady[-1].startswith("output_throughput, tokens/s; more is better")
    assert browser.console() == []
    assert browser.requests() == []
    assert browser.axe() == []


def test_a_change_is_named_with_the_versions_on_both_sides(browser: Browser, page: Path) -> None:
    browser.open(page)
    found: list[str] = browser.js(
        "return [...document.querySelectorAll('.changes-of li')].map((e) => e.textContent)"
    )
    (sentence,) = found
    assert sentence.startswith("Since 2026-11-19, 0.5.23 (before it 0.5.22): compute 799 µs → 8")
    changes = re.findall(r"(\w+) [\d.]+ [^,]+ \(([+−][\d.]+) %\)", sentence.partition(": ")[2])
    assert [name for name, _ in changes] == ["compute", "moe", "gemm", "output_throughput"]
    percents = [float(each.replace("−", "-")) for _, each in changes]
    assert percents == pytest.approx([8.0] * 3 + [100 / 1.08 - 100], abs=0.8)


def test_the_table_has_every_life_the_newest_first(browser: Browser, page: Path) -> None:
    browser.open(page)
    rows: list[list[str]] = browser.js(
        "return [...document.querySelectorAll('table')[1].querySelectorAll('tbody tr')]"
        ".map((row) => [...row.children].map((cell) => cell.textContent.trim()))"
    )
    assert [row[1] for row in rows] == [f"night-{at:02}" for at in reversed(range(NIGHTS))]
    assert [row[0] for row in rows] == [str(at) for at in reversed(range(1, NIGHTS + 1))]
    changed = rows[NIGHTS - 1 - SLOWER_SINCE]
    assert changed[4] == "0.5.23"
    assert changed[5] == "✗ fail"
    assert changed[-1].startswith("accepted: <b>FP8</b> by default; change of compute, moe, gemm")
    assert rows[-1][-1] == "accepted"
    assert rows[0][-1] == "–"


def test_keys_walk_through_the_nights(browser: Browser, page: Path) -> None:
    browser.open(page)
    browser.draw_all()
    told: Any = browser.js(
        "const box = document.querySelector('[data-index=\"1\"] .chart');"
        "box.focus();"
        "for (let i = 0; i < 2; i += 1) box.dispatchEvent("
        "new KeyboardEvent('keydown', {key: 'ArrowRight', bubbles: true}));"
        "return document.querySelector('[data-index=\"1\"] .readout').textContent"
    )
    assert told.startswith("3: run-")
    assert (
        " on h1, 0.5.22 · 2026-11-03T02:00:00.000Z · pass · accepted · compute, µs a step " in told
    )


def test_without_a_life_it_says_so(browser: Browser, tmp_path: Path) -> None:
    path = tmp_path / "history.html"
    write_history_page(path, [])
    browser.open(path)
    assert "No life has been recorded." in browser.js("return document.body.textContent")
    assert browser.console() == []
