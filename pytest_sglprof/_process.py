"""Process trees: who belongs to a server, how it is ended, which rank a process is.

Every question about a pid carries its creation time as well, since the kernel hands
pids out again.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import shutil
import time
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from pytest_sglprof._ranks import Rank

if TYPE_CHECKING:
    import psutil

KILL_WAIT = 10.0  # s for the kernel to end a killed process; a GPU context takes seconds
TERM_WAIT = 1.0  # s at most for the rest of a tree to obey SIGTERM
SAME_PROCESS = 0.02  # s; psutil derives creation times from clock ticks of 10 ms
_PR_SET_CHILD_SUBREAPER = 36
_SHARED_FILE = re.compile(r"(/dev/shm/(?:sgl|nccl|torch|psm_|sem\.)[\w.-]*)$", re.M)


def adopt_orphans() -> bool:
    """Makes this process the parent of whatever its descendants leave behind.

    nsys starts an agent that detaches itself, and a killed launcher orphans the server:
    with this (Linux's ``PR_SET_CHILD_SUBREAPER``) they all stay in `descendants`.
    False where the system cannot do it.
    """
    try:
        libc = ctypes.CDLL(None, use_errno=True)
        return bool(libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) == 0)
    except (OSError, AttributeError):
        return False


def blank_variables(names: Iterable[str]) -> None:
    """Overwrites variables in this process's environment block, which others may read.

    The block (``/proc/PID/environ``) stays as it was when the process started, and nsys stores
    that of every process that it may read. `os.environ`, C libraries and children that are
    started later have the values all the same.
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

    Poll the children whose status is wanted first: their status is lost here.
    """
    with contextlib.suppress(ChildProcessError):
        while found := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG):
            if found.si_pid == 0:
                break


def which(command: str) -> str | None:
    """The executable file that `command` means, as an absolute path; None where there is none.

    A bare name is looked up on PATH only, a path (with a slash) is taken from the working
    directory. Empty entries of PATH, which shells read as the working directory, are
    mostly an accident and left out: nothing that lies there may stand in for a command.
    """
    folders = [folder for folder in os.get_exec_path() if folder]
    path = shutil.which(command, path=os.pathsep.join(folders))
    return os.path.abspath(path) if path else None  # noqa: PTH100  # must keep a link's name


def create_time(pid: int) -> float | None:
    """When the process started, Unix time in s; None when there is none (or a zombie)."""
    import psutil

    try:
        process = psutil.Process(pid)
        return None if _is_zombie(process) else float(process.create_time())
    except psutil.Error:
        return None


def is_alive(pid: int, created: float) -> bool:
    """True while the very process that started at `created` runs (a zombie does not)."""
    found = create_time(pid)
    return found is not None and abs(found - created) <= SAME_PROCESS


def variable(pid: int, name: str) -> str:
    """A variable of the environment that the process was started with; "" for none."""
    import psutil

    try:
        return str(psutil.Process(pid).environ().get(name, ""))
    except psutil.Error:
        return ""


def is_stopped(pid: int) -> bool:
    """True while the process is frozen by a signal (SIGSTOP)."""
    import psutil

    try:
        return bool(psutil.Process(pid).status() == psutil.STATUS_STOPPED)
    except psutil.Error:
        return False


def marked(name: str, value: str, *, leader: int = 0, since: float = 0.0) -> list[psutil.Process]:
    """All living processes that were started with ``name=value``, and all below them.

    leader: also those of its process session, if they started after `since` (Unix time, s):
    a process that changes its title (SGLang's ranks do) overwrites its variables.
    """
    import psutil

    members = []
    for candidate in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            in_session = leader and os.getsid(candidate.pid) == leader
            is_ours = in_session and candidate.create_time() >= since - SAME_PROCESS
            if is_ours or candidate.environ().get(name) == value:
                members.append(candidate)
    return [member for member in _living(_family(members)) if member.pid != os.getpid()]


def shared_memory(processes: Iterable[psutil.Process], since: float = 0.0) -> set[Path]:
    """Files of shared memory that these processes use and made; a kill leaves them.

    Only what SGLang, its libraries and nsys name themselves, made after `since` (Unix time,
    s): a model that somebody keeps in /dev/shm is used as well, and is nobody's leftover.
    """
    files = set()
    for process in processes:
        with contextlib.suppress(OSError):
            maps = Path(f"/proc/{process.pid}/maps").read_text(errors="replace")
            files |= {Path(name) for name in _SHARED_FILE.findall(maps)}
    return {file for file in files if _made_since(file, since)}


def remove_shared_memory(files: Iterable[Path]) -> None:
    """Removes those of the files that no process uses any more."""
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
    """Pids of those whose parent is not among them."""
    import psutil

    parents = {}
    for process in processes:
        with contextlib.suppress(psutil.Error):
            parents[process.pid] = process.ppid()
    return [pid for pid, parent in parents.items() if parent not in parents]


def descendants(pid: int) -> list[psutil.Process]:
    """All processes below `pid` that live, parents before children; [] when it is gone."""
    import psutil

    try:
        found = psutil.Process(pid).children(recursive=True)
    except psutil.Error:
        return []
    return [process for process in found if not _is_zombie(process)]


def terminate_tree(pids: Iterable[int], grace: float) -> list[int]:
    """Ends the processes and all their descendants; returns pids that are still alive.

    First the roots alone get SIGTERM, so that a server ends its own ranks in order, and
    `grace` s; then what is left of the trees gets SIGTERM and a second; then SIGKILL.
    """
    own = os.getpid()
    roots = [process for pid in pids if (process := _process(pid)) and pid != own]
    # A root that has ended tells no children any more: they are noted before.
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
    """SIGKILLs the processes; returns pids that are still alive after `wait` s."""
    living = _living(processes)
    _signal(living, "kill")
    return [process.pid for process in wait_gone(living, wait)]


def of_session(leader: int) -> list[psutil.Process]:
    """Our own descendants that belong to the process session of `leader`, dead or not."""
    found = []
    for process in descendants(os.getpid()):
        with contextlib.suppress(OSError):
            if os.getsid(process.pid) == leader:
                found.append(process)
    return found


def wait_gone(processes: Iterable[psutil.Process], timeout: float) -> list[psutil.Process]:
    """Waits until the processes are gone or zombies; returns those that are not."""
    deadline = time.monotonic() + timeout
    living = _living(processes)
    while living and time.monotonic() < deadline:
        time.sleep(0.05)
        living = _living(living)
    return living


def scheduler_ranks(root_pid: int) -> dict[int, Rank]:
    """pid -> rank of every scheduler process below `root_pid` (and of itself).

    Read from the live command lines (``sglang::scheduler_DP0_TP1``): an nsys report has
    them cut to 15 characters.
    """
    import psutil

    found: dict[int, Rank] = {}
    root = _process(root_pid)
    for process in [*([root] if root else []), *descendants(root_pid)]:
        try:
            title = " ".join(process.cmdline())
        except psutil.Error:
            continue
        # Only a title counts: the name may also stand among another program's arguments.
        if title.startswith("sglang::scheduler") and (rank := Rank.from_process_title(title)):
            found[process.pid] = rank
    return dict(sorted(found.items(), key=lambda item: (item[1].sort_key, item[0])))


def _process(pid: int) -> psutil.Process | None:
    import psutil

    try:
        return psutil.Process(pid)
    except psutil.Error:
        return None


def _family(roots: Iterable[psutil.Process]) -> list[psutil.Process]:
    found: dict[int, psutil.Process] = {}
    for root in roots:
        found[root.pid] = root
        if root.is_running():
            for process in descendants(root.pid):
                found.setdefault(process.pid, process)
    return list(found.values())


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
