from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from pytest_sglprof._bench_serving import bench as load_module
from pytest_sglprof._bench_serving import runs
from pytest_sglprof._bench_serving.bench import BenchServing
from pytest_sglprof._config.model import ServerSpec
from pytest_sglprof._errors import LoadError, ServerDied, SettingsError
from pytest_sglprof._redact import learn
from tests.unit.bench_serving.conftest import FakeServer

PATIENCE_S = 15.0


def wait_until(happened: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not happened():
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.02)


def test_a_load_of_a_shape_that_has_run_is_not_warmed_up_again(
    bench: BenchServing, server: FakeServer, tmp_path: Path
) -> None:
    for options in (
        {"num_prompts": 20, "max_concurrency": 4},
        {"num_prompts": 30, "max_concurrency": 4},
        {"num_prompts": 2},
        {"num_prompts": 20, "max_concurrency": 8},  # more at once: batches that it has not run
        {"num_prompts": 20, "max_concurrency": 4, "tag": "other"},
    ):
        assert bench(**options).warmed_up
    other = FakeServer()  # a new life is cold
    BenchServing(other, folder=tmp_path / "other")(num_prompts=20, max_concurrency=4)
    names = (path.relative_to(tmp_path) for path in tmp_path.glob("*/*-warm-up.log"))
    assert sorted(map(str, names)) == [
        "loads/load-1-warm-up.log",
        "loads/load-4-warm-up.log",
        "loads/load-5-warm-up.log",
        "other/load-1-warm-up.log",
    ]


def hanging_pids(log: Path) -> list[int]:
    """Pids that a hanging fake driver wrote: its child's and its own."""
    wait_until(lambda: log.exists() and "child" in log.read_text())
    line = next(line for line in log.read_text().splitlines() if line.startswith("child"))
    return [int(word) for word in line.split()[1:]]


def assert_gone(pids: list[int]) -> None:
    def gone(pid: int) -> bool:
        try:
            return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return True

    wait_until(lambda: all(gone(pid) for pid in pids))


def test_a_load_warms_up_flushes_and_measures(
    bench: BenchServing, server: FakeServer, tmp_path: Path
) -> None:
    result = bench(num_prompts=20, max_concurrency=4, tag="night")
    assert (result.requested, result.completed, result.duration) == (20, 20, 2.0)
    assert result.ttft["mean"] == 12.5
    assert result.itl["p99"] is None
    assert (result.warmed_up, result.cache_flushed, server.flushed) == (True, True, 1)
    assert result.raw["tag"] == "night"
    assert bench.results == [result]
    names = sorted(path.name for path in (tmp_path / "loads").iterdir())
    assert names == ["load-1-warm-up.jsonl", "load-1-warm-up.log", "load-1.jsonl", "load-1.log"]
    warm_up = json.loads((tmp_path / "loads" / "load-1-warm-up.jsonl").read_text())
    assert (warm_up["num_prompts"], warm_up["tag"]) == (4, "night")


def test_opting_out_is_recorded(bench: BenchServing, server: FakeServer, tmp_path: Path) -> None:
    result = bench(num_prompts=2, warm_up=False, keep_cache=True)
    assert (result.warmed_up, result.cache_flushed, server.flushed) == (False, False, 0)
    assert not list((tmp_path / "loads").glob("*warm-up*"))


def test_flush_is_tried_again_while_requests_end(
    bench: BenchServing, server: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(load_module, "FLUSH_PAUSE_S", 0.0)
    server.flushes = [False, False, True]
    assert bench(num_prompts=2, warm_up=False).cache_flushed
    server.flushes = [False] * 100
    assert not bench(num_prompts=2, warm_up=False).cache_flushed


def test_key_reaches_the_driver_only_and_stays_off_the_disk(
    server: FakeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "of-another-service")
    server.spec = ServerSpec(env=(("EXTRA", "1"),))
    server.api_key = "hush-hush"
    learn([server.api_key])  # as the real client does
    bench = BenchServing(server, folder=tmp_path / "loads")
    result = bench(num_prompts=2, warm_up=False)
    log = (tmp_path / "loads" / "load-1.log").read_text()
    assert "key=<redacted> extra=1" in log
    assert not any("hush-hush" in p.read_text() for p in (tmp_path / "loads").iterdir())
    assert "hush-hush" not in " ".join(result.command)
    server.spec, server.api_key = ServerSpec(), ""
    bench(num_prompts=2, warm_up=False)
    assert "key= extra=" in (tmp_path / "loads" / "load-2.log").read_text()


def test_fault_14_keys_leave_the_disk_also_where_the_driver_cannot_be_ended(
    server: FakeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.api_key = "hush-hush"
    learn([server.api_key])
    stop = load_module.DriverProcess.stop

    def stopped_badly(driver: load_module.DriverProcess) -> None:
        stop(driver)
        raise OSError("planted")

    monkeypatch.setattr(load_module.DriverProcess, "stop", stopped_badly)
    bench = BenchServing(server, folder=tmp_path / "loads")
    with pytest.raises(OSError, match="planted"):
        bench(warm_up=False)
    kept = [path for path in (tmp_path / "loads").iterdir() if path.is_file()]
    assert kept
    assert not [path for path in kept if "hush-hush" in path.read_text()]


def test_failed_requests(bench: BenchServing) -> None:
    with pytest.raises(LoadError, match="3 of 20 requests failed") as caught:
        bench(num_prompts=20, lost=3, warm_up=False)
    assert "load-1.log" in caught.value.hint
    assert len(bench.results) == 1  # the figures are still worth recording
    with pytest.raises(LoadError):
        bench(num_prompts=20, lost=3, warm_up=False, allow_failed=2)
    assert bench(num_prompts=20, lost=3, warm_up=False, allow_failed=3).completed == 17
    assert bench(num_prompts=20, lost=20, warm_up=False, allow_failed=True).completed == 0


def test_a_small_data_set_is_no_failure(bench: BenchServing) -> None:
    result = bench(num_prompts=50, available=30, warm_up=False)
    assert (result.requested, result.completed) == (30, 30)


def test_crash_shows_the_drivers_traceback(bench: BenchServing) -> None:
    with pytest.raises(LoadError, match="exit status 1") as caught:
        bench(num_prompts=2, crash=True)
    assert caught.value.log[-1] == "ValueError: Warmup failed - Error: Bad Gateway"
    assert "load-1-warm-up.log" in caught.value.hint


def test_no_result_is_an_error(bench: BenchServing) -> None:
    with pytest.raises(LoadError, match="no result"):
        bench(num_prompts=2, no_result=True, warm_up=False)


def test_unknown_keyword_is_the_users_error(bench: BenchServing) -> None:
    with pytest.raises(SettingsError, match=r"max_concurency=…") as caught:
        bench(num_prompts=2, max_concurency=3)
    assert "max_concurrency" in caught.value.hint


def test_bad_keyword_starts_nothing(bench: BenchServing, tmp_path: Path) -> None:
    with pytest.raises(SettingsError):
        bench(num_prompts=0)
    assert not list(tmp_path.glob("loads/*.log"))


def test_timeout_and_progress(
    server: FakeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runs, "_CHECK_EVERY_S", 0.0)
    seen: list[str] = []
    bench = BenchServing(server, folder=tmp_path, progress=seen.append)
    with pytest.raises(LoadError, match=r"within 5 s"):
        bench(hang=True, warm_up=False, timeout=5)
    assert_gone(hanging_pids(tmp_path / "load-1.log"))
    assert seen[0] == "load 0 s"
    assert {line for line in seen if not re.fullmatch(r"load \d s", line)} == set()


def test_server_death_is_the_error(
    bench: BenchServing, server: FakeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runs, "_CHECK_EVERY_S", 0.0)
    with pytest.raises(ServerDied, match="killed"), bench.running(hang=True, warm_up=False):
        pids = hanging_pids(tmp_path / "loads" / "load-1.log")
        server.died = ServerDied("the server was killed")
    assert_gone(pids)


def test_server_death_explains_a_failed_driver(bench: BenchServing, server: FakeServer) -> None:
    server.died = ServerDied("the server was killed")
    with pytest.raises(ServerDied):
        bench(num_prompts=2, crash=True)


def test_running_load(server: FakeServer, tmp_path: Path) -> None:
    events: list[object] = []
    bench = BenchServing(
        server, folder=tmp_path, on_start=events.append, on_end=lambda: events.append("end")
    )
    with bench.running(num_prompts=8, max_concurrency=3) as load:
        assert load.target_concurrency == 3
        assert load.result is None
        wait_until(lambda: not load.is_running)
        wait_until(lambda: "end" in events)  # told before the block is left
    assert events == [3, "end"]  # the warm-up stays unheard
    assert load.result is not None
    assert bench.results == [load.result]


def test_stopping_early_leaves_no_result(bench: BenchServing, tmp_path: Path) -> None:
    with bench.running(hang=True, warm_up=False) as load:
        pids = hanging_pids(tmp_path / "loads" / "load-1.log")
        assert load.is_running
        load.stop()
        assert not load.is_running
    assert load.result is None
    assert bench.results == []
    assert_gone(pids)


def test_a_load_after_one_that_was_stopped_keeps_its_number(bench: BenchServing) -> None:
    """A window beside the first one must not be taken for one beside the second."""
    with bench.running(hang=True, warm_up=False, max_concurrency=2) as load:
        load.stop()
    result = bench(num_prompts=8, max_concurrency=3)
    assert (bench.results, bench.numbers) == ([result], [2])
    limits = [each[each.index("--max-concurrency") + 1] for each in bench.commands]
    assert limits == ["2", "3"]


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
def test_failing_body_ends_the_load(
    bench: BenchServing, tmp_path: Path, error: type[BaseException]
) -> None:
    with pytest.raises(error), bench.running(hang=True, warm_up=False):
        pids = hanging_pids(tmp_path / "loads" / "load-1.log")
        raise error
    assert_gone(pids)


OWNER = """
import sys, time
sys.path[:0] = sys.argv[2:]
from pathlib import Path
from pytest_sglprof._bench_serving.bench import BenchServing
from tests.unit.bench_serving.conftest import FakeServer
with BenchServing(FakeServer(), folder=Path(sys.argv[1])).running(hang=True, warm_up=False):
    time.sleep(600)
"""


@pytest.mark.usefixtures("server")
def test_load_dies_with_a_killed_owner(tmp_path: Path) -> None:
    root = str(Path(__file__).parents[3])
    owner = subprocess.Popen([sys.executable, "-c", OWNER, str(tmp_path), root])
    pids = hanging_pids(tmp_path / "load-1.log")
    owner.send_signal(signal.SIGKILL)
    owner.wait()
    assert_gone(pids)


def test_driver_dies_with_a_killed_guard(bench: BenchServing, tmp_path: Path) -> None:
    with (
        pytest.raises(LoadError, match="exit status 137"),
        bench.running(hang=True, warm_up=False) as load,
    ):
        pids = hanging_pids(tmp_path / "loads" / "load-1.log")
        os.kill(load._driver.pid, signal.SIGKILL)
    assert_gone(pids)


def test_what_a_killed_driver_started_dies_with_it(bench: BenchServing, tmp_path: Path) -> None:
    with (
        pytest.raises(LoadError, match="exit status 137"),
        bench.running(hang=True, warm_up=False),
    ):
        child, driver = hanging_pids(tmp_path / "loads" / "load-1.log")
        os.kill(driver, signal.SIGKILL)
    assert_gone([child, driver])
