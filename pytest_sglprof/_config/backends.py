"""`BACKENDS`: one row for each way to record a window. All other modules read these rows."""

from __future__ import annotations

from collections.abc import Iterable
from importlib import import_module
from typing import TYPE_CHECKING, Literal, NamedTuple, cast

if TYPE_CHECKING:
    from pytest_sglprof._capture.recording import Artifact, RecordingType


Backend = Literal["torch", "nsys"]  # the name of a row


class CaptureBackend(NamedTuple):
    """One way to record a window.

    recording: what makes its recordings, ``module:name``, imported when a window is made.
    default_steps: steps of a marked window without an end. default_seconds: duration of any
    other window without an end. needs_session: the server has to run under ``nsys profile``.
    is_per_node: it records only the ranks of one node. kinds: kinds of its artifacts, the one
    to read first. abort_seconds: time limit for ending a window whose data nobody wants.
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
        """What makes its recordings."""
        module, _, name = self.recording.partition(":")
        return cast("RecordingType", getattr(import_module(module), name))


_ROWS = (
    CaptureBackend(
        "torch",
        "pytest_sglprof._capture.torch:TorchRecording",
        default_steps=100,
        default_seconds=None,
        needs_session=False,
        is_per_node=False,
        kinds=("torch",),
        abort_seconds=15.0,
    ),
    CaptureBackend(
        "nsys",
        "pytest_sglprof._capture.nsys:nsys_recording",
        default_steps=None,
        default_seconds=5.0,
        needs_session=True,
        is_per_node=True,
        kinds=("sqlite", "parquet", "nsys-rep"),  # an export has the data of its report
        abort_seconds=30.0,  # nsys writes its report before that can be deleted
    ),
)
BACKENDS = {row.name: row for row in _ROWS}


def readable(artifacts: Iterable[Artifact]) -> list[Artifact]:
    """The artifacts of one window to read: of several kinds with the same data, the first kind."""
    by_kind: dict[str, list[Artifact]] = {}
    for artifact in artifacts:
        by_kind.setdefault(artifact.kind, []).append(artifact)
    kinds = [kind for row in _ROWS for kind in row.kinds]
    return next((by_kind[kind] for kind in kinds if kind in by_kind), [])
