"""A reader process: takes files to read from stdin, sends batches back on stdout.

It imports neither numpy nor pandas, which would cost more time and memory than reading.
Frames: one byte that says what, four bytes of length, a pickled payload. Written to our
own parent only, over a private pipe.
"""

from __future__ import annotations

import os
import pickle
import struct
import sys
from pathlib import Path
from typing import IO, Any

from pytest_sglprof.errors import SglprofError
from pytest_sglprof.trace.collect import ScanRequest
from pytest_sglprof.trace.torch_file import scan_file

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
        said = {"expected": error.expected, "hint": error.hint, "log": error.log}
        send(results, ERROR, (type(error).__name__, error.what, said))
    else:
        send(results, DONE, facts)
