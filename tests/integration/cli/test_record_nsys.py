"""`sglprof record --backend nsys` and `status` on a server that somebody started under nsys."""

from __future__ import annotations

import contextlib
import json
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from pytest_sglprof._cli.main import main
from pytest_sglprof._report.results import load_results
from pytest_sglprof._server.lease import free_server_ports
from tests.integration.cli.test_record import started
from tests.support import session_nsys
from tests.support.running import ROOT, end, wait_for

Output = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def nsys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    here, temporary = tmp_path / "here", tmp_path / "tmp"
    here.mkdir()
    temporary.mkdir()
    (here / "pyproject.toml").write_text("")
    monkeypatch.chdir(here)
    monkeypatch.setenv("TMPDIR", str(temporary))
    path = session_nsys.install(tmp_path / "bin")
    monkeypatch.setenv("SGLPROF_NSYS", str(path))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    return path


@contextlib.contextmanager
def under(nsys: Path, folder: Path, session: str) -> Iterator[str]:
    """A stand-in of two ranks under `nsys profile`, as somebody starts one by hand; its URL."""
    words = [str(nsys), "profile", "--start-later=true", f"--session-new={session}"]
    words += [f"--output={folder / session}.nsys-rep", sys.executable]
    port, leases = free_server_ports()
    words += ["-m", "pytest_sglprof.standin", "--port", str(port), "--tp", "2", "--step-ms", "4"]
    log = folder / f"{session}.log"
    with log.open("w") as file:
        process = subprocess.Popen(words, stdout=file, stderr=file, start_new_session=True)
    try:
        wait_for(lambda: "ready to roll" in log.read_text(), 90)
        tree = psutil.Process(process.pid).children(recursive=True)
        yield re.findall(r"running on (http://\S+)", log.read_text())[0]
    finally:
        end(process, tree, patience=10)
        for each in leases:
            each.release()


def test_the_session_of_the_server_is_found_and_each_window_keeps_its_name(
    nsys: Path, tmp_path: Path, capsys: Output
) -> None:
    with under(nsys, tmp_path, "serve") as url, under(nsys, tmp_path, "other"):
        words = ["record", url, "--backend", "nsys", "--seconds", "0.2"]
        for number, folder in enumerate(["sglprof-window", "sglprof-window-2"]):
            assert main(words) == 3  # a report without steps is not judged
            (window,) = load_results(Path(folder) / "results.json").windows
            assert window.state == "complete", number
            assert window.ranks == ("TP0", "TP1")
            assert set(window.pid_ranks.values()) == {"TP0", "TP1"}
            names = sorted(path.name for path in Path(folder).glob("windows/*/*"))
            kept = ["nsys-rep", "ranks.json", "sqlite"]
            assert names[:3] == [f"record-window.1.{ending}" for ending in kept]
        assert not (tmp_path / "serve.nsys-rep").exists(), "the first report was moved"
        capsys.readouterr()
        assert main(["status", "--format", "json"]) == 0
        found = {
            each["name"]: each for each in json.loads(capsys.readouterr().out)["nsys_sessions"]
        }
        assert (found["serve"]["state"], found["other"]["state"]) == (
            "Launched",
            "DelayedCollection",
        )
        number = found["other"]["id"]
        assert main([*words, "--nsys-session", number, "-o", "by-id"]) == 3
        assert main(["status"]) == 0
        assert re.search(rf"^  other +{number} +Launched ", capsys.readouterr().out, re.M)
        assert main([*words, "--nsys-session", "nobody", "-o", "none"]) == 2
        assert "one of the sessions that nsys lists: other, serve" in capsys.readouterr().err
        assert not Path("none").exists()


def test_a_server_outside_of_every_session_is_not_recorded(
    nsys: Path, tmp_path: Path, capsys: Output
) -> None:
    with under(nsys, tmp_path, "serve"):
        assert main(["record", "http://127.0.0.1:9", "--backend", "nsys"]) == 2
        shown = capsys.readouterr().err
        assert "0 nsys sessions that hold the server" in shown
        assert "nsys lists: serve (ID 7001, state DelayedCollection)" in shown
        assert "docs/running-server.md" in shown
        assert main(["record", "http://gpu-7:30000", "--backend", "nsys"]) == 2
        assert "on another machine" in capsys.readouterr().err
    assert list(Path().glob("sglprof-window*")) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_an_interrupt_in_the_window_ends_the_collection(
    nsys: Path, tmp_path: Path, number: signal.Signals
) -> None:
    session = tmp_path / "tmp" / "fake-nsys-sessions" / "serve.json"
    with under(nsys, tmp_path, "serve") as url:
        process = started(url, "--backend", "nsys", "--until-enter")

        def collects() -> bool:
            assert process.poll() is None, process.communicate()
            return '"Collection"' in session.read_text()

        wait_for(collects, 300)
        process.send_signal(number)
        _, errors = process.communicate(timeout=300)
        assert (process.returncode, errors) == (130, "sglprof: interrupted\n")
        assert '"Launched"' in session.read_text()
        assert not Path("sglprof-window").exists()
        assert not (tmp_path / "serve.nsys-rep").exists()
        assert main(["record", url, "--backend", "nsys", "--seconds", "0.2"]) == 3
        assert load_results(Path("sglprof-window/results.json")).windows[0].state == "complete"
