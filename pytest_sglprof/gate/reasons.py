"""What a judgement says: the rank, the figures, the limit and the kernel, in one sentence."""

from __future__ import annotations

from pytest_sglprof.analysis.imbalance import ImbalanceFinding
from pytest_sglprof.gate.wording import beside_limit, count, duration, percent, work_words
from pytest_sglprof.metrics import METRICS
from pytest_sglprof.values import Threshold


def uncertain_reason(finding: ImbalanceFinding, threshold: Threshold) -> str:
    """Why a figure beyond its limit is not enough to fail."""
    metric = METRICS[threshold.metric]
    interval = metric.read_interval(finding)
    if interval is None or finding.p_value is None:
        return f"{count(finding.steps or 0, 'step')} cannot tell whether that is chance"
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
    """`DP0: ` where there are several work groups."""
    return f"{finding.group}: " if finding.group else ""


def one_sided_reason(finding: ImbalanceFinding, threshold: Threshold) -> str:
    """For a rank that alone has activity of the scope: no ratio exists."""
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
    """What the sentence of a metric of `ranks` may name.

    group: `DP0: ` or nothing. subject: of the threshold. value, limit: `1.39`, ` (limit 1.10)`.
    slowest: a rank. slowest_is, their: it, or those that share the largest total. most, others,
    mean: the largest total, the median of the others, the mean. lost: time. over: ` over 50
    steps`. longer: of a failure, `; TP1 takes 12.0 ms longer`.
    """
    shown, limit = beside_limit(METRICS[threshold.metric], value, threshold.limit)
    totals = [figure.busy_ns for figure in finding.ranks]
    # Ranks share the largest total only where one of three or more is *faster*.
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
    """`; fused_moe_kernel alone makes 11.3 ms of it`; "" when nothing stands out.

    A scope of several categories names the category first.
    """
    slowest = finding.figure(finding.slowest)
    if slowest is None or finding.others_ns is None or not finding.contributors:
        return ""
    kernel, ns = finding.contributors[0].name, finding.contributors[0].ns
    alone = f"{kernel} alone makes {duration(ns)} of it"
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
