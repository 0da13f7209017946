"""Why a server died: the line that names the cause stands before its aftermath."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from pytest_sglprof._server.death import describe_status, explain_status
from pytest_sglprof._server.log import ServerLog
from pytest_sglprof._server.starting import died, starting_death


def reason_of(folder: Path, text: str) -> list[str]:
    (folder / "server.log").write_text(text)
    return list(ServerLog(folder / "server.log").reason())


# What each case of cases/server is about: the last line of the reason has the first text, and no
# line has the second.
SHARED = {
    "D01_tcpstore.log": ("address already in use", "sigquit"),
    "D02_offline_hub.log": ("OfflineModeIsEnabled: Cannot reach", "runpy"),
    "D03_ray_prefix.log": ("RuntimeError: Not enough memory.", "SIGQUIT"),
    "D04_srun_prefix.log": ("expert count 256 is not divisible by ep size 6", "SIGQUIT"),
    "D06_argparse_choice.log": ("invalid choice: 'flashinfer2'", "usage"),
    "D08_gpu_not_idle.log": ("ValueError: The memory capacity is unbalanced.", "SIGQUIT"),
    "D10_oom_killer.log": ("Exit code: -9", "EOFError"),
}


@pytest.mark.parametrize("name", SHARED)
def test_public_reports(shared_data, name):
    log = ServerLog(shared_data.parent / "cases" / "server" / name)
    cause, aftermath = SHARED[name]
    reason = log.reason()
    assert cause in reason[-1]
    assert not any(aftermath in line for line in reason)


def test_d10_host_memory_is_named_with_what_to_do(shared_data):
    log = ServerLog(shared_data.parent / "cases" / "server" / "D10_oom_killer.log")
    assert "scheduler is dead" in log.reason()[0]
    for error in (died(log, 1), starting_death(log, 1, 3.0)):
        assert "-9 is SIGKILL" in error.hint
        assert "out of memory" in error.hint
        assert "dmesg" in error.hint
        assert str(log.path) in error.hint


EOF = """\
Traceback (most recent call last):
  File "/opt/sglang/engine.py", line 700, in _launch_subprocesses
    data = reader.recv()
  File "/usr/lib/python3.11/multiprocessing/connection.py", line 250, in recv
    buf = self._recv_bytes()
EOFError
"""
RESET = """\
[2026-08-31 10:00:09 TP0] Scheduler hit an exception: Traceback (most recent call last):
  File "/opt/sglang/scheduler.py", line 100, in run_scheduler_process
    scheduler.event_loop()
torch.distributed.DistBackendError: NCCL error: remote process exited or there was a network error
ConnectionResetError: [Errno 104] Connection reset by peer

[2026-08-31 10:00:09] SIGQUIT received. signum=None, frame=None. It usually means one child failed.
"""
THREADS = """\
Fatal Python error: {fault}

Thread 0x00007f1e00000001 (most recent call first):
  File "/usr/lib/python3.11/threading.py", line 331 in wait
  File "/usr/lib/python3.11/threading.py", line 629 in wait

{current} (most recent call first):
  File "/opt/sglang/srt/layers/moe/fused_moe.py", line 87 in forward
  File "/opt/sglang/srt/managers/scheduler.py", line 2400 in run_batch

Thread 0x00007f1e00000003 (most recent call first):
  File "/opt/other.py", line 1 in later

Extension modules: numpy.core._multiarray_umath, torch._C (total: 214)
"""
CURRENT = "Current thread 0x00007f1e00000002"
FRAME = '  File "/opt/sglang/srt/layers/moe/fused_moe.py", line 87 in forward'


@pytest.mark.parametrize(
    "fault",
    [
        "Segmentation fault",
        "Bus error",
        "Illegal instruction",
        "Aborted",
        "Floating-point exception",
    ],
)
@pytest.mark.parametrize("current", [CURRENT, f"{CURRENT} [python]"])
def test_a_fault_is_told_with_the_frame_of_the_current_thread(tmp_path, fault, current):
    text = THREADS.format(fault=fault, current=current)
    assert reason_of(tmp_path, text + RESET + EOF) == [FRAME, f"Fatal Python error: {fault}"]
    assert reason_of(tmp_path, RESET + EOF + text) == [FRAME, f"Fatal Python error: {fault}"]


def test_the_first_rank_that_ended_is_told_not_the_last_two_that_it_took_along(tmp_path):
    later = "".join(
        f"[2026-08-31 10:00:0{n} TP{n}] Scheduler hit an exception: {_traceback(f'later {n}')}"
        for n in range(1, 5)
    )
    reason = reason_of(tmp_path, THREADS.format(fault="Bus error", current=CURRENT) + later)
    assert reason[:2] == [FRAME, "Fatal Python error: Bus error"]
    assert not any("later 4" in line for line in reason)


def _traceback(message: str) -> str:
    return (
        "Traceback (most recent call last):\n"
        '  File "/opt/sglang/scheduler.py", line 7, in run\n'
        "    step()\n"
        f"RuntimeError: {message}\n\n"
    )


# Text of a log, what the reason has in this order, and what it must not have.
CASES = {
    "killed at the start, SGLang 0.5.14 and newer": (
        EOF + "\nThe above exception was the direct cause of the following exception:\n\n"
        "Traceback (most recent call last):\n"
        '  File "/opt/sglang/engine.py", line 800, in _wait_for_scheduler_ready\n'
        "    raise _scheduler_died_error(i, procs[i])\n"
        "RuntimeError: Rank 3 scheduler died during initialization (exit code: -9). If exit code "
        "is -9 (SIGKILL), a common cause is the OS OOM killer.\n",
        ["_wait_for_scheduler_ready", "Rank 3 scheduler died during initialization"],
        "EOFError",
    ),
    "killed while it ran": (
        "[2026-08-31 10:00:00 TP0] Decode batch, #running-req: 8\n"
        "[2026-08-31 10:00:01] Subprocess scheduler_1 (pid=77) crashed with exit code -9. "
        "Triggering SIGQUIT for cleanup...\n"
        "[2026-08-31 10:00:01] SIGQUIT received. signum=None, frame=None.\n",
        ["crashed with exit code -9"],
        "frame=None",
    ),
    "SGLang 0.4": (
        "[2026-08-31 10:00:00] Child process unexpectedly failed with an exit code 9. pid=77\n"
        + EOF,
        ["unexpectedly failed with an exit code 9"],
        "EOFError",
    ),
    "a replica's controller": (
        "[2026-08-31 10:00:00] Scheduler or DataParallelController 77 terminated with -11\n" + EOF,
        ["77 terminated with -11"],
        "EOFError",
    ),
    "a limit of a container": (
        "[1234.5] Memory cgroup out of memory: Killed process 77 (sglang::schedul) total-vm:1kB\n"
        "[1234.6] Tasks in /kubepods/pod1 are going to be killed due to memory.oom.group set\n"
        + EOF,
        ["Memory cgroup out of memory", "memory.oom.group set"],
        "EOFError",
    ),
    "C++": (
        "terminate called after throwing an instance of 'c10::Error'\n"
        "  what():  CUDA error: an illegal memory access was encountered\n"
        "CUDA kernel errors might be asynchronously reported at some other API call\n"
        + THREADS.format(fault="Aborted", current=CURRENT)
        + RESET,
        ["terminate called", "an illegal memory access", "line 87", "Fatal Python error: Aborted"],
        "remote process exited",
    ),
    "an assertion in C": (
        "python3: /src/kernels/moe.cu:90: void launch(int): Assertion `n > 0' failed.\n"
        + RESET
        + EOF,
        ["Assertion `n > 0' failed"],
        "Connection reset",
    ),
    "a device-side assertion": (
        "/src/Indexing.cu:1290: block: [3,0,0], thread: [1,0,0] Assertion `i < n` failed.\n"
        "[2026-08-31 10:00:00 TP1] Scheduler hit an exception: "
        + _traceback("CUDA error: device-side assert triggered")
        + RESET,
        ["Assertion `i < n` failed", "TP1] Scheduler hit", "device-side assert triggered"],
        "TP0",
    ),
    "the allocator of C": ("double free or corruption (!prev)\n" + RESET, ["double free"], "peer"),
    "NCCL's watchdog": (
        "[rank1]:[E831 10:00:00.1 ProcessGroupNCCL.cpp:629] [Rank 1] Watchdog caught collective "
        "operation timeout: WorkNCCL(SeqNum=7, OpType=ALLREDUCE) ran for 600000 milliseconds\n"
        "terminate called after throwing an instance of 'c10::DistBackendError'\n"
        "  what():  [PG ID 2 Rank 1] Process group watchdog thread terminated with exception\n"
        + RESET,
        ["Watchdog caught collective operation timeout", "DistBackendError", "what():"],
        "remote process exited",
    ),
    "a worker of Ray": (
        "(raylet) A worker died or was killed while executing a task by an unexpected system "
        "error. Worker ID: 7f Node IP: 10.0.0.1 Worker exit type: SYSTEM_ERROR\n" + EOF,
        ["A worker died or was killed"],
        "EOFError",
    ),
    "ranks of srun that write into each other": (
        "1: [2026-08-31 10:00:00 TP1] Scheduler hit an exception: "
        "Traceback (most recent call last):\n"
        "0: [2026-08-31 10:00:00 TP0] Scheduler hit an exception: "
        "Traceback (most recent call last):\n"
        '1:   File "/opt/a.py", line 1, in cause\n'
        '0:   File "/opt/b.py", line 2, in effect\n'
        "1:     x()\n"
        "0:     y()\n"
        "1: ValueError: the cause\n"
        "0: RuntimeError: Connection closed by peer\n",
        ["TP1]", "in cause", "ValueError: the cause"],
        "b.py",
    ),
    "compose": (
        "server-1  | [2026-08-31 10:00:00 TP1] Scheduler hit an exception: "
        "Traceback (most recent call last):\n"
        'server-1  |   File "/opt/a.py", line 1, in cause\n'
        "server-1  |     x()\n"
        "server-1  | KeyError: 'layer.7'\n"
        "proxy-1   | upstream prematurely closed connection\n",
        ["TP1]", "in cause", "KeyError: 'layer.7'"],
        "proxy",
    ),
    "Kubernetes": (
        "2026-08-31T10:00:00.123456789Z [2026-08-31 10:00:00 TP1] Scheduler hit an exception: "
        "Traceback (most recent call last):\n"
        '2026-08-31T10:00:00.123456790Z   File "/opt/a.py", line 1, in cause\n'
        "2026-08-31T10:00:00.123456791Z KeyError: 'layer.7'\n",
        ["TP1]", "in cause", "KeyError: 'layer.7'"],
        "10:00:00.1",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_the_cause_stands_before_its_aftermath(tmp_path, name):
    text, causes, aftermath = CASES[name]
    reason = reason_of(tmp_path, text)
    places = [next(at for at, line in enumerate(reason) if cause in line) for cause in causes]
    assert places == sorted(places)
    assert len(reason) <= len(causes) + 1
    assert not any(aftermath in line for line in reason)


# Programs whose end Python itself words.
PROGRAMS = {
    "a chain": (
        "def load(): raise KeyError('root')\n"
        "try:\n    load()\n"
        "except KeyError as error:\n"
        "    try: raise ValueError('middle') from error\n"
        "    except ValueError as last: raise RuntimeError('top') from last\n",
        ["in <module>", "RuntimeError: top", "in load", "KeyError: 'root'"],
    ),
    "an exception while another was handled": (
        "try:\n    {}['x']\nexcept KeyError:\n    raise RuntimeError('no shard')\n",
        ["in <module>", "RuntimeError: no shard", "in <module>", "KeyError: 'x'"],
    ),
    "notes": (
        "error = ValueError('boom')\nerror.add_note('while loading shard 3')\nraise error\n",
        ["in <module>", "ValueError: boom while loading shard 3"],
    ),
    "a marker below the frame": (
        "def f(a):\n    return (1 +\n            a['b']['c'])\nf({'b': {}})\n",
        ["in f", "KeyError: 'c'"],
    ),
    "recursion": ("def f(): f()\nf()\n", ["in f", "RecursionError"]),
    "syntax": ("exec('a =')\n", ["line 1", "SyntaxError"]),
    "aftermath of itself": (
        "try:\n    raise EOFError('pipe')\n"
        "except EOFError as error:\n    raise RuntimeError('rank 1 is gone') from error\n",
        ["in <module>", "RuntimeError: rank 1 is gone"],
    ),
}
GROUPS = {
    "a group": (
        "def load(): raise ValueError('inner cause')\n"
        "try:\n    load()\n"
        "except ValueError as error:\n"
        "    raise ExceptionGroup('tasks', [EOFError('x'), error, OSError('y')])\n",
        ["in load", "ValueError: inner cause"],
    ),
    "a group in a group": (
        "raise ExceptionGroup('outer', [\n"
        "    ValueError('shallow'), ExceptionGroup('inner', [RuntimeError('deep')])])\n",
        ["RuntimeError: deep"],
    ),
    "a group that causes another exception": (
        "try:\n    raise ExceptionGroup('tasks', [ValueError('inner')])\n"
        "except ExceptionGroup as error:\n    raise RuntimeError('top') from error\n",
        ["in <module>", "RuntimeError: top", "ValueError: inner"],
    ),
    "a group of aftermath alone": (
        "raise ExceptionGroup('tasks', [ConnectionResetError('peer'), EOFError('x')])\n",
        ["ConnectionResetError: peer"],
    ),
}


def end_of(folder: Path, program: str) -> list[str]:
    """The reason in the log of a program that ends."""
    file = folder / "program.py"
    file.write_text(program)
    ended = subprocess.run([sys.executable, file], capture_output=True, text=True, check=False)
    assert ended.returncode
    return reason_of(folder, ended.stderr)


@pytest.mark.parametrize("name", PROGRAMS)
def test_exceptions_of_python(tmp_path, name):
    program, shown = PROGRAMS[name]
    reason = end_of(tmp_path, program)
    assert len(reason) == len(shown)
    assert all(text in line for text, line in zip(shown, reason, strict=True))


@pytest.mark.skipif(sys.version_info < (3, 11), reason="no groups of exceptions before 3.11")
@pytest.mark.parametrize("name", GROUPS)
def test_the_innermost_exception_of_a_group(tmp_path, name):
    program, shown = GROUPS[name]
    reason = end_of(tmp_path, program)
    assert len(reason) == len(shown)
    assert all(text in line for text, line in zip(shown, reason, strict=True))


@pytest.mark.skipif(sys.version_info < (3, 11), reason="no groups of exceptions before 3.11")
def test_a_group_that_only_failed_a_request_is_no_cause(tmp_path):
    file = tmp_path / "program.py"
    file.write_text("raise ExceptionGroup('tasks', [ValueError('bad request')])\n")
    ended = subprocess.run([sys.executable, file], capture_output=True, text=True, check=False)
    text = f"[2026-08-31 10:00:00] ERROR:    Exception in ASGI application\n{ended.stderr}"
    reason = reason_of(tmp_path, text + "[2026-08-31 10:00:09] Received sigterm\n")
    assert reason == ["[2026-08-31 10:00:09] Received sigterm"]


@pytest.mark.parametrize("number", ["SIGSEGV", "SIGBUS", "SIGILL", "SIGABRT", "SIGFPE"])
def test_real_faults(tmp_path, number):
    program = (
        "import faulthandler, os, signal, threading\n"
        "faulthandler.enable()\n"
        "threading.Thread(target=threading.Event().wait, daemon=True).start()\n"
        f"def crash(): os.kill(os.getpid(), signal.{number})\n"
        "crash()\n"
    )
    frame, fault = end_of(tmp_path, program)
    assert "line 4 in crash" in frame
    assert fault.startswith("Fatal Python error: ")


@pytest.mark.parametrize(
    ("status", "words"),
    [
        (None, "exit status unknown"),
        (1, "exit status 1"),
        (-9, "exit status -9, SIGKILL"),
        (137, "exit status 137, SIGKILL"),
        (-11, "exit status -11, SIGSEGV"),
        (-1000, "exit status -1000"),
        (128, "exit status 128"),
    ],
)
def test_statuses(status, words):
    assert describe_status(status) == words


@pytest.mark.parametrize(
    ("status", "lines", "meaning"),
    [
        (-9, [], "-9 is SIGKILL.*out of memory; dmesg"),
        (137, [], "137 is SIGKILL"),
        (-9, ["[.. TP0] Scheduler hit an exception: Traceback"], "a scheduler has failed: the log"),
        (-7, [], "-7 is SIGBUS.*/dev/shm"),
        (1, ["[..] Exit code: -9"], "-9 is SIGKILL"),
        (1, ["Subprocess x (pid=7) crashed with exit code -7."], "-7 is SIGBUS"),
        (1, ["RuntimeError: Rank 3 scheduler died (exit code: -9)."], "-9 is SIGKILL"),
        (None, ["Scheduler 77 terminated with -9"], "-9 is SIGKILL"),
        (1, [], "^$"),
        (-11, ["Exit code: 1"], "^$"),
        (None, [], "^$"),
    ],
)
def test_what_a_status_means(status, lines, meaning):
    import re

    assert re.search(meaning, explain_status(status, lines))
