"""`sglprof watch --open-window`: the window at an onset, and what it shows."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from pytest_sglprof.errors import SettingsError
from pytest_sglprof.values import WindowSpec

if TYPE_CHECKING:
    from pytest_sglprof.analysis.unequal import Onset
    from pytest_sglprof.server.server import Server

FOUND, UNKNOWN = 1, 3
FOLDER = "sglprof-window"


def record_window(args: argparse.Namespace, onset: Onset, say: Callable[[str], None]) -> int:
    """Opens it now, waits for its end, reads it; 1, or 3 where it is not complete."""
    from pytest_sglprof.analysis.load_join import join_load
    from pytest_sglprof.capture.backends import readable
    from pytest_sglprof.cli.watch_table import onset_line
    from pytest_sglprof.session.window_run import Window
    from pytest_sglprof.trace.read import read_window

    folder = Path(args.output or _fresh(Path(FOLDER))).absolute()
    window_id = _fresh(folder / "onset").name
    spec = WindowSpec(
        name="onset",
        backend=args.open_window,
        num_steps=args.steps,
        duration=None if args.steps else args.window_s,
    )
    say(onset_line(onset))
    server = _attached(args, folder)
    try:
        with Window(server, spec, folder, window_id=window_id) as window:
            window.wait()
        capture = window.close()
    finally:
        server.client.close()
    say(f"window: {capture.state}, {capture.closed - capture.opened:.1f} s, in {folder}")
    if capture.reason:
        say(capture.reason)
    if not capture.artifacts:
        return UNKNOWN
    table = read_window(
        [artifact.path for artifact in readable(capture.artifacts)],
        pid_ranks=capture.pid_ranks or None,
        gpu_ranks=capture.gpu_ranks or None,
        nsys=args.nsys or None,
    )
    say(join_load(onset, table).sentence)
    return FOUND if capture.state == "complete" else UNKNOWN


def _fresh(path: Path) -> Path:
    """`path`, or `path-2` and so on: the first of which nothing is there, with any ending."""
    names = [path.name, *(f"{path.name}-{number}" for number in range(2, 1000))]
    there = {entry.name.partition(".")[0] for entry in path.parent.glob(f"{path.name}*")}
    return path.with_name(next(name for name in names if name not in there))


def _attached(args: argparse.Namespace, folder: Path) -> Server:
    from pytest_sglprof.server.server import attach
    from pytest_sglprof.session.server_life import ADMIN_KEY_ENV, API_KEY_ENV

    server_dir = None
    if args.server_dir:
        server, colon, local = args.server_dir.partition(":")
        if not (colon and server.startswith("/") and local):
            raise SettingsError(
                f"--server-dir {args.server_dir}", expected="SERVER:LOCAL, two paths of one folder"
            )
        server_dir = (server, str(Path(local).resolve()))
    return attach(
        args.target,
        api_key=os.environ.get(API_KEY_ENV, ""),
        admin_key=os.environ.get(ADMIN_KEY_ENV, ""),
        server_dir=server_dir,
        nsys_session=args.nsys_session or None,
        nsys_path=args.nsys or None,
        folder=folder / "server",
    )
