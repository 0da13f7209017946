"""What `sglprof record` leaves behind however it ends: nothing on the server, no half of a file."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from pytest_sglprof._cli.main import main
from pytest_sglprof._report.results import load_results
from tests.integration.cli.test_record import SPEED, assert_unarmed, load, profiles, started
from tests.support.running import Running, standin, wait_for

Output = pytest.CaptureFixture[str]
SHAPES = {
    "tp": (("--tp", "2"), ("TP0", "TP1")),
    "dp": (("--dp", "2"), ("DP0 TP0", "DP1 TP0")),
    "dp-attention": (
        ("--tp", "2", "--dp", "2", "--enable-dp-attention"),
        ("DP0 TP0", "DP1 TP1"),
    ),
}


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = tmp_path / "here"
    here.mkdir()
    (here / "pyproject.toml").write_text("")
    monkeypatch.chdir(here)


@pytest.fixture(scope="module", params=SHAPES)
def shaped(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Running, tuple[str, ...]]]:
    words, ranks = SHAPES[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    # Traces are written late, so that an interrupt meets the writing.
    with standin(folder, *words, *SPEED, "--export-delay", "2") as running, load(running):
        yield running, ranks


def test_every_rank_is_recorded(shaped: tuple[Running, tuple[str, ...]], tmp_path: Path) -> None:
    server, ranks = shaped
    assert main(["record", server.url, "--when", "steady", "--seconds", "1"]) in (0, 3)
    (window,) = load_results(Path("sglprof-window/results.json")).windows
    assert (window.state, window.missing_ranks) == ("complete", ())
    assert len(window.ranks) == 2
    assert [rank.partition(" ")[0] for rank in window.ranks] == [
        rank.partition(" ")[0] for rank in ranks
    ]
    assert_unarmed(server, tmp_path)


def test_an_interrupt_while_the_server_writes(
    shaped: tuple[Running, tuple[str, ...]], tmp_path: Path
) -> None:
    server, _ = shaped
    before, stops = profiles(server), len(server.lines("Stop profiling"))
    process = started(server.url, "--until-enter")
    wait_for(lambda: profiles(server) >= before + 2)
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()
    wait_for(lambda: len(server.lines("Stop profiling")) > stops)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert (process.returncode, errors) == (130, "sglprof: interrupted\n")
    assert not Path("sglprof-window").exists()
    assert_unarmed(server, tmp_path)


def test_an_interrupt_while_it_waits_for_load(tmp_path: Path) -> None:
    with standin(tmp_path, "--tp", "2", *SPEED) as server:
        for when in ("steady", "onset"):
            process = started(server.url, "--when", when, "--for", "300")
            if when == "steady":
                wait_for(lambda: list(Path().glob("sglprof-window/servers/*")))
                process.send_signal(signal.SIGTERM)
            _, errors = process.communicate(timeout=120)
            # An onset cannot come where one DP rank has all of the load.
            assert process.returncode == (130 if when == "steady" else 3), errors
            assert list(Path().glob("sglprof-window*")) == []
        assert profiles(server) == 0


def test_an_interrupt_while_it_reads_keeps_the_traces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Output
) -> None:
    def interrupted(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    with standin(tmp_path, "--tp", "2", *SPEED) as server, load(server, each=1):
        with monkeypatch.context() as patch:
            patch.setattr("pytest_sglprof._run.measure.read_recorded", interrupted)
            assert main(["record", server.url, "--steps", "60"]) == 130
        assert_unarmed(server, tmp_path)
    folder = Path("sglprof-window/windows/record-window.1").absolute()
    assert f"recorded but not judged: sglprof check {folder}\n" in capsys.readouterr().err
    assert not Path("sglprof-window/results.json").exists()
    assert main(["check", str(folder)]) in (0, 3)


def test_a_server_that_dies_in_the_window(tmp_path: Path, capsys: Output) -> None:
    with standin(tmp_path, "--tp", "2", *SPEED, "--die-in-window", "20") as server:
        server.http.timeout = 5
        process = started(server.url, "--until-enter")
        wait_for(lambda: profiles(server) >= 2)
        with contextlib.suppress(httpx.HTTPError):  # the request of which it dies
            server.generate(400)
        out, errors = process.communicate(timeout=120)
    assert process.returncode == 3, errors
    assert "nothing listens at" in out
    (window,) = load_results(Path("sglprof-window/results.json")).windows
    assert (window.state, window.verdict) == ("failed", "inconclusive")


def test_no_server_listens(capsys: Output) -> None:
    assert main(["record", "http://127.0.0.1:9"]) == 2
    assert "check the URL, and that the server is running" in capsys.readouterr().err
    assert main(["record", "nobody"]) == 2
    assert "sglprof status" in capsys.readouterr().err
    assert list(Path().glob("sglprof-window*")) == []
