"""JUnit properties of a test: what its windows measured, as name and text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pytest_sglprof.values import WORST_FIRST

Document = Mapping[str, Any]


def properties(window: Document) -> list[tuple[str, str]]:
    """`verdict, reason, slowest_rank, slowdown, limit, ...` of one window.

    Figures that do not exist are left out; `limit` and `value` are those of `metric`.
    """
    found: dict[str, Any] = {"verdict": window["verdict"], "reason": window["reason"]}
    decisive = window["decisive"]
    if decisive is not None:
        judgement = window["judgements"][decisive]
        finding = judgement["finding"] or {}
        found |= {
            "slowest_rank": finding.get("slowest"),
            "slowdown": finding.get("slowdown"),
            "metric": judgement["metric"],
            "value": judgement["value"],
            "limit": judgement["limit"],
            "scope": f"/{judgement['kernel']}/" if judgement["kernel"] else judgement["scope"],
            "stage": judgement["stage"] or None,
        }
        found["slowest_kernel"] = next(
            (item["name"] for item in finding.get("contributors", [])), None
        )
    found |= {"window": window["id"], "standin": window["standin"]}
    return [(name, _text(value)) for name, value in found.items() if value is not None]


def properties_of_test(windows: Sequence[Document]) -> list[tuple[str, str]]:
    """Those of the worst window by their plain names, of the others as `name[window]`.

    So that `verdict` is the test's, whatever the number of windows.
    """
    ordered = sorted(windows, key=lambda window: WORST_FIRST.index(window["verdict"]))
    found: list[tuple[str, str]] = []
    for at, window in enumerate(ordered):
        suffix = f"[{window['id']}]" if at else ""
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
