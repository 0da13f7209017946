"""Runs an nsys command: never in our process session, never with our credentials."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from pytest_sglprof.errors import NsysError
from pytest_sglprof.redact import is_secret_variable


@dataclass(frozen=True)
class NsysTool:
    """An nsys command that can start sessions later. version: such as "2023.4.4"."""

    path: str
    version: str


def run(
    words: Sequence[str], timeout: float, tmpdir: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """Runs one command in a process session of its own: Ctrl-C must not cut a report."""
    with started(words, tmpdir) as process:
        try:
            out, _ = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            raise NsysError(
                f"`{Path(words[0]).name} {words[1]}` did not answer within {timeout:g} s",
                hint="an agent of an earlier session may hang: look for `nsys --start-agent`",
            ) from None
    text = out.decode("utf-8", errors="replace")
    return subprocess.CompletedProcess(list(words), process.returncode, text, "")


@contextlib.contextmanager
def started(words: Sequence[str], tmpdir: Path | None = None) -> Iterator[subprocess.Popen[bytes]]:
    """A running command, both outputs in one pipe; it is killed when the body leaves early.

    tmpdir: its TMPDIR. No credential of ours is in its environment: nsys stores that.
    """
    environment = {k: v for k, v in os.environ.items() if not is_secret_variable(k, v)}
    if tmpdir is not None:
        environment["TMPDIR"] = str(tmpdir)
    try:
        process = subprocess.Popen(
            words,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
            umask=0o077,  # what nsys writes holds the environments of other processes
        )
    except OSError as error:
        raise NsysError(f"{words[0]} could not be run: {error.strerror or error}") from error
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()
        if process.stdout is not None:
            process.stdout.close()
