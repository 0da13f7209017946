"""The verdict on a window that was opened several times.

Even a window of a hundred steps can be an outlier, since disturbances of a server last for
seconds. Where windows are opened a fixed number of times (`judge_repeats`), a threshold fails if
the *median* of their figures is beyond the limit for any value of the windows without a
figure, and passes if it is within the limit for any. Where they are opened until the verdict is
certain (`judge_until_certain`), each look judges the steps of all windows so far.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace

from pytest_sglprof._analysis.certainty import (
    MIN_EFFECTIVE,
    Estimate,
    disagreeing,
    look_alpha,
    pool,
)
from pytest_sglprof._config.model import CERTAIN, MOST_WINDOWS, Threshold, WindowSpec
from pytest_sglprof._metrics import METRICS, VerdictWord, worst_word
from pytest_sglprof._verdict.judge import Judgement, Verdict, word_of
from pytest_sglprof._verdict.reasons import at_most, figure_name, uncertain_reason
from pytest_sglprof._verdict.wording import beside_limit, count


@dataclass(frozen=True)
class Spread:
    """One threshold in one work group over all planned windows.

    values: the metric's figure in each window, in order; None if the window was never opened
    or is inconclusive.
    """

    threshold: Threshold
    group: str
    values: tuple[float | None, ...]
    verdict: VerdictWord
    reason: str

    @property
    def known(self) -> tuple[float, ...]:
        """The figures that exist, ascending."""
        return tuple(sorted(value for value in self.values if value is not None))

    @property
    def median(self) -> float | None:
        """The median of the known figures; None if there are none."""
        return statistics.median(self.known) if self.known else None


@dataclass(frozen=True)
class RepeatedVerdict:
    """The verdict over all windows. count: number of planned windows.

    typical: index of the opened window whose figure is nearest to the median, for the
    threshold that decided.
    """

    word: VerdictWord
    reason: str
    spreads: tuple[Spread, ...]
    count: int
    typical: int


def judge_together(spec: WindowSpec, verdicts: Sequence[Verdict]) -> RepeatedVerdict:
    """The verdict on the windows that were opened for `spec`, at least one, as it asks for it."""
    if spec.repeat == CERTAIN:
        return judge_until_certain(verdicts)
    assert not isinstance(spec.repeat, str)
    return judge_repeats(verdicts, spec.repeat or 1)


def judge_until_certain(verdicts: Sequence[Verdict]) -> RepeatedVerdict:
    """Judges all windows so far; inconclusive means that one more may decide.

    verdicts: one for each opened window, at least one. Nothing is decided before the second.
    Each of the looks at 2, 3, … windows spends a part of the level of error (`look_alpha`), so that
    the level holds for all of them together, however the windows depend on each other.
    """
    keys = _keys(verdicts)
    if not keys:
        return _without_thresholds(verdicts, max(2, len(verdicts)))
    spreads = tuple(_pooled(key, verdicts, len(keys)) for key in keys)
    together = _together(spreads, verdicts, len(verdicts))
    unopened = [verdict.reason for verdict in verdicts if not verdict.judgements]
    if together.word != "inconclusive" or not unopened:
        return together
    return replace(together, reason=f"{together.reason}; no further window: {unopened[-1]}")


def _pooled(key: _Key, verdicts: Sequence[Verdict], family: int) -> Spread:
    """One threshold over all windows. family: number of thresholds and work groups."""
    threshold, group = key
    judgements = [_judgement(verdict, key) for verdict in verdicts]
    estimates = [each.estimate if each is not None else None for each in judgements]
    known = [each for each in estimates if each is not None]
    if not known:  # nothing depends on an error: a scope of one rank only, too little data
        return _spread(key, verdicts, max(2, len(verdicts)))
    values = tuple(
        each.value if each is not None and each.estimate is not None else None
        for each in judgements
    )
    same = [each for each in known if len(each.values) == len(known[0].values)]
    spread = Spread(threshold, group, values, "inconclusive", "")
    if len(same) < 2:
        return replace(spread, reason=_only_one(spread, judgements))
    alpha = look_alpha(len(same), MOST_WINDOWS) / family
    pooled = pool(same, alpha)
    value = pooled.value
    what, where = _what(spread), f"over {count(len(same), 'window')}"
    shown, limit = beside_limit(METRICS[threshold.metric], value, threshold.limit)
    text = f"{what} is {shown} {where}{limit}"
    if pooled.effective < MIN_EFFECTIVE:
        worth = f"its steps are worth {pooled.effective:.1f} independent ones"
        return replace(spread, reason=f"{text}; {worth}, {MIN_EFFECTIVE:g} are needed")
    ends = pooled.low(alpha), pooled.high(alpha)
    word = word_of(threshold, value, ends)
    if word == "pass":
        text += f"; {at_most(threshold, ends)}"
    if word == "inconclusive":
        text += f"; {uncertain_reason(threshold, value, ends, pooled.steps)}"
    return replace(spread, verdict=word, reason=text + _apart(estimates, threshold))


def _only_one(spread: Spread, judgements: Sequence[Judgement | None]) -> str:
    reasons = [each.reason for each in judgements if each is not None and each.estimate is None]
    why = f" ({reasons[0]})" if reasons else ""
    return f"{_what(spread)}: one window alone decides nothing{why}"


def _apart(estimates: Sequence[Estimate | None], threshold: Threshold) -> str:
    """Names the windows that disagree with the others."""
    numbers = [number for number, each in enumerate(estimates, start=1) if each is not None]
    known = [each for each in estimates if each is not None]
    apart = disagreeing(known)
    if not apart:
        return ""
    metric = METRICS[threshold.metric]
    named = ", ".join(f"{numbers[at]} ({metric.format(known[at].value, finer=1)})" for at in apart)
    return (
        f"; {'windows' if len(apart) > 1 else 'window'} {named} differ{'s' * (len(apart) == 1)} "
        "from the mean by more than the noise of the steps explains"
    )


def judge_repeats(verdicts: Sequence[Verdict], planned: int) -> RepeatedVerdict:
    """Judges the windows of one test together.

    verdicts: one for each opened window, at least one. planned: number of windows that should
    have been opened. The word is fail if the median of any threshold is certainly beyond its
    limit, else inconclusive if any is undecided, else pass.
    """
    spreads = tuple(_spread(key, verdicts, planned) for key in _keys(verdicts))
    return _together(spreads, verdicts, planned)


def _together(
    spreads: tuple[Spread, ...], verdicts: Sequence[Verdict], planned: int
) -> RepeatedVerdict:
    word = worst_word([spread.verdict for spread in spreads])
    if word is None:
        return _without_thresholds(verdicts, planned)
    deciding = max((spread for spread in spreads if spread.verdict == word), key=_severity)
    typical = _typical(deciding, len(verdicts))
    reason = deciding.reason
    if word == "fail":
        judgement = _judgement(verdicts[typical], (deciding.threshold, deciding.group))
        reason += f"; the window in the middle: {judgement.reason}" if judgement else ""
    return RepeatedVerdict(word, reason, spreads, planned, typical)


def _without_thresholds(verdicts: Sequence[Verdict], planned: int) -> RepeatedVerdict:
    """The verdict if no threshold is set: every window must be whole."""
    if missing := planned - len(verdicts):
        reason = f"{count(missing, 'window')} of {planned} never opened"
        return RepeatedVerdict("inconclusive", reason, (), planned, 0)
    doubtful = next((verdict for verdict in verdicts if verdict.word != "pass"), None)
    if doubtful is not None:
        return RepeatedVerdict("inconclusive", doubtful.reason, (), planned, 0)
    return RepeatedVerdict("pass", verdicts[0].reason, (), planned, 0)


_Key = tuple[Threshold, str]  # a figure with two limits is judged twice


def _key(judgement: Judgement) -> _Key:
    return judgement.threshold, judgement.group


def _keys(verdicts: Sequence[Verdict]) -> list[_Key]:
    judgements = [judgement for verdict in verdicts for judgement in verdict.judgements]
    measured = [judgement for judgement in judgements if judgement.measured is not None]
    return list(dict.fromkeys(_key(judgement) for judgement in measured or judgements))


def _judgement(verdict: Verdict, key: _Key) -> Judgement | None:
    return next((each for each in verdict.judgements if _key(each) == key), None)


def _spread(key: _Key, verdicts: Sequence[Verdict], planned: int) -> Spread:
    judgements = [_judgement(verdict, key) for verdict in verdicts]
    unopened = [None] * (planned - len(verdicts))
    values = tuple(
        each.value if each is not None and each.verdict != "inconclusive" else None
        for each in (*judgements, *unopened)
    )
    limit = METRICS[key[0].metric].badness(key[0].limit)
    # The median if every unknown window were as good, or as bad, as possible.
    lowest, highest = (
        statistics.median(
            unknown if badness is None else badness
            for badness in map(_badness, (*judgements, *unopened))
        )
        for unknown in (-math.inf, math.inf)
    )
    word: VerdictWord = "fail" if lowest > limit else "pass" if highest <= limit else "inconclusive"
    spread = Spread(*key, values, word, "")
    reasons = [each.reason for each in judgements if each and each.verdict == "inconclusive"]
    return replace(spread, reason=_reason(spread, len(unopened), reasons))


def _badness(judgement: Judgement | None) -> float | None:
    """How bad a window is, for the median; None if it is inconclusive.

    The badness of its figure, with two exceptions: a kernel too small to fail counts as at its
    limit, and a scope that only one rank has counts as infinitely bad.
    """
    if judgement is None or judgement.verdict == "inconclusive":
        return None
    metric, limit = METRICS[judgement.threshold.metric], judgement.threshold.limit
    badness = math.inf if judgement.value is None else metric.badness(judgement.value)
    return min(badness, metric.badness(limit)) if judgement.verdict == "pass" else badness


def _what(spread: Spread) -> str:
    return figure_name(spread.threshold, spread.group)


def _reason(spread: Spread, unopened: int, reasons: Sequence[str]) -> str:
    """unopened: number of windows never opened. reasons: of the inconclusive windows."""
    what, known = _what(spread), spread.known
    if spread.verdict == "inconclusive":
        why = [f"{unopened} of them never opened"] if unopened else []
        planned = count(len(spread.values), "window")
        return (
            f"{what}: only {len(known)} of {planned} can be judged "
            f"({'; '.join((*why, *reasons[:1]))})"
        )
    if not known:
        return f"{what}: {spread.verdict} in every window, without a figure"
    metric = METRICS[spread.threshold.metric]
    shown, limit = beside_limit(metric, spread.median or 0.0, spread.threshold.limit)
    return (
        f"{what} is {shown} in the median of {count(len(known), 'window')}{limit}, "
        f"from {metric.format(known[0])} to {metric.format(known[-1])}"
    )


def _typical(spread: Spread, opened: int) -> int:
    middle = spread.median
    if middle is None:
        return 0
    metric, limit = METRICS[spread.threshold.metric], spread.threshold.limit
    known = [(n, value) for n, value in enumerate(spread.values[:opened]) if value is not None]
    failing = [(n, value) for n, value in known if metric.is_beyond(value, limit)]
    among = failing if failing and spread.verdict == "fail" else known
    return min(among, key=lambda pair: abs(pair[1] - middle))[0]


def _severity(spread: Spread) -> tuple[float, float]:
    return METRICS[spread.threshold.metric].severity(spread.median, spread.threshold.limit)
