"""Reads many torch traces at once, in processes of our own.

Plain child processes instead of `multiprocessing`: those import the caller's main module
again, which may be pytest or an unguarded script, and fork is ruled out by the caller's
threads. The results are batches of columns, so the parent holds little more than them.
"""

from __future__ import annotations

import queue
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pytest_sglprof import errors
from pytest_sglprof.errors import SglprofError, TraceError
from pytest_sglprof.trace import worker
from pytest_sglprof.trace.collect import Wanted
from pytest_sglprof.trace.columns import Columns, joined
from pytest_sglprof.trace.kineto import Batch, FileFacts
from pytest_sglprof.trace.torch_file import scan_file

_MAIN = "import sys; sys.path[:] = {path!r}; from pytest_sglprof.trace.worker import main; main()"

_THREAD = "sglprof-trace-reader"

Progress = Callable[[int], None]


@dataclass
class FileContent:
    """All that was read of one file. columns: made of the batches, which are then gone."""

    path: Path
    batches: list[Batch] = field(default_factory=list)
    columns: Columns = field(default_factory=lambda: joined([]))
    facts: FileFacts = field(default_factory=FileFacts)

    def close(self, facts: FileFacts) -> FileContent:
        """The file was read to its end."""
        self.columns, self.facts = joined(self.batches), facts
        self.batches = []
        return self


def read_here(path: Path, wanted: Wanted, progress: Progress | None = None) -> FileContent:
    """Reads one file in this process."""
    content = FileContent(path)
    facts = scan_file(
        path,
        wanted,
        content.batches.append,
        restart=content.batches.clear,
        progress=progress,
    )
    return content.close(facts)


def read_in_processes(
    jobs: Sequence[tuple[Path, Wanted]], processes: int, progress: Progress | None = None
) -> list[FileContent]:
    """Reads files in up to `processes` child processes; results in the order of `jobs`.

    progress: called in the caller's thread with stored bytes read since the last call.
    Raises the first error of a file, or TraceError when a reader process dies. However
    it ends (Ctrl-C too), no reader outlives the call.
    """
    todo: queue.SimpleQueue[int] = queue.SimpleQueue()
    for number in range(len(jobs)):
        todo.put(number)
    events: queue.SimpleQueue[int | tuple[int, FileContent] | BaseException] = queue.SimpleQueue()
    found: dict[int, FileContent] = {}
    readers: list[subprocess.Popen[bytes]] = []
    threads: list[threading.Thread] = []
    try:
        for _ in range(min(processes, len(jobs))):
            reader = _start()
            readers.append(reader)
            arguments = (reader, jobs, todo, events)
            threads.append(threading.Thread(target=_serve, args=arguments, name=_THREAD))
            threads[-1].start()
        while len(found) < len(jobs):
            event = events.get()
            if isinstance(event, BaseException):
                raise event
            if isinstance(event, tuple):
                found[event[0]] = event[1]
            elif progress is not None:
                progress(event)
    finally:
        for reader in readers:
            reader.kill()
        for thread in threads:
            thread.join()
        for reader in readers:
            reader.wait()
            for stream in (reader.stdin, reader.stdout):
                if stream is not None:
                    with suppress(OSError):
                        stream.close()
    return [found[number] for number in range(len(jobs))]


def _start() -> subprocess.Popen[bytes]:
    path = [entry for entry in sys.path if entry]
    package = str(Path(errors.__file__).resolve().parents[1])
    command = [sys.executable, "-I", "-c", _MAIN.format(path=[*path, package])]
    # A session of its own: Ctrl-C reaches us, and we end it. It ends by itself when we die,
    # since its stdin closes.
    return subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
    )


def _serve(
    reader: subprocess.Popen[bytes],
    jobs: Sequence[tuple[Path, Wanted]],
    todo: queue.SimpleQueue[int],
    events: queue.SimpleQueue[int | tuple[int, FileContent] | BaseException],
) -> None:
    """Gives one reader file after file; ends when there is none, or at the first error."""
    try:
        while True:
            try:
                number = todo.get_nowait()
            except queue.Empty:
                return
            events.put((number, _one(reader, *jobs[number], events.put)))
    except BaseException as error:
        events.put(error)


def _one(
    reader: subprocess.Popen[bytes], path: Path, wanted: Wanted, progress: Progress
) -> FileContent:
    assert reader.stdin is not None and reader.stdout is not None
    content = FileContent(path)
    try:
        worker.send(reader.stdin, worker.JOB, (str(path), wanted))
        while (frame := worker.receive(reader.stdout)) is not None:
            what, payload = frame
            if what == worker.BATCH:
                content.batches.append(payload)
            elif what == worker.RESTART:
                content.batches.clear()
            elif what == worker.PROGRESS:
                progress(payload)
            elif what == worker.ERROR:
                raise _error(*payload)
            else:
                return content.close(payload)
    except (BrokenPipeError, ValueError):
        pass
    raise TraceError(
        f"the process that read {path} ended with status {reader.wait()}",
        expected="a reader that lives until the file's end",
        hint="is the machine out of memory? processes=1 reads in this process",
    )


def _error(name: str, what: str, said: dict[str, Any]) -> SglprofError:
    error: SglprofError = getattr(errors, name, TraceError)(what, **said)
    return error
