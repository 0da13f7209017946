"""`sglprof kernels`: kernel time of every rank and kernel in traces, reports and windows."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pytest_sglprof.cli.formats import Column, add_format_option, render
from pytest_sglprof.errors import SettingsError

KEYS = ("rank", "name", "full_name", "category", "kind", "stage", "step", "stream")
TEXT_COLUMNS = frozenset(KEYS) - {"step", "stream"}
DEFAULT_KEYS = ("rank", "name", "category")

_Answer = tuple[Sequence[Mapping[str, Any]], list[str]]  # records, notes


def add_parser(subparsers: Any) -> None:
    """Registers the command."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "kernels",
        help="kernel time of every rank and kernel",
        description="Count and total time by rank, kernel and category. PATH is a torch trace, "
        "an nsys report or export, or the folder of a window.",
    )
    parser.add_argument("paths", nargs="+", metavar="PATH")
    parser.add_argument(
        "--by",
        default=",".join(DEFAULT_KEYS),
        metavar="KEY,…",
        help=f"one row for each combination of these: {', '.join(KEYS)}",
    )
    add_format_option(parser)
    parser.add_argument("--nsys", metavar="NSYS", help="command that exports .nsys-rep")
    parser.add_argument(
        "--allow-partial", action="store_true", help="read what a truncated trace still holds"
    )
    parser.add_argument(
        "--uncategorised", action="store_true", help="only what no category pattern matches"
    )


def run(args: argparse.Namespace) -> int:
    """Prints the table; 0. Unreadable input raises `TraceError` (exit status 2)."""
    keys = [key.strip() for key in args.by.split(",") if key.strip()]
    unknown = [key for key in keys if key not in KEYS]
    if unknown or not keys:
        raise SettingsError(
            f"--by {args.by}: unknown key {', '.join(unknown) or '(none given)'}",
            expected="keys out of " + ", ".join(KEYS),
            hint="for example --by rank,category",
        )
    records, notes = _from_sums(keys, args) or _from_rows(keys, args)
    columns = [Column(key, left=key in TEXT_COLUMNS) for key in (*keys, "count")]
    columns.append(Column("total_ns", "total ms", _milliseconds))
    sys.stdout.write(render(records, columns, args.format))
    for note in notes:
        sys.stderr.write(f"note: {note}\n")
    return 0


def _from_sums(keys: Sequence[str], args: argparse.Namespace) -> _Answer | None:
    """The answer where totals of one nsys report are enough: its rows are not read then."""
    from pytest_sglprof.trace.window_files import is_nsys, window_files

    files = [file for path in args.paths for file in window_files(Path(path))]
    if len(files) != 1 or not is_nsys(files[0]):
        return None
    from pytest_sglprof.trace.nsys_sums import KEYS as SUMMED
    from pytest_sglprof.trace.nsys_sums import read_sums

    if not set(keys) <= set(SUMMED):
        return None
    sums = read_sums(files[0], nsys=args.nsys)
    records = sums.of("category", "other").by(*keys) if args.uncategorised else sums.by(*keys)
    return records, _notes(sums.notes, bool(records), args)


def _from_rows(keys: Sequence[str], args: argparse.Namespace) -> _Answer:
    from pytest_sglprof.trace.read import read_window

    table = read_window(args.paths, nsys=args.nsys, allow_partial=args.allow_partial)
    if args.uncategorised:
        other = table.frame["category"] == "other"
        table = replace(table, frame=table.frame.loc[other])
    rows = table.by(*keys).astype(object).to_dict("records")
    records = [{str(key): value for key, value in row.items()} for row in rows]
    return records, _notes(table.notes, bool(len(table.frame)), args)


def _notes(notes: Sequence[str], activity: bool, args: argparse.Namespace) -> list[str]:
    none = f"no activity in {', '.join(map(str, args.paths))}"
    return [*notes, *([] if activity else [none])]


def _milliseconds(ns: Any) -> str:
    return f"{int(ns) / 1e6:.3f}"
