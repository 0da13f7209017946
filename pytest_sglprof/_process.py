"""Process trees: which processes belong to a server, how to end them, and which rank each is.

A process is known by its pid and its start time, since the kernel reuses pids.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from pytest_sglprof._ranks import Rank

if TYPE_CHECKING:
    import psutil

KILL_WAIT = 10.0  # s for the kernel to end a killed process, seconds with a GPU context
TERM_WAIT = 1.0  # s at most for the rest of a tree to end after SIGTERM
SAME_PROCESS = 0.02  # s; psutil derives creation times from clock ticks of 10 ms
_PR_SET_CHILD_SUBREAPER = 36
_SHARED_FILE = re.compile(r"(/dev/shm/(?:sgl|nccl|torch|psm_|sem\.)[\w.-]*)$", re.M)


def adopt_orphans() -> bool:
    """Makes this process the parent of all orphans among its descendants.

    nsys starts an agent that detaches itself, and a killed launcher orphans the server. With
    Linux's ``PR_SET_CHILD_SUBREAPER`` all of them stay in `descendants`. False if the system
    does not have it.
    """
    try:
        libc = ctypes.CDLL(None, use_errno=True)
        return bool(libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) == 0)
    except (OSError, AttributeError):
        return False


def blank_variables(names: Iterable[str]) -> None:
    """Overwrites variables in this process's environment block, which other processes can read.

    The block (``/proc/PID/environ``) never changes by itself after the start, and nsys stores
    that of every process that it can read. `os.environ`, C libraries and later children still
    see the values.
    """
    blanked = {os.fsencode(name) for name in names if os.environ.get(name)}
    for name in blanked:
        os.environb[name] = os.environb[name]  # C's own pointer leaves the block
    with contextlib.suppress(OSError, ValueError, IndexError):
        numbers = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        start, end = int(numbers[47]), int(numbers[48])  # env_start, env_end: proc(5)
        position = start
        for entry in ctypes.string_at(start, end - start).split(b"\0") if start else ():
            name, _, old = entry.partition(b"=")
            if name in blanked:
                ctypes.memset(position + len(name) + 1, ord("*"), len(old))
            position += len(entry) + 1


def reap_orphans() -> None:
    """Collects dead children that were adopted.

    Poll children whose exit status matters before, since this loses it.
    """
    with contextlib.suppress(ChildProcessError):
        while child := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG):
            if child.si_pid == 0:
                break


def which(command: str) -> str | None:
    """The absolute path of the executable file that `command` names; None if there is none.

    A bare name is looked up on PATH only; a path (with a slash) is relative to the working
    directory. Empty entries of PATH, which shells take for the working directory, are skipped:
    they are mostly accidents, and a file there must not replace a command.
    """
    folders = [folder for folder in os.get_exec_path() if folder]
    path = shutil.which(command, path=os.pathsep.join(folders))
    return os.path.abspath(path) if path else None  # noqa: PTH100  # keeps the name of a link


def create_time(pid: int) -> float | None:
    """Unix time in s at which the process started; None if it does not exist or is a zombie."""
    import psutil

    try:
        process = psutil.Process(pid)
        return None if _is_zombie(process) else float(process.create_time())
    except psutil.Error:
        return None


def is_alive(pid: int, created: float) -> bool:
    """True while the process that started at `created` runs; a zombie does not run."""
    start = create_time(pid)
    return start is not None and abs(start - created) <= SAME_PROCESS


@dataclass(frozen=True)
class ProcessId:
    """A process as a file may name it: no other one of this boot of the machine ever equals it.

    start: clock ticks from the boot to its start, which setting the clock does not change.
    """

    pid: int
    start: int


def identity(pid: int) -> ProcessId | None:
    """The process that has this pid now; None if there is none, or only a zombie."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
    except OSError:
        return None
    return None if fields[0] in (b"Z", b"X") else ProcessId(pid, int(fields[19]))  # proc(5)


def is_same(known: ProcessId) -> bool:
    """True while this very process runs."""
    return identity(known.pid) == known


def machine() -> dict[str, str]:
    """What processes must have in common for a pid to mean the same: a boot, and a container."""
    texts = {"boot": "", "pid_space": ""}
    with contextlib.suppress(OSError):
        texts["boot"] = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        texts["pid_space"] = str(Path("/proc/self/ns/pid").readlink())
    return texts


def shares_files(pid: int) -> bool:
    """Whether a process is of this user and sees the same files, as one in a container does not."""
    try:
        is_of_user = Path(f"/proc/{pid}").stat().st_uid == os.getuid()
        spaces = {str(Path(f"/proc/{each}/ns/mnt").readlink()) for each in (pid, "self")}
    except OSError:
        return False
    return is_of_user and len(spaces) == 1


def variable(pid: int, name: str) -> str:
    """A variable from the environment with which the process was started; "" if unset."""
    import psutil

    try:
        return str(psutil.Process(pid).environ().get(name, ""))
    except psutil.Error:
        return ""


def is_stopped(pid: int) -> bool:
    """True while the process is stopped by a signal (SIGSTOP)."""
    import psutil

    try:
        return bool(psutil.Process(pid).status() == psutil.STATUS_STOPPED)
    except (psutil.Error, OSError):  # too many open files: whoever asks looks again
        return False


def marked(
    name: str,
    value: str,
    *,
    leader: int = 0,
    since: float = 0.0,
    known: Iterable[ProcessId] = (),
) -> list[psutil.Process]:
    """All living processes that were started with ``name=value``, and their descendants.

    leader: adds the processes of its process session that started after `since` (Unix time
    in s), since a process that changes its title, as SGLang's ranks do, overwrites its
    variables. known: others of the family, as far as they still run.
    """
    import psutil

    members = []
    living = {each.pid for each in known if is_same(each)}
    for candidate in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if candidate.pid in living:
                members.append(candidate)
                continue
            in_session = leader and os.getsid(candidate.pid) == leader
            is_recent = in_session and candidate.create_time() >= since - SAME_PROCESS
            if is_recent or candidate.environ().get(name) == value:
                members.append(candidate)
    return [member for member in _living(_family(members)) if member.pid != os.getpid()]


def shared_memory(processes: Iterable[psutil.Process], since: float = 0.0) -> set[Path]:
    """Files of shared memory that these processes made, which stay if they are killed.

    Only files with names that SGLang, its libraries and nsys choose, made after `since` (Unix
    time in s). Others may be in use as well, such as a model that a user keeps in /dev/shm.
    """
    files = set()
    for process in processes:
        with contextlib.suppress(OSError):
            maps = Path(f"/proc/{process.pid}/maps").read_text(errors="replace")
            files |= {Path(name) for name in _SHARED_FILE.findall(maps)}
    return {file for file in files if _made_since(file, since)}


def named_shared_memory(names: Iterable[str], since: float) -> set[Path]:
    """Those of these names that are such files, made after `since` (Unix time in s)."""
    files = {Path(name) for name in names if _SHARED_FILE.fullmatch(name)}
    return {file for file in files if _made_since(file, since)}


def remove_shared_memory(files: Iterable[Path]) -> None:
    """Removes the files that no process uses any more."""
    import psutil

    left = set(files)
    used = shared_memory(psutil.process_iter()) if left else set()
    for file in left - used:
        with contextlib.suppress(OSError):
            file.unlink()


def _made_since(file: Path, since: float) -> bool:
    with contextlib.suppress(OSError):
        status = file.lstat()
        return status.st_uid == os.getuid() and status.st_ctime >= since - SAME_PROCESS
    return False


def topmost(processes: Iterable[psutil.Process]) -> list[int]:
    """Pids of the processes whose parent is not among `processes`."""
    import psutil

    parents = {}
    for process in processes:
        with contextlib.suppress(psutil.Error):
            parents[process.pid] = process.ppid()
    return [pid for pid, parent in parents.items() if parent not in parents]


def descendants(pid: int) -> list[psutil.Process]:
    """All living descendants of `pid`, parents before children; [] if it does not exist."""
    import psutil

    try:
        children = psutil.Process(pid).children(recursive=True)
    except psutil.Error:
        return []
    return [process for process in children if not _is_zombie(process)]


def ancestors(pid: int) -> list[int]:
    """`pid` and the processes above it, as far as they are known."""
    import psutil

    try:
        return [pid, *(parent.pid for parent in psutil.Process(pid).parents())]
    except psutil.Error:
        return [pid]


def terminate_tree(pids: Iterable[int], grace: float) -> list[int]:
    """Ends the processes and all their descendants; returns pids that are still alive.

    First only the roots get SIGTERM and `grace` s, so that a server can end its ranks itself.
    Then the rest of the trees gets SIGTERM and a second, then SIGKILL.
    """
    this = os.getpid()
    roots = [process for pid in pids if (process := _process(pid)) and pid != this]
    # Before a root ends, since it has no children afterwards.
    family = _family(roots)
    _signal(roots, "terminate")
    wait_gone(roots, grace)
    family = _family(family)
    rest = _living(family)
    if rest:
        _signal(rest, "terminate")
        wait_gone(rest, min(grace, TERM_WAIT))
        rest = _living(_family(family))
        _signal(rest, "kill")
        wait_gone(rest, KILL_WAIT)
    return sorted(process.pid for process in _living(family))


def kill_all(processes: Iterable[psutil.Process], wait: float = KILL_WAIT) -> list[int]:
    """Sends SIGKILL to the processes; returns pids that are still alive after `wait` s."""
    living = _living(processes)
    _signal(living, "kill")
    return [process.pid for process in wait_gone(living, wait)]


def of_session(leader: int) -> list[psutil.Process]:
    """Descendants of this process in the process session of `leader`, which may be dead."""
    members = []
    for process in descendants(os.getpid()):
        with contextlib.suppress(OSError):
            if os.getsid(process.pid) == leader:
                members.append(process)
    return members


def wait_gone(processes: Iterable[psutil.Process], timeout: float) -> list[psutil.Process]:
    """Waits until the processes are gone or zombies; returns those that still run."""
    deadline = time.monotonic() + timeout
    living = _living(processes)
    while living and time.monotonic() < deadline:
        time.sleep(0.05)
        living = _living(living)
    return living


def scheduler_ranks(root_pid: int) -> dict[int, Rank]:
    """pid -> rank of `root_pid` and its descendants, as far as they are schedulers.

    Read from the titles of live processes (``sglang::scheduler_DP0_TP1``), since an nsys report
    cuts them to 15 characters.
    """
    import psutil

    ranks: dict[int, Rank] = {}
    root = _process(root_pid)
    for process in [*([root] if root else []), *descendants(root_pid)]:
        try:
            title = " ".join(process.cmdline())
        except psutil.Error:
            continue
        # Only a title counts: the name may also be an argument of another program.
        if title.startswith("sglang::scheduler") and (rank := Rank.from_process_title(title)):
            ranks[process.pid] = rank
    return dict(sorted(ranks.items(), key=lambda item: (item[1].sort_key, item[0])))


def _process(pid: int) -> psutil.Process | None:
    import psutil

    try:
        return psutil.Process(pid)
    except psutil.Error:
        return None


def _family(roots: Iterable[psutil.Process]) -> list[psutil.Process]:
    members: dict[int, psutil.Process] = {}
    for root in roots:
        members[root.pid] = root
        if root.is_running():
            for process in descendants(root.pid):
                members.setdefault(process.pid, process)
    return list(members.values())


def _living(processes: Iterable[psutil.Process]) -> list[psutil.Process]:
    return [process for process in processes if process.is_running() and not _is_zombie(process)]


def _is_zombie(process: psutil.Process) -> bool:
    import psutil

    try:
        return bool(process.status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True
    except psutil.Error:
        return False


def _signal(processes: Iterable[psutil.Process], action: str) -> None:
    import psutil

    for process in processes:
        with contextlib.suppress(psutil.Error):
            getattr(process, action)()


# Signals that ask this process to end.


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Ignores Ctrl-C and other requests to end during the block, which ends by itself."""
    # A function, since processes that are started meanwhile would inherit SIG_IGN.
    with _handled(_ENDINGS, lambda number, frame: None):
        yield


@contextlib.contextmanager
def ended_in_order() -> Iterator[None]:
    """Makes SIGTERM, SIGQUIT and SIGHUP (a lost connection) end the block as Ctrl-C does."""
    with _handled(_ENDINGS[1:], signal.default_int_handler):
        yield


_ENDINGS = (signal.SIGINT, signal.SIGTERM, signal.SIGQUIT, signal.SIGHUP)


@contextlib.contextmanager
def _handled(
    numbers: Sequence[signal.Signals], handler: Callable[[int, FrameType | None], Any]
) -> Iterator[None]:
    """Handles these signals by `handler`, except those that are ignored, as by `nohup`."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    heard = [each for each in numbers if signal.getsignal(each) is not signal.SIG_IGN]
    before = {number: signal.signal(number, handler) for number in heard}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)
