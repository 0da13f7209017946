"""The page of one or more runs: one HTML file without any request, made of results documents."""

from __future__ import annotations

import base64
import hashlib
import os
import re
from collections.abc import Mapping, Sequence
from functools import cache, partial
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from pytest_sglprof.files import atomic_write
from pytest_sglprof.gate.wording import count, duration, milliseconds, percent, ratio
from pytest_sglprof.metrics import METRICS, Metric, metrics_of
from pytest_sglprof.report import page_data, page_figures
from pytest_sglprof.report.baseline import against_baseline
from pytest_sglprof.report.history import history
from pytest_sglprof.report.terminal import STANDIN_NOTE, window_title
from pytest_sglprof.values import WORST_FIRST, worst_word

if TYPE_CHECKING:
    from jinja2 import Environment

Document = Mapping[str, Any]

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
SIGNS = {"pass": "✓", "fail": "✗", "inconclusive": "?"}
NONE = "–"  # where there is no figure
FIRST_KERNELS = 40  # rows that stand in the page; scripts make the others when they are asked for


def page(
    documents: Sequence[Document],
    *,
    bases: Sequence[str] = (),
    baseline: Document | None = None,
) -> str:
    """The page as text. documents: results of runs, as `load_results` returns them.

    bases: for each document the folder of its artifacts, relative to the page ("" for the
    same folder). The window that is worst is opened, the others are folded. baseline: results
    of a run that the windows of all others are compared with.
    """
    places = list(bases) or [""] * len(documents)
    runs: list[dict[str, Any]] = []
    windows: list[dict[str, Any]] = []
    for document, base in zip(documents, places, strict=True):
        runs.append({"run": document})
        for window in document["windows"]:
            windows.append(_window(window, document, base, number=len(windows)))
    opened = min(windows, key=lambda w: WORST_FIRST.index(w["doc"]["verdict"]), default=None)
    over_runs = history(documents, windows) if len(documents) > 1 else []
    scripts = [_asset(name) for name in SCRIPTS]
    return (
        _environment()
        .get_template("page.html.j2")
        .render(
            runs=runs,
            windows=windows,
            by_severity=sorted(windows, key=lambda w: WORST_FIRST.index(w["doc"]["verdict"])),
            opened=opened["anchor"] if opened else "",
            verdict=_worst(documents),
            standin=any(document["summary"]["standin"] for document in documents),
            standin_note=STANDIN_NOTE,
            styles="\n".join(_asset(name) for name in STYLES),
            scripts=scripts,
            policy=_policy(scripts),
            history=over_runs,
            history_data=page_data.embedded([one["drawn"] for one in over_runs]),
            against=_against(baseline, documents, windows) if baseline is not None else None,
        )
    )


def write_page(
    documents: Sequence[Document],
    folders: Sequence[Path],
    path: Path,
    *,
    baseline: Document | None = None,
) -> None:
    """Writes the page whole or not at all. folders: where each document's artifacts lie."""
    bases = [os.path.relpath(folder, path.parent) for folder in folders]
    bases = ["" if base == "." else Path(base).as_posix() for base in bases]
    atomic_write(path, page(documents, bases=bases, baseline=baseline))


def _window(window: Document, run: Document, base: str, *, number: int) -> dict[str, Any]:
    decisive = window["decisive"]
    judgement = window["judgements"][decisive] if decisive is not None else None
    kernels = [
        {**group, "shown": page_figures.kernel_rows(group)} for group in window.get("kernels") or ()
    ]
    more = [group["shown"][FIRST_KERNELS:] for group in kernels]
    load = next((item for item in run["loads"] if item["id"] == window["load"]), None)
    return {
        "doc": window,
        "run": run,
        "anchor": f"window-{number + 1}",
        "title": window_title(window),
        "numbers": page_figures.numbers(judgement) if judgement else [],
        "decided": judgement,
        "maps": page_figures.heat_maps(window),
        "kernels": kernels,
        "artifacts": [
            {**artifact, "href": quote(f"{base}/{artifact['path']}" if base else artifact["path"])}
            for artifact in window["artifacts"]
        ],
        "load": load,
        "data": page_data.embedded({**page_data.drawn(window), "more": more}),
        "has_steps": bool(window.get("step_times")),
        "has_lanes": any(p["lanes"] for p in (window.get("lanes") or {}).get("steps", ())),
    }


def _against(
    baseline: Document, documents: Sequence[Document], windows: Sequence[Document]
) -> dict[str, Any]:
    found = against_baseline(baseline, documents)
    anchors = {id(window["doc"]): window["anchor"] for window in windows}
    for pair in found["pairs"]:
        pair["anchor"] = anchors[id(pair["window"])]
    return found


def _worst(documents: Sequence[Document]) -> str | None:
    return worst_word({document["summary"]["verdict"] for document in documents})


def _policy(scripts: Sequence[str]) -> str:
    """Only our own scripts run, and nothing is fetched, whatever a name in the page holds."""
    hashes = (hashlib.sha256(script.encode()).digest() for script in scripts)
    allowed = " ".join(f"'sha256-{base64.b64encode(digest).decode()}'" for digest in hashes)
    return f"default-src 'none'; style-src 'unsafe-inline'; img-src data:; script-src {allowed}"


def _moment(text: str | None) -> str:
    """`2026-11-24 14:35:51 UTC` of what stands in results; other texts as they are."""
    found = re.fullmatch(r"(\d{4}-\d\d-\d\d)T(\d\d:\d\d:\d\d)(?:\.\d+)?Z", text or "")
    return f"{found[1]} {found[2]} UTC" if found else text or ""


def _figure(metric: Metric, value: float | None) -> str:
    return metric.format(value, finer=1, none=NONE)


def _column(text: str) -> str:
    """`text` as wide as five digits, so that figures beside each other line up."""
    return text.rjust(5, "\u2007")


@cache
def _asset(name: str) -> str:
    source = resources.files("pytest_sglprof.report").joinpath("assets", name)
    return source.read_text(encoding="utf-8")


@cache
def _environment() -> Environment:
    from jinja2 import Environment, PackageLoader

    environment = Environment(
        loader=PackageLoader("pytest_sglprof.report", "templates"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "ms": milliseconds,
        "duration": duration,
        "percent": partial(percent, none=NONE),
        "ratio": partial(ratio, none=NONE),
        "column": _column,
        "moment": _moment,
    }
    environment.globals |= {
        "signs": SIGNS,
        "count": count,
        "first_kernels": FIRST_KERNELS,
        "metrics": METRICS,
        "metrics_of": metrics_of,
        "figure": _figure,
    }
    return environment
