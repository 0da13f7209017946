"""Fixtures that tests of several areas share."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from tests.support import real_env
from tests.support.browser import find_chromium

# Before numpy is loaded, here and in what tests start: its threads wait for each other in
# small products, which costs several times the work itself where workers share the cores.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
# What tests start keeps its bytecode, as on the machine of a user: 2 s of CPU for each pytest.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

from pytest_sglprof import _redact as redact

pytest_plugins = ["pytester"]


def pytest_configure(config: pytest.Config) -> None:
    """Ctrl-C works in what tests start, though a shell's background jobs ignore it."""
    # With --dist loadfile, files keep the order that pytest_collection_modifyitems gives them.
    config.option.loadscopereorder = False
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _asked_for_end_to_end() -> None:
    if os.environ.get("SGLPROF_END_TO_END", "") in ("", "0"):
        pytest.skip("it takes minutes; .ci/run does it: SGLPROF_END_TO_END=1")


REAL: Mapping[str, Callable[[], object]] = {
    "end_to_end": _asked_for_end_to_end,
    "real_server": real_env.real_sglang,
    "real_nsys": real_env.real_nsys,
    "browser": find_chromium,
}
STARTS_SERVERS = {"make_project", "project", "lease_folder"}  # fixtures


@pytest.hookimpl(trylast=True)  # after -k and -m have chosen
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """A file says once what the machine lacks for its tests.

    Files that start servers, which mostly wait, are mixed with files that compute, so that both
    cores have work; but not at the end: a file goes to one worker, and a long one at the end
    would leave the others idle.
    """
    unmet = {marker: reason for marker, find in REAL.items() if (reason := _why_missing(find))}
    waiting: dict[tuple[Path, str], list[pytest.Item]] = {}
    for item in items:
        marker = next(filter(item.get_closest_marker, unmet), None)
        if marker is not None:
            waiting.setdefault((item.path, unmet[marker]), []).append(item)
    for (_, reason), (first, *others) in waiting.items():
        more = f"; {len(others)} more tests of this file wait for it" if others else ""
        first.add_marker(pytest.mark.skip(reason=reason + more))
        config.hook.pytest_deselected(items=others)
        for other in others:
            items.remove(other)
    long_files = {item.path for item in items if STARTS_SERVERS.intersection(_fixtures(item))}
    short_files = {item.path for item in items} - long_files
    turn = {
        path: share * number / len(files)
        for files, share in ((long_files, 0.75), (short_files, 1.0))
        for number, path in enumerate(sorted(files, key=_mixed))
    }
    items.sort(key=lambda item: (turn[item.path], item.path))


def _mixed(path: Path) -> int:
    """A key that sorts files in an order without a pattern, the same in every worker and run."""
    return zlib.crc32("/".join(path.parts[-3:]).encode())


def _fixtures(item: pytest.Item) -> tuple[str, ...]:
    return tuple(getattr(item, "fixturenames", ()))


def _why_missing(find: Callable[[], object]) -> str | None:
    try:
        find()
    except pytest.skip.Exception as missing:
        return str(missing)
    except pytest.fail.Exception:  # SGLPROF_REQUIRE_REAL: each of its tests is to fail
        pass
    return None


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


@pytest.fixture(scope="session")
def cases(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The inputs after public reports of ../shared/cases/traces, made anew."""
    maker = shared_data.parent / "cases" / "traces" / "make.py"
    if not maker.is_file():
        pytest.skip("no cases/traces/make.py beside the real data")
    folder = tmp_path_factory.mktemp("cases")
    subprocess.run([sys.executable, maker], cwd=folder, check=True, capture_output=True)
    return folder
