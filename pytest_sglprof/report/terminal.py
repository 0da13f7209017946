"""What the terminal shows of windows and runs: a compact rank table, one summary section."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pytest_sglprof.gate.wording import count, duration, milliseconds, percent, work_words
from pytest_sglprof.metrics import metrics_of
from pytest_sglprof.report.text_table import shorten, text_table
from pytest_sglprof.trace.kernels import NOT_COMPUTE

Document = Mapping[str, Any]

STANDIN_NOTE = "embedded stand-in server: these figures say nothing about SGLang"
CPU_SOURCES = {"cpu_op": "CPU operators", "nvtx": "NVTX ranges"}
MAX_RANKS = 16
MAX_NAME = 60


def rank_table(window: Document) -> list[str]:
    """Lines for one window: its verdict, a row a rank, the kernel that contributes most.

    Columns: rank, compute ms, communication ms (busy time), the scope that decided (where it is
    another), share of steps in which the rank is slowest. Of more than 16 ranks of a work
    group, the slowest and the fastest are shown.
    """
    lines = [f"{window_title(window)}: {window['verdict']}", window["reason"]]
    if window["state"] != "complete" and window["state_reason"] not in window["reason"]:
        lines.append(f"window {window['state']}: {window['state_reason']}")
    lines.extend(f"  | {line}" for line in window["log"])
    if window["onset"] is not None:
        lines.append(f"onset at {window['onset']['time']}: {window['onset']['sentence']}")
    decisive = deciding_finding(window)
    scope = decided_scope(window)
    head = ["rank", "compute ms", "communication ms"]
    if scope:
        head.append(f"{shorten(scope, 30)} ms")
    head.append("slowest in")
    rows = [row for group in _groups(window) for row in _group_rows(window, group, decisive)]
    if rows:
        lines.extend(("", *text_table(head, rows)))
    if any(finding["compared_steps"] == 0 for finding in _of_scope(window, "compute")):
        lines.append("no step could be compared: times are kernel times of the whole window")
    lines.extend(contributor_lines(decisive))
    return lines


def summary_lines(run: Document) -> list[str]:
    """Lines of the summary section; without a window only what servers left behind."""
    left_behind = [
        f"server {server['key']} left behind: {what}"
        for server in run["servers"]
        for what in server["left_behind"]
    ]
    windows = run["windows"]
    if not windows:
        return left_behind
    words = run["summary"]["windows"]
    parts = [f"{words[word]} {word}" for word in ("pass", "fail", "inconclusive") if words[word]]
    lines = [f"{count(len(windows), 'profile window')}: {', '.join(parts)}"]
    if run["summary"]["standin"]:
        lines.append(STANDIN_NOTE)
    for word in ("fail", "inconclusive"):
        for window in windows:
            if window["verdict"] == word and window["repeat_index"] == 1:
                lines.append(f"{word.upper()} {window['nodeid']} {window_title(window)}")
                lines.append(f"  {window['reason']}")
    lines.extend(_attempt_lines(run["tests"]))
    return [*lines, *left_behind]


def window_title(window: Document) -> str:
    """`window "steady" (torch, 50 steps, stand-in)`."""
    steps = [group["compared"] for group in window["steps"]["groups"]]
    known = [number for number in steps if number is not None]
    details = [window["backend"]]
    if known:
        details.append(count(max(known), "step"))
    if window["source"] in CPU_SOURCES:
        details.append(CPU_SOURCES[window["source"]])
    if window["attempt"] > 1:
        details.append(f"attempt {window['attempt']}")
    if window["retry_of"]:
        details.append("repeated")
    if window["repeats"]:
        details.append(f"{window['repeat_index']} of {window['repeats']['count']}")
    if window["standin"]:
        details.append("stand-in")
    return f'window "{window["name"]}" ({", ".join(details)})'


def deciding_finding(window: Document) -> Document | None:
    """The finding of the judgement that decided; None when there is none."""
    if window["decisive"] is None:
        return None
    finding: Document | None = window["judgements"][window["decisive"]]["finding"]
    return finding


def decided_scope(window: Document) -> str:
    """What the deciding finding is about, where that is no column of its own; else ""."""
    finding = deciding_finding(window)
    if finding is None:
        return ""
    if finding["kernel"]:
        return f"/{finding['kernel']}/"
    if finding["stage"]:
        return f"{finding['scope']} in {finding['stage']}"
    return "" if finding["scope"] in ("compute", "communication") else str(finding["scope"])


def _groups(window: Document) -> list[str]:
    return [finding["group"] for finding in _of_scope(window, "compute")]


def _of_scope(window: Document, scope: str) -> list[Document]:
    return [
        finding
        for finding in window["findings"]
        if finding["scope"] == scope and not finding["kernel"]
    ]


def _group_rows(window: Document, group: str, decisive: Document | None) -> list[list[str]]:
    """Rows of the ranks of one work group."""
    compute = _figures(window, "compute", group)
    communication = _figures(window, "communication", group)
    chosen = None
    if decisive is not None and decisive["group"] == group:
        chosen = {figure["rank"]: figure for figure in decisive["ranks"]}
    shares = chosen or compute
    rows = []
    for rank in _shown(compute):
        row = [rank, milliseconds(compute[rank]["busy_ns"])]
        row.append(milliseconds(communication[rank]["busy_ns"]) if communication else "-")
        if decided_scope(window):
            row.append(milliseconds(chosen[rank]["busy_ns"]) if chosen else "-")
        row.append(percent(shares[rank]["slowest_share"]))
        rows.append(row)
    return rows


def _figures(window: Document, scope: str, group: str) -> dict[str, Document]:
    """Figures by rank; kernel time of the whole window where no step could be compared."""
    found = next((item for item in _of_scope(window, scope) if item["group"] == group), None)
    if found is None:
        return {}
    if found["compared_steps"] != 0:
        return {figure["rank"]: figure for figure in found["ranks"]}
    totals = {figure["rank"]: 0 for figure in found["ranks"]}
    for row in window["table"]:
        is_mine = (
            row["category"] not in NOT_COMPUTE if scope == "compute" else row["category"] == scope
        )
        if is_mine and row["rank"] in totals:
            totals[row["rank"]] += row["total_ns"]
    return {
        rank: {"rank": rank, "busy_ns": total, "slowest_share": None}
        for rank, total in totals.items()
    }


def _shown(figures: Mapping[str, Document]) -> list[str]:
    """All ranks, or of many the slowest and the fastest, in their own order."""
    ranks = list(figures)
    if len(ranks) <= MAX_RANKS:
        return ranks
    by_time = sorted(ranks, key=lambda rank: figures[rank]["busy_ns"])
    half = MAX_RANKS // 2
    kept = {*by_time[:half], *by_time[-half:]}
    return [rank for rank in ranks if rank in kept]


def contributor_lines(finding: Document | None) -> list[str]:
    """A blank line and one that names the kernels which make a rank slowest; or nothing."""
    if finding is None or not finding["slowest"] or not finding["contributors"]:
        return []
    first = finding["contributors"][0]
    more = [
        f"{shorten(item['name'], MAX_NAME)} (+{duration(item['ns'])})"
        for item in finding["contributors"][1:3]
    ]
    line = (
        f"most of it: {shorten(first['name'], MAX_NAME)}, {duration(first['ns'])} longer on "
        f"{finding['slowest']} than on its peers"
    )
    return ["", f"{line}; then {', '.join(more)}" if more else line]


def _attempt_lines(tests: Sequence[Document]) -> list[str]:
    """One line for each test that was run more than once: every attempt's word."""
    lines = []
    for test in tests:
        if len(test["attempts"]) > 1:
            words = [attempt["verdict"] or attempt["outcome"] for attempt in test["attempts"]]
            lines.append(f"{test['nodeid']}: {count(len(words), 'attempt')}: {', '.join(words)}")
    return lines


def imbalance_line(finding: Document) -> str:
    """`slowdown 1.39, imbalance factor 1.16, lost share 8.2 %, lost 6.00 ms`, and the work."""
    figures = ", ".join(
        f"{row.label} {row.format(finding.get(row.value))}" for row in metrics_of("ranks")
    )
    work = work_words(finding["work"] or "", finding["work_ratio"], finding["work_by"] or "")
    per_token = finding["lost_ns_per_token"]
    return (
        f"{figures}, lost {duration(finding['lost_ns'])}"
        + ("" if per_token is None else f", {duration(per_token)} an output token")
        + (f"; {finding['slowest']} {work}" if work else "")
    )
