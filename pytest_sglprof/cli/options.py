"""Options that commands share, as parents of argparse, and the settings that follow from them."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from pytest_sglprof.metrics import METRICS
from pytest_sglprof.options import OPTIONS

if TYPE_CHECKING:
    from pytest_sglprof.settings import Settings

Format = Literal["table", "csv", "json"]
FORMATS: tuple[Format, ...] = get_args(Format)
LATENESS = "lateness"  # of the rank that the others wait for; the metric of sync groups
RUN_FILE = "run.json"
_RUN_DEPTH = 4  # a trace lies in RUN/windows/ID, and its own folder may lie in there


def input_options(paths: str) -> argparse.ArgumentParser:
    """What is read, and how. paths: the help of PATH."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("paths", nargs="+", metavar="PATH", help=paths)
    group = parser.add_argument_group("input")
    group.add_argument(
        "--window", default="", metavar="ID", help="of a run with several windows: this one"
    )
    group.add_argument(
        "--rank",
        action="append",
        default=[],
        type=_pid_and_label,
        metavar="PID=LABEL",
        help="the rank of a process in nsys reports, for example 31205=TP0; may be given again",
    )
    group.add_argument(
        "--allow-partial",
        action="store_true",
        help="read what a truncated trace still holds; a verdict on it is inconclusive",
    )
    add_rows(group, "nsys", "step_delimiter")
    return parser


def select_options() -> argparse.ArgumentParser:
    """What is compared, and the limit that it is held against."""
    parser = argparse.ArgumentParser(add_help=False)
    group = parser.add_argument_group("selection (default: the thresholds of the configuration)")
    group.add_argument(
        "--metric",
        choices=(*METRICS, LATENESS),
        help=f"default: slowdown; {LATENESS}: by how much the others wait for one rank",
    )
    group.add_argument(
        "--limit",
        type=float,
        metavar="X",
        help="fail above it: a ratio (slowdown, imbalance_factor: 1 or more) or a share (0 to 1)",
    )
    group.add_argument(
        "--scope",
        help="compute (all but communication and memory; default), communication, all, or a "
        "category such as moe",
    )
    group.add_argument("--kernel", metavar="REGEX", help="kernels by name instead of a scope")
    group.add_argument("--stage", help="only steps of it: decode, prefill, mixed or idle")
    add_rows(group, "min_steps", "min_share")
    return parser


def output_options() -> argparse.ArgumentParser:
    """Where the answer goes, and in which form."""
    parser = argparse.ArgumentParser(add_help=False)
    group = parser.add_argument_group("output")
    add_output_file(group)
    group.add_argument(
        "--format",
        choices=FORMATS,
        default="table",
        help="table for people, csv or json for programs (default: table)",
    )
    return parser


def settings_options() -> argparse.ArgumentParser:
    """Where the configuration comes from, and what is changed in it."""
    parser = argparse.ArgumentParser(add_help=False)
    add_rows(parser.add_argument_group("settings"), "config", "set")
    return parser


def add_output_file(parser: argparse._ActionsContainer) -> None:
    """`-o FILE`."""
    parser.add_argument(
        "-o", "--output", type=Path, metavar="FILE", help="write it there (default: print it)"
    )


def add_rows(parser: argparse._ActionsContainer, *names: str) -> None:
    """The rows of the option table that have these names."""
    for option in OPTIONS:
        if option.name in names:
            assert option.command, f"{option.name} is no option of a command"
            action = "append" if option.kind == "list" else "store"
            parser.add_argument(
                option.flag,
                dest=option.name,
                action=action,
                metavar=option.metavar,
                help=option.help.replace("%", "%%"),
            )


def settings_of(args: argparse.Namespace, paths: Iterable[str | Path] = ()) -> Settings:
    """The settings of a command that reads `paths`.

    `--config`, else what the run stored that wrote the paths, else the nearest configuration
    file of the working folder; the options and the environment change it.
    """
    from pytest_sglprof.settings import read_settings

    here = Path.cwd()
    return read_settings(
        {option.name: getattr(args, option.name, None) for option in OPTIONS if option.command},
        os.environ,
        start=[here],
        rootdir=here,
        invocation_dir=here,
        of_pytest=False,
        stored=stored_configuration(paths),
    )


def stored_configuration(paths: Iterable[str | Path]) -> tuple[Path, dict[str, Any]] | None:
    """The run.json above the first of `paths` that has one, and the configuration in it."""
    for path in paths:
        place = Path(os.path.realpath(path))
        for folder in (place, *place.parents)[: _RUN_DEPTH + 1]:
            try:
                content = json.loads((folder / RUN_FILE).read_bytes())
            except (OSError, ValueError, RecursionError):
                continue
            if isinstance(content, dict) and isinstance(content.get("settings"), dict):
                return folder / RUN_FILE, content["settings"]
    return None


def positive(text: str) -> float:
    """A number above 0, for argparse."""
    number = float(text)
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError("must be a number above 0")
    return number


def count(text: str) -> int:
    """A whole number above 0, for argparse."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("must be 1 or more")
    return number


def _pid_and_label(text: str) -> tuple[int, str]:
    pid, _, label = text.partition("=")
    if not pid.isdigit() or not label:
        raise argparse.ArgumentTypeError("must be PID=LABEL, for example 31205=TP0")
    return int(pid), label
