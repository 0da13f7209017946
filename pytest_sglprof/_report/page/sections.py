"""The sections of a page: each is one row that names its data, its template and its scripts.

`SECTIONS` are shown once in the page, `WINDOW_SECTIONS` in every window, in the order of the
rows. A new section is a row here, a file in `templates/` and, where it draws, a file in `assets/`
that sets `sglprof.parts[NAME]` for its `data-part="NAME"`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Generic, TypeVar
from urllib.parse import quote

from markupsafe import Markup

from pytest_sglprof._metrics import WORST_FIRST
from pytest_sglprof._report.model import RecordedTest, Results
from pytest_sglprof._report.page import data
from pytest_sglprof._report.page.baseline import Against, Pair, against_baseline
from pytest_sglprof._report.page.figures import (
    HeatTable,
    ShownKernel,
    heat_maps,
    kernel_rows,
    stragglers,
)
from pytest_sglprof._report.page.history import History, PlacedHead, PlacedWindow, history
from pytest_sglprof._report.page.lead import lead
from pytest_sglprof._report.page.moments import moments
from pytest_sglprof._report.page.regression import regression_picture
from pytest_sglprof._report.page.roles import role_rows
from pytest_sglprof._report.page.sync import sync_pictures
from pytest_sglprof._report.series import KernelGroup
from pytest_sglprof._report.terminal import cost_lines

WHOLE_WINDOWS = 50  # of a page, the worst ones; the content of the others is unpacked by scripts
FIRST_KERNELS = 40  # rows that stand in the page; scripts make the others when they are asked for

Subject = TypeVar("Subject")


@dataclass(frozen=True)
class Section(Generic[Subject]):
    """One section of a page or of a window.

    name: of the section; where one of `SECTIONS` has `drawn`, also the id of its element.
    template: file in `templates/`, which finds the content as `section.content`. content: what
    the template places; a section whose content is None is not shown. scripts: files in
    `assets/`. drawn: what its script gets, made of the subject and the content; for a window
    by keys, which no other section of windows has.
    """

    name: str
    template: str
    content: Callable[[Subject], Any]
    scripts: tuple[str, ...] = ()
    drawn: Callable[[Subject, Any], Any] | None = None

    def shown(self, subject: Subject) -> ShownSection | None:
        """The section of this subject; None where it has nothing to show."""
        content = self.content(subject)
        if content is None:
            return None
        drawn = None if self.drawn is None else self.drawn(subject, content)
        return ShownSection(self.name, self.template, content, drawn)


@dataclass(frozen=True)
class ShownSection:
    """A section with its content. drawn: for its script, None where it needs no data."""

    name: str
    template: str
    content: Any
    drawn: Any


@dataclass(frozen=True, kw_only=True)
class PageWindow(PlacedHead):
    """A window as the page has it.

    content: what stands below its summary, None where `data` has it as well. data: what scripts
    draw of it, packed.
    """

    title: str
    reason: str
    opened: bool
    content: Markup | None
    data: str

    @property
    def is_failure(self) -> bool:
        """Whether its test failed by it."""
        return self.counts and self.doc.verdict == "fail"


@dataclass(frozen=True)
class PageRuns:
    """What a page is about. baseline: the run that the others are compared with, if any."""

    runs: Sequence[Results]
    windows: Sequence[PageWindow]
    baseline: Results | None


def is_long(windows: Sequence[PlacedHead]) -> bool:
    """Whether a page of these is one of many windows, which begins with the list of them."""
    return len(windows) > WHOLE_WINDOWS


def all_shown(rows: Sequence[Section[Subject]], subject: Subject) -> tuple[ShownSection, ...]:
    """Those of the sections that have something to show."""
    sections = (row.shown(subject) for row in rows)
    return tuple(section for section in sections if section is not None)


def window_data(window: PlacedWindow, sections: Sequence[ShownSection]) -> dict[str, Any]:
    """What scripts draw of a window: its id and onset, and the data of its sections."""
    merged: dict[str, Any] = {"id": window.doc.id, "onset": data.onset(window.doc)}
    for section in sections:
        drawn: Mapping[str, Any] = section.drawn or {}
        if same := merged.keys() & drawn.keys():
            raise ValueError(f"section {section.name} sets {sorted(same)}, which is already set")
        merged |= drawn
    return merged


# Sections of a window.


@dataclass(frozen=True)
class PageKernels:
    """The kernels of one work group. first: rows in the page. rest: rows that a script adds."""

    group: KernelGroup
    first: list[ShownKernel]
    rest: list[ShownKernel]


@dataclass(frozen=True)
class PageArtifact:
    """A link to a file of a window."""

    name: str
    href: str


@dataclass(frozen=True)
class Facts:
    """What else is known of a window. gpus: as rows of a table. cost: a sentence, "" if none."""

    artifacts: list[PageArtifact]
    gpus: list[dict[str, object]]
    cost: str


def _heat_maps(window: PlacedWindow) -> list[HeatTable] | None:
    return heat_maps(window.doc) or None


def _has_steps(window: PlacedWindow) -> bool | None:
    """Whether times can be laid out by step; None where no ranks were compared either."""
    if window.doc.step_times:
        return True
    return False if window.doc.of_scope("compute") else None


def _kernels(window: PlacedWindow) -> list[PageKernels] | None:
    groups = [(group, kernel_rows(group)) for group in window.doc.kernels]
    return [
        PageKernels(group, rows[:FIRST_KERNELS], rows[FIRST_KERNELS:]) for group, rows in groups
    ] or None


def _has_lanes(window: PlacedWindow) -> bool | None:
    lanes = window.doc.lanes
    return True if lanes is not None and any(step.lanes for step in lanes.steps) else None


def _facts(window: PlacedWindow) -> Facts:
    return Facts(
        artifacts=[
            PageArtifact(
                file.rank or file.kind,
                quote(f"{window.base}/{file.path}" if window.base else file.path),
            )
            for file in window.doc.artifacts
        ],
        gpus=[asdict(gpu) for gpu in window.doc.gpus],
        cost="".join(cost_lines([window.doc])).partition(": ")[2],
    )


WINDOW_SECTIONS: tuple[Section[PlacedWindow], ...] = (
    Section("lead", "lead.html.j2", lead),
    Section(
        "regression",
        "regression.html.j2",
        lambda window: regression_picture(window.doc.regression),
    ),
    Section("sync", "sync.html.j2", lambda window: sync_pictures(window.doc.syncs or ())),
    Section("who", "who.html.j2", _heat_maps),
    Section(
        "when",
        "when.html.j2",
        _has_steps,
        scripts=("when.js",),
        drawn=lambda window, _: {"series": data.step_times(window.doc)},
    ),
    Section("straggler", "straggler.html.j2", lambda window: stragglers(window.doc) or None),
    Section(
        "which",
        "which.html.j2",
        _kernels,
        scripts=("which.js",),
        drawn=lambda window, kernels: {
            "kernels": data.kernels(window.doc),
            "more": [group.rest for group in kernels],
        },
    ),
    Section("sources", "sources.html.j2", lambda window: window.doc.sources),
    Section(
        "load",
        "load.html.j2",
        lambda window: window.doc.load_samples or None,
        scripts=("load.js",),
        drawn=lambda window, _: {"load": window.doc.load_samples},
    ),
    Section(
        "lanes",
        "lanes.html.j2",
        _has_lanes,
        scripts=("lanes.js",),
        drawn=lambda window, _: {"lanes": data.lanes(window.doc)},
    ),
    Section("facts", "facts.html.j2", _facts),
)


# Sections of the page.


@dataclass(frozen=True)
class Verdicts:
    """rows: the worst window first. without_window: tests that opened none.

    is_long: the rows do not fit on a screen.
    """

    rows: list[PageWindow]
    without_window: list[RecordedTest]
    is_long: bool


@dataclass(frozen=True)
class AnchoredPair:
    """A pair, and the anchor of its window in this page."""

    pair: Pair
    anchor: str


@dataclass(frozen=True)
class BaselineSection:
    """pairs: those of `against`, with anchors."""

    against: Against
    pairs: list[AnchoredPair]


def _verdicts(page: PageRuns) -> Verdicts:
    judged = [window for window in page.windows if window.doc.is_judged]
    return Verdicts(
        rows=sorted(judged, key=lambda w: WORST_FIRST.index(w.doc.verdict)),
        without_window=[test for run in page.runs for test in run.tests if test.verdict is None],
        is_long=is_long(page.windows),
    )


def _baseline(page: PageRuns) -> BaselineSection | None:
    if page.baseline is None:
        return None
    anchors = {id(window.doc): window.anchor for window in page.windows}
    against = against_baseline(page.baseline, page.runs)
    return BaselineSection(
        against, [AnchoredPair(pair, anchors[id(pair.window)]) for pair in against.pairs]
    )


def _history(page: PageRuns) -> list[History] | None:
    return (history(page.runs, page.windows) or None) if len(page.runs) > 1 else None


def _failing(page: PageRuns) -> list[PageWindow] | None:
    """Of several runs the newest first."""
    newest = sorted(page.windows, key=lambda w: w.run.run.started or "", reverse=True)
    return [w for w in newest if w.is_failure] or None


def _others(page: PageRuns) -> list[PageWindow] | None:
    return [w for w in page.windows if not w.is_failure] or None


SECTIONS: tuple[Section[PageRuns], ...] = (
    Section("roles", "roles.html.j2", lambda page: role_rows(page.windows) or None),
    Section("failing", "windows.html.j2", _failing),
    Section("moments", "moments.html.j2", lambda page: moments(page.windows) or None),
    Section(
        "history",
        "history.html.j2",
        _history,
        scripts=("history.js",),
        drawn=lambda _, histories: [one.drawn for one in histories],
    ),
    Section("baseline", "baseline.html.j2", _baseline),
    Section("verdicts", "verdicts.html.j2", _verdicts),
    Section("windows", "windows.html.j2", _others),
    Section("about", "about.html.j2", lambda page: page.runs),
)
