"""`BACKENDS`: the ways to record a window, a row each; every other module reads these rows."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from importlib import import_module
from typing import TYPE_CHECKING, NamedTuple, Protocol, cast

from pytest_sglprof._config.model import Artifact, Backend, WindowCapture

if TYPE_CHECKING:
    from pathlib import Path

    from pytest_sglprof._capture.recording import LifeWatch
    from pytest_sglprof._config.model import WindowSpec
    from pytest_sglprof._server.launch import Server

Progress = Callable[[str], None]


class Recording(Protocol):
    """One recording of one window. Every `deadline` is a time of `time.monotonic`."""

    def refuse(self) -> None:
        """Raises `WindowRefused` for what would break the server or the data."""

    def start(self, deadline: float) -> None:
        """Starts to record, or raises."""

    def is_done(self) -> bool:
        """True when the asked-for steps have ended by themselves."""

    def stop(
        self, capture: WindowCapture, deadline: float, *, unfinished: str | None
    ) -> WindowCapture:
        """Ends the recording; `capture` with what it left, never an error for what is missing.

        unfinished: why the window closes before its steps are over (None when it does not).
        """

    def abort(self) -> None:
        """Ends a recording whose data nobody wants, quickly and without raising."""


class RecordingType(Protocol):
    """How a recording is made; nothing is asked of the server yet."""

    def __call__(
        self,
        server: Server,
        spec: WindowSpec,
        *,
        window_id: str,
        folder: Path,
        life: LifeWatch,
        progress: Progress | None = None,
    ) -> Recording: ...


class CaptureBackend(NamedTuple):
    """One way to record a window.

    recording: its class, ``module:name``, imported when a window is made. default_steps: of a
    marked window that names no end; default_seconds: of any window that names none.
    needs_session: the server has to live under ``nsys profile``. is_per_node: it records the
    ranks of its own node only. kinds: of the artifacts that it leaves, the one to read first.
    abort_seconds: s for a window that is given up.
    """

    name: Backend
    recording: str
    default_steps: int | None
    default_seconds: float | None
    needs_session: bool
    is_per_node: bool
    kinds: tuple[str, ...]
    abort_seconds: float

    def load(self) -> RecordingType:
        """The class of its recordings."""
        module, _, name = self.recording.partition(":")
        return cast("RecordingType", getattr(import_module(module), name))


_ROWS = (
    CaptureBackend(
        "torch",
        "pytest_sglprof._capture.torch:TorchRecording",
        default_steps=50,
        default_seconds=None,
        needs_session=False,
        is_per_node=False,
        kinds=("torch",),
        abort_seconds=15.0,
    ),
    CaptureBackend(
        "nsys",
        "pytest_sglprof._capture.nsys:NsysRecording",
        default_steps=None,
        default_seconds=5.0,
        needs_session=True,
        is_per_node=True,
        kinds=("sqlite", "parquet", "nsys-rep"),  # an export holds the same as its report
        abort_seconds=30.0,  # it has a report to write before that can be dropped
    ),
)
BACKENDS = {row.name: row for row in _ROWS}


def readable(artifacts: Iterable[Artifact]) -> list[Artifact]:
    """Those of one window that hold all of its data; others hold the same once more."""
    by_kind: dict[str, list[Artifact]] = {}
    for artifact in artifacts:
        by_kind.setdefault(artifact.kind, []).append(artifact)
    kinds = [kind for row in _ROWS for kind in row.kinds]
    return next((by_kind[kind] for kind in kinds if kind in by_kind), [])
