"""`sglprof clean [FOLDER]`: ends what runs that were killed have left on this machine."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from pytest_sglprof._cli.options import NewParser, settings_of, settings_options, write_text
from pytest_sglprof._errors import ExitStatus, SettingsError

if TYPE_CHECKING:
    from pytest_sglprof._run.clean import Cleaned

PATIENCE = 60.0  # s for a keeper that is tearing its server down


def add_parser(new_parser: NewParser) -> None:
    """Adds the options of the command."""
    parser = new_parser(
        description="Ends what runs of pytest that were killed have left on this machine, as their "
        "run.json says: processes, temporary files, shared memory, locked GPU clocks. Only what is "
        "surely theirs: a process by the mark in its environment, or by pid and start time. Runs "
        "that go on, and those of other machines, are left alone.",
        epilog="exit status: 0 nothing is left, 1 something is left (with --dry-run: would be "
        "ended), 2 wrong usage",
        parents=[settings_options()],
    )
    parser.add_argument(
        "folder",
        nargs="?",
        type=Path,
        metavar="FOLDER",
        help="of a run, or with runs in it (default: where pytest writes its runs, .sglprof)",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="show what would be ended, and end nothing"
    )


def run(args: argparse.Namespace) -> ExitStatus:
    """Cleans up and prints what was done."""
    from pytest_sglprof._run.clean import clean

    if args.folder is not None and not args.folder.is_dir():
        raise SettingsError(
            f"{args.folder} is not a folder",
            expected="the folder of a run, or one with runs in it",
            hint="leave it out for the runs of the configuration",
        )
    place = args.folder or settings_of(args).output
    lives = clean(place, patience=PATIENCE, is_dry=args.dry_run)
    lines = [line for life in lives for line in _lines(life)]
    write_text("\n".join(lines or ["nothing is left of runs that were killed"]) + "\n", None, ())
    is_left = any(life.left or (args.dry_run and life.ended) for life in lives)
    return ExitStatus.EXCEEDED if is_left else ExitStatus.DONE


def _lines(life: Cleaned) -> list[str]:
    texts = [
        *life.ended,
        *(f"left behind: {what}" for what in life.left),
        *(f"left alone: {what}" for what in life.alone),
    ]
    return [f"{life.name}: {text}" for text in texts or ["nothing of it was left"]]
