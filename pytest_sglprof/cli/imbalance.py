"""`sglprof imbalance PATH…`: how unequal the ranks are, judged against a limit."""

from __future__ import annotations

import argparse
import math
import sys
from typing import TYPE_CHECKING, Any

from pytest_sglprof.cli.formats import (
    Column,
    add_format_option,
    add_step_delimiter,
    render,
    to_csv,
    to_json,
)
from pytest_sglprof.spelling import did_you_mean
from pytest_sglprof.values import METRICS, Threshold

if TYPE_CHECKING:
    from pytest_sglprof.gate.judge import Verdict
    from pytest_sglprof.trace.table import KernelTable

EXIT_STATUS = {"pass": 0, "fail": 1, "inconclusive": 3}


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command's options."""
    parser = subparsers.add_parser(
        "imbalance",
        help="how unequal the ranks are, judged against a limit",
        description="Compares the ranks that get the same input, step by step. Without "
        "--limit the figures are reported and only missing data changes the exit status.",
        epilog="exit status: 0 pass, 1 fail, 2 usage or unreadable input, 3 inconclusive",
    )
    parser.add_argument(
        "paths", nargs="+", metavar="PATH", help="a trace, a report, an export, a window's folder"
    )
    parser.add_argument(
        "--scope",
        default="compute",
        help="compute (all but communication and memory), communication, all, or a "
        "category such as moe (default: compute)",
    )
    parser.add_argument(
        "--kernel", default="", metavar="REGEX", help="kernels by name instead of a scope"
    )
    parser.add_argument("--metric", choices=METRICS, default="slowdown", help="default: slowdown")
    parser.add_argument(
        "--limit", type=float, metavar="X", help="fail above it (without: report only)"
    )
    parser.add_argument(
        "--min-steps",
        type=_count,
        metavar="N",
        default=30,
        help="steps that a verdict needs (default: 30; 0 accepts a trace that tells no steps)",
    )
    parser.add_argument("--stage", default="", help="only steps of it: decode, prefill, ...")
    parser.add_argument(
        "--min-share",
        type=float,
        default=0.0,
        metavar="SHARE",
        help="kernels below this share of compute cannot fail, 0 to 1 (default: 0)",
    )
    parser.add_argument(
        "--allow-partial",
        action="store_true",
        help="show what a truncated trace still tells; the verdict stays inconclusive",
    )
    parser.add_argument("--nsys", metavar="PATH", help="the nsys that exports reports")
    add_step_delimiter(parser)
    add_format_option(parser)


def run(args: argparse.Namespace) -> int:
    """Prints the finding; returns the exit status of its verdict."""
    from pytest_sglprof.gate.judge import judge
    from pytest_sglprof.trace.read import read_window

    threshold = _threshold(args)
    table = read_window(
        args.paths,
        allow_partial=args.allow_partial,
        step_delimiter=args.step_delimiter,
        nsys=args.nsys,
    )
    verdict = judge(table, [threshold], min_steps=args.min_steps, min_share=args.min_share)
    document = imbalance_document(table, threshold, verdict)
    if args.format == "json":
        text = to_json(document)
    elif args.format == "csv":
        text = to_csv(_rank_records(document), _CSV_KEYS)
    else:
        text = _table_text(document, verdict)
    sys.stdout.write(text)
    return EXIT_STATUS[verdict.word]


def imbalance_document(
    table: KernelTable, threshold: Threshold, verdict: Verdict
) -> dict[str, Any]:
    """The JSON of the command.

    At the top the work group that decided, under `groups` all of them. Without a limit
    `limit` is None. Times in ns.
    """
    from pytest_sglprof.report.window import finding_document

    groups = [
        {**finding_document(found.finding), "verdict": found.verdict, "reason": found.reason}
        for found in verdict.judgements
        if found.finding is not None
    ]
    worst = verdict.worst
    deciding = worst.finding if worst is not None else None
    top = finding_document(deciding) if deciding is not None else _EMPTY
    return {
        **top,
        "scope": threshold.scope,
        "kernel": threshold.kernel,
        "stage": threshold.stage,
        "metric": threshold.metric,
        "value": worst.value if worst is not None else None,
        "limit": threshold.limit if math.isfinite(threshold.limit) else None,
        "verdict": verdict.word,
        "reason": verdict.reason,
        "source": table.source,
        "notes": list(table.notes),
        "groups": groups,
    }


_EMPTY: dict[str, Any] = {
    "group": "",
    "slowdown": None,
    "factor": None,
    "lost_ns": 0,
    "lost_share": None,
    "slowest": None,
    "interval": None,
    "factor_interval": None,
    "lost_share_interval": None,
    "p_value": None,
    "factor_sync": None,
    "cv": None,
    "lost_ns_per_step": None,
    "share_of_step": None,
    "work": None,
    "work_ratio": None,
    "work_by": None,
    "other_input_steps": 0,
    "output_tokens": None,
    "ns_per_token": None,
    "lost_ns_per_token": None,
    "ranks": [],
    "steps": None,
    "contributors": [],
}
_CSV_KEYS = (
    "group",
    "rank",
    "total_ns",
    "busy_ns",
    "slowest_share",
    "scope",
    "kernel",
    "stage",
    "slowdown",
    "factor",
    "lost_ns",
    "lost_share",
    "slowest",
    "work",
    "work_ratio",
    "lost_ns_per_token",
    "verdict",
)


def _threshold(args: argparse.Namespace) -> Threshold:
    from pytest_sglprof.gate.thresholds import check_kernel, check_limit, check_stage

    origin = "sglprof imbalance"
    _check_scope(args.scope, origin)
    check_stage(args.stage, origin, "--stage")
    limit = math.inf
    if args.limit is not None:
        limit = check_limit(args.metric, args.limit, origin, "--limit")
    if args.kernel:
        check_kernel(args.kernel, origin, "--kernel")
    return Threshold(
        metric=args.metric,
        limit=limit,
        scope=args.scope,
        kernel=args.kernel,
        stage=args.stage,
        origin="command line",
    )


def _check_scope(scope: str, origin: str) -> None:
    """Refuses a mistyped one; the user's categories are those that `sglprof kernels` reads.

    One that is near no other may be a category of a configuration that is not here.
    """
    from pytest_sglprof.cli.kernels import own_categories
    from pytest_sglprof.gate.thresholds import SCOPES, check_scope
    from pytest_sglprof.trace.kernels import CATEGORIES

    if scope in (*SCOPES, *CATEGORIES):
        return
    categories = (*CATEGORIES, *(name for name, _ in own_categories(None)))
    if did_you_mean([scope], (*SCOPES, *categories)):
        check_scope(scope, categories, origin, "--scope")


def _rank_records(document: dict[str, Any]) -> list[dict[str, Any]]:
    """One record a rank, with the figures of its work group beside it."""
    return [{**group, **figure} for group in document["groups"] for figure in group["ranks"]]


def _table_text(document: dict[str, Any], verdict: Verdict) -> str:
    from pytest_sglprof.gate.wording import milliseconds, percent
    from pytest_sglprof.report.terminal import contributor_lines, imbalance_line

    what = f"/{document['kernel']}/" if document["kernel"] else document["scope"]
    columns = (
        Column("rank", left=True),
        Column("total_ns", "summed ms", milliseconds),
        Column("busy_ns", f"{what} ms", milliseconds),
        Column("slowest_share", "slowest in", percent),
    )
    text = f"{document['verdict']}: {document['reason']}\n"
    findings = [judgement.finding for judgement in verdict.judgements if judgement.finding]
    for finding, group in zip(findings, document["groups"], strict=True):
        title = f"{finding.group}: " if finding.group else ""
        shown = columns if _overlaps(group) else (columns[0], *columns[2:])
        text += f"\n{title}{imbalance_line(finding)}\n\n{render(group['ranks'], shown, 'table')}"
        text += "".join(f"{line}\n" for line in contributor_lines(finding))
    return text + "".join(f"note: {note}\n" for note in document["notes"])


def _overlaps(group: dict[str, Any]) -> bool:
    """Whether kernels ran at the same time, so that their sums say another thing."""
    return any(figure["total_ns"] != figure["busy_ns"] for figure in group["ranks"])


def _count(text: str) -> int:
    number = int(text)
    if number < 0:
        raise argparse.ArgumentTypeError("must be 0 or more")
    return number
