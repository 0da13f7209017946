"""Runs inside SGLang's driver of fixed shapes, before it: holds a batch until it may be sent.

So a profile window opens when the driver is ready, not while it still imports; and the requests
carry the server's keys, which this driver does not send. The driver's interpreter runs the text
of this file and need not have pytest-sglprof, so it uses the standard library only.

For its nth batch the driver looks for the file `n.go` in $SGLPROF_GATE; where that is missing
it writes the batch's size to `n.ready` and waits. $SGLPROF_GATE_URL: the server's address.
"""

from __future__ import annotations

import importlib.machinery
import json
import os
import sys
import time
import types
from pathlib import Path
from typing import Any

POLL = 0.002  # s
ADMIN_PATHS = ("/flush_cache", "/hicache/storage-backend/clear")
numbers = iter(range(1_000_000))


def install() -> None:
    """Makes `requests` and `httpx` ask before they send a batch to the server."""
    try:
        __import__("tabulate")
    except ImportError:  # the driver imports it for a table that is not asked for
        stub: Any = types.ModuleType("tabulate")
        stub.__spec__ = importlib.machinery.ModuleSpec("tabulate", None)  # torch looks at it
        stub.tabulate = lambda *args, **keywords: ""
        sys.modules["tabulate"] = stub
    for module, client in (("requests", "Session"), ("httpx", "Client")):
        try:
            owner = getattr(__import__(module), client)
        except ImportError:
            continue
        _ask_first(owner)


def _ask_first(owner: Any) -> None:
    send = owner.send

    def send_when_allowed(self: Any, request: Any, *args: Any, **keywords: Any) -> Any:
        url, _, _ = str(request.url).partition("?")
        server = os.environ["SGLPROF_GATE_URL"]
        if url.startswith(server):
            _add_key(request, url)
            if url == server + "/generate":
                _hold(request)
        return send(self, request, *args, **keywords)

    owner.send = send_when_allowed


def _add_key(request: Any, url: str) -> None:
    name = "SGLPROF_GATE_ADMIN_KEY" if url.endswith(ADMIN_PATHS) else "OPENAI_API_KEY"
    if key := os.environ.get(name):
        request.headers["Authorization"] = f"Bearer {key}"


def _hold(request: Any) -> None:
    gate, number = Path(os.environ["SGLPROF_GATE"]), next(numbers)
    allowed = gate / f"{number}.go"
    if allowed.exists():
        return
    body = getattr(request, "content", None) or request.body
    size = len(json.loads(body)["input_ids"])
    new = gate / f"{number}.new"
    new.write_text(str(size))
    new.replace(gate / f"{number}.ready")
    while not allowed.exists():
        time.sleep(POLL)


if __name__ == "sglprof_before":
    install()
