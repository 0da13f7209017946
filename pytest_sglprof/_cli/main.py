"""The `sglprof` command: what the plugin does, outside pytest.

Exit statuses: `ExitStatus` and docs/exit-status.md.
"""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from importlib import import_module
from types import ModuleType
from typing import Any

from pytest_sglprof import __version__
from pytest_sglprof._errors import (
    ExitStatus,
    Inconclusive,
    SglprofError,
    did_you_mean,
    docs,
    in_shell,
)
from pytest_sglprof._redact import learn_command, learn_environment, redact_text

# Name -> help, in the order in which they are used. To add a command, add a row and the module of
# that name in this package, with `add_parser(new_parser: NewParser) -> None` and
# `run(args) -> ExitStatus`. Only the chosen module is imported, so that `--help` stays instant.
COMMANDS = {
    "watch": "show the load of each rank, live or from a log, and when it became uneven",
    "record": "record one profile window of a running server, judge it and write its page",
    "status": "show servers, leases, dead runs, nsys sessions and tools of this machine",
    "clean": "end what runs that were killed have left on this machine",
    "kernels": "list kernel time by rank and kernel",
    "check": "compare the ranks, name the one that the others wait for, and apply limits",
    "compare": "compare two windows, kernel by kernel, at equal work",
    "reduce": "write what the figures of a window need into a small file, where its traces lie",
    "report": "write one HTML page about runs, windows or traces",
    "export": "write files for Perfetto, rows to pin in Nsight Systems, or a picture",
    "ab": "start two versions in turn and say which is slower, and in which kernel",
    "baseline": "look after the accepted server lives that runs are compared with",
    "history": "list a figure of every recorded server life, and where it changed",
}
STDOUT, STDERR = 1, 2  # file descriptors


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit status. argv: without the name of the program."""
    words = list(sys.argv[1:] if argv is None else argv)
    status = _ended(words)
    return status if words[:1] != ["ab"] else _module("ab").bisect_status(words, status)


def _ended(words: list[str]) -> int:
    """Runs one command; whatever it raises becomes a message and an exit status."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # the terminal may not have every character
        sys.stdout.reconfigure(errors="backslashreplace")
    learn_environment(os.environ)
    learn_command(words)
    status = 0
    try:
        status = _status(words)
        sys.stdout.flush()
    except BrokenPipeError:
        _discard(STDOUT)
        return ExitStatus.BROKEN_PIPE
    except OSError as error:
        _discard(STDOUT)
        return status or _report_error(error)
    return status


def _status(words: list[str]) -> int:
    """Runs the command and turns whatever it raises into a message and an exit status."""
    try:
        return _run(words)
    except BrokenPipeError:
        raise
    except KeyboardInterrupt:
        _write_error("sglprof: interrupted\n")
        return ExitStatus.INTERRUPTED
    except Exception as error:
        return _report_error(error)


def _report_error(error: Exception) -> int:
    """Prints what went wrong and returns the exit status."""
    if isinstance(error, OSError):
        file = f"{error.filename}: " if error.filename is not None else ""
        error = SglprofError(
            f"{file}{error.strerror or error}",
            expected="readable input, and a writable output folder with free space",
            hint="check the path, its permissions and the free space",
        )
    if isinstance(error, SglprofError):
        _write_error(f"sglprof: {in_shell(str(error))}\n")
        return error.exit_status
    import traceback

    _write_error("".join(traceback.format_exception(error)))
    first_line = str(error).partition("\n")[0]
    what = f"{type(error).__name__}: {first_line}" if first_line else type(error).__name__
    _write_error(f"sglprof: {what}: a bug of pytest-sglprof, and no verdict\n")
    _write_error("  next: please report it, with the command and the lines above\n")
    return ExitStatus.BUG


def _write_error(text: str) -> None:
    """Writes to standard error, without secrets; a closed stream is ignored."""
    try:
        sys.stderr.write(redact_text(text))
        sys.stderr.flush()
    except OSError:
        _discard(STDERR)


def _discard(descriptor: int) -> None:
    """Sends further output nowhere: the interpreter would fail once more when it flushes."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, descriptor)
    os.close(null)


def _run(words: list[str]) -> int:
    chosen = next((word for word in words if not word.startswith("-")), "")
    module = _module(chosen) if chosen in COMMANDS else None
    try:
        args = _parser({} if module is None else {chosen: module}).parse_args(words)
    except SystemExit as leaving:  # argparse has printed why
        return leaving.code if isinstance(leaving.code, int) else ExitStatus.UNUSABLE
    if module is None:
        return ExitStatus.UNUSABLE
    only_shows = getattr(args, "exit_zero", False)  # the exit status leaves the verdict out
    try:
        with ExitStack() as args.temporary:  # folders that the command needs until it ends
            status: int = module.run(args)
    except Inconclusive as error:
        if not only_shows:
            raise
        _write_error(f"sglprof: {error}\n")
        return ExitStatus.DONE
    is_verdict = status in (ExitStatus.EXCEEDED, ExitStatus.INCONCLUSIVE)
    return ExitStatus.DONE if only_shows and is_verdict else status


def _module(name: str) -> ModuleType:
    return import_module(f"pytest_sglprof._cli.{name}")


class _Parser(argparse.ArgumentParser):
    """Suggests the nearest choice for a wrong one. argparse makes subparsers of the same class."""

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        try:
            super()._check_value(action, value)
        except argparse.ArgumentError as error:
            if meant := did_you_mean([value], map(str, action.choices or ())):
                error.message += f": {meant}"
            raise


class _Completion(argparse.Action):
    """Prints a script for a shell, and ends."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        from pytest_sglprof._cli.completion import script

        every = _parser({name: _module(name) for name in COMMANDS})
        sys.stdout.write(script(every, values))
        parser.exit()


def _parser(modules: Mapping[str, ModuleType]) -> argparse.ArgumentParser:
    """The parser, in which only the commands of `modules` have their options."""
    parser = _Parser(
        prog="sglprof",
        description="Find out which rank of an SGLang server is slow, by how much, and why.",
        epilog="exit status: 0 done or passed; 1 a limit is exceeded, or watch --check saw an "
        "onset; 2 wrong usage, unreadable input or unwritable output; 3 inconclusive; 70 a bug of "
        "sglprof; 130 interrupted. More: " + docs("exit-status"),
    )
    parser.add_argument("--version", action="version", version=f"sglprof {__version__}")
    parser.add_argument(
        "--completion",
        choices=("bash", "zsh", "fish"),
        action=_Completion,
        help='print a script that completes commands and options: eval "$(sglprof --completion '
        'bash)"',
    )
    subparsers = parser.add_subparsers(metavar="COMMAND", required=True)
    for name, text in COMMANDS.items():
        if name in modules:
            modules[name].add_parser(partial(subparsers.add_parser, name, help=text))
        else:
            subparsers.add_parser(name, help=text)
    return parser
