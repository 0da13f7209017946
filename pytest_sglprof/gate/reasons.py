"""What a judgement says: the rank, the figures, the limit and the kernel, in one sentence."""

from __future__ import annotations

from pytest_sglprof.analysis.imbalance import ImbalanceFinding
from pytest_sglprof.analysis.statistics import Interval
from pytest_sglprof.gate.wording import against_limit, count, duration, percent, work_words
from pytest_sglprof.values import Metric, Threshold


def metric_value(finding: ImbalanceFinding, metric: Metric) -> float | None:
    """The figure of a finding that a metric means; None when it has none."""
    if metric == "slowdown":
        return finding.slowdown
    return finding.factor if metric == "imbalance_factor" else finding.lost_share


def metric_interval(finding: ImbalanceFinding, metric: Metric) -> Interval | None:
    """The 95 % interval of the figure that a metric means; None when it has none."""
    if metric == "slowdown":
        return finding.interval
    return finding.factor_interval if metric == "imbalance_factor" else finding.lost_interval


def uncertain_reason(finding: ImbalanceFinding, threshold: Threshold) -> str:
    """Why a figure above its limit is not enough to fail."""
    found = metric_interval(finding, threshold.metric)
    if found is None or finding.p_value is None:
        return f"{count(finding.steps or 0, 'step')} cannot tell whether that is chance"
    low, high = found
    return (
        f"that may be chance: 95 % of resampled steps give {low:.3f} to {high:.3f}, and ranks "
        f"that do not differ look so unequal with p = {finding.p_value:.2g}; record more steps"
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


def measured_reason(finding: ImbalanceFinding, threshold: Threshold, *, failed: bool) -> str:
    """The sentence for a figure that was compared with its limit."""
    if threshold.metric == "slowdown":
        text = _slowdown_text(finding, threshold)
    elif threshold.metric == "imbalance_factor":
        text = _factor_text(finding, threshold)
    else:
        text = _lost_text(finding, threshold)
    if not failed:
        return text
    longer = "" if threshold.metric == "slowdown" else _longer(finding)
    work = work_words(finding.work.word, finding.work.ratio, finding.work.by)
    said = f", {work}" if work else ""
    return f"{text}{longer}{_share_of_steps(finding)}{said}{cause(finding)}"


def short_reason(finding: ImbalanceFinding | None, threshold: Threshold) -> str:
    """`slowdown of moe 1.39 (limit 1.10)`, for lists."""
    value = metric_value(finding, threshold.metric) if finding else None
    prefix = group_prefix(finding) if finding else ""
    what = f"{prefix}{threshold.metric} of {subject(threshold)}"
    if value is None:
        return what
    shown, limit = against_limit(value, threshold.limit)
    return f"{what} {shown}{limit}"


def cause(finding: ImbalanceFinding) -> str:
    """`; fused_moe_kernel alone makes 11.3 ms of it`; "" when nothing stands out.

    A scope of several categories names the category first.
    """
    slowest = finding.figure(finding.slowest)
    if slowest is None or finding.others_ns is None or not finding.contributors:
        return ""
    excess = slowest.busy_ns - finding.others_ns
    kernel, ns = finding.contributors[0].name, finding.contributors[0].ns
    alone = f"{kernel} alone makes {duration(ns)} of it"
    if ns > excess:
        alone = f"{kernel} alone takes {duration(ns)} longer"
    if finding.kernel or finding.scope not in ("compute", "all"):
        return "" if kernel == finding.kernel else f"; {alone}"
    category = finding.category_contributors[0].name
    return f"; most of all in {category}: {alone}"


def _slowdown_text(finding: ImbalanceFinding, threshold: Threshold) -> str:
    shown, limit = against_limit(finding.slowdown or 0.0, threshold.limit)
    what, most = subject(threshold), max(figure.busy_ns for figure in finding.ranks)
    if finding.slowest is None and most == finding.others_ns:
        return f"{group_prefix(finding)}no rank is slower in {what}{_over(finding)}{limit}"
    # Ranks share the largest total only where one of three or more is *faster*.
    tied = [figure.rank for figure in finding.ranks if figure.busy_ns == most]
    who = f"{finding.slowest} is" if finding.slowest else f"{', '.join(tied)} are equally"
    return (
        f"{who} {shown}x slower than {'its' if finding.slowest else 'their'} peers in "
        f"{what}{limit}: {duration(most)} against {duration(finding.others_ns or 0)} a rank"
        f"{_over(finding)}"
    )


def _factor_text(finding: ImbalanceFinding, threshold: Threshold) -> str:
    shown, limit = against_limit(finding.factor or 0.0, threshold.limit)
    totals = [figure.busy_ns for figure in finding.ranks]
    who = finding.slowest or "the slowest rank"
    return (
        f"{group_prefix(finding)}the imbalance factor of {subject(threshold)} is {shown}"
        f"{limit}: {who} has {duration(max(totals))}, "
        f"the mean is {duration(sum(totals) / len(totals))}{_over(finding)}"
    )


def _lost_text(finding: ImbalanceFinding, threshold: Threshold) -> str:
    value = 100 * (finding.lost_share or 0.0)
    shown, limit = against_limit(value, 100 * threshold.limit, unit=" %")
    return (
        f"{group_prefix(finding)}{shown} of the time in {subject(threshold)} is lost to "
        f"imbalance{limit}: {duration(finding.lost_ns)}{_over(finding)}"
    )


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
    return f" over {count(finding.steps, 'step')}"
