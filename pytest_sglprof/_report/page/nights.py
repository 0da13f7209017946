"""The page of a history: what each figure was in every life, and where it changed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pytest_sglprof._baselines.figures import COMMUNICATION, IDLE_SHARE, PASS_WALL, Figure
from pytest_sglprof._baselines.nights import Nights, level_means, night_changes, night_values
from pytest_sglprof._baselines.records import AcceptedLife, BaselineKey, LifeRecord
from pytest_sglprof._files import atomic_write
from pytest_sglprof._metrics import METRICS, UNITS
from pytest_sglprof._report.page.data import embedded
from pytest_sglprof._report.page.figures import amount_alone, amount_unit
from pytest_sglprof._report.page.history import Chart, DrawnHistory, Line, RunLabel
from pytest_sglprof._report.page.jinja import NONE
from pytest_sglprof._report.page.page import rendered
from pytest_sglprof._report.regression import version_of
from pytest_sglprof._trace.categories import NOT_COMPUTE
from pytest_sglprof._verdict.life_words import amount, figure_label
from pytest_sglprof._verdict.wording import percent

MOST_CATEGORIES = 3  # of compute, those with the largest time in the newest life
OF_LOAD = ("ttft_mean", "tpot_mean", "itl_mean", "output_throughput", "goodput", "accept_length")


@dataclass(frozen=True)
class NightRow:
    """A life. cells: its figures, as text. notes: that it is accepted and why, what changed."""

    record: LifeRecord
    version: str
    cells: tuple[str, ...]
    notes: str


@dataclass(frozen=True)
class LifeHistory:
    """The lives of one key, the oldest first; rows: the newest first. changes: a sentence each."""

    key: BaselineKey
    labels: tuple[str, ...]
    rows: tuple[NightRow, ...]
    changes: tuple[str, ...]
    drawn: DrawnHistory


@dataclass(frozen=True)
class FigureNights:
    """One figure of all lives. changes: indices at which a new level begins."""

    figure: Figure
    values: Nights
    changes: Sequence[int]


def history_page(
    records: Sequence[LifeRecord],
    accepted: Mapping[str, AcceptedLife] | None = None,
    change_points: Callable[[Nights], Sequence[int]] = night_changes,
) -> str:
    """The page as text. records: lives of any keys. accepted: by the id of its record.

    change_points: of values of nights (None where there is none), the indices of new levels.
    """
    by_key: dict[str, list[LifeRecord]] = {}
    for record in sorted(records, key=lambda record: record.recorded):
        by_key.setdefault(record.key.file_name, []).append(record)
    histories = [_history(lives, accepted or {}, change_points) for lives in by_key.values()]
    return rendered(
        "nights.html.j2",
        scripts=("uPlot.iife.min.js", "core.js", "strip.js", "history.js", "boot.js"),
        histories=histories,
        lives=len(records),
        data={"history": embedded([history.drawn for history in histories])},
    )


def write_history_page(
    path: Path,
    records: Sequence[LifeRecord],
    accepted: Mapping[str, AcceptedLife] | None = None,
    change_points: Callable[[Nights], Sequence[int]] = night_changes,
) -> None:
    """Writes the page whole or not at all."""
    atomic_write(path, history_page(records, accepted, change_points))


def figures_of(records: Sequence[LifeRecord]) -> list[Figure]:
    """The figures that are shown: those of the newest life that has steps, and of the load."""
    newest = next((each for each in reversed(records) if each.groups), None)
    times: dict[str, float] = {}
    for group in newest.groups if newest is not None else ():
        for stratum in group.strata:
            for category, ns in stratum.categories.items():
                if category not in NOT_COMPUTE:
                    times[category] = times.get(category, 0.0) + ns
    largest = sorted(times, key=lambda name: -times[name])[:MOST_CATEGORIES]
    loads = {name for record in records if record.load for name in record.load.figures}
    names = ["compute", *largest, COMMUNICATION, PASS_WALL, IDLE_SHARE]
    return [Figure(name) for name in (*names, *(name for name in OF_LOAD if name in loads))]


def _history(
    lives: Sequence[LifeRecord],
    accepted: Mapping[str, AcceptedLife],
    change_points: Callable[[Nights], Sequence[int]],
) -> LifeHistory:
    figures = []
    for figure in figures_of(lives):
        values = night_values(lives, figure)
        if any(value is not None for value in values):
            figures.append(FigureNights(figure, values, change_points(values)))
    rows = [
        NightRow(
            record=record,
            version=version_of(record),
            cells=tuple(amount_alone(each.figure, each.values[at]) for each in figures),
            notes=_notes(record, accepted.get(record.id), at, figures),
        )
        for at, record in enumerate(lives)
    ]
    return LifeHistory(
        key=lives[0].key,
        labels=tuple(f"{figure_label(each.figure)}{amount_unit(each.figure)}" for each in figures),
        rows=tuple(reversed(rows)),
        changes=tuple(
            _change_words(at, figures, lives)
            for at in sorted({at for each in figures for at in each.changes}, reverse=True)
        ),
        drawn=DrawnHistory(
            tuple(_label(record, accepted) for record in lives),
            tuple(_chart(each) for each in figures),
        ),
    )


def _notes(
    record: LifeRecord, life: AcceptedLife | None, at: int, figures: Sequence[FigureNights]
) -> str:
    notes = []
    if life is not None:
        notes.append("accepted" + (f": {life.reason}" if life.reason else ""))
    if record.apart:
        notes.append(f"kept apart: {record.apart}")
    if changed := [figure_label(each.figure) for each in figures if at in each.changes]:
        notes.append(f"change of {', '.join(changed)}")
    return "; ".join(notes) or NONE


def _label(record: LifeRecord, accepted: Mapping[str, AcceptedLife]) -> RunLabel:
    host = f"{record.run} on {record.provenance.host}"
    version = version_of(record)
    return RunLabel(
        run=f"{host}, {version}" if version else host,
        opened=record.recorded,
        verdict=record.verdict or "",
        is_accepted=record.id in accepted,
    )


def _chart(nights: FigureNights) -> Chart:
    """In µs a step, percent, or as the load driver has it."""
    figure, values = nights.figure, nights.values
    scale, unit = 1e-3, "µs a step"
    if figure.is_of_load:
        scale, unit = 1.0, UNITS[METRICS[figure.name].unit].suffix.strip()
    elif figure.name == IDLE_SHARE:
        scale, unit = 100.0, "%"
    better = METRICS[figure.name].better if figure.is_of_load else "lower"
    return Chart(
        title=f"{figure_label(figure)}, {unit}",
        better="more" if better == "higher" else "less",
        series=(Line("", [None if value is None else value * scale for value in values]),),
        changes=tuple(nights.changes),
    )


def _change_words(at: int, figures: Sequence[FigureNights], lives: Sequence[LifeRecord]) -> str:
    """`Since 2026-11-20, 0.5.23 (before it 0.5.22): compute 812 µs → 934 µs (+15.0 %)`."""
    parts = [_step_words(each, at) for each in figures if at in each.changes]
    versions = f"{_version(lives[at])} (before it {_version(lives[at - 1])})"
    return f"Since {lives[at].recorded[:10]}, {versions}: {', '.join(parts)}"


def _step_words(nights: FigureNights, at: int) -> str:
    """The means of a figure between the change before `at` and the one after it."""
    figure = nights.figure
    before, now = level_means(nights.values, sorted(nights.changes), at)
    change = f" ({percent(now / before - 1, 1, sign=True)})" if before else ""
    shown = "" if figure.name == IDLE_SHARE else change
    return f"{figure_label(figure)} {amount(figure, before)} → {amount(figure, now)}{shown}"


def _version(record: LifeRecord) -> str:
    return version_of(record) or f"run {record.run}"
