"""`QUESTIONS`: what pytest asks a keeper on another node to do or look up there."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pytest_sglprof import _process as process
from pytest_sglprof._errors import NsysSessionError, SglprofError
from pytest_sglprof._nsys import NsysSession
from pytest_sglprof._nsys_export import export
from pytest_sglprof._server.keeper.life import ServerLife
from pytest_sglprof._server.keeper.protocol import Answer, Ask


def answer(life: ServerLife, question: Ask) -> Answer:
    """The answer, or the error that it raised."""
    try:
        value = QUESTIONS[question.what](life, **question.values)
    except SglprofError as error:
        return Answer(question.number, None, type(error).__name__, dict(vars(error)))
    except (OSError, ValueError, TypeError, KeyError) as error:
        what = f"{question.what} failed: {type(error).__name__}: {error}"
        return Answer(question.number, None, "ServerError", {"what": what})
    return Answer(question.number, value)


def _session(life: ServerLife) -> NsysSession:
    if life.session is None:
        raise NsysSessionError("the server of this node does not run under nsys")
    return life.session


def _ranks(life: ServerLife) -> dict[str, str]:
    return {str(pid): rank.label for pid, rank in process.scheduler_ranks(life.pid).items()}


def _start(life: ServerLife, output: str, capture_range: str | None, timeout: float) -> None:
    _session(life).start(Path(output), capture_range=capture_range, timeout=timeout)


def _stop(life: ServerLife, timeout: float) -> dict[str, Any]:
    session = _session(life)
    report = session.stop(timeout=timeout)
    return {"report": str(report), "remarks": list(session.remarks)}


def _export(life: ServerLife, report: str, target: str, timeout: float) -> str:
    return str(export(_session(life).tool, Path(report), "sqlite", Path(target), timeout))


QUESTIONS: Mapping[str, Callable[..., Any]] = {
    "ranks": _ranks,
    "nsys_state": lambda life: _session(life).state(),
    "nsys_size": lambda life, report: _session(life).size(Path(report)),
    "nsys_start": _start,
    "nsys_stop": _stop,
    "nsys_export": _export,
}
