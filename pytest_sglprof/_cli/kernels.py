"""`sglprof kernels PATH…`: the kernel time of each rank and kernel."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from pytest_sglprof._cli.inputs import Recorded, recorded_by
from pytest_sglprof._cli.options import (
    PATHS,
    Column,
    NewParser,
    input_options,
    milliseconds,
    ordered,
    output_options,
    read_table,
    render,
    settings_of,
    settings_options,
    table_options,
    write_notes,
    write_text,
)
from pytest_sglprof._errors import ExitStatus, SettingsError, did_you_mean

if TYPE_CHECKING:
    from pytest_sglprof._config.load import Settings
    from pytest_sglprof._trace.nsys.sums import KernelSums
    from pytest_sglprof._trace.table import KernelTable

KEYS = ("rank", "name", "full_name", "category", "kind", "stage", "step", "stream")
TEXT_COLUMNS = frozenset(KEYS) - {"step", "stream"}
DEFAULT_KEYS = ("rank", "name", "category")
UNCATEGORISED_KEYS = ("name", "full_name")

_Records = tuple[list[dict[str, Any]], list[str]]  # records, notes


def add_parser(new_parser: NewParser) -> None:
    """Adds the options of the command."""
    parser = new_parser(
        description="Counts the kernels and adds up their time, by rank, name and category.",
        epilog="exit status: 0 done, 2 wrong usage or unreadable input",
        parents=[
            input_options(PATHS),
            output_options(),
            table_options((*KEYS, "count", "total_ns", "share")),
            settings_options(),
        ],
    )
    parser.set_defaults(exit_zero=True)
    parser.add_argument(
        "--by",
        metavar="KEY,…",
        help=f"one row for each combination of these keys: {', '.join(KEYS)} (default: "
        f"{','.join(DEFAULT_KEYS)}; with --uncategorised {','.join(UNCATEGORISED_KEYS)})",
    )
    parser.add_argument(
        "--uncategorised",
        action="store_true",
        help="only kernels without a category, with their share of all kernel time",
    )


def run(args: argparse.Namespace) -> ExitStatus:
    """Prints the table. Raises `TraceError` for unreadable input."""
    default = UNCATEGORISED_KEYS if args.uncategorised else DEFAULT_KEYS
    keys = _keys(args.by) if args.by is not None else list(default)
    recorded = recorded_by(args)
    settings = settings_of(args, recorded.inputs.places)
    records, notes = _from_sums(keys, args, settings, recorded) or _from_rows(
        keys, args, settings, recorded
    )
    columns = [Column(key, left=key in TEXT_COLUMNS) for key in (*keys, "count")]
    columns.append(Column("total_ns", "total ms", milliseconds))
    if args.uncategorised:
        columns.append(Column("share", cell=_percent))
    known = [column.key for column in columns]
    if args.sort is not None and args.sort not in known:
        raise SettingsError(
            f"--sort {args.sort}: the table has no such column",
            expected=f"one of {', '.join(known)}",
            hint=f"add it: --by {','.join((*keys, args.sort))}" if args.sort in KEYS else "",
        )
    records = ordered(records, args.sort or ("total_ns" if args.top else None), args.top)
    text = render(records, columns, args.format)
    write_text(text, args.output, recorded.inputs.recorded)
    write_notes(notes)
    return ExitStatus.DONE


def _from_sums(
    keys: Sequence[str], args: argparse.Namespace, settings: Settings, recorded: Recorded
) -> _Records | None:
    """The totals of one nsys report, added up by its engine; None if its rows are needed.

    They are where it has no kernels: then the rows tell why.
    """
    from pytest_sglprof._trace.paths import is_nsys, names_of_reports, window_files

    if settings.executor:
        return None
    files = window_files(recorded.files.paths)
    if len(files) != 1 or not is_nsys(files[0]) or args.rank or recorded.window:
        return None
    from pytest_sglprof._trace.nsys.ranks import known_ranks
    from pytest_sglprof._trace.nsys.sums import KEYS as SUMMED
    from pytest_sglprof._trace.nsys.sums import read_sums

    if not set(keys) <= set(SUMMED):
        return None
    name = names_of_reports(files, {})[files[0]]
    ranks = known_ranks(files[0], name, {}, {})
    sums = read_sums(
        files[0],
        pid_ranks=ranks.pid_ranks,
        gpu_ranks=ranks.gpu_ranks,
        name=name,
        nsys=settings.nsys or None,
        patterns=settings.categories,
    )
    if sums.source != "gpu" or not len(sums):
        return None
    records = sum_records(sums, keys, uncategorised=args.uncategorised)
    return records, _notes(sums.notes, bool(len(sums)), args)


def _from_rows(
    keys: Sequence[str], args: argparse.Namespace, settings: Settings, recorded: Recorded
) -> _Records:
    launches = bool({"step", "stage"} & set(keys))  # by which a torch trace knows its steps
    table = read_table(recorded.files, args, settings, launches=launches)
    records = kernel_records(table, keys, uncategorised=args.uncategorised)
    return records, _notes(table.notes, bool(len(table.frame)), args)


def _notes(notes: Sequence[str], has_activity: bool, args: argparse.Namespace) -> list[str]:
    empty = f"no activity in {', '.join(map(str, args.paths))}"
    return [*notes] if has_activity else [*notes, empty]


def sum_records(
    sums: KernelSums, keys: Sequence[str], *, uncategorised: bool = False
) -> list[dict[str, Any]]:
    """What `kernel_records` returns, from totals."""
    all_ns = sum(sums.total_ns)
    chosen = sums.of("category", "other") if uncategorised else sums
    records: list[dict[str, Any]] = [dict(record) for record in chosen.by(*keys)]
    return _with_share(records, all_ns) if uncategorised else records


def kernel_records(
    table: KernelTable, keys: Sequence[str], *, uncategorised: bool = False
) -> list[dict[str, Any]]:
    """One record for each combination of `keys`: the keys, `count` and `total_ns`.

    uncategorised: only category `other`, with `share`: `total_ns` over the kernel time of the
    whole table (all ranks and categories), 0 to 1.
    """
    all_ns = int(table.frame["dur_ns"].sum())
    if uncategorised:
        table = replace(table, frame=table.frame.loc[table.frame["category"] == "other"])
    rows = table.by(*keys).astype(object).to_dict("records")
    records = [{str(key): value for key, value in row.items()} for row in rows]
    return _with_share(records, all_ns) if uncategorised else records


def _with_share(records: list[dict[str, Any]], all_ns: int) -> list[dict[str, Any]]:
    return [
        {**record, "share": int(record["total_ns"]) / all_ns if all_ns else 0.0}
        for record in records
    ]


def _keys(text: str) -> list[str]:
    keys = [key.strip() for key in text.split(",") if key.strip()]
    unknown = [key for key in keys if key not in KEYS]
    if unknown or not keys:
        raise SettingsError(
            f"--by {text}: unknown key {', '.join(unknown) or '(none given)'}",
            expected="some of " + ", ".join(KEYS),
            hint=did_you_mean(unknown, KEYS, "for example --by rank,category"),
        )
    return keys


def _percent(share: Any) -> str:
    return f"{100 * float(share):.2f} %"
