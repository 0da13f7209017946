"""Read the files of a window where they lie, by any executor: only reduced files come back.

A task reduces a few files (`reduced.py`), wherever the executor runs it. This process only lists,
hands out and writes down what comes, so its memory does not grow with the traces. Paths are those
that the workers see. A task that its worker lost, or keeps for far too long, is given out again;
an error of a file itself is raised at once.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, Executor, Future, wait
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import chain, repeat
from pathlib import Path
from typing import Any

from pytest_sglprof._errors import SglprofError, TraceError
from pytest_sglprof._server.sizes import EXPERTS, SERVER_INFO
from pytest_sglprof._trace.beside import beside_of_traces, read_settings
from pytest_sglprof._trace.one_window import copies
from pytest_sglprof._trace.paths import (
    REDUCED_ENDING,
    Reader,
    ReadOptions,
    given_labels,
    is_reduced,
    reader_of,
    window_files,
)
from pytest_sglprof._trace.reduced import Beside, beside_of, reduced

MOST_TASKS = 256  # each has the names of all files, by which numbers in names become ranks
ATTEMPTS = 3  # at each task
PATIENCE = 4  # times the longest task so far, in which no other ends: then workers are stuck
PATIENCE_S = 15.0  # and no less than this;
FIRST_S = 600.0  # before any task has ended

_Call = tuple[Any, ...]  # a function of this module, and its arguments


@dataclass(frozen=True)
class Survey:
    """What lies at the paths of a window. files: by the reader of each. size: their bytes."""

    files: tuple[tuple[Path, ...], ...]
    beside: Beside
    size: int

    @property
    def listed(self) -> list[Path]:
        """All files."""
        return [file for same in self.files for file in same]


@dataclass(frozen=True)
class Gathered:
    """The reduced files that came back, in the order of the files of the survey."""

    survey: Survey
    paths: list[Path]


def surveyed(paths: Sequence[Path], server_info: Path | None = None) -> Survey:
    """Looks at the files of a window and what stands beside them. server_info: a file of it.

    Raises `TraceError` where there is nothing, or where a file that is given is none.
    """
    listed = window_files(paths)
    files: dict[Reader, list[Path]] = {}
    for file in listed:
        files.setdefault(reader_of(file), []).append(file)
    earlier = [beside_of(file) for file in listed if is_reduced(file)]
    infos = [server_info_of(server_info, listed), *(each.server_info for each in earlier)]
    beside = Beside(
        server_info=next((info for info in infos if info is not None), None),
        settle_s=max([0.0, *(each.settle_s for each in earlier)]),
        unlike=(*copies(listed), *(why for each in earlier for why in each.unlike)),
    )
    every = [each for path in listed for each in (path.rglob("*") if path.is_dir() else [path])]
    size = sum(each.stat().st_size for each in every if each.is_file())
    return Survey(tuple(map(tuple, files.values())), beside, size)


@contextmanager
def gathered(
    paths: Sequence[str | Path],
    executor: Executor,
    options: ReadOptions,
    *,
    file_ranks: Mapping[str, str] | None = None,
    server_info: Path | None = None,
) -> Iterator[Gathered]:
    """The window as reduced files in a temporary folder.

    Raises the `TraceError` of a file, or one that says that the executor fails.
    """
    where = [Path(path).absolute() for path in paths]
    info = server_info and server_info.absolute()
    ((_, survey),) = _results(executor, [(surveyed, where, info)])
    labels = given_labels(survey.listed, file_ranks or {})
    options = replace(options, file_ranks=labels, processes=1)
    length = -(-len(survey.listed) // MOST_TASKS)
    besides = chain([survey.beside], repeat(Beside()))  # said once, of all files
    calls = [
        (reduced_bytes, same[at : at + length], replace(options, among=same), next(besides))
        for same in survey.files
        for at in range(0, len(same), length)
    ]
    with tempfile.TemporaryDirectory(prefix="sglprof-") as folder:
        files = [Path(folder, f"{number:05}{REDUCED_ENDING}") for number in range(len(calls))]
        for number, content in _results(executor, calls):
            files[number].write_bytes(content)
        if (experts := beside_of_traces(where, EXPERTS)) is not None:
            Path(folder, EXPERTS).symlink_to(experts)
        yield Gathered(survey, files)


def server_info_of(given: Path | None, listed: Sequence[Path]) -> dict[str, Any] | None:
    """The settings of the server that are given, or stand beside the traces.

    Raises `TraceError` where the file that is given is none; one beside is then left out.
    """
    file = given or beside_of_traces(listed, SERVER_INFO)
    if file is None:
        return None
    try:
        read_settings(file)
    except TraceError:
        if given is not None:
            raise
        return None
    info: dict[str, Any] = json.loads(file.read_bytes())
    return info


# What workers run.


def reduced_bytes(files: Sequence[Path], options: ReadOptions, beside: Beside) -> bytes:
    """The reduced file of some files of a window, of which `options.among` has all."""
    return reduced(reader_of(files[0]).read(files, options), beside)


def _timed(_attempt: int, call: _Call) -> tuple[float, Any]:
    began = time.monotonic()
    result = call[0](*call[1:])
    return time.monotonic() - began, result


# Who gets what, and again.


def _results(executor: Executor, calls: Sequence[_Call]) -> Iterator[tuple[int, Any]]:
    """The number and the result of each call, as they come."""
    running: dict[Future[tuple[float, Any]], int] = {}
    attempts: Counter[int] = Counter()
    longest = 0.0

    def start(number: int) -> None:
        attempts[number] += 1  # as an argument, since Dask runs equal calls once
        running[executor.submit(_timed, attempts[number], calls[number])] = number

    try:
        for number in range(len(calls)):
            start(number)
        while running:
            patience = max(PATIENCE_S, PATIENCE * longest) if longest else FIRST_S
            done, _ = wait(running, timeout=patience, return_when=FIRST_COMPLETED)
            if not done:  # a free worker takes it, if there is one; the first result counts
                for number in {*running.values()}:
                    if attempts[number] < ATTEMPTS:
                        start(number)
            for future in done:
                number = running.pop(future, -1)  # else another attempt was faster
                if number < 0:
                    continue
                others = [each for each, same in running.items() if same == number]
                error = future.exception()
                if error is None:
                    for other in others:
                        del running[other]
                        other.cancel()
                    seconds, result = future.result()
                    longest = max(longest, seconds)
                    yield number, result
                elif isinstance(error, SglprofError):
                    raise error
                elif attempts[number] < ATTEMPTS:
                    start(number)
                elif not others:
                    raise _lost(f"the executor lost a file {ATTEMPTS} times", error) from error
    except BrokenExecutor as error:
        raise _lost("the executor is broken", error) from error
    finally:
        for future in running:
            future.cancel()


def _lost(what: str, error: BaseException) -> TraceError:
    return TraceError(
        f"{what}: {type(error).__name__}: {error}",
        expected="workers that live until a file's end, with pytest-sglprof[parquet] of this "
        "version, and with the same paths as here",
        hint="look at the log of the workers: is one out of memory?",
    )
