"""The files of a window become a kernel table, and the table a verdict. No server here."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from pytest_sglprof._config.backends import readable
from pytest_sglprof._config.model import Threshold
from pytest_sglprof._errors import TraceError, in_shell

if TYPE_CHECKING:
    from pytest_sglprof._capture.recording import WindowCapture
    from pytest_sglprof._config.load import Settings
    from pytest_sglprof._server.log_lines import ServerFacts
    from pytest_sglprof._trace.table import KernelTable
    from pytest_sglprof._trace.tasks import Gathered
    from pytest_sglprof._verdict.judge import Verdict


@dataclass(frozen=True)
class WindowFiles:
    """The files of one window, and what is known of the window that they do not hold.

    pid_ranks, gpu_ranks: the rank label of each process, else of each device, for nsys
    reports; file_ranks: that of a file whose rank nothing tells. settle: seconds that are
    dropped from the front. facts: what the server's log says about the time of the window;
    None for a window without facts. server_info: an answer of `/server_info`, instead of the file
    of that name beside the traces.
    """

    paths: tuple[Path, ...]
    pid_ranks: Mapping[int, str] = field(default_factory=dict)
    gpu_ranks: Mapping[int, str] = field(default_factory=dict)
    file_ranks: Mapping[str, str] = field(default_factory=dict)
    settle: float = 0.0
    facts: ServerFacts | None = None
    server_info: Path | None = None

    @classmethod
    def of_capture(cls, capture: WindowCapture) -> WindowFiles:
        """The files of a window that was just closed."""
        return cls(
            tuple(artifact.path for artifact in readable(capture.artifacts)),
            capture.pid_ranks,
            capture.gpu_ranks,
            settle=capture.spec.settle,
            facts=capture.facts,
        )


def read_recorded(
    files: WindowFiles,
    settings: Settings,
    *,
    allow_partial: bool = False,
    launches: bool = True,
    force: bool = False,
) -> KernelTable:
    """The kernel table of a window, with the categories and the step delimiter of `settings`.

    The plugin and every command read windows by this function, so that all of them see the
    same table. allow_partial, launches, force: see `read_window`. Raises `TraceError`.
    """
    from pytest_sglprof._trace.beside import with_files_beside
    from pytest_sglprof._trace.read import read_window

    with where_they_lie(
        files, settings, allow_partial=allow_partial, launches=launches
    ) as elsewhere:
        if elsewhere is not None:
            paths = tuple(elsewhere.paths)
            files = replace(files, paths=paths, file_ranks={}, server_info=None)
        table = read_window(
            files.paths,
            pid_ranks=files.pid_ranks,
            gpu_ranks=files.gpu_ranks,
            file_ranks=files.file_ranks,
            allow_partial=allow_partial,
            settle_s=files.settle,
            patterns=settings.categories,
            step_delimiter=settings.step_delimiter,
            nsys=settings.nsys or None,
            launches=launches,
            force=force,
        )
        table = with_files_beside(table, files.paths, files.server_info)
    if files.facts is None:
        return table
    from pytest_sglprof._trace.steps import with_server_facts

    return with_server_facts(table, files.facts)


@contextmanager
def where_they_lie(
    files: WindowFiles, settings: Settings, *, allow_partial: bool = False, launches: bool = True
) -> Iterator[Gathered | None]:
    """What the workers of `settings.executor` make of the files; None without an executor."""
    if not settings.executor:
        yield None
        return
    from pytest_sglprof._trace.executors import opened
    from pytest_sglprof._trace.paths import ReadOptions
    from pytest_sglprof._trace.tasks import gathered

    options = ReadOptions(
        pid_ranks=files.pid_ranks,
        gpu_ranks=files.gpu_ranks,
        allow_partial=allow_partial,
        nsys=settings.nsys or None,
        launches=launches,
    )
    labels, info = files.file_ranks, files.server_info
    with (
        opened(settings.executor) as executor,
        gathered(files.paths, executor, options, file_ranks=labels, server_info=info) as small,
    ):
        yield small


@dataclass(frozen=True)
class Measured:
    """table: None when there was nothing to read. verdict: its judgement, with reasons.

    doubt: why the window is not whole, None when it is; a judgement of it is inconclusive.
    seconds: how long reading and judging took.
    """

    table: KernelTable | None
    verdict: Verdict
    doubt: str | None = None
    seconds: float = 0.0


def read_and_judge(
    capture: WindowCapture, settings: Settings, extra: Sequence[Threshold] = ()
) -> Measured:
    """Reads what `capture` left and judges it against its thresholds and `extra`.

    A window that is not complete, or whose files cannot be read, is inconclusive with
    that reason: it is never passed, and what could be read is kept in the table.
    """
    began = time.monotonic()
    table, unreadable = _table_or_reason(capture, settings)
    doubt = unreadable or (capture.reason if capture.state != "complete" else None)
    verdict = judge_table(capture, table, doubt, settings, extra)
    return Measured(table, verdict, doubt, time.monotonic() - began)


def without_verdict(measured: Measured, moment: str) -> Measured:
    """What was measured of a window beside the one that is judged: it cannot fail a test."""
    from pytest_sglprof._verdict.judge import Verdict

    around = f"is of the time {moment} the onset"
    of_what = "has the stacks after a fail" if moment == "sources" else around
    reason = f"not judged: it {of_what}"
    if measured.doubt:
        reason += f" ({measured.doubt})"
    return replace(measured, verdict=Verdict("pass", reason, sums=measured.verdict.sums))


def judge_table(
    capture: WindowCapture,
    table: KernelTable | None,
    doubt: str | None,
    settings: Settings,
    extra: Sequence[Threshold] = (),
) -> Verdict:
    """The verdict on a table that was read already."""
    from pytest_sglprof._verdict.judge import judge

    return judge(
        table,
        (*capture.spec.thresholds, *extra),
        min_steps=settings.min_steps,
        min_share=settings.min_share,
        expected_ranks=capture.expected_ranks,
        missing_ranks=capture.missing_ranks,
        incomplete_reason=doubt,
    )


def _table_or_reason(
    capture: WindowCapture, settings: Settings
) -> tuple[KernelTable | None, str | None]:
    """The table, else why there is none."""
    if not capture.artifacts:
        return None, capture.reason or "the window left no trace"
    try:
        return read_recorded(WindowFiles.of_capture(capture), settings), None
    except TraceError as error:
        return None, in_shell(str(error))
