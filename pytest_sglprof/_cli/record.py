"""`sglprof record URL`: one profile window of a running server, judged and written as a run."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from pytest_sglprof._cli.options import (
    NewParser,
    add_rows,
    count,
    positive,
    settings_of,
    settings_options,
)
from pytest_sglprof._cli.recording import FOLDER, fresh_folder, outcome_lines, window_of
from pytest_sglprof._cli.watch import add_rule, is_url, rule_of
from pytest_sglprof._config.backends import BACKENDS
from pytest_sglprof._errors import ExitStatus, Inconclusive, SettingsError

if TYPE_CHECKING:
    from pytest_sglprof._config.load import Settings
    from pytest_sglprof._config.model import WindowSpec
    from pytest_sglprof._load.onset import Onset, OnsetRule
    from pytest_sglprof._load.watcher import LoadWatch
    from pytest_sglprof._run.window import Window
    from pytest_sglprof._server.launch import Server

SECONDS = 2.0  # that a window lasts by default
STEADY_WAIT = 300.0  # s to wait for steady load, without --for


def add_parser(new_parser: NewParser) -> None:
    """Adds the options of the command."""
    parser = new_parser(
        description="Opens a profile window on a running server, closes it after a number of "
        "steps or seconds, judges it by the thresholds of sglprof.toml, and writes results.json, "
        "the page and the traces into a folder that the other commands read. With --when onset "
        "it watches the load as `sglprof watch` does, opens the window once the load has become "
        "uneven, and says whether the trace confirms that. The server's keys are taken from "
        "SGLPROF_API_KEY and SGLPROF_ADMIN_API_KEY.",
        epilog="exit status: 0 recorded, nothing above its limit; 1 above a limit that somebody "
        "gave; 2 wrong usage, or the server cannot be reached or refuses; 3 inconclusive, "
        "incomplete or never opened; 130 interrupted",
        parents=[settings_options()],
    )
    add = parser.add_argument
    add(
        "target",
        metavar="URL|SERVER",
        help="http://HOST:PORT, HOST:PORT, the name of a server with a url in sglprof.toml, or of "
        "one that a run of pytest keeps (sglprof status lists them)",
    )
    add(
        "--when",
        choices=("now", "steady", "onset"),
        default="now",
        help="when to open the window. steady: once requests have been running for 2 s; onset: "
        "once the load has become uneven (default: now)",
    )
    add(
        "--for",
        dest="seconds",
        type=positive,
        metavar="S",
        help=f"wait at most S seconds for that (default: {STEADY_WAIT:g} if steady, no limit if "
        "onset)",
    )
    add("--backend", choices=tuple(BACKENDS), default="torch", help="profiler (default: torch)")
    add_end(parser)
    add(
        "-o",
        "--output",
        metavar="DIR",
        help=f"new folder for the results (default: {FOLDER}, then {FOLDER}-2 and so on)",
    )
    add_rows(parser, "server_dir", "server_ca", "nsys_session", "nsys", "step_delimiter")
    add_rule(parser)


def add_end(parser: argparse.ArgumentParser) -> None:
    """Adds the options that say when the window closes."""
    group = parser.add_mutually_exclusive_group()
    group.add_argument(
        "--steps",
        type=count,
        metavar="N",
        help="close the window after N steps (num_steps in pytest)",
    )
    group.add_argument(
        "--seconds",
        dest="window_s",
        type=positive,
        metavar="S",
        help=f"close the window after S seconds (duration in pytest; default: {SECONDS:g})",
    )
    group.add_argument(
        "--until-enter",
        action="store_true",
        help="close the window when Enter is pressed, or standard input ends",
    )


def run(args: argparse.Namespace) -> ExitStatus:
    """Waits for the moment, records and judges."""
    from pytest_sglprof._cli.terminal import StatusLine, refuse_unreadable_input
    from pytest_sglprof._process import ended_in_order
    from pytest_sglprof._run.one_window import recorded_files, window_folder

    settings = settings_of(args)
    rule = rule_of(args)
    args.keys = "", ""  # then those of the environment
    configured = settings.servers.get(args.target)
    if configured is not None and configured.url:
        from pytest_sglprof._run.servers import settings_of_running
        from pytest_sglprof._server.launch import server_keys

        args.target, args.keys = configured.url, server_keys(configured)
        settings = settings_of_running(configured, settings)
        args.server_ca = configured.server_ca or args.server_ca
    args.target = server_url(args.target)
    if args.until_enter:
        refuse_unreadable_input()
    folder = Path(args.output) if args.output else fresh_folder()
    with ended_in_order(), window_folder(folder) as args.folder, StatusLine(sys.stderr) as line:
        try:
            if args.when != "onset":
                return _record(args, settings, say, line.show)
            return _record_at_onset(args, settings, rule, line.show)
        except KeyboardInterrupt:
            line.show("")
            if files := recorded_files(args.folder):
                what = "sglprof: the window is recorded but not judged"
                sys.stderr.write(f"{what}: sglprof check {files[0].parent}\n")
            raise


def _record_at_onset(
    args: argparse.Namespace,
    settings: Settings,
    rule: OnsetRule,
    progress: Callable[[str], None],
) -> ExitStatus:
    from pytest_sglprof._cli.screen import onset_line
    from pytest_sglprof._cli.watch import JsonLines, watch_live

    onsets: list[Onset] = []

    def record(onset: Onset, watch: LoadWatch, tell: Callable[[str], None]) -> ExitStatus:
        onsets.append(onset)
        tell(onset_line(onset))
        return _record(args, settings, tell, progress, onset=onset, watch=watch)

    with JsonLines(None) as lines:
        status = watch_live(args, rule, lines, sys.stdout, on_first=record)
    return status if onsets else ExitStatus.INCONCLUSIVE


def server_url(target: str) -> str:
    """The URL of a server that is given as a URL, as HOST:PORT, or by its name in a run.

    Raises `SettingsError` for anything else.
    """
    if is_url(target):
        return target
    if not Path(target).exists():
        from pytest_sglprof._run.status import servers_alive

        urls = [each.url for each in servers_alive() if each.name == target and each.url]
        if len(urls) == 1:
            return urls[0]
        if urls:
            raise SettingsError(
                f"{len(urls)} servers are called {target}: {', '.join(urls)}",
                expected="one server",
                hint="give its URL",
            )
    raise SettingsError(
        f"record {target}",
        expected="the URL of a running server, or the name of one that `sglprof status` lists or "
        "that has a url in sglprof.toml",
        hint="a log cannot be recorded: give the URL of its server",
    )


def _record(
    args: argparse.Namespace,
    settings: Settings,
    tell: Callable[[str], None],
    progress: Callable[[str], None],
    *,
    onset: Onset | None = None,
    watch: LoadWatch | None = None,
) -> ExitStatus:
    """Attaches, opens the window and waits for its end; prints the outcome."""
    from pytest_sglprof._cli.terminal import was_entered
    from pytest_sglprof._run.one_window import record_window, wait_until
    from pytest_sglprof._run.servers import attach_running

    seconds = None if args.steps or args.until_enter else args.window_s or SECONDS
    name = "window" if onset is None else "onset"
    spec = window_of(settings, name, args.backend, steps=args.steps, seconds=seconds)

    def wait(window: Window) -> None:
        if not args.until_enter:
            progress(f"the window is open: {_end(spec)}")
            return window.wait()
        progress("the window is open: Enter closes it")
        return wait_until(window, was_entered)

    with ExitStack() as attached:
        server = attach_running(
            args.target,
            settings,
            args.folder / "servers" / "attached.1",
            api_key=args.keys[0],
            admin_key=args.keys[1],
            finds_session=args.backend == "nsys",
        )
        attached.callback(server.client.close)
        if args.when == "steady":
            progress("waiting for steady load")
            _wait_for_load(server, args.seconds or STEADY_WAIT)
        outcome = record_window(
            server,
            spec,
            settings,
            args.folder,
            command=["sglprof", "record", args.target, "--when", args.when],
            wait=wait,
            onset=onset,
            watch=watch,
            progress=progress,
        )
    progress("")
    for text in outcome_lines(outcome):
        tell(text)
    return outcome.status


def _end(spec: WindowSpec) -> str:
    return f"{spec.num_steps} steps" if spec.num_steps else f"{spec.duration:g} s"


def _wait_for_load(server: Server, timeout: float) -> None:
    import threading

    from pytest_sglprof._run.opening import steady_load

    if not steady_load(server, 1, timeout=timeout, stop=threading.Event()):
        raise Inconclusive(
            f"the server had no steady load within {timeout:g} s, so nothing was recorded",
            expected="requests that run for 2 s without a gap",
            hint="send requests meanwhile, wait longer with --for, or use --when now",
        )


def say(text: str) -> None:
    """Prints a line at once."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()
