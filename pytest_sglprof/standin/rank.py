"""One scheduler process: runs forward passes when its front asks, and profiles them.

It reads one JSON message a line from stdin and answers each with one line on stdout. When
stdin ends, the front is gone, and so is the rank.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pytest_sglprof.standin.model import Batch, Place, places
from pytest_sglprof.standin.options import Options, env_flag, log, parse
from pytest_sglprof.standin.profiler import Profiler
from pytest_sglprof.standin.traces import Recorded

_PR_SET_PDEATHSIG = 1
_PR_SET_NAME = 15

OUT_OF_MEMORY = (
    "CUDA out of memory. Tried to allocate 1.16 GiB. GPU 0 has a total capacity of 79.19 GiB "
    "of which 512.00 MiB is free."
)


class OutOfMemoryError(RuntimeError):
    """Named like torch's, so that the log reads alike."""


OutOfMemoryError.__module__ = "torch"


def main(argv: list[str]) -> int:
    """`TITLE INDEX PARENT OPTIONS...`, started by `ranks.RankProcess` only."""
    title, index, parent = argv[0], int(argv[1]), int(argv[2])
    _die_with(parent)
    set_title(title)
    options = parse(argv[3:])
    place = places(options.sizes)[index]
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the front, which ends us
    try:
        if options.start_fault == "oom" and index == len(places(options.sizes)) - 1:
            raise OutOfMemoryError(OUT_OF_MEMORY)
        _serve(place, options)
    except Exception:
        log(f"Scheduler hit an exception: {traceback.format_exc()}", place.tags)
        return 1
    return 0


def _serve(place: Place, options: Options) -> None:
    profiler = Profiler(place, options)
    mark = _nvtx_range(place)
    log("Init parallel begin.", place.tags)
    _answer({"ready": os.getpid()})
    for line in sys.stdin:
        message = json.loads(line)
        if message["op"] == "step":
            _run(message, place, profiler, mark)
            _answer({})
        elif message["op"] == "profile":
            ok, text = profiler.request(message["params"], message["step"])
            _answer({"ok": ok, "message": text})
        elif message["op"] == "die":
            raise RuntimeError("CUDA error: device-side assert triggered")


def _run(message: dict[str, Any], place: Place, profiler: Profiler, mark: Any) -> None:
    batches = tuple(Batch(*values) for values in message["batches"])
    profiler.before_step(message["step"], batches[place.queue])
    start, wall = message["start"], message["wall"]
    with mark("scheduler.run_batch"):
        left = start + wall - time.time_ns()
        if left > 0:
            time.sleep(left / 1e9)
    profiler.record(Recorded(message["step"], start, wall, batches))


def _answer(message: dict[str, Any]) -> None:
    try:
        sys.stdout.write(json.dumps(message) + "\n")
        sys.stdout.flush()
    except BrokenPipeError:
        os._exit(0)


def _nvtx_range(place: Place) -> Any:
    """A context manager that marks a range for nsys, or one that does nothing."""
    if env_flag("SGLANG_ENABLE_NVTX_SCHEDULER"):
        try:
            import nvtx
        except ImportError:
            log(
                "An SGLANG_ENABLE_NVTX_* flag is set, but the `nvtx` package is missing. "
                "NVTX markers are disabled; torch profiler spans still emit.",
                place.tags,
            )
        else:
            return lambda name: nvtx.annotate(name, color="red")
    return _nothing


@contextlib.contextmanager
def _nothing(name: str) -> Iterator[None]:
    yield


def set_title(title: str) -> None:
    """Makes `ps` and /proc/PID/cmdline show `title`, as setproctitle would.

    The memory of the original arguments is overwritten; the caller passes the title as an
    argument, so it fits. Where that is impossible (not Linux) the process keeps its name.
    """
    with contextlib.suppress(OSError, ValueError, IndexError):
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        begin, end = int(fields[45]), int(fields[46])
        encoded = title.encode()
        if 0 < len(encoded) < end - begin:
            ctypes.memmove(begin, encoded.ljust(end - begin, b"\0"), end - begin)
        _prctl(_PR_SET_NAME, ctypes.create_string_buffer(encoded[:15]))


def _die_with(parent: int) -> None:
    """SIGKILL for this process when its parent dies, even where nobody reads stdin."""
    with contextlib.suppress(OSError):
        _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(0)


def _prctl(option: int, value: Any) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(option, value, 0, 0, 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
