"""From a kernel table and thresholds to one verdict with its reason and its numbers.

Too little data never passes: it is inconclusive, whatever the figures look like.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import msgspec

from pytest_sglprof.analysis.cells import GroupCells, measure
from pytest_sglprof.analysis.imbalance import ImbalanceFinding, imbalance_of_groups
from pytest_sglprof.analysis.statistics import MAX_P
from pytest_sglprof.gate.reasons import (
    group_prefix,
    measured_reason,
    one_sided_reason,
    short_reason,
    subject,
    uncertain_reason,
)
from pytest_sglprof.gate.wording import count
from pytest_sglprof.metrics import METRICS, MIN_SHARE, MIN_STEPS
from pytest_sglprof.ranks import Rank
from pytest_sglprof.values import Threshold, VerdictWord, worst_word

if TYPE_CHECKING:
    from pytest_sglprof.trace.table import KernelTable


class Judgement(msgspec.Struct, frozen=True):
    """One threshold applied to one work group.

    finding: None when there was nothing to measure. value: the metric's figure, None
    where it does not exist.
    """

    threshold: Threshold
    finding: ImbalanceFinding | None
    value: float | None
    verdict: VerdictWord
    reason: str


@dataclass(frozen=True)
class Verdict:
    """The verdict of one window: the word, why, and each judgement behind it.

    groups: the measured cells, so that a report need not sum the table again.
    """

    word: VerdictWord
    reason: str
    judgements: tuple[Judgement, ...] = ()
    groups: tuple[GroupCells, ...] = field(default=(), repr=False, compare=False)

    @property
    def worst(self) -> Judgement | None:
        """The judgement that decided: of the verdict's word, farthest beyond its limit."""
        return max(_of_word(self.word, self.judgements), key=_severity, default=None)

    def of(self, threshold: Threshold) -> Verdict:
        """The part of it that is about one threshold."""
        judgements = tuple(each for each in self.judgements if each.threshold == threshold)
        return _verdict(judgements, None, self.groups)


def undecided(thresholds: Sequence[Threshold], reason: str) -> Verdict:
    """The verdict where nothing was measured: `reason` says why."""
    judgements = tuple(Judgement(each, None, None, "inconclusive", reason) for each in thresholds)
    return Verdict("inconclusive", reason, judgements)


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
    """Judges every threshold in every work group of `table`.

    min_steps: compared steps that a judgement needs (0 also accepts a table without
    steps). min_share: a kernel threshold cannot fail below this share of compute, 0 to 1.
    expected_ranks, missing_ranks: labels. incomplete_reason: why the window is not
    complete, None when it is. A missing rank, a truncated trace or an incomplete window makes
    everything inconclusive; otherwise the verdict is fail if any judgement fails, else
    inconclusive if any is, else pass.
    """
    doubt = _doubt(table, expected_ranks, missing_ranks, incomplete_reason)
    groups = measure(table) if table is not None else ()
    judgements = tuple(
        judgement
        for threshold in thresholds
        for judgement in _judge_threshold(groups, threshold, min_steps, min_share, doubt)
    )
    return _verdict(judgements, doubt, groups)


def _doubt(
    table: KernelTable | None,
    expected: Sequence[str],
    missing: Sequence[str],
    incomplete_reason: str | None,
) -> str | None:
    """Why nothing in this window may be trusted; None when all may."""
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
    return "; ".join(doubts) or None


def _is_in(label: str, present: Sequence[str]) -> bool:
    """True when `present` holds this rank, maybe without its dimensions of size 1."""
    rank = Rank.parse(label)
    if label in present or rank is None:
        return label in present
    others = (Rank.parse(other) for other in present)
    return any(other is not None and rank.matches(other) for other in others)


def _judge_threshold(
    groups: Sequence[GroupCells],
    threshold: Threshold,
    min_steps: int,
    min_share: float,
    doubt: str | None,
) -> tuple[Judgement, ...]:
    if not groups:
        reason = doubt or "the window has no rank"
        return (Judgement(threshold, None, None, "inconclusive", reason),)
    findings = imbalance_of_groups(
        groups, scope=threshold.scope, kernel=threshold.kernel, stage=threshold.stage
    )
    return tuple(
        judge_finding(finding, threshold, min_steps=min_steps, min_share=min_share, doubt=doubt)
        for finding in findings
    )


def judge_finding(
    finding: ImbalanceFinding,
    threshold: Threshold,
    *,
    min_steps: int = MIN_STEPS,
    min_share: float = MIN_SHARE,
    doubt: str | None = None,
) -> Judgement:
    """One threshold on what was measured for it; `doubt`: why none of it may be trusted."""
    value = METRICS[threshold.metric].read(finding)
    verdict: VerdictWord = "inconclusive"
    reason = doubt or _too_little(finding, threshold, min_steps)
    if reason is None:
        verdict, reason = _compare(finding, threshold, value, min_share)
    return Judgement(threshold, finding, value, verdict, reason)


def _too_little(finding: ImbalanceFinding, threshold: Threshold, min_steps: int) -> str | None:
    """Why this finding has too little data for a verdict; None when it has enough."""
    prefix = group_prefix(finding)
    if finding.reason:
        return f"{prefix}{finding.reason}"
    steps = finding.steps or 0
    if steps >= min_steps:
        return None
    if not finding.has_steps:
        return (
            f"{prefix}no step markers in the trace: cannot show the {min_steps} steps that a "
            f"verdict on {subject(threshold)} requires"
        )
    return (
        f"{prefix}{count(steps, 'step')} with {subject(threshold)}, "
        f"{min_steps} are needed for a verdict{_lost_steps(finding)}"
    )


def _lost_steps(finding: ImbalanceFinding) -> str:
    if not finding.dropped_steps:
        return ""
    return f" ({count(finding.dropped_steps, 'step')} dropped: not whole on every rank)"


def _compare(
    finding: ImbalanceFinding, threshold: Threshold, value: float | None, min_share: float
) -> tuple[VerdictWord, str]:
    if finding.one_sided:
        reason = one_sided_reason(finding, threshold)
        if threshold.kernel:
            return "inconclusive", f"{reason}; its peers may use another kernel for the same work"
        return "fail", reason
    if value is None:
        return "inconclusive", f"{short_reason(finding, threshold)} has no figure in this window"
    metric = METRICS[threshold.metric]
    failed = metric.is_beyond(value, threshold.limit)
    reason = measured_reason(finding, threshold, value, failed=failed)
    if failed and threshold.kernel and finding.share_of_compute < min_share:
        share = f"{100 * finding.share_of_compute:.2g} % of compute"
        return "pass", f"{reason}; at {share} it is too small to fail (below {100 * min_share:g} %)"
    if failed and finding.has_steps and not _is_certain(finding, threshold):
        return "inconclusive", f"{reason}; {uncertain_reason(finding, threshold)}"
    return ("fail" if failed else "pass"), reason


def _is_certain(finding: ImbalanceFinding, threshold: Threshold) -> bool:
    """Whether a figure beyond its limit is there by more than chance.

    The whole interval must lie beyond the limit, and ranks must differ by more than permuted
    labels do, unless the metric needs no p.
    """
    metric = METRICS[threshold.metric]
    interval = metric.read_interval(finding)
    if interval is None or not metric.is_surely_beyond(interval, threshold.limit):
        return False
    return not metric.needs_p or (finding.p_value is not None and finding.p_value <= MAX_P)


def _verdict(
    judgements: tuple[Judgement, ...], doubt: str | None, groups: tuple[GroupCells, ...]
) -> Verdict:
    if doubt is not None:
        return Verdict("inconclusive", doubt, judgements, groups)
    word = worst_word({judgement.verdict for judgement in judgements})
    if word is None:
        reason = "no threshold is set: figures are recorded, not judged"
        return Verdict("pass", reason, groups=groups)
    deciding = sorted(_of_word(word, judgements), key=_severity, reverse=True)
    return Verdict(word, _overall_reason(word, deciding, judgements), judgements, groups)


def _overall_reason(
    word: VerdictWord, deciding: Sequence[Judgement], judgements: Sequence[Judgement]
) -> str:
    """The worst judgement in full; the others of a failure by their figures only."""
    if word != "fail":
        reasons = tuple(dict.fromkeys(judgement.reason for judgement in deciding))
        return reasons[0] if word == "pass" else "; ".join(reasons)
    parts = [deciding[0].reason]
    also = [short_reason(each.finding, each.threshold) for each in deciding[1:]]
    not_judged = [each.reason for each in _of_word("inconclusive", judgements)]
    if also:
        parts.append(f"also beyond their limits: {', '.join(also)}")
    if not_judged:
        parts.append(f"not judged: {', '.join(dict.fromkeys(not_judged))}")
    return "; ".join(parts)


def _of_word(word: VerdictWord, judgements: Sequence[Judgement]) -> list[Judgement]:
    return [judgement for judgement in judgements if judgement.verdict == word]


def _severity(judgement: Judgement) -> tuple[float, float]:
    metric = METRICS[judgement.threshold.metric]
    return metric.severity(judgement.value, judgement.threshold.limit)
