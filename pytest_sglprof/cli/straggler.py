"""`sglprof straggler PATH…`: which rank the others wait for, and why."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pytest_sglprof.cli.formats import Column, add_format_option, render, to_csv, to_json
from pytest_sglprof.cli.imbalance import EXIT_STATUS
from pytest_sglprof.values import WORST_FIRST

if TYPE_CHECKING:
    from pytest_sglprof.analysis.straggler import StragglerFinding
    from pytest_sglprof.trace.table import KernelTable

_CSV_KEYS = (
    "group",
    "rank",
    "compute_ns",
    "idle_ns",
    "wait_ns",
    "late_ns",
    "total_ns",
    "slowest_share",
    "explained_share",
    "straggler",
    "verdict",
    "cause",
)
MAX_SHOWN_KERNELS = 3
SMALL_DIFFERENCE = 0.15


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command's options."""
    parser = subparsers.add_parser(
        "straggler",
        help="which rank the others wait for, and why",
        description="Matches collectives across the ranks that meet in them. The rank that "
        "arrives last spends the least time in a collective, so sums of kernels mislead.",
        epilog="exit status: 0 nobody, 1 a straggler, 2 usage or unreadable input, 3 inconclusive",
    )
    parser.add_argument(
        "paths", nargs="+", metavar="PATH", help="a trace, a report, an export, a window's folder"
    )
    parser.add_argument(
        "--limit",
        type=_share,
        metavar="SHARE",
        default=0.02,
        help="lateness that is nobody's fault, as a share of the work (default: 0.02)",
    )
    parser.add_argument(
        "--min-steps",
        type=_count,
        metavar="N",
        default=30,
        help="steps with matched collectives that a verdict needs (default: 30)",
    )
    parser.add_argument(
        "--allow-partial",
        action="store_true",
        help="show what a truncated trace still tells; the verdict stays inconclusive",
    )
    parser.add_argument("--nsys", metavar="PATH", help="the nsys that exports reports")
    add_format_option(parser)


def run(args: argparse.Namespace) -> int:
    """Prints who is late; returns the exit status of the verdict."""
    from pytest_sglprof.analysis.straggler import stragglers
    from pytest_sglprof.trace.read import read_window

    table = read_window(args.paths, allow_partial=args.allow_partial, nsys=args.nsys)
    found = stragglers(table, limit=args.limit, min_steps=args.min_steps)
    document = straggler_command_document(table, found)
    if args.format == "json":
        text = to_json(document)
    elif args.format == "csv":
        records = [{**group, **rank} for group in document["groups"] for rank in group["ranks"]]
        text = to_csv(records, _CSV_KEYS)
    else:
        text = _table_text(document)
    sys.stdout.write(text)
    return EXIT_STATUS[document["verdict"]]


def straggler_command_document(
    table: KernelTable, found: Sequence[StragglerFinding]
) -> dict[str, Any]:
    """The JSON of the command: at the top the group that decided, under `groups` all."""
    from pytest_sglprof.report.window import finding_document

    groups = [finding_document(finding) for finding in found]
    top: dict[str, Any] = min(
        groups,
        key=lambda group: (WORST_FIRST.index(group["verdict"]), -(group["lateness"] or 0.0)),
        default=_EMPTY,
    )
    return {**top, "source": table.source, "notes": list(table.notes), "groups": groups}


_EMPTY: dict[str, Any] = {
    "group": "",
    "straggler": None,
    "verdict": "inconclusive",
    "reason": "the window has no rank",
    "cause": None,
    "lateness": None,
    "ranks": [],
}


def _table_text(document: dict[str, Any]) -> str:
    from pytest_sglprof.gate.wording import duration, milliseconds, percent

    columns = (
        Column("rank", left=True),
        Column("compute_ns", "compute ms", milliseconds),
        Column("idle_ns", "idle ms", milliseconds),
        Column("wait_ns", "waits ms", milliseconds),
        Column("slowest_share", "latest in", percent),
        Column("explained_share", "explains", percent),
        Column("total_ns", "all kernels ms", milliseconds),
    )
    text = f"{document['verdict']}: {document['reason']}\n"
    for group in document["groups"]:
        title = (
            f"{group['group']}: {group['verdict']}: {group['reason']}\n" if group["group"] else ""
        )
        text += f"\n{title}{render(group['ranks'], columns, 'table')}"
        text += _totals_line(group)
        late = next((rank for rank in group["ranks"] if rank["rank"] == group["straggler"]), None)
        for kernel in late["kernels"][:MAX_SHOWN_KERNELS] if late else ():
            text += f"{kernel['name']}: {duration(kernel['ns'])} more than on the others\n"
        if group["clock_uncertainty_ns"] is not None:
            text += f"clocks agree within {duration(group['clock_uncertainty_ns'])}\n"
    return text + "".join(f"note: {note}\n" for note in document["notes"])


def _totals_line(group: dict[str, Any]) -> str:
    if group["straggler"] is None or group["totals_difference"] is None:
        return ""
    most = max(group["ranks"], key=lambda rank: rank["total_ns"])["rank"]
    small = group["totals_difference"] < SMALL_DIFFERENCE
    text = f"sums of all kernels differ by {100 * group['totals_difference']:.1f} %"
    text += " only" if small else f" and are largest on {most}"
    return f"{text}: who is early waits inside the collective\n"


def _count(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("must be 1 or more")
    return number


def _share(text: str) -> float:
    share = float(text)
    if not 0 <= share < 1:
        raise argparse.ArgumentTypeError("must be a share from 0 to below 1")
    return share
