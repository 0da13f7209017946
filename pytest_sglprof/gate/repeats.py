"""The verdict of a window that was opened several times: windows are the unit then.

One window may be an outlier, also of fifty steps: what disturbs a server lasts for seconds.
So a threshold fails when the *median* of the windows' figures is above the limit, and passes
when it is not, whatever windows without a figure would have shown.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from pytest_sglprof.gate.judge import Judgement, Verdict
from pytest_sglprof.gate.reasons import subject
from pytest_sglprof.gate.wording import against_limit, count, ratio
from pytest_sglprof.values import WORST_FIRST, Threshold, VerdictWord


@dataclass(frozen=True)
class Spread:
    """One threshold in one work group over all windows.

    values: the metric's figure of each window that was meant to be, in their order; None
    where a window was not opened, or gives no verdict.
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
        """Of the known figures; of an even number the mean of the two in the middle."""
        return statistics.median(self.known) if self.known else None


@dataclass(frozen=True)
class RepeatedVerdict:
    """The verdict over all windows. count: as many were meant to be opened.

    typical: index of the opened window whose figure is nearest to the median of the threshold
    that decided.
    """

    word: VerdictWord
    reason: str
    spreads: tuple[Spread, ...]
    count: int
    typical: int


def judge_repeats(verdicts: Sequence[Verdict], planned: int) -> RepeatedVerdict:
    """Judges the windows that were opened together, out of `planned`.

    verdicts: one a window, at least one. The word is fail if the median of any threshold is
    above its limit for certain, else inconclusive if any is undecided, else pass.
    """
    spreads = tuple(_spread(key, verdicts, planned) for key in _keys(verdicts))
    words = [spread.verdict for spread in spreads] or [_plain_word(verdicts, planned)]
    word: VerdictWord = next(w for w in WORST_FIRST if w in words)
    deciding = [spread for spread in spreads if spread.verdict == word]
    if not deciding:
        plain = next((v.reason for v in verdicts if v.word == word), verdicts[0].reason)
        missing = planned - len(verdicts)
        reason = f"{count(missing, 'window')} of {planned} never opened" if missing else plain
        return RepeatedVerdict(word, reason, spreads, planned, 0)
    worst = max(deciding, key=_excess)
    typical = _typical(worst, len(verdicts))
    reason = worst.reason
    if word == "fail":
        own = _own(verdicts[typical], (worst.threshold, worst.group))
        reason += f"; the window in the middle: {own.reason}" if own else ""
    return RepeatedVerdict(word, reason, spreads, planned, typical)


_Key = tuple[Threshold, str]  # two limits of one figure are two


def _key(judgement: Judgement) -> _Key:
    group = judgement.finding.group if judgement.finding is not None else ""
    return judgement.threshold, group


def _keys(verdicts: Sequence[Verdict]) -> list[_Key]:
    found = [judgement for verdict in verdicts for judgement in verdict.judgements]
    measured = [judgement for judgement in found if judgement.finding is not None]
    return list(dict.fromkeys(_key(judgement) for judgement in measured or found))


def _own(verdict: Verdict, key: _Key) -> Judgement | None:
    return next((found for found in verdict.judgements if _key(found) == key), None)


def _spread(key: _Key, verdicts: Sequence[Verdict], planned: int) -> Spread:
    owns = [_own(verdict, key) for verdict in verdicts]
    judged = [own for own in owns if own is not None]
    threshold = key[0]
    figures = [_figure(own) for own in owns] + [None] * (planned - len(owns))
    values = tuple(
        own.value if own is not None and own.verdict != "inconclusive" else None for own in owns
    ) + (None,) * (planned - len(owns))
    # The median with every unknown window at its best, and at its worst.
    lowest = statistics.median(-math.inf if f is None else f for f in figures)
    highest = statistics.median(math.inf if f is None else f for f in figures)
    verdict: VerdictWord = "inconclusive"
    if lowest > threshold.limit:
        verdict = "fail"
    elif highest <= threshold.limit:
        verdict = "pass"
    spread = Spread(threshold, key[1], values, verdict, "")
    return Spread(threshold, key[1], values, verdict, _reason(spread, verdicts, planned, judged))


def _figure(own: Judgement | None) -> float | None:
    """What a window counts as; None when it gives no verdict.

    Its figure, but for verdicts that were not made by it: a kernel too small to fail counts
    as on its limit, a scope that only one rank has as infinite.
    """
    if own is None or own.verdict == "inconclusive":
        return None
    if own.verdict == "pass":
        return own.threshold.limit if own.value is None else min(own.value, own.threshold.limit)
    return math.inf if own.value is None else own.value


def _reason(
    spread: Spread, verdicts: Sequence[Verdict], planned: int, judged: Sequence[Judgement]
) -> str:
    prefix = f"{spread.group}: " if spread.group else ""
    what = f"{prefix}{spread.threshold.metric} of {subject(spread.threshold)}"
    known = spread.known
    if spread.verdict == "inconclusive":
        why = next((own.reason for own in judged if own.verdict == "inconclusive"), "")
        missing = planned - len(verdicts)
        opened = f"{missing} of them never opened" if missing else ""
        reasons = "; ".join(text for text in (opened, why) if text)
        return f"{what}: only {len(known)} of {count(planned, 'window')} can be judged ({reasons})"
    if not known:
        return f"{what}: {spread.verdict} in every window, without a figure"
    shown, limit = against_limit(spread.median or 0.0, spread.threshold.limit)
    return (
        f"{what} is {shown} in the median of {count(len(known), 'window')}{limit}, "
        f"from {ratio(known[0])} to {ratio(known[-1])}"
    )


def _typical(spread: Spread, opened: int) -> int:
    middle = spread.median
    if middle is None:
        return 0
    known = [(n, value) for n, value in enumerate(spread.values[:opened]) if value is not None]
    above = [(n, v) for n, v in known if spread.verdict != "fail" or v > spread.threshold.limit]
    return min(above or known, key=lambda pair: abs(pair[1] - middle))[0]


def _plain_word(verdicts: Sequence[Verdict], planned: int) -> VerdictWord:
    """Without any threshold: every window must be whole."""
    whole = len(verdicts) == planned and all(verdict.word == "pass" for verdict in verdicts)
    return "pass" if whole else "inconclusive"


def _excess(spread: Spread) -> float:
    median = spread.median
    return math.inf if median is None else median / spread.threshold.limit
