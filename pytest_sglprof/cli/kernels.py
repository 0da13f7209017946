"""`sglprof kernels`: kernel time of every rank and kernel in traces, reports and windows."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytest_sglprof.cli.formats import Column, add_format_option, add_step_delimiter, render
from pytest_sglprof.errors import SettingsError
from pytest_sglprof.spelling import did_you_mean

if TYPE_CHECKING:
    from pytest_sglprof.trace.nsys_sums import KernelSums
    from pytest_sglprof.trace.table import KernelTable

KEYS = ("rank", "name", "full_name", "category", "kind", "stage", "step", "stream")
TEXT_COLUMNS = frozenset(KEYS) - {"step", "stream"}
DEFAULT_KEYS = ("rank", "name", "category")
UNCATEGORISED_KEYS = ("name", "full_name")
CONFIG = "sglprof.toml"

_Answer = tuple[list[dict[str, Any]], list[str]]  # records, notes


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
        metavar="KEY,…",
        help=f"one row for each combination of these: {', '.join(KEYS)} (default: "
        f"{','.join(DEFAULT_KEYS)}; with --uncategorised {','.join(UNCATEGORISED_KEYS)})",
    )
    add_step_delimiter(parser)
    add_format_option(parser)
    parser.add_argument("--nsys", metavar="NSYS", help="command that exports .nsys-rep")
    parser.add_argument(
        "--allow-partial", action="store_true", help="read what a truncated trace still holds"
    )
    parser.add_argument(
        "--uncategorised",
        action="store_true",
        help="only what no category pattern matches, with its share of all kernel time",
    )
    parser.add_argument(
        "--config",
        metavar="FILE",
        help=f"configuration with your own categories (default: {CONFIG} in this folder)",
    )


def run(args: argparse.Namespace) -> int:
    """Prints the table; 0. Unreadable input raises `TraceError` (exit status 2)."""
    default = UNCATEGORISED_KEYS if args.uncategorised else DEFAULT_KEYS
    keys = _keys(args.by) if args.by is not None else list(default)
    records, notes = _from_sums(keys, args) or _from_rows(keys, args)
    columns = [Column(key, left=key in TEXT_COLUMNS) for key in (*keys, "count")]
    columns.append(Column("total_ns", "total ms", _milliseconds))
    if args.uncategorised:
        columns.append(Column("share", cell=_percent))
    sys.stdout.write(render(records, columns, args.format))
    for note in notes:
        sys.stderr.write(f"note: {note}\n")
    return 0


def _from_sums(keys: Sequence[str], args: argparse.Namespace) -> _Answer | None:
    """The answer where totals of one nsys report are enough: its rows are not read then."""
    from pytest_sglprof.trace.window_files import is_nsys, window_files

    files = window_files(args.paths)
    if len(files) != 1 or not is_nsys(files[0]):
        return None
    from pytest_sglprof.trace.nsys_sums import KEYS as SUMMED
    from pytest_sglprof.trace.nsys_sums import read_sums

    if not set(keys) <= set(SUMMED):
        return None
    sums = read_sums(files[0], nsys=args.nsys, patterns=own_categories(args.config))
    records = sum_records(sums, keys, uncategorised=args.uncategorised)
    return records, _notes(sums.notes, bool(len(sums)), args)


def _from_rows(keys: Sequence[str], args: argparse.Namespace) -> _Answer:
    from pytest_sglprof.trace.read import read_window

    table = read_window(
        args.paths,
        nsys=args.nsys,
        allow_partial=args.allow_partial,
        step_delimiter=args.step_delimiter,
        patterns=own_categories(args.config),
        sequences=False,
    )
    records = kernel_records(table, keys, uncategorised=args.uncategorised)
    return records, _notes(table.notes, bool(len(table.frame)), args)


def _notes(notes: Sequence[str], activity: bool, args: argparse.Namespace) -> list[str]:
    none = f"no activity in {', '.join(map(str, args.paths))}"
    return [*notes, *([] if activity else [none])]


def sum_records(
    sums: KernelSums, keys: Sequence[str], *, uncategorised: bool = False
) -> list[dict[str, Any]]:
    """`kernel_records` of sums that were added up already."""
    every = sum(sums.total_ns)
    chosen = sums.of("category", "other") if uncategorised else sums
    records: list[dict[str, Any]] = [dict(record) for record in chosen.by(*keys)]
    return _with_share(records, every) if uncategorised else records


def kernel_records(
    table: KernelTable, keys: Sequence[str], *, uncategorised: bool = False
) -> list[dict[str, Any]]:
    """One record for each combination of `keys`: the keys, `count` and `total_ns`.

    uncategorised: only category `other`, and `share`, `total_ns` of the kernel time of the
    whole table (all ranks and categories), 0 to 1.
    """
    every = int(table.frame["dur_ns"].sum())
    if uncategorised:
        table = replace(table, frame=table.frame.loc[table.frame["category"] == "other"])
    rows = table.by(*keys).astype(object).to_dict("records")
    records = [{str(key): value for key, value in row.items()} for row in rows]
    return _with_share(records, every) if uncategorised else records


def _with_share(records: list[dict[str, Any]], every: int) -> list[dict[str, Any]]:
    return [
        {**record, "share": int(record["total_ns"]) / every if every else 0.0} for record in records
    ]


def _keys(text: str) -> list[str]:
    keys = [key.strip() for key in text.split(",") if key.strip()]
    unknown = [key for key in keys if key not in KEYS]
    if unknown or not keys:
        raise SettingsError(
            f"--by {text}: unknown key {', '.join(unknown) or '(none given)'}",
            expected="keys out of " + ", ".join(KEYS),
            hint=did_you_mean(unknown, KEYS, "for example --by rank,category"),
        )
    return keys


def own_categories(config: str | None) -> list[tuple[str, str]]:
    """The `[[category]]` patterns of the configuration; none where there is no file."""
    if config is None and not Path(CONFIG).is_file():
        return []
    from pytest_sglprof.config_file import load_config

    document = load_config(Path(config or CONFIG))
    return [(entry["name"], entry["pattern"]) for entry in document.get("category", ())]


def _percent(share: Any) -> str:
    return f"{100 * float(share):.2f} %"


def _milliseconds(ns: Any) -> str:
    return f"{int(ns) / 1e6:.3f}"
