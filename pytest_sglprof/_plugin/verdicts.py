"""How verdicts reach pytest: exceptions, reports, properties, the summary and progress.

The two exceptions do not inherit from each other, so that `xfail(raises=VerdictFailed)` does
not accept a window with too little data.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from typing import TYPE_CHECKING

import pytest

from pytest_sglprof._redact import redact, redact_text
from pytest_sglprof._run.folder import RunBook

if TYPE_CHECKING:
    from pytest_sglprof._report.model import Outcome, Record, RecordedServer, Results
    from pytest_sglprof._run.attempt import TestRun


class VerdictFailed(pytest.fail.Exception):  # type: ignore[name-defined,misc]  # a variable to mypy
    """The body of the test passed, but the verdict on one of its profile windows is fail.

    Use it in `@pytest.mark.xfail(raises=VerdictFailed, strict=True)`.
    """

    __module__ = "pytest_sglprof"

    def __init__(self, message: str) -> None:
        super().__init__(message, pytrace=False)


class VerdictInconclusive(pytest.fail.Exception):  # type: ignore[name-defined,misc]  # likewise
    """The body of the test passed, but its profile windows have too little data for a verdict."""

    __module__ = "pytest_sglprof"

    def __init__(self, message: str) -> None:
        super().__init__(message, pytrace=False)


SECTION = "sglprof "  # begins the titles of our sections in a report
PART_FAILED = (
    "sglprof_part_failed"  # set on the report of a test whose subtests have not all passed
)
PROPERTIES = pytest.StashKey[dict[str, str]]()


def hide_secrets(report: pytest.TestReport | pytest.CollectReport) -> None:
    """Redacts what a report shows at the terminal and in JUnit files, except the test's name."""
    report.sections[:] = [(title, redact_text(text)) for title, text in report.sections]
    if isinstance(report, pytest.TestReport):
        report.user_properties[:] = [(name, redact(v)) for name, v in report.user_properties]
    text = "" if report.longrepr is None else str(report.longrepr)
    if (shown := redact_text(text)) != text:
        report.longrepr = shown


def show_finding(report: pytest.TestReport, error: BaseException | None) -> None:
    """Makes the first line of a verdict what pytest's short summary and JUnit's message show."""
    crash = getattr(report.longrepr, "reprcrash", None)
    if crash is not None and isinstance(error, VerdictFailed | VerdictInconclusive):
        crash.message = str(error).partition("\n")[0]


def take_records(report: pytest.TestReport) -> list[Record]:
    """Removes the records from the report, which pytest keeps in memory, and returns them."""
    from msgspec.structs import replace

    record = _carried(report)
    if record is None:
        return []
    del report.sglprof
    outcome = _outcome(report)
    together = [*record.before, record]
    last = [
        each
        if each.attempt is None
        else replace(each, attempt=replace(each.attempt, outcome=outcome))
        for each in together
    ]
    return [
        replace(each, before=(), repeated=())
        for each in (*(e for r in record.repeated for e in (*r.before, r)), *last)
    ]


def attach_servers(
    report: pytest.TestReport, servers: Sequence[RecordedServer], problems: Sequence[str]
) -> None:
    """Adds stopped servers, and a line for each file not written, to the record of the report."""
    if servers or problems:
        _carry(report, record_of_servers(servers, _carried(report), problems))


def record_of_servers(
    servers: Sequence[RecordedServer],
    record: Record | None = None,
    problems: Sequence[str] = (),
) -> Record:
    """`record` with stopped servers added. None: a record without an attempt."""
    from msgspec.structs import replace

    from pytest_sglprof._report.model import NOTHING

    record = record or NOTHING
    return replace(
        record,
        servers=(*record.servers, *servers),
        problems=(*record.problems, *problems),
    )


def _carry(report: pytest.TestReport, record: Record) -> None:
    """Sets the record on the report, as text: xdist and JSON plugins can serialise that."""
    import msgspec

    report.sglprof = msgspec.json.encode(record).decode()  # type: ignore[attr-defined]


def _carried(report: pytest.TestReport) -> Record | None:
    if not hasattr(report, "sglprof"):
        return None
    import msgspec

    from pytest_sglprof._report.model import Record

    return msgspec.json.decode(report.sglprof, type=Record)


def _outcome(report: pytest.TestReport) -> Outcome:
    """The outcome for results.json: pytest's, or the name that another plugin gave it.

    pytest-rerunfailures reports "rerun" for a test that failed and is repeated.
    """
    if hasattr(report, "wasxfail"):
        return "xfailed" if report.skipped else "xpassed"
    bad = report.failed or str(report.outcome) == "rerun" or hasattr(report, PART_FAILED)
    if bad:
        return "failed" if report.when == "call" else "error"
    return str(report.outcome) or "unknown"


def set_properties(item: pytest.Item, test: TestRun) -> list[str]:
    """Sets the JUnit properties of the item, from the windows of this attempt.

    Returns one line for each file that could not be written.
    """
    from pytest_sglprof._report.ci import attachments, properties_of_test

    new = dict(properties_of_test(test.documents()))
    if test.verdict is not None and new.get("verdict") != test.verdict:
        new |= {"verdict": test.verdict, "reason": test.reason}
    problems = []
    try:
        new |= dict(attachments(test.pictures()))
    except OSError as error:
        problems.append(f"heat maps could not be written: {error.strerror or error}")
    earlier = item.stash.get(PROPERTIES, {})
    others = [pair for pair in item.user_properties if pair not in earlier.items()]
    item.user_properties[:] = [*others, *new.items()]
    item.stash[PROPERTIES] = new
    return problems


def attach(
    report: pytest.TestReport, test: TestRun, problems: list[str], unreported: list[TestRun]
) -> None:
    """Adds the record of the attempt to the report, and a rank table for each bad window.

    unreported: the attempts without a report; emptied. Those before this one have failed, since
    they were repeated.
    """
    from msgspec.structs import replace

    from pytest_sglprof._report.terminal import rank_table

    repeated = [each for each in unreported if each is not test and each not in test.earlier]
    unreported.clear()
    for each in (*repeated, *test.earlier, test):
        each.drop_artifacts()
    if test.has_failed_subtest:
        setattr(report, PART_FAILED, True)
    record = test.record(_outcome(report), problems)
    before = tuple(each.record("failed", ()) for each in repeated)
    _carry(report, replace(record, repeated=before))
    for each in repeated:
        each.forget()
    for window in test.documents():
        if window.verdict != "pass" and not test.message_shows_windows:
            title = f"{SECTION}window {window.name}"
            report.sections.append((title, "\n".join(rank_table(window))))


def write_summary(reporter: pytest.TerminalReporter, book: RunBook) -> None:
    """Writes the section, and the Markdown summary if `GITHUB_STEP_SUMMARY` is set."""
    reporter.section("sglprof")
    if book.results is not None:
        with book.writing("the summary"):
            _write_verdicts(reporter, book.results)
        if path := os.environ.get("GITHUB_STEP_SUMMARY"):
            with book.writing(f"GITHUB_STEP_SUMMARY {path}"):
                _append(path, book.results)
    if book.file is not None:
        reporter.write_line(f"results: {book.file}")
    if book.page is not None:
        reporter.write_line(f"report:  {book.page}")
    for line in book.notes:
        reporter.write_line(line)
    for line in book.problems:
        reporter.write_line(line, red=True)


def _write_verdicts(reporter: pytest.TerminalReporter, document: Results) -> None:
    from pytest_sglprof._report.terminal import summary_lines

    for line in summary_lines(document):
        reporter.write_line(line)


def _append(path: str, document: Results) -> None:
    from pytest_sglprof._report.ci import step_summary

    with open(path, "a", encoding="utf-8") as stream:  # noqa: PTH123 – appended to
        stream.write(step_summary(document))


ERASE = "\r\x1b[K"  # the line of a terminal that the cursor is in
LOG_INTERVAL = 15.0  # s between lines of progress in an output that is not a terminal


class TerminalProgress:
    """Shows lines of progress past pytest's capturing; on a terminal each replaces the last.

    silent: shows nothing, as in xdist workers, whose output is not visible.
    """

    def __init__(self, config: pytest.Config, *, silent: bool = False) -> None:
        self._capture = config.pluginmanager.getplugin("capturemanager")
        self._silent = silent or config.getoption("verbose", 0) < 0
        self._last = 0.0
        self._dirty = False

    def __call__(self, line: str) -> None:
        """Shows `line`, at most once a second (every 15 s if the output is not a terminal)."""
        now = time.monotonic()
        if self._silent or now - self._last < (1.0 if self._is_live else LOG_INTERVAL):
            return
        self._last = now
        self._write(f"{self._start}sglprof: {' '.join(line.split())[:150]}")
        self._dirty = True

    def announce(self, line: str) -> None:
        """Shows a line that stays, whatever else is shown."""
        if not self._silent:
            self._write(f"{self._start}sglprof: {' '.join(line.split())}\n")
            self._dirty = False

    def clear(self) -> None:
        """Ends the line when the work is over, so that an outcome begins on a line of its own."""
        if self._dirty:
            self._write(ERASE if self._is_live else "\n")
            self._dirty = False

    @property
    def _start(self) -> str:
        """Begins a line in the place of the last one, or below what pytest has written."""
        return ERASE if self._dirty and self._is_live else "\n"

    @cached_property
    def _is_live(self) -> bool:
        """Whether the output is a terminal, which pytest's capturing hides."""
        with self._uncaptured():
            return sys.__stderr__ is not None and sys.__stderr__.isatty()

    def _write(self, text: str) -> None:
        with self._uncaptured():
            if sys.__stderr__ is not None:
                sys.__stderr__.write(text)
                sys.__stderr__.flush()

    def _uncaptured(self) -> AbstractContextManager[None]:
        if self._capture is None:
            return nullcontext()
        uncaptured: AbstractContextManager[None] = self._capture.global_and_fixture_disabled()
        return uncaptured
