"""`python -m ci.pictures [NAME…]`: makes the pictures of the docs from runs on the stand-in.

All randomness of the stand-in has one seed, the screen one size, the page one font; times of
day and latencies differ from one making to the next. Look at each picture before you commit
it. Needs the extra `test`, Chromium with its driver, the font DejaVu Sans, and pdftoppm (package
poppler-utils) for the picture of a print.
"""

from __future__ import annotations

import base64
import io
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Literal, NamedTuple

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from tests.support.browser import Browser, chromium
from tests.support.project import Project

FOLDER = Path(__file__).resolve().parents[1] / "docs" / "images"
MADE_BY = "python -m ci.pictures"  # stands in every picture, as its `Source`
FONT = "DejaVu Sans"
WIDTH, HEIGHT = 1400, 1000  # px
SCREEN = (1400, 900)  # px, of which the first screen of a page is made
PHONE, COLUMN = 420, 1500  # px: its width; the height of the columns that its page is cut into
SHEETS, PRINT_DPI = 4, 64  # of a print, two beside each other
# From the first to the last element and 8 px around them: x, y, right, bottom.
BOX = """
const [first, last] = [...arguments].map((s) => document.querySelector(s).getBoundingClientRect());
return [first.left - 8, first.top - 8, first.right + 8, last.bottom + 8];
"""

SERVER = """
[server]
kind = "standin"
args = ["--tp", "{ranks}"]
standin_args = ["--random-seed", "0", "--step-ms", "{step_ms}"{slow}]

[[threshold]]
limit = 1.10

[[threshold]]
scope = "moe"
limit = 1.10
"""
# Long prompts keep the length of the KV cache within one bucket, whenever the window opens.
TESTS = """
@pytest.mark.profile_window(num_steps=60)
def test_decode(bench_serving):
    bench_serving(num_prompts=4, max_concurrency=4, random_input_len=1100,
                  random_output_len=900, random_range_ratio=1.0, warm_up=False)
"""
LIVES = """
[baseline]
dir = "baselines"

[[threshold]]
metric = "regression"
limit = 1.05

[[threshold]]
metric = "regression"
scope = "moe"
limit = 1.05
"""
ACCEPTED = 9  # nights before the one in which experts are slower
SLOW_EXPERTS = "rank={rank},category=moe,factor={factor}"


class Picture(NamedTuple):
    """What a picture shows: from the first to the last of two elements of a page."""

    page: Callable[[], Path]
    first: str
    last: str
    dark: bool = False


class Whole(NamedTuple):
    """A page as it is seen. seen: on the first screen, all of it, on a phone, or printed."""

    page: Callable[[], Path]
    seen: Literal["screen", "full", "phone", "print"]


@cache
def _runs() -> tempfile.TemporaryDirectory[str]:
    """Where the runs lie until this process ends."""
    return tempfile.TemporaryDirectory(prefix="pictures-")


@cache
def slow_rank() -> Path:
    """The page of a run in which the experts of one rank of eight are slow."""
    return _run("slow", 8, 8, (5, 1.4)) / "report.html"


@cache
def against_baseline() -> Path:
    """The page of a run against one before all experts became slower."""
    before, now = _run("before", 2, 4), _run("now", 2, 4, (0, 1.3), (1, 1.3))
    return _report(now, "--baseline", before)


@cache
def seven_nights() -> Path:
    """The page of seven runs; in the last two experts are slower, on TP1 most."""
    slower = ((0, 1.1), (1, 1.4))
    nights = [_run(f"night-{at}", 2, 4, *(slower if at > 5 else ())) for at in range(1, 8)]
    return _report(*nights)


@cache
def slower_night() -> Path:
    """The page of a night with slower experts, after nights that were accepted."""
    folder = Path(_runs().name) / "nights"
    noise = ', "--life-noise", "0.005"'
    config = SERVER.format(ranks=2, step_ms=4, slow=noise) + LIVES
    for _ in range(ACCEPTED):
        Project(folder, TESTS, config).run("--sglprof-accept=all")
    slow = f', "--slow", "{SLOW_EXPERTS.format(rank="all", factor=1.12)}"'
    config = SERVER.format(ranks=2, step_ms=4, slow=noise + slow) + LIVES
    return Project(folder, TESTS, config).run().run_folder / "report.html"


PICTURES: dict[str, Picture | Whole] = {
    "failing": Whole(slow_rank, "screen"),
    "failing-full": Whole(slow_rank, "full"),
    "failing-phone": Whole(slow_rank, "phone"),
    "failing-print": Whole(slow_rank, "print"),
    "who-when": Picture(slow_rank, "details[open] .who", "details[open] .when"),
    "dark": Picture(slow_rank, "details[open] .who", "details[open] .when", dark=True),
    "lanes": Picture(slow_rank, "details[open] .lanes", "details[open] .lanes"),
    "baseline": Picture(against_baseline, "#h-baseline", "#baseline details.stage"),
    "nights": Picture(slower_night, ".regression h3", ".regression .scanned"),
    "history": Picture(seven_nights, "#history", "#history"),
}


def main(names: Sequence[str]) -> int:
    """Makes the named pictures, or all."""
    if unknown := set(names) - PICTURES.keys():
        sys.exit(f"no such picture: {', '.join(unknown)}; there are {', '.join(PICTURES)}")
    with chromium() as browser:
        for name in names or PICTURES:
            picture = PICTURES[name]
            if isinstance(picture, Whole):
                image = _whole(browser, picture)
            else:
                image = _photograph(browser, picture)
            _save(image, FOLDER / f"{name}.png")
            print(FOLDER / f"{name}.png", flush=True)
    return 0


def _run(name: str, ranks: int, step_ms: int, *slow: tuple[int, float]) -> Path:
    """The folder of a run on a stand-in in which these ranks are slower by these factors."""
    faults = [SLOW_EXPERTS.format(rank=rank, factor=factor) for rank, factor in slow]
    words = "".join(f', "--slow", "{fault}"' for fault in faults)
    config = SERVER.format(ranks=ranks, step_ms=step_ms, slow=words)
    return Project(Path(_runs().name) / name, TESTS, config).run().run_folder


def _report(*words: object) -> Path:
    page = Path(_runs().name) / f"report-{len(words)}.html"
    command = [sys.executable, "-m", "pytest_sglprof", "report", *map(str, words), "-o", str(page)]
    subprocess.run(command, check=True)
    return page


def _photograph(browser: Browser, picture: Picture) -> Image.Image:
    _screen(browser, WIDTH, HEIGHT)
    browser.open(picture.page(), dark=picture.dark)
    browser.js(f"document.body.style.fontFamily = '{FONT}'")
    browser.draw_all()
    # A screen that holds the whole page: else it is laid out anew for the picture alone.
    _screen(browser, WIDTH, browser.js("return document.documentElement.scrollHeight"))
    browser.draw_all()
    x, y, right, bottom = browser.js(BOX, picture.first, picture.last)
    return _captured(browser, (x, y, right - x, bottom - y))


def _whole(browser: Browser, picture: Whole) -> Image.Image:
    """Nothing is opened or scrolled: what is not there by itself is missing in the picture.

    Without the commands at the end of the page, which have paths of this machine.
    """
    width, height = (PHONE, SCREEN[1]) if picture.seen == "phone" else SCREEN
    _screen(browser, width, height)
    browser.open(picture.page())
    browser.js(f"document.body.style.fontFamily = '{FONT}'; return sglprof.allLoaded")
    browser.js("document.getElementById('about').remove()")
    if picture.seen == "print":
        return _printed(browser)
    if picture.seen != "screen":
        height = browser.js("return document.documentElement.scrollHeight")
    shot = _captured(browser, (0, 0, width, height))
    return _beside([*_cut(shot)]) if picture.seen == "phone" else shot


def _printed(browser: Browser) -> Image.Image:
    """The first sheets, two beside each other."""
    options = {"printBackground": True, "preferCSSPageSize": True}
    pdf = browser.driver.execute_cdp_cmd("Page.printToPDF", options)["data"]
    with tempfile.TemporaryDirectory() as folder:
        command = ["pdftoppm", "-png", "-r", str(PRINT_DPI), "-l", str(SHEETS), "-", "sheet"]
        subprocess.run(command, input=base64.b64decode(pdf), cwd=folder, check=True)
        sheets = [
            Image.open(io.BytesIO(path.read_bytes())) for path in sorted(Path(folder).iterdir())
        ]
    rows = [_beside(sheets[at : at + 2]) for at in range(0, len(sheets), 2)]
    whole = Image.new("RGB", (rows[0].width, sum(row.height for row in rows)), "gray")
    for at, row in enumerate(rows):
        whole.paste(row, (0, at * rows[0].height))
    return whole


def _cut(image: Image.Image) -> Iterator[Image.Image]:
    """Columns of a high picture, from the top."""
    for top in range(0, image.height, COLUMN):
        yield image.crop((0, top, image.width, min(top + COLUMN, image.height)))


def _beside(images: Sequence[Image.Image], gap: int = 12) -> Image.Image:
    width = sum(image.width + gap for image in images) - gap
    whole = Image.new("RGB", (width, max(image.height for image in images)), "gray")
    left = 0
    for image in images:
        whole.paste(image, (left, 0))
        left += image.width + gap
    return whole


def _captured(browser: Browser, box: tuple[float, float, float, float]) -> Image.Image:
    """box: x, y, width and height on the page, px; what is beyond the screen is captured, too."""
    clip = dict(zip(("x", "y", "width", "height"), box, strict=True)) | {"scale": 1}
    options = {"clip": clip, "captureBeyondViewport": True}
    shot = browser.driver.execute_cdp_cmd("Page.captureScreenshot", options)
    return Image.open(io.BytesIO(base64.b64decode(shot["data"])))


def _screen(browser: Browser, width: int, height: int) -> None:
    browser.driver.execute_cdp_cmd("Emulation.setScrollbarsHidden", {"hidden": True})
    size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
    browser.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)


def _save(image: Image.Image, path: Path) -> None:
    text = PngInfo()
    text.add_text("Source", MADE_BY)
    image.convert("RGB").quantize(256).save(path, optimize=True, pnginfo=text)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
