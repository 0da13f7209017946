"""Documents of what commands read: those of runs, and those that are made of traces alone."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from pytest_sglprof._cli.inputs import Inputs, InputWindow
from pytest_sglprof._cli.options import read_table, settings_of
from pytest_sglprof._errors import NoKernels, TraceError, in_shell

if TYPE_CHECKING:
    from pytest_sglprof._capture.recording import Artifact
    from pytest_sglprof._config.load import Settings
    from pytest_sglprof._config.model import Threshold
    from pytest_sglprof._report.model import RecordedWindow, Results
    from pytest_sglprof._run.measure import WindowFiles
    from pytest_sglprof._trace.table import KernelTable

NS = 1_000_000_000
_UNIX_TIMES = 1_000_000_000 * NS  # ns; smaller times count from an unknown start


@dataclass(frozen=True)
class Measured:
    """A document. home: the folder that its paths are relative to, in links of a page."""

    document: Results
    home: Path


def measured(
    inputs: Inputs, args: argparse.Namespace, *, is_judged: bool = False
) -> list[Measured]:
    """A document of each run, and of the traces of each folder.

    is_judged: whether the windows of traces alone are judged, by the limit that `args` gives or
    those of the configuration; else they are only measured. Raises `TraceError` for the only
    window if it cannot be read; one of several, or of a killed run, is inconclusive then.
    """
    reading = _Reading(inputs, args, is_judged)
    documents = []
    for run in inputs.runs:
        left = [each for each in inputs.windows if each.run is run and each.window is None]
        windows = [reading.window(each) for each in left]
        document = _with_windows(run.document, windows) if windows else run.document
        documents.append(Measured(document, run.home))
    alone = [each for each in inputs.windows if each.run is None]
    for root, home in dict.fromkeys((each.root, each.home) for each in alone):
        here = [each for each in alone if (each.root, each.home) == (root, home)]
        windows = [reading.window(each) for each in here]
        name = here[0].id if len(here) == 1 else home.name
        documents.append(Measured(_document(name, windows, reading.settings), home))
    return documents


def _document(name: str, windows: Sequence[RecordedWindow], settings: Settings) -> Results:
    from pytest_sglprof import __version__
    from pytest_sglprof._report.model import Run
    from pytest_sglprof._report.results import run_document

    run = Run(
        id=name,
        started=min(window.opened for window in windows),
        ended=max(window.closed for window in windows),
        host="",
        command=(),
        versions={"pytest_sglprof": __version__},
        min_steps=settings.min_steps,
        exit_status=0,
    )
    return _with_windows(run_document(run, (), (), (), ()), windows)


def _with_windows(document: Results, windows: Sequence[RecordedWindow]) -> Results:
    """The document with further windows, which no test has: its verdict is of them as well."""
    from msgspec.structs import replace

    from pytest_sglprof._metrics import worst_word
    from pytest_sglprof._report.results import run_document

    attempts = [attempt for test in document.tests for attempt in test.attempts]
    every = (*document.windows, *windows)
    whole = run_document(document.run, attempts, every, document.servers, document.loads)
    judged = {window.verdict for window in windows if window.judgements}
    judged |= {window.verdict for window in windows if window.verdict != "pass"}
    verdict = worst_word({*judged, whole.summary.verdict})
    return replace(whole, summary=replace(whole.summary, verdict=verdict))


class _Reading:
    """Reads the windows of traces alone. Settings are read only if there is one."""

    def __init__(self, inputs: Inputs, args: argparse.Namespace, is_judged: bool) -> None:
        self._inputs, self._args, self._is_judged = inputs, args, is_judged

    @cached_property
    def settings(self) -> Settings:
        return settings_of(self._args, self._inputs.places)

    @cached_property
    def _thresholds(self) -> tuple[Threshold, ...]:
        from pytest_sglprof._cli.selection import thresholds_of

        chosen = thresholds_of(self._args, self.settings) if self._is_judged else ()
        return tuple(each for each in chosen if math.isfinite(each.limit))

    def window(self, window: InputWindow) -> RecordedWindow:
        """What pytest would have recorded of these files, without a server."""
        from pytest_sglprof._capture.recording import WindowCapture
        from pytest_sglprof._config.model import WindowSpec
        from pytest_sglprof._report.build import window_document
        from pytest_sglprof._trace.paths import is_nsys, window_files
        from pytest_sglprof._verdict.judge import judge

        files = window.files(self._args)
        read = window_files(files.paths)
        table, doubt = self._table(files, window)
        verdict = judge(
            table,
            self._thresholds,
            min_steps=self.settings.min_steps,
            min_share=self.settings.min_share,
            incomplete_reason=doubt,
        )
        begin, end = _span(table, read)
        capture = WindowCapture(
            window_id=window.id,
            spec=WindowSpec(name=window.id, backend="nsys" if is_nsys(read[0]) else "torch"),
            state="complete" if doubt is None else "failed" if table is None else "incomplete",
            opened=begin / NS,
            closed=end / NS,
            artifacts=_artifacts(read),
            expected_ranks=table.ranks if table is not None else (),
            reason=doubt or "",
        )
        return window_document(
            capture,
            table,
            verdict,
            nodeid="",
            attempt=1,
            server_key="",
            standin=False,
            load=None,
            root=window.root,
        )

    def _table(
        self, files: WindowFiles, window: InputWindow
    ) -> tuple[KernelTable | None, str | None]:
        """The table, and why it is not of a whole window."""
        try:
            is_left = window.run is not None  # by a run that was killed: inconclusive in any case
            return read_table(files, self._args, self.settings, partial=is_left), window.doubt
        except TraceError as error:
            is_alone = len(self._inputs.windows) == 1 and window.run is None
            if is_alone and not isinstance(error, NoKernels):
                raise
            return None, "; ".join(filter(None, (window.doubt, in_shell(str(error)))))


def _span(table: KernelTable | None, files: Sequence[Path]) -> tuple[int, int]:
    """First start and last end in ns, as Unix times; where traces have others, by their files."""
    written = max(file.stat().st_mtime_ns for file in files)
    if table is None or not len(table.frame):
        return written, written
    begin = int(table.frame["start_ns"].min())
    end = int((table.frame["start_ns"] + table.frame["dur_ns"]).max())
    return (begin, end) if begin >= _UNIX_TIMES else (written - (end - begin), written)


def _artifacts(files: Sequence[Path]) -> tuple[Artifact, ...]:
    from pytest_sglprof._capture.recording import Artifact
    from pytest_sglprof._ranks import named_ranks
    from pytest_sglprof._trace.paths import is_nsys

    ranks = named_ranks(files)
    kinds = {file: _nsys_kind(file) if is_nsys(file) else "torch" for file in files}
    labels = {file: ranks[file].rank.label if file in ranks else "" for file in files}
    return tuple(Artifact(file.absolute(), kinds[file], labels[file]) for file in files)


def _nsys_kind(file: Path) -> str:
    if file.is_dir():
        return "parquet"
    return "nsys-rep" if file.suffix == ".nsys-rep" else "sqlite"
