"""One cell of the matrix of faults: a run of pytest to which something happens, and what is left.

A project on the stand-in has three tests: one with a window under load, one more on the same
server, and one without a server. Its conftest writes a file when the run has come to the phase of
the cell, and in some phases waits there, so that no cell depends on how fast the machine is. What
is left is compared with before by what is the run's alone (its environment, its journal, folders
that only it has), so that other work on the machine is never counted.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import psutil
import pytest

from pytest_sglprof import _process as process
from pytest_sglprof._files import RESULTS, RUN_FILE
from pytest_sglprof._server import lease
from pytest_sglprof._server.keeper.protocol import LIFE
from tests.support.project import Project
from tests.support.real_env import real_nsys
from tests.support.session_nsys import install

PHASES = ("launch", "warm-up", "opening", "inside", "closing", "analysis", "report")
COMPLETE = "the results are complete: every test had ended"
HANGS = 400.0  # s after a fault: then it is a hang, and everything is ended
COMES_WITHIN = 400.0  # s for a phase, on a machine that is very busy
GONE_WITHIN = 60.0  # s after the end of pytest, for its keeper to tear down
PAUSE = 3.0  # s between a fault that passes and what ends it
BETWEEN = 0.3  # s between two presses of Ctrl-C
TARGET_WAIT = 5.0  # s for a process that is about to be started
DISK = "8g"  # as far as memory goes; it holds a few MB
TRIES = 20  # to make it as small as what it holds
PYTEST_OF = "pytest-of-"  # begins the name of pytest's folder for tmp_path, which it keeps

CONFIG = """
[server]
kind = "standin"
args = ["--tp", "2"]
standin_args = ["--step-ms", "4", "--layers", "1", "--crash-delay", "0.2"{standin}]
nsys = {nsys}
ready_timeout = {ready}
stop_timeout = 4
{port}

[window]
timeout = {timeout}

[[threshold]]
limit = 5.0
"""
TESTS = """
@pytest.mark.profile_window({window})
def test_window(sglang_server, bench_serving):
    bench_serving(num_prompts=16, max_concurrency=4, random_input_len=8, random_output_len=400,
                  random_range_ratio=1.0, disable_stream=True, timeout={limit})

def test_same_server(sglang_server):
    sglang_server.client.server_info()

def test_no_server(): pass
"""
# Where each phase begins, in the process that drives the window; the second where nsys records.
POINTS = {
    "launch": ("pytest_sglprof._server.launch", "wait_until_ready"),
    "warm-up": ("pytest_sglprof._bench_serving.bench", "BenchServing._finish"),
    "opening": ("pytest_sglprof._server.client", "SglangClient.start_profile"),
    "inside": ("pytest_sglprof._run.window", "Window.wait"),
    "closing": ("pytest_sglprof._server.client", "SglangClient.stop_profile"),
    "analysis": ("pytest_sglprof._run.window", "read_and_judge"),
    "report": ("pytest_sglprof._report.page.page", "write_page"),
}
NSYS_POINTS = {
    "opening": ("pytest_sglprof._nsys", "NsysSession.start"),
    "closing": ("pytest_sglprof._nsys", "NsysSession.stop"),
}
STALLED = (("server", "STOP"), ("rank", "STOP"), ("driver", "STOP"))  # only its limit ends a load
HELD = ("opening", "analysis", "report")  # the run waits there until the fault has happened
STANDIN = {"launch": ', "--ready-delay", "2"', "closing": ', "--export-delay", "2"'}

CONFTEST = """
import functools, importlib, os, pathlib, resource, time

PLACE = pathlib.Path(__file__).parent
MODULE, _, POINT = os.environ.get("FAULT_POINT", "").partition(":")
CLOCK = float(os.environ.get("FAULT_CLOCK", 0))
PATIENCE = 30.0 * bool(os.environ.get("FAULT_HELD"))
LIMITS = resource.getrlimit(resource.RLIMIT_NOFILE)

def pytest_runtest_teardown():
    resource.setrlimit(resource.RLIMIT_NOFILE, LIMITS)

def reached():
    if (PLACE / "reached.txt").exists():
        return
    if CLOCK:
        real_time = time.time
        time.time = lambda: real_time() + CLOCK
    (PLACE / "reached.new").write_text(str(os.getpid()))
    os.replace(PLACE / "reached.new", PLACE / "reached.txt")
    over = time.monotonic() + PATIENCE
    while not (PLACE / "happened.txt").exists() and time.monotonic() < over:
        time.sleep(0.02)

if POINT:
    owner = importlib.import_module(MODULE)
    *path, name = POINT.split(".")
    for part in path:
        owner = getattr(owner, part)
    real = getattr(owner, name)

    @functools.wraps(real)
    def wrapper(*args, **options):
        if name != "_finish" or options.get("what") == "warm-up":
            reached()
        return real(*args, **options)

    setattr(owner, name, wrapper)
"""


class Cell(NamedTuple):
    """who: the process or the part of the machine. what: a signal, or what becomes of it."""

    who: str
    what: str
    phase: str

    @property
    def name(self) -> str:
        """As a file may be called: `server-KILL-inside`."""
        return "-".join(self).replace(" ", "_")


class Outcome(msgspec.Struct, frozen=True):
    """What became of one run.

    status: pytest's exit status, None where it hung. seconds: from the fault until pytest and all
    that it had started were gone. text: its output, and that of the commands after it. left: what
    was there in the end and not before. nsys: "real", "fake" or "" without. missed: why the fault
    did not happen.
    """

    status: int | None = None
    seconds: float = 0.0
    text: str = ""
    left: tuple[str, ...] = ()
    nsys: str = ""
    missed: str = ""


class CannotRun(Exception):
    """What this machine lacks for a cell."""


def run_cell(cell: Cell, folder: Path) -> Outcome:
    """Runs one cell in a new folder of that name below `folder`, which is removed if all is gone.

    Raises `CannotRun`.
    """
    place = folder / cell.name
    shutil.rmtree(place, ignore_errors=True)
    with _Run(cell, place).prepared() as run:
        outcome = run.outcome()
    if not outcome.left:
        shutil.rmtree(place, ignore_errors=True)
    return outcome


class _Run:
    """A run of pytest in one folder, and what the machine has of it."""

    def __init__(self, cell: Cell, folder: Path) -> None:
        self.cell = cell
        self.nsys = "" if cell.who not in ("nsys", "agent") else "fake"
        self.port = next(_ports) if cell.who in ("second", "locks") else 0
        closing = cell.phase == "closing"
        window = "duration=1.0" if closing else "num_steps=300"
        if self.nsys:
            window = 'backend="nsys", duration=1.5'
        config = CONFIG.format(
            standin=STANDIN.get(cell.phase, ""),
            nsys="true" if self.nsys else "false",
            port=f"port = {self.port}" if self.port else "",
            ready=300 if cell.who == "second" else 10,  # for which it waits for the port
            timeout=8 if cell.what == "STOP" and cell.who != "pytest" else 30,
        )
        is_stalled = cell[:2] in STALLED and cell.phase != "analysis"
        tests = TESTS.format(window=window, limit=25 if is_stalled else 90)
        self.project = Project(folder, tests, config)
        (folder / "conftest.py").write_text(CONFTEST)
        self.output = folder / ".sglprof"
        self.temporary = folder / "tmp"
        self.temporary.mkdir()
        self.others: list[subprocess.Popen[str]] = []
        self.words: list[str] = []  # what was said besides pytest's output
        self._lives: dict[str, dict[str, Any]] = {}  # as last seen in a journal, by the life's id
        self._prefills: int | None = None

    @contextlib.contextmanager
    def prepared(self) -> Iterator[_Run]:
        """Everything that is there before pytest starts; undone in the end, whatever happens."""
        with contextlib.ExitStack() as undone:
            if self.cell[:2] in MOUNTED:
                self.output.mkdir()
                _mount("-t", "tmpfs", "-o", f"size={DISK}", "tmpfs", str(self.output))
                undone.callback(self._unmount)
            if self.cell.who == "locks":
                self.project.leases.mkdir(mode=0o700)
                stale = self.project.leases / f"port-{self.port}.lock"
                stale.write_text("sglprof 1\n")  # of a process that runs, but does not hold it
                stale.chmod(0o600)
            undone.callback(self._end_all)
            yield self

    def outcome(self) -> Outcome:
        """Runs pytest, lets the fault happen, and waits until all is over."""
        self.pytest = self.start("output.txt", **self._variables())
        missed = self._wait_for_phase() or self._strike()
        began = time.monotonic()
        (self.project.folder / "happened.txt").touch()
        if not missed:
            AFTERWARDS.get(self.cell[:2], lambda run: None)(self)
        started = (self.pytest, *self.others)
        while any(each.poll() is None for each in started) and time.monotonic() - began < HANGS:
            self._look()
            time.sleep(0.1)
        status = self.pytest.poll()
        left = self._left(GONE_WITHIN)
        seconds = time.monotonic() - began
        if status in (-signal.SIGKILL, -signal.SIGTERM):
            self._report()
        bad = [other.poll() for other in self.others if other.poll() != 0]
        left += tuple(f"the second pytest ended with status {each}" for each in bad)
        text = (self.project.folder / "output.txt").read_text(errors="replace")
        text = "\n".join([text, *self.words]).replace(f"{self.project.folder}/", "")
        return Outcome(status, round(seconds, 1), text, left, self.nsys, missed)

    def start(self, output: str, **variables: str) -> subprocess.Popen[str]:
        """pytest in the background, in a process group of its own."""
        options = ["-W", "default", "-p", "no:cacheprovider"]
        options += ["-n", "1"] if self.cell.who == "worker" else []
        with (self.project.folder / output).open("w") as stream:
            return subprocess.Popen(
                self.project.command(*options),
                cwd=self.project.folder,
                env=self.environment(**variables),
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=True,
            )

    def environment(self, **more: str) -> dict[str, str]:
        """Of everything that is started here; temporary files are in a folder of the cell."""
        return self.project.environment(TMPDIR=str(self.temporary), **more)

    def runs(self) -> list[Path]:
        """The folders of runs."""
        return sorted(self.output.glob("run-*"))

    def command(self, *words: str) -> None:
        """Runs `sglprof`, whose output is kept."""
        ran = subprocess.run(
            [sys.executable, "-m", "pytest_sglprof", *words],
            cwd=self.project.folder,
            env=self.environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        self.words.append(f"$ sglprof {words[0]}: status {ran.returncode}\n{ran.stdout}")

    # ---- until the fault -------------------------------------------------------------------

    def _variables(self) -> dict[str, str]:
        cell = self.cell
        points = {**POINTS, **(NSYS_POINTS if self.nsys else {})}
        variables = {"FAULT_POINT": ":".join(points[cell.phase])}
        if cell.phase in HELD:
            variables["FAULT_HELD"] = "1"
        if seconds := CLOCK.get(cell[:2]):
            variables["FAULT_CLOCK"] = str(seconds)
        if self.nsys:
            try:
                variables["SGLPROF_NSYS"], self.nsys = real_nsys(), "real"
            except pytest.skip.Exception as missing:
                if cell.who == "agent":
                    raise CannotRun(str(missing)) from None
                variables["SGLPROF_NSYS"] = str(install(self.project.folder / "fake-nsys"))
        self._nsys_path = variables.get("SGLPROF_NSYS", "")
        return variables

    def _wait_for_phase(self) -> str:
        """Returns once it is reached, "" then, else why it never was."""
        over = time.monotonic() + COMES_WITHIN
        while not self._is_reached():
            if self.pytest.poll() is not None:
                return f"pytest ended with status {self.pytest.returncode} before this phase"
            if time.monotonic() > over:
                return f"this phase did not come within {COMES_WITHIN:g} s"
            time.sleep(0.02)
        self._look()
        return ""

    def _is_reached(self) -> bool:
        if not (self.project.folder / "reached.txt").exists():
            return False
        if self.cell.phase == "warm-up":  # the driver takes a second to begin
            prefills = self._log().count("Prefill batch")
            self._prefills = prefills if self._prefills is None else self._prefills
            return prefills > self._prefills
        if self.cell.phase == "closing" and not self.nsys:
            return "Stop profiling" in self._log()
        return True

    def _log(self) -> str:
        logs = self.output.glob("run-*/servers/*/server.log")
        return "".join(path.read_text(errors="replace") for path in logs)

    def _strike(self) -> str:
        """Lets the fault happen; returns why it could not."""
        strike = MACHINE.get(self.cell[:2])
        if strike is not None:
            strike(self)
            return ""
        if self.cell.who == "pytest" and self.cell.what.startswith("INT"):
            for number in range(int(self.cell.what[3:] or 1)):
                time.sleep(BETWEEN if number else 0)
                with contextlib.suppress(ProcessLookupError):  # it may have ended by then
                    os.killpg(self.pytest.pid, signal.SIGINT)
                (self.project.folder / "happened.txt").touch()
            return ""
        over = time.monotonic() + TARGET_WAIT
        while not (target := self._target()) and time.monotonic() < over:
            time.sleep(0.02)
        if not target:
            return f"no process is the {self.cell.who}"
        os.kill(target, signal.Signals[f"SIG{self.cell.what}"])
        return ""

    def _target(self) -> int:
        """The pid of the process of the cell; 0 while there is none."""
        if self.cell.who == "pytest":
            return self.pytest.pid
        if self.cell.who == "worker":
            return int((self.project.folder / "reached.txt").read_text())
        if self.cell.who == "server":
            self._look()
            servers = [life["server"] for life in self._lives.values() if life["server"]]
            return int(servers[0]["pid"]) if servers else 0
        is_it = PROCESSES[self.cell.who]
        pids = [each.pid for each in self.project.family() if is_it(_words(each))]
        return (pids[-1] if self.cell.who == "rank" else pids[0]) if pids else 0

    # ---- after it --------------------------------------------------------------------------

    def _look(self) -> None:
        """Reads the journals: what has gone from there later was the run's all the same."""
        for folder in self.runs():
            with contextlib.suppress(OSError, ValueError):
                for life in json.loads((folder / RUN_FILE).read_text()).get("servers", ()):
                    known = self._lives.setdefault(life["life"], life)
                    known["server"] = known["server"] or life["server"]
                    for key in ("files", "ports"):
                        known[key] = sorted({*known[key], *life[key]})

    def _report(self) -> None:
        """What a cancelled CI job would read: the results that `sglprof report` makes."""
        for folder in self.runs()[:1]:
            self.command("report", str(folder))
            with contextlib.suppress(OSError, ValueError):
                results = json.loads((folder / RESULTS).read_text())
                begun = [test["reason"] for test in results["tests"] if test["reason"]]
                self.words += [results["run"]["interrupted"] or COMPLETE, *begun]

    def _left(self, within: float) -> tuple[str, ...]:
        """What is left after at most so many s."""
        over = time.monotonic() + within
        while left := tuple(dict.fromkeys(self._leftovers())):
            if time.monotonic() > over:
                break
            time.sleep(0.5)  # a look at all processes takes a tenth of a second
        return left

    def _leftovers(self) -> Iterator[str]:
        family = {each.pid: each for each in self.project.family()}
        for life in self._lives:
            family |= {each.pid: each for each in process.marked(LIFE, life)}
        yield from (f"process: {words[:120]}" for words in map(_words, family.values()) if words)
        yield from (f"lock: {path.name}" for path in self.project.leases.glob("*.lock"))
        yield from (f"half a file: {path.name}" for path in self.project.half_files())
        names = {path.name for path in self.temporary.iterdir()}
        yield from (f"temporary: {name}" for name in names if not name.startswith(PYTEST_OF))
        for port in {port for life in self._lives.values() for port in life["ports"]}:
            if not lease.port_is_free(port):
                yield f"port {port}"
        for path in {Path(name) for life in self._lives.values() for name in life["files"]}:
            if os.path.lexists(path):
                yield f"file: {path}"
        yield from self._sessions()

    def _sessions(self) -> Iterator[str]:
        """Sessions of nsys, which only those see that have the TMPDIR in which they are kept."""
        names = {life["session"] for life in self._lives.values()} - {""}
        for place in (self.temporary, *self.output.glob("run-*/servers/*/tmp")) if names else ():
            listed = subprocess.run(
                [self._nsys_path, "sessions", "list"],
                env=self.project.environment(TMPDIR=str(place)),
                capture_output=True,
                text=True,
                check=False,
            )
            yield from (f"nsys session {name}" for name in names if name in listed.stdout)

    def _end_all(self) -> None:
        """Ends what is left, by pid: each is a process of this cell."""
        for each in self.project.family():
            with contextlib.suppress(psutil.Error):
                each.kill()
        for started in self.others:
            started.wait()

    def _unmount(self) -> None:
        while self.output.is_mount():
            subprocess.run(["umount", "-l", str(self.output)], check=True)


def _words(each: psutil.Process) -> str:
    """Its command; "" once it has ended."""
    try:
        return " ".join(each.cmdline())
    except psutil.Error:
        return ""


PROCESSES: dict[str, Callable[[str], bool]] = {  # by its command
    "keeper": lambda words: "pytest_sglprof._server.keeper" in words,
    "rank": lambda words: words.startswith("sglang::scheduler"),
    "nsys": lambda words: "nsys profile --start-later" in words,
    "agent": lambda words: "--start-agent" in words,
    "driver": lambda words: "load_driver" in words and "guard.py" not in words,
}
# Ports that no keeper takes by itself, one for each cell.
_ports = itertools.filterfalse(
    lambda port: not lease.port_is_free(port), itertools.count(random.randrange(11000, 18000))
)


# ---- what happens to the machine -------------------------------------------------------------


def _fill_disk(run: _Run) -> None:
    """Makes it as small as what it holds: a window is refused on a small disk from the start."""
    for _ in range(TRIES):
        disk = os.statvfs(run.output)
        used = (disk.f_blocks - disk.f_bfree) * disk.f_frsize
        with contextlib.suppress(CannotRun):  # it has grown meanwhile
            _mount("-o", f"remount,size={used}", str(run.output))
            break
    with (run.output / "filler").open("ab", buffering=0) as stream, contextlib.suppress(OSError):
        while True:
            stream.write(b"x" * 4096)


def _take_folder(run: _Run) -> None:
    """The folder of the run, at once: it gets another name, and then goes."""
    gone = run.project.folder / "gone"
    for folder in run.runs():
        folder.rename(gone)
        shutil.rmtree(gone, ignore_errors=True)


def _make_read_only(run: _Run) -> None:
    """For whatever is opened from now on; what is open stays writable, as on a real disk."""
    place = str(run.output)
    _mount("--bind", place, place)
    _mount("-o", "remount,bind,ro", place)


def _exhaust_descriptors(run: _Run) -> None:
    """pytest gets no further one until its test ends; without any it could not end at all."""
    taken = {int(path.name) for path in Path(f"/proc/{run.pytest.pid}/fd").iterdir()}
    first = next(number for number in itertools.count() if number not in taken)
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.prlimit(run.pytest.pid, resource.RLIMIT_NOFILE, (first, hard))


def _start_second(run: _Run) -> None:
    run.others.append(run.start("second.txt"))


def _mount(*words: str) -> None:
    ran = subprocess.run(["mount", *words], capture_output=True, text=True, check=False)
    if ran.returncode:
        raise CannotRun(f"nothing can be mounted here: {ran.stderr.strip()}")


Strike = Callable[[_Run], None]
CLOCK = {("clock", "+1 h"): 3600.0, ("clock", "-1 h"): -3600.0}
MOUNTED = (("disk", "full"), ("folder", "read-only"))
MACHINE: dict[tuple[str, ...], Strike] = {
    ("disk", "full"): _fill_disk,
    ("folder", "gone"): _take_folder,
    ("folder", "read-only"): _make_read_only,
    ("descriptors", "exhausted"): _exhaust_descriptors,
    **dict.fromkeys(CLOCK, lambda run: None),  # its conftest sets it when it comes to the phase
    ("locks", "stale"): lambda run: None,  # they lie there before it starts
    ("second", "pytest"): _start_second,
}


# ---- what happens a little later ---------------------------------------------------------------


def _continue(run: _Run) -> None:
    time.sleep(PAUSE)
    run.pytest.send_signal(signal.SIGCONT)


def _cancel_and_clean(run: _Run) -> None:
    """As docs/xdist-and-gpus.md says: the job is cancelled, and `sglprof clean` ends the rest."""
    time.sleep(PAUSE)
    run.pytest.kill()
    run.pytest.wait()
    run.command("clean")


AFTERWARDS: dict[tuple[str, ...], Strike] = {
    ("pytest", "STOP"): _continue,
    ("worker", "STOP"): _cancel_and_clean,
}
