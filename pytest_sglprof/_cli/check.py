"""`sglprof check PATH…`: compare the ranks, name the one they wait for, and apply limits."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from pytest_sglprof._cli.options import (
    LATENESS,
    PATHS,
    Column,
    NewParser,
    input_options,
    output_options,
    render,
    select_options,
    settings_of,
    settings_options,
    to_csv,
    to_json,
    write_text,
)
from pytest_sglprof._config.model import Threshold
from pytest_sglprof._errors import ExitStatus, NoKernels, SettingsError, did_you_mean
from pytest_sglprof._metrics import WORST_FIRST

if TYPE_CHECKING:
    from pytest_sglprof._analysis.imbalance import ImbalanceFinding
    from pytest_sglprof._analysis.straggler import StragglerFinding
    from pytest_sglprof._cli.options import Recorded
    from pytest_sglprof._config.load import Settings
    from pytest_sglprof._trace.table import KernelTable
    from pytest_sglprof._verdict.judge import Verdict

MEASURED = "measured"  # instead of a verdict, for figures without a limit
STATUS = {
    "pass": ExitStatus.DONE,
    MEASURED: ExitStatus.DONE,
    "fail": ExitStatus.EXCEEDED,
    "inconclusive": ExitStatus.INCONCLUSIVE,
}
MAX_SHOWN_KERNELS = 3
SMALL_DIFFERENCE = 0.15


def add_parser(new_parser: NewParser) -> None:
    """Adds the options of the command."""
    parser = new_parser(
        description="Compares, step by step, the ranks that get the same input, and finds the "
        "rank that the others wait for in collectives. With --limit only that limit is judged. "
        "Without it, the thresholds that the run stored are judged, else those of sglprof.toml. "
        "Where there are none, the command prints what it measured.",
        epilog="exit status: 0 pass or only measured, 1 a limit is exceeded, 2 wrong usage or "
        "unreadable input, 3 inconclusive",
        parents=[
            input_options(PATHS),
            select_options(),
            output_options(),
            settings_options(),
        ],
    )
    parser.add_argument(
        "--exit-zero",
        action="store_true",
        help="exit with status 0 whatever the verdict; errors still exit with 2",
    )


def run(args: argparse.Namespace) -> ExitStatus:
    """Prints figures and verdict; returns the exit status of the verdict."""
    from pytest_sglprof._cli.options import recorded_by

    settings = settings_of(args, args.paths)
    recorded = recorded_by(args)
    findings: list[ImbalanceFinding] = []
    try:
        document, findings = _measured(args, settings, recorded)
    except NoKernels as error:
        document = _unmeasured(error)
    if args.format == "json":
        text = to_json(document)
    elif args.format == "csv":
        text = _csv_text(document)
    else:
        text = _table_text(document, findings)
    write_text(text, args.output, [*recorded.files.paths, *args.paths])
    return STATUS[document["verdict"]]


def _measured(
    args: argparse.Namespace, settings: Settings, recorded: Recorded
) -> tuple[dict[str, Any], list[ImbalanceFinding]]:
    """The document of the command, and the finding of each group of each check."""
    from pytest_sglprof._cli.options import read_table

    if args.metric == LATENESS:
        _check_lateness(args, settings)
        table = read_table(recorded.files, args, settings)
        return check_document(table, (), None, _late(table, args, settings), args.limit), []
    thresholds = _thresholds(args, settings, recorded)
    table = read_table(recorded.files, args, settings)
    verdict = _judged(table, thresholds, settings, recorded)
    findings = [each for threshold in thresholds for each in _findings(verdict.of(threshold))]
    late = None if _is_selected(args) else _late(table, args, settings)
    return check_document(table, thresholds, verdict, late, None), findings


def _unmeasured(error: NoKernels) -> dict[str, Any]:
    """The document of a window whose kernels were not recorded: nothing can be compared."""
    return {
        "verdict": "inconclusive",
        "reason": error.what,
        "source": "gpu",
        "notes": [error.hint],
        "checks": [],
        "stragglers": None,
    }


def check_document(
    table: KernelTable,
    thresholds: Sequence[Threshold],
    verdict: Verdict | None,
    late: Sequence[StragglerFinding] | None,
    late_limit: float | None,
) -> dict[str, Any]:
    """The JSON of the command.

    checks: one object for each threshold. stragglers: the sync group whose rank is the latest,
    with all groups under `groups`; None if not asked for. verdict, reason: over everything that
    has a limit. Times in ns.
    """
    checks = [_check(each, verdict.of(each)) for each in thresholds] if verdict else []
    stragglers = None if late is None else _stragglers(late, late_limit)
    if verdict is None and stragglers is not None:
        is_judged = late_limit is not None or stragglers["verdict"] == "inconclusive"
        word, reason = stragglers["verdict"] if is_judged else MEASURED, stragglers["reason"]
    else:
        words = [check["verdict"] for check in checks]
        word = next((word for word in (*WORST_FIRST, "pass") if word in words), MEASURED)
        deciding = [check["reason"] for check in checks if check["verdict"] == word]
        reason = "; ".join(dict.fromkeys(deciding)) if word == "fail" else deciding[0]
    return {
        "verdict": word,
        "reason": reason,
        "source": table.source,
        "notes": list(table.notes),
        "checks": checks,
        "stragglers": stragglers,
    }


def _judged(
    table: KernelTable, thresholds: Sequence[Threshold], settings: Settings, recorded: Recorded
) -> Verdict:
    from pytest_sglprof._verdict.judge import judge

    window = recorded.window
    is_complete = window is None or window.state == "complete"
    return judge(
        table,
        thresholds,
        min_steps=settings.min_steps,
        min_share=settings.min_share,
        expected_ranks=window.expected_ranks if window else (),
        missing_ranks=window.missing_ranks if window else (),
        incomplete_reason=None if window is None or is_complete else window.state_reason,
    )


def _late(
    table: KernelTable, args: argparse.Namespace, settings: Settings
) -> tuple[StragglerFinding, ...]:
    from pytest_sglprof._analysis.straggler import DEFAULT_LATENESS, stragglers

    has_limit = args.metric == LATENESS and args.limit is not None
    limit = args.limit if has_limit else DEFAULT_LATENESS
    return stragglers(table, limit=limit, min_steps=settings.min_steps)


# What is judged.


def _is_selected(args: argparse.Namespace) -> bool:
    options = (args.metric, args.limit, args.scope, args.kernel, args.stage)
    return any(option is not None for option in options)


def _thresholds(
    args: argparse.Namespace, settings: Settings, recorded: Recorded
) -> tuple[Threshold, ...]:
    """The threshold of the options, else those of the recorded window, else those configured.

    The limit is infinite where nobody set one.
    """
    if _is_selected(args):
        return (_selected(args, settings),)
    judged = recorded.window.judgements if recorded.window else ()
    is_changed = any(assignment.startswith("threshold") for assignment in args.set or ())
    if judged and args.config is None and not is_changed:
        thresholds = tuple(dict.fromkeys(judgement.threshold for judgement in judged))
    else:
        thresholds = settings.thresholds
    return tuple(
        replace(each, limit=math.inf) if each.origin == "default" else each for each in thresholds
    )


def _selected(args: argparse.Namespace, settings: Settings) -> Threshold:
    from pytest_sglprof._config.thresholds import (
        check_kernel,
        check_limit,
        check_metric,
        check_stage,
    )

    origin = "sglprof check"
    metric = check_metric(args.metric or "slowdown", origin)
    scope, stage = args.scope or "compute", args.stage or ""
    _check_scope(scope, settings, origin)
    check_stage(stage, origin, "--stage")
    limit = math.inf
    if args.limit is not None:
        limit = check_limit(metric, args.limit, origin, "--limit")
    if args.kernel:
        check_kernel(args.kernel, origin, "--kernel")
    kernel = args.kernel or ""
    return Threshold(metric, limit, scope, kernel, stage, origin="command line")


def _check_scope(scope: str, settings: Settings, origin: str) -> None:
    """Raises `SettingsError` for a scope that resembles a known one.

    Any other may be a category of a configuration that is not available here.
    """
    from pytest_sglprof._config.thresholds import SCOPES, check_scope

    known = (*SCOPES, *settings.category_names)
    if scope not in known and did_you_mean([scope], known):
        check_scope(scope, settings.category_names, origin, "--scope")


def _check_lateness(args: argparse.Namespace, settings: Settings) -> None:
    subject = next((name for name in ("scope", "kernel", "stage") if getattr(args, name)), "")
    if subject:
        raise SettingsError(
            f"--{subject} with --metric {LATENESS}",
            expected=f"one of the two: {LATENESS} covers all work between collectives",
            hint=f"leave --{subject} out, or choose another metric",
        )
    if args.limit is not None and not 0 <= args.limit < 1:
        raise SettingsError(f"--limit {args.limit:g}: must be a share from 0 to below 1")
    if settings.min_steps < 1:
        raise SettingsError(f"--min-steps {settings.min_steps}: must be 1 or more for {LATENESS}")


def _findings(verdict: Verdict) -> list[ImbalanceFinding]:
    return [each.finding for each in verdict.judgements if each.finding is not None]


# The JSON document.


def _check(threshold: Threshold, verdict: Verdict) -> dict[str, Any]:
    """One threshold: the work group that decided, with all groups under `groups`."""
    from pytest_sglprof._analysis.imbalance import worst_finding
    from pytest_sglprof._report.build import finding_document

    def word(verdict: str) -> str:
        is_judged = math.isfinite(threshold.limit) or verdict == "inconclusive"
        return verdict if is_judged else MEASURED

    groups = [
        {**finding_document(each.finding), "verdict": word(each.verdict), "reason": each.reason}
        for each in verdict.judgements
        if each.finding is not None
    ]
    deciding = verdict.deciding
    finding = deciding.finding if deciding is not None else None
    place = {"scope": threshold.scope, "kernel": threshold.kernel, "stage": threshold.stage}
    return {
        **finding_document(finding or worst_finding((), **place)),
        **place,
        "metric": threshold.metric,
        "value": deciding.value if deciding is not None else None,
        "limit": threshold.limit if math.isfinite(threshold.limit) else None,
        "verdict": word(verdict.word),
        "reason": verdict.reason,
        "groups": groups,
    }


def _stragglers(late: Sequence[StragglerFinding], limit: float | None) -> dict[str, Any]:
    """The group that decided, with all groups under `groups`. limit: None if none was set."""
    from pytest_sglprof._report.build import finding_document

    groups = [finding_document(finding) for finding in late]
    top: dict[str, Any] = min(
        groups,
        key=lambda group: (WORST_FIRST.index(group["verdict"]), -(group["lateness"] or 0.0)),
        default=_NO_SYNC_GROUP,
    )
    if limit is None and top["verdict"] == "pass":
        lateness = f"{100 * (top['lateness'] or 0.0):.1f} % of the work"
        top["reason"] = f"no rank keeps the others waiting: the latest arrives {lateness} later"
    return {**top, "groups": groups}


_NO_SYNC_GROUP: dict[str, Any] = {
    "group": "",
    "straggler": None,
    "verdict": "inconclusive",
    "reason": "the window has no rank",
    "cause": None,
    "lateness": None,
    "ranks": [],
}


# The document as CSV and as a table.

_CHECK_KEYS = (
    *("group", "rank", "total_ns", "busy_ns", "slowest_share", "scope", "kernel", "stage"),
    *("slowdown", "factor", "lost_ns", "lost_share", "slowest", "work", "work_ratio"),
    *("lost_ns_per_token", "metric", "limit", "verdict"),
)
_STRAGGLER_KEYS = (
    *("group", "rank", "compute_ns", "idle_ns", "wait_ns", "late_ns", "total_ns"),
    *("slowest_share", "explained_share", "straggler", "verdict", "cause"),
)


def _csv_text(document: dict[str, Any]) -> str:
    """One row for each rank of each check, or of each sync group if there are no checks."""
    if document["checks"]:
        records = [
            {**check, **group, **rank}
            for check in document["checks"]
            for group in check["groups"]
            for rank in group["ranks"]
        ]
        return to_csv(records, _CHECK_KEYS)
    groups = (document["stragglers"] or {"groups": []})["groups"]
    return to_csv(
        [{**group, **rank} for group in groups for rank in group["ranks"]], _STRAGGLER_KEYS
    )


def _table_text(document: dict[str, Any], findings: Sequence[ImbalanceFinding]) -> str:
    """findings: one for each group of each check, in their order."""
    text = f"{document['verdict']}: {document['reason']}\n"
    remaining = iter(findings)
    for check in document["checks"]:
        if len(document["checks"]) > 1:
            text += f"\n{check['verdict']}: {check['reason']}\n"
        text += _check_text(check, [next(remaining) for _ in check["groups"]])
    stragglers = document["stragglers"]
    if stragglers is not None:
        if document["checks"]:
            is_known = stragglers["verdict"] != "inconclusive"
            text += f"\n{MEASURED if is_known else 'inconclusive'}: {stragglers['reason']}\n"
        text += _straggler_text(stragglers)
    return text + "".join(f"note: {note}\n" for note in document["notes"])


def _check_text(check: dict[str, Any], findings: Sequence[ImbalanceFinding]) -> str:
    from pytest_sglprof._report.terminal import contributor_lines, imbalance_line
    from pytest_sglprof._verdict.wording import milliseconds, percent

    subject = f"/{check['kernel']}/" if check["kernel"] else check["scope"]
    columns = (
        Column("rank", left=True),
        Column("total_ns", "summed ms", milliseconds),
        Column("busy_ns", f"{subject} ms", milliseconds),
        Column("slowest_share", "slowest in", percent),
    )
    text = ""
    for group, finding in zip(check["groups"], findings, strict=True):
        title = f"{group['group']}: " if group["group"] else ""
        shown = columns if _overlaps(group) else (columns[0], *columns[2:])
        text += f"\n{title}{imbalance_line(finding)}\n\n{render(group['ranks'], shown, 'table')}"
        text += "".join(f"{line}\n" for line in contributor_lines(finding))
    return text


def _overlaps(group: dict[str, Any]) -> bool:
    """Whether kernels overlap, so that the sum of their times exceeds the busy time."""
    return any(figure["total_ns"] != figure["busy_ns"] for figure in group["ranks"])


def _straggler_text(stragglers: dict[str, Any]) -> str:
    from pytest_sglprof._verdict.wording import duration, milliseconds, percent

    columns = (
        Column("rank", left=True),
        Column("compute_ns", "compute ms", milliseconds),
        Column("idle_ns", "idle ms", milliseconds),
        Column("wait_ns", "waits ms", milliseconds),
        Column("slowest_share", "latest in", percent),
        Column("explained_share", "explains", percent),
        Column("total_ns", "all kernels ms", milliseconds),
    )
    text = ""
    for group in stragglers["groups"]:
        title = (
            f"{group['group']}: {group['verdict']}: {group['reason']}\n" if group["group"] else ""
        )
        text += f"\n{title}{render(group['ranks'], columns, 'table')}"
        text += _totals_line(group)
        late = next((rank for rank in group["ranks"] if rank["rank"] == group["straggler"]), None)
        for kernel in late["kernels"][:MAX_SHOWN_KERNELS] if late else ():
            text += f"{kernel['name']}: {duration(kernel['ns'])} more than on the others\n"
        if group["clock_uncertainty_ns"] is not None:
            text += f"{_clock_words(group)}\n"
    return text


def _clock_words(group: dict[str, Any]) -> str:
    """How far apart the clocks of the ranks are, if more than is uncertain."""
    from pytest_sglprof._verdict.wording import duration

    offsets, uncertainty = group["clock_offsets_ns"] or (0.0,), group["clock_uncertainty_ns"]
    apart = max(offsets) - min(offsets)
    if apart <= uncertainty:
        return f"clocks agree within {duration(uncertainty)}"
    return (
        f"clocks are {duration(apart)} apart, which is corrected, to within "
        f"{duration(uncertainty)}, by the ends of collectives"
    )


def _totals_line(group: dict[str, Any]) -> str:
    if group["straggler"] is None or group["totals_difference"] is None:
        return ""
    most = max(group["ranks"], key=lambda rank: rank["total_ns"])["rank"]
    small = group["totals_difference"] < SMALL_DIFFERENCE
    text = f"sums of all kernels differ by {100 * group['totals_difference']:.1f} %"
    text += " only" if small else f" and are largest on {most}"
    return f"{text}: ranks that arrive early wait inside the collective\n"
