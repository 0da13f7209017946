"""`sglprof record URL`: one profile window of a running server."""

from __future__ import annotations

import argparse
import sys
import threading
from collections.abc import Callable
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
from pytest_sglprof._cli.watch import add_rule, is_url, rule_of
from pytest_sglprof._config.backends import BACKENDS
from pytest_sglprof._config.model import WindowSpec
from pytest_sglprof._errors import ExitStatus, Inconclusive, SettingsError

if TYPE_CHECKING:
    from pytest_sglprof._capture.recording import WindowCapture
    from pytest_sglprof._config.load import Settings
    from pytest_sglprof._load.onset import Onset, OnsetRule
    from pytest_sglprof._server.launch import Server

FOLDER = "sglprof-window"
STEADY_WAIT = 300.0  # s to wait for steady load, without --for


def add_parser(new_parser: NewParser) -> None:
    """Adds the options of the command."""
    parser = new_parser(
        description="Opens a profile window on a running server and closes it after a number of "
        "steps or seconds. With --when onset it watches the load as `sglprof watch` does, opens "
        "the window once the load has become uneven, and says whether the trace confirms that. The "
        "server's keys are taken from SGLPROF_API_KEY and SGLPROF_ADMIN_API_KEY.",
        epilog="exit status: 0 recorded, 2 wrong usage, or the server cannot be reached or "
        "refuses, 3 the window is incomplete or was never opened, 130 interrupted",
        parents=[settings_options()],
    )
    add = parser.add_argument
    add("target", metavar="URL", help="http://HOST:PORT")
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
    add(
        "--steps",
        type=count,
        metavar="N",
        help="close the window after N steps (num_steps in pytest)",
    )
    add(
        "--seconds",
        dest="window_s",
        type=positive,
        default=2.0,
        metavar="S",
        help="close the window after S seconds, unless --steps is given (duration in pytest; "
        "default: 2)",
    )
    add(
        "-o",
        "--output",
        metavar="DIR",
        help=f"folder for the files (default: {FOLDER}, then {FOLDER}-2 and so on)",
    )
    add_rows(parser, "server_dir", "server_ca", "nsys_session", "nsys", "step_delimiter")
    add_rule(parser)


def run(args: argparse.Namespace) -> ExitStatus:
    """Waits for the moment and records."""
    settings = settings_of(args)
    rule = rule_of(args)
    if not is_url(args.target):
        raise SettingsError(
            f"record {args.target}",
            expected="the URL of a running server",
            hint="a log cannot be recorded: give the URL of its server",
        )
    if args.when == "onset":
        return _record_at_onset(args, settings, rule)
    return _record(args, settings, _say, wait_for_load=args.when == "steady")


def _record_at_onset(args: argparse.Namespace, settings: Settings, rule: OnsetRule) -> ExitStatus:
    from pytest_sglprof._cli.watch import JsonLines, watch_live

    onsets: list[Onset] = []

    def record(onset: Onset, say: Callable[[str], None]) -> ExitStatus:
        onsets.append(onset)
        return _record(args, settings, say, onset=onset)

    with JsonLines(None) as lines:
        status = watch_live(args, rule, lines, sys.stdout, on_first=record)
    return status if onsets else ExitStatus.INCONCLUSIVE


def _record(
    args: argparse.Namespace,
    settings: Settings,
    say: Callable[[str], None],
    *,
    onset: Onset | None = None,
    wait_for_load: bool = False,
) -> ExitStatus:
    """Opens the window and waits for its end; `INCONCLUSIVE` if it is not complete."""
    from pytest_sglprof._cli.watch import onset_line
    from pytest_sglprof._run.servers import attach_running
    from pytest_sglprof._run.window import Window

    folder = Path(args.output or _fresh(Path(FOLDER))).absolute()
    window_id = _fresh(folder / ("onset" if onset else "window")).name
    spec = WindowSpec(
        name="onset" if onset else "window",
        backend=args.backend,
        num_steps=args.steps,
        duration=None if args.steps else args.window_s,
    )
    if onset is not None:
        say(onset_line(onset))
    server = attach_running(args.target, settings, folder / "server")
    try:
        if wait_for_load:
            _wait_for_load(server, args.seconds or STEADY_WAIT)
        with Window(server, spec, folder, window_id=window_id) as window:
            window.wait()
        capture = window.close()
    finally:
        server.client.close()
    say(f"window: {capture.state}, {capture.closed - capture.opened:.1f} s, in {folder}")
    if capture.reason:
        say(capture.reason)
    if not capture.artifacts:
        return ExitStatus.INCONCLUSIVE
    if onset is not None:
        say(_confirmation(onset, capture, settings))
    is_complete = capture.state == "complete"
    return ExitStatus.DONE if is_complete else ExitStatus.INCONCLUSIVE


def _wait_for_load(server: Server, timeout: float) -> None:
    from pytest_sglprof._run.opening import steady_load

    if not steady_load(server, 1, timeout=timeout, stop=threading.Event()):
        raise Inconclusive(
            f"the server had no steady load within {timeout:g} s, so nothing was recorded",
            expected="requests that run for 2 s without a gap",
            hint="send requests meanwhile, wait longer with --for, or use --when now",
        )


def _confirmation(onset: Onset, capture: WindowCapture, settings: Settings) -> str:
    """A sentence that says whether the trace confirms the onset."""
    from pytest_sglprof._analysis.load import join_load
    from pytest_sglprof._run.measure import WindowFiles, read_recorded

    return join_load(onset, read_recorded(WindowFiles.of_capture(capture), settings)).sentence


def _say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def _fresh(path: Path) -> Path:
    """`path`, or the first of `path-2`, `path-3` … that does not exist with any file ending."""
    names = [path.name, *(f"{path.name}-{number}" for number in range(2, 1000))]
    existing = {entry.name.partition(".")[0] for entry in path.parent.glob(f"{path.name}*")}
    return path.with_name(next(name for name in names if name not in existing))
