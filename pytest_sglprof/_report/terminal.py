"""What the terminal shows of windows and runs: a compact rank table, one summary section."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pytest_sglprof._metrics import metrics_of
from pytest_sglprof._trace.categories import NOT_COMPUTE
from pytest_sglprof._verdict.wording import (
    count,
    duration,
    milliseconds,
    percent,
    shorten,
    text_table,
    work_words,
)

if TYPE_CHECKING:
    from pytest_sglprof._analysis.imbalance import ImbalanceFinding
    from pytest_sglprof._report.model import RecordedTest, RecordedWindow, Results


STANDIN_NOTE = "embedded stand-in server: these figures say nothing about SGLang"
CPU_SOURCES = {"cpu_op": "CPU operators", "nvtx": "NVTX ranges"}
MAX_RANKS = 16
MAX_NAME = 60


def rank_table(window: RecordedWindow) -> list[str]:
    """Lines for one window: its verdict, a row a rank, the kernel that contributes most.

    Columns: rank, compute ms, communication ms (busy time), the scope that decided (where it is
    another), share of steps in which the rank is slowest. Of more than 16 ranks of a work
    group, the slowest and the fastest are shown.
    """
    lines = [f"{window_title(window)}: {window.verdict}", window.reason]
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
    lines.extend(contributor_lines(decisive))
    return lines


def summary_lines(run: Results) -> list[str]:
    """Lines of the summary section; without a window only what servers left behind."""
    left_behind = [
        f"server {server.key} left behind: {what}"
        for server in run.servers
        for what in server.left_behind
    ]
    if not run.windows:
        return left_behind
    counts = run.summary.windows
    by_word = {"pass": counts.passed, "fail": counts.fail, "inconclusive": counts.inconclusive}
    parts = [f"{number} {word}" for word, number in by_word.items() if number]
    lines = [f"{count(len(run.windows), 'profile window')}: {', '.join(parts)}"]
    if run.summary.standin:
        lines.append(STANDIN_NOTE)
    for word in ("fail", "inconclusive"):
        for window in run.windows:
            if window.verdict == word and window.repeat_index == 1:
                lines.append(f"{word.upper()} {window.nodeid} {window_title(window)}")
                lines.append(f"  {window.reason}")
    lines.extend(_attempt_lines(run.tests))
    return [*lines, *left_behind]


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
    if finding.kernel:
        return f"/{finding.kernel}/"
    if finding.stage:
        return f"{finding.scope} in {finding.stage}"
    return "" if finding.scope in ("compute", "communication") else finding.scope


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
    if decisive is not None and decisive.group == compute.group:
        chosen = {figure.rank: figure for figure in decisive.ranks}
    rows = []
    for rank in _shown(computed):
        row = [rank, milliseconds(computed[rank].busy_ns)]
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
    first, *others = finding.contributors
    more = [f"{shorten(item.name, MAX_NAME)} (+{duration(item.ns)})" for item in others[:2]]
    line = (
        f"most of it: {shorten(first.name, MAX_NAME)}, {duration(first.ns)} longer on "
        f"{finding.slowest} than on its peers"
    )
    return ["", f"{line}; then {', '.join(more)}" if more else line]


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
    figures = (f"{row.label} {row.format(row.read(finding))}" for row in metrics_of("ranks"))
    work = work_words(finding.work_word, finding.work_ratio, finding.work_by)
    per_token = finding.lost_ns_per_token
    return (
        f"{', '.join(figures)}, lost {duration(finding.lost_ns)}"
        + ("" if per_token is None else f", {duration(per_token)} an output token")
        + (f"; {finding.slowest} {work}" if work else "")
    )


# Plain aligned text tables, as a terminal shows them.
