"""One run: its folder, the journal of its tests, and its results.

A record is appended to `journal.jsonl` as soon as its test ends, so that a run that is killed
loses only the current test; `finish` writes `results.json` and removes the journal. A file that
cannot be written is listed in `RunBook.problems` and never ends the run.
"""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import json
import os
import platform
import secrets
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from pytest_sglprof import __version__
from pytest_sglprof import _process as process
from pytest_sglprof._errors import SettingsError, SglprofError
from pytest_sglprof._files import (
    JOURNAL,
    RESULTS,
    RUN_FILE,
    atomic_write,
    safe_name,
    unwritten,
)
from pytest_sglprof._redact import redact, redact_command, redact_text
from pytest_sglprof._report.model import utc
from pytest_sglprof._server.journal import StartedTest, forget_test, note_test

if TYPE_CHECKING:
    from pytest_sglprof._baselines.records import LifeRecord
    from pytest_sglprof._config.load import Settings
    from pytest_sglprof._report.model import Record, Results


PAGE = "report.html"
LATEST = "latest"


def new_run_id() -> str:
    """`run-20261124-031351-3f9a`: sorts by time, unique on a shared disk."""
    return f"{RUN_PREFIX}{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}-{secrets.token_hex(2)}"


def run_facts(command: Sequence[str], settings: Settings) -> dict[str, Any]:
    """The part of `Run` that is known from the start: command, host, versions."""
    return {
        "command": tuple(redact_command(command)),
        "host": platform.node(),
        "versions": {
            "pytest_sglprof": __version__,
            "python": platform.python_version(),
            "pytest": metadata.version("pytest"),
            "pandas": metadata.version("pandas"),
            "sglang": "",
            "nsys": "",
        },
        "min_steps": settings.min_steps,
    }


class RunFolder:
    """Where one process of a run puts its servers, windows and loads. worker: "" or "gw0"."""

    def __init__(self, output: Path, run_id: str, *, worker: str = "") -> None:
        self.path = output / run_id
        self.run_id = run_id
        self.worker = worker
        self._numbers: dict[str, Iterator[int]] = {}

    def server(self, key: str) -> Path:
        """A new folder for one server life."""
        return self._new("servers", safe_name(key, limit=60))

    def window(self, name: str, nodeid: str) -> Path:
        """A new folder for one window. Its name is the id of the window."""
        text = nodeid if nodeid.endswith(f"::{name}") else f"{nodeid}-{name}"
        return self._new("windows", safe_name(redact_text(text)))

    def load(self, nodeid: str) -> Path:
        """A new folder for the files of the load driver."""
        return self._new("loads", safe_name(redact_text(nodeid)))

    def note_test(self, nodeid: str, number: int) -> None:
        """Writes into run.json that an attempt of a test has begun. Raises OSError."""
        test = StartedTest(
            nodeid=redact_text(nodeid), number=number, worker=self.worker, began=time.time()
        )
        note_test(self.path, test)

    def _new(self, kind: str, name: str) -> Path:
        stem = f"{self.worker}-{name}" if self.worker else name
        numbers = self._numbers.setdefault(f"{kind}/{stem}", itertools.count(1))
        folder = self.path / kind / f"{stem}.{next(numbers)}"
        try:
            folder.mkdir(parents=True)
        except OSError as error:
            raise SglprofError(
                f"{folder} cannot be created: {error.strerror or error}",
                expected="a folder for results on a disk with free space",
                hint="free space there, or choose another folder with --sglprof-output",
            ) from error
        return folder


class RunBook:
    """The records of a run, in the process that reports (the controller of xdist).

    results: the results of the run, None until it is finished. file, page: results.json and
    the HTML page, None until they are written. problems: one line for each file that could not
    be written. lives: what the tests left of their server lives, once it is finished. notes:
    further lines for the summary. is_alone: the folder is one that a user chose, beside which
    nothing is written, not one of the runs of an output folder.
    """

    def __init__(
        self,
        output: Path,
        run_id: str,
        facts: Mapping[str, Any],
        settings: Mapping[str, Any] | None = None,
        *,
        is_alone: bool = False,
    ) -> None:
        self.folder = output / run_id
        self.run_id = run_id
        self.results: Results | None = None
        self.file: Path | None = None
        self.page: Path | None = None
        self.problems: list[str] = []
        self.notes: list[str] = []
        self.lives: list[LifeRecord] = []
        self._facts = dict(facts)
        self._settings = settings
        self._is_alone = is_alone
        self._started = time.time()
        self._journal: Journal | None = None
        self._lock: int | None = None  # descriptor of the folder: a lock file would remain
        self._made_output = False

    def open(self) -> None:
        """Creates the folder and locks it, so that no other run removes it.

        Raises `SettingsError` if results cannot be written there.
        """
        output = self.folder.parent
        self._made_output = not os.path.lexists(output)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            # Before run.json exists: until then no other run takes this for the folder of a run.
            self._lock = os.open(self.folder, os.O_RDONLY | os.O_CLOEXEC)
            with contextlib.suppress(OSError):  # without locks, other runs cannot remove it
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._write_run_file()
            self._journal = Journal(self.folder / JOURNAL)
        except OSError as error:
            self._release()
            self._remove_if_bare()
            raise SettingsError(
                f"results cannot be written into {output}: {error.strerror or error}",
                expected="a folder that can be written, or the name of a new one",
                hint="choose another one with --sglprof-output",
            ) from error

    def add(self, record: Record) -> None:
        """Adds the record of one attempt of one test, or of stopped servers."""
        if self._journal is not None and (record.attempt or record.servers):
            with self.writing(JOURNAL):
                self._journal.add(record)
            if (attempt := record.attempt) is not None:
                with self.writing(RUN_FILE):
                    forget_test(self.folder, redact_text(attempt.nodeid), attempt.number)

    def finish(self, exit_status: int) -> Path | None:
        """Writes `results.json` and the page; removes the folder of a run without records.

        Returns the path of results.json. If that cannot be written, the journal stays.
        """
        if self._journal is None:
            return None
        try:
            if self._journal.count:
                self._write(self._journal, exit_status)
        finally:
            self._journal.close()
            bare = not self._journal.count
            self._journal = None
            self._release()
        if bare:
            with contextlib.suppress(OSError):
                (self.folder / JOURNAL).unlink()
            self._remove_if_bare()
        return self.file

    @contextlib.contextmanager
    def writing(self, name: str) -> Iterator[None]:
        """Turns an exception of the block into a problem, so that the run continues."""
        try:
            yield
        except Exception as error:
            self.add_problem(name, error)

    def add_problem(self, name: str, error: Exception) -> None:
        """Notes that the file `name` could not be written; equal lines only once."""
        self.add_lines([unwritten(name, error)])

    def add_lines(self, problems: Iterable[str]) -> None:
        """Adds problems that are not listed yet."""
        self.problems.extend(each for each in dict.fromkeys(problems) if each not in self.problems)

    def _write(self, journal: Journal, exit_status: int) -> None:
        from pytest_sglprof._report.results import write_results

        file = self.folder / RESULTS
        if not self._is_alone:
            self._write_beside(journal)
        with self.writing(str(file)):
            self.results = self._document(list(journal.records()), exit_status)
            self._write_run_file()  # the folder may have been removed meanwhile
            write_results(self.results, file)
            self.file = file
        if self.file is None:
            refused = f", without {journal.refused} that the disk refused" * bool(journal.refused)
            place = self.folder / JOURNAL
            self.problems.append(f"the records of its tests stay in {place}{refused}")
        else:
            if not self._is_alone:
                _point_latest(self.folder)
            with contextlib.suppress(OSError):
                (self.folder / JOURNAL).unlink()
        with self.writing(str(self.folder / PAGE)):
            self._write_page()

    def _write_beside(self, journal: Journal) -> None:
        if self._made_output:  # as pytest does in its cache: nobody commits it by mistake
            with self.writing(".gitignore"):
                (self.folder.parent / ".gitignore").write_text("*\n", encoding="utf-8")
        with self.writing("history of server lives"):
            self._write_history(journal)

    def _write_history(self, journal: Journal) -> None:
        """A file of its own, which stays when this run is removed."""
        from pytest_sglprof._baselines.history import append_run

        self.lives = [life for record in journal.records() for life in record.lives]
        append_run(self.folder.parent, self.run_id, self.lives)

    def _document(self, records: Sequence[Record], exit_status: int) -> Results:
        """The results of the run, from which every view is made."""
        from pytest_sglprof._report.model import Run
        from pytest_sglprof._report.results import run_document

        facts = dict(self._facts)
        versions = {**facts.pop("versions"), **server_versions(records)}
        run = Run(
            id=self.run_id,
            started=utc(self._started),
            ended=utc(time.time()),
            exit_status=exit_status,
            versions=versions,
            **facts,
        )
        servers = {(s.log, s.url): s for record in records for s in record.servers}
        return run_document(
            run,
            [record.attempt for record in records if record.attempt is not None],
            [window for record in records for window in record.windows],
            list(servers.values()),
            [load for record in records for load in record.loads],
        )

    def _write_page(self) -> None:
        from pytest_sglprof._report.page.page import write_page

        if self.results is not None and self.results.windows:
            write_page([self.results], [self.folder], self.folder / PAGE)
            self.page = self.folder / PAGE

    def _write_run_file(self) -> None:
        if not (self.folder / RUN_FILE).exists():
            write_run_file(
                self.folder,
                started=self._started,
                version=self._facts["versions"]["pytest_sglprof"],
                settings=self._settings,
                facts=self._facts,
            )

    def _release(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _remove_if_bare(self) -> None:
        """Removes the folder if only run.json is in it, and the output folder if it is new."""
        with contextlib.suppress(OSError):
            if list(self.folder.iterdir()) == [self.folder / RUN_FILE]:
                (self.folder / RUN_FILE).unlink()
            self.folder.rmdir()
        if self._made_output:
            with contextlib.suppress(OSError):
                self.folder.parent.rmdir()


def server_versions(records: Sequence[Record]) -> dict[str, str]:
    """Versions of SGLang and nsys of the run's servers, without stand-ins."""
    servers = [server for record in records for server in record.servers]
    sglang = {server.version for server in servers if not server.standin}
    nsys = {server.nsys for server in servers if server.nsys}
    return {"sglang": ", ".join(sorted(sglang)), "nsys": ", ".join(sorted(nsys))}


def _point_latest(folder: Path) -> None:
    """Points the link `latest` at the run, unless that name is taken by something else."""
    link = folder.parent / LATEST
    temporary = folder.parent / f".{LATEST}.{folder.name}"
    with contextlib.suppress(OSError):  # a disk without symlinks: there is only no `latest`
        if os.path.lexists(link) and not _points_at_a_run(link):
            return
        temporary.symlink_to(folder.name)
        try:
            temporary.replace(link)
        except OSError:
            temporary.unlink()


def _points_at_a_run(link: Path) -> bool:
    """Whether a run made this link. The run itself may have been removed."""
    target = str(link.readlink())
    folder = link.parent / target
    is_name = target.startswith(RUN_PREFIX) and "/" not in target
    return is_name and (is_run_folder(folder) or not os.path.lexists(folder))


_Place = tuple[int, int]  # offset and length of a line, in bytes


class Journal:
    """The records of a run on disk, one line of JSON each, so that memory does not grow.

    Read through the open file, which exists even after its name was removed.
    """

    def __init__(self, path: Path) -> None:
        self._file = path.open("a+b", buffering=0)
        self._records: list[_Place | Record] = []

    @property
    def count(self) -> int:
        """The number of records."""
        return len(self._records)

    @property
    def refused(self) -> int:
        """The number of records that are in memory only."""
        return sum(not isinstance(each, tuple) for each in self._records)

    def add(self, record: Record) -> None:
        """Appends a record. If the disk refuses it, keeps it in memory and raises OSError."""
        line = msgspec.json.encode(record) + b"\n"
        start = self._file.seek(0, os.SEEK_END)
        try:
            rest = memoryview(line)
            while rest:
                rest = rest[self._file.write(rest) :]
        except BaseException:  # also Ctrl-C: no partial line may stay
            self._records.append(record)
            with contextlib.suppress(OSError):
                self._file.truncate(start)
            raise
        self._records.append((start, len(line)))

    def records(self) -> Iterator[Record]:
        """The records in the order of `add`, read one at a time."""
        from pytest_sglprof._report.model import Record

        for place in self._records:
            if isinstance(place, tuple):
                yield msgspec.json.decode(self._read(*place), type=Record)
            else:
                yield place

    def close(self) -> None:
        """Closes the file."""
        self._file.close()

    def _read(self, offset: int, length: int) -> bytes:
        self._file.seek(offset)
        pieces = []
        while length and (piece := self._file.read(length)):
            pieces.append(piece)
            length -= len(piece)
        return b"".join(pieces)


# run.json, which marks a folder as that of a run, and the removal of old runs.

RUN_PREFIX = "run-"
FORMAT = "pytest-sglprof run"
FORMAT_VERSION = 1
_MAX_RUN_FILE = 1 << 24  # bytes; a larger file is not from a run


def write_run_file(
    folder: Path,
    *,
    started: float,
    version: str,
    settings: Mapping[str, Any] | None = None,
    facts: Mapping[str, Any] | None = None,
) -> None:
    """Marks a folder as that of a run, and begins the journal of what it has on this machine.

    started: Unix time in s. settings: `Settings.stored`. facts: `run_facts`.
    """
    born = process.create_time(os.getpid())
    here = process.identity(os.getpid())
    content = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "id": folder.name,
        "started": utc(started),
        "host": platform.node(),
        "pid": os.getpid(),
        "process_started": utc(born),
        "start": here.start if here else 0,
        **process.machine(),
        "version": version,
        "facts": dict(facts or {}),
        "settings": redact(dict(settings or {})),
    }
    atomic_write(folder / RUN_FILE, json.dumps(content, indent=1) + "\n")


def prune(output: Path, *, keep_runs: int, keep_bytes: float) -> list[str]:
    """Removes the oldest finished runs beyond `keep_runs` or `keep_bytes`; returns their names.

    Removes only folders that are marked as those of runs, and never the newest. A folder that
    cannot be read or removed, or that another process has locked, stays without an error. If
    several runs end at the same time, one of them prunes.
    """
    output = Path(os.path.realpath(output))  # may be a link, unlike the folder of a run
    with locked(output) as alone:
        return _prune(output, keep_runs, keep_bytes) if alone else []


def _prune(output: Path, keep_runs: int, keep_bytes: float) -> list[str]:
    runs = run_folders(output)
    sizes = {path: _size(path) for path in runs}
    removed = []
    for path in runs[:-1]:
        too_many = len(sizes) > keep_runs
        too_large = sum(sizes.values()) > keep_bytes
        if not (too_many or too_large):
            break
        with locked(path) as ended:
            if ended and _remove(path):
                removed.append(path.name)
                del sizes[path]
    return removed


def run_folders(output: Path) -> list[Path]:
    """The folders of runs, the oldest first."""
    try:
        folders = sorted(output.glob(f"{RUN_PREFIX}*"))
    except OSError:
        return []
    return [folder for folder in folders if is_run_folder(folder)]


def is_run_folder(folder: Path) -> bool:
    """Whether a run made this folder; False for links, and for copies under another name."""
    content = None if folder.is_symlink() else run_content(folder)
    return content is not None and content.get("id") == folder.name


def run_content(folder: Path) -> dict[str, Any] | None:
    """What run.json says; None where pytest-sglprof did not write it."""
    file = folder / RUN_FILE
    try:
        if file.is_symlink() or not file.is_file() or file.stat().st_size > _MAX_RUN_FILE:
            return None
        content = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    is_ours = isinstance(content, dict) and content.get("format") == FORMAT
    return content if is_ours else None


def has_process(content: Mapping[str, Any]) -> bool:
    """Whether the process of a run may run. content: of its run.json.

    One of another machine or container may; none has survived a restart of the machine.
    """
    here = {"host": platform.node(), **process.machine()}
    if any(content.get(key, here[key]) != here[key] for key in ("host", "pid_space")):
        return True
    if content.get("boot", here["boot"]) != here["boot"]:
        return False
    pid, start = content.get("pid"), content.get("start")
    if isinstance(pid, int) and isinstance(start, int):
        return process.is_same(process.ProcessId(pid, start))
    return True  # of an older version


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[bool]:
    """Locks a folder during the block; False if another process has the lock, or on errors."""
    try:
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        yield False
        return
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            yield False
        else:
            yield True
    finally:
        os.close(handle)


def _remove(folder: Path) -> bool:
    """Removes a folder; True if nothing is left. run.json goes last: it marks what remains."""
    with contextlib.suppress(OSError):
        for path in folder.iterdir():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            elif path.name != RUN_FILE:
                with contextlib.suppress(OSError):
                    path.unlink()
        if list(folder.iterdir()) == [folder / RUN_FILE]:
            (folder / RUN_FILE).unlink()
            folder.rmdir()
            return True
    return False


def _size(folder: Path) -> int:
    """Bytes of all files below `folder`, without those that cannot be read."""
    total = 0
    for place, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):
                total += (Path(place) / name).lstat().st_size
    return total
