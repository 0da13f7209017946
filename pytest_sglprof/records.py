"""What travels with the report of a test to the process that reports: the record of its attempt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

import pytest

from pytest_sglprof.redact import redact, redact_text

if TYPE_CHECKING:
    from pytest_sglprof.report.model import Outcome, Record, RecordedServer
    from pytest_sglprof.session.test_run import TestRun

PROPERTIES = pytest.StashKey[dict[str, str]]()


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
    from msgspec.structs import replace

    record = _carried(report)
    if record is None:
        return None
    del report.sglprof
    if record.attempt is not None:
        record = replace(record, attempt=replace(record.attempt, outcome=_outcome(report)))
    return record


def attach_servers(report: pytest.TestReport, servers: Sequence[RecordedServer]) -> None:
    """Lets the report tell of servers that are over, besides what it carries already."""
    if servers:
        _carry(report, record_of_servers(servers, _carried(report)))


def record_of_servers(servers: Sequence[RecordedServer], record: Record | None = None) -> Record:
    """`record` (None: one of no attempt) with servers that are over."""
    from msgspec.structs import replace

    from pytest_sglprof.report.model import NOTHING

    record = record or NOTHING
    return replace(record, servers=(*record.servers, *servers))


def _carry(report: pytest.TestReport, record: Record) -> None:
    """Sets the record on the report, with which it travels from a worker: pytest's own way.

    As text, which xdist and plugins that write reports as JSON can take.
    """
    import msgspec

    report.sglprof = msgspec.json.encode(record).decode()  # type: ignore[attr-defined]


def _carried(report: pytest.TestReport) -> Record | None:
    if not hasattr(report, "sglprof"):
        return None
    import msgspec

    from pytest_sglprof.report.model import Record

    return msgspec.json.decode(report.sglprof, type=Record)


def _outcome(report: pytest.TestReport) -> Outcome:
    """The word of results.json; an attempt that is followed by another is called "rerun"."""
    if hasattr(report, "wasxfail"):
        return "xfailed" if report.skipped else "xpassed"
    bad = report.failed or str(report.outcome) == "rerun"
    if bad:
        return "failed" if report.when == "call" else "error"
    return cast("Outcome", report.outcome)


def set_properties(item: pytest.Item, test: TestRun) -> list[str]:
    """Those of this attempt's windows, but for windows that were repeated.

    Returns what could not be written, a line each.
    """
    from pytest_sglprof.report.junit import attachments, properties_of_test

    windows = test.documents()
    repeated = {window.retry_of for window in windows}
    ours = dict(properties_of_test([w for w in windows if w.id not in repeated]))
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
    _carry(report, test.record(_outcome(report), problems))
    for window in test.documents():
        if window.verdict != "pass" and not test.message_shows_windows:
            report.sections.append((f"sglprof {window.name}", "\n".join(rank_table(window))))
