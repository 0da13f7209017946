"""One run: its folder, the journal of its tests, and the document that is made of it.

Every record is appended to `journal.jsonl` as soon as its test ended, so that a killed run
loses only the test that was running; `finish` writes `results.json` and removes the journal.
"""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import json
import os
import secrets
import shutil
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from pytest_sglprof.files import safe_name

RUN_PREFIX = "run-"
PAGE = "report.html"


def new_run_id() -> str:
    """`run-20261124-031351-3f9a`: sorts by time, unique on a shared disk."""
    return f"{RUN_PREFIX}{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}-{secrets.token_hex(2)}"


class RunFolder:
    """Where one process of a run puts its servers and windows. worker: "" or "gw0"."""

    def __init__(self, output: Path, run_id: str, *, worker: str = "") -> None:
        self.path = output / run_id
        self.run_id = run_id
        self.worker = worker
        self._numbers: dict[str, Iterator[int]] = {}

    def server(self, key: str) -> Path:
        """A new folder for one server life."""
        return self._new("servers", safe_name(key, limit=60))

    def window(self, name: str, nodeid: str) -> Path:
        """A new folder for one window; its name is the window's id."""
        return self._new("windows", safe_name(f"{nodeid}-{name}"))

    def load(self, nodeid: str) -> Path:
        """A new folder for what the load driver writes."""
        return self._new("loads", safe_name(nodeid))

    def _new(self, kind: str, name: str) -> Path:
        stem = f"{self.worker}-{name}" if self.worker else name
        numbers = self._numbers.setdefault(f"{kind}/{stem}", itertools.count(1))
        folder = self.path / kind / f"{stem}.{next(numbers)}"
        folder.mkdir(parents=True)
        return folder


class RunBook:
    """All records of a run, kept by the process that reports (the controller under xdist).

    results: the document of the run, once it is finished; every view is made of it.
    page: where its HTML page is; None without a window.
    """

    def __init__(self, output: Path, run_id: str, facts: Mapping[str, Any]) -> None:
        self.folder = output / run_id
        self.run_id = run_id
        self.records: list[dict[str, Any]] = []
        self._facts = dict(facts)
        self._started = time.time()
        self.results: dict[str, Any] = {}
        self.page: Path | None = None
        self._journal: IO[str] | None = None
        self._lock: int | None = None  # of the folder itself, so that no file is left

    def open(self) -> None:
        """Makes the folder and marks it as in use, so that no other run prunes it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = os.open(self.folder, os.O_RDONLY | os.O_CLOEXEC)
        fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        self._journal = (self.folder / "journal.jsonl").open("a", encoding="utf-8")

    def add(self, record: dict[str, Any]) -> None:
        """Keeps one attempt of one test (plain data, as it travelled with its report)."""
        self.records.append(record)
        if self._journal is not None:
            self._journal.write(json.dumps(record) + "\n")
            self._journal.flush()

    def _document(self, exit_status: int) -> dict[str, Any]:
        """The run as the one JSON document that every view is made of."""
        from pytest_sglprof.report.results import run_document

        run = {**self._facts, "id": self.run_id, "started": self._started, "ended": time.time()}
        run["exit_status"] = exit_status
        records = self.records
        run["versions"] = {**run["versions"], **_server_versions(records)}
        servers = {(s["log"], s["url"]): s for record in records for s in record["servers"]}
        return run_document(
            run,
            [record["attempt"] for record in records],
            [window for record in records for window in record["windows"]],
            list(servers.values()),
            [load for record in records for load in record["loads"]],
        )

    def finish(self, exit_status: int) -> Path | None:
        """Writes `results.json`; a run without records leaves no folder. Returns its path."""
        if self._journal is None:
            return None
        results = self.folder / "results.json"
        try:
            if self.records:
                from pytest_sglprof.report.results import write_results

                self.results = self._document(exit_status)
                write_results(self.results, results)
                self._write_page()
                _point_latest(self.folder)
        finally:
            self._journal.close()
            self._journal = None
            self._release()
        (self.folder / "journal.jsonl").unlink(missing_ok=True)  # kept where writing failed
        if self.records:
            return results
        _remove_if_bare(self.folder)
        return None

    def _write_page(self) -> None:
        from pytest_sglprof.report.html import write_page

        if self.results["windows"]:
            write_page([self.results], [self.folder], self.folder / PAGE)
            self.page = self.folder / PAGE

    def _release(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def _server_versions(records: list[dict[str, Any]]) -> dict[str, str]:
    """Versions of SGLang and nsys that the run's servers told; the stand-in is no SGLang."""
    servers = [server for record in records for server in record["servers"]]
    sglang = {str(s["version"]) for s in servers if not s["standin"]}
    nsys = {str(s["nsys"]) for s in servers if s["nsys"]}
    return {"sglang": ", ".join(sorted(sglang)), "nsys": ", ".join(sorted(nsys))}


def prune(output: Path, *, keep_runs: int, keep_bytes: int) -> list[str]:
    """Removes the oldest finished runs beyond `keep_runs` or `keep_bytes`; names them."""
    runs = sorted(path for path in output.glob(f"{RUN_PREFIX}*") if path.is_dir())
    sizes = {path: _size(path) for path in runs}
    removed = []
    for path in runs[:-1]:
        too_many = len(sizes) > keep_runs
        too_large = sum(sizes.values()) > keep_bytes
        if not (too_many or too_large):
            break
        if _in_use(path):
            continue
        shutil.rmtree(path, ignore_errors=True)
        del sizes[path]
        removed.append(path.name)
    return removed


def _in_use(folder: Path) -> bool:
    handle = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(handle)
    return False


def _size(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(OSError):
            total += path.lstat().st_size
    return total


def _point_latest(folder: Path) -> None:
    link = folder.parent / "latest"
    temporary = folder.parent / f".latest.{os.getpid()}"
    with contextlib.suppress(OSError):  # a disk without symlinks: the run is there all the same
        temporary.unlink(missing_ok=True)
        temporary.symlink_to(folder.name)
        temporary.replace(link)


def _remove_if_bare(folder: Path) -> None:
    with contextlib.suppress(OSError):
        folder.rmdir()
    with contextlib.suppress(OSError):
        folder.parent.rmdir()
