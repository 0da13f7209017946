"""What a window says first: who, how much, since when, and how sure that is."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import mean, median

from pytest_sglprof._analysis.e_divisive import change_points
from pytest_sglprof._metrics import METRICS, metrics_of
from pytest_sglprof._report.model import RecordedWindow
from pytest_sglprof._report.page.figures import NOT_KNOWN, who_is_late
from pytest_sglprof._report.page.history import PlacedWindow
from pytest_sglprof._report.page.jinja import NONE, moment
from pytest_sglprof._report.regression import RecordedFigure, RecordedRegression
from pytest_sglprof._report.series import StepSeries
from pytest_sglprof._verdict.judge import Judgement
from pytest_sglprof._verdict.life_words import figure_label
from pytest_sglprof._verdict.reasons import subject
from pytest_sglprof._verdict.wording import beside_limit, count, ratio

MOST_POINTS = 200  # of a window's steps in which a change is looked for
LEAST_EXCESS = 0.005  # of a rank's compute over the median of the others: less has no beginning


@dataclass(frozen=True)
class Lead:
    """The answers of a window, in words.

    who: a rank, "nobody" only where the verdict says so. beside: what else names the rank.
    value: of the measure that decided, "–" without one. measure: its name and its limit.
    since: a sentence for each thing that knows it. sure: phrases. more: the other measures.
    """

    who: str
    beside: str
    value: str
    measure: str
    since: tuple[str, ...]
    sure: tuple[str, ...]
    more: tuple[str, ...]


def lead(window: PlacedWindow) -> Lead | None:
    """The answers of a window; None where nothing was judged."""
    judgement = window.doc.deciding
    if judgement is None:
        return None
    value, measure = headline(judgement)
    who = _who(window.doc, judgement)
    return Lead(
        who=who,
        beside=_gpu(window.doc, who),
        value=value,
        measure=measure,
        since=_since(window, judgement) if window.doc.verdict == "fail" else (),
        sure=tuple(certainty(judgement)) or (NOT_KNOWN,),
        more=tuple(other_measures(judgement)),
    )


def headline(judgement: Judgement) -> tuple[str, str]:
    """The figure that decided, and what it is: `("1.40", "slowdown of moe, limit 1.10")`."""
    threshold, metric = judgement.threshold, METRICS[judgement.threshold.metric]
    of = "" if metric.of == "load" else f" of {subject(threshold)}"
    name = f"{metric.label}{of}"
    if judgement.value is None:
        return NONE, name
    value, limit = beside_limit(metric, judgement.value, threshold.limit)
    return value, f"{name},{limit[:-1].replace('(', '')}" if limit else name


def certainty(judgement: Judgement) -> Iterator[str]:
    """`may be 1.39 to 1.41`, `p < 0.001`, `100 steps`, as far as it is known."""
    measured, metric = judgement.measured, METRICS[judgement.threshold.metric]
    if measured is None:
        return
    # The metric's interval: another one beside it would be a wrong number.
    if interval := metric.read_interval(measured):
        low, high = (metric.format(end, finer=1) for end in interval)
        yield f"may be {low} to {high}" if low != high else f"exactly {low}"
    finding = judgement.finding
    if finding is None:  # of whole steps
        return
    if finding.p_value is not None:
        yield "p < 0.001" if finding.p_value < 0.001 else f"p {finding.p_value:.2g}"
    if finding.steps is not None:
        yield count(finding.steps, "step")


def other_measures(judgement: Judgement) -> Iterator[str]:
    """`imbalance factor 1.17`: every measure but the one that decided."""
    finding = judgement.finding
    if finding is None or judgement.measured is None:
        return
    for metric in metrics_of("ranks"):
        value = metric.read(finding)
        if metric.name != judgement.threshold.metric and value is not None:
            yield f"{metric.label} {metric.format(value)}"
    if finding.factor_sync is not None:
        yield f"λ sync {finding.factor_sync:.2f}"


def _who(window: RecordedWindow, judgement: Judgement) -> str:
    metric = METRICS[judgement.threshold.metric]
    if window.verdict != "fail":
        return who_is_late(window.verdict, None)
    if metric.is_of_lives:
        return "the server as a whole"
    late = next((one.straggler for one in window.stragglers if one.straggler), None)
    latest = next((one.latest for one in window.syncs or () if one.latest), None)
    return judgement.rank or late or latest or "no single rank"


def _gpu(window: RecordedWindow, rank: str) -> str:
    return next((clocks.uuid for clocks in window.gpus if clocks.rank == rank), "")


# Since when: the nights, the runs of the page, the load, the steps of the window.


def _since(window: PlacedWindow, judgement: Judgement) -> tuple[str, ...]:
    doc = window.doc
    if METRICS[judgement.threshold.metric].is_of_lives and doc.regression is not None:
        sentences = [_since_night(doc.regression)]
    else:
        sentences = [_since_step(doc, judgement.rank)]
    if doc.onset is not None:
        sentences.insert(0, f"load is uneven since {moment(doc.onset.time)}")
    if window.earlier:
        sentences.insert(0, _since_run(window))
    return tuple(filter(None, sentences)) or (NOT_KNOWN,)


def _since_run(window: PlacedWindow) -> str:
    """`failed first in night-6; night-5 passed`, of the runs of this page."""
    first = window.run.run.id
    for placed in reversed(window.earlier):
        if placed.doc.verdict != "fail":
            word = "passed" if placed.doc.verdict == "pass" else "was inconclusive"
            return f"failed first in {first}; {placed.run.run.id} {word}"
        first = placed.run.run.id
    return f"failed in every run since {first}, the first on this page"


def _since_night(recorded: RecordedRegression) -> str:
    """`compute since 2026-11-20 (0.5.23), 3 nights ago`; else which accepted life was the last."""
    failed = [figure for figure in recorded.figures if figure.verdict == "fail"]
    changed = [figure for figure in failed if figure.changes]
    if changed:
        figure = min(changed, key=lambda figure: figure.changes[-1])
        return _since_change(recorded, figure)
    last = max((life.recorded for life in recorded.accepted), default="")
    return f"first seen in this run; the last accepted life is of {last[:10]}" if last else ""


def _since_change(recorded: RecordedRegression, figure: RecordedFigure) -> str:
    at = figure.changes[-1]
    life = recorded.history[at]
    version = f" ({life.version})" if life.version else ""
    lives = count(len(recorded.history) - at, "life", "lives")
    return (
        f"{figure_label(figure.figure)} is at this level since {life.recorded[:10]}{version}, "
        f"{lives} ago"
    )


def _since_step(window: RecordedWindow, rank: str | None) -> str:
    """Where in the window the rank takes longer than the others; "" where that is not known."""
    series = next((one for one in window.step_times if rank in one.ranks), None)
    if rank is None or series is None or len(series.ranks) < 2:
        return ""
    return beginning_words(*_excess(series, rank))


def _excess(series: StepSeries, rank: str) -> tuple[list[int], list[float]]:
    """Numbers of the compared steps, and ln(compute of the rank / median of the others)."""
    at = series.ranks.index(rank)
    numbers, excess = [], []
    for number, state, row in zip(series.numbers, series.state, series.compute_ns, strict=True):
        others = median(row[:at] + row[at + 1 :])
        if state == "compared" and row[at] > 0 and others > 0:
            numbers.append(number)
            excess.append(math.log(row[at] / others))
    return numbers, excess


def beginning_words(numbers: Sequence[int], excess: Sequence[float]) -> str:
    """`since step 240 (1.00 before, 1.38 after)`, `throughout its 100 steps`.

    numbers: of steps. excess: ln(time of the rank / time of the others) of each. The levels are
    those between the changes that E-divisive finds; a level counts as slow above half of the
    whole excess. "" where the rank hardly takes longer.
    """
    whole = mean(excess) if excess else 0.0
    if whole < LEAST_EXCESS:
        return ""
    size = math.ceil(len(excess) / MOST_POINTS)
    points = [mean(excess[at : at + size]) for at in range(0, len(excess), size)]
    ends = [0, *(size * at for at in change_points(points)), len(excess)]
    levels = [(begin, end, mean(excess[begin:end])) for begin, end in itertools.pairwise(ends)]
    slow = [level > whole / 2 for *_, level in levels]
    if all(slow):
        return f"throughout the window's {count(len(numbers), 'step')}"
    first, last = slow.index(True), len(slow) - 1 - slow[::-1].index(True)
    begin, end = levels[first][0], levels[last][1]
    steps = f"{numbers[begin]} to {numbers[end - 1]}"
    if not all(slow[first : last + 1]):
        return f"on and off from step {steps}"
    after = ratio(math.exp(mean(excess[begin:end])))
    if end == len(excess):
        before = ratio(math.exp(mean(excess[:begin])))
        return f"since step {numbers[begin]} ({before} before, {after} after)"
    return f"in steps {steps}, where it is {after}"
