"""The figures of a window's tables, computed here so that templates only place them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from pytest_sglprof._analysis.imbalance import ImbalanceFinding
from pytest_sglprof._analysis.straggler import StragglerFinding
from pytest_sglprof._baselines.figures import IDLE_SHARE, Figure
from pytest_sglprof._metrics import METRICS, metrics_of
from pytest_sglprof._report.heat_map import ScopeTimes, scope_times
from pytest_sglprof._report.model import RecordedWindow
from pytest_sglprof._report.page.jinja import (
    NONE,
    figure_alone,
    head_unit,
    in_microseconds,
    in_percent,
)
from pytest_sglprof._report.series import KernelGroup, KernelSpread
from pytest_sglprof._trace.categories import NOT_COMPUTE
from pytest_sglprof._verdict.wording import count, milliseconds, ratio

# A cell's shade says how far above the group's mean it is, on the same scale in every page.
SHADES = (1.01, 1.02, 1.05, 1.10, 1.20, 1.35, 1.60)
MAX_NAME = 120
MIN_SHADED = 0.01  # of the lost time of all kernels
LEAST_CAUSE = 0.01  # of a straggler's lateness
NOT_KNOWN = "not known"
NOBODY = "nobody"
LEAST_SHOWN_NS = 500  # less is 0.000 ms
EXPLAINING = 3  # kernels that stand beside a straggler
MOST_RANKS = 64  # of a table; then the slowest come first, and the others when they are asked for


def shade(ratio: float | None) -> int:
    """0 (at or below the mean) to 7 (1.6 times the mean or more)."""
    return 0 if ratio is None else sum(ratio >= limit for limit in SHADES)


@dataclass(frozen=True)
class HeatCell:
    """ns: busy time. ratio: over the mean of the group. top: the slowest of its column."""

    ns: int
    ratio: float | None
    shade: int
    top: bool


@dataclass(frozen=True)
class RankWaits:
    """Waiting of one rank in matched collectives. ratio: over the mean of its group.

    share: of its time in communication. least: it waits so little that it arrives last.
    """

    wait_ns: int
    communication_ns: int
    ratio: float | None
    share: float | None
    shade: int
    least: bool


@dataclass(frozen=True)
class HeatRow:
    """One rank. mark: "straggler" where arrivals at collectives name this rank, "slowest" where
    a verdict does, else "": a rank that is slowest by chance is not pointed at. is_more: shown
    when it is asked for."""

    rank: str
    mark: str
    slowest_share: float | None
    cells: tuple[HeatCell, ...]
    waits: RankWaits | None
    is_more: bool


@dataclass(frozen=True)
class HeatColumn:
    """A scope. compute: time in it is work, not waiting."""

    scope: str
    compute: bool


@dataclass(frozen=True)
class FigureCell:
    """A metric of one column. beside: the same thing measured another way, or ""."""

    text: str
    beside: str


@dataclass(frozen=True)
class FigureLine:
    """A line below the ranks: one metric of every column. is_more: shown when it is asked for."""

    label: str
    cells: tuple[FigureCell, ...]
    is_more: bool


@dataclass(frozen=True)
class HeatTable:
    """Rank x category of one work group. span: which time the table is about."""

    group: str
    reason: str
    span: str
    columns: tuple[HeatColumn, ...]
    figures: tuple[FigureLine, ...]
    rows: tuple[HeatRow, ...]
    has_waits: bool


def heat_maps(window: RecordedWindow) -> list[HeatTable]:
    """For each work group its table of time relative to the group's mean.

    Ranks without a peer are left out where the page shows what they cost each other (`syncs`).
    """
    groups = window.of_scope("compute")
    return [_heat_table(window, each) for each in groups if not window.syncs or len(each.ranks) > 1]


def _heat_table(window: RecordedWindow, compute: ImbalanceFinding) -> HeatTable:
    group = compute.group
    ranks = [figure.rank for figure in compute.ranks]
    waits = _waits(window, group, ranks)
    late = straggler(window, group)
    mark = "straggler" if late else "slowest"
    late = late or _judged_slow(window, group)
    shown = [
        times
        for times in scope_times(window, group)
        if times.mean or times.finding.scope == "compute"
    ]
    ordered = list(compute.ranks)
    if len(ordered) > MOST_RANKS:
        ordered.sort(key=lambda figure: (figure.rank != late, -figure.busy_ns))
    return HeatTable(
        group=group,
        reason=compute.reason,
        span=_span(compute),
        columns=tuple(
            HeatColumn(times.finding.scope, times.finding.scope not in NOT_COMPUTE)
            for times in shown
        ),
        figures=_figures([times.finding for times in shown], _headline(window)),
        rows=tuple(
            HeatRow(
                rank=figure.rank,
                mark=mark if figure.rank == late else "",
                slowest_share=figure.slowest_share,
                cells=tuple(_heat_cell(times, figure.rank) for times in shown),
                waits=waits.get(figure.rank),
                is_more=at >= MOST_RANKS,
            )
            for at, figure in enumerate(ordered)
        ),
        has_waits=bool(waits),
    )


def _headline(window: RecordedWindow) -> str:
    """The metric of ranks that decided, else the one that markers have by default."""
    decided = window.deciding.threshold.metric if window.deciding is not None else ""
    metric = METRICS.get(decided)
    return decided if metric is not None and metric.of == "ranks" else "slowdown"


def _figures(findings: Sequence[ImbalanceFinding], headline: str) -> tuple[FigureLine, ...]:
    return tuple(
        FigureLine(
            metric.label.capitalize() + head_unit(metric),
            tuple(
                FigureCell(
                    figure_alone(metric, metric.read(finding)),
                    _beside(metric.name, finding),
                )
                for finding in findings
            ),
            is_more=metric.name != headline,
        )
        for metric in metrics_of("ranks")
        if not metric.across or any(metric.read(finding) is not None for finding in findings)
    )


def _beside(metric: str, finding: ImbalanceFinding) -> str:
    if metric == "lost_share":
        return milliseconds(finding.lost_ns)
    known = metric == "imbalance_factor" and finding.factor_sync is not None
    return f"sync {ratio(finding.factor_sync, 3)}" if known else ""


def _heat_cell(times: ScopeTimes, rank: str) -> HeatCell:
    ratio = times.ratio(rank) if len(times.ns) > 1 else None
    compared = times.finding.scope not in NOT_COMPUTE
    every = list(times.ns.values())
    alone = times.ns[rank] == max(every) and every.count(times.ns[rank]) == 1
    return HeatCell(
        ns=times.ns[rank],
        ratio=ratio,
        shade=shade(ratio) if compared else 0,
        top=alone and compared and ratio is not None and ratio >= SHADES[0],
    )


def _waits(window: RecordedWindow, group: str, ranks: Sequence[str]) -> dict[str, RankWaits]:
    """By rank: time waited in matched collectives, its share of communication, its ratio."""
    sums = _arrival_waits(window, ranks) or _series_waits(window, group)
    if not sums:
        return {}
    mean = sum(sums.values()) / len(sums)
    communication = next(iter(window.of_scope("communication", group)), None)
    spent = {f.rank: f.total_ns for f in communication.ranks} if communication else {}
    least = min(sums, key=lambda rank: sums[rank])
    return {
        rank: RankWaits(
            wait_ns=sums[rank],
            communication_ns=spent.get(rank, 0),
            ratio=sums[rank] / mean if mean else None,
            share=sums[rank] / spent[rank] if spent.get(rank) else None,
            # The rank that is late waits least, so the darkest cell is the one with least.
            shade=shade(mean / max(sums[rank], 1)) if mean else 0,
            least=rank == least and mean > 0 and sums[rank] < 0.9 * mean,
        )
        for rank in ranks
    }


def _arrival_waits(window: RecordedWindow, ranks: Sequence[str]) -> dict[str, int]:
    """Waits from the straggler analysis, which aligned the clocks of the ranks."""
    waits = {
        figure.rank: figure.wait_ns
        for group in window.stragglers
        for figure in group.ranks
        # Without a matched collective nothing was measured, and zeros are not waits.
        if group.collectives != 0
    }
    return {rank: waits[rank] for rank in ranks} if set(ranks) <= set(waits) else {}


def _series_waits(window: RecordedWindow, group: str) -> dict[str, int]:
    series = next((one for one in window.step_times if one.group == group), None)
    if series is None or series.wait_ns is None:
        return {}
    known = [
        row for row, state in zip(series.wait_ns, series.state, strict=True) if state == "compared"
    ]
    return {rank: sum(row[at] for row in known) for at, rank in enumerate(series.ranks)}


def straggler(window: RecordedWindow, group: str) -> str | None:
    """The straggler among the ranks of a work group, by arrivals; None where there is none."""
    members = {rank for one in window.steps.groups if one.group == group for rank in one.ranks}
    named = [finding.straggler for finding in window.stragglers]
    return next((rank for rank in named if rank in members), None)


def _judged_slow(window: RecordedWindow, group: str) -> str | None:
    """The slowest rank of a judgement that failed; the judgement that decided comes first."""
    members = {rank for one in window.steps.groups if one.group == group for rank in one.ranks}
    decided = [window.deciding] if window.deciding is not None else []
    for judgement in (*decided, *window.judgements):
        finding = judgement.finding
        if judgement.verdict == "fail" and finding is not None and finding.slowest in members:
            return finding.slowest
    return None


@dataclass(frozen=True)
class StragglerRow:
    """Who is late in one sync group. causes, kernels: name and figure (share in %; more than
    its peers, ms), the largest first."""

    group: str
    who: str
    causes: tuple[tuple[str, str], ...]
    reason: str
    kernels: tuple[tuple[str, str], ...]


def stragglers(window: RecordedWindow) -> list[StragglerRow]:
    """A row for each sync group."""
    return [_straggler_row(finding) for finding in window.stragglers]


def _straggler_row(finding: StragglerFinding) -> StragglerRow:
    causes = [
        (each.cause.replace("_", " "), in_percent(each.share))
        for each in finding.causes or ()
        if each.share >= LEAST_CAUSE
    ]
    if not causes and finding.cause:
        causes = [(finding.cause.replace("_", " "), "")]
    late = next((each for each in finding.ranks if each.rank == finding.straggler), None)
    kernels = () if late is None else late.kernels[:EXPLAINING]
    return StragglerRow(
        group=finding.group or "all ranks",
        who=who_is_late(finding.verdict, finding.straggler),
        causes=tuple(causes),
        reason=finding.reason,
        kernels=tuple(
            (each.name, milliseconds(each.ns)) for each in kernels if each.ns >= LEAST_SHOWN_NS
        ),
    )


def who_is_late(verdict: str, rank: str | None) -> str:
    """A rank; "nobody" where the verdict is that there is none, else "not known"."""
    return rank or (NOBODY if verdict == "pass" else NOT_KNOWN)


def _span(compute: ImbalanceFinding) -> str:
    if compute.compared_steps is None:
        return "in the whole window, whose source has no step markers"
    if not compute.compared_steps:
        return "in the whole window, since no step could be compared"
    return f"in {count(compute.compared_steps, 'compared step')}"


@dataclass(frozen=True)
class TextCell:
    """The text of a cell, and the classes `of` it."""

    text: str
    of: str


@dataclass(frozen=True)
class ShownKernel:
    """A row of the kernel table. name: cut where it is long. outside: its time is no compute.

    cells: category, lost time, its share of what compute loses, slowest rank, slowdown, mean
    of the ranks, calls a rank.
    """

    name: str
    full: str
    outside: bool
    cells: tuple[TextCell, ...]


def kernel_rows(group: KernelGroup) -> list[ShownKernel]:
    """The rows of the kernel table of one work group, as they are shown."""
    lost = sum(row.lost_ns for row in group.rows if row.category not in NOT_COMPUTE)
    return [_kernel_row(row, group.ranks, lost) for row in group.rows]


def _kernel_row(row: KernelSpread, ranks: Sequence[str], lost: int) -> ShownKernel:
    """Communication has no slowest rank: one that takes long there waits for the others."""
    outside = row.category in NOT_COMPUTE
    totals = row.total_ns
    top = max(range(len(totals)), key=totals.__getitem__)
    others = [ns for at, ns in enumerate(totals) if at != top]
    typical = median(others) if others else 0
    # Kernels that cost next to nothing are not shaded, however unequal they are.
    shaded = not outside and lost > 0 and row.lost_ns >= MIN_SHADED * lost
    slowest = None if outside or totals.count(totals[top]) > 1 else ranks[top]
    slowdown = None if outside or not typical else totals[top] / typical
    level = shade(slowdown) if shaded else 0
    return ShownKernel(
        name=shortened(row.name),
        full=row.name,
        outside=outside,
        cells=(
            TextCell(row.category, ""),
            TextCell(milliseconds(row.lost_ns), "n"),
            TextCell(in_percent(row.lost_ns / lost if lost and not outside else None), "n"),
            TextCell(slowest or "–", ""),
            TextCell("–" if slowdown is None else ratio(slowdown), f"n s{level}"),
            TextCell(milliseconds(sum(totals) / len(totals)), "n"),
            TextCell(f"{round(sum(row.count) / len(ranks)):,}", "n"),
        ),
    )


def amount_unit(figure: Figure) -> str:
    """`, µs a step` to put after the name of a figure of server lives; "" for one without."""
    if figure.is_of_load:
        return head_unit(METRICS[figure.name])
    return ", % idle" if figure.name == IDLE_SHARE and not figure.kernel else ", µs a step"


def amount_alone(figure: Figure, value: float | None) -> str:
    """A figure of server lives without its unit: `812`, `20.3`, `1,512`."""
    if value is None:
        return NONE
    if figure.is_of_load:
        return figure_alone(METRICS[figure.name], value)
    is_share = figure.name == IDLE_SHARE and not figure.kernel
    return in_percent(value, 1) if is_share else in_microseconds(value)


def shortened(name: str) -> str:
    """A kernel's name without the end of a very long one."""
    return name if len(name) <= MAX_NAME else f"{name[: MAX_NAME - 1]}…"
