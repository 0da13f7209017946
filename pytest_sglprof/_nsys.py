"""Finds the nsys command, checks what it can do, and controls its sessions by name.

nsys ends with status 0 after many mistakes (an unknown session, a missing folder) and does not
write the first report of a session where it was asked to. So a session's state is read before
and after each command, and the path of a report is taken from the ``Generated:`` lines.
"""

from __future__ import annotations

import contextlib
import functools
import os
import re
import select
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from pytest_sglprof._errors import (
    NsysError,
    NsysMissing,
    NsysSessionError,
    NsysTooOld,
    SettingsError,
)
from pytest_sglprof._process import which
from pytest_sglprof._redact import is_secret_variable

ENV_NAME = "SGLPROF_NSYS"
QUICK = 30.0  # s for version, help and session lists, which usually take 0.1 s
IDLE = frozenset({"DelayedCollection", "Launched"})  # without a window
COLLECTING = frozenset({"Collection", "RangeCollection", "StartRange"})
GONE = frozenset({"", "Shutdown"})
# In any other state, such as RangeGeneration, nsys is busy with the report of a window. It may
# leave that state by itself, or wait for `nsys stop`.
PATIENCE = 30.0  # s for the first of the two
_VERSION = re.compile(r"version\s+v?(\d+(?:\.\d+)+)")
_INSTALL_HINT = (
    "install Nsight Systems 2023.4 or newer and put nsys on PATH, or name it with "
    f"--sglprof-nsys or ${ENV_NAME}"
)
_OURS = "is set by pytest-sglprof itself"
_NO_WINDOW = (
    "means nothing beside --start-later, where `nsys start` and `nsys stop` open and close windows"
)
REFUSED = {  # option of `nsys profile` -> why it is refused, and what to use
    "--session-new": (_OURS, ""),
    "--session": (_OURS, ""),
    "--start-later": (_OURS, ""),
    "--output": (_OURS, ""),
    "--delay": (_NO_WINDOW, "delay of the window"),
    "--duration": (_NO_WINDOW, "duration of the window"),
    "--duration-frames": (_NO_WINDOW, "duration of the window"),
    "--capture-range": (_NO_WINDOW, "num_steps of the window, which asks for a range"),
    "--capture-range-end": (_NO_WINDOW, "num_steps of the window, which asks for a range"),
    "--hotkey-capture": (_NO_WINDOW, ""),
    "--stop-on-exit": (_NO_WINDOW, ""),
    "--help": ("prints help and starts no server", ""),
}
_SHORT = {
    "-t": "--trace",
    "-s": "--sample",
    "-f": "--force-overwrite",
    "-Y": "--start-later",
    "-o": "--output",
    "-y": "--delay",
    "-d": "--duration",
    "-c": "--capture-range",
    "-x": "--stop-on-exit",
    "-h": "--help",
}
# Data centre GPUs of the Blackwell generation, where nsys records CUDA in hardware.
_BLACKWELL = re.compile(r"\bG?B[123]\d0\b|\bBlackwell\b", re.IGNORECASE)
_DRIVER = Path("/proc/driver/nvidia/gpus")


def find_nsys(path: str | None = None) -> NsysTool:
    """The nsys at `path`, else at ``$SGLPROF_NSYS``, else on PATH.

    A bare name is looked up on PATH. A path (with a slash) may also be the folder of nsys.
    Raises `NsysMissing`, or `NsysTooOld` if ``profile --help`` does not list --start-later.
    """
    wanted = path or os.environ.get(ENV_NAME) or "nsys"
    if os.sep in wanted and Path(wanted).is_dir():
        wanted = str(Path(wanted) / "nsys")
    command = which(wanted)
    if command is None:
        bare = os.sep not in wanted
        beside = bare and Path(wanted).exists()
        raise NsysMissing(
            f"no nsys command: {wanted!r} is not an executable file{' on PATH' if bare else ''}",
            expected="Nsight Systems' command line tool",
            hint=_INSTALL_HINT + (f"; for the one in this folder: ./{wanted}" if beside else ""),
        )
    answer = _quick(command, ["--version"])
    match = _VERSION.search(answer)
    if match is None:
        raise NsysMissing(
            f"{command} is not a working nsys: --version prints no version",
            expected="NVIDIA Nsight Systems version 2023.4 or newer",
            hint=_INSTALL_HINT,
            log=answer.splitlines()[-5:],
        )
    if "--start-later" not in _profile_help(command):
        raise NsysTooOld(
            f"{command} (version {match[1]}) has no `profile --start-later`",
            expected="an nsys that has it, such as 2023.4 (2022.4 has not)",
            hint=_INSTALL_HINT,
        )
    return NsysTool(command, match[1])


def profile_prefix(
    tool: NsysTool, session: str, first_report: Path, extra: Sequence[str], *, gpu: bool
) -> list[str]:
    """The words to put before the server's command to run it under a session `session`.

    first_report: where nsys writes the report of the first window, even if ``nsys start``
    names another path. extra: the user's options, which replace the plugin's defaults.
    gpu: record CUDA, with the kernels inside CUDA graphs.
    """
    taken = check_profile_args(extra)
    defaults = {
        "--trace": _cuda_trace(tool) + ",nvtx" if gpu else "nvtx",
        "--sample": "none",
        "--cpuctxsw": "none",
        "--trace-fork-before-exec": "true",
        "--force-overwrite": "true",
    }
    if gpu:
        defaults["--cuda-graph-trace"] = "node"
    if "--discard-environment" in _profile_help(tool.path):
        defaults["--discard-environment"] = "true"
    return [
        tool.path,
        "profile",
        "--start-later=true",
        f"--session-new={session}",
        f"--output={first_report}",
        *(f"{name}={value}" for name, value in defaults.items() if name not in taken),
        *extra,
    ]


def check_profile_args(words: Sequence[str], where: str = "nsys_args") -> set[str]:
    """The long names of a user's options; raises `SettingsError` for one of `REFUSED`."""
    names = {word.partition("=")[0] if word[:2] == "--" else word[:2] for word in words}
    taken = {_SHORT.get(name, name) for name in names if name.startswith("-")}
    for name in sorted(taken & REFUSED.keys()):
        why, instead = REFUSED[name]
        raise SettingsError(
            f"{where}: {name} {why}",
            expected="other options of `nsys profile`, such as --trace=cuda-sw,nvtx",
            hint=f"remove {name}" + (f", and use {instead}" if instead else ""),
        )
    return taken


def _cuda_trace(tool: NsysTool) -> str:
    """`cuda-sw` where `cuda` leaves delayed windows empty or crashes, and this nsys has it."""
    models = "".join(_read(path) for path in _DRIVER.glob("*/information"))
    is_needed = _BLACKWELL.search(models) is not None
    return "cuda-sw" if is_needed and "cuda-sw" in _profile_help(tool.path) else "cuda"


def _read(path: Path) -> str:
    with contextlib.suppress(OSError):
        return path.read_text(encoding="utf-8", errors="replace")
    return ""


class NsysSession:
    """One session, known by its name. It may have been started outside of this plugin.

    tmpdir: the TMPDIR with which the session was started. nsys keeps its sessions in files
    there and does not see those of another TMPDIR.
    """

    def __init__(self, tool: NsysTool, name: str, *, tmpdir: Path | None = None) -> None:
        self.tool = tool
        self.name = name
        self.tmpdir = tmpdir
        self.remarks: tuple[str, ...] = ()  # what was wrong with the last report
        self._output: Path | None = None

    def state(self) -> str:
        """Its state in ``nsys sessions list``; "" if it is not listed."""
        return self._sessions().get(self.name, "")

    def require(self) -> str:
        """Its state; raises `NsysSessionError` if it does not exist."""
        sessions = self._sessions()
        state = sessions.get(self.name, "")
        if state in GONE:
            raise self._gone(sessions)  # `nsys start` would create it
        return state

    def start(
        self, output: Path, *, capture_range: str | None = None, timeout: float = 60.0
    ) -> None:
        """Opens a window whose report will be at `output` (``….nsys-rep``).

        capture_range: ``cudaProfilerApi`` to collect only between cudaProfilerStart and
        cudaProfilerStop; a session's first window ignores it.
        """
        self.require()
        state = self._settled(timeout)
        if state not in IDLE:
            raise NsysSessionError(
                f"nsys session {self.name!r} already collects (state {state})",
                expected="a session without an open window",
                hint="close that window first (`nsys stop`)",
            )
        output.parent.mkdir(parents=True, exist_ok=True)  # else the report goes elsewhere
        words = ["start", f"--session={self.name}", f"--output={output}", "--force-overwrite=true"]
        if capture_range:
            words += [f"--capture-range={capture_range}", "--capture-range-end=stop"]
        self._checked(words, timeout)
        self._output = output
        self._wait_for_state(lambda now: now not in IDLE | GONE, "to collect", timeout)

    def stop(self, *, timeout: float, progress: Callable[[str], None] | None = None) -> Path:
        """Closes the window and returns its complete report.

        The first report of a session is moved to the `output` of `start`. `remarks` has what
        nsys says about it. Raises `NsysError` if there is no report, or only a ``.qdstrm``.
        """
        self.remarks = ()
        state = first = self.require()
        if first not in IDLE | COLLECTING:
            state = self._settled(timeout)
        if state in IDLE:
            report, self._output = self._output, None
            if first not in IDLE and report is not None and _has_content(report):
                report.chmod(0o600)
                return report  # of a range, which nsys finished meanwhile
            raise NsysSessionError(
                f"nsys session {self.name!r} has no open window (state {state})",
                expected="state Collection",
                hint="another process closed the window, or it was never opened",
            )
        report = self._stop(timeout if first in COLLECTING else timeout / 2, progress)
        report.chmod(0o600)  # it holds the environments of all processes of this machine
        wanted, self._output = self._output, None
        if wanted is None or wanted == report:
            return report
        shutil.move(report, wanted)
        return wanted

    def size(self, report: Path) -> int:
        """Of a report where nsys writes it, bytes; -1 while there is none."""
        return report.stat().st_size if report.is_file() else -1

    def fetch(self, file: Path, timeout: float) -> Path:
        """A complete file of nsys, once it is on this machine; raises `NsysError` if it is not."""
        return file

    def shutdown(self, *, timeout: float = 60.0, discard: bool = False) -> None:
        """Ends the session and its server (SIGTERM); does nothing if it is gone.

        discard: also with an open window, whose report is lost. Without it an open window
        raises `NsysSessionError`.
        """
        state = self.state()
        if state in GONE:
            return
        if state not in IDLE and not discard:
            raise NsysSessionError(
                f"nsys session {self.name!r} still has an open window",
                hint="stop it first, since a shutdown would lose the report",
            )
        self._checked(["shutdown", "--kill=sigterm", f"--session={self.name}"], timeout)
        self._wait_for_state(lambda now: now in GONE, "to end", timeout)

    def _stop(self, timeout: float, progress: Callable[[str], None] | None) -> Path:
        output = StopOutput(progress)
        words = [self.tool.path, "stop", f"--session={self.name}"]
        with started(words, self.tmpdir) as process:
            ended = output.follow(process, timeout)
        if not ended:
            raise NsysError(
                f"`nsys stop` of session {self.name!r} did not end within {timeout:g} s",
                expected="a report; writing it takes longer for a larger window",
                hint="take a smaller window or raise its timeout",
                log=output.tail(),
            )
        stream = output.stream()
        if stream is not None:
            return _import_again(self.tool, stream, timeout, output.tail())
        report = output.report(process.returncode)
        self.remarks = output.faults()
        return report

    def _settled(self, timeout: float) -> str:
        """The state, once it is one of those that last; any other after half of `timeout`."""
        known = IDLE | COLLECTING | GONE
        over = time.monotonic() + min(PATIENCE, timeout / 2)
        while (state := self.state()) not in known and time.monotonic() < over:
            time.sleep(0.2)
        return state

    def _checked(self, words: Sequence[str], timeout: float) -> str:
        process = run([self.tool.path, *words], timeout, self.tmpdir)
        if process.returncode == 0:
            return process.stdout
        output = process.stdout.strip()
        about_session = "session" in output.lower() or "state" in output
        kind = NsysSessionError if about_session else NsysError
        raise kind(
            f"`nsys {words[0]}` of session {self.name!r} failed (exit {process.returncode})",
            log=output.splitlines()[-8:],
        )

    def _sessions(self) -> dict[str, str]:
        return {each.name: each.state for each in list_sessions(self.tool, self.tmpdir)}

    def _wait_for_state(self, wanted: Callable[[str], bool], what: str, timeout: float) -> None:
        deadline = time.monotonic() + timeout
        while not wanted(state := self.state()):
            if time.monotonic() >= deadline:
                raise NsysSessionError(
                    f"nsys session {self.name!r} was asked {what}, but after {timeout:g} s its "
                    f"state is {state or 'gone'}",
                )
            time.sleep(0.05)

    def _gone(self, sessions: dict[str, str]) -> NsysSessionError:
        others = ", ".join(sorted(sessions)) or "none"
        return NsysSessionError(
            f"there is no nsys session {self.name!r}",
            expected=f"one of the sessions that nsys lists: {others}",
            hint="start the server under `nsys profile --start-later=true "
            "--session-new=NAME`; sessions are kept per user and TMPDIR",
        )


@functools.lru_cache(maxsize=8)
def _profile_help(path: str) -> str:
    return _quick(path, ["profile", "--help"])


def _quick(path: str, words: Sequence[str]) -> str:
    try:
        process = run([path, *words], QUICK)
    except NsysError as error:
        raise NsysMissing(error.what, hint=_INSTALL_HINT, log=error.log) from error
    return process.stdout


def _import_again(tool: NsysTool, stream: Path, timeout: float, log: Sequence[str]) -> Path:
    """Makes a report from a raw ``.qdstrm`` whose import failed; returns its path.

    The importer of 2023.4 has a race: on a busy machine it sometimes fails, and works the
    second time. log: the output of the first import, for the error.
    """
    report = stream.with_suffix(".nsys-rep")
    importer = Path(tool.path).resolve().parent.parent / "host-linux-x64" / "QdstrmImporter"
    words = [str(importer), "--input-file", str(stream), "--output-file", str(report)]
    with contextlib.suppress(NsysError):
        if importer.is_file() and run([*words, "--force-overwrite"], timeout).returncode == 0:
            stream.unlink(missing_ok=True)
            if report.is_file() and report.stat().st_size:
                return report
    raise NsysError(
        f"nsys left only {stream}, no report: its importer did not work",
        expected="a .nsys-rep file",
        hint="the importer is in nsys's folder host-linux-x64, which must be beside "
        "target-linux-x64, and needs libssh.so.4 (Debian: libssh-4, linked as "
        "host-linux-x64/libssh.so)",
        log=log,
    )


# Running an nsys command, in a process session of its own and without credentials.


@dataclass(frozen=True)
class NsysTool:
    """An nsys command that has ``profile --start-later``. version: such as "2023.4.4"."""

    path: str
    version: str


def run(
    words: Sequence[str], timeout: float, tmpdir: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """Runs one command to its end. Ctrl-C does not reach it, since it would lose a report."""
    with started(words, tmpdir) as process:
        try:
            out, _ = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            raise NsysError(
                f"`{Path(words[0]).name} {words[1]}` did not answer within {timeout:g} s",
                hint="look for `nsys --start-agent`: the agent of an earlier session may hang",
            ) from None
    text = out.decode("utf-8", errors="replace")
    return subprocess.CompletedProcess(list(words), process.returncode, text, "")


@contextlib.contextmanager
def started(words: Sequence[str], tmpdir: Path | None = None) -> Iterator[subprocess.Popen[bytes]]:
    """Starts a command, with stdout and stderr in one pipe; kills it at the end of the block.

    tmpdir: its TMPDIR. Its environment has no credentials, since nsys stores it.
    """
    environment = {k: v for k, v in os.environ.items() if not is_secret_variable(k, v)}
    if tmpdir is not None:
        environment["TMPDIR"] = str(tmpdir)
    try:
        process = subprocess.Popen(
            words,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
            umask=0o077,  # what nsys writes holds the environments of other processes
        )
    except OSError as error:
        raise NsysError(f"{words[0]} could not be run: {error.strerror or error}") from error
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()
        if process.stdout is not None:
            process.stdout.close()


# Reading what nsys prints: its list of sessions, and the progress and result of `nsys stop`.

# TIME may hold blanks ("1d 02:03:12"); STATE is one word, which begins with a capital.
_SESSION = re.compile(r"^\s*(\d+)\s+\S.*?\s([A-Z][A-Za-z]+)\s+\d+\s+(\S.*?)\s*$")
_FAULT = re.compile(r"non-fatal error|Analysis failed with|^\s*Status: ", re.IGNORECASE)
_PROGRESS = re.compile(r"^\[(\d+)/(\d+)\]\s*\[\D*?(\d+)%\s*\]\s*(.*)$")
_GENERATING = re.compile(r"^Generating '(.+)'")


@dataclass(frozen=True)
class ListedSession:
    """One session as nsys lists it."""

    id: str
    name: str
    state: str


def list_sessions(tool: NsysTool, tmpdir: Path | None = None) -> list[ListedSession]:
    """The sessions of this user under a TMPDIR (None: that of this process)."""
    words = [tool.path, "sessions", "list", "--show-header=false"]
    return read_session_list(run(words, QUICK, tmpdir).stdout)


def read_session_list(text: str) -> list[ListedSession]:
    """From ``nsys sessions list`` (ID, TIME, STATE, LAUNCH, NAME).

    The name, in the last column, may contain blanks.
    """
    matches = (_SESSION.match(line) for line in text.splitlines())
    return [ListedSession(match[1], match[3], match[2]) for match in matches if match]


class StopOutput:
    """The output of ``nsys stop`` while it runs."""

    def __init__(self, progress: Callable[[str], None] | None = None) -> None:
        self._progress = progress
        self._text = ""
        self._unread = ""

    def follow(self, process: subprocess.Popen[bytes], timeout: float) -> bool:
        """Reads until the command ends; False if that takes more than `timeout` s."""
        assert process.stdout is not None
        stream = process.stdout.fileno()
        deadline = time.monotonic() + timeout
        while (left := deadline - time.monotonic()) > 0:
            if not select.select([stream], [], [], left)[0]:
                return False
            data = os.read(stream, 65536)
            if not data:
                return self._ends(process, deadline)
            self.feed(data.decode("utf-8", errors="replace"))
        return False

    def feed(self, text: str) -> None:
        """Adds a piece of output and reports the progress in it."""
        self._text += text
        # A progress bar redraws its line with a carriage return.
        *lines, self._unread = re.split(r"[\r\n]", self._unread + text)
        for line in lines:
            if self._progress is not None and (match := _PROGRESS.match(line)):
                self._progress(f"{match[4]}: {match[3]} %")

    def tail(self) -> tuple[str, ...]:
        """The last lines, without progress bars."""
        return tuple(line for line in self._lines() if not _PROGRESS.match(line))[-8:]

    def faults(self) -> tuple[str, ...]:
        """What the importer says of errors in a report that it has made all the same."""
        return tuple(" ".join(line.split()) for line in self._lines() if _FAULT.search(line))

    def stream(self) -> Path | None:
        """The raw ``.qdstrm`` that is left if its import into a report failed, else None."""
        paths = [*self._generated(), *self._streams()]
        return next((path for path in paths if path.suffix == ".qdstrm" and path.exists()), None)

    def report(self, status: int | None) -> Path:
        """The report that was generated, from the ``Generated:`` lines."""
        for path in self._generated():
            if path.suffix in (".nsys-rep", ".qdrep") and _has_content(path):
                return path
        raise NsysError(
            f"`nsys stop` printed no path of an existing report (exit {status})",
            expected="a path ending in .nsys-rep below its line `Generated:`",
            hint="check the free space in the report's folder and in TMPDIR",
            log=self.tail(),
        )

    def _ends(self, process: subprocess.Popen[bytes], deadline: float) -> bool:
        try:
            process.wait(max(deadline - time.monotonic(), 0.1))
        except subprocess.TimeoutExpired:
            return False
        return True

    def _lines(self) -> list[str]:
        return [line for line in re.split(r"[\r\n]+", self._text) if line.strip()]

    def _generated(self) -> list[Path]:
        # The head may follow a progress bar on one line, since two processes write at once.
        _, head, rest = self._text.rpartition("Generated:")
        paths = []
        for line in rest.splitlines()[1:] if head else ():
            if not line.startswith((" ", "\t")):
                break
            paths.append(Path(line.strip()))
        return paths

    def _streams(self) -> list[Path]:
        matches = (_GENERATING.match(line) for line in self._lines())
        return [Path(match[1]) for match in matches if match]


def _has_content(path: Path) -> bool:
    try:
        return path.stat().st_size > 0
    except OSError:
        return False
