"""`BACKENDS`: the ways to record a window, a row each; every other module reads these rows."""

from __future__ import annotations

from collections.abc import Iterable
from importlib import import_module
from typing import TYPE_CHECKING, NamedTuple, cast

from pytest_sglprof._config.model import Backend

if TYPE_CHECKING:
    from pytest_sglprof._capture.recording import Artifact, RecordingType


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
