"""After a fail: a short window with Python stacks, for the lines behind the slow rank's kernels."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from pytest_sglprof._errors import SglprofError
from pytest_sglprof._run.sampling import open_short

if TYPE_CHECKING:
    from pytest_sglprof._report.model import RecordedSources
    from pytest_sglprof._run.opening import LoadState
    from pytest_sglprof._run.window import Window

STEPS = 3
MOST_LINES = 40


def record_sources(window: Window, load: LoadState | None, body_is_over: threading.Event) -> None:
    """Sets `sources` of the failed ones among `window` and those that repeat it, if asked for.

    The server goes on working: judging takes some seconds, for which the load has to last. What
    goes wrong here is a reason in the results, since the windows are judged already.
    """
    if not window.spec.source_lines:
        return
    failed = [each for each in window.windows if each.verdict.word == "fail"]
    if not failed:
        return
    sources = _recorded(failed[0], load, body_is_over)
    for each in failed:
        each.sources = sources


def _recorded(
    window: Window, load: LoadState | None, body_is_over: threading.Event
) -> RecordedSources:
    from pytest_sglprof._report.model import RecordedSources
    from pytest_sglprof._trace.torch.source_lines import source_lines

    rank = _slow_rank(window)
    if body_is_over.is_set() or (load is not None and load.is_over):
        why = "the load was over before the verdict was known: drive a longer one"
        return RecordedSources(rank=rank, window=None, lines=(), reason=why)
    try:
        short = open_short(window, "sources", body_is_over, steps=STEPS, with_stack=True)
        if short is None:
            why = "another window of this server was open"
            return RecordedSources(rank=rank, window=None, lines=(), reason=why)
        paths = [file.path for file in short.capture.artifacts if file.rank == rank]
        lines = source_lines(paths[0]) if paths else ()
    except SglprofError as error:
        return RecordedSources(rank=rank, window=None, lines=(), reason=error.what)
    reason = "" if lines else short.capture.reason or f"the trace of {rank} has no stacks"
    return RecordedSources(rank=rank, window=short.id, lines=lines[:MOST_LINES], reason=reason)


def _slow_rank(window: Window) -> str:
    """The rank that the verdict names, else the first."""
    deciding = window.verdict.deciding
    rank = deciding.rank if deciding is not None else None
    return rank or next((file.rank for file in window.capture.artifacts if file.rank), "")
