"""The `sglprof` command: the plugin's work outside pytest.

How it ends stands in `ExitStatus` and docs/exit-status.md.
"""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from types import ModuleType
from typing import Any

from pytest_sglprof import __version__
from pytest_sglprof._errors import ExitStatus, Inconclusive, SglprofError, did_you_mean
from pytest_sglprof._redact import learn_command, learn_environment, redact_text

# name -> help. Each is a module of this package with `add_parser(subparsers) -> None` and
# `run(args) -> int`; only the chosen one is imported, so that `--help` stays instant.
COMMANDS = {
    "watch": "load of the ranks, live or from a log, and when it became unequal",
    "record": "one profile window of a running server: now, at steady load, or at an onset",
    "kernels": "kernel time of every rank and kernel in a trace, report, window or run",
    "check": "how unequal the ranks are and for whom they wait, against limits",
    "report": "one HTML page of one or more results.json",
    "export": "traces merged for Perfetto, rows to pin in Nsight Systems, a picture",
}
OUTPUT, ERRORS = 1, 2  # their descriptors


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; `argv` without the program's name. Returns the exit status."""
    words = list(sys.argv[1:] if argv is None else argv)
    if isinstance(sys.stdout, io.TextIOWrapper):  # a name that the terminal cannot show is no crash
        sys.stdout.reconfigure(errors="backslashreplace")
    learn_environment(os.environ)
    learn_command(words)
    status = 0
    try:
        status = _status(words)
        sys.stdout.flush()
    except BrokenPipeError:
        _discard(OUTPUT)
        return ExitStatus.BROKEN_PIPE
    except OSError as error:
        _discard(OUTPUT)
        return status or _tell(error)
    return status


def _status(words: list[str]) -> int:
    """Runs the command; whatever it raises becomes a message and a status."""
    try:
        return _run(words)
    except BrokenPipeError:
        raise
    except KeyboardInterrupt:
        _say("sglprof: interrupted\n")
        return ExitStatus.INTERRUPTED
    except Exception as error:
        return _tell(error)


def _tell(error: Exception) -> int:
    """Says what went wrong; the exit status."""
    if isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename is not None else ""
        error = SglprofError(
            f"{where}{error.strerror or error}",
            expected="files that can be read, and a place with free space that can be written",
            hint="check the path, its permissions and the free space",
        )
    if isinstance(error, SglprofError):
        _say(f"sglprof: {error}\n")
        return error.exit_status
    import traceback

    _say("".join(traceback.format_exception(error)))
    first = str(error).partition("\n")[0]
    what = f"{type(error).__name__}: {first}" if first else type(error).__name__
    _say(f"sglprof: {what}: a bug of pytest-sglprof, and no verdict\n")
    _say("  next: please report it, with the command and the lines above\n")
    return ExitStatus.BUG


def _say(text: str) -> None:
    """Writes to standard error; where nobody can read it the status must do."""
    try:
        sys.stderr.write(redact_text(text))
        sys.stderr.flush()
    except OSError:
        _discard(ERRORS)


def _discard(stream: int) -> None:
    """What is left to write goes nowhere: the interpreter would try once more at its exit."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, stream)
    os.close(null)


def _run(words: list[str]) -> int:
    chosen = next((word for word in words if not word.startswith("-")), "")
    module = _module(chosen) if chosen in COMMANDS else None
    try:
        args = _parser(chosen, module).parse_args(words)
    except SystemExit as leaving:  # argparse has already said why
        return leaving.code if isinstance(leaving.code, int) else ExitStatus.UNUSABLE
    if module is None:
        return ExitStatus.UNUSABLE
    only_shows = getattr(args, "exit_zero", False)  # a verdict is no status of this command
    try:
        status: int = module.run(args)
    except Inconclusive as error:
        if not only_shows:
            raise
        _say(f"sglprof: {error}\n")
        return ExitStatus.DONE
    is_verdict = status in (ExitStatus.EXCEEDED, ExitStatus.INCONCLUSIVE)
    return ExitStatus.DONE if only_shows and is_verdict else status


def _module(name: str) -> ModuleType:
    return import_module(f"pytest_sglprof._cli.{name}")


class _Parser(argparse.ArgumentParser):
    """Names the nearest choice beside a wrong one; parsers of commands are made by its class."""

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        try:
            super()._check_value(action, value)
        except argparse.ArgumentError as error:
            if meant := did_you_mean([value], map(str, action.choices or ())):
                error.message += f": {meant}"
            raise


def _parser(chosen: str, module: ModuleType | None) -> argparse.ArgumentParser:
    parser = _Parser(
        prog="sglprof",
        description="Per-rank kernels of an SGLang server: who is slow, and by how much.",
        epilog="exit status: 0 done or pass, 1 a given limit is exceeded, 2 usage or unreadable "
        "input, 3 inconclusive, 70 a bug of sglprof, 130 interrupted (docs/exit-status.md)",
    )
    parser.add_argument("--version", action="version", version=f"sglprof {__version__}")
    subparsers = parser.add_subparsers(metavar="COMMAND", required=True)
    for name, text in COMMANDS.items():
        if name == chosen and module is not None:
            module.add_parser(subparsers)
        else:
            subparsers.add_parser(name, help=text)
    return parser
