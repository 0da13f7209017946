"""The page of one or more runs: one HTML file without any request, made of results documents."""

from __future__ import annotations

import base64
import hashlib
import os
from collections.abc import Sequence
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from pytest_sglprof._files import atomic_write
from pytest_sglprof._metrics import WORST_FIRST, worst_word
from pytest_sglprof._report.model import RecordedWindow, Results
from pytest_sglprof._report.page.baseline import load_of
from pytest_sglprof._report.page.data import embedded
from pytest_sglprof._report.page.history import PlacedWindow, with_earlier
from pytest_sglprof._report.page.jinja import template
from pytest_sglprof._report.page.sections import (
    SECTIONS,
    WINDOW_SECTIONS,
    PageRuns,
    PageWindow,
    all_shown,
    window_data,
)
from pytest_sglprof._report.terminal import STANDIN_NOTE, window_title
from pytest_sglprof._verdict.wording import count

SCRIPTS = (
    *("uPlot.iife.min.js", "core.js", "strip.js"),
    *(script for window_row in WINDOW_SECTIONS for script in window_row.scripts),
    *(script for row in SECTIONS for script in row.scripts),
    "boot.js",
)
STYLES = ("uPlot.min.css", "page.css")


def page(
    documents: Sequence[Results],
    *,
    bases: Sequence[str] = (),
    baseline: Results | None = None,
) -> str:
    """The page as text. documents: results of runs, as `load_results` returns them.

    bases: for each document the folder of its artifacts, relative to the page ("" for the
    same folder). Windows that fail are opened, without any the worst one; the others are
    folded. baseline: results of a run that the windows of all others are compared with.
    """
    placed = with_earlier(documents, _placed(documents, list(bases) or [""] * len(documents)))
    failing = [window for window in placed if window.counts and window.doc.verdict == "fail"]
    worst = sorted(placed, key=lambda w: WORST_FIRST.index(w.doc.verdict))
    opened = {window.anchor for window in failing or worst[:1]}
    windows = [_window(window, opened=window.anchor in opened) for window in placed]
    sections = all_shown(SECTIONS, PageRuns(documents, windows, baseline))
    data = {one.name: embedded(one.drawn) for one in sections if one.drawn is not None}
    return rendered(
        "page.html.j2",
        scripts=SCRIPTS,
        runs=documents,
        verdict=_worst(documents),
        counts=_counts(documents),
        standin=any(document.summary.standin for document in documents),
        standin_note=STANDIN_NOTE,
        sections=sections,
        data=data | {window.anchor: window.data for window in windows},
    )


def rendered(name: str, *, scripts: Sequence[str], data: dict[str, str], **values: Any) -> str:
    """A page from a template that extends `layout.html.j2`. data: packed, by their element's id."""
    sources = [_asset(script) for script in scripts]
    return template(name).render(
        styles="\n".join(_asset(style) for style in STYLES),
        scripts=sources,
        policy=_policy(sources),
        data=data,
        **values,
    )


def write_page(
    documents: Sequence[Results],
    folders: Sequence[Path],
    path: Path,
    *,
    baseline: Results | None = None,
) -> None:
    """Writes the page whole or not at all. folders: where each document's artifacts lie."""
    bases = [os.path.relpath(folder, path.parent) for folder in folders]
    bases = ["" if base == "." else Path(base).as_posix() for base in bases]
    atomic_write(path, page(documents, bases=bases, baseline=baseline))


def _placed(documents: Sequence[Results], bases: Sequence[str]) -> list[PlacedWindow]:
    windows = (
        (window, document, base)
        for document, base in zip(documents, bases, strict=True)
        for window in document.windows
    )
    return [
        PlacedWindow(window, document, f"window-{number}", load_of(window, document), base)
        for number, (window, document, base) in enumerate(windows, 1)
    ]


def _window(window: PlacedWindow, *, opened: bool) -> PageWindow:
    sections = all_shown(WINDOW_SECTIONS, window)
    return PageWindow(
        doc=window.doc,
        run=window.run,
        anchor=window.anchor,
        load=window.load,
        base=window.base,
        counts=window.counts,
        earlier=window.earlier,
        reason=_reason(window.doc),
        title=window_title(window.doc),
        opened=opened,
        sections=sections,
        data=embedded(window_data(window, sections)),
    )


def _reason(window: RecordedWindow) -> str:
    """Why it has its verdict; of windows opened together, the typical one has that of them all."""
    repeats = window.repeats
    alone = repeats is not None and repeats.typical != window.id
    return repeats.own_reason if repeats is not None and alone else window.reason


def _worst(documents: Sequence[Results]) -> str | None:
    return worst_word({document.summary.verdict for document in documents})


def _counts(documents: Sequence[Results]) -> str:
    """`3 windows: 1 fail, 2 pass`."""
    every = [document.summary.windows for document in documents]
    numbers = {
        "fail": sum(one.fail for one in every),
        "inconclusive": sum(one.inconclusive for one in every),
        "pass": sum(one.passed for one in every),
    }
    parts = [f"{number} {word}" for word, number in numbers.items() if number]
    windows = count(sum(numbers.values()), "window")
    return f"{windows}: {', '.join(parts)}" if parts else windows


def _policy(scripts: Sequence[str]) -> str:
    """Only our own scripts run, and nothing is fetched, whatever a name in the page holds."""
    hashes = (hashlib.sha256(script.encode()).digest() for script in scripts)
    allowed = " ".join(f"'sha256-{base64.b64encode(digest).decode()}'" for digest in hashes)
    return f"default-src 'none'; style-src 'unsafe-inline'; img-src data:; script-src {allowed}"


@cache
def _asset(name: str) -> str:
    source = resources.files("pytest_sglprof._report.page").joinpath("assets", name)
    return source.read_text(encoding="utf-8")
