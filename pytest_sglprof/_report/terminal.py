"""What the terminal shows of windows and runs: a compact rank table, one summary section."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pytest_sglprof._metrics import MEASURED, metrics_of
from pytest_sglprof._trace.categories import NOT_COMPUTE
from pytest_sglprof._verdict.life_words import figure_label
from pytest_sglprof._verdict.reasons import headline as headline_of
from pytest_sglprof._verdict.reasons import short_reason
from pytest_sglprof._verdict.steps import budget_table
from pytest_sglprof._verdict.wording import (
    count,
    duration,
    mebibytes,
    milliseconds,
    percent,
    shorten,
    text_table,
    work_words,
)

if TYPE_CHECKING:
    from pytest_sglprof._analysis.budget import StepBudget
    from pytest_sglprof._analysis.imbalance import ImbalanceFinding
    from pytest_sglprof._analysis.lives import LifeChange
    from pytest_sglprof._baselines.records import LoadFigure
    from pytest_sglprof._report.model import (
        RecordedServer,
        RecordedTest,
        RecordedWindow,
        Results,
    )
    from pytest_sglprof._report.regression import RecordedRegression
    from pytest_sglprof._verdict.judge import Judgement


STANDIN_NOTE = "embedded stand-in server: these figures say nothing about SGLang"
CPU_SOURCES = {"cpu_op": "CPU operators", "nvtx": "NVTX ranges"}
MAX_RANKS = 16
MAX_NAME = 60
MAX_PASSED = 20  # windows that passed
MAX_KERNELS = 5  # of the scan between server lives


def rank_table(window: RecordedWindow) -> list[str]:
    """Lines for one window: its verdict, a row a rank, the kernel that contributes most.

    Columns: rank, compute ms, communication ms (busy time), the scope that decided (where it is
    another), share of steps in which the rank is slowest. Of more than 16 ranks of a work
    group, the slowest and the fastest are shown. Of ranks with different input a sentence says what
    they cost each other. Where a metric of whole steps decided, also what a step is made of.
    """
    lines = [f"{window_title(window)}: {window.word}", window.reason]
    if window.state != "complete" and window.state_reason not in window.reason:
        lines.append(f"window {window.state}: {window.state_reason}")
    lines.extend(f"  | {line}" for line in window.log)
    if window.onset is not None:
        lines.append(f"onset at {window.onset.time}: {window.onset.sentence}")
    decisive = deciding_finding(window)
    scope = decided_scope(window)
    head = ["rank", "compute ms", "communication ms"]
    if scope:
        head.append(f"{shorten(scope, 30)} ms")
    head.append("slowest in")
    computes = window.of_scope("compute")
    rows = [row for compute in computes for row in _group_rows(window, compute, decisive)]
    if rows:
        lines.extend(("", *text_table(head, rows)))
    if any(compute.compared_steps == 0 for compute in computes):
        lines.append("no step could be compared: times are kernel times of the whole window")
    lines.extend((*contributor_lines(decisive), *spike_lines(decisive)))
    lines.extend(each.sentence for each in window.syncs or () if each.sentence)
    budget = None if window.deciding is None else window.deciding.budget
    if budget is not None:
        lines += ["", *budget_table(budget)]
    return [*lines, *regression_lines(window)]


def headline(window: RecordedWindow) -> str:
    """The verdict in one line, for a list of failed tests."""
    judgement = window.deciding
    if window.verdict == "fail" and judgement is not None:
        return headline_of(_measured(judgement), judgement.threshold)
    return f"{window.word}: {window.reason.partition(chr(10))[0]}"


def _figures_and_limits(window: RecordedWindow) -> str:
    """`slowdown of compute 1.01 (limit 1.10)` for each threshold of a window that passed."""
    if window.repeats is not None or not window.judgements:
        return window.reason
    return ", ".join(short_reason(_measured(each), each.threshold) for each in window.judgements)


def _measured(
    judgement: Judgement,
) -> ImbalanceFinding | StepBudget | LifeChange | LoadFigure | None:
    return judgement.measured or judgement.change or judgement.load


def summary_lines(run: Results) -> list[str]:
    """Lines of the summary section; without a window only what went wrong with servers."""
    of_servers = [
        line for server in run.servers for line in (*_keeper_lines(server), *_left_lines(server))
    ]
    if not run.windows:
        return of_servers
    words = [window.word for window in run.windows if window.is_judged]
    order = ("pass", "fail", "inconclusive", MEASURED)
    parts = [f"{words.count(word)} {word}" for word in order if word in words]
    lines = [f"{count(len(run.windows), 'profile window')}: {', '.join(parts)}"]
    if run.summary.standin:
        lines.append(STANDIN_NOTE)
    shown = _last_lives(run.windows)
    for word in ("fail", "inconclusive"):
        for window in shown:
            if window.verdict == word and window.repeat_index == 1:
                lines.append(f"{word.upper()} {window.nodeid} {window_title(window)}")
                lines.append(f"  {window.reason}")
    passed = [each for each in shown if each.verdict == "pass" and each.repeat_index == 1]
    lines.extend(
        f"{each.word.upper()} {each.nodeid} {window_title(each)}: {_figures_and_limits(each)}"
        for each in passed[:MAX_PASSED]
    )
    if len(passed) > MAX_PASSED:
        lines.append(f"and {len(passed) - MAX_PASSED} more passed")
    if any(map(_may_be_accepted, shown)):
        lines.append(
            f'if this change is intended: sglprof baseline accept {run.run.id} --reason "…"'
        )
    lines.extend(
        f"BASELINE {window.nodeid} {window_title(window)}: {baseline_line(window.regression)}"
        for window in shown
        if window.regression is not None and window.verdict == "pass" and window.repeat_index == 1
    )
    lines.extend(_attempt_lines(run.tests))
    return [*lines, *cost_lines(run.windows), *of_servers]


def cost_lines(windows: Sequence[RecordedWindow]) -> list[str]:
    """One line: what the windows cost together; none where nothing is known of it.

    `cost: serving stood still for 3.1 s, at most 1.20 s for a window (not known of 1); …`.
    """
    costs = [each.cost for each in windows if each.cost is not None]
    if not costs:
        return []
    stalls = [each.stall_s for each in costs if each.stall_s is not None]
    parts = ["how long serving stood still is not known"]
    if stalls:
        most = f", at most {max(stalls):.2f} s for a window" if len(stalls) > 1 else ""
        unknown = f" (not known of {len(costs) - len(stalls)})" * (len(stalls) < len(costs))
        parts = [f"serving stood still for {math.fsum(stalls):.2f} s{most}{unknown}"]
    written, kept = sum(each.written_bytes for each in costs), sum(e.kept_bytes for e in costs)
    parts.append(f"{mebibytes(written)} written, {mebibytes(kept)} kept")
    parts.append(f"{math.fsum(each.analysis_s for each in costs):.1f} s of analysis")
    return [f"cost: {'; '.join(parts)}"]


def _keeper_lines(server: RecordedServer) -> list[str]:
    fault = server.keeper_fault
    return [f"server {server.key}: {fault}; the server was ended without it"] if fault else []


def _left_lines(server: RecordedServer) -> list[str]:
    return [f"server {server.key} left behind: {what}" for what in server.left_behind]


def _may_be_accepted(window: RecordedWindow) -> bool:
    """Whether it fails by its accepted lives, or has none of its key but of another one."""
    recorded = window.regression
    if recorded is None:
        return False
    of_word = [each for each in recorded.figures if each.verdict == window.verdict]
    by_lives = any(each.limit_of == "ratio" for each in of_word)
    return by_lives and (window.verdict == "fail" or bool(recorded.not_comparable))


def _last_lives(windows: Sequence[RecordedWindow]) -> list[RecordedWindow]:
    """Without the windows of server lives that others confirmed: one verdict is of all of them."""
    last = {(each.nodeid, each.name, each.reason): each.attempt for each in windows}
    return [
        each
        for each in windows
        if each.regression is None or last[each.nodeid, each.name, each.reason] == each.attempt
    ]


def baseline_line(recorded: RecordedRegression) -> str:
    """`compute 1.01 (0.98 to 1.03); with 10 accepted lives (sd 0.9 %) this sees +7.9 % or more`.

    Why nothing was compared, where nothing was; the whole sentence where a figure is beyond its
    limit although the window passed, such as in a bad run that `fail_after` lets pass.
    """
    known = [each for each in recorded.figures if each.ratio is not None]
    judged = [each for each in known if each.limit is not None and each.limit_of == "ratio"]
    is_beyond = any(each.ratio > each.limit for each in judged if each.ratio and each.limit)
    if is_beyond or (not judged and not (known and recorded.detection)):
        return recorded.sentence or recorded.not_comparable
    parts = [
        f"{figure_label(each.figure)} {each.ratio:.3g} ({each.low:.3g} to {each.high:.3g})"
        for each in (judged or known[:1])
    ]
    return "; ".join(filter(None, (", ".join(parts), recorded.detection, *recorded.findings)))


def regression_lines(window: RecordedWindow) -> list[str]:
    """Lines on the accepted lives that a window was compared with; none where it was not."""
    recorded = window.regression
    if recorded is None or not recorded.file:
        return []
    hosts = ", ".join(dict.fromkeys(each.host for each in recorded.accepted))
    accepted = count(len(recorded.accepted), "accepted life", "accepted lives")
    lines = ["", f"baseline {recorded.file}: {accepted}{f' on {hosts}' if hosts else ''}"]
    if recorded.floor_sentence:
        lines.append(recorded.floor_sentence)
    rows = [
        [
            shorten(each.change.name, MAX_NAME),
            milliseconds(each.change.before_ns),
            milliseconds(each.change.now_ns),
            f"{each.change.ratio:.3f}",
            f"{each.change.q:.2g}",
        ]
        for each in recorded.kernels[:MAX_KERNELS]
    ]
    if rows:
        head = ["kernel (listed, not judged)", "ms a step", "now", "ratio", "q"]
        lines += ["", *text_table(head, rows)]
    return [*lines, *recorded.findings]


def window_title(window: RecordedWindow) -> str:
    """`window "steady" (torch, 50 steps, stand-in)`."""
    known = [group.compared for group in window.steps.groups if group.compared is not None]
    details: list[str] = [window.backend]
    if known:
        details.append(count(max(known), "step"))
    if window.source in CPU_SOURCES:
        details.append(CPU_SOURCES[window.source])
    if window.attempt > 1:
        details.append(f"attempt {window.attempt}")
    if window.repeats:
        details.append(f"{window.repeat_index} of {window.repeats.count}")
    if window.standin:
        details.append("stand-in")
    return f'window "{window.name}" ({", ".join(details)})'


def deciding_finding(window: RecordedWindow) -> ImbalanceFinding | None:
    """The finding of the judgement that decided; None when there is none."""
    return None if window.deciding is None else window.deciding.finding


def decided_scope(window: RecordedWindow) -> str:
    """What the deciding finding is about, where that is no column of its own; else ""."""
    finding = deciding_finding(window)
    if finding is None:
        return ""
    across = " across sync" if is_across_sync(finding) else ""
    if finding.kernel:
        return f"/{finding.kernel}/{across}"
    if finding.stage:
        return f"{finding.scope} in {finding.stage}{across}"
    if across:
        return f"{finding.scope}{across}"
    return "" if finding.scope in ("compute", "communication") else finding.scope


def is_across_sync(finding: ImbalanceFinding | None) -> bool:
    """Whether ranks with different input were compared."""
    return finding is not None and finding.across == "sync"


@dataclass(frozen=True)
class _Shown:
    busy_ns: int
    slowest_share: float | None


def _group_rows(
    window: RecordedWindow, compute: ImbalanceFinding, decisive: ImbalanceFinding | None
) -> list[list[str]]:
    """Rows of the ranks of one work group."""
    computed = _figures(window, compute)
    communication = next(iter(window.of_scope("communication", compute.group)), None)
    spent = {} if communication is None else _figures(window, communication)
    chosen = None
    if decisive is not None:
        chosen = {figure.rank: figure for figure in decisive.ranks}
    if chosen is not None and not chosen.keys() >= computed.keys():  # of another group
        chosen = None
    rows = []
    nodes = window.nodes or {}
    for rank in _shown(computed):
        name = f"{rank} ({nodes[rank]})" if rank in nodes else rank
        row = [name, milliseconds(computed[rank].busy_ns)]
        row.append(milliseconds(spent[rank].busy_ns) if spent else "-")
        if decided_scope(window):
            row.append(milliseconds(chosen[rank].busy_ns) if chosen else "-")
        row.append(percent((chosen[rank] if chosen else computed[rank]).slowest_share))
        rows.append(row)
    return rows


def _figures(window: RecordedWindow, finding: ImbalanceFinding) -> dict[str, _Shown]:
    """Figures by rank; kernel time of the whole window where no step could be compared."""
    is_whole = finding.compared_steps == 0
    totals = busy_totals(window, finding)
    return {
        figure.rank: _Shown(totals[figure.rank], None if is_whole else figure.slowest_share)
        for figure in finding.ranks
    }


def busy_totals(window: RecordedWindow, finding: ImbalanceFinding) -> dict[str, int]:
    """By rank its busy time in the scope of a finding, ns.

    Kernel time of the whole window where no step could be compared.
    """
    if finding.compared_steps != 0:
        return {figure.rank: figure.busy_ns for figure in finding.ranks}
    totals = {figure.rank: 0 for figure in finding.ranks}
    for row in window.table:
        is_part = row.category == finding.scope
        if finding.scope == "compute":
            is_part = row.category not in NOT_COMPUTE
        if is_part and row.rank in totals:
            totals[row.rank] += row.total_ns
    return totals


def _shown(figures: Mapping[str, _Shown]) -> list[str]:
    """All ranks, or of many the slowest and the fastest, in their own order."""
    ranks = list(figures)
    if len(ranks) <= MAX_RANKS:
        return ranks
    by_time = sorted(ranks, key=lambda rank: figures[rank].busy_ns)
    half = MAX_RANKS // 2
    kept = {*by_time[:half], *by_time[-half:]}
    return [rank for rank in ranks if rank in kept]


def contributor_lines(finding: ImbalanceFinding | None) -> list[str]:
    """A blank line and one that names the kernels which make a rank slowest; or nothing."""
    if finding is None or not finding.slowest or not finding.contributors:
        return []
    first, *rest = finding.contributors
    more = [f"{shorten(item.name, MAX_NAME)} (+{duration(item.ns)})" for item in rest[:2]]
    others = "the others" if is_across_sync(finding) else "its peers"
    line = (
        f"most of it: {shorten(first.name, MAX_NAME)}, {duration(first.ns)} longer on "
        f"{finding.slowest} than on {others}"
    )
    return ["", f"{line}; then {', '.join(more)}" if more else line]


def spike_lines(finding: ImbalanceFinding | None) -> list[str]:
    """One line that says which rank has most of the spikes; nothing without any."""
    if finding is None or not finding.spike_steps or finding.spike_rank is None:
        return []
    steps = count(finding.spike_steps_of_all or 0, "step")
    return [
        f"spikes: {finding.spike_rank} has {finding.spike_steps} of the {steps} above 1.3 times "
        f"the usual; they take {percent(finding.spike_share, 1)} of the time"
    ]


def _attempt_lines(tests: Sequence[RecordedTest]) -> list[str]:
    """One line for each test that was run more than once: every attempt's word."""
    lines = []
    for test in tests:
        if len(test.attempts) > 1:
            words = [attempt.verdict or attempt.outcome for attempt in test.attempts]
            lines.append(f"{test.nodeid}: {count(len(words), 'attempt')}: {', '.join(words)}")
    return lines


def imbalance_line(finding: ImbalanceFinding) -> str:
    """`slowdown 1.39, imbalance factor 1.16, lost share 8.2 %, lost 6.00 ms`, and the work."""
    figures = (
        f"{row.label} {row.format(row.read(finding))}"
        for row in metrics_of("ranks")
        if not row.across or row.read(finding) is not None
    )
    work = work_words(finding.work_word, finding.work_ratio, finding.work_by)
    per_token = finding.lost_ns_per_token
    by_noise = ""
    if finding.lost_share is not None and finding.noise_share is not None:
        by_noise = (
            f" ({percent(finding.lost_share, 1)}, {percent(finding.noise_share, 1)} by noise)"
        )
    return (
        f"{', '.join(figures)}, lost {duration(finding.lost_ns)}{by_noise}"
        + ("" if per_token is None else f", {duration(per_token)} an output token")
        + (f"; {finding.slowest} {work}" if work else "")
    )


# Plain aligned text tables, as a terminal shows them.
