"""Process trees: ended in order, never a stranger, and ranks by their titles."""

from __future__ import annotations

import os
import resource
import secrets
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from pytest_sglprof import _process as process

SLEEP = "import time; time.sleep(600)"
DEAF = """
import signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print("up", flush=True)
time.sleep(600)
"""
PARENT = f"""
import subprocess, sys, time
children = [subprocess.Popen([sys.executable, "-c", {SLEEP!r}]) for _ in range(2)]
print("up", flush=True)
time.sleep(600)
"""
ADOPTER = """
import os, subprocess, sys, time
from pytest_sglprof import _process as process
assert process.adopt_orphans()
child = subprocess.Popen([sys.executable, "-c",
    "import subprocess, sys; subprocess.Popen(['sleep', '2'])"])
child.wait()
assert [p.name() for p in process.descendants(os.getpid())] == ["sleep"]
process.reap_orphans()
orphan, = process.descendants(os.getpid())
assert process.wait_gone([orphan], 20) == []
assert orphan.status() == "zombie"
process.reap_orphans()
assert not orphan.is_running()
process.reap_orphans()
"""


@pytest.fixture
def python():
    started = []

    def start(code: str, title: str = ""):
        found = subprocess.Popen(
            [title or sys.executable, *(["-S"] if title else []), "-c", code],
            executable=sys.executable,
            stdout=subprocess.PIPE,
            start_new_session=True,
        )
        started.append(found)
        # Popen returns during exec, a moment before the kernel knows the new command line.
        while not psutil.Process(found.pid).cmdline():
            time.sleep(0.01)
        if "'up'" in code or '"up"' in code:
            assert found.stdout.readline() == b"up\n"
        return found

    yield start
    for found in started:
        process.terminate_tree([found.pid], 0.1)
        found.wait()
        found.stdout.close()


def test_a_pid_is_a_process_only_with_its_time_of_birth(python):
    child = python(SLEEP)
    created = process.create_time(child.pid)
    assert created is not None
    assert process.is_alive(child.pid, created)
    assert not process.is_alive(child.pid, created - 60)  # somebody else had this pid then
    child.kill()
    while process.create_time(child.pid) is not None:  # a zombie does not live
        time.sleep(0.01)
    assert not process.is_alive(child.pid, created)
    child.wait()
    assert process.descendants(child.pid) == []
    assert process.scheduler_ranks(child.pid) == {}


def test_a_tree_ends_with_its_root(python):
    parent = python(PARENT)
    tree = process.descendants(parent.pid)
    assert len(tree) == 2
    assert process.terminate_tree([parent.pid], 5.0) == []
    assert process.wait_gone(tree, 1.0) == []
    assert process.terminate_tree([parent.pid], 5.0) == []


def test_the_deaf_are_killed(python):
    deaf = python(DEAF)
    began = time.monotonic()
    assert process.terminate_tree([deaf.pid], 0.2) == []
    assert time.monotonic() - began < 3
    assert deaf.wait() == -9


def test_own_process_is_never_ended():
    assert process.terminate_tree([os.getpid()], 0.1) == []


def test_what_cannot_be_killed_is_told(python, monkeypatch):
    deaf = python(DEAF)
    with monkeypatch.context() as patched:
        patched.setattr(process, "KILL_WAIT", 0.1)
        patched.setattr(psutil.Process, "kill", lambda self: None)
        assert process.terminate_tree([deaf.pid], 0.1) == [deaf.pid]
        assert process.kill_all([psutil.Process(deaf.pid)], 0.1) == [deaf.pid]


def test_orphans_are_adopted_and_buried():
    subprocess.run(
        [sys.executable, "-c", ADOPTER],
        check=True,
        timeout=30,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )


def test_ranks_are_read_from_titles(python):
    first = python(SLEEP, "sglang::scheduler_DP0_TP1")
    python(f"sglang = 'sglang::scheduler_TP3'; {SLEEP}")  # only mentions one
    python(SLEEP, "sglang::scheduler_DP0_TP0")
    ranks = process.scheduler_ranks(os.getpid())
    assert [rank.label for rank in ranks.values()] == ["DP0 TP0", "DP0 TP1"]
    assert list(ranks)[1] == first.pid
    assert process.scheduler_ranks(first.pid)[first.pid].label == "DP0 TP1"


def test_members_of_a_session(python):
    parent = python(PARENT)
    python(SLEEP)
    assert len(process.of_session(parent.pid)) == 3


@pytest.mark.parametrize("name", ["python3", "sglang", "nsys"])
def test_fault_4_a_bare_name_is_looked_up_on_the_path_only(tmp_path, monkeypatch, name):
    tools = tmp_path / "tools"
    tools.mkdir()
    (tools / name).write_text("#!/bin/sh\n")
    (tools / name).chmod(0o755)
    here = tmp_path / "here"
    (here / name).mkdir(parents=True)
    monkeypatch.chdir(here)
    for path in (str(tools), f":{tools}", f"{tools}:", f"::{here}:{tools}"):
        monkeypatch.setenv("PATH", path)
        assert process.which(name) == str(tools / name)
    monkeypatch.setenv("PATH", "../tools")
    assert process.which(name) == str(tools / name)
    monkeypatch.setenv("PATH", ":")
    assert process.which(name) is None
    assert process.which(f"../tools/{name}") == str(tools / name)
    assert process.which(f"./{name}") is None
    monkeypatch.delenv("PATH")
    assert process.which("sh") == "/bin/sh" or process.which("sh") == "/usr/bin/sh"
    (here / "link").symlink_to(tools / name)
    assert process.which("./link") == str(here / "link")  # of a venv's python it matters


MAPPER = """
import mmap, sys
for name in sys.argv[1:]:
    with open(name, "r+b") as stream:
        globals().setdefault("kept", []).append(mmap.mmap(stream.fileno(), 0))
print("up", flush=True)
import time; time.sleep(600)
"""


def mapping(*files: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", MAPPER, *map(str, files)]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    assert child.stdout.readline() == "up\n"
    return child


def test_fault_d_shared_memory_of_the_dead_goes_and_that_of_others_stays():
    began = time.time()
    mark = secrets.token_hex(4)
    ours, used, model = (
        Path("/dev/shm") / f"{kind}_{mark}" for kind in ("sgl_shm_mq", "sglang_loads", "model")
    )
    files = (ours, used, model)
    for file in files:
        file.write_bytes(b"x" * 4096)
    first, second = mapping(*files), mapping(used)
    try:
        members = [psutil.Process(first.pid)]
        assert process.shared_memory(members, began) == {ours, used}
        assert process.shared_memory(members, time.time() + 60) == set()  # made before
        process.remove_shared_memory({ours, used})
        assert ours.exists()
        first.kill()
        first.wait()
        process.remove_shared_memory({ours, used})
        assert [file.exists() for file in files] == [False, True, True]
    finally:
        for child in (first, second):
            child.kill()
            child.communicate()
        for file in files:
            file.unlink(missing_ok=True)


def test_who_looks_without_a_free_descriptor_learns_nothing_and_goes_on(python) -> None:
    stopped = python(SLEEP)
    stopped.send_signal(signal.SIGSTOP)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, hard))
    try:
        answer = process.is_stopped(stopped.pid)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert not answer
    assert process.is_stopped(stopped.pid)
