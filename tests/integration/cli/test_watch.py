"""`sglprof watch` on finished logs, on a log that grows, and on a running stand-in."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from pytest_sglprof._cli.main import main
from pytest_sglprof._cli.screen import sparkline
from pytest_sglprof._report.results import load_results
from tests.support.running import Running, standin

WATCH = ("watch", "--check")
FIELDS = {
    "time", "rank", "running", "waiting", "tokens", "token_usage", "throughput", "iteration",
    "source",
}  # fmt: skip


def line(second: int, rank: int, running: int) -> str:
    minute, rest = divmod(second, 60)
    return (
        f"[2026-11-24 03:{minute:02d}:{rest:02d} DP{rank}] Decode batch, #running-req: {running}, "
        f"#token: {running * 50}, token usage: 0.10, cuda graph: True, "
        "gen throughput (token/s): 512.00, #queue-req: 0\n"
    )


@pytest.fixture
def unequal_log(tmp_path: Path) -> Path:
    path = tmp_path / "server.log"
    loads = [(20, 20)] * 30 + [(34, 6)] * 20 + [(20, 20)] * 30
    path.write_text(
        "".join(line(s, rank, pair[rank]) for s, pair in enumerate(loads) for rank in (0, 1))
    )
    return path


@pytest.mark.parametrize("name", ["tp1/server.log", "tp2/server.log", "mixtral_tp2ep2.log"])
def test_a_log_of_pure_tp_cannot_know(
    shared_data: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*WATCH, str(shared_data / "logs" / name)]) == 3
    shown = capsys.readouterr()
    assert "cannot be known here" in shown.err
    assert "SGLANG_ENABLE_METRICS_DP_ATTENTION=1" in shown.err
    assert shown.out == ""


def test_too_little_load_is_no_balance(
    shared_data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*WATCH, str(shared_data / "logs/dp2/server.log")]) == 3
    assert "lower --min-running" in capsys.readouterr().err


def test_a_period_of_imbalance_has_both_ends(
    unequal_log: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*WATCH, str(unequal_log)]) == 1
    shown = capsys.readouterr().out
    assert "onset 2026-11-24 03:00:30 to 03:00:50 (20 s), known to 1.0 s from the log" in shown
    assert "DP0 has 34 running requests, 1.70x the mean of 20 over 2 ranks" in shown


def test_only_a_check_answers_with_a_verdict(
    unequal_log: Path, shared_data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["watch", str(unequal_log)]) == 0
    assert "onset 2026-11-24 03:00:30" in capsys.readouterr().out
    assert main(["watch", str(shared_data / "logs/tp2/server.log")]) == 0
    assert "cannot be known here" in capsys.readouterr().err


def test_a_higher_factor_finds_nothing(
    unequal_log: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*WATCH, str(unequal_log), "--factor", "1.8"]) == 0
    assert "no onset: balanced for" in capsys.readouterr().out


def test_a_log_of_one_dp_rank_knows_what_its_experts_do(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "server.log"
    rows = []
    for second in range(40):
        row = line(second, 0, 30).replace(" DP0]", " TP0 EP0]")
        value = 0.4 if 10 <= second < 25 else 0.9
        rows += [row, f"{row.partition('] ')[0]}] [Expert Balancedness] forward_pass_id={second} "]
        rows[-1] += f"current_pass_balancedness={value:.3f} gpu_physical_count_sum=9\n"
    path.write_text("".join(rows))
    assert main([*WATCH, str(path)]) == 1
    shown = capsys.readouterr().out
    assert "onset 2026-11-24 03:00:10 to 03:00:25 (15 s)" in shown
    assert "tokens of the experts' GPUs: the fullest has 2.50x the mean" in shown


def test_json_lines_hold_every_sample_and_onset(
    unequal_log: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "watch.jsonl"
    assert main([*WATCH, str(unequal_log), "--jsonl", str(file)]) == 1
    assert main([*WATCH, str(unequal_log), "--jsonl", "-"]) == 1
    text = file.read_text()
    assert capsys.readouterr().out.endswith(text)
    objects = [json.loads(row) for row in text.splitlines()]
    samples = [value for value in objects if "event" not in value]
    assert len(samples) == unequal_log.read_text().count("Decode batch")
    assert all(set(sample) == FIELDS for sample in samples)
    (onset,) = [value for value in objects if value.get("event") == "onset"]
    assert (onset["kind"], onset["source"]) == ("running", "log")
    assert onset["ended"] - onset["time"] == pytest.approx(20.0)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["watch", "nowhere.log"], "nowhere.log is not a file"),
        (["record", "nowhere.log", "--when", "onset"], "a log cannot be recorded"),
        (["record", "nowhere.log"], "a log cannot be recorded"),
        (["watch", "nowhere.log", "--factor", "1"], "more than 1"),
        (["record", "nowhere.log", "--factor", "1"], "more than 1"),
        (["watch", "http://127.0.0.1:9"], "127.0.0.1:9"),
        (["record", "http://127.0.0.1:9"], "127.0.0.1:9"),
    ],
)
def test_usage(words: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    assert told in capsys.readouterr().err


def test_sparklines_share_a_scale() -> None:
    assert sparkline([0, 5, 10], 10) == "▁▅█"
    assert sparkline([0, 0], 0) == "▁▁"


def now_line(rank: int, running: int) -> str:
    stamp = time.strftime("%Y-%m-%d %H:%M:%S")
    return line(0, rank, running).replace("2026-11-24 03:00:00", stamp)


def test_a_log_that_grows_is_followed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "server.log"
    path.write_text("")
    over = threading.Event()

    def write() -> None:
        while not over.wait(0.2):
            with path.open("a") as stream:
                stream.write(now_line(0, 34) + now_line(1, 6))

    writer = threading.Thread(target=write)
    writer.start()
    try:
        words = ["--follow", "--hold", "1", "--for", "4", "--jsonl", "-"]
        assert main([*WATCH, str(path), *words]) == 1
    finally:
        over.set()
        writer.join()
    shown = capsys.readouterr()
    assert '"event": "onset"' in shown.out
    assert "DP0 has 34 running requests" in shown.err
    assert not [t for t in threading.enumerate() if t.name == "sglprof-watch"]


@pytest.fixture
def two_replicas(tmp_path: Path) -> Iterator[Running]:
    with standin(tmp_path, "--dp", "2", "--step-ms", "4", "--layers", "1") as running:
        yield running


@contextlib.contextmanager
def load(server: Running, ranks: tuple[int, ...], each: int = 20) -> Iterator[None]:
    over = threading.Event()

    def drive(rank: int) -> None:
        while not over.is_set():
            server.generate(200, routed_dp_rank=rank)

    threads = [threading.Thread(target=drive, args=(rank,)) for rank in ranks for _ in range(each)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        over.set()
        for thread in threads:
            thread.join()


def test_a_running_server_whose_window_shows_the_busy_rank(
    two_replicas: Running, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--hold", "1", "--for", "20", "--when", "onset", "--seconds", "1"]
    words += ["--output", str(tmp_path / "window")]
    with load(two_replicas, (1,)):
        # Whether a rank without work has anything to be judged by is left to chance.
        assert main(["record", two_replicas.url, *words]) in (0, 3)
    shown = capsys.readouterr().out
    assert "DP0 is starved while the others run " in shown
    (window,) = load_results(tmp_path / "window" / "results.json").windows
    assert window.state == "complete"
    assert window.onset is not None
    assert {series.rank for series in window.load_samples} == {"DP0", "DP1"}
    assert "the trace confirms it: DP1 had most to do" in shown


def test_an_onset_that_comes_just_after_a_look_opens_a_window(
    two_replicas: Running,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class TooLate(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            super().wait(10)
            return False  # the time was over just before

    late = SimpleNamespace(Event=TooLate, Lock=threading.Lock)
    monkeypatch.setattr("pytest_sglprof._cli.screen.threading", late)
    words = ["--hold", "1", "--for", "12", "--when", "onset", "--seconds", "1"]
    words += ["--output", str(tmp_path / "window")]
    with load(two_replicas, (1,)):
        assert main(["record", two_replicas.url, *words]) in (0, 3)
    assert load_results(tmp_path / "window" / "results.json").windows[0].state == "complete"


def test_a_balanced_server_has_no_onset(
    two_replicas: Running, capsys: pytest.CaptureFixture[str]
) -> None:
    with load(two_replicas, (0, 1)):
        assert main([*WATCH, two_replicas.url, "--for", "5"]) == 0
    assert "no onset: balanced for" in capsys.readouterr().out


def test_a_server_with_one_dp_rank_cannot_know(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with standin(tmp_path, "--tp", "2") as running:
        assert main([*WATCH, running.url, "--for", "5"]) == 3
    assert "cannot be known here" in capsys.readouterr().err


def test_a_window_is_recorded_at_steady_load(
    two_replicas: Running, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "window"
    words = ["record", two_replicas.url, "--seconds", "0.5", "-o", str(folder), "--when", "steady"]
    assert main([*words, "--for", "1"]) == 3
    assert "no steady load within 1 s" in capsys.readouterr().err
    assert not folder.exists()
    with load(two_replicas, (0, 1), each=2):
        assert main([*words, "--for", "60"]) in (0, 3)  # as many equal steps as a busy machine has
    assert load_results(folder / "results.json").windows[0].state == "complete"
    assert len(list(folder.glob("windows/*/*.trace.json.gz"))) == 2


def test_one_dp_rank_is_watched_without_onsets(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with standin(tmp_path, "--tp", "2") as running:
        assert main(["watch", running.url, "--for", "2", "--jsonl", str(tmp_path / "l")]) == 0
        words = ["record", running.url, "--when", "onset", "--for", "2", "-o", str(tmp_path / "w")]
        assert main(words) == 3
    shown = capsys.readouterr()
    assert "its load is shown, but it has no onset" in shown.out
    assert "cannot be known here" in shown.err
    samples = [json.loads(row) for row in (tmp_path / "l").read_text().splitlines()]
    assert {sample["rank"] for sample in samples} == {""}


def test_ctrl_c_ends_it_quietly(two_replicas: Running) -> None:
    command = [sys.executable, "-m", "pytest_sglprof", "watch", two_replicas.url, "--jsonl", "-"]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ.copy()
    )
    assert process.stdout is not None
    assert json.loads(process.stdout.readline())["source"] == "loads"
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=20)
    assert (process.returncode, errors) == (130, "sglprof: interrupted\n")
