"""`sglprof status [URL]`: servers, leases, dead runs, nsys sessions and tools of this machine."""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from pytest_sglprof._cli.options import (
    NewParser,
    add_rows,
    settings_of,
    settings_options,
    to_json,
    write_text,
)
from pytest_sglprof._errors import ExitStatus
from pytest_sglprof._verdict.wording import percent, text_table

if TYPE_CHECKING:
    from pytest_sglprof._config.load import Settings
    from pytest_sglprof._run.status import Holder, ServerState, Status
    from pytest_sglprof._server.client import SglangClient

COMMAND_WIDTH = 60  # characters of a command line that are shown


def add_parser(new_parser: NewParser) -> None:
    """Adds the options of the command."""
    parser = new_parser(
        description="Shows what pytest-sglprof keeps on this machine: servers that runs of pytest "
        "keep alive, leases and who holds them, runs that were killed, nsys sessions with their "
        "servers, and the tools that are installed. With URL also the version, the ranks and the "
        "load of that server. Changes nothing. The server's API key is taken from SGLPROF_API_KEY.",
        epilog="exit status: 0 shown, 2 wrong usage, or the server does not answer",
        parents=[settings_options()],
    )
    parser.add_argument(
        "target", nargs="?", default="", metavar="URL", help="http://HOST:PORT of a running server"
    )
    parser.add_argument(
        "--format",
        choices=("table", "json"),
        default="table",
        help="table for people, json for programs (default: table)",
    )
    add_rows(parser, "server_ca", "nsys")


def run(args: argparse.Namespace) -> ExitStatus:
    """Prints the state."""
    from pytest_sglprof._run.status import read_status

    settings = settings_of(args)
    client = _client(args.target, settings) if args.target else None
    try:
        status = read_status(settings, client)
    finally:
        if client is not None:
            client.close()
    write_text(to_json(status) if args.format == "json" else _text(status), None, ())
    return ExitStatus.DONE


def _client(url: str, settings: Settings) -> SglangClient:
    from pytest_sglprof._run.servers import API_KEY_ENV
    from pytest_sglprof._server import tls
    from pytest_sglprof._server.client import SglangClient, checked_url, is_local_url

    url = checked_url(url)
    files = tls.given_certificates(settings.server_ca, url)
    verify = tls.trust(files, any_name=is_local_url(url))
    return SglangClient(url, api_key=os.environ.get(API_KEY_ENV, ""), verify=verify)


def _text(status: Status) -> str:
    parts = [] if status.server is None else [_server(status.server)]
    parts += [
        _section(
            "servers of runs that are alive",
            ["name", "url", "pid", "since", "folder"],
            [
                [each.name, each.url or "starting", str(each.pid), _clock(each.since), each.folder]
                for each in status.servers
            ],
        ),
        _section(
            "leases",
            ["pid", "leases", "process"],
            [[str(each.pid), _leases(each), _cut(each.what)] for each in status.leases],
        ),
        _section(
            "runs that were killed",
            ["folder", "started", "host"],
            [[each.folder, each.started, each.host] for each in status.dead_runs],
        ),
        _section(
            "nsys sessions",
            ["name", "ID", "state", "server"],
            [
                [each.name, each.id, each.state, each.server or "unknown"]
                for each in status.nsys_sessions
            ],
        ),
        _section(
            "tools",
            ["name", "version", "where"],
            [
                [each.name, each.version or "-", each.problem or each.path or "installed"]
                for each in status.tools
            ],
        ),
    ]
    return "\n".join(parts)


def _server(server: ServerState) -> str:
    lines = [
        f"server {server.url}",
        f"  version {server.version or 'unknown'}, model {server.model or 'unknown'}",
        f"  ranks: {', '.join(server.ranks) or 'unknown'}",
        f"  profile: {server.profile}",
    ]
    rows = [
        [each.rank, str(each.running), str(each.waiting), percent(each.usage)]
        for each in server.load
    ]
    table = text_table(["rank", "running", "waiting", "KV"], rows, left=[0]) if rows else []
    if server.problem:
        lines.append(f"  load: unknown: {server.problem}")
    return "".join(f"{line}\n" for line in [*lines, *(f"  {line}" for line in table)])


def _section(title: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    if not rows:
        return f"{title}: none\n"
    table = text_table(list(head), [list(row) for row in rows], left=range(len(head)))
    return "".join(f"{line}\n" for line in [f"{title}:", *(f"  {line}".rstrip() for line in table)])


def _leases(holder: Holder) -> str:
    """Names of leases; a server has a dozen ports, of which the number is enough."""
    ports = [name for name in holder.leases if name.startswith("port-")]
    others = [name for name in holder.leases if name not in ports]
    return ", ".join(
        [*others, *([f"{ports[0]} and {len(ports) - 1} more"] if ports[1:] else ports)]
    )


def _clock(moment: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(moment))


def _cut(text: str) -> str:
    return text if len(text) <= COMMAND_WIDTH else f"{text[: COMMAND_WIDTH - 1]}…"
