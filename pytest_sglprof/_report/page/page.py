"""The page of one or more runs: one HTML file without any request, made of results documents."""

from __future__ import annotations

import base64
import hashlib
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any
from urllib.parse import quote

from pytest_sglprof._files import atomic_write
from pytest_sglprof._metrics import WORST_FIRST, worst_word
from pytest_sglprof._report.model import RecordedWindow, Results
from pytest_sglprof._report.page import data as page_data
from pytest_sglprof._report.page import figures
from pytest_sglprof._report.page.baseline import against_baseline, load_of
from pytest_sglprof._report.page.figures import HeatTable, ShownKernel
from pytest_sglprof._report.page.history import PlacedWindow, history
from pytest_sglprof._report.page.jinja import template
from pytest_sglprof._report.series import KernelGroup
from pytest_sglprof._report.terminal import STANDIN_NOTE, window_title

SCRIPTS = (
    "uPlot.iife.min.js",
    "core.js",
    "strip.js",
    "when.js",
    "load.js",
    "which.js",
    "lanes.js",
    "history.js",
    "boot.js",
)
STYLES = ("uPlot.min.css", "page.css")
FIRST_KERNELS = 40  # rows that stand in the page; scripts make the others when they are asked for


@dataclass(frozen=True)
class PageKernels:
    """The kernels of one work group, and their rows as they are shown."""

    group: KernelGroup
    shown: list[ShownKernel]


@dataclass(frozen=True)
class PageArtifact:
    """A link to a file of a window."""

    name: str
    href: str


@dataclass(frozen=True)
class PageWindow(PlacedWindow):
    """A window with all that its part of the page shows. gpus: as rows of a table."""

    title: str
    numbers: list[str]
    maps: list[HeatTable]
    kernels: list[PageKernels]
    artifacts: list[PageArtifact]
    gpus: list[dict[str, object]]
    data: str
    has_lanes: bool


def page(
    documents: Sequence[Results],
    *,
    bases: Sequence[str] = (),
    baseline: Results | None = None,
) -> str:
    """The page as text. documents: results of runs, as `load_results` returns them.

    bases: for each document the folder of its artifacts, relative to the page ("" for the
    same folder). The window that is worst is opened, the others are folded. baseline: results
    of a run that the windows of all others are compared with.
    """
    places = list(bases) or [""] * len(documents)
    windows: list[PageWindow] = []
    for document, base in zip(documents, places, strict=True):
        for window in document.windows:
            windows.append(_window(window, document, base, number=len(windows)))
    by_severity = sorted(windows, key=lambda w: WORST_FIRST.index(w.doc.verdict))
    over_runs = history(documents, windows) if len(documents) > 1 else []
    scripts = [_asset(name) for name in SCRIPTS]
    return template("page.html.j2").render(
        runs=documents,
        windows=windows,
        by_severity=by_severity,
        opened=by_severity[0].anchor if by_severity else "",
        verdict=_worst(documents),
        standin=any(document.summary.standin for document in documents),
        standin_note=STANDIN_NOTE,
        styles="\n".join(_asset(name) for name in STYLES),
        scripts=scripts,
        policy=_policy(scripts),
        history=over_runs,
        history_data=page_data.embedded([one.drawn for one in over_runs]),
        against=_against(baseline, documents, windows) if baseline is not None else None,
        first_kernels=FIRST_KERNELS,
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


def _window(window: RecordedWindow, run: Results, base: str, *, number: int) -> PageWindow:
    kernels = [PageKernels(group, figures.kernel_rows(group)) for group in window.kernels]
    more = [group.shown[FIRST_KERNELS:] for group in kernels]
    return PageWindow(
        doc=window,
        run=run,
        anchor=f"window-{number + 1}",
        load=load_of(window, run),
        title=window_title(window),
        numbers=figures.numbers(window.deciding) if window.deciding else [],
        maps=figures.heat_maps(window),
        kernels=kernels,
        artifacts=[
            PageArtifact(
                file.rank or file.kind, quote(f"{base}/{file.path}" if base else file.path)
            )
            for file in window.artifacts
        ],
        gpus=[asdict(gpu) for gpu in window.gpus],
        data=page_data.embedded(page_data.drawn(window, more)),
        has_lanes=window.lanes is not None and any(step.lanes for step in window.lanes.steps),
    )


def _against(
    baseline: Results, documents: Sequence[Results], windows: Sequence[PageWindow]
) -> dict[str, Any]:
    against = against_baseline(baseline, documents)
    anchors = {id(window.doc): window.anchor for window in windows}
    for pair in against["pairs"]:
        pair["anchor"] = anchors[id(pair["window"])]
    return against


def _worst(documents: Sequence[Results]) -> str | None:
    return worst_word({document.summary.verdict for document in documents})


def _policy(scripts: Sequence[str]) -> str:
    """Only our own scripts run, and nothing is fetched, whatever a name in the page holds."""
    hashes = (hashlib.sha256(script.encode()).digest() for script in scripts)
    allowed = " ".join(f"'sha256-{base64.b64encode(digest).decode()}'" for digest in hashes)
    return f"default-src 'none'; style-src 'unsafe-inline'; img-src data:; script-src {allowed}"


@cache
def _asset(name: str) -> str:
    source = resources.files("pytest_sglprof._report.page").joinpath("assets", name)
    return source.read_text(encoding="utf-8")
