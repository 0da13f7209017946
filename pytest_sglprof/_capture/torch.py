"""`TorchRecording`: a window through ``/start_profile`` and ``/stop_profile``.

The server's answers prove little: it answers 200 before anything is recorded, checks only its
first rank, and does not report the end of a window by steps. So the state of a window is read
from its files, one for each rank, and from the log.
"""

from __future__ import annotations

import contextlib
import gzip
import os
import re
import time
import uuid
import weakref
import zlib
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pytest_sglprof._capture.recording import POLL, Artifact, LifeWatch, Progress, WindowCapture
from pytest_sglprof._capture.torch_request import (
    DISARM,
    NAME_LIMIT,
    OutputFolder,
    check_space,
    check_watchdog,
    output_folder,
    refuse_request,
    request_body,
    wanted_stages,
)
from pytest_sglprof._config.backends import BACKENDS
from pytest_sglprof._config.model import WindowSpec
from pytest_sglprof._errors import (
    ServerDied,
    ServerError,
    ServerRefused,
    ServerUnreachable,
    WindowError,
    WindowRefused,
)
from pytest_sglprof._files import safe_name
from pytest_sglprof._ranks import Rank
from pytest_sglprof._server.client import SglangClient
from pytest_sglprof._server.command import LAUNCHERS
from pytest_sglprof._server.log import LogGrowth, ServerLog
from pytest_sglprof._server.log_lines import Entry, EntryReader, highest_iteration

if TYPE_CHECKING:
    from pytest_sglprof._server.launch import Server


QUIET = 2.0  # s without a byte written, after which missing files are given up
QUIET_SHARED = 8.0  # the same for a network file system, or if ranks end one by one
DEATH_SECONDS = 2.0  # from a broken connection until the log shows that the server died
# Clients of the servers whose last window may not have ended: the next one ends it first.
_UNSETTLED: weakref.WeakSet[SglangClient] = weakref.WeakSet()


class TorchRecording:
    """One torch window of `server`, with its files in `folder`."""

    def __init__(
        self,
        server: Server,
        spec: WindowSpec,
        *,
        window_id: str,
        folder: Path,
        life: LifeWatch,
        progress: Progress | None = None,
    ) -> None:
        self._server = server
        self._spec = spec
        self._window_id = window_id
        self._folder = folder
        self._life = life
        self._progress = progress or (lambda text: None)
        self._ranks: Sequence[Rank] = server.sizes.ranks()
        self._profile_id = safe_name(
            spec.profile_id
            or f"{safe_name(window_id, limit=NAME_LIMIT - 9)}-{uuid.uuid4().hex[:8]}",
            limit=NAME_LIMIT,
        )
        self._place: OutputFolder | None = None
        self._files = TraceFiles(folder, self._ranks)
        self._notes: list[str] = []
        self._in_log = (
            ProgressReader(server.log, life.log_start, self._profile_id) if server.log else None
        )

    def refuse(self) -> None:
        """Raises `WindowRefused` for what would break the server or the data."""
        server, spec = self._server, self._spec
        refuse_request(
            spec,
            server.sizes,
            under_nsys=server.nsys is not None,
            standin=LAUNCHERS[server.kind].is_standin,
            env=self._environment(),
            last_step=last_step(server.log) if server.log and spec.start_step else None,
        )
        limit = server.info.get("watchdog_timeout")
        check_watchdog(spec, float(limit) if isinstance(limit, int | float) else None)
        output_folder(server, spec, self._window_id)

    def _environment(self) -> Mapping[str, str]:
        """The server's environment as far as known; for attached servers only `env` of the spec."""
        inherited = {} if self._server.attached else dict(os.environ)
        return {**inherited, **dict(self._server.spec.env)}

    def start(self, deadline: float) -> None:
        """Makes the folder, ends a profile that an earlier window may have left, and starts."""
        server, spec = self._server, self._spec
        place = self._place = output_folder(server, spec, self._window_id)
        place.prepare(shared=server.attached)
        self._files = TraceFiles(
            place.local,
            self._ranks,
            profile_id="" if place.ours else self._profile_id,
            stages=wanted_stages(spec),
        )
        if self._files.rank_files():
            raise WindowRefused(
                f"{place.local} already holds traces of profile_id {self._profile_id}",
                expected="an id of its own for each window",
                hint="leave profile_id out, and a fresh one is chosen",
            )
        self._check_space(place)
        if server.attached or server.client in _UNSETTLED:
            self._end_leftover(deadline)
        body = request_body(
            spec, profile_id=self._profile_id, output_dir=place.server, sizes=server.sizes
        )
        _UNSETTLED.add(server.client)
        try:
            self._life.call(
                lambda left: server.client.start_profile(body, left), deadline, "/start_profile"
            )
        except ServerRefused as error:
            _UNSETTLED.discard(server.client)
            log = refusal_reason(server.log, self._life.log_start) if server.log else ()
            raise WindowError(
                f"the server refused to start the profile: {error.what}",
                expected="200 Start profiling.",
                hint=error.hint,
                log=log,
            ) from error

    def _check_space(self, place: OutputFolder) -> None:
        temporary = self._server.folder / "tmp"
        folders = [place.local, temporary] if temporary.is_dir() else [place.local]
        try:
            check_space(self._spec, self._server.sizes, folders)
        except WindowRefused:
            place.remove()
            raise

    def _end_leftover(self, deadline: float) -> None:
        # Starting while another profile runs is answered with 200, and loses the other one.
        if self._life.call(self._server.client.stop_profile, deadline, "/stop_profile"):
            self._notes.append("a profile was still running on this server: it was ended first")
        _UNSETTLED.discard(self._server.client)

    def is_done(self) -> bool:
        """True once the requested steps have ended and every rank's file is complete."""
        return self._spec.num_steps is not None and self._files.all_whole() and not self._pending()

    def _pending(self) -> list[str]:
        """Labels of ranks that began and have not reported their end; empty without a log."""
        if self._in_log is None:
            return []
        progress = self._in_log.read()
        labels = {(r.dp or 0, r.pp or 0, r.tp or 0): r.label for r in self._ranks}
        return [labels[where] for where in progress.pending() if where in labels]

    def stop(
        self, capture: WindowCapture, deadline: float, *, unfinished: str | None
    ) -> WindowCapture:
        """Ends the profile and collects its files."""
        reasons = [self._why_unfinished(unfinished)] if unfinished else []
        log: tuple[str, ...] = ()
        dead = still_open = False
        self._progress("writing the traces")
        try:
            ended = self._life.call(self._server.client.stop_profile, deadline, "/stop_profile")
            self._settle(deadline, quiet=self._quiet(ended))
            self._disarm(deadline)
            _UNSETTLED.discard(self._server.client)
        except ServerError as error:
            death = self._cause_of(error)
            dead, still_open = death is not None, death is None
            reasons = [(death or error).what]
            log = (death or error).log
        death = self._life.death()
        if death and not dead:
            dead, reasons, log = True, [death.what], death.log
        return self._collected(capture, reasons, dead=dead, still_open=still_open, log=log)

    def _quiet(self, ended: bool) -> float:
        # 200 means that every file is there; 500 says nothing about ranks after the first.
        return QUIET if ended and not self._server.attached else QUIET_SHARED

    def _cause_of(self, error: ServerError) -> ServerDied | None:
        if isinstance(error, ServerDied):
            return error
        over = time.monotonic() + DEATH_SECONDS
        while isinstance(error, ServerUnreachable) and time.monotonic() < over:
            if death := self._life.death():
                return death
            time.sleep(POLL)
        return self._life.death()

    def _why_unfinished(self, unfinished: str) -> str:
        """`unfinished`, or the more specific reason that nothing ran at all."""
        server = self._server
        if self._in_log is not None:
            progress = self._in_log.read()
            if progress.batches or progress.ended:
                return unfinished
        with contextlib.suppress(ServerError):
            if not sum(load.running for load in server.client.loads()):
                return f"no forward pass was run while the window was open: {unfinished}"
        return unfinished

    def _settle(self, deadline: float, *, quiet: float) -> None:
        """Waits until every rank's file is complete, or none has grown for `quiet` seconds."""
        sizes: Mapping[Path, int] = {}
        changed = time.monotonic()
        settled = True  # at first, since the server answers after it has written its files
        while not self._life.death():
            complete = self._files.whole(settled=settled)
            if not self._files.missing(complete) and not self._pending():
                return
            now = time.monotonic()
            if sizes != (sizes := self._files.sizes()):
                changed = now
            if now - changed > quiet or now > deadline:
                return
            settled = False
            time.sleep(POLL)

    def _disarm(self, deadline: float) -> None:
        """Removes a trigger that has not fired, as it would ruin the next window."""
        if self._spec.profile_by_stage or self._spec.start_step is not None:
            self._life.call(
                lambda left: self._server.client.start_profile(DISARM, left),
                deadline,
                "/start_profile",
            )

    def _collected(
        self,
        capture: WindowCapture,
        reasons: list[str],
        *,
        dead: bool,
        still_open: bool,
        log: tuple[str, ...],
    ) -> WindowCapture:
        complete = self._files.whole(settled=True)
        missing = [rank.label for rank in self._files.missing(complete)]
        notes = [*self._notes, *self._remarks(complete)]
        if not dead and not still_open:
            reasons = [*reasons, *self._faults(complete, missing)]
        state: Literal["complete", "incomplete", "failed"] = "complete"
        if dead or not complete:
            state = "failed"
        elif reasons:
            state = "incomplete"
        return replace(
            capture,
            state=state,
            reason="; ".join(reasons),
            artifacts=self._collect(complete),
            missing_ranks=tuple(missing),
            gpu_ranks=self._server.sizes.gpu_ranks(),
            log=log,
            notes=tuple(notes),
            is_still_open=still_open,
        )

    def _faults(self, complete: Mapping[Path, Rank], missing: Sequence[str]) -> list[str]:
        faults = []
        cut = sorted(path.name for path in self._files.rank_files() if path not in complete)
        if missing:
            faults.append(f"no complete trace of {', '.join(missing)}")
        if cut:
            faults.append(f"cut off: {', '.join(cut)}")
        if pending := self._pending():
            faults.append(f"{', '.join(pending)} began but never reported 'Profiling done'")
        if self._in_log is not None:
            progress = self._in_log.read()
            if progress.strangers:
                faults.append(
                    f"another profile ({', '.join(progress.strangers)}) began meanwhile, and "
                    "what was recorded until then is lost"
                )
        return faults

    def _remarks(self, complete: Mapping[Path, Rank]) -> list[str]:
        remarks = []
        if stages := self._files.missing_stages(complete):
            remarks.append(f"no rank has a file of stage {', '.join(stages)}")
        others = [path.name for path in self._files.others()]
        if others:
            remarks.append(f"beside the ranks' traces: {', '.join(others)}")
        if self._spec.merge_profiles and not any(name.startswith(MERGED) for name in others):
            why = " (with a profile_prefix it never does)" if self._spec.profile_prefix else ""
            remarks.append(f"the server left no merged trace{why}")
        return remarks

    def _collect(self, complete: Mapping[Path, Rank]) -> tuple[Artifact, ...]:
        """Moves every file into the window's folder; only whole rank traces become artifacts."""
        if self._place is None:
            return ()
        files = [*self._files.rank_files(), *self._files.others()]
        moved = self._place.collect(files, self._folder)
        return tuple(Artifact(moved[path], "torch", rank.label) for path, rank in complete.items())

    def abort(self) -> None:
        """Ends the profile and deletes its files."""
        deadline = time.monotonic() + BACKENDS["torch"].abort_seconds
        with contextlib.suppress(ServerError):
            self._life.call(self._server.client.stop_profile, deadline, "/stop_profile")
            self._disarm(deadline)
            _UNSETTLED.discard(self._server.client)
        if self._place is not None:
            self._place.remove()


# Progress of a window in the server's log: which ranks began, and which ended.

STEP_BYTES = 2**26  # of a log that are searched for its last step: 500,000 batch lines

_ERROR = re.compile(r"^(?:\w+\.)*\w*(?:Error|Exception)\b")
# How far each log has been read for step numbers, and the highest one so far.
_SHOWN: weakref.WeakKeyDictionary[ServerLog, tuple[LogGrowth, int | None]] = (
    weakref.WeakKeyDictionary()
)


@dataclass(frozen=True)
class ProfilerProgress:
    """Counts since the window was opened. begun, ended: place of a rank -> how often.

    strangers: ids of other profiles that began meanwhile. batches: number of forward passes in
    the log, which has every prefill and every n-th decode, of some ranks only.
    """

    begun: Counter[PlaceOfRank]
    ended: Counter[PlaceOfRank]
    strangers: tuple[str, ...]
    batches: int

    def pending(self) -> list[PlaceOfRank]:
        """Ranks that began more often than they ended."""
        return sorted(where for where, times in self.begun.items() if times > self.ended[where])


class ProgressReader:
    """Follows one window in the log from byte `start` on, reading each byte once."""

    def __init__(self, log: ServerLog, start: int, profile_id: str) -> None:
        self._log = log
        self._growth = LogGrowth(log.path, start)
        self._entries = EntryReader()
        self._profile_id = profile_id
        self._begun: Counter[PlaceOfRank] = Counter()
        self._ended: Counter[PlaceOfRank] = Counter()
        self._strangers: dict[str, None] = {}
        self._batches = 0

    def read(self) -> ProfilerProgress:
        """The counts up to the present end of the log."""
        for entry in self._entries.read(self._log.new(self._growth)):
            self._take(entry)
        strangers = tuple(self._strangers)
        return ProfilerProgress(
            Counter(self._begun), Counter(self._ended), strangers, self._batches
        )

    def _take(self, entry: Entry) -> None:
        where = place(entry.rank or Rank(tp=0))
        if entry.kind == "profile_start":
            if entry.profile_id == self._profile_id:
                self._begun[where] += 1
            else:
                self._strangers[entry.profile_id or "?"] = None
        elif entry.kind == "profile_end":
            self._ended[where] += 1
        elif entry.is_batch:
            self._batches += 1


def read_progress(log: ServerLog, start: int, profile_id: str) -> ProfilerProgress:
    """Reads the log once, from byte `start` on."""
    return ProgressReader(log, start, profile_id).read()


def refusal_reason(log: ServerLog, start: int) -> tuple[str, ...]:
    """The last error line since `start`, which says why a request was answered with 500."""
    errors = (line for line in log.each(start) if _ERROR.match(line))
    return tuple(deque(errors, maxlen=1))


def last_step(log: ServerLog) -> int | None:
    """The highest step number in the log; None without SGLANG_LOG_FORWARD_ITERS.

    The first call reads the last `STEP_BYTES` of the log, since steps only grow; later calls
    read what is new.
    """
    growth, highest = _SHOWN.get(log) or (LogGrowth(log.path), None)
    for piece in growth.pieces(at_most=STEP_BYTES):
        shown = highest_iteration(piece)
        highest = max((n for n in (highest, shown) if n is not None), default=None)
    _SHOWN[log] = growth, highest
    return highest


# Files. The server writes a trace in place, under its final name, so a file may exist and be
# incomplete. It is whole once its gzip stream ends, its checksum holds and its JSON ends.


CHUNK = 1 << 20  # bytes read at a time, so that memory stays flat
SUFFIX = ".trace.json.gz"
MERGED = "merged-"
PlaceOfRank = tuple[int, int, int]


def place(rank: Rank) -> PlaceOfRank:
    """(dp, pp, tp) of a rank, with 0 for tags that a log line or file name leaves out."""
    return (rank.dp or 0, rank.pp or 0, rank.tp or 0)


def stage_of(name: str) -> str:
    """``EXTEND`` or ``DECODE`` for a file of a by-stage window, else ""."""
    stem = name.removesuffix(SUFFIX)
    return next((stage for stage in ("EXTEND", "DECODE") if stem.endswith(f"-{stage}")), "")


def is_whole(path: Path) -> bool:
    """True if the file is complete gzip whose contents end like JSON."""
    end = b""
    try:
        with gzip.open(path, "rb") as stream:
            while chunk := stream.read(CHUNK):
                end = (end + chunk)[-64:]
    except (OSError, EOFError, zlib.error):  # gzip.BadGzipFile is an OSError
        return False
    return end.rstrip().endswith((b"}", b"]"))


@dataclass
class TraceFiles:
    """Watches `folder` for the files of the ranks of one window.

    profile_id: only files with it in their name count, since the folder may be the user's
    and hold others. stages: the suffixes of a by-stage window; empty for an ordinary one.
    """

    folder: Path
    ranks: Sequence[Rank]
    profile_id: str = ""
    stages: Sequence[str] = ()
    _sizes: dict[Path, int] = field(default_factory=dict)
    _whole: dict[Path, int] = field(default_factory=dict)

    def rank_files(self) -> dict[Path, Rank]:
        """Every rank's files, whole or not, by path."""
        known = {place(rank): rank for rank in self.ranks}
        files: dict[Path, Rank] = {}
        for path in sorted(self._listed()):
            rank = Rank.from_file_name(path.name)
            if rank is not None and not path.name.startswith(MERGED):
                files[path] = known.get(place(rank), rank)
        return files

    def others(self) -> list[Path]:
        """Files of the window that are not the trace of a rank: merged ones, memory snapshots."""
        traces = self.rank_files()
        return [path for path in sorted(self._listed()) if path not in traces]

    def _listed(self) -> list[Path]:
        try:
            return [
                path
                for path in self.folder.iterdir()
                if self.profile_id in path.name and path.is_file()
            ]
        except OSError:
            return []

    def whole(self, *, settled: bool = False) -> dict[Path, Rank]:
        """The complete files of ranks, by path.

        A file is read only if its size has not changed since the last call (settled: at once),
        and is not read again while it keeps the size at which it was whole.
        """
        files = self.rank_files()
        complete: dict[Path, Rank] = {}
        for path, rank in files.items():
            size = _size(path)
            still = settled or self._sizes.get(path) == size
            self._sizes[path] = size
            if self._whole.get(path) == size or (still and size > 0 and is_whole(path)):
                self._whole[path] = size
                complete[path] = rank
        return complete

    def sizes(self) -> Mapping[Path, int]:
        """Size of each file in bytes; while they change, the server is still writing."""
        return {path: _size(path) for path in self._listed()}

    def missing(self, complete: Mapping[Path, Rank]) -> list[Rank]:
        """Ranks without a complete file.

        In a by-stage window: without the file of a stage that another rank has, or without any.
        """
        stages_there = {stage_of(path.name) for path in complete} if self.stages else {""}
        there = {(place(rank), stage_of(path.name)) for path, rank in complete.items()}
        if not self.stages:
            there = {(where, "") for where, _ in there}
        return [
            rank
            for rank in self.ranks
            if not stages_there or any((place(rank), stage) not in there for stage in stages_there)
        ]

    def missing_stages(self, complete: Mapping[Path, Rank]) -> list[str]:
        """Wanted stages that no rank has a complete file of."""
        there = {stage_of(path.name) for path in complete}
        return [stage for stage in self.stages if stage not in there]

    def all_whole(self) -> bool:
        """True if every rank has a complete file for every stage wanted."""
        complete = self.whole()
        return not self.missing(complete) and not self.missing_stages(complete)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return -1
