"""`sglprof check PATH…`: compare the ranks, name the one they wait for, and apply limits."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pytest_sglprof._cli.options import (
    LATENESS,
    PATHS,
    Column,
    NewParser,
    input_options,
    ordered,
    output_options,
    render,
    select_options,
    settings_of,
    settings_options,
    table_options,
    to_csv,
    to_json,
    write_text,
)
from pytest_sglprof._cli.selection import is_selected, thresholds_of
from pytest_sglprof._config.model import Threshold
from pytest_sglprof._errors import ExitStatus, NoKernels, SettingsError
from pytest_sglprof._metrics import MEASURED, METRICS, WORST_FIRST

if TYPE_CHECKING:
    from pytest_sglprof._analysis.straggler import StragglerFinding
    from pytest_sglprof._analysis.sums import Sums
    from pytest_sglprof._cli.inputs import Recorded
    from pytest_sglprof._config.load import Settings
    from pytest_sglprof._trace.table import KernelTable
    from pytest_sglprof._verdict.judge import Verdict
    from pytest_sglprof._verdict.reasons import Measured

STATUS = {
    "pass": ExitStatus.DONE,
    MEASURED: ExitStatus.DONE,
    "fail": ExitStatus.EXCEEDED,
    "inconclusive": ExitStatus.INCONCLUSIVE,
}
MAX_SHOWN_KERNELS = 3
RANK_KEYS = ("rank", "total_ns", "slowest_share")  # of ranks in every table
SMALL_DIFFERENCE = 0.15
SHOWN_OVERLAP = 0.01


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
            table_options(RANK_KEYS, "ranks of each group"),
            settings_options(),
        ],
    )
    parser.add_argument(
        "--power",
        type=_power,
        metavar="SHARE",
        help="also print how slow a rank must be for this window to find it with that "
        "probability, 0.5 to 1, and how many steps find 1.5 times what the limit allows",
    )
    parser.add_argument(
        "--exit-zero",
        action="store_true",
        help="exit with status 0 whatever the verdict; errors still exit with 2",
    )


def run(args: argparse.Namespace) -> ExitStatus:
    """Prints figures and verdict; returns the exit status of the verdict."""
    from pytest_sglprof._cli.inputs import recorded_by

    recorded = recorded_by(args)
    settings = settings_of(args, recorded.inputs.places)
    findings: list[Measured] = []
    try:
        document, findings = _measured(args, settings, recorded)
    except NoKernels as error:
        document = _unmeasured(error)
    for group in _groups(document):
        group["ranks"] = ordered(group["ranks"], args.sort, args.top)
    if args.format == "json":
        text = to_json(document)
    elif args.format == "csv":
        text = _csv_text(document)
    else:
        text = _table_text(document, findings)
    slow = _slow_ranks(document) if args.format == "table" else None
    write_text(text, args.output, recorded.inputs.recorded, slow)
    return STATUS[document["verdict"]]


def _measured(
    args: argparse.Namespace, settings: Settings, recorded: Recorded
) -> tuple[dict[str, Any], list[Measured]]:
    """The document of the command, and the finding of each group of each check."""
    from pytest_sglprof._analysis.sums import Sums
    from pytest_sglprof._cli.options import read_table

    if args.metric == LATENESS:
        _check_lateness(args, settings)
        sums = Sums(read_table(recorded.files, args, settings))
        return check_document(sums, (), None, _late(sums, args, settings), args.limit), []
    thresholds = thresholds_of(args, settings, recorded.window)
    table = read_table(recorded.files, args, settings)
    verdict = _judged(table, thresholds, settings, recorded)
    findings = [each for threshold in thresholds for each in _findings(verdict.of(threshold))]
    sums = verdict.sums or Sums(table)
    late = None if is_selected(args) else _late(sums, args, settings)
    document = check_document(sums, thresholds, verdict, late, None)
    document["budgets"] = _budgets(sums) if _asks_for_budgets(args, thresholds) else None
    if args.power is not None:
        _add_power(document, thresholds, verdict, args.power)
    return document, findings


def _groups(document: dict[str, Any]) -> list[dict[str, Any]]:
    groups = [group for check in document["checks"] for group in check["groups"]]
    return [*groups, *(document["stragglers"] or {"groups": ()})["groups"]]


def _slow_ranks(document: dict[str, Any]) -> set[str]:
    """Those of failures, and those that others wait for."""
    named = [
        group.get("straggler") or group.get("slowest")
        for group in _groups(document)
        if group["verdict"] == "fail" or group.get("straggler")
    ]
    return {rank for rank in named if rank}


def _add_power(
    document: dict[str, Any], thresholds: Sequence[Threshold], verdict: Verdict, share: float
) -> None:
    """Adds to each group of each check what the window could have found, under `power`."""
    for threshold, check in zip(thresholds, document["checks"], strict=True):
        if math.isinf(threshold.limit):
            raise SettingsError(
                "--power without a limit",
                expected="the limit above which a rank is to be found",
                hint="add --limit 1.05",
            )
        metric = METRICS[threshold.metric]
        judged = [each for each in verdict.of(threshold).judgements if each.measured is not None]
        for group, judgement in zip(check["groups"], judged, strict=True):
            estimated = judgement.estimate
            if estimated is None or metric.better == "higher":
                group["power"] = None
                continue
            bound = metric.pass_bound(threshold.limit)
            needed = estimated.steps_to_find(bound, threshold.limit, share)
            group["power"] = {
                "probability": share,
                "found_from": estimated.found_from(threshold.limit, share),
                "steps": math.ceil(needed),
                "steps_find": bound,
            }


def _unmeasured(error: NoKernels) -> dict[str, Any]:
    """The document of a window whose kernels were not recorded: nothing can be compared."""
    return {
        "verdict": "inconclusive",
        "reason": error.what,
        "source": "gpu",
        "notes": [error.hint],
        "checks": [],
        "stragglers": None,
        "budgets": None,
        "sync": [],
    }


def check_document(
    sums: Sums,
    thresholds: Sequence[Threshold],
    verdict: Verdict | None,
    late: Sequence[StragglerFinding] | None,
    late_limit: float | None,
) -> dict[str, Any]:
    """The JSON of the command.

    checks: one object for each threshold. stragglers: the sync group whose rank is the latest,
    with all groups under `groups`; None if not asked for. budgets: what steps are made of, filled
    in by the caller. sync: what ranks with different input cost each other, by sync group.
    verdict, reason: over everything that has a limit. Times in ns.
    """
    table = sums.table
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
        "budgets": None,
        "sync": _syncs(sums),
    }


def _judged(
    table: KernelTable, thresholds: Sequence[Threshold], settings: Settings, recorded: Recorded
) -> Verdict:
    from pytest_sglprof._verdict.judge import judge

    window = recorded.window
    return judge(
        table,
        thresholds,
        min_steps=settings.min_steps,
        min_share=settings.min_share,
        expected_ranks=window.expected_ranks if window else (),
        missing_ranks=window.missing_ranks if window else (),
        incomplete_reason=recorded.doubt,
    )


def _late(sums: Sums, args: argparse.Namespace, settings: Settings) -> tuple[StragglerFinding, ...]:
    from pytest_sglprof._analysis.straggler import DEFAULT_LATENESS, stragglers

    has_limit = args.metric == LATENESS and args.limit is not None
    limit = args.limit if has_limit else DEFAULT_LATENESS
    return stragglers(sums.table, sums.waited, limit=limit, min_steps=settings.min_steps)


# What is judged.


def _check_lateness(args: argparse.Namespace, settings: Settings) -> None:
    options = ("scope", "kernel", "stage", "across")
    subject = next((name for name in options if getattr(args, name)), "")
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


def _findings(verdict: Verdict) -> list[Measured]:
    return [each.measured for each in verdict.judgements if each.measured is not None]


def _asks_for_budgets(args: argparse.Namespace, thresholds: Sequence[Threshold]) -> bool:
    return args.format == "json" or any(METRICS[each.metric].of == "steps" for each in thresholds)


def _budgets(sums: Sums) -> list[dict[str, Any]]:
    """What the steps of each kind are made of."""
    from pytest_sglprof._analysis.budget import budgets
    from pytest_sglprof._report.build import finding_document

    return [finding_document(budget) for budget in budgets(sums.walls)]


def _syncs(sums: Sums) -> list[dict[str, Any]]:
    """What ranks with different input cost each other, and why they differ."""
    from pytest_sglprof._analysis.sync import sync_findings
    from pytest_sglprof._report.build import finding_document

    return [finding_document(each) for each in sync_findings(sums)]


# The JSON document.


def _check(threshold: Threshold, verdict: Verdict) -> dict[str, Any]:
    """One threshold: the work group that decided, with all groups under `groups`."""
    from pytest_sglprof._analysis.imbalance import worst_finding
    from pytest_sglprof._report.build import finding_document

    def word(verdict: str) -> str:
        is_judged = math.isfinite(threshold.limit) or verdict == "inconclusive"
        return verdict if is_judged else MEASURED

    groups = [
        {**finding_document(each.measured), "verdict": word(each.verdict), "reason": each.reason}
        for each in verdict.judgements
        if each.measured is not None
    ]
    deciding = verdict.deciding
    finding = deciding.measured if deciding is not None else None
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
    *("across", "slowdown", "factor", "lost_ns", "lost_share", "slowest", "work", "work_ratio"),
    *("lost_ns_per_token", "metric", "limit", "verdict"),
)
_BUDGET_KEYS = (
    *("steps", "wall_ns", "compute_ns", "communication_ns", "transfer_ns", "waiting_ns"),
    *("copies_ns", "idle_ns", "launching_ns", "between_ns", "median_wall_ns", "ns_per_accepted"),
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
        keys = [*_CHECK_KEYS, *(_BUDGET_KEYS if any(map(_is_of_steps, document["checks"])) else ())]
        return to_csv([{**dict.fromkeys(keys), **record} for record in records], keys)
    groups = (document["stragglers"] or {"groups": []})["groups"]
    return to_csv(
        [{**group, **rank} for group in groups for rank in group["ranks"]], _STRAGGLER_KEYS
    )


def _table_text(document: dict[str, Any], findings: Sequence[Measured]) -> str:
    """findings: one for each group of each check, in their order."""
    text = f"{document['verdict']}: {document['reason']}\n"
    remaining = iter(findings)
    for check in document["checks"]:
        if len(document["checks"]) > 1:
            text += f"\n{check['verdict']}: {check['reason']}\n"
        text += _check_text(check, [next(remaining) for _ in check["groups"]])
        text += _budget_text(check["stage"], document["budgets"] if _is_of_steps(check) else ())
    stragglers = document["stragglers"]
    if stragglers is not None:
        if document["checks"]:
            is_known = stragglers["verdict"] != "inconclusive"
            text += f"\n{MEASURED if is_known else 'inconclusive'}: {stragglers['reason']}\n"
        text += _straggler_text(stragglers)
    text += _sync_text(document["sync"])
    return text + "".join(f"note: {note}\n" for note in document["notes"])


def _check_text(check: dict[str, Any], findings: Sequence[Measured]) -> str:
    from pytest_sglprof._analysis.budget import StepBudget
    from pytest_sglprof._report.terminal import (
        contributor_lines,
        imbalance_line,
        is_across_sync,
        spike_lines,
    )
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
        if isinstance(finding, StepBudget):
            text += _power_text(check, group)
            continue
        across = "across sync" if is_across_sync(finding) else ""
        title = " ".join(filter(None, (group["group"], across)))
        title = f"{title}: " if title else ""
        shown = columns if _overlaps(group) else (columns[0], *columns[2:])
        text += f"\n{title}{imbalance_line(finding)}\n{_power_text(check, group)}\n"
        text += render(group["ranks"], shown, "table")
        lines = (*contributor_lines(finding), *spike_lines(finding))
        text += "".join(f"{line}\n" for line in lines)
    return text


def _is_of_steps(check: dict[str, Any]) -> bool:
    return METRICS[check["metric"]].of == "steps"


def _budget_text(stage: str, budgets: Sequence[dict[str, Any]]) -> str:
    """A table for each kind of step of a stage, "" for all stages."""
    import msgspec

    from pytest_sglprof._analysis.budget import StepBudget
    from pytest_sglprof._verdict.steps import budget_table

    text = ""
    for budget in budgets:
        lines = budget_table(msgspec.convert(budget, StepBudget))
        if lines and stage in ("", budget["stage"]):
            text += "".join(f"{line}\n" for line in ("", *lines))
    return text


def _sync_text(syncs: Sequence[dict[str, Any]]) -> str:
    """What ranks with different input cost each other; "" where all have peers."""
    import msgspec

    from pytest_sglprof._analysis.sync import SyncFinding
    from pytest_sglprof._verdict.sync import sync_lines

    findings = [msgspec.convert(each, SyncFinding) for each in syncs]
    return "".join(f"{line}\n" for each in findings for line in ("", *sync_lines(each)))


def _power_text(check: dict[str, Any], group: dict[str, Any]) -> str:
    """What the window could have found; "" if that was not asked for."""
    if "power" not in group:
        return ""
    if group["power"] is None:
        return "what this window could have found is not known: see its verdict\n"
    metric, known = METRICS[check["metric"]], group["power"]
    share = f"{100 * known['probability']:g} %"
    return (
        f"with a probability of {share} this window finds a {metric.label} from "
        f"{metric.format(known['found_from'], finer=1)} on; {known['steps']:,} steps like these "
        f"find {metric.format(known['steps_find'], finer=1)}\n"
    )


def _power(text: str) -> float:
    """A probability from 0.5 to below 1, for argparse."""
    number = float(text)
    if not 0.5 <= number < 1:
        raise argparse.ArgumentTypeError("must be from 0.5 to below 1")
    return number


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
        if group["clock_margin_ns"] is not None:
            text += f"{_clock_words(group)}\n"
        if unknown := group["kinds"].get("unknown"):
            text += f"not used: {unknown:,} calls that may be p2p or all-to-all\n"
        if (group["overlapped"] or 0.0) >= SHOWN_OVERLAP:
            text += f"ranks compute in {percent(group['overlapped'])} of the time in collectives\n"
    return text


def _clock_words(group: dict[str, Any]) -> str:
    """How far apart the clocks of the ranks are, if more than is uncertain."""
    from pytest_sglprof._verdict.wording import duration

    offsets, margin = group["clock_offsets_ns"] or (0.0,), round(group["clock_margin_ns"])
    apart = round(max(offsets) - min(offsets))
    if any(clock["drift_ppm"] is None for clock in group["clocks"]):
        return f"clocks are taken for one, within {duration(margin)}: it is one host"
    if apart <= margin:
        return f"clocks agree within {duration(margin)}"
    return (
        f"clocks are {duration(apart)} apart, which is corrected, to within "
        f"{duration(margin)}, by the ends of collectives"
    )


def _totals_line(group: dict[str, Any]) -> str:
    if group["straggler"] is None or group["totals_difference"] is None:
        return ""
    most = max(group["ranks"], key=lambda rank: rank["total_ns"])["rank"]
    small = group["totals_difference"] < SMALL_DIFFERENCE
    text = f"sums of all kernels differ by {100 * group['totals_difference']:.1f} %"
    text += " only" if small else f" and are largest on {most}"
    return f"{text}: ranks that arrive early wait inside the collective\n"
