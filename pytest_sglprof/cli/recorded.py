"""What a command reads: files of a window as they are given, or a window of a run."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pytest_sglprof.errors import SglprofError, TraceError

if TYPE_CHECKING:
    from pytest_sglprof.report.model import RecordedWindow, Results
    from pytest_sglprof.settings import Settings
    from pytest_sglprof.trace.table import KernelTable

RESULTS = "results.json"


@dataclass(frozen=True)
class Recorded:
    """Files of one window. window: its part of results.json, None for files alone."""

    paths: tuple[Path, ...]
    window: RecordedWindow | None = None


def recorded_by(args: argparse.Namespace) -> Recorded:
    """What the paths of a command name: a run's window, or traces, reports and exports."""
    results = [results_file(Path(path)) for path in args.paths]
    if len(results) != 1 or results[0].name != RESULTS or not results[0].is_file():
        if args.window:
            raise SglprofError(
                f"--window {args.window}: {args.paths[0]} is not the folder of one run",
                expected=f"one path, a {RESULTS} or the folder that holds it",
                hint="leave --window out: traces and reports are read as they are",
            )
        return Recorded(tuple(Path(path) for path in args.paths))
    from pytest_sglprof.report.results import load_results

    window, folder = choose_window([load_results(results[0])], [results[0].parent], args.window)
    return window_of_run(window, folder)


def results_file(path: Path) -> Path:
    """The results of a run, given as that file or as the run's folder."""
    return path / RESULTS if path.is_dir() else path


def choose_window(
    documents: Sequence[Results], folders: Sequence[Path], window_id: str
) -> tuple[RecordedWindow, Path]:
    """The window with that id, or the only one; and its run's folder."""
    chosen = [
        (window, folder)
        for document, folder in zip(documents, folders, strict=True)
        for window in document.windows
        if window_id in ("", window.id)
    ]
    if len(chosen) != 1:
        every = [window.id for document in documents for window in document.windows]
        what = f"no window {window_id}" if window_id else f"{len(chosen)} windows"
        raise SglprofError(
            f"there {'is' if window_id else 'are'} {what} in these results",
            expected="one window",
            hint=f"choose with --window: {', '.join(every) or 'there is none'}",
        )
    return chosen[0]


def window_of_run(window: RecordedWindow, folder: Path) -> Recorded:
    """The files of a window of results.json; `TraceError` where they were not kept."""
    kinds = {artifact.kind for artifact in window.artifacts}
    exported = kinds & {"sqlite", "parquet"}  # a report and its export are the same data
    paths = [
        folder / artifact.path
        for artifact in window.artifacts
        if not exported or artifact.kind in exported
    ]
    if not paths or not all(path.exists() for path in paths):
        raise TraceError(
            f"the traces of window {window.id} are not there",
            expected="the files that results.json names, beside it",
            hint="keep the traces of windows that pass with --sglprof-set=output.keep=all",
        )
    return Recorded(tuple(paths), window)


def read_table(
    recorded: Recorded, args: argparse.Namespace, settings: Settings, *, sequences: bool = True
) -> KernelTable:
    """The kernel table of it, with the user's categories and step delimiter.

    sequences: see `read_window`. Raises `TraceError`.
    """
    from pytest_sglprof.trace.read import read_window

    window = recorded.window
    pid_ranks = {int(pid): rank for pid, rank in window.pid_ranks.items()} if window else {}
    gpu_ranks = {int(gpu): rank for gpu, rank in window.gpu_ranks.items()} if window else {}
    return read_window(
        recorded.paths,
        pid_ranks={**pid_ranks, **dict(args.rank)} or None,
        gpu_ranks=gpu_ranks or None,
        allow_partial=args.allow_partial,
        settle_s=window.spec.settle if window else 0.0,
        patterns=settings.categories,
        step_delimiter=settings.step_delimiter,
        nsys=settings.nsys or None,
        sequences=sequences,
    )
