"""`sglprof record` on running stand-ins: a run of its own, without pytest."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pytest_sglprof._cli.main import main
from pytest_sglprof._report.results import load_results, validate
from pytest_sglprof._run.folder import is_run_folder
from pytest_sglprof._server import lease
from tests.support.running import Running, standin, wait_for

Output = pytest.CaptureFixture[str]
SPEED = ("--step-ms", "4", "--layers", "1")
SLOW = ("--slow", "rank=1,category=moe,factor=1.5")
LIMIT = "[[threshold]]\nscope = 'moe'\nlimit = 1.1\n"


@contextlib.contextmanager
def load(server: Running, each: int = 4) -> Iterator[None]:
    over = threading.Event()

    def drive() -> None:
        while not over.is_set():
            server.generate(400)

    threads = [threading.Thread(target=drive) for _ in range(each)]
    for thread in threads:
        thread.start()
    wait_for(lambda: sum(row["num_running_reqs"] for row in loads(server)))
    try:
        yield
    finally:
        over.set()
        for thread in threads:
            thread.join()


def loads(server: Running) -> Any:
    return server.get("/v1/loads?include=core").json()["loads"]


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = tmp_path / "here"
    here.mkdir()
    (here / "pyproject.toml").write_text("")  # no configuration above
    monkeypatch.chdir(here)


@pytest.fixture(scope="module")
def slow(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("slow")
    with standin(folder, "--tp", "2", *SPEED, *SLOW) as running, load(running):
        yield running


def assert_unarmed(server: Running, tmp_path: Path) -> None:
    """Its profiler is idle: a new profile starts, and it is the one that is stopped."""
    body = {"output_dir": str(tmp_path / "after"), "activities": ["CPU", "GPU"]}
    assert server.post("/start_profile", body).status_code == 200
    assert server.post("/stop_profile").status_code == 200
    assert lease.holder(lease.window_name(server.url)) is None


def test_a_window_is_a_run_that_every_command_reads(slow: Running, capsys: Output) -> None:
    Path("sglprof.toml").write_text(LIMIT)
    sources = ("--set", "window.source_lines=true")
    assert main(["record", slow.url, "--steps", "80", *sources]) == 1
    shown = capsys.readouterr().out
    folder = Path("sglprof-window")
    document = load_results(folder / "results.json")
    validate(json.loads((folder / "results.json").read_text()))
    window, with_stacks = document.windows
    assert window.sources is not None
    assert (window.sources.rank, window.sources.window) == ("TP1", with_stacks.id)
    assert sum(line.count for line in window.sources.lines) > 10
    assert (window.verdict, window.ranks, window.state) == ("fail", ("TP0", "TP1"), "complete")
    assert document.summary.verdict == "fail"
    assert document.run.exit_status == 1
    assert document.run.command[:2] == ("sglprof", "record")
    assert {life.url for life in document.servers} == {slow.url}
    assert is_run_folder(folder)
    assert window.reason in shown
    assert "TP1" in shown
    assert f"page: {folder.absolute() / 'report.html'}" in shown
    assert sorted(path.name for path in Path().iterdir()) == [
        "pyproject.toml", "sglprof-window", "sglprof.toml",
    ]  # fmt: skip
    assert not (folder / "journal.jsonl").exists()
    assert main(["check", str(folder)]) == 1
    assert main(["kernels", str(folder)]) == 0
    assert main(["report", str(folder), "-o", "page.html"]) == 0
    assert main(["export", str(folder), "--to", "perfetto", "-o", "merged.json.gz"]) == 0
    assert (folder / "report.html").stat().st_size > 1000


def test_a_server_may_be_named_as_in_the_configuration(slow: Running, capsys: Output) -> None:
    Path("sglprof.toml").write_text(f'{LIMIT}[servers.ours]\nurl = "{slow.url}"\n')
    assert main(["record", "ours", "--steps", "80"]) == 1
    assert load_results(Path("sglprof-window/results.json")).servers[0].url == slow.url
    assert main(["record", "theirs"]) == 2
    assert "has a url in sglprof.toml" in capsys.readouterr().err


def test_without_thresholds_it_measures(slow: Running, capsys: Output) -> None:
    assert main(["record", slow.url, "--steps", "80", "-o", "kept"]) == 0
    shown = capsys.readouterr().out
    assert "the limit is the default one" in shown
    assert load_results(Path("kept/results.json")).windows[0].verdict == "fail"
    assert main(["record", slow.url, "--steps", "80", "-o", "kept"]) == 2
    assert "a new or an empty folder" in capsys.readouterr().err


def test_too_few_steps_are_inconclusive(slow: Running) -> None:
    Path("sglprof.toml").write_text(LIMIT)
    assert main(["record", slow.url.removeprefix("http://"), "--steps", "5"]) == 3
    assert load_results(Path("sglprof-window/results.json")).windows[0].verdict == "inconclusive"


def test_one_path_may_stand_for_both_sides(slow: Running, tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    shared.mkdir()
    assert main(["record", slow.url, "--steps", "60", "--server-dir", str(shared)]) in (0, 3)
    assert list(shared.iterdir()) == []
    assert len(list(Path("sglprof-window").glob("windows/*/*.trace.json.gz"))) == 2


def test_files_that_do_not_come_can_be_fetched(
    slow: Running, tmp_path: Path, capsys: Output
) -> None:
    theirs = tmp_path / "theirs"
    pair = f"{theirs}:{tmp_path / 'ours'}"
    assert main(["record", slow.url, "--seconds", "1", "--server-dir", pair]) == 3
    shown = capsys.readouterr().out
    (written,) = theirs.iterdir()
    assert f"scp -r 127.0.0.1:{written} {written.name} | docker cp CONTAINER:{written}" in shown
    assert f"kubectl cp POD:{written} {written.name}" in shown
    assert f"sglprof check {written.name}" in shown
    assert main(["check", str(written)]) in (0, 3)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--steps", "5", "--seconds", "1"], "not allowed with"),
        (["--until-enter", "--steps", "5"], "not allowed with"),
        (["--until-enter"], "standard input cannot be read"),
    ],
)
def test_one_end_and_one_that_can_come(words: list[str], expected: str) -> None:
    command = [sys.executable, "-m", "pytest_sglprof", "record", "http://127.0.0.1:9", *words]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    assert done.returncode == 2
    assert expected in done.stderr


def started(*words: str, **options: Any) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "pytest_sglprof", "record", *words]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, text=True, env=os.environ.copy(), **{**pipes, **options})


def profiles(server: Running) -> int:
    return len(server.lines("Profiling starts"))


def test_enter_closes_the_window(slow: Running) -> None:
    before = profiles(slow)
    process = started(slow.url, "--until-enter")
    wait_for(lambda: profiles(slow) >= before + 2)
    out, errors = process.communicate("\n", timeout=120)
    assert (process.returncode, errors) in ((0, ""), (3, ""))
    assert 'window "window"' in out


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_an_interrupt_in_the_open_window_leaves_nothing(
    slow: Running, tmp_path: Path, number: signal.Signals
) -> None:
    before = profiles(slow)
    process = started(slow.url, "--until-enter")
    wait_for(lambda: profiles(slow) >= before + 2)
    process.send_signal(number)
    _, errors = process.communicate(timeout=120)
    assert (process.returncode, errors) == (130, "sglprof: interrupted\n")
    assert not Path("sglprof-window").exists()
    assert_unarmed(slow, tmp_path)
