"""Reads many torch traces at once, in processes of our own.

Plain child processes instead of `multiprocessing`: those import the caller's main module
again, which may be pytest or an unguarded script, and fork is ruled out by the caller's
threads. The results are batches of columns, so the parent holds little more than them.
"""

from __future__ import annotations

import selectors
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import IO, Any

from pytest_sglprof import errors
from pytest_sglprof.errors import SglprofError, TraceError
from pytest_sglprof.trace import worker
from pytest_sglprof.trace.collect import ScanRequest
from pytest_sglprof.trace.columns import Columns, joined
from pytest_sglprof.trace.kineto import Batch, FileFacts
from pytest_sglprof.trace.torch_file import scan_file

_MAIN = "import sys; sys.path[:] = {path!r}; from pytest_sglprof.trace.worker import main; main()"


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


def read_here(path: Path, request: ScanRequest) -> FileContent:
    """Reads one file in this process."""
    content = FileContent(path)
    facts = scan_file(path, request, content.batches.append, restart=content.batches.clear)
    return content.close(facts)


def read_in_processes(
    jobs: Sequence[tuple[Path, ScanRequest]], processes: int
) -> list[FileContent]:
    """Reads files in up to `processes` child processes; results in the order of `jobs`.

    Raises the first error of a file, or TraceError when a reader process dies. However it
    ends (Ctrl-C too), no reader outlives the call.
    """
    todo = iter(range(len(jobs)))
    found: dict[int, FileContent] = {}
    readers: list[_Reader] = []
    try:
        with selectors.DefaultSelector() as frames:
            for number in islice(todo, processes):
                readers.append(_Reader())
                readers[-1].give(number, *jobs[number])
                frames.register(readers[-1].output, selectors.EVENT_READ, readers[-1])
            while len(found) < len(jobs):
                for key, _ in frames.select():
                    content = key.data.take()
                    if content is not None:
                        found[key.data.number] = content
                        following = next(todo, None)
                        if following is None:
                            frames.unregister(key.fileobj)
                        else:
                            job = jobs[following]
                            key.data.give(following, *job)
    finally:
        for reader in readers:
            reader.process.kill()
        for reader in readers:
            reader.close()
    return [found[number] for number in range(len(jobs))]


class _Reader:
    """A reader process, and the file that it is at: `number` of the jobs."""

    def __init__(self) -> None:
        self.process = _start()
        assert self.process.stdin is not None and self.process.stdout is not None
        self._input: IO[bytes] = self.process.stdin
        self.output: IO[bytes] = self.process.stdout
        self.number = -1
        self._content = FileContent(Path())

    def give(self, number: int, path: Path, request: ScanRequest) -> None:
        """Hands over the next file."""
        self.number, self._content = number, FileContent(path)
        with suppress(BrokenPipeError):  # `take` tells that the process is gone
            worker.send(self._input, worker.JOB, (str(path), request))

    def take(self) -> FileContent | None:
        """Takes one frame; the content once the file was read to its end."""
        frame = worker.receive(self.output)
        if frame is None:
            raise TraceError(
                f"the process that read {self._content.path} ended with status "
                f"{self.process.wait()}",
                expected="a reader that lives until the file's end",
                hint="is the machine out of memory? processes=1 reads in this process",
            )
        what, payload = frame
        if what == worker.ERROR:
            raise _error(*payload)
        if what == worker.DONE:
            return self._content.close(payload)
        if what == worker.BATCH:
            self._content.batches.append(payload)
        else:
            self._content.batches.clear()
        return None

    def close(self) -> None:
        """Waits for the end of the process, which was killed."""
        self.process.wait()
        for stream in (self._input, self.output):
            with suppress(OSError):
                stream.close()


def _start() -> subprocess.Popen[bytes]:
    path = [entry for entry in sys.path if entry]
    package = str(Path(errors.__file__).resolve().parents[1])
    command = [sys.executable, "-I", "-c", _MAIN.format(path=[*path, package])]
    # A session of its own: Ctrl-C reaches us, and we end it. It ends by itself when we die,
    # since its stdin closes.
    # Without buffers: what a selector does not see may not be held back.
    return subprocess.Popen(
        command, bufsize=0, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
    )


def _error(name: str, what: str, said: dict[str, Any]) -> SglprofError:
    error: SglprofError = getattr(errors, name, TraceError)(what, **said)
    return error
