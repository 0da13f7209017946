"""One scheduler process: runs forward passes when its front asks, and profiles them.

It reads one JSON message a line from stdin and answers each with one line on stdout. When
stdin ends, the front is gone, and so is the rank.
"""

from __future__ import annotations

import contextlib
import ctypes
import gzip
import json
import os
import pickle
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pytest_sglprof.standin.model import Batch, Place, places, stage_peers
from pytest_sglprof.standin.options import Options, env_flag, log, parse, raw
from pytest_sglprof.standin.traces import Recorded, Recording, merge_traces, write

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


NOT_RUNNING = "Profiling is not in progress. Call /start_profile first."


RUNNING = "Profiling is already in progress. Call /stop_profile first."


Answer = tuple[bool, str]


class Profiler:
    """State of the windows of one rank; `request` and `before_step` drive it."""

    def __init__(self, place: Place, options: Options) -> None:
        self.place = place
        self.options = options
        self.running = False
        self.recording = False
        self.steps: list[Recorded] = []
        self.params: dict[str, Any] = {}
        self.opened_ns = 0
        self.start_at: int | None = None
        self.stop_at: int | None = None
        self.by_stage = False
        self.stage_limit: int | None = None
        self.stage_counts: dict[str, int | None] = {"EXTEND": None, "DECODE": None}

    def request(self, params: Mapping[str, Any] | None, step: int) -> Answer:
        """`/start_profile` with its body, or `/stop_profile` (None). step: passes so far."""
        if params is None:
            return self._stop()
        if params.get("profile_by_stage") or params.get("start_step"):
            return self._arm(params, step)
        self._arm(params, step)
        return self._start()

    def before_step(self, step: int, batch: Batch) -> None:
        """Opens or closes what is due at this forward pass, which is not yet recorded."""
        if self.by_stage:
            self._stage_step(batch)
            return
        if self.stop_at is not None and self.stop_at <= step:
            self._stop()
        if self.start_at is not None and self.start_at == step:
            self._start()

    def record(self, recorded: Recorded) -> None:
        """Adds a forward pass to the open window, if there is one."""
        if self.recording:
            self.steps.append(recorded)
        limit = self.options.die_in_window
        last = self.place.tp == self.place.sizes.tp - 1
        if last and self.running and limit is not None and len(self.steps) >= limit:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    def _arm(self, params: Mapping[str, Any], step: int) -> Answer:
        if self.running:
            return False, RUNNING
        self.params = dict(params)
        self.by_stage = bool(params.get("profile_by_stage"))
        start, count = params.get("start_step"), params.get("num_steps")
        if start:
            self.start_at = max(start, step + 1)
        if not count:
            self.stop_at = None
        elif self.by_stage:
            self.stage_counts = {"EXTEND": 0, "DECODE": 0}
            self.stage_limit = count
        else:
            # Up to 0.5.14 the pass at which it ends was the last of so many, and not recorded.
            first = step + self.options.speech.extra_pass
            self.stop_at = (self.start_at if start and self.start_at else first) + count
        return True, "Succeeded"

    def _start(self, stage: str = "") -> Answer:
        folder, name = self._folder(), self.params.get("profile_id")
        what = f"Profiling starts for {stage}" if stage else "Profiling starts"
        log(f"{what}. Traces will be saved to: {folder} (with profile id: {name})", self.place.tags)
        wanted = self._activities()
        if wanted & {"CPU", "GPU"}:
            if self.options.device == "cpu" and "CPU" not in wanted:
                raise AssertionError("No activities specified for the profiler")
            self._usdt("start")
            self.steps = []
            self.opened_ns = time.time_ns()
            self.recording = self.running = True
        if wanted & {"MEM", "CUDA_PROFILER"}:
            if self.options.device == "cpu":
                raise RuntimeError("Torch not compiled with CUDA enabled")
            self.running = True
        return True, "Succeeded"

    def _stop(self, stage: str = "") -> Answer:
        if not self.running:
            return False, NOT_RUNNING
        folder = self._folder()
        folder.mkdir(parents=True, exist_ok=True)
        suffix = f"-{stage}" if stage else ""
        log(f"Stop profiling{suffix}...", self.place.tags)
        if self.recording:
            self._usdt("stop")
            self._export(folder, suffix)
        if "MEM" in self._activities():
            self._memory_snapshot(folder, suffix)
        note = self._merge(folder)
        log(f"Profiling done. Traces are saved to: {folder}{note}", self.place.tags)
        self.recording = self.running = False
        self.steps = []
        self.start_at = None
        return True, f"Succeeded.{note}"

    def _stage_step(self, batch: Batch) -> None:
        stage = batch.mode
        if stage == "IDLE":
            return
        if stage == "DECODE" and self.stage_counts[stage] == 0:
            if self.running:
                self._stop("EXTEND")
            if batch.size < self._decode_min_bs():
                return
        if self.stage_counts[stage] == 0:
            self._start(stage)
        # As in the real server, counting up from None is a TypeError that ends the rank. It is
        # deliberate, hence the two exceptions for mypy.
        self.stage_counts[stage] += 1  # type: ignore[operator]
        if self.stage_counts[stage] > self.stage_limit and self.running:  # type: ignore[operator]
            self._stop(stage)

    def _decode_min_bs(self) -> int:
        given = os.environ.get("SGLANG_PROFILE_BY_STAGE_DECODE_MIN_BS") or "0"
        return int(given) if self.options.speech.decode_min_bs else 0

    def _folder(self) -> Path:
        fallback = os.environ.get("SGLANG_TORCH_PROFILER_DIR", "/tmp")
        given = self.params.get("output_dir")
        return Path(fallback if given is None else given).expanduser()

    def _activities(self) -> set[str]:
        given = self.params.get("activities")
        return {"CPU", "GPU"} if given is None else set(given)

    def _prefix(self) -> str:
        prefix = self.params.get("profile_prefix")
        return f"{prefix}-" if prefix else ""

    def _export(self, folder: Path, suffix: str) -> None:
        """Plain JSON in TMPDIR first, then compressed in place under its final name."""
        if self.options.hang_in_stop_profile:
            while True:
                time.sleep(3600)
        slow_rank, seconds = self.options.profile_stall
        is_slow = slow_rank in (self.place.label, str(self.place.index))
        time.sleep(self.options.export_delay + (seconds if is_slow else 0.0))
        name = f"{self._prefix()}{self.params['profile_id']}-{self.place.file_part}{suffix}"
        target = folder / f"{name}.trace.json.gz"
        recording = Recording(
            place=self.place,
            model=self.options.model,
            device=self.options.device,
            activities=frozenset(self._activities()),
            start_ns=self.opened_ns,
            end_ns=time.time_ns(),
            steps=tuple(self.steps),
            with_stack=self.params.get("with_stack") is not False,
            record_shapes=self.params.get("record_shapes") is not False,
            detailed=bool(self.params.get("detailed_annotations")),
            spans=self.options.speech.spans,
            forward_ids=self.options.speech.forward_ids,
        )
        with tempfile.NamedTemporaryFile("w", suffix=".json", delete=False) as unpacked:
            write(recording, unpacked, unpacked.name)
        try:
            with Path(unpacked.name).open("rb") as source, gzip.open(target, "wb", 6) as file:
                shutil.copyfileobj(source, file)
        finally:
            Path(unpacked.name).unlink()

    def _memory_snapshot(self, folder: Path, suffix: str) -> None:
        name = f"{self._prefix()}{time.time()}-TP-{self.place.tp}-memory{suffix}.pickle"
        with (folder / name).open("wb") as file:
            pickle.dump({"segments": [], "device_traces": []}, file)

    def _merge(self, folder: Path) -> str:
        place = self.place
        if not self.params.get("merge_profiles") or place.tp or place.pp or place.dp:
            return ""
        log("Starting profile merge...", place.tags)
        name = str(self.params["profile_id"])
        peers = [p.file_part for p in stage_peers(place, places(place.sizes))]
        try:
            merged, events, files = merge_traces(folder, name, peers)
        except ValueError as error:
            log(f"Failed to merge profiles: {error}", place.tags)
            return f" Merge failed: {error}"
        log(f"Profile merge completed: {merged}", place.tags)
        return f" Merged trace: {merged} (Events: {events}, Files: {files})"

    def _usdt(self, what: str) -> None:
        stamp, pid = time.strftime("%Y-%m-%d %H:%M:%S"), os.getpid()
        line = 52 if what == "start" else 59
        raw(f"USDT:{stamp} {pid}:{pid} SyncActivityProfilerHandler.cpp:{line}] profiler_{what}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
