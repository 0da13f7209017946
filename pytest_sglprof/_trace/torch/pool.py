"""Read many torch traces at once, in this process and others.

Plain child processes instead of `multiprocessing`: those import the caller's main module
again, which may be pytest or an unguarded script, and fork is ruled out by the caller's
threads. The results are batches of columns, so the parent holds little more than them.
"""

from __future__ import annotations

import fcntl
import os
import pickle
import selectors
import struct
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import IO, Any

from pytest_sglprof import _errors as errors
from pytest_sglprof._errors import SglprofError, TraceError
from pytest_sglprof._trace.torch.collect import ScanRequest
from pytest_sglprof._trace.torch.events import Batch, Columns, FileFacts, joined
from pytest_sglprof._trace.torch.scan import scan_file

_MAIN = (
    "import sys; sys.path[:] = {path!r}; from pytest_sglprof._trace.torch.pool import main; main()"
)
# Bytes that a reader can send while this process is at a file of its own: two batches.
_PIPE = 1 << 20


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


def read_here(
    path: Path, request: ScanRequest, *, meanwhile: Callable[[], None] = lambda: None
) -> FileContent:
    """Reads one file in this process. meanwhile: called between its batches."""
    content = FileContent(path)

    def emit(batch: Batch) -> None:
        content.batches.append(batch)
        meanwhile()

    facts = scan_file(path, request, emit, restart=content.batches.clear)
    return content.close(facts)


def read_in_processes(
    jobs: Sequence[tuple[Path, ScanRequest]], processes: int
) -> list[FileContent]:
    """Reads files in this process and `processes - 1` others; results in the order of `jobs`.

    Raises the first error of a file, or TraceError when a reader process dies. However it
    ends (Ctrl-C too), no reader outlives the call.
    """
    todo = iter(range(len(jobs)))
    contents: dict[int, FileContent] = {}
    readers: list[_Reader] = []

    def take(timeout: float | None) -> None:
        """Takes what the readers have sent, and gives them more to do."""
        for key, _ in frames.select(timeout):
            content = key.data.take()
            if content is not None:
                contents[key.data.number] = content
                following = next(todo, None)
                if following is None:
                    frames.unregister(key.fileobj)
                else:
                    key.data.give(following, *jobs[following])

    try:
        with selectors.DefaultSelector() as frames:
            for number in islice(todo, processes - 1):
                readers.append(_Reader())
                readers[-1].give(number, *jobs[number])
                frames.register(readers[-1].output, selectors.EVENT_READ, readers[-1])
            for number in todo:
                contents[number] = read_here(*jobs[number], meanwhile=lambda: take(0))
            while len(contents) < len(jobs):
                take(None)
    finally:
        for reader in readers:
            reader.process.kill()
        for reader in readers:
            reader.close()
    return [contents[number] for number in range(len(jobs))]


class _Reader:
    """A reader process, and the file that it is at: `number` of the jobs."""

    def __init__(self) -> None:
        self.process = _start()
        assert self.process.stdin is not None and self.process.stdout is not None
        self._input: IO[bytes] = self.process.stdin
        self.output: IO[bytes] = self.process.stdout
        with suppress(AttributeError, OSError):  # Linux has it, up to a limit
            fcntl.fcntl(self.output, fcntl.F_SETPIPE_SZ, _PIPE)
        self.number = -1
        self._content = FileContent(Path())

    def give(self, number: int, path: Path, request: ScanRequest) -> None:
        """Hands over the next file."""
        self.number, self._content = number, FileContent(path)
        with suppress(BrokenPipeError):  # `take` tells that the process is gone
            send(self._input, JOB, (str(path), request))

    def take(self) -> FileContent | None:
        """Takes one frame; the content once the file was read to its end."""
        frame = receive(self.output)
        if frame is None:
            raise TraceError(
                f"the process that read {self._content.path} ended with status "
                f"{self.process.wait()}",
                expected="a reader that lives until the file's end",
                hint="is the machine out of memory? read fewer files at once, or with processes=1",
            )
        what, payload = frame
        if what == ERROR:
            raise _error(*payload)
        if what == DONE:
            return self._content.close(payload)
        if what == BATCH:
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


def _error(name: str, what: str, details: dict[str, Any]) -> SglprofError:
    error: SglprofError = getattr(errors, name, TraceError)(what, **details)
    return error


# A reader process: takes files to read from stdin, sends batches back on stdout.
#
# It imports neither numpy nor pandas, which would cost more time and memory than reading.
# Frames: one byte that says what, four bytes of length, a pickled payload. Written to our
# own parent only, over a private pipe.


HEAD = struct.Struct("<cI")
BATCH, RESTART, DONE, ERROR, JOB = b"B", b"R", b"D", b"E", b"J"


def send(stream: IO[bytes], what: bytes, payload: object = None) -> None:
    """Writes one frame."""
    data = pickle.dumps(payload, protocol=5)
    left = memoryview(HEAD.pack(what, len(data)) + data)
    while left:
        left = left[stream.write(left) :]
    stream.flush()


def receive(stream: IO[bytes]) -> tuple[bytes, Any] | None:
    """Reads one frame; None when the other side has gone."""
    head = _exactly(stream, HEAD.size)
    if head is None:
        return None
    what, size = HEAD.unpack(head)
    data = _exactly(stream, size)
    return None if data is None else (what, pickle.loads(data))


def _exactly(stream: IO[bytes], size: int) -> bytearray | None:
    """So many bytes, whether or not the stream is buffered; None at its end."""
    data = bytearray(size)
    left = memoryview(data)
    while left:
        # Every binary stream has it; `IO`, which names both kinds that come here, does not.
        count = stream.readinto(left)  # type: ignore[attr-defined]
        if not count:
            return None
        left = left[count:]
    return data


def main() -> None:
    """Serves jobs until stdin closes."""
    jobs = sys.stdin.buffer
    results = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # nothing that prints may write between the frames
    try:
        while (job := receive(jobs)) is not None:
            _read(results, *job[1])
    except BrokenPipeError:
        os._exit(1)


def _read(results: IO[bytes], path: str, request: ScanRequest) -> None:
    try:
        facts = scan_file(
            Path(path),
            request,
            lambda batch: send(results, BATCH, batch),
            restart=lambda: send(results, RESTART),
        )
    except SglprofError as error:
        details = {"expected": error.expected, "hint": error.hint, "log": error.log}
        send(results, ERROR, (type(error).__name__, error.what, details))
    else:
        send(results, DONE, facts)
