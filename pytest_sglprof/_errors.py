"""Every error that pytest-sglprof raises on purpose, as one tree.

SglprofError                 exit status 2 of the command line
├── SettingsError            an option, a marker or sglprof.toml is wrong
├── ServerError              the server under test
│   ├── ServerMissing        SGLang is not installed in the chosen interpreter
│   ├── ServerDied           it ended; carries the reason from its log
│   ├── ServerNotReady       it did not become ready in time
│   ├── ServerUnreachable    nothing answers at its address
│   │   └── ServerSilent     it is there, but did not answer in time
│   ├── ServerRefused        it answered with an HTTP error
│   ├── LeaseError           a port, a GPU or the window of a server is taken
│   └── ClockLockError       the clocks of its GPUs cannot be locked or unlocked
├── LoadError                the load driver failed, or requests failed
├── NsysError                the nsys command or one of its sessions
│   ├── NsysMissing          there is no nsys command
│   ├── NsysTooOld           this nsys lacks --start-later
│   └── NsysSessionError     a session is gone, busy, or in another state than needed
├── WindowError              a profile window
│   └── WindowRefused        asked for something that would break the server or the data
├── TraceError               a trace, report or export cannot be read
│   ├── TraceTruncated       it ends too early
│   ├── NotATrace            it is something else
│   └── NoKernels            a GPU was used, but none of its kernels was recorded
└── Inconclusive             too little data for an answer      exit status 3

Each says what happened, what was expected and what to do next.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from enum import IntEnum
from typing import Any, TypeVar

_Error = TypeVar("_Error", bound="SglprofError")


class ExitStatus(IntEnum):
    """How a `sglprof` command ends; documented in docs/exit-status.md."""

    DONE = 0  # done, or nothing is above its limit
    EXCEEDED = 1  # a limit that somebody gave (an option, sglprof.toml) is exceeded
    UNUSABLE = 2  # wrong usage, unreadable input, unwritable output
    INCONCLUSIVE = 3  # too little data, or data that cannot be compared
    BUG = 70  # EX_SOFTWARE of sysexits.h; Python's own 1 would be read as a verdict
    INTERRUPTED = 130
    BROKEN_PIPE = 141  # the reader of the output has ended


class SglprofError(Exception):
    """Base of all errors of this package.

    what: what happened, in one sentence. expected: what should have happened. hint: what to
    do next. log: lines of the server's (or a tool's) output that give the reason.
    """

    __module__ = "pytest_sglprof"

    exit_status = ExitStatus.UNUSABLE

    def __init__(
        self, what: str, *, expected: str = "", hint: str = "", log: Sequence[str] = ()
    ) -> None:
        super().__init__(what)
        self.what = what
        self.expected = expected
        self.hint = hint
        self.log = tuple(log)

    @classmethod
    def restored(cls: type[_Error], fields: Mapping[str, Any]) -> _Error:
        """An error with these attributes, made without calling the constructor of its class."""
        error = cls.__new__(cls, fields["what"])
        vars(error).update(fields)
        return error

    def __reduce__(self) -> tuple[Callable[..., SglprofError], tuple[dict[str, Any]]]:
        return type(self).restored, (vars(self),)

    def __str__(self) -> str:
        parts = [self.what]
        if self.expected:
            parts.append(f"  expected: {self.expected}")
        if self.log:
            parts.append("  log:")
            parts.extend(f"  | {line}" for line in self.log)
        if self.hint:
            parts.append(f"  next: {self.hint}")
        return "\n".join(parts)


class SettingsError(SglprofError):
    """An option, a marker or a configuration file is wrong."""


class ServerError(SglprofError):
    """The server under test misbehaved."""


class ServerMissing(ServerError):
    """SGLang is not installed in the chosen interpreter."""


class ServerDied(ServerError):
    """The server ended; ``log`` holds the lines of its log that say why."""


class ServerNotReady(ServerError):
    """The server did not become ready within its limit."""


class ServerUnreachable(ServerError):
    """Nothing answers at the server's address."""


class ServerSilent(ServerUnreachable):
    """The server did not answer in time."""


class ServerRefused(ServerError):
    """The server answered with an HTTP error; ``status`` is its code."""

    def __init__(
        self,
        what: str,
        *,
        status: int,
        expected: str = "",
        hint: str = "",
        log: Sequence[str] = (),
    ) -> None:
        super().__init__(what, expected=expected, hint=hint, log=log)
        self.status = status


class LeaseError(ServerError):
    """Another process holds a port, a GPU or the profile window of a server."""


class ClockLockError(ServerError):
    """The clocks of a server's GPUs cannot be locked or unlocked."""


class LoadError(SglprofError):
    """The load driver failed, or some of its requests did."""


class NsysError(SglprofError):
    """The nsys command or one of its sessions misbehaved."""


class NsysMissing(NsysError):
    """There is no nsys command."""


class NsysTooOld(NsysError):
    """This nsys cannot start a session later (``--start-later``)."""


class NsysSessionError(NsysError):
    """An nsys session is gone, busy, or in another state than needed."""


class WindowError(SglprofError):
    """A profile window could not be opened, closed or read."""


class WindowRefused(WindowError):
    """A window asks for something that would break the server or its own data."""


class TraceError(SglprofError):
    """A trace, report or export cannot be read."""


class TraceTruncated(TraceError):
    """A trace ends too early."""


class NotATrace(TraceError):
    """A file is readable but is not a trace."""


class NoKernels(TraceError):
    """A GPU was used, but none of its kernels was recorded."""


class Inconclusive(SglprofError):
    """There is too little data for an answer."""

    __module__ = "pytest_sglprof"

    exit_status = ExitStatus.INCONCLUSIVE


class Incomparable(Inconclusive):
    """There are no accepted server lives that a new one can be compared with.

    What was measured is whole: the life may be accepted with a reason.
    """


def note(error: BaseException, text: str) -> None:
    """Shows `text` below `error`, as `add_note` does, which Python 3.10 lacks."""
    error.__notes__ = [*getattr(error, "__notes__", ()), text]


def described(error: BaseException) -> str:
    """A `SglprofError` as its message and notes; any other error as its traceback."""
    if isinstance(error, SglprofError):
        return "\n".join((str(error), *getattr(error, "__notes__", ())))
    import traceback

    return "".join(traceback.format_exception(error)).rstrip()


# (what a message says of an argument of `read_window`, what the commands have instead)
_IN_SHELL = (("allow_partial=True", "--allow-partial"), (", or with processes=1", ""))


def in_shell(text: str) -> str:
    """A message in which arguments of `read_window` are the options of the commands."""
    for argument, option in _IN_SHELL:
        text = text.replace(argument, option)
    return text


def do_every(steps: Iterable[Callable[[], object]]) -> None:
    """Takes every step even if an earlier one raises; then raises the first error.

    The other errors become its notes, except that a further Ctrl-C says nothing more. An
    interrupt is raised before any other error.
    """
    errors: list[BaseException] = []
    for step in steps:
        try:
            step()
        except BaseException as error:
            errors.append(error)
    if not errors:
        return
    first = next((error for error in errors if not isinstance(error, Exception)), errors[0])
    for other in errors:
        if other is not first and not isinstance(other, KeyboardInterrupt):
            note(first, f"and besides: {described(other)}")
    raise first


def docs(page: str) -> str:
    """The address of a page of the documentation, which is not part of the installed package."""
    return f"https://github.com/pytest-sglprof/pytest-sglprof/blob/main/docs/{page}.md"


_LONGEST = 100  # characters of a name that is compared with others


def did_you_mean(given: Iterable[object], known: Iterable[str], otherwise: str = "") -> str:
    """`did you mean moe?`, with the known names nearest to `given`; `otherwise` if none is near."""
    import difflib  # only where something is wrong

    by_folded = {name.casefold(): name for name in known}
    nearest: dict[str, None] = {}
    for name in given:
        close = difflib.get_close_matches(str(name)[:_LONGEST].strip().casefold(), by_folded, n=1)
        nearest.update(dict.fromkeys(by_folded[folded] for folded in close))
    return f"did you mean {' and '.join(nearest)}?" if nearest else otherwise
