"""The section of pytest's summary: what was found, where it is written, and what is not."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from pytest_sglprof.session.run import RunBook

if TYPE_CHECKING:
    from pytest_sglprof.report.model import Results


def write_summary(reporter: pytest.TerminalReporter, book: RunBook) -> None:
    """Writes the section, and the Markdown summary of a CI job where it is asked for."""
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
    for line in book.problems:
        reporter.write_line(line, red=True)


def _write_verdicts(reporter: pytest.TerminalReporter, document: Results) -> None:
    from pytest_sglprof.report.terminal import summary_lines

    for line in summary_lines(document):
        reporter.write_line(line)


def _append(path: str, document: Results) -> None:
    from pytest_sglprof.report.markdown import step_summary

    with open(path, "a", encoding="utf-8") as stream:  # noqa: PTH123 – appended to
        stream.write(step_summary(document))
