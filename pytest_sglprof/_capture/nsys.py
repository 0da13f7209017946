"""`NsysRecording`: a window through ``nsys start`` and ``nsys stop`` on a named session.

One report holds every rank of the node, but identifies processes and devices, not ranks. The
rank of each process is read from the live command lines while the window is open.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, wait
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pytest_sglprof._capture.recording import (
    POLL,
    Artifact,
    LifeWatch,
    Progress,
    Recording,
    WindowCapture,
    in_thread,
)
from pytest_sglprof._config.backends import BACKENDS
from pytest_sglprof._config.model import WindowSpec
from pytest_sglprof._errors import (
    NsysError,
    ServerDied,
    ServerError,
    ServerRefused,
    SglprofError,
    WindowError,
    WindowRefused,
)
from pytest_sglprof._files import safe_name
from pytest_sglprof._nsys import COLLECTING, GONE, IDLE, NsysSession
from pytest_sglprof._nsys_export import export
from pytest_sglprof._server.command import LAUNCHERS
from pytest_sglprof._server.nodes import Node, NodeSession
from pytest_sglprof._trace.nsys.ranks import ReportRanks, write_ranks

if TYPE_CHECKING:
    from pytest_sglprof._server.launch import Server

FRESH = "DelayedCollection"  # state of a session that has had no window yet
RANGE = "cudaProfilerApi"
EXPORT_FLOOR = 60.0  # s that an export gets at least, even past the deadline
LAST_WORDS = 10.0  # s that nsys gets to write the report of a server that died
ONE_DEVICE = "SGLANG_ONE_VISIBLE_DEVICE_PER_PROCESS"


def nsys_recording(
    server: Server,
    spec: WindowSpec,
    *,
    window_id: str,
    folder: Path,
    life: LifeWatch,
    progress: Progress | None = None,
) -> Recording:
    """A recording of one session, or of one on each node of the server."""
    one = partial(NsysRecording, server, spec, folder=folder, life=life, progress=progress)
    if not server.nodes:
        return one(window_id=window_id)
    return NodesRecording(
        [one(window_id=f"{window_id}.{safe_name(node.name)}", node=node) for node in server.nodes]
    )


class NsysRecording:
    """One nsys window of `server`, or of one of its nodes, with report and export in `folder`."""

    def __init__(
        self,
        server: Server,
        spec: WindowSpec,
        *,
        window_id: str,
        folder: Path,
        life: LifeWatch,
        progress: Progress | None = None,
        node: Node | None = None,
    ) -> None:
        self.node = node
        self._server = server
        self._spec = spec
        self.by_steps = spec.num_steps is not None
        self._life = life
        self._progress = progress
        self._report = folder.absolute() / f"{window_id}.nsys-rep"
        self._pid_ranks: dict[int, str] = {}
        self._notes: list[str] = []

    @property
    def _session(self) -> NsysSession:
        session = self.node.session if self.node else self._server.nsys
        if session is None:
            raise WindowRefused(
                f"an nsys window of a server that does not run under nsys ({self._server.url})",
                expected="a server that was started under `nsys profile --start-later`",
                hint="mark the test sglang_server(nsys=True); for a server that somebody else "
                "started give --sglprof-nsys-session=NAME",
            )
        return session

    @property
    def counts_steps(self) -> bool:
        """Whether it asks the server to count its steps: the first node does it for all."""
        return self.node is None or self.node.rank == 0

    def refuse(self) -> None:
        """Raises `WindowRefused` if there is no session, or steps cannot be counted."""
        self._session.name  # noqa: B018 - raises where there is none
        spec, server = self._spec, self._server
        refuse_torch_options(spec)
        if spec.num_steps is None:
            return
        if spec.num_steps < 1:
            raise WindowRefused(f"num_steps={spec.num_steps}", expected="1 or more")
        if server.sizes.is_cpu and not LAUNCHERS[server.kind].is_standin:
            raise WindowRefused(
                "an nsys window by steps on a CPU server: it marks the steps with "
                "cudaProfilerStart, which kills a server without CUDA",
                expected="a GPU server, or a duration",
                hint="give duration instead of num_steps",
            )

    def start(self, deadline: float) -> None:
        """Starts the session's next window."""
        session = self._session
        self._end_leftover(deadline)
        if self._spec.num_steps is None:
            session.start(self._report, timeout=_left(deadline))
        else:
            self._start_by_steps(session, self._spec.num_steps, deadline)
        self._map_pids()

    def _start_by_steps(self, session: NsysSession, steps: int, deadline: float) -> None:
        if session.state() == FRESH:  # the first window of a session ignores the capture range
            burnt = self._report.with_name("burnt.nsys-rep")
            session.start(burnt, timeout=_left(deadline))
            session.stop(timeout=_left(deadline)).unlink(missing_ok=True)
            self._notes.append("one window was discarded: the first of a session ignores the range")
        session.start(self._report, capture_range=RANGE, timeout=_left(deadline))
        if not self.counts_steps:
            return
        body = {"activities": ["CUDA_PROFILER"], "num_steps": steps}
        try:
            self._life.call(
                lambda left: self._server.client.start_profile(body, left),
                deadline,
                "/start_profile",
            )
        except ServerRefused as error:
            raise WindowError(
                f"the server refused to count the steps: {error.what}",
                expected="200 Start profiling.",
                hint=error.hint,
            ) from error

    def _end_leftover(self, deadline: float) -> None:
        """Ends a window that an earlier run left open; a lock rules out any other."""
        if self._session.state() in IDLE | GONE:
            return
        with contextlib.suppress(NsysError):
            self._session.stop(timeout=_left(deadline)).unlink(missing_ok=True)
        self._notes.append("the session was still collecting for an earlier window: ended first")

    def _map_pids(self) -> None:
        for pid, rank in (self.node or self._server).scheduler_ranks().items():
            self._pid_ranks.setdefault(pid, rank.label)

    def is_done(self) -> bool:
        """True once the requested steps have ended the range by themselves."""
        if self._spec.num_steps is None:
            return False
        try:
            return self._session.state() not in COLLECTING  # it may wait for `nsys stop`
        except NsysError:
            return False  # nsys is busy writing

    def stop(
        self, capture: WindowCapture, deadline: float, *, unfinished: str | None
    ) -> WindowCapture:
        """Ends the window and exports its report to SQLite, next to it; an interrupt drops both."""
        try:
            return self._stopped(capture, deadline, unfinished)
        except (KeyboardInterrupt, SystemExit):
            self.abort()
            raise

    def _stopped(
        self, capture: WindowCapture, deadline: float, unfinished: str | None
    ) -> WindowCapture:
        reason, still_open = unfinished, False
        log: tuple[str, ...] = ()
        report: Path | None = None
        death = self._life.death()
        if death is None:
            self._map_pids()
        try:
            report = self._stop(deadline) if death is None else self._last_words()
        except (NsysError, ServerError) as error:
            death = self._life.death()
            if death is None:
                reason, log = error.what, error.log
                still_open = self._collects()
            else:
                report = self._last_words()
        if death := death or self._life.death():
            reason, log = death.what, death.log
        artifacts, fault = self._export(report, deadline)
        reason = "; ".join(text for text in (reason, fault) if text)
        failed = death is not None or report is None
        return replace(
            capture,
            state="failed" if failed else "incomplete" if reason else "complete",
            reason=reason,
            artifacts=artifacts,
            pid_ranks=dict(self._pid_ranks),
            gpu_ranks=self._gpu_ranks(),
            log=log,
            notes=(*self._notes, *self._remarks()),
            is_still_open=still_open,
        )

    def _stop(self, deadline: float) -> Path:
        session = self._session
        if self._spec.num_steps is not None and self.counts_steps:
            self._life.call(self._server.client.stop_profile, deadline, "/stop_profile")
        if self._spec.num_steps is not None and session.state() in IDLE | GONE:
            return self._ended_report(deadline)
        if self._progress:
            self._progress("nsys writes the report")
        report = session.stop(timeout=_left(deadline), progress=self._progress)
        if session.remarks:
            text = "; ".join(session.remarks)
            self._notes.append(f"nsys had errors in this window, which may lack events: {text}")
        return report

    def _ended_report(self, deadline: float) -> Path:
        """The report of a range that ended by itself, once its size no longer grows."""
        size = -1
        while time.monotonic() < deadline and not self._life.death():
            now = self._session.size(self._report)
            if 0 < now == size:
                return self._session.fetch(self._report, _left(deadline))
            size = now
            time.sleep(5 * POLL)
        raise NsysError(
            f"the range of {self._spec.num_steps} steps ended, but {self._report} is not there",
            expected="the report, written when the range ends",
            hint="look for it in the temporary folder of nsys; use duration instead",
        )

    def _last_words(self) -> Path | None:
        """The report that nsys writes if its target dies in a window; None if it does not come."""
        first = (self.node or self._server).folder / "nsys"
        opened = self._life.began
        over = time.monotonic() + LAST_WORDS
        while time.monotonic() < over:
            for path in [self._report, *sorted(first.glob("*.nsys-rep"))]:
                if path.is_file() and path.stat().st_size and path.stat().st_mtime >= opened:
                    return self._moved(path)
            if self._is_gone():
                over = min(over, time.monotonic() + 1.0)
            time.sleep(POLL)
        return None

    def _moved(self, path: Path) -> Path:
        if path != self._report:
            self._report.parent.mkdir(parents=True, exist_ok=True)
            shutil.move(path, self._report)
        return self._report

    def _collects(self) -> bool:
        with contextlib.suppress(NsysError):
            return self._session.state() not in IDLE | GONE
        return True

    def _is_gone(self) -> bool:
        with contextlib.suppress(NsysError):
            return self._session.state() in GONE
        return True

    def _export(self, report: Path | None, deadline: float) -> tuple[tuple[Artifact, ...], str]:
        if report is None:
            return (), ""
        kept = Artifact(self._moved(report), "nsys-rep")
        try:
            write_ranks(kept.path, ReportRanks(self._pid_ranks, self._gpu_ranks()))
        except OSError as error:
            why = error.strerror or error
            self._notes.append(f"its ranks could not be written beside the report: {why}")
        target = self._report.with_suffix(".sqlite")
        if self._progress:
            self._progress("exporting the report")
        try:
            left = max(_left(deadline), EXPORT_FLOOR)
            session = self._session
            if isinstance(session, NodeSession):
                exported = session.export(kept.path, target, left)
            else:
                exported = export(session.tool, kept.path, "sqlite", target, left)
        except NsysError as error:
            return (kept,), f"its report cannot be exported: {error.what}"
        return (kept, Artifact(exported, "sqlite")), ""

    def _gpu_ranks(self) -> Mapping[int, str]:
        env = {**({} if self._server.attached else os.environ), **dict(self._server.spec.env)}
        if env.get(ONE_DEVICE, "").lower() in ("1", "true", "yes", "y"):
            return {}  # then every rank calls its device 0
        return self._server.sizes.gpu_ranks(self.node.rank if self.node else None)

    def _remarks(self) -> list[str]:
        sizes = self._server.sizes
        number = self.node.rank if self.node else sizes.node_rank
        here = [rank for rank in sizes.ranks() if sizes.node_of(rank) == number]
        if len(self._pid_ranks) >= len(here):
            return []
        return [
            f"the pids of {len(self._pid_ranks)} of {len(here)} ranks are known: the others are "
            "identified by their devices"
        ]

    def abort(self) -> None:
        """Ends the window and deletes its report."""
        deadline = time.monotonic() + BACKENDS["nsys"].abort_seconds
        with contextlib.suppress(NsysError, ServerError):
            if self._spec.num_steps is not None and self.counts_steps:
                self._life.call(self._server.client.stop_profile, deadline, "/stop_profile")
        with contextlib.suppress(NsysError, ServerDied, OSError):
            if self._session.state() not in IDLE | GONE:
                self._session.stop(timeout=_left(deadline)).unlink(missing_ok=True)
            self._report.unlink(missing_ok=True)


class NodesRecording:
    """One nsys window of several nodes: a session on each, started and stopped together.

    The window is open once all have said that they record. The report of each node is named after
    it; beside it stand the ranks of its processes, whose numbers other nodes use, too.
    """

    def __init__(self, parts: Sequence[NsysRecording]) -> None:
        self._parts = parts
        self._notes: tuple[str, ...] = ()

    def refuse(self) -> None:
        """As `NsysRecording.refuse`."""
        for part in self._parts:
            part.refuse()

    def start(self, deadline: float) -> None:
        """Starts all; raises the error of the first node that failed, with its name."""
        began = [time.monotonic()] * len(self._parts)

        def start(number: int) -> None:
            self._parts[number].start(deadline)
            began[number] = time.monotonic()

        # Steps are counted by the first node, once the others wait for them.
        last = [0] if self._parts[0].by_steps else []
        together = [number for number in range(len(self._parts)) if number not in last]
        for numbers in filter(None, (together, last)):
            started = [(n, in_thread("sglprof nsys start", partial(start, n))) for n in numbers]
            for number, future in started:
                self._raise_named(number, future)
        apart = max(began) - min(began)
        self._notes = (f"the {len(self._parts)} sessions of its nodes began within {apart:.2f} s",)

    def _raise_named(self, number: int, future: Future[None]) -> None:
        try:
            future.result()
        except SglprofError as error:
            node = self._parts[number].node
            error.what = f"node {node.name if node else number}: {error.what}"
            raise

    def is_done(self) -> bool:
        """True once the steps of all nodes have ended by themselves."""
        return all(part.is_done() for part in self._parts)

    def stop(
        self, capture: WindowCapture, deadline: float, *, unfinished: str | None
    ) -> WindowCapture:
        """Ends all and exports each report on its node; a node that fails is named."""
        stopping = [
            in_thread(
                "sglprof nsys stop",
                partial(part.stop, capture, deadline, unfinished=unfinished),
            )
            for part in self._parts
        ]
        ended = [self._result(future, capture) for future in stopping]
        faults = [
            f"node {part.node.name if part.node else ''}: {each.reason}"
            for part, each in zip(self._parts, ended, strict=True)
            if each.state != "complete"
        ]
        artifacts = tuple(artifact for each in ended for artifact in each.artifacts)
        state: Literal["complete", "incomplete", "failed"] = "incomplete" if faults else "complete"
        return replace(
            capture,
            state=state if artifacts else "failed",
            reason="; ".join(dict.fromkeys(faults)),
            artifacts=artifacts,
            log=tuple(line for each in ended for line in each.log),
            notes=(*self._notes, *dict.fromkeys(note for each in ended for note in each.notes)),
            is_still_open=any(each.is_still_open for each in ended),
        )

    @staticmethod
    def _result(future: Future[WindowCapture], capture: WindowCapture) -> WindowCapture:
        try:
            return future.result()
        except SglprofError as error:
            return replace(capture, state="failed", reason=error.what, log=error.log)

    def abort(self) -> None:
        """Ends all and deletes their reports."""
        wait([in_thread("sglprof nsys abort", part.abort) for part in self._parts])


def _left(deadline: float) -> float:
    return max(deadline - time.monotonic(), 1.0)


def refuse_torch_options(spec: WindowSpec) -> None:
    """Raises `WindowRefused` for options of torch windows in one of nsys."""
    by_torch = {
        "profile_by_stage": spec.profile_by_stage,
        "merge_profiles": spec.merge_profiles,
        "start_step": spec.start_step is not None,
        "activities": spec.activities is not None,
    }
    if given := [name for name, value in by_torch.items() if value]:
        raise WindowRefused(
            f"{', '.join(given)} with backend='nsys'",
            expected="options of nsys windows: num_steps, duration, delay, settle, timeout",
            hint="use backend='torch', or leave them out",
        )
