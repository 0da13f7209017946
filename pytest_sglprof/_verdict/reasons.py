"""The reasons of verdicts: one sentence that names the rank, the figures, the limit, the kernel."""

from __future__ import annotations

import math

from pytest_sglprof._analysis.budget import StepBudget
from pytest_sglprof._analysis.certainty import MIN_EFFECTIVE, Estimate, Interval
from pytest_sglprof._analysis.imbalance import ImbalanceFinding
from pytest_sglprof._analysis.lives import LifeChange
from pytest_sglprof._analysis.passes import STATIC
from pytest_sglprof._baselines.records import LoadFigure
from pytest_sglprof._config.model import Threshold
from pytest_sglprof._metrics import METRICS
from pytest_sglprof._verdict.steps import facts_of_steps
from pytest_sglprof._verdict.wording import (
    beside_limit,
    count,
    duration,
    percent,
    sentence_of,
    shorten,
    work_words,
)

Measured = ImbalanceFinding | StepBudget


def at_most(threshold: Threshold, ends: Interval) -> str:
    """How far a pass says that the figure may be from the best: `at most 1.012`."""
    metric = METRICS[threshold.metric]
    if metric.better == "higher":
        return f"at least {metric.format(ends[0], finer=1)}"
    return f"at most {metric.format(ends[1], finer=1)}"


def why_not_the_gpu(finding: Measured, threshold: Threshold) -> str:
    """Why a rank that is slower at the same work may be so by a kernel; "" if it is surely slower.

    A slow GPU is slower in every category. Where ranks have different input, what one category
    alone shows may be kernels whose shapes are not the same after all.
    """
    if not isinstance(finding, ImbalanceFinding) or finding.across != "sync":
        return ""
    is_of_one = threshold.kernel or threshold.scope in STATIC
    slower = finding.slower_in or ()
    if threshold.metric != "slowdown" or is_of_one or len(slower) != 1:
        return ""
    return (
        f"it is slower in {slower[0]} alone, so it may be the kernel and not the GPU: judge "
        f"{slower[0]} as a scope of its own, if its shapes are the same on all ranks"
    )


def uncertain_reason(threshold: Threshold, value: float, ends: Interval, steps: int) -> str:
    """Why a figure is too near its limit for a verdict, and what would settle it."""
    metric = METRICS[threshold.metric]
    low, high = (metric.format(end, finer=1) for end in ends)
    bound = metric.pass_bound(threshold.limit)
    nearest, farthest = ends if metric.better == "lower" else ends[::-1]
    if metric.is_beyond(value, threshold.limit):
        why, room, reach = "that may be chance", value - threshold.limit, value - nearest
    else:
        allowed = "above" if metric.better == "higher" else "below"
        why = f"a pass must be surely {allowed} {metric.format(bound, finer=1)}"
        room, reach = bound - value, farthest - value
    needed = steps * (reach / room) ** 2 if room else math.inf
    settle = "more steps would hardly settle it"
    if needed <= MANY_TIMES * steps:
        settle = f"about {_rounded(needed):,} steps would settle it"
    return f"{why}: it may be {low} to {high}; {settle}"


MANY_TIMES = 30  # as many steps; more are not worth recording


def _rounded(number: float) -> int:
    """Two significant digits, rounded up."""
    scale = int(10 ** max(0, math.floor(math.log10(max(number, 1))) - 1))
    return math.ceil(number / scale) * scale


def why_unknown(finding: Measured, estimated: Estimate | None) -> str:
    """Why it is not known what a figure may be."""
    if estimated is None and isinstance(finding, StepBudget):
        return "a rank has no figure"
    if estimated is None:
        return "in more than a fifth of the steps a rank or its peers have none"
    if estimated.steps < MIN_EFFECTIVE:
        return f"{MIN_EFFECTIVE:g} steps or more are needed to know how certain that is"
    return (
        f"its {count(finding.steps or 0, 'step')} resemble each other so much that they are worth "
        f"{estimated.effective:.1f} independent ones; {MIN_EFFECTIVE:g} are needed"
    )


def subject(threshold: Threshold) -> str:
    """`moe`, `kernels like /fused_moe/`, `compute of decode steps`; `decode steps`, `steps`."""
    if METRICS[threshold.metric].is_of_whole_steps:
        return f"{threshold.stage} steps".strip()
    what = f"kernels like /{threshold.kernel}/" if threshold.kernel else threshold.scope
    return f"{what} of {threshold.stage} steps" if threshold.stage else what


def figure_name(threshold: Threshold, group: str = "") -> str:
    """`DP0: slowdown of moe across sync`, `ttft_p99`, for lists."""
    if METRICS[threshold.metric].of == "load":
        return threshold.metric
    prefix = f"{group}: " if group else ""
    across = f" across {threshold.across}" if threshold.across else ""
    return f"{prefix}{threshold.metric} of {subject(threshold)}{across}"


def subject_of(finding: ImbalanceFinding, threshold: Threshold) -> str:
    """`gemm, norm and quantization of equal shapes` where ranks have different input."""
    if finding.across == "peers" or threshold.metric != "slowdown":
        return subject(threshold)
    what = f"{', '.join(STATIC[:-1])} and {STATIC[-1]}"
    if threshold.kernel or threshold.scope in STATIC:
        what = f"kernels like /{threshold.kernel}/" if threshold.kernel else threshold.scope
    return f"{what} of equal shapes"


def group_prefix(finding: Measured) -> str:
    """`DP0: ` if there are several work groups, else ""."""
    group = _group_of(finding)
    return f"{group}: " if group else ""


def _group_of(finding: object) -> str:
    return finding.group if isinstance(finding, ImbalanceFinding) else ""


def one_sided_reason(finding: ImbalanceFinding, threshold: Threshold) -> str:
    """The sentence for a scope that only one rank has, so that there is no ratio."""
    slowest = finding.figure(finding.slowest)
    total = duration(slowest.busy_ns if slowest else 0)
    return f"only {finding.slowest} has any {subject(threshold)}: {total}{_over(finding)}"


def measured_reason(finding: Measured, threshold: Threshold, value: float, *, failed: bool) -> str:
    """The sentence for a figure that was compared with its limit."""
    metric = METRICS[threshold.metric]
    text = sentence_of(metric, facts(finding, threshold, value, failed=failed))
    if not failed or isinstance(finding, StepBudget):
        return text
    work = work_words(finding.work.word, finding.work.ratio, finding.work.by)
    beside_work = f", {work}" if work else ""
    return f"{text}{_share_of_steps(finding)}{beside_work}{cause(finding)}"


def facts(finding: Measured, threshold: Threshold, value: float, *, failed: bool) -> dict[str, str]:
    """The fields that the sentence of a metric can use, by its kind."""
    if isinstance(finding, StepBudget):
        return facts_of_steps(finding, threshold, value)
    return _facts_of_ranks(finding, threshold, value, failed=failed)


def _facts_of_ranks(
    finding: ImbalanceFinding, threshold: Threshold, value: float, *, failed: bool
) -> dict[str, str]:
    """The fields of a metric of `ranks`.

    group: `DP0: ` or "". subject: of the threshold. value, limit: `1.39`, ` (limit 1.10)`.
    slowest_is, peers: `TP1 is` and `its peers`, or the plural if several ranks are the slowest;
    `the other ranks` where those have different input. most,
    others: total of the slowest rank, the median of the others. heaviest, largest, mean: the
    rank with the largest total, that total, the mean. lost: lost time; noise: the share that
    noise alone loses. spiky, spikes: the rank that loses most in spikes, `6 of the 7 steps`.
    over: ` over 50 steps`. longer: `; TP1 takes 12.0 ms longer` if the threshold failed, else "".
    """
    shown, limit = beside_limit(METRICS[threshold.metric], value, threshold.limit)
    totals = [figure.busy_ns for figure in finding.ranks]
    heaviest = [figure.rank for figure in finding.ranks if figure.busy_ns == max(totals)]
    slowest = finding.figure(finding.slowest)
    spiked, of_all = finding.spike_steps or 0, finding.spike_steps_of_all or 0
    return {
        "group": group_prefix(finding),
        "subject": subject_of(finding, threshold),
        "value": shown,
        "limit": limit,
        # Ranks are equally slow only if one of three or more ranks is *faster*.
        "slowest_is": f"{finding.slowest} is" if slowest else f"{', '.join(heaviest)} are equally",
        "peers": _peers(finding) if finding.across == "peers" else "the other ranks",
        "most": duration(slowest.busy_ns if slowest else max(totals)),
        "others": duration(finding.others_ns or 0),
        "heaviest": heaviest[0] if len(heaviest) == 1 else "the slowest rank",
        "largest": duration(max(totals)),
        "mean": duration(sum(totals) / len(totals)),
        "lost": duration(finding.lost_ns),
        "noise": percent(finding.noise_share, 1),
        "spiky": finding.spike_rank or "the slowest rank",
        "spikes": f"{spiked} of the {count(of_all, 'step')}",
        "over": _over(finding),
        "longer": _longer(finding) if failed else "",
    }


def _peers(finding: ImbalanceFinding) -> str:
    return "its peers" if finding.slowest else "their peers"


def short_reason(finding: Measured | LifeChange | LoadFigure | None, threshold: Threshold) -> str:
    """`slowdown of moe 1.39 (limit 1.10)`, for lists."""
    metric = METRICS[threshold.metric]
    value = metric.read(finding) if finding else None
    what = figure_name(threshold, _group_of(finding))
    if value is None:
        return what
    shown, limit = beside_limit(metric, value, threshold.limit)
    return f"{what} {shown}{limit}"


def headline(finding: Measured | LifeChange | LoadFigure | None, threshold: Threshold) -> str:
    """`TP1 1.19x slower in compute (limit 1.10), fused_moe_kernel +50 ms`: one line of a list."""
    text = short_reason(finding, threshold)
    if not isinstance(finding, ImbalanceFinding) or finding.slowest is None:
        return text
    if finding.one_sided:
        return one_sided_reason(finding, threshold)
    if threshold.metric == "slowdown":
        metric = METRICS[threshold.metric]
        shown, limit = beside_limit(metric, metric.read(finding), threshold.limit)
        subject_words = subject_of(finding, threshold)
        text = f"{group_prefix(finding)}{finding.slowest} {shown}x slower in {subject_words}{limit}"
    else:
        text = f"{text}: {finding.slowest}"
    if not finding.contributors:
        return text
    kernel = finding.contributors[0]
    return f"{text}, {shorten(kernel.name, 60)} +{duration(kernel.ns)}"


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
    if slowest is None or finding.others_ns is None or slowest.busy_ns <= finding.others_ns:
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
