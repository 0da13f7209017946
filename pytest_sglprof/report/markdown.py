"""A run as Markdown, for `$GITHUB_STEP_SUMMARY`."""

from __future__ import annotations

import html
import re
from collections.abc import Mapping
from typing import Any

from pytest_sglprof.gate.wording import ratio
from pytest_sglprof.report.terminal import STANDIN_NOTE, rank_table, window_title

Document = Mapping[str, Any]

_SIGNS = {"pass": "✅ pass", "fail": "❌ fail", "inconclusive": "❔ inconclusive"}
_SPECIAL = re.compile(r"([\\`*_{}\[\]<>#|])")
# GitHub cuts a step's summary at 1 MiB, and whole summaries are then not shown at all.
MAX_BYTES = 900_000


def step_summary(run: Document) -> str:
    """The run's windows in one table, then a rank table for each that did not pass.

    At most 900 kB; rank tables that do not fit are left out, and that is said.
    """
    lines = ["## SGLang profile windows", ""]
    if run["summary"]["standin"]:
        lines += [f"> **Stand-in.** Measured on the {escape(STANDIN_NOTE)}.", ""]
    if not run["windows"]:
        return "\n".join([*lines, "No profile window was opened.", ""])
    lines += ["| verdict | test | window | slowest rank | slowdown | limit |"]
    lines += ["| --- | --- | --- | --- | ---: | ---: |"]
    lines += [_row(window) for window in run["windows"]]
    text = "\n".join([*lines, ""])
    left_out = 0
    for window in run["windows"]:
        details = "" if window["verdict"] == "pass" else _details(window)
        if len((text + details).encode()) > MAX_BYTES:
            left_out += 1
        else:
            text += details
    if left_out:
        text += f"\n{left_out} more windows did not pass; results.json has them.\n"
    return text


def escape(text: str) -> str:
    """`text` so that Markdown shows it as it is, on one line."""
    return _SPECIAL.sub(r"\\\1", " ".join(text.split()))


def _row(window: Document) -> str:
    cells = [_SIGNS[window["verdict"]], escape(window["nodeid"]), escape(window_title(window))]
    judgement = None
    if window["decisive"] is not None:
        judgement = window["judgements"][window["decisive"]]
    finding = judgement["finding"] if judgement else None
    cells.append(escape(finding["slowest"] or "-") if finding else "-")
    cells.append(ratio(finding["slowdown"]) if finding else "-")
    cells.append(ratio(judgement["limit"]) if judgement else "-")
    return f"| {' | '.join(cells)} |"


def _details(window: Document) -> str:
    head = html.escape(f"{window['nodeid']}: {window['reason']}")
    # A fence longer than any run of backticks inside cannot be closed by the content.
    body = "\n".join(rank_table(window))
    longest = max((len(run) for run in re.findall(r"`+", body)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"\n<details><summary>{_SIGNS[window['verdict']]} {head}</summary>\n\n" + (
        f"{fence}text\n{body}\n{fence}\n\n</details>\n"
    )
