from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from pytest_sglprof import __version__
from pytest_sglprof.cli import main as entry
from pytest_sglprof.cli.main import main
from pytest_sglprof.errors import Inconclusive, SglprofError


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """A command `kernels` whose `run` a test may replace."""
    module = ModuleType("command")
    module.add_parser = lambda subparsers: subparsers.add_parser("kernels")  # type: ignore[attr-defined]  # not a real module
    monkeypatch.setattr(entry, "_module", lambda name: module)
    yield module


def raising(error: BaseException):
    def run(args: object) -> int:
        raise error

    return run


def test_version_and_help_end_well(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"sglprof {__version__}\n"
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    assert "kernels" in out
    assert "imbalance" in out
    assert "3 inconclusive" in out


@pytest.mark.parametrize("words", [[], ["nonsense"], ["--wrong"], ["imbalance"]])
def test_wrong_usage_is_2(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    assert "usage: sglprof" in capsys.readouterr().err


@pytest.mark.parametrize(("error", "status"), [(SglprofError, 2), (Inconclusive, 3)])
def test_our_errors_are_told_and_give_their_status(
    command: ModuleType, capsys: pytest.CaptureFixture[str], error: type[SglprofError], status: int
) -> None:
    command.run = raising(error("a.json is empty", expected="a trace", hint="record it again"))
    assert main(["kernels"]) == status
    assert capsys.readouterr().err == (
        "sglprof: a.json is empty\n  expected: a trace\n  next: record it again\n"
    )


def test_an_interrupt_is_130(command: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    command.run = raising(KeyboardInterrupt())
    assert main(["kernels"]) == 130
    assert capsys.readouterr().err == "sglprof: interrupted\n"


def test_the_command_decides_the_status(command: ModuleType) -> None:
    command.run = lambda args: 3
    assert main(["kernels"]) == 3


def test_a_reader_that_goes_away_is_no_error_message(project_root: Path) -> None:
    read, write = os.pipe()
    os.close(read)
    code = (
        "import sys\n"
        "from pytest_sglprof.cli import main as entry\n"
        "class Command:\n"
        "    add_parser = staticmethod(lambda subparsers: subparsers.add_parser('kernels'))\n"
        "    run = staticmethod(lambda args: sys.stdout.write('x' * 1000000) and 0)\n"
        "entry._module = lambda name: Command\n"
        "sys.exit(entry.main(['kernels']))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=project_root, stdout=write, stderr=subprocess.PIPE
    )
    os.close(write)
    assert (done.returncode, done.stderr) == (141, b"")


def test_help_imports_nothing_heavy(project_root: Path) -> None:
    code = (
        "import sys\n"
        "from pytest_sglprof.cli.main import main\n"
        "main(['--help'])\n"
        "heavy = {'pandas', 'numpy', 'jsonschema', 'httpx', 'msgspec'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=project_root, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_the_package_is_a_command_too(project_root: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pytest_sglprof", "--version"],
        cwd=project_root,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (0, f"sglprof {__version__}\n")
