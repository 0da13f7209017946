"""The keeper's parts that need no server: GPUs, the handover, the log pump, its clock."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
import types
from pathlib import Path

import pytest

from pytest_sglprof._errors import SettingsError
from pytest_sglprof._redact import learn
from pytest_sglprof._server.command import EXEC_STEP
from pytest_sglprof._server.keeper import life
from pytest_sglprof._server.keeper.life import MAX_LINE, LogPump, hand_over
from pytest_sglprof._server.log import ServerLog
from pytest_sglprof._server.starting import ReadyClock, died


def test_visible_gpus_and_the_choice_among_them():
    assert life.visible_gpus({"CUDA_VISIBLE_DEVICES": "4, 5,GPU-ab"}) == ["4", "5", "GPU-ab"]
    assert life.visible_gpus({"CUDA_VISIBLE_DEVICES": "-1"}) == []
    assert life.choose_gpus("all", ["4", "5"]) == ["4", "5"]
    assert life.choose_gpus((1,), ["4", "5"]) == ["5"]
    with pytest.raises(SettingsError, match="device 2 does not exist"):
        life.choose_gpus((0, 2), ["4", "5"])


def test_nvml_is_asked_for_our_pids_only(monkeypatch):
    class FakeError(Exception):
        pass

    ended = []
    nvml = types.SimpleNamespace(
        NVMLError=FakeError,
        nvmlInit=lambda: None,
        nvmlShutdown=lambda: ended.append(1),
        nvmlDeviceGetCount=lambda: 2,
        nvmlDeviceGetHandleByIndex=lambda index: index,
        nvmlDeviceGetUUID=lambda index: f"GPU-{index}",
        nvmlDeviceGetComputeRunningProcesses=lambda index: [
            types.SimpleNamespace(pid=10 + index),
            types.SimpleNamespace(pid=99),
        ],
    )
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    assert life.processes_on_gpus([11, 10, 5]) == [10, 11]
    assert ended == [1]
    nvml.nvmlInit = lambda: (_ for _ in ()).throw(FakeError())
    assert life.processes_on_gpus([11]) == []
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert life.processes_on_gpus([11]) == []


def test_what_is_handed_over_arrives_and_its_fifo_goes(tmp_path):
    fifo = tmp_path / "f"
    os.mkfifo(fifo)
    read = []
    thread = threading.Thread(target=lambda: read.append(fifo.read_text()))
    timer = threading.Timer(0.1, thread.start)
    timer.start()
    assert hand_over(fifo, {"args": ["é"]}, alive=lambda: True, timeout=10)
    timer.join()
    thread.join()
    assert json.loads(read[0]) == {"args": ["é"]}
    assert not fifo.exists()


def test_nobody_takes_it(tmp_path):
    for alive, timeout in ((lambda: False, 10), (lambda: True, 0.1)):
        fifo = tmp_path / "f"
        os.mkfifo(fifo)
        assert not hand_over(fifo, {}, alive=alive, timeout=timeout)
        assert not fifo.exists()
    with pytest.raises(FileNotFoundError):
        hand_over(tmp_path / "none", {}, alive=lambda: True, timeout=1)


@pytest.mark.usefixtures("secrets_end_here")
def test_the_pump_hides_keys_and_keeps_everything_else(tmp_path):
    log = tmp_path / "server.log"
    log.write_bytes(b"before\n")
    learn(["key-one", "key-one-longer"])
    pump = LogPump(tmp_path / "f", log)
    with (tmp_path / "f").open("wb") as first:
        first.write(b"api_key='key-one'\nsplit key-")
        first.flush()
        time.sleep(0.05)
        first.write(b"one-longer\n\xff\x00bytes\n")
    with (tmp_path / "f").open("wb") as second:  # the pump does not end between two writers
        second.write(b"no line end")
    pump.close()
    assert log.read_bytes() == (
        b"before\napi_key='<redacted>'\nsplit <redacted>\n\xff\x00bytes\nno line end"
    )
    assert not (tmp_path / "f").exists()


def test_a_full_disk_does_not_stop_the_server_at_its_log(tmp_path):
    pump = LogPump(tmp_path / "f", Path("/dev/full"))
    with (tmp_path / "f").open("wb") as server:
        for _ in range(64):  # 4 MB, far more than a fifo holds
            server.write(b"a line of a log\n" * 4096)
    pump.close()
    why = "/dev/full could not be written: No space left on device"
    assert pump.problems == (f"{why} (it lacks 4,194,304 bytes)",)


@pytest.mark.usefixtures("secrets_end_here")
def test_fault_c_a_secret_across_the_cut_of_an_endless_line_is_hidden(tmp_path):
    learn(["the-secret-value"])
    pump = LogPump(tmp_path / "f", tmp_path / "log")
    with (tmp_path / "f").open("wb") as server:
        server.write(b"x" * (MAX_LINE - 4) + b"the-secret-value" + b"y" * MAX_LINE)
    pump.close()
    written = (tmp_path / "log").read_bytes()
    assert written == b"x" * (MAX_LINE - 4) + b"<redacted>" + b"y" * MAX_LINE


@pytest.mark.usefixtures("secrets_end_here")
def test_fault_c_so_is_one_behind_others_in_the_same_line(tmp_path):
    value = b"the-secret-value-that-is-longer-than-what-stands-for-it"
    learn([value.decode()])
    pump = LogPump(tmp_path / "f", tmp_path / "log")
    with (tmp_path / "f").open("wb") as server:
        server.write(value * 8 + b"x" * MAX_LINE + value[:20])
        server.flush()
        time.sleep(0.5)  # the pump writes what it has of the endless line
        server.write(value[20:] + b"\n")
        server.write(b"next\n")
    pump.close()
    written = (tmp_path / "log").read_bytes()
    assert written.count(b"<redacted>") == 9
    assert b"the-secret" not in written
    assert written.endswith(b"<redacted>\nnext\n")


def test_the_exec_step_is_plain_python_and_becomes_a_module(tmp_path):
    """Run by path, with a package of its own folder's names in sight: none is shadowed."""
    (tmp_path / "target.py").write_text(
        "import os, sys, json\n"
        "import log\n"
        "from pathlib import Path\n"
        "print(json.dumps([sys.argv[1:], os.environ['A_TOKEN'], log.NAME, __name__]))\n"
        "assert b'A_TOKEN' not in Path('/proc/self/environ').read_bytes()\n"
    )
    (tmp_path / "log.py").write_text("NAME = 'mine'\n")
    fifo, out, pid_file = tmp_path / "f", tmp_path / "out", tmp_path / "pid"
    os.mkfifo(fifo)
    child = subprocess.Popen(
        [sys.executable, str(EXEC_STEP), str(fifo), "module", "target", "--tp", "2"],
        env={"PYTHONPATH": str(tmp_path), "PATH": os.environ["PATH"]},
    )
    given = {
        "environ": {"A_TOKEN": "t"},
        "args": ["--api-key", "K"],
        "log": str(out),
        "pid_file": str(pid_file),
    }
    assert hand_over(fifo, given, alive=lambda: child.poll() is None, timeout=20)
    assert child.wait(20) == 0
    assert json.loads(out.read_text()) == [["--tp", "2", "--api-key", "K"], "t", "mine", "__main__"]
    assert int(pid_file.read_text()) == child.pid


def test_the_exec_step_serves_where_sglang_can(tmp_path):
    package = tmp_path / "sglang" / "cli"
    package.mkdir(parents=True)
    (tmp_path / "sglang" / "__init__.py").touch()
    (package / "__init__.py").touch()
    (package / "main.py").write_text("import sys\n\ndef main():\n    return len(sys.argv)\n")
    fifo = tmp_path / "f"
    os.mkfifo(fifo)
    child = subprocess.Popen(
        [sys.executable, str(EXEC_STEP), str(fifo), "serve", "--tp", "2"],
        env={"PYTHONPATH": str(tmp_path), "PATH": os.environ["PATH"]},
    )
    given = {"args": ["--api-key", "K"], "pid_file": str(tmp_path / "pid")}
    assert hand_over(fifo, given, alive=lambda: child.poll() is None, timeout=20)
    assert child.wait(20) == 6  # sglang serve --tp 2 --api-key K


def test_a_still_log_gets_the_limit_and_a_moving_one_four_times_that():
    still = ReadyClock(100, now=0)
    for second in range(100):
        still.saw(7, second)
        assert not still.is_over(second)
    assert still.is_over(100)
    moving = ReadyClock(100, now=1000)
    last = next(s for s in range(1000, 2000) if moving.saw(s, s) or moving.is_over(s))
    assert last == 1400
    stopped = ReadyClock(100, now=0)
    for second in range(95):
        stopped.saw(second, second)
    stopped.saw(94, 110)
    assert not stopped.is_over(118)
    assert stopped.is_over(120)


def test_a_keeper_that_is_told_nonsense_says_so_by_its_status():
    keeper = [sys.executable, "-m", "pytest_sglprof._server.keeper"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    for text in ("", '{"op": "stop"}\n', "no json\n"):
        answer = subprocess.run(
            keeper, input=text, capture_output=True, text=True, timeout=30, env=environment
        )
        assert (answer.returncode, answer.stdout) == (2, "")


def test_a_server_whose_folder_was_removed_did_not_run_out_of_memory(tmp_path):
    log = ServerLog(tmp_path / "server.1" / "server.log")
    assert "server.1 is gone" in died(log, -9).hint
    log.path.parent.mkdir()
    assert "ran out of memory" in died(log, -9).hint
