"""The page of a slow rank: it stands out in every part, and every part can be worked."""

from __future__ import annotations

import gzip
import json
from collections import defaultdict
from typing import Any

import pytest
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

from tests.browser.conftest import SLOW_RANK, RunPage
from tests.support.browser import Browser

pytestmark = pytest.mark.browser

RANKS = [f"TP{at}" for at in range(8)]
DARKNESS = (
    "const darkness = (colour) => 3 * 255 - "
    "colour.match(/\\d+/g).slice(0, 3).map(Number).reduce((a, b) => a + b);"
)


@pytest.fixture
def page(browser: Browser, standin_run: RunPage) -> Browser:
    browser.open(standin_run.path)
    browser.draw_all()
    return browser


@pytest.fixture
def anchor(standin_run: RunPage) -> str:
    return standin_run.anchor("test_slow")


@pytest.mark.parametrize("scope", ["compute", "moe"])
def test_its_cell_is_the_darkest(page: Browser, anchor: str, scope: str) -> None:
    cells = page.js(
        f"{DARKNESS} return [...document.querySelectorAll('#{anchor} td[data-scope={scope}]')].map("
        "(cell) => darkness(getComputedStyle(cell).backgroundColor))"
    )
    assert len(cells) == 8
    assert [at for at, dark in enumerate(cells) if dark == max(cells)] == [5]


def test_it_is_marked_in_words_too(page: Browser, anchor: str) -> None:
    marked = page.js(
        f"return [...document.querySelectorAll('#{anchor} tr.straggler th')]"
        ".map((cell) => cell.innerText)"
    )
    assert marked[0].split()[0] == SLOW_RANK
    page.js(f"document.querySelector('#{anchor} [data-shows$=waits]').click()")
    waits = page.js(
        f"return [...document.querySelectorAll('#{anchor} [id$=waits] tbody tr')].map("
        "(r) => [r.cells[0].innerText, parseFloat(r.cells[1].innerText)])"
    )
    least = min(waits, key=lambda row: row[1])
    assert least[0].split() == [SLOW_RANK, "◀", "arrives", "last"]
    assert page.js(f"return document.querySelector('#{anchor} [id$=compute]').hidden") is True


def test_its_row_of_the_strip_is_the_darkest(page: Browser, anchor: str) -> None:
    rows = page.js(
        f"{DARKNESS} const u = document.querySelector('#{anchor} .when .chart').sglprofChart;"
        "const height = u.bbox.height / 8;"
        "return [...Array(8).keys()].map((row) => {"
        "  const pixel = u.ctx.getImageData(u.valToPos(10, 'x', true),"
        "    u.bbox.top + (row + 0.5) * height, 1, 1).data;"
        "  return darkness([...pixel].join(' ')); });"
    )
    assert [row for row, dark in enumerate(rows) if dark == max(rows)] == [5]


def test_hovering_and_keys_tell_the_step(page: Browser, anchor: str, standin_run: RunPage) -> None:
    series = standin_run.window("test_slow")["step_times"][0]
    box = page.driver.find_element(By.CSS_SELECTOR, f"#{anchor} .when .chart")
    page.js("arguments[0].scrollIntoView({block: 'center'})", box)
    readout = page.driver.find_element(By.CSS_SELECTOR, f"#{anchor} .when .readout")
    box.send_keys(Keys.ARROW_RIGHT)
    for _ in range(5):
        box.send_keys(Keys.ARROW_DOWN)
    told = readout.text
    assert told.startswith(f"step {series['numbers'][1]} decode · batch {series['batch_size'][1]}")
    hundredths = (series["compute_ns"][1][5] + 5_000) // 10_000  # halves up, as the page rounds
    assert f"{SLOW_RANK} {hundredths / 100:.2f} ms" in told
    assert f"slowest {SLOW_RANK}" in told
    over = page.driver.find_elements(By.CSS_SELECTOR, f"#{anchor} .when .u-over")[-1]
    ActionChains(page.driver).move_to_element(over).perform()
    assert readout.text != told
    assert readout.text.startswith("step ")


def test_zoom_by_keys_and_by_dragging(page: Browser, anchor: str) -> None:
    scale = (
        "const u = document.querySelector('#{} .{} .chart').sglprofChart;"
        "return [u.scales.x.min, u.scales.x.max]"
    )
    for part in ("when", "lanes"):
        ask = scale.format(anchor, part)
        box = page.driver.find_element(By.CSS_SELECTOR, f"#{anchor} .{part} .chart")
        page.js("arguments[0].scrollIntoView({block: 'center'})", box)
        whole = page.js(ask)
        box.send_keys("+")
        near = page.js(ask)
        assert near[1] - near[0] < 0.6 * (whole[1] - whole[0])
        box.send_keys("0")
        assert page.js(ask) == whole
        over = page.driver.find_elements(By.CSS_SELECTOR, f"#{anchor} .{part} .u-over")[-1]
        drag = ActionChains(page.driver).move_to_element(over).click_and_hold()
        drag.move_by_offset(200, 0).release().perform()
        dragged = page.js(ask)
        assert dragged[1] - dragged[0] < 0.4 * (whole[1] - whole[0])


def test_a_row_opens_into_its_calls(page: Browser, anchor: str, standin_run: RunPage) -> None:
    button = page.driver.find_element(By.CSS_SELECTOR, f"#{anchor} button.opens")
    assert button.text == "fused_moe_kernel"
    button.send_keys(Keys.ENTER)
    assert button.get_attribute("aria-expanded") == "true"
    shown = page.js(
        f"return [...document.querySelectorAll('#{anchor} .detail tbody tr')].map("
        "(r) => [r.cells[0].innerText, r.cells[3].innerText])"
    )
    truth = _calls_in_compared_steps(standin_run.window("test_slow"), standin_run)
    assert [rank for rank, _ in shown] == RANKS
    for rank, median in shown:
        durations = sorted(truth[rank])
        middle = durations[round(0.5 * (len(durations) - 1))]
        # The page rounds halves up, as browsers do; Python's formats round them to even.
        assert median == f"{(middle + 500) // 1000}"
    assert page.js(f"return document.querySelectorAll('#{anchor} .detail canvas').length") == 2
    button.send_keys(Keys.ENTER)
    assert page.js(f"return document.querySelectorAll('#{anchor} .detail').length") == 0


def test_kernels_are_filtered_by_name(page: Browser, anchor: str) -> None:
    page.driver.find_element(By.CSS_SELECTOR, f"#{anchor} input").send_keys("TOPK")
    visible = page.js(
        f"return [...document.querySelectorAll('#{anchor} .kernels tbody tr')].filter("
        "(r) => r.checkVisibility()).map((r) => r.cells[0].innerText)"
    )
    assert len(visible) == 2
    assert all("topk" in name.lower() for name in visible)


def test_a_kernel_is_followed_across_ranks(
    page: Browser, anchor: str, standin_run: RunPage
) -> None:
    names = standin_run.window("test_slow")["lanes"]["names"]
    picture = standin_run.window("test_slow")["lanes"]["steps"][0]
    assert picture["why"][0] == "worst"
    page.js(
        f"const s = document.querySelector('#{anchor} .lanes select'); s.value = arguments[0];"
        "s.dispatchEvent(new Event('change'))",
        str(names.index("fused_moe_kernel")),
    )
    _press(page, anchor, "Next call")
    rows = page.js(
        f"return [...document.querySelectorAll('#{anchor} .followed tbody tr')].map("
        "(r) => [r.cells[0].innerText, parseFloat(r.cells[3].innerText)])"
    )
    assert [rank for rank, _ in rows] == RANKS
    for rank, ratio in rows:
        assert ratio == pytest.approx(1.4 if rank == SLOW_RANK else 1.0, abs=0.05)


def test_every_step_of_the_lanes_can_be_chosen(page: Browser, anchor: str) -> None:
    buttons = page.driver.find_elements(By.CSS_SELECTOR, f"#{anchor} .lanes .switch button")
    assert [button.text.split(" (")[1] for button in buttons] == [
        "worst)", "median)", "second worst)", "third worst)"
    ]  # fmt: skip
    for button in buttons:
        page.js("arguments[0].click()", button)
        assert button.get_attribute("aria-pressed") == "true"
        assert page.js(f"return document.querySelectorAll('#{anchor} .lanes canvas').length") == 1
    assert page.console() == []


def _press(page: Browser, anchor: str, text: str) -> None:
    page.js(
        f"[...document.querySelectorAll('#{anchor} .tools button')].find("
        "(b) => b.textContent === arguments[0]).click()",
        text,
    )


def _calls_in_compared_steps(window: dict[str, Any], page: RunPage) -> dict[str, list[int]]:
    """Durations of fused_moe_kernel by rank, ns, from the traces by plain json."""
    first, last = window["step_times"][0]["numbers"][0], window["step_times"][0]["numbers"][-1]
    assert all(state == "compared" for state in window["step_times"][0]["state"])
    assert last - first + 1 == window["steps"]["groups"][0]["compared"]
    found: dict[str, list[int]] = defaultdict(list)
    for artifact in window["artifacts"]:
        path = page.path.parent / artifact["path"]
        for event in json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]:
            if event.get("cat") == "kernel" and "fused_moe_kernel" in event["name"]:
                found[artifact["rank"]].append(round(event["dur"] * 1000))
    return found


@pytest.mark.parametrize(
    ("ns", "text"),
    [(7_345_000, "7.35 ms"), (1_005_000, "1.01 ms"), (400_400, "400 µs"), (0, "0 ns"),
     (999.4, "999 ns"), (12_340_000_000, "12.3 s"), (41_250_000, "41.3 ms")],
)  # fmt: skip
def test_durations_are_written_as_everywhere_else(page: Browser, ns: float, text: str) -> None:
    assert page.js("return sglprof.duration(arguments[0])", ns) == text
