from __future__ import annotations

from pathlib import Path

import pytest

from pytest_sglprof._redact import HIDDEN, learn
from pytest_sglprof._server.log import MAX_LINE, ServerLog, StartGrowth


@pytest.fixture
def log(tmp_path: Path) -> ServerLog:
    return ServerLog(tmp_path / "server.log")


def test_no_file_is_an_empty_log(log):
    assert (log.position(), list(log.each()), log.last_line(), log.reason()) == (0, [], "", ())


def test_lines_are_read_on_from_an_offset_and_only_when_complete(log):
    log.path.write_bytes(b"one\ntwo\nthr")
    lines, offset = log.read()
    assert lines == ["one", "two"]
    with log.path.open("ab") as stream:
        stream.write(b"ee\n")
    assert log.read(offset) == (["three"], log.position())
    assert list(log.each(log.position())) == []


def test_bad_bytes_and_progress_bars_are_tolerated(log):
    log.path.write_bytes(b"\xff\xfe bad\nload 1%\rload 100%\r\nend\n")
    assert list(log.each()) == ["\ufffd\ufffd bad", "load 100%", "end"]


@pytest.mark.usefixtures("secrets_end_here")
def test_secrets_do_not_leave_the_log(tmp_path):
    path = tmp_path / "server.log"
    path.write_text("server_args={'api_key': 'sk-1', 'admin_api_key': \"x'y\"} token hunter22\n")
    learn(["hunter22"])
    line = ServerLog(path).last_line()
    assert "sk-1" not in line
    assert "x'y" not in line
    assert "hunter22" not in line
    assert line.count(HIDDEN) == 3


def test_long_lines_are_cut_where_they_are_shown(log):
    log.path.write_text("x" * 5000 + "\n")
    assert len(log.last_line()) == MAX_LINE


@pytest.mark.parametrize(
    ("name", "exception"),
    [
        ("crash_gpu_activity.log", "AssertionError: No activities specified for the profiler"),
        ("crash_prefix_slash.log", "FileNotFoundError: [Errno 2] No such file or directory: "),
        ("tp1/server.log", "FileNotFoundError: [Errno 2] No such file or directory: '/proc/nope/"),
    ],
)
def test_the_reason_of_a_real_crash_is_its_exception(shared_data, name, exception):
    reason = ServerLog(shared_data / "logs" / name).reason()
    assert reason[-1].startswith(exception)
    assert any("Scheduler hit an exception" in line for line in reason)
    assert not any("kill_process_tree" in line or "Profiling is not" in line for line in reason)
    assert len(reason) <= 12


def test_a_refused_stop_is_no_reason(shared_data):
    reason = ServerLog(shared_data / "logs" / "dp2_idle_rank.log").reason()
    assert not any("Profiling is not in progress" in line for line in reason)


def test_the_first_rank_to_fail_is_the_reason_not_those_that_lost_it(log):
    log.path.write_text(
        "[2026-11-24 03:28:27 TP1] Scheduler hit an exception: Traceback (most recent call last):\n"
        '  File "a.py", line 1, in run\n'
        "    x()\n"
        "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB\n"
        "GPU 1 has 100 MiB free\n"
        "\n"
        "[2026-11-24 03:28:28 TP0] Scheduler hit an exception: Traceback (most recent call last):\n"
        '  File "b.py", line 2, in run\n'
        "RuntimeError: Connection closed by peer [127.0.0.1]:1234\n"
    )
    reason = log.reason()
    assert reason[-1] == (
        "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB GPU 1 has 100 MiB free"
    )
    assert not any("closed by peer" in line for line in reason)


def test_when_all_lost_a_connection_that_is_the_reason(log):
    log.path.write_text(
        "Traceback (most recent call last):\n"
        '  File "b.py", line 2, in run\n'
        "RuntimeError: Connection closed by peer\n"
    )
    assert log.reason()[-1] == "RuntimeError: Connection closed by peer"


@pytest.mark.parametrize(
    "cause",
    [
        "launch_server.py: error: unrecognized arguments: --tpp 2",
        "[Errno 98] error while attempting to bind on address: address already in use",
        "/usr/bin/python3: No module named sglang",
        "Fatal Python error: Segmentation fault",
        "[2026-11-24 03:28:27 TP0] Watchdog timeout (self.watchdog_timeout=10)",
    ],
)
def test_causes_without_a_traceback(log, cause):
    log.path.write_text(f"start\n{cause}\n[2026-11-24 03:28:27] SIGQUIT received.\nDecode batch\n")
    assert log.reason() == (cause,)


def test_only_what_came_after_an_offset_counts(log):
    log.path.write_text("x: error: old\n")
    start = log.position()
    with log.path.open("a") as stream:
        stream.write('loading weights\n[2026-11-24] INFO "GET /ready HTTP/1.1" 200\n')
    assert log.reason(start) == ("loading weights",)


def test_the_servers_own_word_about_its_end_beats_the_last_lines(log):
    log.path.write_text("hello\n[2026-11-24 03:28:27] SIGQUIT received. signum=None\nbye\n")
    assert log.reason() == ("[2026-11-24 03:28:27] SIGQUIT received. signum=None",)


def test_a_message_over_several_lines_stays_whole_and_a_cut_block_is_told(log):
    log.path.write_text('Traceback (most recent call last):\n  File "a.py", line 1, in x\n')
    assert "Traceback" in " ".join(log.reason())


PROBE = b'INFO:     127.0.0.1:44124 - "GET /health HTTP/1.1" 503 Service Unavailable\n'


def test_answers_to_probes_are_no_progress_of_a_server_that_starts(log):
    growth = StartGrowth(log)
    assert growth.size() == 0
    log.path.write_bytes(b"Load weight begin.\n" + PROBE)
    assert growth.size() == 19
    with log.path.open("ab") as stream:
        stream.write(PROBE.replace(b"health", b"ready") * 3)
    assert growth.size() == 19
    with log.path.open("ab") as stream:
        stream.write(b"Loading: 5%\rLoading: 9%")  # a progress bar, whose line has not ended
    assert growth.size() == 42
