"""The keys of `sglprof watch`, pressed at a real terminal (a pty), on running stand-ins."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from pytest_sglprof._report.results import load_results
from tests.integration.cli.test_record import SPEED, assert_unarmed, load, profiles
from tests.support.running import PATIENCE, Running, standin, wait_for

COLUMNS = 80


class Terminal:
    """A terminal of 80 columns with `sglprof watch` in it, as its foreground job."""

    def __init__(self, *words: str, under: Sequence[str] = ()) -> None:
        self.ours, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, COLUMNS, 0, 0))
        self.modes = termios.tcgetattr(theirs)
        self.text = ""
        self.process = subprocess.Popen(
            [*under, sys.executable, "-m", "pytest_sglprof", "watch", *words],
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            env={key: value for key, value in os.environ.items() if key != "COLUMNS"},
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),  # as a login shell does
        )
        self._theirs = theirs

    def press(self, keys: str) -> None:
        os.write(self.ours, keys.encode())

    def see(self, text: str, patience: float = 3 * PATIENCE) -> str:
        """Reads until `text` is shown; returns what is shown since the last call."""
        deadline = time.monotonic() + patience
        while text not in self.text:
            assert time.monotonic() < deadline, (text, self.text)
            self._read(0.2)
            ended = self.process.poll() is not None and not self._read(0)
            assert not ended or text in self.text, (text, self.text)
        shown, self.text = self.text, ""
        return shown

    def _read(self, timeout: float) -> bool:
        if not select.select([self.ours], [], [], timeout)[0]:
            return False
        try:
            self.text += os.read(self.ours, 65536).decode(errors="replace").replace("\r\n", "\n")
        except OSError:
            return False
        return True

    def end(self) -> tuple[int, str]:
        """Waits for its end; the status, and what was shown last."""
        deadline = time.monotonic() + 3 * PATIENCE
        while self.process.poll() is None:
            assert time.monotonic() < deadline, self.text
            self._read(0.1)
        while self._read(0):
            pass
        return self.process.returncode, self.text

    @property
    def has_own_modes(self) -> bool:
        """Whether lines are edited and echoed again, as before the program."""
        return termios.tcgetattr(self._theirs) == self.modes

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        os.close(self.ours)
        os.close(self._theirs)


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = tmp_path / "here"
    here.mkdir()
    (here / "pyproject.toml").write_text("")
    monkeypatch.chdir(here)


@pytest.fixture(scope="module")
def pure_tp(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("tp")
    with standin(folder, "--tp", "2", *SPEED) as running, load(running):
        yield running


@pytest.fixture
def terminal() -> Iterator[Any]:
    made: list[Terminal] = []

    def open_one(*words: str, under: Sequence[str] = ()) -> Terminal:
        made.append(Terminal(*words, under=under))
        return made[-1]

    yield open_one
    for each in made:
        each.close()


def test_space_opens_and_closes_enter_shows_q_ends(pure_tp: Running, terminal: Any) -> None:
    at = terminal(pure_tp.url)
    shown = at.see("q: ends")
    assert "one DP rank" in shown
    assert re.search(r"^all +[1-9]", at.see("running requests") + at.see("q: ends"), re.M)
    assert not at.has_own_modes
    at.press("\n")
    at.see("no window so far")
    before = profiles(pure_tp)
    at.press(" ")
    at.see("torch window: open for")
    wait_for(lambda: profiles(pure_tp) >= before + 2)
    at.press(" ")
    page = Path("sglprof-window").absolute() / "report.html"
    shown = at.see(f"page: {page}")
    assert 'window "window" (torch, ' in shown
    (window,) = load_results(page.with_name("results.json")).windows
    assert (window.state, window.ranks) == ("complete", ("TP0", "TP1"))
    assert {series.rank for series in window.load_samples} == {""}
    at.press("\n")
    assert re.search(r"^ *TP1 ", at.see("page: "), re.M)
    at.see("q: ends")
    at.press("q")
    status, _ = at.end()
    assert status == 0
    assert at.has_own_modes


def test_q_closes_an_open_window(pure_tp: Running, terminal: Any, tmp_path: Path) -> None:
    at = terminal(pure_tp.url)
    at.see("q: ends")
    at.press(" ")
    at.see("torch window: open for")
    at.press("q")
    status, shown = at.end()
    assert status == 0
    assert "closing the window" in shown
    assert load_results(Path("sglprof-window/results.json")).windows[0].state == "complete"
    assert at.has_own_modes
    assert_unarmed(pure_tp, tmp_path)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_drops_the_window_and_gives_the_terminal_back(
    pure_tp: Running, terminal: Any, tmp_path: Path, number: signal.Signals
) -> None:
    at = terminal(pure_tp.url)
    at.see("q: ends")
    at.press(" ")
    at.see("torch window: open for")
    if number == signal.SIGINT:
        at.press("\x03")  # the terminal makes a signal of it
    else:
        at.process.send_signal(number)
    status, shown = at.end()
    assert status == 130
    assert "sglprof: interrupted" in shown
    assert "Traceback" not in shown
    assert not Path("sglprof-window").exists()
    assert at.has_own_modes
    assert_unarmed(pure_tp, tmp_path)


def test_while_it_is_stopped_the_terminal_is_the_shell_s(pure_tp: Running, terminal: Any) -> None:
    shell = ["bash", "-m", "-c", '"$@"; echo "stopped: $?"; read line; fg', "bash"]
    at = terminal(pure_tp.url, under=shell)
    at.see("q: ends")
    assert not at.has_own_modes
    at.press("\x1a")  # Ctrl-Z
    at.see(f"stopped: {128 + signal.SIGTSTP}")
    assert at.has_own_modes
    at.press("\n")
    at.see("q: ends")
    at.press("q")
    assert at.end()[0] == 0
    assert at.has_own_modes


def test_a_stop_that_the_kernel_refuses_leaves_the_keys(pure_tp: Running, terminal: Any) -> None:
    """Of a process group without a shell the kernel stops nobody; SIGCONT may be handled first."""
    at = terminal(pure_tp.url)
    at.see("q: ends")
    at.process.send_signal(signal.SIGTSTP)
    at.process.send_signal(signal.SIGCONT)
    at.see("q: ends")
    at.see("q: ends")
    assert not at.has_own_modes
    at.press("q")
    assert at.end()[0] == 0
    assert at.has_own_modes


def test_no_line_is_wider_than_the_terminal(pure_tp: Running, terminal: Any) -> None:
    at = terminal(pure_tp.url)
    at.see("q: ends")
    drawn = at.see("q: ends")
    rows = [re.sub(r"\x1b\[\d*[A-Z]", "", line) for line in drawn.splitlines()]
    assert max(map(len, rows)) <= COLUMNS


def test_a_server_that_is_gone_is_said_and_the_table_stays(tmp_path: Path, terminal: Any) -> None:
    with standin(tmp_path, "--dp", "2", *SPEED) as running:
        at = terminal(running.url)
        at.see("q: ends")
    at.press(" ")
    at.see("no window: ")
    at.press("q")
    at.end()
    assert at.has_own_modes
