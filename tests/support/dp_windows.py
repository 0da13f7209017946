"""Planted windows of DP attention, as the traces and settings that a server leaves."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from pytest_sglprof._trace.beside import SERVER_INFO, with_files_beside
from pytest_sglprof._trace.read import read_window
from pytest_sglprof._trace.table import KernelTable
from pytest_sglprof.standin.dp_model import CASES, DpWindow, make
from pytest_sglprof.standin.dp_traces import server_info, write_traces

CASE = {case.name: case for case in CASES}


def planted(name: str, ranks: int, *, sd: float = 0.02, **changed: Any) -> DpWindow:
    """A window of a case; the rank that it is about is 1."""
    plan = CASE[name].make(ranks, 1, sd, 0.6)
    return make(replace(plan, **{"passes": 60, "layers": 2, **changed}))


def written(window: DpWindow, folder: Path) -> Path:
    """The folder of the window's traces and of what its server says of itself."""
    folder.mkdir(parents=True, exist_ok=True)
    write_traces(window, folder)
    (folder / SERVER_INFO).write_text(json.dumps(server_info(window)))
    return folder


def read_back(window: DpWindow, folder: Path) -> KernelTable:
    """The table that a command makes of the window's files."""
    return with_files_beside(read_window(written(window, folder)), [folder])
