"""`sglprof compare OLD NEW`: which kernels got slower between two windows, at equal work."""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytest_sglprof._cli.options import (
    PATHS,
    NewParser,
    input_options,
    ordered,
    output_options,
    settings_of,
    settings_options,
    table_options,
    to_csv,
    to_json,
    write_notes,
    write_text,
)
from pytest_sglprof._errors import ExitStatus
from pytest_sglprof._metrics import MEASURED, WORST_FIRST
from pytest_sglprof._trace.categories import NOT_COMPUTE
from pytest_sglprof._verdict.wording import (
    against_limit,
    duration,
    percent,
    ratio,
    shorten,
    signed_duration,
    text_table,
)

if TYPE_CHECKING:
    from pytest_sglprof._analysis.compare import Change, StageChange
    from pytest_sglprof._cli.sides import Side
    from pytest_sglprof._config.load import Settings

STATUS = {
    "pass": ExitStatus.DONE,
    MEASURED: ExitStatus.DONE,
    "fail": ExitStatus.EXCEEDED,
    "inconclusive": ExitStatus.INCONCLUSIVE,
}
WHAT = f"{PATHS}; or a baseline"
SORT_KEYS = ("name", "category", "before_ns", "now_ns", "ratio", "lost_ns", "share")
TOP = 20  # kernels that are listed of a stage
ONE_LIFE = (
    "One server life each: how much lives of one version differ is not known, so no figure has an "
    "interval here. `sglprof ab` and baselines tell."
)
NAME_WIDTH = 60
MIN_LOST = 0.0005  # of compute; smaller differences are counted, not listed


def add_parser(new_parser: NewParser) -> None:
    """Adds the options of the command."""
    parser = new_parser(
        description="Compares two windows on equal work and lists the kernels by the time that was "
        "lost or won, in time per step, or per call where the source has no steps. Kernels "
        "that appear, vanish or are called more or less often are named. Without --limit there is "
        "no verdict.",
        epilog="exit status: 0 compared, and nothing is above --limit; 1 above --limit; 2 wrong "
        "usage or unreadable input; 3 they cannot be compared (other GPUs, other work, …)",
        parents=[
            input_options(),
            output_options(),
            table_options(SORT_KEYS, f"kernels of a stage (default: {TOP}, most lost first)"),
            settings_options(),
        ],
    )
    parser.add_argument("old", type=Path, metavar="OLD", help=f"before: {WHAT}")
    parser.add_argument("new", type=Path, metavar="NEW", help="now: the same")
    group = parser.add_argument_group("selection")
    group.add_argument(
        "--limit", type=_limit, metavar="R", help="exit with 1 if now / before is above R, say 1.05"
    )
    group.add_argument(
        "--scope",
        default="compute",
        help="what has the limit, and which kernels are listed: compute (the default: all but "
        "communication and memory), all, or a category such as moe",
    )
    group.add_argument("--stage", help="only steps of one stage: decode, prefill, mixed or idle")
    parser.set_defaults(top=TOP)


def run(args: argparse.Namespace) -> ExitStatus:
    """Prints the comparison; returns the exit status of its verdict."""
    from pytest_sglprof._cli.inputs import inputs_of
    from pytest_sglprof._cli.sides import pairs_of, sides_of

    before, now = inputs_of(args, [args.old]), inputs_of(args, [args.new])
    write_notes((*before.notes, *now.notes))
    settings = settings_of(args, [*before.places, *now.places])
    _check_selection(args, settings)
    old, new = sides_of(before, args, settings), sides_of(now, args, settings)
    pairs, alone = pairs_of(old, new)
    document = compare_document(pairs, alone, args)
    if args.format == "json":
        text = to_json(document)
    else:
        text = _csv_text(document) if args.format == "csv" else _table_text(document, args.top)
    read = [file for side in (*old, *new) for file in side.files]
    slow = () if args.format == "table" else None
    write_text(text, args.output, [*before.recorded, *now.recorded, *read], slow)
    return STATUS[document["verdict"]]


def _limit(text: str) -> float:
    number = float(text)
    if not 1 <= number < math.inf:
        raise argparse.ArgumentTypeError("must be a ratio, 1 or more: 1.05 allows 5 %")
    return number


def _check_selection(args: argparse.Namespace, settings: Settings) -> None:
    from pytest_sglprof._config.thresholds import check_scope, check_stage

    check_stage(args.stage or "", "sglprof compare", "--stage")
    check_scope(
        args.scope, settings.category_names, "sglprof compare", "--scope", metric="slowdown"
    )


# What is compared.


def compare_document(
    pairs: Sequence[tuple[Side, Side]], alone: Sequence[str], args: argparse.Namespace
) -> dict[str, Any]:
    """The JSON of the command. Times in ns per step, or per call; `lost_ns` is now - before.

    verdict: of all pairs; "measured" without a limit.
    """
    compared = [_pair(old, new, args) for old, new in pairs]
    words = [pair["verdict"] for pair in compared]
    word = next((each for each in (*WORST_FIRST, MEASURED) if each in words), "inconclusive")
    reasons = [pair["reason"] for pair in compared if pair["verdict"] == word]
    return {
        "verdict": word,
        "reason": "; ".join(dict.fromkeys(filter(None, reasons))) or _no_pair(compared, alone),
        "limit": args.limit,
        "scope": args.scope,
        "pairs": compared,
        "alone": list(alone),
    }


def _no_pair(compared: Sequence[Any], alone: Sequence[str]) -> str:
    return "" if compared else f"no window is in both: {'; '.join(alone)}"


def _pair(old: Side, new: Side, args: argparse.Namespace) -> dict[str, Any]:
    from pytest_sglprof._analysis.compare import compare_strata
    from pytest_sglprof._cli.sides import differences, other_versions

    reason = differences(old, new)
    changes = () if reason else compare_strata(old.groups, new.groups)
    chosen = [each for each in changes if not args.stage or args.stage == each.stage]
    stages = [_stage(each, args) for each in chosen]
    if not stages and not reason:
        where = f" in {args.stage}" if args.stage else ""
        reason = f"neither has steps{where} that can be compared"
    words = [stage["verdict"] for stage in stages]
    word = "inconclusive" if reason else _word(words, args.limit)
    deciding = [stage["reason"] for stage in stages if stage["verdict"] == word]
    notes = [ONE_LIFE] if old.lives == new.lives == 1 else [_lives(old, new)]
    notes += [f"{name} {was} before, {now} now" for name, was, now in other_versions(old, new)]
    return {
        "old": old.title,
        "new": new.title,
        "runs": [old.run, new.run],
        "lives": [old.lives, new.lives],
        "verdict": word,
        "reason": reason or "; ".join(deciding),
        "notes": notes,
        "stages": stages,
    }


def _lives(old: Side, new: Side) -> str:
    return (
        f"Means of {old.lives} and {new.lives} server lives; no interval is claimed here: "
        "pytest --sglprof-baselines judges them."
    )


def _word(words: Sequence[str], limit: float | None) -> str:
    """Of a pair. Without a limit one stage that could be compared is enough."""
    if limit is None:
        return MEASURED if MEASURED in words else "inconclusive"
    return next(each for each in (*WORST_FIRST, MEASURED) if each in words)


def _stage(change: StageChange, args: argparse.Namespace) -> dict[str, Any]:
    """One stage of one work group, with the figure that the limit is for."""
    name = " ".join(filter(None, (change.group, change.stage)))
    figure = _figure(change, args.scope)
    reason, word = change.reason, "inconclusive"
    if not reason and (figure is None or figure.ratio is None):
        reason = f"no time in {args.scope} before, so that there is no ratio"
    elif not reason and figure is not None and figure.ratio is not None:
        word = MEASURED
        if args.limit is not None:
            word = "fail" if figure.ratio > args.limit else "pass"
        shown, limit = f"{figure.ratio:.3f}", ""
        if args.limit is not None:
            shown, limit = against_limit(figure.ratio, args.limit)
        reason = f"{args.scope} takes {shown} x the time before{limit}"
    where = f"{name}: " if name else ""
    kernels = [
        _kernel(each, change) for each in change.kernels if _is_in(each.category, args.scope)
    ]
    kernels.sort(key=lambda each: (-(each["lost_ns"] or 0.0), each["name"]))
    kernels = ordered(kernels, args.sort)
    return {
        "group": change.group,
        "stage": change.stage,
        "unit": change.unit,
        "matched": [change.matched_before, change.matched_now],
        "verdict": word,
        "reason": where + reason,
        "cautions": list(change.cautions),
        "figure": None if figure is None else _numbers(figure),
        "compute": None if change.compute is None else _numbers(change.compute),
        "categories": [_numbers(each) for each in change.categories],
        "kernels": kernels,
        "strata": [asdict(each) | {"work": _work(each)} for each in change.strata],
    }


def _work(stratum: Any) -> str:
    from pytest_sglprof._report.page.baseline import work_words

    return work_words(stratum.work)


def _figure(change: StageChange, scope: str) -> Change | None:
    """Before and now of the scope; None where neither has it."""
    if scope == "compute" or change.compute is None:
        return change.compute
    if scope != "all":
        return next((each for each in change.categories if each.name == scope), None)
    from pytest_sglprof._analysis.compare import Change

    before, now = (
        sum(getattr(each, side) or 0.0 for each in change.categories)
        for side in ("before_ns", "now_ns")
    )
    return Change("all", "all", before, now)


def _is_in(category: str, scope: str) -> bool:
    if scope == "compute":
        return category not in NOT_COMPUTE
    return scope in ("all", category)


def _numbers(change: Change) -> dict[str, Any]:
    return {
        "name": change.name,
        "before_ns": change.before_ns,
        "now_ns": change.now_ns,
        "ratio": change.ratio,
        "lost_ns": change.difference_ns,
    }


def _kernel(change: Change, of: StageChange) -> dict[str, Any]:
    """A kernel. lost_ns: by call now - before x the mean calls of both windows.

    word: "new", "gone", "more calls", "fewer calls", or "" for the same calls of both.
    """
    lost = change.difference_ns
    if of.unit == "call":
        base = of.compute.before_ns if of.compute is not None else None
        lost = None if change.share is None or not base else change.share * base
    return _numbers(change) | {
        "category": change.category,
        "lost_ns": lost,
        "share": change.share,
        "calls": [change.before_calls, change.now_calls],
        "word": _kernel_word(change, of),
    }


def _kernel_word(change: Change, of: StageChange) -> str:
    if change.before_ns == 0.0:
        return "new"
    if change.now_ns == 0.0:
        return "gone"
    if of.unit == "call" or not change.changes_calls:
        return ""
    return (
        "more calls" if (change.now_calls or 0.0) > (change.before_calls or 0.0) else "fewer calls"
    )


# How it is written.


def _csv_text(document: dict[str, Any]) -> str:
    """A row for each kernel of each stage."""
    places, times = ("group", "stage", "unit"), ("before_ns", "now_ns", "ratio", "lost_ns", "share")
    keys = ("old", "new", *places, "category", "name", *times, "before_calls", "now_calls", "word")
    rows = []
    for pair in document["pairs"]:
        for stage in pair["stages"]:
            place = {"old": pair["old"], "new": pair["new"]}
            place |= {key: stage[key] for key in places}
            for kernel in stage["kernels"]:
                before, now = kernel["calls"]
                rows.append(place | kernel | {"before_calls": before, "now_calls": now})
    return to_csv(rows, keys)


def _table_text(document: dict[str, Any], top: int) -> str:
    lines = [line for pair in document["pairs"] for line in _pair_lines(pair, top)]
    lines += [f"not compared: {each}" for each in document["alone"]]
    reason = f": {document['reason']}" if document["reason"] else ""
    return "\n".join([*lines, f"{document['verdict']}{reason}"]) + "\n"


def _pair_lines(pair: dict[str, Any], top: int) -> Iterator[str]:
    before, now = (f" of {run}" if run else "" for run in pair["runs"])
    yield f"before: {pair['old']}{before}"
    yield f"now:    {pair['new']}{now}"
    yield ""
    for stage in pair["stages"]:
        yield from _stage_lines(stage, top)
        yield ""
    for note in pair["notes"] if pair["stages"] else ():
        yield f"note: {note}"


def _stage_lines(stage: dict[str, Any], top: int) -> Iterator[str]:
    unit, figure = stage["unit"], stage["figure"]
    if figure is None:
        yield stage["reason"]
        return
    times = f"{_time(figure['before_ns'])} before, {_time(figure['now_ns'])} now"
    yield f"{stage['reason']}: {times} ({signed_duration(figure['lost_ns'])} {_per(unit)})"
    before, now = stage["matched"]
    what = "steps" if unit == "step" else "compute"
    yield f"equal work: {percent(before)} of the {what} before, {percent(now)} now"
    yield from stage["cautions"]
    listed = _listed(stage["kernels"], top)
    if not listed:
        yield "no kernel changed by 0.05 % of compute or more"
        return
    head = ["kernel", "category", "before", "now", "ratio", f"lost {_per(unit)}", "of compute"]
    head += ["calls", ""]
    yield from text_table(head, [_row(each) for each in listed], left=(0, 1, 8))
    left = len(stage["kernels"]) - len(listed)
    if left:
        yield f"{left} more kernels; --format csv has all"


def _listed(kernels: Sequence[dict[str, Any]], top: int) -> list[dict[str, Any]]:
    """Those that changed most, in the order of `kernels`, and as many of those that only one side
    has or that are called more or less often."""
    by_size = sorted(kernels, key=lambda each: -abs(each["lost_ns"] or 0.0))
    large = [each["name"] for each in by_size if _is_large(each)][:top]
    named = [each["name"] for each in by_size if each["word"] and each["name"] not in large][:top]
    return [each for each in kernels if each["name"] in (*large, *named)]


def _per(unit: str) -> str:
    return "a step" if unit == "step" else "a window"


def _is_large(kernel: dict[str, Any]) -> bool:
    share: float = kernel["share"] or 0.0
    return abs(share) >= MIN_LOST


def _row(kernel: dict[str, Any]) -> list[str]:
    return [
        shorten(kernel["name"], NAME_WIDTH),
        kernel["category"],
        _time(kernel["before_ns"]),
        _time(kernel["now_ns"]),
        ratio(kernel["ratio"], 3, none="–"),
        signed_duration(kernel["lost_ns"], none="–"),
        percent(kernel["share"], 1, sign=True, none="–"),
        _calls(*kernel["calls"]),
        kernel["word"],
    ]


def _calls(before: float | None, now: float | None) -> str:
    if before is None or now is None:
        return "–"
    return f"{before:,.4g}" if before == now else f"{before:,.4g} → {now:,.4g}"


def _time(ns: float | None) -> str:
    return "not listed" if ns is None else duration(ns) if ns else "0"
