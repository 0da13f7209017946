"""What reading a file may cost that somebody else wrote: nesting, memory, and a user's patterns.

A file that is scanned has no limit of size. One that is decoded as a whole takes a multiple of
its size, and is refused before the machine's memory is gone.
"""

from __future__ import annotations

import json
import os
import re
import resource
import stat
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from pytest_sglprof._errors import SettingsError, SglprofError

# What decoders of JSON, TOML and UTF-8 raise for text that is none; the second for deep nesting.
UNDECODABLE = (ValueError, RecursionError)
MOST_LEVELS = 100  # of lists and tables in each other; what is read here has ten
_TOO_DEEP = "it is nested too deeply"


def why_undecodable(error: Exception) -> str:
    """What is wrong with a string, of one of the errors `UNDECODABLE`."""
    return _TOO_DEEP if isinstance(error, RecursionError) else str(error)


def refuse_deep(value: Any) -> None:
    """Raises ValueError for lists and dicts that are nested too deeply for whoever walks them."""
    level = [value]
    for _ in range(MOST_LEVELS):
        level = [item for each in level for item in _items(each)]
        if not level:
            return
    raise ValueError(_TOO_DEEP)


def refuse_odd(value: Any) -> None:
    """As `refuse_deep`, and for whole numbers of more than 64 bits."""
    refuse_deep(value)
    for item in value.values() if isinstance(value, dict) else value:
        if isinstance(item, dict | list):
            refuse_odd(item)
        elif isinstance(item, int) and not -(2**63) <= item < 2**63:
            raise ValueError("a whole number has more than 64 bits")


def _items(value: Any) -> Iterable[Any]:
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return (item for item in items if isinstance(item, dict | list))


# Memory.

READ_GIB = "SGLPROF_READ_GIB"
SHARE = 0.5  # of the memory that there is
# Bytes that decoding takes for one of JSON or TOML, at worst: `[],[],` becomes lists of 56 bytes.
DECODED = 24
_CGROUPS = Path("/sys/fs/cgroup")


def most_memory() -> int:
    """Bytes that one file may take which cannot be read piece by piece.

    Half of the memory of this machine, of its cgroup, or of what ulimit allows, whichever is
    least; or what the variable `SGLPROF_READ_GIB` says. Raises `SettingsError` for a wrong one.
    """
    text = os.environ.get(READ_GIB, "")
    if not text:
        return int(SHARE * min(_memories()))
    try:
        gib = float(text)
    except ValueError:
        gib = 0.0
    if not 0 < gib < 2**30:
        raise SettingsError(f"{READ_GIB} is {text!r}", expected="a number above 0, in GiB")
    return int(gib * 2**30)


def _memories() -> Iterator[int]:
    yield os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    allowed, _ = resource.getrlimit(resource.RLIMIT_AS)
    if allowed != resource.RLIM_INFINITY:
        yield allowed
    for file in _limits_of_cgroup():
        try:
            yield int(file.read_text())
        except (OSError, ValueError):  # none, or "max"
            continue


def _limits_of_cgroup() -> Iterator[Path]:
    """The files that may limit the memory of this process: of its group and of those above it."""
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:  # not Linux
        return
    for line in lines:
        _, controllers, name = line.split(":", 2)
        if "memory" in controllers.split(","):  # version 1
            root, file = _CGROUPS / "memory", "memory.limit_in_bytes"
        elif not controllers:
            root, file = _CGROUPS, "memory.max"
        else:
            continue
        group = root / name.lstrip("/")  # in a container, as its host calls it
        yield from (
            each / file for each in {root, group, *group.parents} if each.is_relative_to(root)
        )


def refuse_large(path: Path, needed: int, *, error: type[SglprofError] = SglprofError) -> None:
    """Raises `error` for a file that takes more memory, in bytes, than one file may."""
    most = most_memory()
    if needed > most:
        raise error(
            f"{path} can only be read as a whole, which takes {_gib(needed)} of memory or more",
            expected=f"a file that takes at most {_gib(most)}: half of what there is, or what "
            f"{READ_GIB} allows",
            hint=f"read it on a machine with more memory; or, if there is enough, set {READ_GIB}",
        )


def _gib(size: int) -> str:
    return f"{size / 2**30:.3g} GiB"


def read_bytes(path: Path, *, error: type[SglprofError] = SglprofError) -> bytes:
    """All of a file that is to be decoded. Raises OSError, or `error` if it is too large."""
    with path.open("rb") as stream:
        state = os.fstat(stream.fileno())
        if stat.S_ISREG(state.st_mode):
            refuse_large(path, DECODED * state.st_size, error=error)
            return stream.read()
        most = most_memory() // DECODED  # a pipe may have no end
        text = stream.read(most + 1)
        refuse_large(path, DECODED * len(text), error=error)
        return text


# Patterns that a user wrote.

PATTERN_SECONDS = 5  # of CPU, for all names of a window: what is written with care takes 0.01
NOT_PATTERN = (re.error, RecursionError, OverflowError, Warning)
# Without a repetition or a group, a search takes no longer than the pattern and the name are.
_AT_ONCE = re.compile(r"[^*+?{(]*")
_SEARCH = """
import json, re, resource, sys
seconds, expression, texts = json.load(sys.stdin)
resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
search = re.compile(expression).search
for text in texts:
    print(int(search(text) is not None), flush=True)
"""
_known: dict[str, dict[str, bool]] = {}  # expression -> name -> whether it is in there


def compiled(
    expression: str,
    what: str,
    *,
    expected: str = "a Python regular expression that is searched in full kernel names",
    hint: str = "escape what is meant literally, for example \\( and \\[",
) -> re.Pattern[str]:
    """Compiles an expression that a user wrote; `matching` searches with it.

    what: where and what it is, for the message. Raises `SettingsError` for an invalid one.
    """
    try:
        return re.compile(expression)
    except NOT_PATTERN as error:
        why = _TOO_DEEP if isinstance(error, RecursionError) else error
        raise SettingsError(
            f"{what} is not a regular expression: {why}", expected=expected, hint=hint
        ) from error


def matching(expression: str, texts: Iterable[str], what: str = "") -> frozenset[str]:
    """Those of `texts` in which a regular expression that a user wrote is found.

    A search such as that of `(a+)+$` can take for ever, and nothing but the end of its process
    ends it. So a process of its own searches, which the kernel ends after `PATTERN_SECONDS` of
    CPU. Each text is searched once in the life of this process. what: the expression, for
    messages. Raises `SettingsError` if the time is not enough, or for what is no expression.
    """
    texts = frozenset(texts)
    what = what or f"the pattern {expression!r}"
    search = compiled(expression, what).search
    if _AT_ONCE.fullmatch(expression):
        return frozenset(text for text in texts if search(text))
    known = _known.setdefault(expression, {})
    if new := sorted(texts - known.keys()):
        known.update(zip(new, _searched(expression, new, what), strict=True))
    return frozenset(text for text in texts if known[text])


def _searched(expression: str, texts: list[str], what: str) -> list[bool]:
    import subprocess  # few have patterns that need it

    process = subprocess.run(
        [sys.executable, "-I", "-S", "-c", _SEARCH],
        input=json.dumps([PATTERN_SECONDS, expression, texts]).encode(),
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        check=False,
    )
    answers = process.stdout.split()
    if len(answers) < len(texts):
        name = texts[len(answers)]
        raise SettingsError(
            f"{what} needs more than {PATTERN_SECONDS} s for the names of a window's kernels; its "
            f"search was stopped at {name[:80]!r}",
            expected="an expression that is searched in a fraction of a second",
            hint="leave out repetitions within repetitions, such as (a+)+ and (.*x)*",
        )
    return [answer == b"1" for answer in answers]
