"""The verdict on new server lives beside the accepted ones of a baseline.

The unit is the server life: each gives one number a figure, and how much accepted lives differ
says how certain a difference is. Only named thresholds can fail; kernels explain.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from msgspec.structs import replace as replace_struct

from pytest_sglprof._analysis.certainty import Interval, t_quantile
from pytest_sglprof._analysis.imbalance import MIN_MATCHED_SHARE
from pytest_sglprof._analysis.lives import (
    FAIL_ALPHA,
    MIN_LIVES,
    PASS_ALPHA,
    LifeChange,
    LifeValue,
    change_between,
    floor_ratio,
)
from pytest_sglprof._baselines.figures import (
    Figure,
    covered,
    life_values,
    time_of_kinds,
    why_load_does_not_count,
)
from pytest_sglprof._baselines.records import AcceptedLife, Floor, LifeRecord, LoadFigure
from pytest_sglprof._config.model import Threshold
from pytest_sglprof._metrics import METRICS, VerdictWord, worst_word
from pytest_sglprof._verdict.judge import Judgement, severity_of, word_of
from pytest_sglprof._verdict.kernel_news import KernelNews, explanation, kernel_news
from pytest_sglprof._verdict.life_words import (
    after_change,
    below_floor,
    change_sentence,
    covers_little,
    detection,
    figure_label,
    load_sentence,
    small_change,
)
from pytest_sglprof._verdict.reasons import short_reason

NS_A_STEP = 1000.0  # ns in a µs of `min_us`
NO_FOLDER = "not compared: no folder of baselines is set (--sglprof-baselines)"


@dataclass(frozen=True)
class KnownLife:
    """An accepted life. level: lives of the highest one give the mean, the others the variance.

    accepted: when, and why; None where nobody accepted it, such as in A/B.
    """

    record: LifeRecord
    level: int = 0
    accepted: AcceptedLife | None = None


@dataclass(frozen=True)
class Against:
    """What new lives of one key are compared with.

    file: name of the baseline's file, "" where no folder is set. lives: the accepted ones that
    are old enough, the oldest first; accepted: how many there are of any age. problem: why they
    cannot be compared with, although there should be some (field and both values, a file that
    cannot be read); "" if they can.
    """

    file: str = ""
    exists: bool = False
    lives: tuple[KnownLife, ...] = ()
    floor: Floor | None = None
    problem: str = ""
    accepted: int = 0


@dataclass(frozen=True)
class LifeCase:
    """One window of a test: its new lives, what they are compared with, its thresholds.

    thresholds: those of lives and of the load, see `Metric.is_of_lives`.
    """

    fresh: tuple[LifeRecord, ...]
    against: Against
    thresholds: tuple[Threshold, ...] = ()


@dataclass(frozen=True)
class JudgedFigure:
    """One figure of each life, and what follows from it.

    threshold: None for one that is shown only. accepted, fresh: one value a life, in the unit of
    the figure, None where it has none. certainty: the end of its sentence, while it is made.
    before, now: what is typical of them. ends: what the ratio
    (of a load figure, the figure) may be. word: None where nothing is judged yet. covered: share
    of the time of steps in kinds that all lives have, which alone are compared; uncovered: others.
    """

    figure: Figure
    threshold: Threshold | None
    accepted: tuple[float | None, ...] = ()
    fresh: tuple[float | None, ...] = ()
    before: float | None = None
    now: float | None = None
    change: LifeChange | None = None
    ends: Interval | None = None
    word: VerdictWord | None = None
    reason: str = ""
    certainty: str = ""
    detects: float | None = None
    covered: float = 1.0
    uncovered: str = ""

    @property
    def value(self) -> float | None:
        """What the threshold limits: the ratio, or the figure itself."""
        if self.threshold is not None and METRICS[self.threshold.metric].of == "load":
            return self.now
        return self.change.ratio if self.change is not None else None

    @property
    def is_beyond(self) -> bool:
        """Whether it would fail if the lives so far were all that count."""
        if self.threshold is None or self.value is None:
            return False
        is_beyond = METRICS[self.threshold.metric].is_beyond(self.value, self.threshold.limit)
        return is_beyond and not self.is_small

    @property
    def is_small(self) -> bool:
        """Whether the difference is below the µs a step that the threshold asks for."""
        least = 0.0 if self.threshold is None else self.threshold.min_us * NS_A_STEP
        if not least or self.before is None or self.now is None:
            return False
        return self.now - self.before < least


@dataclass(frozen=True)
class LivesVerdict:
    """The verdict on the new lives of one window.

    word: None where nothing is judged, such as in a first night. accepted, fresh: one record a
    life. figures: the judged ones first. sentence: the verdict, or why there is none.
    is_tolerated: it failed by regression, but not in enough runs in a row.
    """

    word: VerdictWord | None
    sentence: str
    judgements: tuple[Judgement, ...]
    figures: tuple[JudgedFigure, ...]
    accepted: tuple[KnownLife, ...]
    fresh: tuple[LifeRecord, ...]
    kernels: KernelNews
    detection: str = ""
    is_tolerated: bool = False

    @property
    def is_beyond(self) -> bool:
        """Whether the estimate of a judged figure is beyond its limit."""
        return any(figure.is_beyond for figure in self.figures)

    @property
    def is_open(self) -> bool:
        """Whether a further life may decide: it is inconclusive although lives were compared."""
        return self.word != "fail" and any(
            each.verdict == "inconclusive" and (each.change is not None or each.load is not None)
            for each in self.judgements
        )

    @property
    def deciding(self) -> int | None:
        """Index of the judgement that decided."""
        of_word = [at for at, each in enumerate(self.judgements) if each.verdict == self.word]
        return max(of_word, key=lambda at: severity_of(self.judgements[at]), default=None)


SHOWN = (Figure("compute"), Figure("pass_wall"), Figure("idle_share"))  # also without a threshold


def judge_lives(
    cases: Sequence[LifeCase], *, alpha: float = FAIL_ALPHA, required: bool = False
) -> tuple[LivesVerdict, ...]:
    """The verdict on the new lives of each window of one test.

    fail: the figure and its lower end are above the limit; pass: the figure is not, and its upper
    end is below the pass bound (5 %); else inconclusive. alpha: probability of a failure by
    chance, of all thresholds together (Holm 1979). required: a window without enough accepted
    lives is inconclusive, not green.
    """
    cases = [_with_usual_kinds(case) for case in cases]
    measured = [[_measured(case, each) for each in case.thresholds] for case in cases]
    family = sum(each.change is not None for figures in measured for each in figures)
    level = alpha / max(1, family)
    while True:
        judged = [
            [_judged(each, case, level, required) for each in figures]
            for case, figures in zip(cases, measured, strict=True)
        ]
        failed = sum(
            each.word == "fail" and each.change is not None for row in judged for each in row
        )
        before, level = level, alpha / max(1, family - failed)
        if level <= before:
            break
    return tuple(
        _together(case, figures, required) for case, figures in zip(cases, judged, strict=True)
    )


def unconfirmed(verdict: LivesVerdict) -> LivesVerdict:
    """Of one life that a second one has to confirm: nothing fails by it alone."""
    judgements = tuple(
        replace_struct(
            each, verdict="inconclusive", reason=f"{each.reason}; one life alone decides nothing"
        )
        if each.verdict == "fail"
        else each
        for each in verdict.judgements
    )
    return _reworded(verdict, judgements)


def bad_night(verdict: LivesVerdict, nights: int, fail_after: int) -> LivesVerdict:
    """A regression fails only at the nth bad run in a row; before that it passes and says so."""
    if verdict.word != "fail" or nights >= fail_after:
        return verdict
    judgements = tuple(
        replace_struct(
            each,
            verdict="pass",
            reason=f"{each.reason}; bad run {nights} in a row, it fails at number {fail_after}",
        )
        if each.verdict == "fail" and each.change is not None
        else each
        for each in verdict.judgements
    )
    return replace(_reworded(verdict, judgements), is_tolerated=True)


def _reworded(verdict: LivesVerdict, judgements: tuple[Judgement, ...]) -> LivesVerdict:
    word = worst_word({each.verdict for each in judgements})
    known = {each.threshold: each for each in judgements}
    figures = tuple(
        replace(each, word=known[each.threshold].verdict, reason=known[each.threshold].reason)
        if each.threshold in known
        else each
        for each in verdict.figures
    )
    sentence = "; ".join(_reasons(judgements, word))
    return replace(verdict, word=word, sentence=sentence, judgements=judgements, figures=figures)


def _together(case: LifeCase, figures: Sequence[JudgedFigure], required: bool) -> LivesVerdict:
    accepted, fresh = _accepted_lives(case), _lives([*case.fresh])
    with_words = [each for each in figures if each.word is not None]
    limits = [each.limit for each in case.thresholds if METRICS[each.metric].of == "lives"]
    news = kernel_news(
        [each.record for each in accepted],
        [LifeValue(1.0, each.record.provenance.host, each.level) for each in accepted],
        [records[-1] for records in fresh.values()],
        limit=min(limits, default=1.0),
    )
    explained = [_explained(each, news) for each in with_words]
    judgements = tuple(map(_judgement, explained))
    word = worst_word({each.verdict for each in judgements})
    waiting = _why_waiting(case, required)
    texts = _reasons(judgements, word)
    unjudged = any(_is_ratio(each) and each.word is None for each in figures)
    if waiting and (unjudged or not figures):
        texts.append(waiting)
    others = [each for each in figures if each.word is None and each.threshold is not None]
    named = {_label(each) for each in (*explained, *others)}
    shown = [_measured(case, None, figure) for figure in SHOWN if figure_label(figure) not in named]
    main = next((each for each in (*explained, *shown) if each.detects is not None), None)
    return LivesVerdict(
        word=word,
        sentence="; ".join((*texts, *(news.findings if word == "fail" else ()))),
        judgements=judgements,
        figures=(*explained, *others, *(each for each in shown if any(each.fresh))),
        accepted=accepted,
        fresh=tuple(records[-1] for records in fresh.values()),
        kernels=news,
        detection=detection(main.change, main.detects) if main and main.change else "",
    )


def _reasons(judgements: Sequence[Judgement], word: VerdictWord | None) -> list[str]:
    """Of the judgements that decide; the worst of a failure in full, the others by their figure."""
    of_word = sorted((e for e in judgements if e.verdict == word), key=severity_of, reverse=True)
    if word != "fail":
        return list(dict.fromkeys(each.reason for each in of_word))
    also = [short_reason(each.change or each.load, each.threshold) for each in of_word[1:]]
    more = [f"also beyond their limits: {', '.join(also)}"] if also else []
    return [of_word[0].reason, *more]


def _is_ratio(figure: JudgedFigure) -> bool:
    return figure.threshold is not None and METRICS[figure.threshold.metric].of == "lives"


def _label(figure: JudgedFigure) -> str:
    return figure_label(figure.figure)


def _why_waiting(case: LifeCase, required: bool) -> str:
    """Why a window without enough accepted lives is not judged; "" if it has enough."""
    if case.against.problem:
        return ""
    if not case.against.file:
        return NO_FOLDER
    accepted = len(_accepted_lives(case))
    if accepted >= MIN_LIVES:
        return ""
    aged = " that are old enough" if case.against.accepted > accepted else ""
    number = f"{accepted} of {MIN_LIVES} accepted lives{aged}"
    if required:
        return f"only {number}, and a baseline is required (--sglprof-require-baseline)"
    return f"recorded as a candidate ({number})"


def _accepted_lives(case: LifeCase) -> tuple[KnownLife, ...]:
    """One a life; several records of one life repeat each other."""
    by_life = {each.record.life: each for each in case.against.lives}
    return tuple(by_life.values())


def _with_usual_kinds(case: LifeCase) -> LifeCase:
    """Without accepted lives that lack a kind of step which most of them and the new ones have.

    Only what all lives have is compared, so one odd life would hide that kind for ever. Lives are
    chosen by what they ran, never by how long it took; all stay where too few would.
    """
    known = case.against.lives
    if not known or not case.fresh:
        return case
    kinds = [time_of_kinds(each.record).keys() for each in known]
    last = max(each.level for each in known)
    latest = [of for of, each in zip(kinds, known, strict=True) if each.level == last]
    usual = {
        kind
        for kind in set.intersection(*(set(time_of_kinds(each)) for each in case.fresh))
        if 2 * sum(kind in of for of in latest) > len(latest)
    }
    kept = tuple(each for of, each in zip(kinds, known, strict=True) if usual <= of)
    is_enough = len({each.record.life for each in kept}) >= MIN_LIVES
    if not is_enough or all(each.level != last for each in kept):
        return case
    return replace(case, against=replace(case.against, lives=kept))


def _lives(records: Sequence[LifeRecord]) -> dict[str, list[LifeRecord]]:
    lives: dict[str, list[LifeRecord]] = {}
    for record in records:
        lives.setdefault(record.life, []).append(record)
    return lives


# One figure of all lives.


def figure_of(threshold: Threshold) -> Figure:
    """What a threshold of lives or of the load is about."""
    if METRICS[threshold.metric].of == "load":
        return Figure(threshold.metric)
    return Figure(threshold.scope, threshold.kernel, threshold.stage)


def cost(figure: Figure, value: float) -> float:
    """What is compared: more is worse, and 1.05 means 5 % worse.

    Shares of idle time are compared by what they leave of the step; rates by their inverse.
    """
    if figure.name == "idle_share" and not figure.kernel:
        return 1 / (1 - value) if value < 1 else math.inf
    is_higher = figure.is_of_load and METRICS[figure.name].better == "higher"
    return 1 / value if is_higher and value else value


def _from_cost(figure: Figure, value: float) -> float:
    if figure.name == "idle_share" and not figure.kernel:
        return 1 - 1 / value
    is_higher = figure.is_of_load and METRICS[figure.name].better == "higher"
    return 1 / value if is_higher and value else value


def _measured(
    case: LifeCase, threshold: Threshold | None, shown: Figure | None = None
) -> JudgedFigure:
    """The figure of each life and their difference. reason: why there is none, where so."""
    figure = shown or (figure_of(threshold) if threshold is not None else Figure("compute"))
    accepted, fresh = [each.record for each in case.against.lives], [*case.fresh]
    empty = JudgedFigure(figure, threshold)
    if not fresh:
        return replace(empty, reason="no new life has a complete window of it")
    values = life_values([*accepted, *fresh], figure)
    if isinstance(values, str):
        return replace(empty, reason=values)
    old = _by_life(accepted, values[: len(accepted)], figure)
    new = _by_life(fresh, values[len(accepted) :], figure)
    if not figure.is_of_load:
        empty = _with_coverage(empty, case)
    measured = replace(
        empty,
        accepted=tuple(None if v is None else _from_cost(figure, v) for v in old.values()),
        fresh=tuple(None if v is None else _from_cost(figure, v) for v in new.values()),
    )
    costs = [v for v in new.values() if v is not None]
    if len(costs) < len(new):
        return replace(measured, reason=_why_no_figure(case, figure))
    now = _from_cost(figure, _mean(costs))
    levels = {each.record.life: each for each in case.against.lives}
    hosts = {record.life: record.provenance.host for record in fresh}
    change = change_between(
        [
            LifeValue(value, levels[life].record.provenance.host, levels[life].level)
            for life, value in old.items()
            if value is not None
        ],
        [LifeValue(value, hosts[life]) for life, value in new.items() if value is not None],
    )
    if isinstance(change, str):
        return replace(measured, now=now, reason=change)
    before = _from_cost(figure, _mean(costs) / change.ratio)
    limit = threshold.limit if threshold is not None and _is_ratio(measured) else 1.0
    return replace(measured, now=now, before=before, change=change, detects=change.detects(limit))


def _with_coverage(figure: JudgedFigure, case: LifeCase) -> JudgedFigure:
    """How much of the lives compared with, and of the new ones, lies in kinds that all have."""
    known = case.against.lives
    last = max((each.level for each in known), default=0)
    shares, others = covered([*(each.record for each in known), *case.fresh], figure.figure.stage)
    latest = [share for share, each in zip(shares, known, strict=False) if each.level == last]
    sides = [side for side in (latest, shares[len(known) :]) if side]
    return replace(figure, covered=min(sum(side) / len(side) for side in sides), uncovered=others)


def _by_life(
    records: Sequence[LifeRecord], values: Sequence[float | None], figure: Figure
) -> dict[str, float | None]:
    """What is compared of each life: the geometric mean of windows that repeat each other."""
    known: dict[str, list[float]] = {record.life: [] for record in records}
    for record, value in zip(records, values, strict=True):
        if value is not None and 0 < cost(figure, value) < math.inf:
            known[record.life].append(cost(figure, value))
    return {life: _mean(costs) if costs else None for life, costs in known.items()}


def _mean(values: Sequence[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values))


def _why_no_figure(case: LifeCase, figure: Figure) -> str:
    if figure.is_of_load:
        reasons = [why_load_does_not_count(record.load) for record in case.fresh]
        return next(filter(None, reasons), f"the load driver did not report {figure.name}")
    return f"a new life has no time of {figure_label(figure)}"


# Its verdict.


def _judged(figure: JudgedFigure, case: LifeCase, alpha: float, required: bool) -> JudgedFigure:
    """With the verdict of its threshold. alpha: probability of a failure by chance."""
    threshold = figure.threshold
    assert threshold is not None
    label = f"{threshold.metric} of {_label(figure)}" if _is_ratio(figure) else threshold.metric
    if METRICS[threshold.metric].of == "load":
        return _judged_load(figure, threshold, label, alpha)
    if case.against.problem:
        return _inconclusive(figure, f"{label}: {case.against.problem}")
    if waiting := _why_waiting(case, required):
        word: VerdictWord | None = "inconclusive" if required else None
        return replace(figure, word=word, reason=f"{label}: {waiting}")
    change = figure.change
    if change is None:
        return _inconclusive(figure, f"{label}: {figure.reason}")
    before, now = figure.before, figure.now
    assert before is not None
    assert now is not None
    ends = change.ends(alpha, PASS_ALPHA)
    reason = change_sentence(figure.figure, threshold, change, before, now)
    detects = change.detects(threshold.limit, alpha)
    figure = replace(figure, ends=ends, detects=detects)
    word = word_of(threshold, change.ratio, ends)
    least = NS_A_STEP * threshold.min_us
    if least and before * (ends[1] - 1) < least:
        word = "pass"
    if least and word == "fail" and figure.is_small:
        word = "inconclusive"
    floor = _floor_of(case.against.floor, figure.figure, change)
    if floor is not None and threshold.limit < floor and not (word == "fail" and ends[0] > floor):
        word, certainty = "inconclusive", f"; {below_floor(threshold.limit, floor)}"
    elif figure.is_small:
        certainty = f"; {small_change(now - before, threshold.min_us)}"
    else:
        certainty = after_change(word, threshold, change.ratio, ends)
    if figure.covered < MIN_MATCHED_SHARE:
        word = "inconclusive" if word == "pass" else word
        certainty += f"; {covers_little(figure.covered, figure.uncovered)}"
    certainty += f"; {detection(change, detects)}"
    return replace(figure, word=word, reason=reason, certainty=certainty)


def _inconclusive(figure: JudgedFigure, reason: str) -> JudgedFigure:
    return replace(figure, word="inconclusive", reason=reason)


def _floor_of(floor: Floor | None, figure: Figure, change: LifeChange) -> float | None:
    """What lives of one version reach by chance on this machine; None where nobody measured it."""
    sd = None if floor is None else floor.sd.get(figure_label(figure))
    if floor is None or sd is None:
        return None
    level = change.of_level or change.accepted
    return floor_ratio(sd, floor.lives, accepted=level, fresh=change.fresh)


def _judged_load(
    figure: JudgedFigure, threshold: Threshold, label: str, alpha: float
) -> JudgedFigure:
    """The figure of the load against its limit; with accepted lives, how certain it is."""
    if figure.now is None:
        return _inconclusive(figure, f"{label}: {figure.reason}")
    metric, ends = METRICS[threshold.metric], None
    if figure.change is not None:
        ends = _ends_of_load(figure.now, len(figure.fresh), figure.change, alpha)
    is_beyond = metric.is_beyond(figure.now, threshold.limit)
    word: VerdictWord = "fail" if is_beyond else "pass"
    if word == "fail" and ends is not None and not metric.is_surely_beyond(ends, threshold.limit):
        word = "inconclusive"
    reason = load_sentence(threshold, figure.now, len(figure.fresh), ends, word)
    return replace(figure, ends=ends, word=word, reason=reason)


def _ends_of_load(value: float, lives: int, change: LifeChange, alpha: float) -> Interval:
    half = t_quantile(alpha, change.freedom) * change.sd / math.sqrt(lives)
    return value * math.exp(-half), value * math.exp(half)


def _explained(figure: JudgedFigure, news: KernelNews) -> JudgedFigure:
    """With the category and the kernel that make it worse, where it is beyond its limit."""
    is_explained = figure.is_beyond and _is_ratio(figure) and not figure.figure.is_of_load
    why = ""
    if is_explained and figure.before is not None and figure.now is not None:
        why = explanation(figure.figure, news, figure.now - figure.before)
    return replace(figure, reason=f"{figure.reason}{why}{figure.certainty}", certainty="")


def _judgement(figure: JudgedFigure) -> Judgement:
    assert figure.threshold is not None
    assert figure.word is not None
    load = None
    if METRICS[figure.threshold.metric].of == "load" and figure.now is not None:
        load = LoadFigure(value=figure.now, lives=len(figure.fresh), interval=figure.ends)
    change = figure.change if load is None else None
    return Judgement(
        figure.threshold, None, figure.value, figure.word, figure.reason, change=change, load=load
    )
