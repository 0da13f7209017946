"""Judges a kernel table against thresholds: one verdict with its reason and its numbers.

Too little data never passes: it is inconclusive, whatever the figures are.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import msgspec

from pytest_sglprof._analysis import budget as step_budget
from pytest_sglprof._analysis.budget import StepBudget, Walls
from pytest_sglprof._analysis.certainty import ALPHA, Estimate, Interval
from pytest_sglprof._analysis.imbalance import ImbalanceFinding, estimate, imbalance_of_groups
from pytest_sglprof._analysis.lives import LifeChange
from pytest_sglprof._analysis.passes import is_without_peers
from pytest_sglprof._analysis.sums import Sums
from pytest_sglprof._analysis.sync import cells_across
from pytest_sglprof._analysis.times import GroupCells
from pytest_sglprof._baselines.records import LoadFigure
from pytest_sglprof._config.model import Threshold
from pytest_sglprof._metrics import METRICS, MIN_SHARE, MIN_STEPS, VerdictWord, worst_word
from pytest_sglprof._ranks import Rank
from pytest_sglprof._verdict.reasons import (
    Measured,
    at_most,
    group_prefix,
    measured_reason,
    one_sided_reason,
    short_reason,
    subject,
    subject_of,
    uncertain_reason,
    why_not_the_gpu,
    why_unknown,
)
from pytest_sglprof._verdict.wording import count

if TYPE_CHECKING:
    from pytest_sglprof._trace.table import KernelTable


class Judgement(msgspec.Struct, frozen=True):
    """One threshold applied to one work group, or to the steps of all ranks.

    finding: None if there was nothing to measure, and for metrics of whole steps, which have
    budget, of lives, which have change, and of the load, which have load. value: the metric's
    figure; None if it does not exist. estimate: the figure of each rank with its error; None
    without steps.
    """

    threshold: Threshold
    finding: ImbalanceFinding | None
    value: float | None
    verdict: VerdictWord
    reason: str
    estimate: Estimate | None = None
    budget: StepBudget | None = None
    change: LifeChange | None = None
    load: LoadFigure | None = None

    @property
    def measured(self) -> Measured | None:
        """What of a window the threshold was applied to; None if there was nothing to measure."""
        return self.finding if self.budget is None else self.budget

    @property
    def group(self) -> str:
        """Label of the work group; "" if there is only one, and for metrics of whole steps."""
        return self.finding.group if self.finding is not None else ""

    @property
    def rank(self) -> str | None:
        """The rank with the worst figure; None if two share it, or there is none."""
        if self.budget is None:  # lives are compared whole
            return self.finding.slowest if self.finding is not None else None
        is_idle = self.threshold.metric == "idle_share"
        return self.budget.idle_rank if is_idle else self.budget.wall_rank


@dataclass(frozen=True)
class Verdict:
    """The verdict on one window: the word, its reason, and the judgements behind it.

    sums: those of the table, so that a report need not sum it again; None without a table.
    """

    word: VerdictWord
    reason: str
    judgements: tuple[Judgement, ...] = ()
    sums: Sums | None = field(default=None, repr=False, compare=False)

    @property
    def deciding(self) -> Judgement | None:
        """Of the judgements with the verdict's word, the one farthest beyond its limit."""
        return max(_of_word(self.word, self.judgements), key=severity_of, default=None)

    def of(self, threshold: Threshold) -> Verdict:
        """The verdict on one threshold alone."""
        judgements = tuple(each for each in self.judgements if each.threshold == threshold)
        return _verdict(judgements, None, self.sums)


LIVES_ONLY = "no threshold compares its ranks"  # those that are set compare server lives


def undecided(thresholds: Sequence[Threshold], reason: str) -> Verdict:
    """The inconclusive verdict on a window where nothing was measured, for `reason`."""
    judgements = tuple(
        Judgement(each, None, None, "inconclusive", reason) for each in of_windows(thresholds)
    )
    return Verdict("inconclusive", reason, judgements)


def of_windows(thresholds: Sequence[Threshold]) -> tuple[Threshold, ...]:
    """Those that a window alone can be judged by; the others are judged between server lives."""
    return tuple(each for each in thresholds if not METRICS[each.metric].is_of_lives)


def judge(
    table: KernelTable | None,
    thresholds: Sequence[Threshold],
    *,
    min_steps: int = MIN_STEPS,
    min_share: float = MIN_SHARE,
    expected_ranks: Sequence[str] = (),
    missing_ranks: Sequence[str] = (),
    incomplete_reason: str | None = None,
) -> Verdict:
    """Judges every threshold of windows (see `of_windows`) in every work group of `table`.

    table: None if nothing could be read. min_steps: number of compared steps that a judgement
    needs (0 also accepts a table without steps). min_share: share of compute, 0 to 1, below
    which a kernel cannot fail its threshold. expected_ranks, missing_ranks: labels.
    incomplete_reason: why the window is not complete; None if it is. A missing rank, a
    truncated trace or an incomplete window makes everything inconclusive; otherwise the
    verdict is fail if any judgement fails, else inconclusive if any is, else pass.
    """
    doubt = _doubt(table, expected_ranks, missing_ranks, incomplete_reason)
    given, thresholds = thresholds, of_windows(thresholds)
    sums = Sums(table) if table is not None else None
    cases = _cases(sums, thresholds) if sums is not None and sums.groups else []
    judgements = _judge_all(cases, min_steps, min_share, doubt)
    if sums is None or not sums.groups:
        judgements = undecided(thresholds, doubt or "the window has no rank").judgements
    verdict = _verdict(judgements, doubt, sums)
    if given and not thresholds and doubt is None:
        verdict = replace(verdict, reason=LIVES_ONLY)
    if table is None or not table.front or verdict.word == "inconclusive":
        return verdict
    return replace(verdict, reason=f"{verdict.reason}; judged from step {table.front + 1} on")


def _doubt(
    table: KernelTable | None,
    expected: Sequence[str],
    missing: Sequence[str],
    incomplete_reason: str | None,
) -> str | None:
    """Why no figure of this window can be trusted; None if they can."""
    present = table.ranks if table is not None else ()
    absent = dict.fromkeys(missing)
    if table is not None:
        absent.update(dict.fromkeys(rank for rank in expected if not _is_in(rank, present)))
    doubts = [incomplete_reason] if incomplete_reason else []
    if absent:
        total = f" of {len(expected)}" if expected else ""
        doubts.append(f"{count(len(absent), 'rank')}{total} missing: {', '.join(absent)}")
    if table is None and not doubts:
        doubts.append("the window left nothing to read")
    if table is not None and table.partial:
        doubts.append("a trace of this window is truncated, so its times are too small")
    if table is not None and table.incomparable:
        doubts.append(table.incomparable)
    return "; ".join(doubts) or None


def _is_in(label: str, present: Sequence[str]) -> bool:
    """True if `present` has this rank, possibly without its dimensions of size 1."""
    rank = Rank.parse(label)
    if label in present or rank is None:
        return label in present
    others = (Rank.parse(other) for other in present)
    return any(other is not None and rank.matches(other) for other in others)


_Case = tuple[Measured, Threshold, Estimate | None]


def _judge_all(
    cases: Sequence[_Case], min_steps: int, min_share: float, doubt: str | None
) -> tuple[Judgement, ...]:
    """Every threshold in every work group.

    The level of failures holds for all of them together (Holm 1979): each is tested at α over
    the number of those that have not failed.
    """
    alone = sum(estimated is not None for _, _, estimated in cases)
    alpha = ALPHA / max(1, alone)
    while True:
        judgements = tuple(
            judge_finding(*case, min_steps=min_steps, min_share=min_share, doubt=doubt, alpha=alpha)
            for case in cases
        )
        failed = sum(each.verdict == "fail" and each.estimate is not None for each in judgements)
        before, alpha = alpha, ALPHA / max(1, alone - failed)
        if alpha <= before:
            return judgements


def _cases(sums: Sums, thresholds: Sequence[Threshold]) -> list[_Case]:
    """What each threshold is applied to, and its estimate."""
    cases: list[_Case] = []
    for threshold in thresholds:
        metric = METRICS[threshold.metric]
        if metric.of == "steps":
            cases.append(_case_of_steps(sums.walls, threshold))
        elif _is_across_sync(sums.table, threshold):
            cells = cells_across(sums, metric.estimate, threshold.scope, threshold.kernel)
            cases += _cases_of(cells, threshold)
        else:
            cases += _cases_of(sums.groups, threshold)
    return cases


def _is_across_sync(table: KernelTable, threshold: Threshold) -> bool:
    """Whether ranks are compared that meet in collectives, not those with the same input."""
    across = METRICS[threshold.metric].across or threshold.across
    return across == "sync" or (not across and is_without_peers(table))


def _case_of_steps(walls: Walls, threshold: Threshold) -> _Case:
    """The steps of all ranks: whether a rank's GPU idles does not depend on its peers."""
    kind, stage = METRICS[threshold.metric].estimate, threshold.stage
    budget = step_budget.budget_of(walls, stage)
    return budget, threshold, step_budget.estimate(walls, kind, stage)


def _cases_of(groups: Sequence[GroupCells], threshold: Threshold) -> list[_Case]:
    """The finding of each work group, and its estimate."""
    of = {"scope": threshold.scope, "kernel": threshold.kernel, "stage": threshold.stage}
    findings = imbalance_of_groups(groups, **of)
    estimates = [
        None if finding.reason else estimate(cells, METRICS[threshold.metric].estimate, **of)
        for cells, finding in zip(groups, findings, strict=True)
    ]
    return [(finding, threshold, each) for finding, each in zip(findings, estimates, strict=True)]


def judge_finding(
    finding: Measured,
    threshold: Threshold,
    estimated: Estimate | None,
    *,
    min_steps: int = MIN_STEPS,
    min_share: float = MIN_SHARE,
    doubt: str | None = None,
    alpha: float = ALPHA,
) -> Judgement:
    """Judges one finding by one threshold.

    estimated: of the threshold's metric. doubt: why the finding cannot be trusted, if so.
    alpha: probability of a failure by chance.
    """
    value = METRICS[threshold.metric].read(finding)
    reason = doubt or _too_little(finding, threshold, min_steps)
    if reason is not None:
        return _judged(finding, threshold, value, "inconclusive", reason)
    if (decided := _without_estimate(finding, threshold, value, min_share)) is not None:
        return _judged(finding, threshold, value, *decided)
    assert value is not None
    verdict, reason = _compare(finding, threshold, estimated, value, alpha)
    return _judged(finding, threshold, value, verdict, reason, estimated)


def _judged(
    finding: Measured,
    threshold: Threshold,
    value: float | None,
    verdict: VerdictWord,
    reason: str,
    estimated: Estimate | None = None,
) -> Judgement:
    if isinstance(finding, StepBudget):
        return Judgement(threshold, None, value, verdict, reason, estimated, finding)
    return Judgement(threshold, finding, value, verdict, reason, estimated)


def _too_little(finding: Measured, threshold: Threshold, min_steps: int) -> str | None:
    """Why this finding has too little data for a verdict; None if it has enough."""
    prefix = group_prefix(finding)
    if finding.reason:
        return f"{prefix}{finding.reason}"
    steps = finding.steps or 0
    if steps >= min_steps:
        return None
    if not finding.has_steps:
        return (
            f"{prefix}no step markers in the trace: cannot show the {min_steps} steps that a "
            f"verdict on {subject(threshold)} requires (trace.step_delimiter can name the kernel "
            "that begins a step)"
        )
    if isinstance(finding, StepBudget):
        what = f"{count(steps, f'{threshold.stage} step'.strip())} on the rank with fewest"
    elif METRICS[threshold.metric].is_of_whole_steps:
        what = f"{steps:,} {subject(threshold)}"
    else:
        what = f"{count(steps, 'step')} with {subject_of(finding, threshold)}"
    return f"{prefix}{what}, {min_steps} are needed for a verdict{_lost_steps(finding)}"


def _lost_steps(finding: Measured) -> str:
    if not finding.dropped_steps:
        return ""
    of_steps = isinstance(finding, StepBudget)
    why = "cut, or with a compilation or capture" if of_steps else "not whole on every rank"
    return f" ({count(finding.dropped_steps, 'step')} dropped: {why})"


def _without_estimate(
    finding: Measured, threshold: Threshold, value: float | None, min_share: float
) -> tuple[VerdictWord, str] | None:
    """The verdict where it does not depend on how certain the figure is; else None."""
    if isinstance(finding, ImbalanceFinding) and finding.one_sided:
        reason = one_sided_reason(finding, threshold)
        if threshold.kernel:
            return "inconclusive", f"{reason}; its peers may use another kernel for the same work"
        return "fail", reason
    if value is None:
        return "inconclusive", f"{short_reason(finding, threshold)} has no figure in this window"
    failed = METRICS[threshold.metric].is_beyond(value, threshold.limit)
    reason = measured_reason(finding, threshold, value, failed=failed)
    of_compute = finding.share_of_compute if isinstance(finding, ImbalanceFinding) else 1.0
    if threshold.kernel and of_compute < min_share:
        share = f"{100 * of_compute:.2g} % of compute"
        return "pass", f"{reason}; at {share} it is too small to fail (below {100 * min_share:g} %)"
    if not finding.has_steps or math.isinf(threshold.limit):
        return ("fail" if failed else "pass"), reason
    return None


def _compare(
    finding: Measured,
    threshold: Threshold,
    estimated: Estimate | None,
    value: float,
    alpha: float,
) -> tuple[VerdictWord, str]:
    failed = METRICS[threshold.metric].is_beyond(value, threshold.limit)
    reason = measured_reason(finding, threshold, value, failed=failed)
    ends = None if estimated is None else estimated.ends(alpha)
    word = "inconclusive" if ends is None else word_of(threshold, value, ends)
    if ends is None or (word == "inconclusive" and estimated and estimated.interval is None):
        return "inconclusive", f"{reason}; {why_unknown(finding, estimated)}"
    if word == "pass":
        reason += f"; {at_most(threshold, ends)} in this window"
    if word == "fail" and (why := why_not_the_gpu(finding, threshold)):
        return "inconclusive", f"{reason}; {why}"
    if word == "inconclusive":
        reason += f"; {uncertain_reason(threshold, value, ends, finding.steps or 0)}"
    return word, reason


def word_of(threshold: Threshold, value: float, ends: Interval) -> VerdictWord:
    """The verdict on a figure that may be anything between `ends`.

    fail: the figure and both ends are beyond the limit. pass: the figure is not, and both ends
    are within the pass bound.
    """
    metric = METRICS[threshold.metric]
    if metric.is_beyond(value, threshold.limit):
        return "fail" if metric.is_surely_beyond(ends, threshold.limit) else "inconclusive"
    return "pass" if metric.is_surely_within(ends, threshold.limit) else "inconclusive"


def _verdict(judgements: tuple[Judgement, ...], doubt: str | None, sums: Sums | None) -> Verdict:
    if doubt is not None:
        return Verdict("inconclusive", doubt, judgements, sums)
    word = worst_word({judgement.verdict for judgement in judgements})
    if word is None:
        reason = "no threshold is set: figures are recorded, not judged"
        return Verdict("pass", reason, sums=sums)
    deciding = sorted(_of_word(word, judgements), key=severity_of, reverse=True)
    return Verdict(word, _overall_reason(word, deciding, judgements), judgements, sums)


def _overall_reason(
    word: VerdictWord, deciding: Sequence[Judgement], judgements: Sequence[Judgement]
) -> str:
    """The worst judgement in full; the others of a failure by their figures only."""
    if word != "fail":
        reasons = tuple(dict.fromkeys(judgement.reason for judgement in deciding))
        return reasons[0] if word == "pass" else "; ".join(reasons)
    parts = [deciding[0].reason]
    also = [short_reason(each.measured, each.threshold) for each in deciding[1:]]
    not_judged = [each.reason for each in _of_word("inconclusive", judgements)]
    if also:
        parts.append(f"also beyond their limits: {', '.join(also)}")
    if not_judged:
        parts.append(f"not judged: {', '.join(dict.fromkeys(not_judged))}")
    return "; ".join(parts)


def _of_word(word: VerdictWord, judgements: Sequence[Judgement]) -> list[Judgement]:
    return [judgement for judgement in judgements if judgement.verdict == word]


def severity_of(judgement: Judgement) -> tuple[float, float]:
    """Sort key: how far beyond its limit, and no figure is worst."""
    metric = METRICS[judgement.threshold.metric]
    return metric.severity(judgement.value, judgement.threshold.limit)
