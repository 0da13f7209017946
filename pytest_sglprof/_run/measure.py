"""A closed window's files become a kernel table, and the table a verdict. No server here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pytest_sglprof._capture.recording import WindowCapture
from pytest_sglprof._config.backends import readable
from pytest_sglprof._config.model import Threshold
from pytest_sglprof._errors import TraceError
from pytest_sglprof._verdict.judge import Verdict, judge

if TYPE_CHECKING:
    from pytest_sglprof._config.load import Settings
    from pytest_sglprof._trace.table import KernelTable


@dataclass(frozen=True)
class Measured:
    """table: None when there was nothing to read. verdict: its judgement, with reasons.

    doubt: why the window is not whole, None when it is; a judgement of it is inconclusive.
    """

    table: KernelTable | None
    verdict: Verdict
    doubt: str | None = None


def read_and_judge(
    capture: WindowCapture, settings: Settings, extra: Sequence[Threshold] = ()
) -> Measured:
    """Reads what `capture` left and judges it against its thresholds and `extra`.

    A window that is not complete, or whose files cannot be read, is inconclusive with
    that reason: it is never passed, and what could be read is kept in the table.
    """
    table, unreadable = _read(capture, settings)
    doubt = unreadable or (capture.reason if capture.state != "complete" else None)
    return Measured(table, judge_table(capture, table, doubt, settings, extra), doubt)


def judge_table(
    capture: WindowCapture,
    table: KernelTable | None,
    doubt: str | None,
    settings: Settings,
    extra: Sequence[Threshold] = (),
) -> Verdict:
    """The verdict on a table that was read already."""
    return judge(
        table,
        (*capture.spec.thresholds, *extra),
        min_steps=settings.min_steps,
        min_share=settings.min_share,
        expected_ranks=capture.expected_ranks,
        missing_ranks=capture.missing_ranks,
        incomplete_reason=doubt,
    )


def _read(capture: WindowCapture, settings: Settings) -> tuple[KernelTable | None, str | None]:
    """The table, or why there is none."""
    if not capture.artifacts:
        return None, capture.reason or "the window left no trace"
    from pytest_sglprof._trace.read import read_window
    from pytest_sglprof._trace.steps import with_server_facts

    try:
        table = read_window(
            [artifact.path for artifact in readable(capture.artifacts)],
            pid_ranks=capture.pid_ranks or None,
            gpu_ranks=capture.gpu_ranks or None,
            settle_s=capture.spec.settle,
            patterns=settings.categories,
            step_delimiter=settings.step_delimiter,
            nsys=settings.nsys or None,
        )
    except TraceError as error:
        return None, str(error)
    return with_server_facts(table, capture.facts), None
