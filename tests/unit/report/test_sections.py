"""The rows of the page's sections: their files exist, and their data do not collide."""

from __future__ import annotations

from pathlib import Path

import pytest

import pytest_sglprof
from pytest_sglprof._report.page.history import PlacedWindow
from pytest_sglprof._report.page.page import SCRIPTS, page
from pytest_sglprof._report.page.sections import (
    SECTIONS,
    WINDOW_SECTIONS,
    ShownSection,
    window_data,
)
from tests.support.windows import SLOW, as_run, run, window

PAGE = Path(pytest_sglprof.__file__).parent / "_report" / "page"
ROWS = (*SECTIONS, *WINDOW_SECTIONS)


def test_every_section_has_its_files_and_every_file_its_section() -> None:
    templates = {row.template for row in ROWS}
    here = {path.name for path in (PAGE / "templates").glob("*.j2")}
    frames = {"layout.html.j2", "page.html.j2", "nights.html.j2", "window.html.j2"}
    assert here == templates | frames
    assert {path.name for path in (PAGE / "assets").glob("*.js")} == set(SCRIPTS)
    assert len({row.name for row in ROWS}) == len(ROWS)


def test_every_shown_section_stands_in_the_page_once() -> None:
    text = page([as_run(run([window(SLOW)]))])
    for name in ("who", "when", "which", "load", "lanes"):
        shown = text.count(f'<section class="{name}"')
        assert shown == (0 if name == "load" else 1)
    assert text.count('<dl class="lead">') == 1
    assert text.count('<section id="verdicts"') == text.count('<section id="about"') == 1


def test_two_sections_cannot_set_the_same_data() -> None:
    document = as_run(run([window(SLOW)]))
    placed = PlacedWindow(document.windows[0], document, "window-1", None, "")
    one = ShownSection("one", "one.html.j2", True, {"series": []})
    other = ShownSection("other", "other.html.j2", True, {"series": []})
    assert window_data(placed, [one])["series"] == []
    with pytest.raises(ValueError, match=r"sets \['series'\], which is already set"):
        window_data(placed, [one, other])
