from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from pytest_sglprof import __version__
from pytest_sglprof._cli import main as entry
from pytest_sglprof._cli.main import main
from pytest_sglprof._errors import Inconclusive, SglprofError
from pytest_sglprof._report.results import write_results
from tests.support.windows import SLOW, as_run, window
from tests.support.windows import run as results_of


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """A command `kernels` whose `run` a test may replace."""
    module = ModuleType("command")
    module.add_parser = lambda new_parser: new_parser()  # type: ignore[attr-defined]  # not a real module
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
    assert "check" in out
    assert "3 inconclusive" in out


@pytest.mark.parametrize("words", [[], ["nonsense"], ["--wrong"], ["check"]])
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


@pytest.mark.parametrize(
    "error",
    [
        AssertionError(),
        AssertionError("two\nlines"),
        KeyError("rank"),
        ZeroDivisionError("division by zero"),
        RecursionError("maximum recursion depth exceeded"),
        MemoryError(),
        NotImplementedError(),
        UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"),
        ImportError("No module named 'pandas'"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_fault_1_a_bug_of_ours_is_70_with_its_traceback(
    command: ModuleType, capsys: pytest.CaptureFixture[str], error: Exception
) -> None:
    command.run = raising(error)
    assert main(["kernels"]) == 70
    out, err = capsys.readouterr()
    assert out == ""
    assert "Traceback (most recent call last)" in err
    first, last = err.splitlines()[-2:]
    assert first.startswith(f"sglprof: {type(error).__name__}")
    assert "a bug of pytest-sglprof, and no verdict" in first
    assert "report it" in last


@pytest.mark.parametrize(
    "error",
    [
        PermissionError(13, "Permission denied", "/out/page.html"),
        OSError(28, "No space left on device"),
        IsADirectoryError(21, "Is a directory", "a.svg", None, "b.svg"),
        OSError("cannot do that"),
        TimeoutError("timed out"),
    ],
    ids=str,
)
def test_fault_1_what_the_system_refuses_is_2_with_a_message(
    command: ModuleType, capsys: pytest.CaptureFixture[str], error: OSError
) -> None:
    command.run = raising(error)
    assert main(["kernels"]) == 2
    err = capsys.readouterr().err
    what, expected, hint = err.splitlines()
    assert what.startswith("sglprof: ")
    assert str(error.filename or "") in what
    assert (error.strerror or str(error)) in what
    assert expected.startswith("  expected: ")
    assert hint.startswith("  next: ")


def run_words(*words: str, stdout: object = subprocess.PIPE, stderr: object = subprocess.PIPE):
    """The command in a process of its own, by its entry point."""
    entry_point = Path(sys.executable).with_name("sglprof")
    return subprocess.run([entry_point, *words], stdout=stdout, stderr=stderr, text=True)


@pytest.mark.parametrize("place", ["/proc/x.svg", "{tmp}/folder.svg", "{tmp}/file/x.svg"])
def test_fault_1_a_picture_that_cannot_be_written_is_no_verdict(tmp_path: Path, place: str) -> None:
    (tmp_path / "folder.svg" / "in").mkdir(parents=True)
    (tmp_path / "file").touch()
    write_results(as_run(results_of([window(SLOW)])), tmp_path / "results.json")
    output = place.format(tmp=tmp_path)
    done = run_words("export", "--to", "svg", str(tmp_path / "results.json"), "-o", output)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert done.stderr.startswith("sglprof: ")
    assert "next: " in done.stderr


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_fault_1_output_on_a_full_disk_is_2_and_told_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unbuffered: str
) -> None:
    monkeypatch.setenv("PYTHONUNBUFFERED", unbuffered)
    write_results(as_run(results_of([window(SLOW)])), tmp_path / "results.json")
    with Path("/dev/full").open("w") as full:
        done = run_words("report", str(tmp_path), stdout=full)
        assert done.returncode == 2
        assert done.stderr.count("No space left on device") == 1
        assert "Exception ignored" not in done.stderr
        done = run_words("report", str(tmp_path / "nowhere"), stderr=full)
        assert (done.returncode, done.stdout) == (2, "")


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_fault_1_messages_that_nobody_reads_change_no_status(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unbuffered: str
) -> None:
    monkeypatch.setenv("PYTHONUNBUFFERED", unbuffered)
    read, write = os.pipe()
    os.close(read)
    done = run_words("report", str(tmp_path / "nowhere"), stderr=write)
    os.close(write)
    assert (done.returncode, done.stdout) == (2, "")


def test_fault_1_a_name_that_is_no_text_is_printed_all_the_same(tmp_path: Path) -> None:
    write_results(as_run(results_of([window(SLOW)])), tmp_path / "results.json")
    output = os.fsdecode(os.fsencode(tmp_path) + b"/\xff.svg")
    done = run_words("export", "--to", "svg", str(tmp_path), "-o", output)
    assert (done.returncode, done.stderr) == (0, "")
    assert "xff.svg" in done.stdout or "udcff.svg" in done.stdout
    assert Path(output).is_file()


def test_fault_1_results_that_are_nested_too_deeply_are_unreadable(tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text("[" * 200_000)
    done = run_words("report", str(tmp_path))
    assert done.returncode == 2
    assert "is not JSON" in done.stderr


def test_fault_1_the_help_names_every_status(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "3 inconclusive; 70 a bug of sglprof; 130 interrupted" in text


def test_the_command_decides_the_status(command: ModuleType) -> None:
    command.run = lambda args: 3
    assert main(["kernels"]) == 3


def test_a_reader_that_goes_away_is_no_error_message(project_root: Path) -> None:
    read, write = os.pipe()
    os.close(read)
    code = (
        "import sys\n"
        "from pytest_sglprof._cli import main as entry\n"
        "class Command:\n"
        "    add_parser = staticmethod(lambda new_parser: new_parser())\n"
        "    run = staticmethod(lambda args: sys.stdout.write('x' * 1000000) and 0)\n"
        "entry._module = lambda name: Command\n"
        "sys.exit(entry.main(['kernels']))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=project_root, stdout=write, stderr=subprocess.PIPE
    )
    os.close(write)
    assert (done.returncode, done.stderr) == (141, b"")


@pytest.mark.parametrize("command", entry.COMMANDS)
def test_the_help_of_a_command_waits_for_no_pandas(command: str, project_root: Path) -> None:
    code = (
        "import sys\n"
        "from pytest_sglprof._cli.main import main\n"
        f"assert main(['{command}', '--help']) == 0\n"
        "sys.exit(bool({'pandas', 'numpy'} & set(sys.modules)))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=project_root, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"usage: sglprof {command}")


def test_help_imports_nothing_heavy(project_root: Path) -> None:
    code = (
        "import sys\n"
        "from pytest_sglprof._cli.main import main\n"
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


@pytest.mark.usefixtures("secrets_end_here")
def test_fault_b_no_secret_is_told_by_an_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SOME_TOKEN", "planted-4711-token")
    assert main(["kernels", "no/planted-4711-token/here"]) == 2
    assert main(["kernels", "https://me:pass-0815@host/trace"]) == 2
    err = capsys.readouterr().err
    assert "no/<redacted>/here" in err
    assert "planted-4711-token" not in err
    assert "pass-0815" not in err
