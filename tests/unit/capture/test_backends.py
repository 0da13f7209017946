"""The table of backends: every name has a row, and every row a recording."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import pytest

from pytest_sglprof._capture.nsys import NodesRecording, NsysRecording
from pytest_sglprof._capture.recording import Artifact, Recording
from pytest_sglprof._capture.torch import TorchRecording
from pytest_sglprof._config.backends import BACKENDS, readable
from pytest_sglprof._config.model import Backend


def test_every_backend_that_a_window_can_name_has_a_row():
    assert tuple(BACKENDS) == get_args(Backend)
    kinds = [kind for row in BACKENDS.values() for kind in row.kinds]
    assert len(set(kinds)) == len(kinds), "a kind tells which backend left the file"


@pytest.mark.parametrize("row", BACKENDS.values(), ids=BACKENDS)
def test_a_row_names_a_recording_and_one_way_to_end(row):
    steps = [name for name in vars(Recording) if not name.startswith("_")]
    made = {"torch": [TorchRecording], "nsys": [NsysRecording, NodesRecording]}[row.name]
    assert all(callable(getattr(kind, name)) for kind in made for name in steps)
    assert callable(row.load())
    assert (row.default_steps is None) != (row.default_seconds is None)


def test_an_export_is_read_instead_of_its_report():
    def files(*names: str) -> list[Artifact]:
        return [Artifact(Path(name), name.partition(".")[2]) for name in names]

    assert readable(files("w.nsys-rep", "w.sqlite")) == files("w.sqlite")
    assert readable(files("w.nsys-rep")) == files("w.nsys-rep")
    assert readable(files("a.torch", "b.torch")) == files("a.torch", "b.torch")
    assert readable(()) == []
