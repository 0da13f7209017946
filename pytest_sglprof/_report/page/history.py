"""Windows of one test and name over several runs: a table, and the charts above it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from pytest_sglprof._analysis.compare import compare_strata
from pytest_sglprof._analysis.imbalance import ImbalanceFinding
from pytest_sglprof._metrics import metrics_of
from pytest_sglprof._report.model import RecordedLoad, RecordedWindow, Results, WindowHead
from pytest_sglprof._report.page.baseline import not_comparable, paired_by
from pytest_sglprof._report.stored import whole

Values = list[float | None]


@dataclass(frozen=True)
class PlacedHead:
    """The head of a window on a page. run: its document. load: the one that ran meanwhile.

    base: folder of its artifacts relative to the page, "" for the same folder. counts: whether it
    is the one that its test is known by (of attempts the last one, of repeats the typical one).
    earlier: those of the same test and name in earlier runs of the page, the oldest first.
    """

    doc: WindowHead
    run: Results
    anchor: str
    load: RecordedLoad | None
    base: str
    counts: bool = True
    earlier: tuple[PlacedHead, ...] = ()


@dataclass(frozen=True)
class PlacedWindow(PlacedHead):
    """A window on a page, with all that was measured.

    others: compute of the work groups that are not shown, since `doc` has been left the worst.
    """

    doc: RecordedWindow
    others: tuple[ImbalanceFinding, ...] = ()


Placed = TypeVar("Placed", bound=PlacedHead)


@dataclass(frozen=True)
class GroupFigures:
    """Compute of one work group. figures: by name of the metric.

    compute_ns: of a step, mean of steps and ranks, ns.
    """

    group: str
    slowest: str | None
    figures: dict[str, float | None]
    compute_ns: float | None


@dataclass(frozen=True)
class Point:
    """One run. rows: its work groups. work: the ratio of equal work to the first run by stage,
    None where it is inconclusive. ttft, tpot: means, ms. output: tokens/s."""

    run: str
    anchor: str
    opened: str
    verdict: str
    rows: tuple[GroupFigures, ...]
    work: dict[str, float | None]
    ttft: float | None
    tpot: float | None
    output: float | None


@dataclass(frozen=True)
class Line:
    """One line of a chart; a value a run."""

    label: str
    values: Values


@dataclass(frozen=True)
class Chart:
    """better: "less" or "more". changes: indices of runs at which a new level begins."""

    title: str
    better: str
    series: tuple[Line, ...]
    changes: tuple[int, ...] = ()


@dataclass(frozen=True)
class RunLabel:
    """A run as the charts label it. is_accepted: None where nothing is ever accepted."""

    run: str
    opened: str
    verdict: str
    is_accepted: bool | None = None


@dataclass(frozen=True)
class DrawnHistory:
    """What the page's script draws."""

    runs: tuple[RunLabel, ...]
    charts: tuple[Chart, ...]


@dataclass(frozen=True)
class History:
    """The windows of one test and name, the oldest run first."""

    nodeid: str
    name: str
    points: tuple[Point, ...]
    stages: tuple[str, ...]
    drawn: DrawnHistory


def history(documents: Sequence[Results], windows: Sequence[PlacedHead]) -> list[History]:
    """One history for each test and window name that occurs in more than one run."""
    by_key = _by_key(documents, windows)
    return [_one(key, same) for key, same in by_key.items() if len(same) > 1]


def with_earlier(documents: Sequence[Results], windows: Sequence[Placed]) -> list[Placed]:
    """The windows, each with those of earlier runs, and whether it counts for its test."""
    earlier: dict[str, tuple[PlacedHead, ...]] = {}
    for same in _by_key(documents, windows).values():
        earlier |= {window.anchor: tuple(same[:at]) for at, window in enumerate(same)}
    return [
        replace(
            window,
            counts=window.anchor in earlier,
            earlier=earlier.get(window.anchor, ()),
        )
        for window in windows
    ]


def _by_key(
    documents: Sequence[Results], windows: Sequence[Placed]
) -> dict[tuple[str, str, int], list[Placed]]:
    """The windows of each test and name, the oldest first."""
    on_page = {id(window.doc): window for window in windows}
    by_key: dict[tuple[str, str, int], list[Placed]] = {}
    for document in documents:
        for key, window in paired_by(document).items():
            by_key.setdefault(key, []).append(on_page[id(window)])
    return {key: sorted(same, key=_opened) for key, same in by_key.items()}


def _opened(window: PlacedHead) -> str:
    return window.doc.opened


def _one(key: tuple[str, str, int], windows: Sequence[PlacedHead]) -> History:
    nodeid, name, _ = key
    points = tuple(_points(windows))
    labels = tuple(RunLabel(point.run, point.opened, point.verdict) for point in points)
    return History(
        nodeid=nodeid,
        name=name,
        points=points,
        stages=tuple(dict.fromkeys(stage for point in points for stage in point.work)),
        drawn=DrawnHistory(labels, _charts(points)),
    )


def _points(windows: Sequence[PlacedHead]) -> Iterator[Point]:
    """One of each run; the first run whose steps are sorted by work is the one to compare with."""
    first: RecordedWindow | None = None
    for window in windows:
        doc = whole(window.doc, window.run)
        first = doc if first is None and doc.strata else first
        yield _point(window, doc, first or doc)


def _point(window: PlacedHead, doc: RecordedWindow, first: RecordedWindow) -> Point:
    load = window.load
    return Point(
        run=window.run.run.id,
        anchor=window.anchor,
        opened=doc.opened,
        verdict=doc.word,
        rows=tuple(
            GroupFigures(
                group=compute.group,
                slowest=compute.slowest,
                figures={row.name: row.read(compute) for row in metrics_of("ranks")},
                compute_ns=_compute_of_a_step(compute),
            )
            for compute in doc.of_scope("compute")
        ),
        work=_equal_work(first, doc),
        ttft=load.ttft.get("mean") if load else None,
        tpot=load.tpot.get("mean") if load else None,
        output=load.output_throughput if load else None,
    )


def _compute_of_a_step(finding: ImbalanceFinding) -> float | None:
    """Mean of steps and ranks, ns."""
    if not finding.compared_steps or not finding.ranks:
        return None
    total = sum(figure.total_ns for figure in finding.ranks)
    return total / len(finding.ranks) / finding.compared_steps


def _equal_work(first: RecordedWindow, window: RecordedWindow) -> dict[str, float | None]:
    """By stage, compute of equal work over that of `first`: of groups the largest ratio."""
    if window is not first and not_comparable(first, window):
        return {}
    ratios: dict[str, float | None] = {}
    for stage in compare_strata(first.strata, window.strata):
        name = stage.stage or "all"
        ratio = stage.compute.ratio if stage.compute else None
        known = [value for value in (ratios.get(name), ratio) if value is not None]
        ratios[name] = max(known, default=None)
    return ratios


def _charts(points: Sequence[Point]) -> tuple[Chart, ...]:
    """Charts with fewer than two known figures are left out."""
    stages = dict.fromkeys(stage for point in points for stage in point.work)
    groups = max(len(point.rows) for point in points)
    worst = ", worst group" if groups > 1 else ""
    work = [Line(stage, [point.work.get(stage) for point in points]) for stage in stages]
    slowdown = [max(_known_slowdowns(point), default=None) for point in points]
    charts = (
        (f"Compute of equal work / first run{worst}", "less", work),
        (f"Slowdown of compute, slowest rank{worst}", "less", [Line("", slowdown)]),
        ("TTFT, mean, ms", "less", [Line("", [point.ttft for point in points])]),
        ("TPOT, mean, ms", "less", [Line("", [point.tpot for point in points])]),
        ("Output tokens/s", "more", [Line("", [point.output for point in points])]),
    )
    known = (
        Chart(title, better, tuple(line for line in lines if _known(line.values) > 1))
        for title, better, lines in charts
    )
    return tuple(chart for chart in known if chart.series)


def _known_slowdowns(point: Point) -> list[float]:
    slowdowns = (row.figures["slowdown"] for row in point.rows)
    return [slowdown for slowdown in slowdowns if slowdown is not None]


def _known(values: Values) -> int:
    return sum(value is not None for value in values)
