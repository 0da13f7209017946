"""The `sglprof` command: the plugin's work outside pytest.

Exit status: 0 pass, 1 fail, 2 usage or unreadable input, 3 inconclusive, 130 interrupted,
141 when whoever read the output went away.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from types import ModuleType
from typing import Any

from pytest_sglprof import __version__
from pytest_sglprof.errors import SglprofError
from pytest_sglprof.spelling import did_you_mean

# name -> help. Each is a module of this package with `add_parser(subparsers) -> None` and
# `run(args) -> int`; only the chosen one is imported, so that `--help` stays instant.
COMMANDS = {
    "kernels": "kernel time of every rank and kernel in a trace, report or window folder",
    "perfetto": "merge the traces of all ranks into one file for Perfetto, with summary rows",
    "heatmap": "rank × category of a window as an SVG picture",
    "nsight-hints": "which rows to pin in Nsight Systems to see the ranks' kernels",
    "imbalance": "how unequal the ranks are, judged against a limit",
    "watch": "load of the ranks, live or from a log, and when it became unequal",
    "straggler": "which rank the others wait for, and why",
    "report": "one HTML page of one or more results.json",
}
INTERRUPTED = 130
BROKEN_PIPE = 141
USAGE = 2


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; `argv` without the program's name. Returns the exit status."""
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        status = _run(words)
        sys.stdout.flush()
    except SglprofError as error:
        sys.stderr.write(f"sglprof: {error}\n")
        return error.exit_status
    except BrokenPipeError:
        # The interpreter flushes once more at exit and would complain about the pipe.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return BROKEN_PIPE
    except KeyboardInterrupt:
        sys.stderr.write("sglprof: interrupted\n")
        return INTERRUPTED
    return status


def _run(words: list[str]) -> int:
    chosen = next((word for word in words if not word.startswith("-")), "")
    module = _module(chosen) if chosen in COMMANDS else None
    try:
        args = _parser(chosen, module).parse_args(words)
    except SystemExit as leaving:  # argparse has already said why
        return leaving.code if isinstance(leaving.code, int) else USAGE
    status: int = module.run(args) if module is not None else USAGE
    return status


def _module(name: str) -> ModuleType:
    return import_module(f"pytest_sglprof.cli.{name.replace('-', '_')}")


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
        epilog="exit status: 0 pass, 1 fail, 2 usage or unreadable input, 3 inconclusive",
    )
    parser.add_argument("--version", action="version", version=f"sglprof {__version__}")
    subparsers = parser.add_subparsers(metavar="COMMAND", required=True)
    for name, text in COMMANDS.items():
        if name == chosen and module is not None:
            module.add_parser(subparsers)
        else:
            subparsers.add_parser(name, help=text)
    return parser
