"""Writes log lines as SGLang does: to stderr, one write a line, with the rank's tags."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence

_TRUE = ("1", "true", "yes", "y", "on")


def env_flag(name: str) -> bool:
    """A switch of SGLang's environment."""
    return os.environ.get(name, "").lower() in _TRUE


def log(text: str, tags: Sequence[str] = ()) -> None:
    """`[2026-11-24 03:13:51 DP0 TP0] text`; with SGLANG_LOG_MS=1 with milliseconds."""
    now = time.time()
    stamp = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(now))
    if env_flag("SGLANG_LOG_MS"):
        stamp += f".{int(now * 1000) % 1000:03d}"
    raw(f"[{' '.join((stamp, *tags))}] {text}")


def web(text: str, level: str = "INFO") -> None:
    """A line of the HTTP server, which never shows milliseconds or tags."""
    stamp = time.strftime("%Y-%m-%d %H:%M:%S")
    raw(f"[{stamp}] {level + ':':<9} {text}")


def raw(text: str) -> None:
    """One write, so that lines of several processes never mix."""
    try:
        os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, (text + "\n").encode())
    except OSError:  # the reader of the log is gone; nothing can be said any more
        return
