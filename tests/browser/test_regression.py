"""A window against its accepted lives: one screen, drawn where the figures are, all of it text."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from pytest_sglprof._report.page.page import write_page
from pytest_sglprof._report.regression import RecordedRegression
from tests.browser.conftest import RunPage
from tests.support.browser import Browser
from tests.support.regressions import CHANGE, regression
from tests.support.windows import SLOW, as_run, plain, run, window

pytestmark = pytest.mark.browser

ROWS = """
return [...document.querySelectorAll('.regression .figures tbody tr')].map((row) => {
  const axis = row.querySelector('.axis'), left = axis.getBoundingClientRect().left;
  const middle = (one) => { const b = one.getBoundingClientRect(); return (b.left + b.right) / 2 - left; };
  const all = (where) => [...row.querySelectorAll(where)].map(middle);
  const reach = row.querySelector('.reach')?.getBoundingClientRect();
  return {accepted: all('.axis .life:not(.new)'), fresh: all('.axis .new'), one: all('.axis b')[0],
          limit: all('.axis .limit')[0], bound: all('.axis .bound')[0], width: axis.clientWidth,
          reach: reach && [reach.left - left, reach.right - left],
          nights: all('.strip .night'), changes: all('.strip b'), levels: all('.strip .level').length,
          text: [...row.children].map((cell) => cell.textContent.trim())};
});
"""  # noqa: E501


def page_of(found: RecordedRegression, folder: Path) -> RunPage:
    document = run([window(SLOW)])
    document["windows"][0]["regression"] = plain(found)
    path = folder / "report.html"
    write_page([as_run(json.loads(json.dumps(document)))], [folder], path)
    return RunPage(path, document)


def ratios(found: RecordedRegression, at: int) -> tuple[list[float], list[float]]:
    """How many times as bad as the mean of the present level each accepted and new life is."""
    figure = found.figures[at]
    sign = -1 if figure.name == "output_throughput" else 1
    logs = [[sign * math.log(each or 0) for each in of] for of in (figure.accepted, figure.fresh)]
    base = np.mean(
        [log for log, life in zip(logs[0], found.accepted, strict=True) if life.is_level]
    )
    return [math.exp(log - base) for log in logs[0]], [math.exp(log - base) for log in logs[1]]


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("figures", [1, 6])
@pytest.mark.parametrize("lives", [2, 20])
def test_it_fits_on_one_screen(
    browser: Browser, tmp_path: Path, lives: int, figures: int, dark: bool
) -> None:
    page = page_of(regression(lives=lives, fresh=4, figures=figures), tmp_path)
    with browser.screen(1440, 900):
        browser.open(page.path, dark=dark)
        box = browser.js(
            "const box = document.querySelector('.regression').getBoundingClientRect();"
            "return [box.height, document.documentElement.scrollWidth];"
        )
        rows = browser.js(ROWS)
    assert box[0] <= 900
    assert box[1] <= 1440
    assert [len(row["accepted"]) for row in rows] == [lives] * figures
    assert [len(row["fresh"]) for row in rows] == [4] * figures
    assert browser.axe() == []
    assert browser.console() == []


def test_on_a_phone_only_its_tables_scroll(browser: Browser, tmp_path: Path) -> None:
    page = page_of(regression(lives=20, fresh=4, figures=6), tmp_path)
    with browser.screen(390, 844):
        browser.open(page.path)
        assert browser.js("return document.documentElement.scrollWidth") == 390
        assert browser.axe() == []


def test_dots_limit_and_interval_lie_where_their_ratios_are(
    browser: Browser, tmp_path: Path
) -> None:
    found = regression(lives=20, fresh=2, figures=6)
    page = page_of(found, tmp_path)
    with browser.screen(1440, 900):
        rows = browser.open(page.path).js(ROWS)
    places = []
    for at, (row, figure) in enumerate(zip(rows, found.figures, strict=True)):
        before, now = ratios(found, at)
        places += [*zip(before, row["accepted"], strict=True), *zip(now, row["fresh"], strict=True)]
        limit = figure.limit or 0
        places += [(1.0, row["one"]), (figure.low, row["reach"][0]), (figure.high, row["reach"][1])]
        places.append(
            (limit if figure.limit_of == "ratio" else limit / figure.before, row["limit"])
        )
        assert (row["bound"] is None) == (figure.pass_bound is None)
        places += [(figure.pass_bound, row["bound"])] * (figure.pass_bound is not None)
    logs, pixels = np.log([ratio for ratio, _ in places]), [place for _, place in places]
    slope, start = np.polyfit(logs, pixels, 1)
    assert slope > 500
    assert start + slope * logs == pytest.approx(pixels, abs=1.5)
    assert [row["text"][0].split(",")[0].split(" in ")[0] for row in rows][:2] == ["compute", "moe"]
    assert "✗ fail" in rows[1]["text"][1]
    assert float(rows[1]["text"][4][:5]) == pytest.approx(CHANGE, abs=0.02)


def test_what_lies_beyond_the_axis_is_drawn_at_its_end(browser: Browser, tmp_path: Path) -> None:
    found = regression(lives=10, fresh=1, figures=1)
    (figure,) = found.figures
    far = msgspec.structs.replace(figure, fresh=(figure.fresh[0] * 40,), ratio=46.0, high=50.0)
    page = page_of(msgspec.structs.replace(found, figures=(far,)), tmp_path)
    with browser.screen(1440, 900):
        (row,) = browser.open(page.path).js(ROWS)
        beyond = browser.js("return document.querySelectorAll('.axis .new.beyond').length")
    assert beyond == 1
    assert row["fresh"][0] == pytest.approx(row["width"], abs=1)
    assert row["reach"][1] == pytest.approx(row["width"], abs=1)
    assert "46.000" in row["text"][4]


def test_past_nights_are_in_order_and_a_change_lies_between_two(
    browser: Browser, tmp_path: Path
) -> None:
    page = page_of(regression(lives=10, fresh=1, figures=2, nights=40), tmp_path)
    with browser.screen(1440, 900):
        rows = browser.open(page.path).js(ROWS)
    for row in rows:
        nights = row["nights"]
        assert len(nights) == 41
        assert nights == sorted(nights)
        (change,) = row["changes"]
        assert nights[31] < change < nights[32]
        assert row["levels"] == 2


def test_of_many_nights_the_last_are_drawn_and_all_are_in_the_table(
    browser: Browser, tmp_path: Path
) -> None:
    page = page_of(regression(lives=10, fresh=1, figures=1, nights=90), tmp_path)
    with browser.screen(1440, 900):
        (row,) = browser.open(page.path).js(ROWS)
        listed = browser.js("return document.querySelectorAll('.all-nights tbody tr').length")
    assert len(row["nights"]) == 60
    assert listed == 91
    (change,) = row["changes"]
    assert row["nights"][50] < change < row["nights"][51]


def test_everything_drawn_is_also_text(browser: Browser, tmp_path: Path) -> None:
    found = regression(lives=10, fresh=2, figures=6)
    browser.open(page_of(found, tmp_path).path)
    labels = browser.js(
        "return [...document.querySelectorAll('.regression [role=img]')]"
        ".map((e) => e.getAttribute('aria-label'))"
    )
    assert len(labels) == 12
    before, now = ratios(found, 1)
    assert labels[2].startswith(
        f"moe in decode: 10 accepted lives from {min(before):.3f} to {max(before):.3f}; "
        f"new {now[0]:.3f}, {now[1]:.3f}; the ratio is "
    )
    assert labels[2].endswith("limit 1.05, passes surely below 1.075")
    assert labels[3].endswith("10 accepted, 2 failed; changes on 2026-11-03")
    tables: dict[str, Any] = browser.js(
        "const rows = (where) => [...document.querySelectorAll(`${where} tbody tr`)]"
        ".map((row) => [...row.children].map((cell) => cell.textContent.trim()));"
        "return {lives: rows('.all-lives'), nights: rows('.all-nights'),"
        "kernels: rows('.scanned')};"
    )
    assert [row[0] for row in tables["lives"]] == [f"life-{at}" for at in range(30, 42)]
    assert [row[-1] for row in tables["lives"]][-2:] == ["new", "new"]
    assert tables["lives"][7][-1] == "mean and variance; begins a level: FP8 KV cache by default"
    assert tables["lives"][0][-1] == "variance alone"
    assert len(tables["nights"]) == 42
    assert "change of compute, moe in decode" in tables["nights"][42 - 1 - 32][-1]
    assert len(tables["kernels"]) == len(found.kernels)
    assert tables["kernels"][0][-1] == "▲ slower"
    assert tables["kernels"][0][-2] == "24 → 48"


def test_a_first_night_says_so_and_draws_nothing(browser: Browser, tmp_path: Path) -> None:
    found = msgspec.structs.replace(
        regression(lives=2, figures=1),
        exists=False,
        accepted=(),
        history=(),
        figures=(),
        kernels=(),
        appeared=(),
        vanished=(),
        findings=(),
        floor=None,
        floor_sentence="",
        detection="",
        not_scanned="8 accepted lives are needed, there are 0",
        sentence="no baseline yet: recorded as a candidate",
    )
    browser.open(page_of(found, tmp_path).path)
    text = browser.js("return document.querySelector('.regression').textContent")
    drawn = browser.js("return document.querySelectorAll('.regression [role=img]').length")
    assert "recorded as a candidate" in text
    assert f"{found.file} does not exist yet" in text
    assert "Kernels are not scanned: 8 accepted lives are needed, there are 0." in text
    assert drawn == 0
    assert browser.axe() == []


def test_lives_that_cannot_be_compared_say_which_field_differs(
    browser: Browser, tmp_path: Path
) -> None:
    found = msgspec.structs.replace(
        regression(figures=1), not_comparable="gpu: H100 against <b>H200</b>"
    )
    browser.open(page_of(found, tmp_path).path)
    text = browser.js("return document.querySelector('.regression .notice').textContent")
    assert text == "Not comparable: gpu: H100 against <b>H200</b>."
