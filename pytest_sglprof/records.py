"""What travels with the report of a test to the process that reports: the record of its attempt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import pytest

from pytest_sglprof.redact import redact, redact_text

if TYPE_CHECKING:
    from pytest_sglprof.session.test_run import TestRun

Record = dict[str, Any]

PROPERTIES = pytest.StashKey[dict[str, str]]()
# A record that tells of servers alone.
NOTHING: Record = {"attempt": None, "windows": [], "servers": [], "loads": [], "problems": []}


def hide_secrets(report: pytest.TestReport | pytest.CollectReport) -> None:
    """In all that a report shows at the terminal and in JUnit files, but for the test's name."""
    report.sections[:] = [(title, redact_text(text)) for title, text in report.sections]
    if isinstance(report, pytest.TestReport):
        report.user_properties[:] = [(name, redact(v)) for name, v in report.user_properties]
    text = "" if report.longrepr is None else str(report.longrepr)
    if (shown := redact_text(text)) != text:
        report.longrepr = shown


def take_record(report: pytest.TestReport) -> Record | None:
    """The record that came with the report, which pytest keeps, and keeps without it."""
    if not hasattr(report, "sglprof"):
        return None
    record = dict(report.sglprof)
    del report.sglprof
    if record["attempt"] is not None:
        record["attempt"] = {**record["attempt"], "outcome": _outcome(report)}
    return record


def attach_servers(report: pytest.TestReport, servers: Sequence[Record]) -> None:
    """Lets the report tell of servers that are over, besides what it carries already."""
    if servers:
        record = getattr(report, "sglprof", NOTHING)
        record = {**record, "servers": [*record["servers"], *servers]}
        report.sglprof = record  # type: ignore[attr-defined]


def _outcome(report: pytest.TestReport) -> str:
    """The word of results.json; an attempt that is followed by another is called "rerun"."""
    if hasattr(report, "wasxfail"):
        return "xfailed" if report.skipped else "xpassed"
    bad = report.failed or str(report.outcome) == "rerun"
    if bad:
        return "failed" if report.when == "call" else "error"
    return str(report.outcome)


def set_properties(item: pytest.Item, test: TestRun) -> list[str]:
    """Those of this attempt's windows, but for windows that were repeated.

    Returns what could not be written, a line each.
    """
    from pytest_sglprof.report.junit import attachments, properties_of_test

    documents = test.documents()
    repeated = {document["retry_of"] for document in documents}
    ours = dict(properties_of_test([d for d in documents if d["id"] not in repeated]))
    if test.verdict is not None and ours.get("verdict") != test.verdict:
        ours |= {"verdict": test.verdict, "reason": test.reason}
    problems = []
    try:
        ours |= dict(attachments(test.pictures()))
    except OSError as error:
        problems.append(f"heat maps could not be written: {error.strerror or error}")
    earlier = item.stash.get(PROPERTIES, {})
    theirs = [pair for pair in item.user_properties if pair not in earlier.items()]
    item.user_properties[:] = [*theirs, *ours.items()]
    item.stash[PROPERTIES] = ours
    return problems


def attach(report: pytest.TestReport, test: TestRun, problems: list[str]) -> None:
    """Gives the report the attempt's record, and what could not be written."""
    from pytest_sglprof.report.terminal import rank_table

    test.drop_artifacts()
    # pytest's own way for plugins: what is set on a report travels with it from a worker.
    record = test.record(str(report.outcome))
    report.sglprof = {**record, "problems": problems}  # type: ignore[attr-defined]
    for document in test.documents():
        if document["verdict"] != "pass" and not test.message_shows_windows:
            title = f"sglprof {document['name']}"
            report.sections.append((title, "\n".join(rank_table(document))))
