"""What pytest tells the keeper to start, and the messages that both exchange.

Each is one line of JSON, in which `op` (to the keeper's stdin) or `event` (from its stdout)
says which one it is. It goes by `json`, since a secret need not be a text: msgspec refuses to
write what Python made of such bytes.
"""

from __future__ import annotations

import json
import secrets
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import msgspec

from pytest_sglprof import errors
from pytest_sglprof.errors import ServerError, SglprofError
from pytest_sglprof.server.command import Entry
from pytest_sglprof.values import Backend, ServerSpec

LIFE = "SGLPROF_LIFE"  # variable of all that a keeper starts; its value is the plan's `life`


@dataclass(frozen=True)
class Plan:
    """All that a keeper must know. nsys: path of the command, "" for none.

    parent: pid of pytest. pythonpath: pytest's PYTHONPATH; the keeper has a longer one,
    which the server's interpreter must not inherit. private: pytest's secret variables,
    which are not in the keeper's own environment: nsys stores that of every process.
    life: names this server's life as no other; see `LIFE`.
    """

    spec: ServerSpec
    entry: Entry
    folder: Path
    nsys: str = ""
    nsys_version: str = ""
    api_key: str = ""
    admin_key: str = ""
    parent: int = 0
    pythonpath: str = ""
    private: Mapping[str, str] = field(default_factory=dict)
    life: str = field(default_factory=partial(secrets.token_hex, 6))

    @property
    def session_name(self) -> str:
        """The name of its nsys session."""
        return f"sglprof-{self.parent}-{self.life}"

    @property
    def short_tmpdir(self) -> Path:
        """The link that stands for its temporary folder where that has a long path."""
        return Path(tempfile.gettempdir()) / f"sglprof-{self.life}"


class Launch(msgspec.Struct, frozen=True, tag_field="op", tag="launch"):
    """First, once. It holds the keys: for a pipe, never for a file."""

    plan: Plan


class Window(msgspec.Struct, frozen=True, tag_field="op", tag="window"):
    """A window is open, since the Unix time `opened` (s); backend None: none is open."""

    backend: Backend | None
    opened: float


class Stop(msgspec.Struct, frozen=True, tag_field="op", tag="stop"):
    """Tear down; the end of the pipe says the same."""


class Progress(msgspec.Struct, frozen=True, tag_field="event", tag="progress"):
    """How the start goes, for people."""

    text: str


class Clocks(msgspec.Struct, frozen=True, tag_field="event", tag="clocks"):
    """GPUs whose clocks are locked: UUID -> MHz."""

    clocks: dict[str, int]


class Started(msgspec.Struct, frozen=True, tag_field="event", tag="started"):
    """The server's process runs. created: its start, Unix s. session: of nsys, "" for none."""

    pid: int
    created: float
    host: str
    port: int
    command: tuple[str, ...]
    session: str
    tmpdir: Path


class Failed(msgspec.Struct, frozen=True, tag_field="event", tag="failed"):
    """It does not run. error: the class; fields: what an error of that class holds."""

    error: str
    fields: dict[str, Any]


class Exited(msgspec.Struct, frozen=True, tag_field="event", tag="exited"):
    """The server ended by itself; status None: nobody knows it."""

    status: int | None


class Stopped(msgspec.Struct, frozen=True, tag_field="event", tag="stopped"):
    """The last message. left: what the teardown could not remove."""

    left: tuple[str, ...]


class Closed(msgspec.Struct, frozen=True, tag_field="event", tag="closed"):
    """Said by nobody: the pipe from the keeper has ended."""


Order = Launch | Window | Stop
Event = Progress | Clocks | Started | Failed | Exited | Stopped | Closed


def encode(message: Order | Event) -> bytes:
    """One message as a line."""
    plain = msgspec.to_builtins(message, enc_hook=str)  # of all fields, paths alone need it
    return json.dumps(plain).encode() + b"\n"


def decode_order(line: bytes | str) -> Order:
    """The inverse of `encode`; ValueError for what is none of these messages."""
    order: Order = msgspec.convert(json.loads(line), Order, dec_hook=_path)
    return order


def decode_event(line: bytes | str) -> Event:
    """The inverse of `encode`; ValueError for what is none of these messages."""
    event: Event = msgspec.convert(json.loads(line), Event, dec_hook=_path)
    return event


def error_message(error: SglprofError) -> Failed:
    """An error as a message, with every field of its class."""
    return Failed(type(error).__name__, dict(vars(error)))


def error_from(message: Failed) -> SglprofError:
    """The error that a message tells of; `ServerError` for an unknown class."""
    kind = getattr(errors, message.error, None)
    if not (isinstance(kind, type) and issubclass(kind, SglprofError)):
        kind = ServerError
    blank = vars(ServerError("the keeper failed and did not say why"))
    log = tuple(message.fields.get("log", ()))
    return kind.restored({**blank, **message.fields, "log": log})


def _path(kind: type[Path], text: str) -> Path:
    return kind(text)
