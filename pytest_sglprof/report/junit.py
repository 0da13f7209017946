"""JUnit properties of a test: what its windows measured, as name and text."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pytest_sglprof.values import WORST_FIRST

if TYPE_CHECKING:
    from pytest_sglprof.report.model import RecordedWindow


def properties(window: RecordedWindow) -> list[tuple[str, str]]:
    """`verdict, reason, slowest_rank, slowdown, limit, ...` of one window.

    Figures that do not exist are left out; `limit` and `value` are those of `metric`.
    """
    figures: dict[str, object] = {"verdict": window.verdict, "reason": window.reason}
    if (judgement := window.deciding) is not None:
        threshold, finding = judgement.threshold, judgement.finding
        contributors = finding.contributors if finding else ()
        figures |= {
            "slowest_rank": finding.slowest if finding else None,
            "slowdown": finding.slowdown if finding else None,
            "metric": threshold.metric,
            "value": judgement.value,
            "limit": threshold.limit,
            "scope": f"/{threshold.kernel}/" if threshold.kernel else threshold.scope,
            "stage": threshold.stage or None,
            "slowest_kernel": contributors[0].name if contributors else None,
        }
    figures |= {"window": window.id, "standin": window.standin}
    return [(name, _text(value)) for name, value in figures.items() if value is not None]


def properties_of_test(windows: Sequence[RecordedWindow]) -> list[tuple[str, str]]:
    """Those of the worst window by their plain names, of the others as `name[window]`.

    So that `verdict` is the test's, whatever the number of windows.
    """
    ordered = sorted(windows, key=lambda window: WORST_FIRST.index(window.verdict))
    found: list[tuple[str, str]] = []
    for at, window in enumerate(ordered):
        suffix = f"[{window.id}]" if at else ""
        found.extend((f"{name}{suffix}", value) for name, value in properties(window))
    return found


def attachments(paths: Sequence[Path]) -> list[tuple[str, str]]:
    """A property for each file that exists, in the form that GitLab and Jenkins look for."""
    existing = [path for path in paths if path.is_file()]
    return [(f"attachment[{path.name}]", f"[[ATTACHMENT|{path.resolve()}]]") for path in existing]


def _text(value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    return f"{value:.6g}" if isinstance(value, float) else str(value)
