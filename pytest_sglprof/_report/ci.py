"""A run as Markdown, for `$GITHUB_STEP_SUMMARY`."""

from __future__ import annotations

import html
import re
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from pytest_sglprof._metrics import MEASURED, METRICS, WORST_FIRST
from pytest_sglprof._report.terminal import (
    STANDIN_NOTE,
    is_across_sync,
    rank_table,
    window_title,
)
from pytest_sglprof._verdict.life_words import figure_label
from pytest_sglprof._verdict.wording import milliseconds, percent, ratio, shorten

if TYPE_CHECKING:
    from pytest_sglprof._report.model import RecordedWindow, Results
    from pytest_sglprof._report.regression import RecordedRegression


_SIGNS = {
    "pass": "✅ pass",
    "fail": "❌ fail",
    "inconclusive": "❔ inconclusive",
    MEASURED: MEASURED,
}
_SPECIAL = re.compile(r"([\\`*_{}\[\]<>#|&~$])")
# GitHub cuts a step's summary at 1 MiB, and whole summaries are then not shown at all.
MAX_BYTES = 900_000
MAX_TEXT = 200  # of a name in a cell, before it is escaped
MAX_REASON = 1000
MAX_KERNELS = 10


def step_summary(run: Results) -> str:
    """The run's windows in one table, then details of each that did not pass: the rank
    table, and the kernels of which balance would save most.

    At most 900 kB; rank tables that do not fit are left out, and that is said.
    """
    lines = ["## SGLang profile windows", ""]
    if run.summary.standin:
        lines += [f"> **Stand-in.** Measured on the {escape(STANDIN_NOTE)}.", ""]
    if not run.windows:
        return "\n".join([*lines, "No profile window was opened.", ""])
    lines += ["| verdict | test | window | slowest rank | metric | value | limit |"]
    lines += ["| --- | --- | --- | --- | --- | ---: | ---: |"]
    lines += [_row(window) for window in run.windows]
    lines += _baseline_table(run.windows)
    text = "\n".join([*lines, ""])
    left_out, size, parts = 0, len(text.encode()), [text]
    for window in run.windows:
        details = "" if window.verdict == "pass" else _details(window)
        added = len(details.encode())
        if size + added > MAX_BYTES:
            left_out += 1
        else:
            parts.append(details)
            size += added
    text = "".join(parts)
    if left_out:
        text += f"\n{left_out} more windows did not pass; results.json has them.\n"
    return text


def escape(text: str) -> str:
    """`text` so that Markdown shows it as it is, on one line."""
    return _SPECIAL.sub(r"\\\1", " ".join(text.split()))


def kernel_table(window: RecordedWindow) -> list[str]:
    """Markdown lines: the kernels with most lost time over all steps; none without any.

    Columns: kernel, category, slowest rank, slowdown, lost ms, share of the compute time.
    """
    costly = [finding for finding in window.findings if finding.kernel and finding.lost_ns > 0]
    costly.sort(key=lambda finding: (-finding.lost_ns, finding.kernel))
    if not costly:
        return []
    lines = ["| kernel | category | slowest rank | slowdown | lost ms | share of compute |"]
    lines += ["| --- | --- | --- | ---: | ---: | ---: |"]
    for finding in costly[:MAX_KERNELS]:
        cells = [
            escape(shorten(finding.kernel, MAX_TEXT)),
            escape(finding.scope),
            escape(finding.slowest or "-"),
            ratio(finding.slowdown),
            milliseconds(finding.lost_ns),
            percent(finding.share_of_compute),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _baseline_table(windows: Sequence[RecordedWindow]) -> list[str]:
    """A row for each window that was compared with accepted lives; one for all of its lives."""
    compared = {(w.nodeid, w.name): w for w in windows if w.regression is not None}
    if not compared:
        return []
    lines = ["", "| window against its baseline | accepted | new | figures | |"]
    lines += ["| --- | ---: | ---: | --- | --- |"]
    for window in compared.values():
        recorded = window.regression
        assert recorded is not None
        cells = [
            escape(shorten(f"{window.nodeid} {window.name}", MAX_TEXT)),
            str(len(recorded.accepted)),
            str(len(recorded.fresh)),
            escape(", ".join(_ratios(recorded)) or "-"),
            escape(shorten(recorded.sentence or recorded.detection, MAX_REASON)),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _ratios(recorded: RecordedRegression) -> list[str]:
    return [
        f"{figure_label(each.figure)} {ratio(each.ratio)}"
        for each in recorded.figures
        if each.ratio is not None and (each.verdict is not None or each.limit is None)
    ]


def _row(window: RecordedWindow) -> str:
    texts = (shorten(text, MAX_TEXT) for text in (window.nodeid, window_title(window)))
    cells = [_SIGNS[window.word], *map(escape, texts)]
    judgement = window.deciding
    if judgement is None:
        return f"| {' | '.join((*cells, '-', '-', '-', '-'))} |"
    metric = METRICS[judgement.threshold.metric]
    cells += [escape(judgement.rank or "-"), metric.label]
    cells += [metric.format(judgement.value), metric.format(judgement.threshold.limit)]
    return f"| {' | '.join(cells)} |"


def _details(window: RecordedWindow) -> str:
    texts = (shorten(window.nodeid, MAX_TEXT), shorten(window.reason, MAX_REASON))
    head = html.escape(" ".join(": ".join(texts).split()))
    # A fence longer than any run of backticks inside cannot be closed by the content.
    body = "\n".join(rank_table(window))
    longest = max((len(run) for run in re.findall(r"`+", body)), default=0)
    fence = "`" * max(3, longest + 1)
    kernels = "".join(f"\n{line}" for line in kernel_table(window))
    kernels = f"{kernels}\n" if kernels else ""
    return f"\n<details><summary>{_SIGNS[window.word]} {head}</summary>\n\n" + (
        f"{fence}text\n{body}\n{fence}\n{kernels}\n</details>\n"
    )


# JUnit properties of a test: what its windows measured, as name and text.


def properties(window: RecordedWindow) -> list[tuple[str, str]]:
    """`verdict, reason, slowest_rank, slowdown, limit, ...` of one window.

    Figures that do not exist are left out; `limit` and `value` are those of `metric`.
    """
    figures: dict[str, object] = {"verdict": window.verdict, "reason": window.reason}
    if (judgement := window.deciding) is not None:
        threshold, finding = judgement.threshold, judgement.finding
        contributors = finding.contributors if finding else ()
        scope = f"/{threshold.kernel}/" if threshold.kernel else threshold.scope
        figures |= {
            "slowest_rank": judgement.rank,
            "slowdown": finding.slowdown if finding else None,
            "metric": threshold.metric,
            "value": judgement.value,
            "limit": threshold.limit,
            "scope": scope if judgement.budget is None else None,
            "stage": threshold.stage or None,
            "across": threshold.across or ("sync" if is_across_sync(finding) else None),
            "slowest_kernel": contributors[0].name if contributors else None,
        }
    if window.regression is not None:
        figures |= _of_lives(window.regression)
    if window.cost is not None:
        figures |= asdict(window.cost)
    figures |= {"window": window.id, "standin": window.standin}
    return [(name, _text(value)) for name, value in figures.items() if value is not None]


def _of_lives(recorded: RecordedRegression) -> dict[str, object]:
    """`baseline, accepted_lives, new_lives, regression[compute], detection, …`, where known."""
    ratios = {
        f"regression[{figure_label(each.figure)}]": each.ratio
        for each in recorded.figures
        if each.limit_of == "ratio"
    }
    slower = [each for each in recorded.kernels if each.change.is_slower]
    return {
        "baseline": recorded.file or None,
        "accepted_lives": len(recorded.accepted),
        "new_lives": len(recorded.fresh),
        **ratios,
        "regression_sentence": recorded.sentence or None,
        "regression_kernels": ", ".join(each.change.name for each in slower[:3]) or None,
        "detection": recorded.detection or None,
    }


def properties_of_test(windows: Sequence[RecordedWindow]) -> list[tuple[str, str]]:
    """Properties of all windows of a test: `name` for the worst window, else `name[window]`.

    So `verdict` is always the verdict of the test.
    """
    ordered = sorted(windows, key=lambda window: WORST_FIRST.index(window.verdict))
    named: list[tuple[str, str]] = []
    for at, window in enumerate(ordered):
        suffix = f"[{window.id}]" if at else ""
        named.extend((f"{name}{suffix}", value) for name, value in properties(window))
    return named


def attachments(paths: Sequence[Path]) -> list[tuple[str, str]]:
    """A property for each file that exists, in the form that GitLab and Jenkins look for."""
    existing = [path for path in paths if path.is_file()]
    return [(f"attachment[{path.name}]", f"[[ATTACHMENT|{path.resolve()}]]") for path in existing]


def _text(value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    return f"{value:.6g}" if isinstance(value, float) else str(value)
