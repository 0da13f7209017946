"""`TorchRecording`: a window through ``/start_profile`` and ``/stop_profile``.

The server's answers prove little: it answers 200 before anything is recorded, checks only its
first rank, and does not report the end of a window by steps. So the state of a window is read
from its files, one for each rank, and from the log.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
import time
import uuid
import weakref
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from http import HTTPStatus
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Literal

from pytest_sglprof._capture.recording import POLL, Artifact, LifeWatch, Progress, WindowCapture
from pytest_sglprof._capture.torch_files import (
    MERGED,
    PlaceOfRank,
    TraceFiles,
    full_name,
    place,
)
from pytest_sglprof._capture.torch_request import (
    DISARM,
    NAME_LIMIT,
    OutputFolder,
    check_space,
    check_watchdog,
    how_to_fetch,
    output_folder,
    refuse_request,
    request_body,
    takes_id,
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
from pytest_sglprof._redact import redact_text
from pytest_sglprof._server.client import SglangClient
from pytest_sglprof._server.command import LAUNCHERS
from pytest_sglprof._server.log import LogGrowth, ServerLog
from pytest_sglprof._server.log_lines import Entry, EntryReader, highest_iteration, read_batch
from pytest_sglprof._server.sizes import role_of

if TYPE_CHECKING:
    from pytest_sglprof._server.launch import Server


QUIET = 2.0  # s without a byte written, after which missing files are given up
DECODE_MIN_BS = "SGLANG_PROFILE_BY_STAGE_DECODE_MIN_BS"  # since 0.5.20
WITHOUT_DECODE = {
    "prefill": "a prefill server runs no decode steps",
    "embedding": "a server of embeddings runs no decode steps",
}
QUIET_SHARED = 8.0  # the same for a network file system, or if ranks end one by one
DEATH_SECONDS = 2.0  # from a broken connection until the log shows that the server died
ASK_AGAIN = 20.0  # s of waiting for files after a gateway has answered instead of the server
_GATEWAY = (HTTPStatus.BAD_GATEWAY, HTTPStatus.SERVICE_UNAVAILABLE, HTTPStatus.GATEWAY_TIMEOUT)
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
            role=role_of(server.info),
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
        chooses_id = not takes_id(server.sizes.version)
        files = TraceFiles(
            place.local,
            self._ranks,
            profile_id="" if place.ours else self._profile_id,
            stages=wanted_stages(spec),
        )
        before = files.names() if chooses_id and not place.ours else None
        self._files = replace(files, before=before)
        if self._in_log is not None:
            self._in_log.folder = place.server if place.ours or chooses_id else ""
            self._in_log.reads_batches = DECODE_MIN_BS in self._environment()
        if files.rank_files():
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
        pending = self._in_log.read().pending()
        if not self._ranks:
            return [Rank(dp=dp, pp=pp, tp=tp).label for dp, pp, tp in pending]
        labels = {place(rank): rank.label for rank in self._ranks}
        return [labels[where] for where in pending if where in labels]

    def stop(
        self, capture: WindowCapture, deadline: float, *, unfinished: str | None
    ) -> WindowCapture:
        """Ends the profile and collects its files; an interrupt drops them."""
        try:
            return self._stopped(capture, deadline, unfinished)
        except (KeyboardInterrupt, SystemExit):
            self.abort()
            raise

    def _stopped(
        self, capture: WindowCapture, deadline: float, unfinished: str | None
    ) -> WindowCapture:
        reasons = [self._why_unfinished(unfinished)] if unfinished else []
        log: tuple[str, ...] = ()
        dead = still_open = False
        self._progress("writing the traces")
        try:
            self._end(deadline)
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

    def _end(self, deadline: float) -> None:
        """Ends the profile and waits for its files."""
        while True:
            try:
                ended = self._life.call(self._server.client.stop_profile, deadline, "/stop_profile")
            except ServerRefused as error:
                # A gateway gave up waiting, while the server may go on: its files will tell.
                if error.status not in _GATEWAY:
                    raise
                self._settle(min(deadline, time.monotonic() + ASK_AGAIN), quiet=math.inf)
                if self._is_all_here(self._files.whole(settled=True)):
                    self._notes.append(f"{error.what}; the server wrote its files nevertheless")
                    return
                if time.monotonic() >= deadline or self._life.death():
                    raise
            else:
                self._settle(deadline, quiet=self._quiet(ended))
                return

    def _quiet(self, ended: bool) -> float:
        # 200 means that the files of the first pipeline stage are there; 500 says nothing about
        # ranks after the first.
        if self._server.sizes.pp > 1 and not self._is_logged():
            return math.inf
        is_local = not self._server.attached and not self._server.is_gathered
        return QUIET if ended and is_local else QUIET_SHARED

    def _is_logged(self) -> bool:
        """Whether the log tells which ranks have begun, so that it will tell when they end."""
        return self._in_log is not None and bool(self._in_log.read().begun)

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
                return self._waited_for(progress) or unfinished
        with contextlib.suppress(ServerError):
            if not sum(load.running + load.waiting for load in server.client.loads()):
                return f"no forward pass was run while the window was open: {unfinished}"
        return unfinished

    def _waited_for(self, progress: ProfilerProgress) -> str:
        """Why a decode window by stage never began; "" for another reason, or if it did."""
        least = self._environment().get(DECODE_MIN_BS, "")
        is_waiting = "DECODE" in wanted_stages(self._spec) and not progress.decodes_begun
        if not (is_waiting and least.isdigit() and 0 < progress.most_decoding < int(least)):
            return ""
        return (
            f"its decode steps never began: the server waits for a batch of {least} requests "
            f"({DECODE_MIN_BS}), and had {progress.most_decoding} at most"
        )

    def _settle(self, deadline: float, *, quiet: float) -> None:
        """Waits until every rank's file is complete, or none has grown for `quiet` seconds.

        A rank whose end the log is still to report is waited for until `deadline`.
        """
        sizes: Mapping[Path, int] = {}
        changed = time.monotonic()
        settled = True  # at first, since the server answers after it has written its files
        while not self._life.death():
            if self._is_all_here(self._files.whole(settled=settled)):
                return
            now = time.monotonic()
            if sizes != (sizes := self._files.sizes()):
                changed = now
            if now > deadline or (now - changed > quiet and not self._pending()):
                return
            settled = False
            time.sleep(POLL)

    def _is_all_here(self, complete: Mapping[Path, Rank]) -> bool:
        if self._files.missing(complete) or self._pending():
            return False
        return bool(self._ranks) or (bool(complete) and self._is_logged())

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
        expected = self._ranks or sorted(set(complete.values()), key=lambda rank: rank.sort_key)
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
            expected_ranks=tuple(rank.label for rank in expected),
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
            faults.append(f"no complete trace of {', '.join(missing)}{self._why_missing()}")
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

    def _why_missing(self) -> str:
        """Where ranks write into one file: versions such as 0.5.3 name it by the TP rank alone."""
        parts = [Rank.from_file_name(path.name) for path in self._files.rank_files()]
        named = {(rank.dp, rank.pp, rank.tp) for rank in parts if rank is not None}
        groups = {(rank.dp, rank.pp) for rank in self._ranks}
        if len(groups) < 2 or {(dp, pp) for dp, pp, _ in named} != {(None, None)}:
            return ""
        return (
            f" (version {self._server.sizes.version or 'unknown'} names a trace by its TP rank "
            "alone, so that ranks of several replicas or stages write over each other's)"
        )

    def _remarks(self, complete: Mapping[Path, Rank]) -> list[str]:
        remarks = []
        if not self._ranks:
            remarks.append(
                "the server does not tell its parallel sizes: its ranks are those whose files "
                f"came ({len(set(complete.values()))}), and a missing one cannot be told"
            )
        role = role_of(self._server.info)
        if role in WITHOUT_DECODE:
            remarks.append(f"{WITHOUT_DECODE[role]}: no threshold of that stage can be judged")
        if self._spec.profile_id and not any(self._profile_id in path.name for path in complete):
            remarks.append(f"the server chose a profile id itself, not {self._spec.profile_id!r}")
        if self._server.attached and self._place is not None and not self._files.rank_files():
            remarks.append(how_to_fetch(self._place, self._server.url))
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
        ranks = self._files.rank_files()
        names = {path: full_name(path.name, rank) for path, rank in ranks.items()}
        names |= {path: path.name for path in self._files.others()}
        moved = self._place.collect(names, self._folder)
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

_SAVED_TO = re.compile(r"saved to: (.*?)(?: \(with profile id: .*\))?\s*$")
_ERROR = re.compile(r"^(?:\w+\.)*\w*(?:Error|Exception)\b")
# How far each log has been read for step numbers, and the highest one so far.
_SHOWN: weakref.WeakKeyDictionary[ServerLog, tuple[LogGrowth, int | None]] = (
    weakref.WeakKeyDictionary()
)


@dataclass(frozen=True)
class ProfilerProgress:
    """Counts since the window was opened. begun, ended: place of a rank -> how often.

    strangers: ids of other profiles that began meanwhile. batches: number of forward passes in
    the log, which has every prefill and every n-th decode, of some ranks only. most_decoding:
    requests of the largest decode batch there. decodes_begun: whether a rank began a window of
    decode steps.
    """

    begun: Counter[PlaceOfRank]
    ended: Counter[PlaceOfRank]
    strangers: tuple[str, ...]
    batches: int
    most_decoding: int = 0
    decodes_begun: bool = False

    def pending(self) -> list[PlaceOfRank]:
        """Ranks that began more often than they ended."""
        return sorted(where for where, times in self.begun.items() if times > self.ended[where])


class ProgressReader:
    """Follows one window in the log from byte `start` on, reading each byte once.

    folder: of this window alone, as the server spells it; "" if only the id tells its files. A
    window is ours by that, too, since servers that take no id (`takes_id`) log their own, or
    none.
    """

    def __init__(self, log: ServerLog, start: int, profile_id: str) -> None:
        self._log = log
        self._growth = LogGrowth(log.path, start)
        self._entries = EntryReader()
        self.folder = ""
        self.reads_batches = False  # for `most_decoding`
        self._profile_id = profile_id
        self._begun: Counter[PlaceOfRank] = Counter()
        self._ended: Counter[PlaceOfRank] = Counter()
        self._strangers: dict[str, None] = {}
        self._batches = self._most_decoding = 0
        self._decodes_begun = False

    def read(self) -> ProfilerProgress:
        """The counts up to the present end of the log."""
        for entry in self._entries.read(self._log.new(self._growth)):
            self._take(entry)
        strangers = tuple(self._strangers)
        return ProfilerProgress(
            Counter(self._begun),
            Counter(self._ended),
            strangers,
            self._batches,
            self._most_decoding,
            self._decodes_begun,
        )

    def _take(self, entry: Entry) -> None:
        where = place(entry.rank or Rank(tp=0))
        if entry.kind == "profile_start":
            saved_to = _SAVED_TO.search(entry.text)
            if self._is_ours(entry.profile_id, saved_to[1] if saved_to else ""):
                self._begun[where] += 1
                self._decodes_begun |= entry.text.startswith(" for DECODE")
            else:
                self._strangers[entry.profile_id or (saved_to[1] if saved_to else "?")] = None
        elif entry.kind == "profile_end":
            self._ended[where] += 1
        elif entry.is_batch:
            self._batches += 1
            if self.reads_batches and entry.kind == "decode":
                self._most_decoding = max(self._most_decoding, read_batch(entry).running or 0)

    def _is_ours(self, profile_id: str | None, folder: str) -> bool:
        # A log is read without its secrets, one of which may be a word of an id or a path.
        if profile_id == redact_text(self._profile_id):
            return True
        if not folder:  # it names neither: what has begun since is what was asked for
            return profile_id is None
        ours = redact_text(self.folder)
        return bool(ours) and PurePosixPath(folder) == PurePosixPath(ours)


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
