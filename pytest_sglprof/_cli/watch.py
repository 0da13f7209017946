"""`sglprof watch URL|LOG`: the load of each rank, live or from a log, and its onsets."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from pytest_sglprof._cli.options import NewParser, add_rows, positive, settings_options
from pytest_sglprof._cli.screen import ONE_RANK, Screen, onset_line
from pytest_sglprof._cli.terminal import is_interactive
from pytest_sglprof._cli.window_keys import WindowKeys
from pytest_sglprof._config.backends import BACKENDS
from pytest_sglprof._errors import ExitStatus, Inconclusive, SettingsError
from pytest_sglprof._load.onset import CANNOT_KNOW, Onset, OnsetDetector, OnsetRule
from pytest_sglprof._load.samples import BalanceSample, LoadSample
from pytest_sglprof._load.sources import LogFollower
from pytest_sglprof._load.watcher import MAX_SAMPLES, LoadWatch, LogSource, server_watch
from pytest_sglprof._process import ended_in_order
from pytest_sglprof._server.client import SglangClient, patiently
from pytest_sglprof._server.sizes import ServerSizes
from pytest_sglprof._verdict.wording import text_table

if TYPE_CHECKING:
    from pytest_sglprof._load.change_points import LoadOutline
    from pytest_sglprof._load.sources import Sample


def add_parser(new_parser: NewParser) -> None:
    """Adds the options of the command."""
    parser = new_parser(
        description="Watches a running server (URL) or reads a server's log (LOG). The log is "
        "taken as complete unless --follow is given. An onset is the moment at which the load of "
        "the ranks became uneven. At a terminal, keys open profile windows of a server, as "
        "`sglprof record` does: space opens one and closes it, Enter shows the ranks of the last "
        "one, q ends. The server's keys are taken from SGLPROF_API_KEY and "
        "SGLPROF_ADMIN_API_KEY.",
        epilog="exit status: 0 done, 2 wrong usage or unreadable input, 130 interrupted; with "
        "--check also 1 if there was an onset, and 3 if that cannot be decided (one DP rank, or "
        "too little load)",
        parents=[settings_options()],
    )
    add = parser.add_argument
    add("target", metavar="URL|LOG", help="http://HOST:PORT, or the log of a server")
    add_rows(parser, "server_ca")
    add_rule(parser)
    group = parser.add_argument_group("windows that keys open")
    group.add_argument(
        "--backend", choices=tuple(BACKENDS), default="torch", help="profiler (default: torch)"
    )
    add_rows(group, "server_dir", "nsys_session", "nsys", "step_delimiter")
    add("--follow", action="store_true", help="keep reading LOG while it grows")
    add(
        "--for",
        dest="seconds",
        type=positive,
        metavar="S",
        help="stop watching a URL, or a LOG with --follow, after S seconds",
    )
    add(
        "--jsonl",
        metavar="FILE",
        help="write each sample and each onset as a line of JSON; - is standard output",
    )
    add(
        "--check",
        dest="exit_zero",
        action="store_false",
        help="let the exit status say whether there was an onset",
    )


def add_rule(parser: argparse.ArgumentParser) -> None:
    """Adds the options that define an onset."""
    add = parser.add_argument_group("what counts as an onset (all must hold)").add_argument
    add(
        "--factor",
        type=positive,
        default=1.5,
        metavar="X",
        help="the busiest rank has at least X times the mean load of the ranks; X is above 1 "
        "(default: 1.5)",
    )
    add(
        "--hold",
        type=positive,
        default=2.0,
        metavar="S",
        help="the load stays uneven for S seconds (default: 2)",
    )
    add(
        "--min-running",
        type=positive,
        default=8.0,
        metavar="N",
        help="the ranks have at least N running requests each, on average (default: 8)",
    )
    add(
        "--min-gap",
        type=positive,
        default=4.0,
        metavar="N",
        help="the busiest rank has at least N requests more than the mean (default: 4)",
    )


def rule_of(args: argparse.Namespace) -> OnsetRule:
    """What the options define as an onset; `SettingsError` for a factor of 1 or less."""
    if args.factor <= 1.0:
        raise SettingsError(f"--factor {args.factor:g}", expected="more than 1: max / mean")
    return OnsetRule(args.factor, args.hold, args.min_running, args.min_gap)


def is_url(target: str) -> bool:
    """Whether `target` is the address of a server, not the path of a log."""
    is_address = "://" in target or re.fullmatch(r"[^/\s]+:\d+", target)
    return bool(is_address) and not Path(target).exists()


def run(args: argparse.Namespace) -> ExitStatus:
    """Watches a server or reads a log; `EXCEEDED` if there was an onset."""
    from pytest_sglprof._cli.options import refuse_inputs

    rule = rule_of(args)
    is_live = is_url(args.target)
    if args.jsonl not in (None, "-") and not is_live:
        refuse_inputs(Path(args.jsonl), [args.target], option="--jsonl")
    with JsonLines(args.jsonl) as lines:
        # Keep rows for people out of the lines for programs.
        out = sys.stderr if args.jsonl == "-" else sys.stdout
        if is_live or args.follow:
            return watch_live(args, rule, lines, out)
        return _finished(Path(args.target), rule, lines, out)


def _finished(path: Path, rule: OnsetRule, lines: JsonLines, out: IO[str]) -> ExitStatus:
    """Prints all onsets of a finished log, and the mean load of each rank.

    The log is read several times, so that its samples need not be kept in memory.
    """
    from pytest_sglprof._load.change_points import LoadOutline, finished_load
    from pytest_sglprof._load.sources import FinishedLog

    if not path.is_file():
        raise SettingsError(
            f"{path} is not a file", expected="a log, or http://HOST:PORT", hint="check the path"
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
    if log.lines.unreadable and (outline.ranks or has_balances):
        out.write(f"note: {_unreadable(log.lines.unreadable)}\n")
    if not outline.ranks and not has_balances:
        raise _no_batches(path, log.lines.unreadable)
    if not has_balances and not any(label for _, label in outline.ranks):
        raise _no_tags(path) if log.lines.is_own_format else Inconclusive(CANNOT_KNOW)
    outline.servers.known = log.lines.known
    loads = (sample for block in log for sample in block if isinstance(sample, LoadSample))
    periods = finished_load(loads, rule, milliseconds=log.has_milliseconds, outline=outline)
    measured = OnsetDetector(rule, source="log")  # for balances that the server measures
    for block in log if has_balances else ():
        for sample in block:
            measured.add([sample], sample.time)
    balanced = [onset for onset in measured.onsets if onset.kind in ("experts", "dp_tokens")]
    onsets = sorted((*periods.onsets, *balanced), key=lambda onset: onset.time)
    for onset in onsets:
        lines.onset(onset)
        out.write(f"{onset_line(onset)}\n")
    if outline.servers.several:
        names = sorted({outline.servers.name(server) for server, _ in outline.ranks})
        out.write(f"note: {len(names)} servers, each judged alone: {', '.join(names)}\n")
    out.write("".join(f"{line}\n" for line in _rank_lines(outline)))
    out.write("".join(f"{line}\n" for line in absent_lines(periods.elsewhere)))
    if onsets:
        return ExitStatus.EXCEEDED
    if not has_balances and periods.compared < 2:
        raise Inconclusive(
            f"{path} holds the load of one DP rank of each server",
            expected="the lines of at least two ranks, or the one that begins with server_args=",
            hint="read the logs of all nodes together: cat LOG LOG > ALL; sglprof watch ALL",
        )
    judged = max(periods.judged_s, measured.judged_s)
    if judged < rule.hold:
        raise Inconclusive(
            f"the load had {rule.min_running:g} requests a rank for only {judged:.0f} s",
            expected=f"at least {rule.hold:g} s: few requests cannot be spread evenly",
            hint="lower --min-running, and --min-gap with it",
        )
    out.write(f"no onset: balanced for {judged:.0f} s, λ at most {periods.largest_factor:.2f}\n")
    return ExitStatus.DONE


def _unreadable(count: int) -> str:
    lines = "1 batch line" if count == 1 else f"{count} batch lines"
    return f"{lines} whose stamp cannot be read"


def _no_batches(path: Path, unreadable: int) -> Inconclusive:
    if unreadable:
        return Inconclusive(
            f"{path} holds {_unreadable(unreadable)}",
            expected="[2026-11-24 03:13:51 DP0 TP0], or a date and a time of day, before them",
            hint="put %(asctime)s into the format of SGLANG_LOGGING_CONFIG_PATH, or unset that",
        )
    return Inconclusive(
        f"{path} holds no Prefill or Decode line",
        expected="the log of an SGLang server that had requests",
        hint="SGLang writes these lines to its standard error",
    )


def _no_tags(path: Path) -> Inconclusive:
    return Inconclusive(
        f"{path} is in a format of your own, which leaves out whose load a line tells",
        expected="the tags of the ranks, as SGLang writes them: [2026-11-24 03:13:51 DP0 TP0]",
        hint="watch the server by its URL, or unset SGLANG_LOGGING_CONFIG_PATH",
    )


def absent_lines(elsewhere: Mapping[str, Sequence[str]]) -> list[str]:
    """A note for each group whose other ranks a log does not hold."""
    notes = []
    for group, ranks in elsewhere.items():
        name = f"{group}: " if group else ""
        span = ranks[0] if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
        are = "is" if len(ranks) == 1 else "are"
        notes.append(f"note: {name}{span} {are} not in this log (another node's?): not judged")
    return notes


def _rank_lines(outline: LoadOutline) -> list[str]:
    rows = []
    for (server, rank_label), rank in sorted(outline.ranks.items()):
        label = f"{outline.servers.name(server)} {rank_label}".strip()
        running, waiting = rank.running / rank.lines, rank.waiting / rank.lines
        mean = f"{rank.tokens / rank.with_tokens:.0f}" if rank.with_tokens else "-"
        rows.append([label or ONE_RANK, str(rank.lines), f"{running:.1f}", f"{waiting:.1f}", mean])
    head = ["rank", "lines", "running a line", "waiting a line", "tokens a line"]
    return text_table(head, rows, left=[0])


class JsonLines:
    """Samples and onsets as lines of JSON. target: a file, "-" for standard output, or None.

    A sample is an object with the fields of `LoadSample`, `server` only if it is not "". Other
    objects have a type in `event`: "onset", "end" (of an onset), or "balance" (the fields of
    `BalanceSample`). Lines are flushed at once, so that a program behind a pipe sees them.
    """

    def __init__(self, target: str | None) -> None:
        self._owned = False
        self._stream: IO[str] | None = None
        if target == "-":
            self._stream = sys.stdout
        elif target is not None:
            try:
                self._stream = open(target, "w", encoding="utf-8")  # noqa: PTH123, SIM115
            except OSError as error:
                raise SettingsError(
                    f"--jsonl {target}: {error.strerror or error}", expected="a file to write"
                ) from error
            self._owned = True

    def samples(self, samples: Iterable[Sample]) -> None:
        """Writes one object for each sample."""
        if self._stream is None:
            return
        for sample in samples:
            event = {"event": "balance"} if isinstance(sample, BalanceSample) else {}
            fields = {**event, **dataclasses.asdict(sample)}
            if not sample.server:
                del fields["server"]
            self._write(fields)
        self._stream.flush()

    def onset(self, onset: Onset) -> None:
        """Writes one object; times are Unix seconds."""
        if self._stream is not None:
            fields = {field.name: getattr(onset, field.name) for field in dataclasses.fields(onset)}
            self._write({"event": "onset", **fields, "lost_capacity": onset.lost_capacity})
            self._stream.flush()

    def end(self, onset: Onset) -> None:
        """Writes the end of an onset that was written before."""
        if self._stream is not None:
            self._write({"event": "end", "time": onset.ended, "onset": onset.time})
            self._stream.flush()

    def __enter__(self) -> JsonLines:
        return self

    def __exit__(self, *error: object) -> None:
        if self._owned and self._stream is not None:
            self._stream.close()

    def _write(self, value: dict[str, Any]) -> None:
        from pytest_sglprof._cli.options import json_value

        assert self._stream is not None
        self._stream.write(
            json.dumps(json_value(value), ensure_ascii=False, allow_nan=False) + "\n"
        )


NO_ONSETS = (
    "note: this server has one DP rank, whose TP ranks run the same batches: its load is shown, "
    "but it has no onset. `sglprof record` compares the ranks' kernels"
)
REDRAW = 0.5  # s between two drawings of the table


def watch_live(
    args: argparse.Namespace,
    rule: OnsetRule,
    lines: JsonLines,
    out: IO[str],
    *,
    on_first: Callable[[Onset, LoadWatch, Callable[[str], None]], ExitStatus] | None = None,
) -> ExitStatus:
    """Watches until `--for` is over, `q` or Ctrl-C; `EXCEEDED` if there was an onset.

    on_first: called with the first onset, the watch, and a function that prints a line above the
    table. It ends the watch, and its result is returned.
    """
    log, note = None, ""
    has_keys = on_first is None and out is sys.stdout and is_url(args.target)
    has_keys = has_keys and is_interactive(out)
    if is_url(args.target):
        shows_any = on_first is None and args.exit_zero
        keeps = has_keys or on_first is not None
        watch, detector, note = _server(args, rule, shows_any=shows_any, keeps=keeps)
    else:
        path = Path(args.target)
        detector = OnsetDetector(rule, source="log", milliseconds=_has_milliseconds(path))
        log = LogSource(path, from_end=False)
        detector.servers.known = log.lines.known
        watch = LoadWatch([log], keep=0)
    screen = Screen(out, detector, lines, log, watch.disturbances)
    watch.listen(screen.take)
    if note:
        screen.say(note)
    pressing = WindowKeys(args, screen, watch) if has_keys else nullcontext()
    with ended_in_order(), watch, pressing as keys:
        began = time.monotonic()
        while args.seconds is None or time.monotonic() - began < args.seconds:
            watch.check()
            if screen.cannot_know:
                raise Inconclusive(CANNOT_KNOW)
            if keys is not None:
                if not keys.wait(REDRAW):
                    break
            else:
                screen.onset.wait(REDRAW)
                screen.onset.clear()  # before `first`, so that a later onset ends the next wait
            first = screen.first()
            if first is not None and on_first is not None:
                screen.clear()
                return on_first(first, watch, screen.say)
            screen.draw(keys.lines() if keys is not None else ())
        screen.clear()
    return ExitStatus.DONE if note else _conclusion(screen, detector)


def _conclusion(screen: Screen, detector: OnsetDetector) -> ExitStatus:
    boards = {group.name: group.board.elsewhere for group in detector.groups}
    for note in absent_lines({name: ranks for name, ranks in boards.items() if ranks}):
        screen.say(note)
    if detector.onsets:
        return ExitStatus.EXCEEDED
    if detector.judged_s < detector.rule.hold:
        screen.say(
            f"inconclusive: the load had {detector.rule.min_running:g} requests a rank for only "
            f"{detector.judged_s:.0f} s (--min-running)"
        )
        return ExitStatus.INCONCLUSIVE
    screen.say(
        f"no onset: balanced for {detector.judged_s:.0f} s, λ at most {detector.largest_factor:.2f}"
    )
    return ExitStatus.DONE


def _server(
    args: argparse.Namespace, rule: OnsetRule, *, shows_any: bool, keeps: bool
) -> tuple[LoadWatch, OnsetDetector, str]:
    """The watch of a server, and a note on what it cannot show.

    shows_any: also of a server whose ranks cannot differ in load. keeps: the samples, for a window.
    """
    from pytest_sglprof._config.load import resolve_options
    from pytest_sglprof._run.opening import records_experts
    from pytest_sglprof._run.servers import API_KEY_ENV
    from pytest_sglprof._server import tls
    from pytest_sglprof._server.client import checked_url, is_local_url

    key = os.environ.get(API_KEY_ENV, "")
    url = checked_url(args.target)
    given, _ = resolve_options({"server_ca": args.server_ca}, os.environ, of_pytest=False)
    files = tls.given_certificates(given.get("server_ca", ""), url)
    verify = tls.trust(files, any_name=is_local_url(url))
    client = SglangClient(url, api_key=key, verify=verify)
    try:
        info = patiently(client.server_info)
    finally:
        client.close()
    count = ServerSizes.from_info(info).dp_ranks
    is_blind = count < 2 and not records_experts(info)
    if is_blind and not shows_any:
        raise Inconclusive(CANNOT_KNOW)
    metrics, keep = bool(info.get("enable_metrics")), MAX_SAMPLES if keeps else 0
    watch = server_watch(url, api_key=key, metrics=metrics, keep=keep, verify=verify)
    ranks = [f"DP{number}" for number in range(count)] if count > 1 else []
    return watch, OnsetDetector(rule, ranks=ranks), NO_ONSETS if is_blind else ""


def _has_milliseconds(path: Path) -> bool:
    with LogFollower(path) as log:
        for _ in log.blocks():
            return log.lines.has_milliseconds
    return False
