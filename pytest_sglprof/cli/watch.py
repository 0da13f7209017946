"""`sglprof watch URL|LOG`: load of the ranks, live or from a finished log, and its onsets."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import IO, TYPE_CHECKING

from pytest_sglprof.cli.options import positive
from pytest_sglprof.errors import ExitStatus, Inconclusive, SettingsError

if TYPE_CHECKING:
    from pytest_sglprof.analysis.change_points import LoadOutline
    from pytest_sglprof.analysis.unequal import OnsetRule
    from pytest_sglprof.cli.watch_jsonl import JsonLines


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command's options."""
    parser = subparsers.add_parser(
        "watch",
        help="load of the ranks, live or from a log, and when it became unequal",
        description="Watches a running server (URL), or reads a log: a finished one whole, "
        "with --follow one that grows. Keys come from SGLPROF_API_KEY and "
        "SGLPROF_ADMIN_API_KEY.",
        epilog="exit status: 0 watched, 2 usage or unreadable input, 130 interrupted; with --check "
        "1 an onset, 3 it cannot be known (one DP rank, or too little load)",
    )
    add = parser.add_argument
    add("target", metavar="URL|LOG", help="http://HOST:PORT, or the server's log")
    add_rule(parser)
    add("--follow", action="store_true", help="the log still grows: watch it")
    add("--for", dest="seconds", type=positive, metavar="S", help="end a live watch after S s")
    add("--jsonl", metavar="FILE", help="a JSON object a sample and an onset; - is the output")
    add(
        "--check",
        dest="exit_zero",
        action="store_false",
        help="answer with the exit status whether there was an onset",
    )


def add_rule(parser: argparse.ArgumentParser) -> None:
    """The options that say what an onset is."""
    add = parser.add_argument_group("what counts as an onset").add_argument
    add("--factor", type=positive, default=1.5, metavar="X", help="max / mean (default: 1.5)")
    add("--hold", type=positive, default=2.0, metavar="S", help="it has to last (default: 2)")
    add(
        "--min-running",
        type=positive,
        default=8.0,
        metavar="N",
        help="mean requests a rank below which nothing is declared (default: 8)",
    )
    add(
        "--min-gap",
        type=positive,
        default=4.0,
        metavar="N",
        help="requests of the fullest rank above the mean (default: 4)",
    )


def rule_of(args: argparse.Namespace) -> OnsetRule:
    """The rule that the options give; `SettingsError` for one that everything breaks."""
    from pytest_sglprof.analysis.unequal import OnsetRule

    if args.factor <= 1.0:
        raise SettingsError(f"--factor {args.factor:g}", expected="more than 1: max / mean")
    return OnsetRule(args.factor, args.hold, args.min_running, args.min_gap)


def is_url(target: str) -> bool:
    """Whether `target` names a server, not a file."""
    return "://" in target and not Path(target).exists()


def run(args: argparse.Namespace) -> ExitStatus:
    """Watches or reads; `EXCEEDED` where there was an onset."""
    from pytest_sglprof.cli.output import refuse_inputs
    from pytest_sglprof.cli.watch_jsonl import JsonLines

    rule = rule_of(args)
    is_live = is_url(args.target)
    if args.jsonl not in (None, "-") and not is_live:
        refuse_inputs(Path(args.jsonl), [args.target], option="--jsonl")
    with JsonLines(args.jsonl) as lines:
        # Rows for people must not stand among lines for programs.
        out = sys.stderr if args.jsonl == "-" else sys.stdout
        if is_live or args.follow:
            from pytest_sglprof.cli.watch_live import watch_live

            return watch_live(args, rule, lines, out)
        return _finished(Path(args.target), rule, lines, out)


def _finished(path: Path, rule: OnsetRule, lines: JsonLines, out: IO[str]) -> ExitStatus:
    """Every onset of a finished log with its period, and what each rank had on average.

    The log is read anew for each look, so that none of its samples must be held.
    """
    from pytest_sglprof.analysis.change_points import LoadOutline, finished_load
    from pytest_sglprof.analysis.onset import OnsetDetector
    from pytest_sglprof.analysis.unequal import CANNOT_KNOW
    from pytest_sglprof.cli.watch_table import onset_line
    from pytest_sglprof.values import LoadSample
    from pytest_sglprof.watch.log_file import FinishedLog

    if not path.is_file():
        raise SettingsError(
            f"{path} is no log", expected="a file, or http://HOST:PORT", hint="check the path"
        )
    log = FinishedLog(path)
    outline = LoadOutline()
    has_balances = False
    for block in log:
        lines.samples(block)
        for sample in block:
            if isinstance(sample, LoadSample):
                outline.add(sample)
            else:
                has_balances = True
    if not outline.ranks and not has_balances:
        raise Inconclusive(
            f"{path} holds no Prefill or Decode line",
            expected="the log of an SGLang server that had requests",
            hint="SGLang writes them to its standard error",
        )
    if not has_balances and not any(outline.ranks):
        raise Inconclusive(CANNOT_KNOW)
    loads = (sample for block in log for sample in block if isinstance(sample, LoadSample))
    found = finished_load(loads, rule, milliseconds=log.has_milliseconds, outline=outline)
    measured = OnsetDetector(rule, source="log")  # for what the server measures itself
    for block in log if has_balances else ():
        for sample in block:
            measured.add([sample], sample.time)
    balanced = [onset for onset in measured.onsets if onset.kind in ("experts", "dp_tokens")]
    onsets = sorted((*found.onsets, *balanced), key=lambda onset: onset.time)
    for onset in onsets:
        lines.onset(onset)
        out.write(f"{onset_line(onset)}\n")
    out.write("".join(f"{line}\n" for line in _rank_lines(outline)))
    if onsets:
        return ExitStatus.EXCEEDED
    judged = max(found.judged_s, measured.judged_s)
    if judged < rule.hold:
        raise Inconclusive(
            f"the load had {rule.min_running:g} requests a rank for {judged:.0f} s only",
            expected=f"at least {rule.hold:g} s: few requests cannot be spread evenly",
            hint="lower --min-running, and --min-gap with it",
        )
    out.write(f"no onset: balanced for {judged:.0f} s, λ at most {found.worst:.2f}\n")
    return ExitStatus.DONE


def _rank_lines(outline: LoadOutline) -> list[str]:
    from pytest_sglprof.cli.watch_table import ONE_RANK
    from pytest_sglprof.report.text_table import text_table

    rows = []
    for label, rank in sorted(outline.ranks.items()):
        running, waiting = rank.running / rank.lines, rank.waiting / rank.lines
        mean = f"{rank.tokens / rank.with_tokens:.0f}" if rank.with_tokens else "-"
        rows.append([label or ONE_RANK, str(rank.lines), f"{running:.1f}", f"{waiting:.1f}", mean])
    head = ["rank", "lines", "running a line", "waiting a line", "tokens a line"]
    return text_table(head, rows, left=[0])
