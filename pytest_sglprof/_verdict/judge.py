"""Judges a kernel table against thresholds: one verdict with its reason and its numbers.

Too little data never passes: it is inconclusive, whatever the figures are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import msgspec

from pytest_sglprof._analysis.certainty import MAX_P
from pytest_sglprof._analysis.imbalance import ImbalanceFinding, imbalance_of_groups
from pytest_sglprof._analysis.times import GroupCells, sum_times
from pytest_sglprof._config.model import Threshold
from pytest_sglprof._metrics import METRICS, MIN_SHARE, MIN_STEPS, VerdictWord, worst_word
from pytest_sglprof._ranks import Rank
from pytest_sglprof._verdict.wording import beside_limit, count, duration, percent, work_words

if TYPE_CHECKING:
    from pytest_sglprof._trace.table import KernelTable


class Judgement(msgspec.Struct, frozen=True):
    """One threshold applied to one work group.

    finding: None if there was nothing to measure. value: the metric's figure; None if it does
    not exist.
    """

    threshold: Threshold
    finding: ImbalanceFinding | None
    value: float | None
    verdict: VerdictWord
    reason: str


@dataclass(frozen=True)
class Verdict:
    """The verdict on one window: the word, its reason, and the judgements behind it.

    groups: the summed cells, so that a report need not sum the table again.
    """

    word: VerdictWord
    reason: str
    judgements: tuple[Judgement, ...] = ()
    groups: tuple[GroupCells, ...] = field(default=(), repr=False, compare=False)

    @property
    def deciding(self) -> Judgement | None:
        """Of the judgements with the verdict's word, the one farthest beyond its limit."""
        return max(_of_word(self.word, self.judgements), key=_severity, default=None)

    def of(self, threshold: Threshold) -> Verdict:
        """The verdict on one threshold alone."""
        judgements = tuple(each for each in self.judgements if each.threshold == threshold)
        return _verdict(judgements, None, self.groups)


def undecided(thresholds: Sequence[Threshold], reason: str) -> Verdict:
    """The inconclusive verdict on a window where nothing was measured, for `reason`."""
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

    table: None if nothing could be read. min_steps: number of compared steps that a judgement
    needs (0 also accepts a table without steps). min_share: share of compute, 0 to 1, below
    which a kernel cannot fail its threshold. expected_ranks, missing_ranks: labels.
    incomplete_reason: why the window is not complete; None if it is. A missing rank, a
    truncated trace or an incomplete window makes everything inconclusive; otherwise the
    verdict is fail if any judgement fails, else inconclusive if any is, else pass.
    """
    doubt = _doubt(table, expected_ranks, missing_ranks, incomplete_reason)
    groups = sum_times(table) if table is not None else ()
    judgements = tuple(
        judgement
        for threshold in thresholds
        for judgement in _judge_threshold(groups, threshold, min_steps, min_share, doubt)
    )
    verdict = _verdict(judgements, doubt, groups)
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
    """Judges one finding by one threshold. doubt: why the finding cannot be trusted, if so."""
    value = METRICS[threshold.metric].read(finding)
    verdict: VerdictWord = "inconclusive"
    reason = doubt or _too_little(finding, threshold, min_steps)
    if reason is None:
        verdict, reason = _compare(finding, threshold, value, min_share)
    return Judgement(threshold, finding, value, verdict, reason)


def _too_little(finding: ImbalanceFinding, threshold: Threshold, min_steps: int) -> str | None:
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
    """Whether a figure beyond its limit is unlikely to be chance.

    The whole interval must lie beyond the limit and, if the metric needs p, ranks must differ
    by more than they do when their labels are permuted.
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


# Reasons. One sentence names the rank, the figures, the limit and the kernel.


def uncertain_reason(finding: ImbalanceFinding, threshold: Threshold) -> str:
    """Why a figure beyond its limit is not enough to fail."""
    metric = METRICS[threshold.metric]
    interval = metric.read_interval(finding)
    if interval is None or finding.p_value is None:
        return f"{count(finding.steps or 0, 'step')} are too few to rule out chance"
    low, high = (metric.format(end, finer=1) for end in interval)
    by_chance = ""
    if metric.needs_p:
        by_chance = f", and a difference this large arises by chance with p = {finding.p_value:.2g}"
    return (
        f"that may be chance: 95 % of resampled steps give {low} to {high}{by_chance}; "
        "record more steps"
    )


def subject(threshold: Threshold) -> str:
    """`moe`, `kernels like /fused_moe/`, `compute of decode steps`."""
    what = f"kernels like /{threshold.kernel}/" if threshold.kernel else threshold.scope
    return f"{what} of {threshold.stage} steps" if threshold.stage else what


def group_prefix(finding: ImbalanceFinding) -> str:
    """`DP0: ` if there are several work groups, else ""."""
    return f"{finding.group}: " if finding.group else ""


def one_sided_reason(finding: ImbalanceFinding, threshold: Threshold) -> str:
    """The sentence for a scope that only one rank has, so that there is no ratio."""
    slowest = finding.figure(finding.slowest)
    total = duration(slowest.busy_ns if slowest else 0)
    return f"only {finding.slowest} has any {subject(threshold)}: {total}{_over(finding)}"


def measured_reason(
    finding: ImbalanceFinding, threshold: Threshold, value: float, *, failed: bool
) -> str:
    """The sentence for a figure that was compared with its limit."""
    metric = METRICS[threshold.metric]
    sentence = metric.at_best if metric.at_best and value == metric.best else metric.sentence
    text = sentence.format(**facts(finding, threshold, value, failed=failed))
    if not failed:
        return text
    work = work_words(finding.work.word, finding.work.ratio, finding.work.by)
    beside_work = f", {work}" if work else ""
    return f"{text}{_share_of_steps(finding)}{beside_work}{cause(finding)}"


def facts(
    finding: ImbalanceFinding, threshold: Threshold, value: float, *, failed: bool
) -> dict[str, str]:
    """The fields that the sentence of a metric of `ranks` can use.

    group: `DP0: ` or "". subject: of the threshold. value, limit: `1.39`, ` (limit 1.10)`.
    slowest: a rank. slowest_is, their: `TP1 is` and `its`, or the plural if several ranks share
    the largest total. most, others, mean: the largest total, the median of the others, the
    mean. lost: lost time. over: ` over 50 steps`. longer: `; TP1 takes 12.0 ms longer` if the
    threshold failed, else "".
    """
    shown, limit = beside_limit(METRICS[threshold.metric], value, threshold.limit)
    totals = [figure.busy_ns for figure in finding.ranks]
    # Ranks share the largest total only if one of three or more ranks is *faster*.
    tied = [figure.rank for figure in finding.ranks if figure.busy_ns == max(totals)]
    return {
        "group": group_prefix(finding),
        "subject": subject(threshold),
        "value": shown,
        "limit": limit,
        "slowest": finding.slowest or "the slowest rank",
        "slowest_is": f"{finding.slowest} is"
        if finding.slowest
        else f"{', '.join(tied)} are equally",
        "their": "its" if finding.slowest else "their",
        "most": duration(max(totals)),
        "others": duration(finding.others_ns or 0),
        "mean": duration(sum(totals) / len(totals)),
        "lost": duration(finding.lost_ns),
        "over": _over(finding),
        "longer": _longer(finding) if failed else "",
    }


def short_reason(finding: ImbalanceFinding | None, threshold: Threshold) -> str:
    """`slowdown of moe 1.39 (limit 1.10)`, for lists."""
    metric = METRICS[threshold.metric]
    value = metric.read(finding) if finding else None
    prefix = group_prefix(finding) if finding else ""
    what = f"{prefix}{threshold.metric} of {subject(threshold)}"
    if value is None:
        return what
    shown, limit = beside_limit(metric, value, threshold.limit)
    return f"{what} {shown}{limit}"


def cause(finding: ImbalanceFinding) -> str:
    """`; fused_moe_kernel alone accounts for 11.3 ms of the difference`.

    "" if no kernel stands out. For a scope of several categories the category comes first.
    """
    slowest = finding.figure(finding.slowest)
    if slowest is None or finding.others_ns is None or not finding.contributors:
        return ""
    kernel, ns = finding.contributors[0].name, finding.contributors[0].ns
    alone = f"{kernel} alone accounts for {duration(ns)} of the difference"
    if ns > slowest.busy_ns - finding.others_ns:
        alone = f"{kernel} alone takes {duration(ns)} longer"
    if finding.kernel or finding.scope not in ("compute", "all"):
        return "" if kernel == finding.kernel else f"; {alone}"
    category = finding.category_contributors[0].name
    return f"; most of all in {category}: {alone}"


def _longer(finding: ImbalanceFinding) -> str:
    slowest = finding.figure(finding.slowest)
    if slowest is None or finding.others_ns is None:
        return ""
    return f"; {slowest.rank} takes {duration(slowest.busy_ns - finding.others_ns)} longer"


def _share_of_steps(finding: ImbalanceFinding) -> str:
    slowest = finding.figure(finding.slowest)
    if slowest is None or slowest.slowest_share is None or (finding.steps or 0) < 2:
        return ""
    return f", slowest in {percent(slowest.slowest_share)} of the steps"


def _over(finding: ImbalanceFinding) -> str:
    if finding.steps is None:
        return " over the whole window"
    return f" over {count(finding.steps or 0, 'step')}"
