"""What pytest tells the keeper to start, and the messages that both exchange.

One JSON object a line. To the keeper (its stdin):

    {"op": "launch", "plan": {...}}          first, once
    {"op": "window", "backend": "torch", "opened": 1.5e9}
                                             a window is open ("nsys", or null for none)
    {"op": "stop"}                           tear down; the end of the pipe says the same

From the keeper (its stdout):

    {"event": "progress", "text": ...}
    {"event": "clocks", "clocks": {...}}     UUID of a GPU -> MHz that it is locked at
    {"event": "started", "pid", "created", "host", "port", "command", "session",
     "tmpdir", "clocks"}
    {"event": "failed", "error", "what", "expected", "hint", "log", ...}
                                         "error" is the class, the others are its fields
    {"event": "exited", "status": 1}         the server ended by itself (null: unknown)
    {"event": "stopped", "left": [...]}      last; what the teardown could not remove
"""

from __future__ import annotations

import secrets
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from pytest_sglprof import errors
from pytest_sglprof.errors import ServerError, SglprofError
from pytest_sglprof.server.command import Entry
from pytest_sglprof.values import ServerSpec

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

    def to_plain(self) -> dict[str, Any]:
        """As JSON values. It holds the keys: for a pipe, never for a file."""
        return {**asdict(self), "folder": str(self.folder)}

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> Plan:
        """The inverse of `to_plain`, after JSON has turned tuples into lists."""
        spec = {key: _tuples(value) for key, value in plain["spec"].items()}
        return cls(
            **{
                **plain,
                "spec": ServerSpec(**spec),
                "entry": Entry(**plain["entry"]),
                "folder": Path(plain["folder"]),
            }
        )


def error_message(error: SglprofError) -> dict[str, Any]:
    """An error as a message of the keeper, with every field of its class."""
    return {**vars(error), "event": "failed", "error": type(error).__name__}


def error_from(message: Mapping[str, Any]) -> SglprofError:
    """The error that a keeper's message tells of; `ServerError` for an unknown class."""
    kind = getattr(errors, str(message.get("error")), None)
    if not (isinstance(kind, type) and issubclass(kind, SglprofError)):
        kind = ServerError
    error = ServerError(
        str(message.get("what") or "the keeper failed and did not say why"),
        expected=str(message.get("expected", "")),
        hint=str(message.get("hint", "")),
        log=[str(line) for line in message.get("log", ())],
    )
    others = {k: _tuples(v) for k, v in message.items() if k not in ("event", "error")}
    return kind.restored({**others, **vars(error)})


def _tuples(value: Any) -> Any:
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value
