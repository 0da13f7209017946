"""Ranks with different input: the cost and the split of all ranks on one screen."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import pytest

from tests.browser.conftest import RunPage, page_of_dp
from tests.support.browser import Browser

pytestmark = pytest.mark.browser

BARS = """
return [...document.querySelectorAll('.sync .ranks tbody tr')].map((row) => {
  const bar = row.querySelector('.stack');
  const zero = bar.querySelector('b').getBoundingClientRect().left;
  const parts = [...bar.querySelectorAll('i')].map((part) => {
    const box = part.getBoundingClientRect();
    return [part.className, box.left - zero, box.right - zero, box.height];
  });
  const box = bar.getBoundingClientRect();
  return {name: row.querySelector('th').textContent.trim(), thin: row.className === 'thin',
          left: box.left - zero, right: box.right - zero, parts};
});
"""


def sync_of(page: RunPage) -> dict[str, Any]:
    found: dict[str, Any] = page.results["windows"][0]["syncs"][0]
    return found


@pytest.mark.parametrize("ranks", [2, 8, 64])
def test_it_fits_on_one_screen(browser: Browser, tmp_path: Path, ranks: int) -> None:
    page = page_of_dp("d", ranks, tmp_path)
    with browser.screen(1440, 900):
        browser.open(page.path)
        height = browser.js(
            "return document.querySelector('section.sync').getBoundingClientRect().height"
        )
        bars = browser.js(BARS)
        assert height <= 900
        assert len(bars) == ranks
        assert sum(not bar["thin"] for bar in bars) == min(ranks, 12)
        for bar in bars:
            for _, left, right, tall in bar["parts"]:
                assert bar["left"] - 1 <= left <= right <= bar["right"] + 1
                assert tall >= 4
        assert browser.console() == []


def test_bars_are_as_long_as_the_parts(browser: Browser, dp_page: RunPage) -> None:
    with browser.screen(1440, 900):
        bars = browser.open(dp_page.path).js(BARS)
        wall = browser.js(
            "const wall = document.querySelector('.stack.wall');"
            "const width = wall.getBoundingClientRect().width;"
            "return [...wall.children].map("
            "(part) => [part.className, part.getBoundingClientRect().width / width]);"
        )
    found = sync_of(dp_page)
    cost = found["cost"]
    assert dict(wall) == pytest.approx(
        {name: cost[name] for name in ("waiting", "idle", "padding") if cost[name]}, abs=0.002
    )
    ranks = sorted(found["ranks"], key=lambda rank: -rank["waits_for"])
    assert [bar["name"].split()[0] for bar in bars] == [rank["rank"].split()[0] for rank in ranks]
    assert [bar["name"].endswith("◀ latest") for bar in bars] == [True] + [False] * 7
    planted = [
        {
            **{name: rank[name]["ns"] for name in ("load", "speed", "rest")},
            "not-known": rank["unknown_ns"],
        }
        for rank in ranks
    ]
    scales = [
        (right - left) / abs(ns[name])
        for bar, ns in zip(bars, planted, strict=True)
        for name, left, right, _ in bar["parts"]
        if abs(ns[name]) > 20_000
    ]
    assert len(scales) >= 5
    assert max(scales) == pytest.approx(min(scales), rel=0.05)
    scale = statistics.median(scales)
    for bar, ns in zip(bars, planted, strict=True):
        for name, left, right, _ in bar["parts"]:
            pixels = ns[name] * scale
            assert right - left == pytest.approx(abs(pixels), abs=1)
            # A part of less than a pixel may begin and end at 0.
            assert (left + right) * pixels > 0 or abs(pixels) < 1
        # The bar as a whole ends where the sum of its parts does.
        more = sum(max(part, 0) for part in ns.values())
        assert max(right for _, _, right, _ in bar["parts"]) == pytest.approx(more * scale, abs=2)


def test_everything_drawn_is_also_text(browser: Browser, dp_page: RunPage) -> None:
    browser.open(dp_page.path)
    labels = browser.js(
        "return [...document.querySelectorAll('.sync [role=img]')]"
        ".map((e) => e.getAttribute('aria-label'))"
    )
    assert "% of GPU time" in labels[0]
    assert len(labels) == 9
    assert all(" µs a pass: load " in label for label in labels[1:])
    browser.js("document.querySelector('.sync details').open = true")
    rows = browser.js(
        "return [...document.querySelectorAll('.sync details tbody tr')]"
        ".map((r) => [...r.children].map((cell) => cell.textContent))"
    )
    slow = sync_of(dp_page)["latest"]
    (row,) = [row for row in rows if row[0] == slow]
    found = next(rank for rank in sync_of(dp_page)["ranks"] if rank["rank"] == slow)
    assert row[1] == f"{found['difference_ns'] / 1e3:+,.0f}"
    assert row[6].startswith(f"{found['speed_ratio']:.2f} (")
    assert row[7] == ", ".join(found["slower_in"])
    assert row[8] == f"{100 * found['waits_for']:.0f}"
