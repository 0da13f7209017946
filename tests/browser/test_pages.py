"""What every page must be, whatever run it shows: whole, silent, readable."""

from __future__ import annotations

import copy
import subprocess
from pathlib import Path
from typing import Any

import pytest

from pytest_sglprof._report.page.page import write_page
from tests.browser.conftest import RunPage
from tests.support.browser import Browser, find_chromium
from tests.support.kernel_tables import build, slow
from tests.support.windows import as_run, run, window

pytestmark = pytest.mark.browser

HOSTILE = (
    "<script>window.hacked = 1</script>",
    "</script><script>window.hacked = 2</script>",
    "<!--<script>",
    '" onmouseover="window.hacked = 3" x="',
    "'><img src=x onerror='window.hacked = 4'>",
    "{{ 7 * 7 }}",
    "kernel 🔥 \u2028 \u202e ünï",
    "long_" * 2000,
)
# Text whose contrast with what lies behind it is below 4.5 to 1 (WCAG AA).
FAINT = """
const channel = (c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
const parse = (text) => text.match(/[\\d.]+/g).map(Number);
const WEIGHTS = [0.2126, 0.7152, 0.0722];
const light = (c) => WEIGHTS.reduce((sum, weight, at) => sum + weight * channel(c[at] / 255), 0);
const behind = (element) => {
  for (let at = element; at; at = at.parentElement) {
    const colour = parse(getComputedStyle(at).backgroundColor);
    if (colour.length === 3 || colour[3] === 1) return colour;
  }
  return [255, 255, 255];
};
const faint = [];
let seen = 0;
for (const element of document.body.querySelectorAll("*")) {
  const own = [...element.childNodes].some((n) => n.nodeType === 3 && n.textContent.trim());
  if (!own || !element.checkVisibility() || element.closest("script, style, svg")) continue;
  seen += 1;
  const [a, b] = [light(parse(getComputedStyle(element).color)), light(behind(element))];
  const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
  if (ratio < 4.5) faint.push(`${ratio.toFixed(2)} ${element.outerHTML.slice(0, 120)}`);
}
return [seen, faint];
"""


def hostile_page(folder: Path) -> RunPage:
    kernels = [(name, "moe", 100_000 + at) for at, name in enumerate(HOSTILE)]
    kernels.append(("all_reduce", "communication", 50_000))
    document = run([window(build(kernels=kernels, scale=slow("TP1", "moe", 1.4)))])
    document["windows"][0]["reason"] = HOSTILE[1]
    document["windows"][0]["notes"] = list(HOSTILE)
    earlier = copy.deepcopy(document)
    earlier["run"]["id"] = HOSTILE[0]
    write_page([as_run(document)], [folder], folder / "report.html", baseline=as_run(earlier))
    return RunPage(folder / "report.html", document)


PAGES = {
    "stand-in": "standin_run",
    "two GPUs": "gpu_page",
    "real CPU": "cpu_page",
    "ranks with different input": "dp_page",
    "stand-in and baseline": "standin_pair",
    "two GPUs and baseline": "gpu_pair",
}


@pytest.fixture(params=[*PAGES, "hostile"])
def any_page(request: pytest.FixtureRequest, tmp_path: Path) -> RunPage:
    if request.param == "hostile":
        return hostile_page(tmp_path)
    found: RunPage = request.getfixturevalue(PAGES[request.param])
    return found


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_it_is_silent_readable_and_asks_for_nothing(
    browser: Browser, any_page: RunPage, dark: bool
) -> None:
    browser.open(any_page.path, dark=dark)
    browser.draw_all()
    for button in ("button.opens", ".lanes .tools button"):
        browser.js(f"document.querySelector({button!r})?.click()")
    background = browser.js("return getComputedStyle(document.body).backgroundColor")
    assert background == ("rgb(15, 18, 22)" if dark else "rgb(255, 255, 255)")
    seen, faint = browser.js(FAINT)
    assert seen > 50
    assert faint == []
    assert browser.console() == []
    assert browser.requests() == []
    assert browser.axe() == []


def test_a_phone_shows_it_without_scrolling_aside(browser: Browser, any_page: RunPage) -> None:
    with browser.screen(390, 844):
        browser.open(any_page.path)
        browser.draw_all()
        browser.js("document.querySelector('button.opens')?.click()")
        wide = browser.js(
            "return [...document.body.querySelectorAll('*')].filter((e) => e.checkVisibility()"
            " && !e.closest('.scroll, .log') && e.getBoundingClientRect().right > 391)"
            ".map((e) => e.outerHTML.slice(0, 100))"
        )
        assert wide == []
        assert browser.js("return document.documentElement.scrollWidth") == 390


def test_hostile_names_are_text(browser: Browser, tmp_path: Path) -> None:
    page = hostile_page(tmp_path)
    source = page.path.read_text()
    assert "</script><script>window.hacked" not in source
    browser.open(page.path)
    browser.draw_all()
    browser.js("document.querySelectorAll('button.opens').forEach((button) => button.click())")
    assert browser.js("return window.hacked") is None
    assert browser.js(
        "return document.querySelectorAll('img, body script:not([type])').length"
    ) == (len(source.split("<script>")) - 1)
    opened = browser.js(
        "return [...document.querySelectorAll('.detail .full')].map((p) => p.textContent)"
    )
    assert {name[:2000] for name in HOSTILE} <= set(opened)
    options = browser.js("return [...document.querySelector('select').options].map((o) => o.text)")
    assert any(HOSTILE[1] in option for option in options)


def test_every_part_is_there(browser: Browser, standin_run: RunPage) -> None:
    browser.open(standin_run.path)
    browser.draw_all()
    for test in ("test_clean", "test_slow", "test_too_short"):
        anchor = standin_run.anchor(test)
        heads = browser.js(
            f"return [...document.querySelectorAll('#{anchor} h3')].map((h) => h.textContent)"
        )
        assert heads == ["Who", "When", "Which", "Lanes", "Load and evidence"]
        canvases = browser.js(f"return document.querySelectorAll('#{anchor} canvas').length")
        assert canvases == 4  # slowest and mean, batch, step x rank, lanes
    rows = browser.js(
        "return [...document.querySelectorAll('.verdicts tbody tr')].map("
        "(r) => [r.querySelector('a').hash, r.querySelector('.word').textContent])"
    )
    words = {"test_clean": "✓ pass", "test_too_short": "? inconclusive", "test_slow": "✗ fail"}
    assert dict(rows) == {f"#{standin_run.anchor(test)}": word for test, word in words.items()}
    text = browser.js("return document.body.innerText")
    assert "10 steps with compute, 50 are needed" in text
    assert "Stand-in" in text
    # What is far from the screen has no text yet.
    facts = f"document.querySelector('#{standin_run.anchor('test_slow')} .facts-of')"
    browser.js(f"{facts}.scrollIntoView()")
    assert "TTFT" in browser.js(
        f"return new Promise((done) => requestAnimationFrame(() => done({facts}.innerText)))"
    )


def test_the_failing_window_is_first_and_open_and_links_open_the_others(
    browser: Browser, standin_run: RunPage
) -> None:
    is_open = "return [...document.querySelectorAll('.window[open]')].map((w) => w.id)"
    assert browser.open(standin_run.path).js(is_open) == [standin_run.anchor("test_slow")]
    order = browser.js(
        "return [...document.querySelectorAll('.window, #verdicts')].map((e) => e.id)"
    )
    assert order[:2] == [standin_run.anchor("test_slow"), "verdicts"]
    assert len(order) == 4
    clean = standin_run.anchor("test_clean")
    browser.js(f"document.querySelector('a[href=\"#{clean}\"]').click()")
    assert clean in browser.js(is_open)
    assert clean in browser.open(standin_run.path, fragment=f"#{clean}").js(is_open)
    # A link into a closed window opens it, too.
    assert clean in browser.open(standin_run.path, fragment=f"#{clean}-which").js(is_open)


def test_raw_traces_are_one_click_away(browser: Browser, standin_run: RunPage) -> None:
    links: list[Any] = browser.open(standin_run.path).js(
        f"return [...document.querySelectorAll('#{standin_run.anchor('test_slow')} dd a')]"
        ".map((a) => [a.textContent, a.getAttribute('href')])"
    )
    assert [rank for rank, _ in links] == [f"TP{at}" for at in range(8)]
    for _, link in links:
        assert (standin_run.path.parent / link).is_file()


def test_it_prints_with_everything_open_and_in_light_colours(
    browser: Browser, standin_run: RunPage
) -> None:
    browser.open(standin_run.path, dark=True)
    pages = browser.driver.execute_cdp_cmd("Page.printToPDF", {"printBackground": True})
    assert len(pages["data"]) > 20_000
    assert browser.js("return sglprof.allLoaded") is True
    browser.js("window.dispatchEvent(new Event('beforeprint'))")
    assert browser.js("return document.querySelectorAll('.window:not([open])').length") == 0
    assert browser.js("return document.querySelectorAll('[data-part]:empty').length") == 0
    assert browser.js("return document.documentElement.dataset.theme") == "light"
    widths = "return [...document.querySelectorAll('.uplot')].map((u) => u.clientWidth)"
    assert max(browser.js(widths)) <= 980  # a sheet across
    browser.js("window.dispatchEvent(new Event('afterprint'))")
    assert max(browser.js(widths)) > 980
    assert browser.js("return document.querySelectorAll('.window[open]').length") == 1


def test_runs_side_by_side(browser: Browser, gpu_page: RunPage) -> None:
    browser.open(gpu_page.path)
    rows = browser.js(
        "return [...document.querySelectorAll('#history tbody tr')].map("
        "(r) => [...r.cells].map((c) => c.textContent.trim()))"
    )
    assert [row[:2] for row in rows] == [["1", "before"], ["2", "after"]]
    for row, document in zip(rows, gpu_page.results["windows"], strict=True):
        finding = next(f for f in document["findings"] if f["scope"] == "compute")
        assert row[5] == f"{finding['slowdown']:.3f}"
    assert "has no step markers" in browser.js("return document.body.innerText")


def test_what_other_parts_of_a_window_tell_is_shown_where_it_exists(
    browser: Browser, tmp_path: Path
) -> None:
    document = run([window(build(scale=slow("TP1", "moe", 1.4)))])
    found = document["windows"][0]
    series = found["step_times"][0]
    series["start_ns"] = [1_700_000_000_000_000_000 + step * 2_000_000 for step in range(50)]
    series["state"][3] = "unmatched"
    series["compute_ns"][3][0] = -1
    moment = "2023-11-14T22:13:20.020Z"
    found["onset"] = {
        "time": moment, "declared": moment, "kind": "running", "factor": 1.5, "resolution_s": 0.5,
        "source": "log", "ranks": [], "sentence": "TP1 got the long ones.", "correlation": None,
    }  # fmt: skip
    times = [1_700_000_000 + at * 0.01 for at in range(10)]
    found["load_samples"] = [
        {"rank": rank, "source": "log", "time": times, "running": [4, *[running] * 9],
         "waiting": [0] * 10, "tokens": [100] * 10}
        for rank, running in (("TP0", 4), ("TP1", 12))
    ]  # fmt: skip
    found["gpus"] = [
        {"rank": "TP1", "uuid": "GPU-1", "median_sm_mhz": 1410.0, "power_limit_w": None,
         "throttled": True}
    ]  # fmt: skip
    found["stragglers"][0] |= {
        "straggler": "TP1", "verdict": "fail", "cause": "host_late", "reason": "TP1 arrives last",
        "collectives": 50,
    }  # fmt: skip
    first, second = found["stragglers"][0]["ranks"]
    first |= {"wait_ns": 9_000_000, "kernels": []}
    second |= {"wait_ns": 0, "kernels": [{"name": "idle", "ns": 2e6}]}
    found["judgements"][0]["finding"]["interval"] = [1.35, 1.44]
    found["judgements"][found["decisive"]]["finding"]["interval"] = [1.35, 1.44]
    write_page([as_run(document)], [tmp_path], tmp_path / "report.html")
    browser.open(tmp_path / "report.html")
    browser.draw_all()
    text = browser.js("return document.body.innerText")
    for part in ("TP1 arrives last", "host late", "idle +2.00", "◀ straggler", "1410.0",
                 "may be 1.350 to 1.440", "TP1 got the long ones.", "step 10: onset",
                 "50 steps, 1 excluded (hatched)", "Load of the ranks"):  # fmt: skip
        assert part in text
    waited = browser.js("return document.querySelector('[id$=waits] tbody').textContent")
    assert "9.00" in waited
    assert browser.console() == []
    assert browser.axe() == []


def test_of_many_kernels_the_rest_is_asked_for(browser: Browser, tmp_path: Path) -> None:
    kernels = [(f"kernel_{at:02}", "gemm", 100_000) for at in range(45)]
    document = run([window(build(kernels=kernels, steps=30))])
    write_page([as_run(document)], [tmp_path], tmp_path / "report.html")
    visible = (
        "return [...document.querySelectorAll('.kernels tbody tr')]"
        ".filter((r) => r.checkVisibility()).length"
    )
    browser.open(tmp_path / "report.html")
    assert browser.js(visible) == 40
    browser.js("document.querySelector('button.all').click()")
    assert browser.js(visible) == 45
    browser.open(tmp_path / "report.html")
    browser.driver.find_element("css selector", "input[type=search]").send_keys("kernel_44")
    assert browser.js(visible) == 1
    browser.js("document.querySelector('.kernels tr:not([hidden]) button.opens').click()")
    browser.js("return sglprof.allLoaded")
    assert browser.js("return document.querySelector('.detail .full').textContent") == "kernel_44"


FIRST_SCREEN = """
const bottom = (e) => e.getBoundingClientRect().bottom;
const lead = document.querySelector('.window .lead');
return {heads: [...lead.querySelectorAll('dt')].map((e) => e.textContent), bottom: bottom(lead),
        since: lead.querySelectorAll('dd')[2].textContent.trim()};
"""


def test_the_answers_are_within_the_first_screen(browser: Browser, standin_run: RunPage) -> None:
    with browser.screen(1400, 900):
        found = browser.open(standin_run.path).js(FIRST_SCREEN)
    assert found["heads"] == ["Who", "How much", "Since when", "How sure"]
    assert found["bottom"] < 900
    assert found["since"].startswith("throughout the window's ")


def test_the_reason_of_a_window_is_said_once(browser: Browser, standin_run: RunPage) -> None:
    browser.open(standin_run.path)
    browser.draw_all()
    text = browser.js("return document.body.innerText")
    for test in ("test_slow", "test_too_short"):
        reason = standin_run.window(test)["reason"].split(";")[0]
        assert text.count(reason) == 1


def test_one_measure_is_shown_and_the_others_when_they_are_asked_for(
    browser: Browser, standin_run: RunPage
) -> None:
    slow = f"#{standin_run.anchor('test_slow')}"
    lines = (
        f"return [...document.querySelectorAll('{slow} .heat tfoot tr')]"
        ".filter((r) => r.checkVisibility()).map((r) => r.cells[0].textContent)"
    )
    assert browser.open(standin_run.path).js(lines) == ["Slowdown"]
    browser.js(f"document.querySelector('{slow} [data-more]').click()")
    assert browser.js(lines) == ["Slowdown", "Imbalance factor", "Lost share, %", "Spike share, %"]


def test_units_stand_in_heads_and_not_in_cells(browser: Browser, any_page: RunPage) -> None:
    browser.open(any_page.path)
    browser.draw_all()
    browser.js("document.querySelectorAll('button.opens')[1]?.click()")
    cells = browser.js(
        "return [...document.querySelectorAll('td.n, td.detail td')].map((c) => c.textContent)"
        r".filter((text) => /\d\s?(%|ns|µs|ms|s)\b|\d %/.test(text))"
    )
    assert cells == []


def test_equal_values_have_no_difference(browser: Browser, any_page: RunPage) -> None:
    browser.open(any_page.path)
    browser.draw_all()
    cells = browser.js("return [...document.querySelectorAll('td')].map((c) => c.textContent)")
    zeros = {"+0", "−0", "+0.0", "−0.0", "+0.00", "−0.00"}
    assert [text for text in cells if text.split(" ")[0] in zeros] == []


def test_charts_are_there_without_scrolling(browser: Browser, standin_run: RunPage) -> None:
    with browser.screen(1400, 900):
        browser.open(standin_run.path)
        browser.js("return sglprof.allLoaded")
        slow = standin_run.anchor("test_slow")
        empty = browser.js(f"return document.querySelectorAll('#{slow} [data-part]:empty').length")
        drawn = browser.js(f"return document.querySelectorAll('#{slow} canvas').length")
        facts = browser.js(f"return document.querySelector('#{slow} .facts-of').innerText")
        assert browser.js("return scrollY") == 0
        others = browser.js(
            f"return document.querySelectorAll('.window:not(#{slow}) canvas').length"
        )
    assert (empty, drawn, others) == (0, 4, 0)
    assert "TTFT" in facts


def test_what_captures_a_page_at_its_load_has_the_charts(standin_run: RunPage) -> None:
    binary, _ = find_chromium()
    options = ("--headless=new", "--no-sandbox", "--disable-gpu", "--dump-dom")
    command = [binary, *options, standin_run.path.as_uri()]
    dumped = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    window = dumped.stdout.partition(f'id="{standin_run.anchor("test_slow")}"')[2]
    assert window.partition("</details>\n")[0].count("<canvas") == 4


def test_a_closed_window_is_drawn_when_it_is_opened(browser: Browser, standin_run: RunPage) -> None:
    clean = standin_run.anchor("test_clean")
    browser.open(standin_run.path)
    browser.js("return sglprof.allLoaded")
    browser.driver.find_element("css selector", f"#{clean} > summary h2").click()
    drawn = browser.driver.execute_async_script(
        "const done = arguments[arguments.length - 1];"
        "const clean = document.getElementById(arguments[0]);"
        "const look = () => clean.querySelectorAll('canvas').length === 4"
        " ? done(4) : requestAnimationFrame(look); look();",
        clean,
    )
    assert drawn == 4


@pytest.mark.parametrize("width", [420, 1400])
def test_what_a_table_hides_is_said_above_it(
    browser: Browser, any_page: RunPage, width: int
) -> None:
    with browser.screen(width, 900):
        browser.open(any_page.path)
        browser.draw_all()
        boxes = browser.js(
            "return new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(() =>"
            " done([...document.querySelectorAll('.scroll')].filter((b) => b.checkVisibility())"
            ".map((b) => [b.scrollWidth - b.clientWidth > 1, b.scrollHeight - b.clientHeight > 1,"
            " b.previousElementSibling?.matches('.hint:not([hidden])') ?"
            " b.previousElementSibling.textContent : '', b.className])))))"
        )
    assert boxes
    for wide, tall, hint, classes in boxes:
        assert ("sideways" in hint, "down" in hint) == (wide, tall)
        assert ("goes-right" in classes) == wide


def test_a_browser_that_cannot_unpack_says_so(browser: Browser, standin_run: RunPage) -> None:
    script = "Object.defineProperty(window, 'DecompressionStream', {value: undefined});"
    made = browser.driver.execute_cdp_cmd(
        "Page.addScriptToEvaluateOnNewDocument", {"source": script}
    )
    try:
        browser.open(standin_run.path)
        browser.js("return sglprof.allLoaded")
        notice = browser.js("return document.querySelector('main .notice').textContent")
        rows = browser.js("return document.querySelectorAll('.window[open] .heat tbody tr').length")
        assert browser.console() == []
    finally:
        browser.driver.execute_cdp_cmd("Page.removeScriptToEvaluateOnNewDocument", made)
    assert notice.startswith("This browser cannot unpack the data of the charts")
    assert rows >= 8


def test_a_packed_window_is_whole_when_it_is_opened(browser: Browser, tmp_path: Path) -> None:
    kernels = [(name, "moe", 100_000 + at) for at, name in enumerate(HOSTILE[:3])]
    document = run([window(build(kernels=kernels, steps=30))])
    document["windows"] = [
        {**document["windows"][0], "id": f"w{at}", "verdict": "fail" if at == 55 else "pass"}
        for at in range(56)
    ]
    write_page([as_run(document)], [tmp_path], tmp_path / "report.html")
    browser.open(tmp_path / "report.html")
    in_sight = "return document.querySelector('#verdicts .fail').getBoundingClientRect().bottom"
    assert browser.js(in_sight) < 300
    packed = browser.js("return [...document.querySelectorAll('[data-packed]')].map((w) => w.id)")
    assert packed == [f"window-{number}" for number in range(50, 56)]
    whole = (
        "const [id, done] = arguments, window_ = document.getElementById(id);"
        "const look = () => window_.open && window_.querySelectorAll('canvas').length === 4"
        " ? done([...window_.querySelectorAll('h3')].map((h) => h.textContent))"
        " : requestAnimationFrame(look); look();"
    )
    heads = ["Who", "When", "Which", "Lanes", "Load and evidence"]
    browser.js("document.querySelector('#window-51 > summary').click()")
    assert browser.driver.execute_async_script(whole, "window-51") == heads
    browser.js("document.querySelector('#verdicts a[href=\"#window-52\"]').click()")
    assert browser.driver.execute_async_script(whole, "window-52") == heads
    browser.open(tmp_path / "report.html", fragment="#window-53-which")
    assert browser.driver.execute_async_script(whole, "window-53") == heads
    browser.js("document.querySelector('#window-53 button.opens').click()")
    browser.js("window.dispatchEvent(new Event('beforeprint'))")
    left = "return [...document.querySelectorAll('.window:not([open])')].map((w) => w.id)"
    assert browser.js(left) == [name for name in packed if name != "window-53"]
    browser.js("window.dispatchEvent(new Event('afterprint'))")
    assert browser.js("return [window.hacked, document.querySelectorAll('img').length]") == [
        None,
        0,
    ]
    assert browser.console() == []
