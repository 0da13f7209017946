"""Fixtures that tests of several areas share."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

# Before numpy is loaded, here and in what tests start: its threads wait for each other in
# small products, which costs several times the work itself where workers share the cores.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

from pytest_sglprof import redact

pytest_plugins = ["pytester"]


def pytest_configure() -> None:
    """Ctrl-C works in what tests start, though a shell's background jobs ignore it."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def secrets_end_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """What this test makes a secret is none in the next."""
    monkeypatch.setattr(redact, "_known", redact._Known())


PROJECT_ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def project_root() -> Path:
    """The folder that holds pyproject.toml."""
    return PROJECT_ROOT


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real traces, reports and logs: `$SGLPROF_SHARED/data`, else `../shared/data`."""
    override = os.environ.get("SGLPROF_SHARED", "")
    shared = Path(override) if override else PROJECT_ROOT.parent / "shared"
    data = shared / "data"
    if not data.is_dir():
        origin = "$SGLPROF_SHARED" if override else "../shared beside the project"
        pytest.skip(f"no real data: {data.name} is not a folder in {origin}")
    return data
