"""What a window needs of a server, and what each way of recording gives back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

from pytest_sglprof.errors import ServerDied
from pytest_sglprof.nsys import NsysSession
from pytest_sglprof.ranks import Rank
from pytest_sglprof.server.client import SglangClient
from pytest_sglprof.server.log import ServerLog
from pytest_sglprof.server.sizes import ServerSizes
from pytest_sglprof.values import Artifact, Backend, ServerSpec

Progress = Callable[[str], None]
State = Literal["complete", "incomplete", "failed"]


class WindowServer(Protocol):
    """The part of a running server that a profile window uses."""

    @property
    def spec(self) -> ServerSpec:
        """How it was started."""
        ...

    @property
    def kind(self) -> str:
        """ "sglang" or "standin"."""
        ...

    @property
    def url(self) -> str:
        """Its address."""
        ...

    @property
    def folder(self) -> Path:
        """Where its log and temporary files are (on this machine)."""
        ...

    @property
    def client(self) -> SglangClient:
        """Speaks its HTTP endpoints."""
        ...

    @property
    def log(self) -> ServerLog | None:
        """Its log; None for a server that somebody else started."""
        ...

    @property
    def info(self) -> Mapping[str, Any]:
        """`/server_info`, redacted."""
        ...

    @property
    def sizes(self) -> ServerSizes:
        """How it is divided into ranks."""
        ...

    @property
    def nsys(self) -> NsysSession | None:
        """The nsys session around it, if there is one."""
        ...

    @property
    def attached(self) -> bool:
        """True when somebody else started it."""
        ...

    @property
    def server_dir(self) -> tuple[str, str] | None:
        """One folder as the attached server and as this machine name it."""
        ...

    @property
    def trace_root(self) -> Path:
        """Folder below which torch windows are written."""
        ...

    def is_alive(self) -> bool:
        """False once it has ended."""
        ...

    def exit_reason(self) -> ServerDied | None:
        """Why it ended; None while it lives."""
        ...

    def scheduler_ranks(self) -> Mapping[int, Rank]:
        """pid -> rank, from the live command lines."""
        ...

    def window_lock(self) -> AbstractContextManager[None]:
        """Excludes every other window of this server; `LeaseError` when one is open."""
        ...

    def announce_window(self, backend: Backend | None) -> None:
        """Says that a window is open, so that a teardown closes it first."""
        ...


@dataclass(frozen=True)
class Outcome:
    """What one recording left behind; the fields are those of `WindowCapture`.

    still_open: the profiler could not be stopped, so a teardown has to try again.
    """

    state: State
    reason: str = ""
    artifacts: tuple[Artifact, ...] = ()
    missing_ranks: tuple[str, ...] = ()
    pid_ranks: Mapping[int, str] = field(default_factory=dict)
    gpu_ranks: Mapping[int, str] = field(default_factory=dict)
    log: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    still_open: bool = False


class Recording(Protocol):
    """One way to record a window. Every `deadline` is a time of `time.monotonic`."""

    def refuse(self) -> None:
        """Raises `WindowRefused` for what would break the server or the data."""

    def start(self, deadline: float) -> None:
        """Starts to record, or raises."""

    def is_done(self) -> bool:
        """True when the asked-for steps have ended by themselves."""

    def stop(self, deadline: float, *, unfinished: str) -> Outcome:
        """Ends the recording and collects it; never raises for what is merely missing.

        unfinished: why the window closes before its steps are over ("" when it does not).
        """

    def abort(self) -> None:
        """Ends a recording whose data nobody wants, quickly and without raising."""
