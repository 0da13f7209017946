"""Process ids, flow ids and times that stay apart when traces of many ranks become one.

Perfetto keeps a process id in 32 bits, and two ranks' files use the same small ones for
their GPUs. So each rank has a prefix of three digits that is put before every id of it:
`83` of rank number 1 becomes `10183`. Text such as `"Spans"` becomes a number above all
that Linux gives to processes.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import msgspec

from pytest_sglprof.errors import TraceError
from pytest_sglprof.trace.file_rank import rank_of_pid
from pytest_sglprof.trace.times import ns

FIRST_PREFIX = 100
MAX_RANKS = 328  # 427 followed by seven digits is the last that fits into 32 bits
_NAMED = 9_000_000  # Linux gives process ids up to 4,194,304
_NUMBER = re.compile(r"0|[1-9][0-9]{0,6}")
_FLOW = re.compile(rb"\d{1,15}$")
_MERGED_PID = re.compile(r"^\[[^\]]*\] ?")


class RankNumbers:
    """The place of each rank in the result; ranks that nobody announced come last."""

    def __init__(self, labels: Sequence[str] = ()) -> None:
        self._numbers: dict[str, int] = {}
        for label in labels:
            self.number(label)

    @property
    def labels(self) -> tuple[str, ...]:
        """All ranks, in their order."""
        return tuple(self._numbers)

    def number(self, label: str) -> int:
        """0 for the first rank. Raises TraceError for more than 328 ranks."""
        found = self._numbers.setdefault(label, len(self._numbers))
        if found >= MAX_RANKS:
            raise TraceError(
                f"{label} is rank number {found + 1} of one merged file",
                expected=f"at most {MAX_RANKS} ranks, since Perfetto's process ids have 32 bits",
                hint="merge fewer ranks, for example one node's",
            )
        return found

    def prefix(self, label: str) -> bytes:
        """The three digits before every id of a rank."""
        return b"%d" % (FIRST_PREFIX + self.number(label))


class ProcessIds:
    """New process ids of one file. `default`: the rank of pids that name none."""

    def __init__(self, numbers: RankNumbers, default: str) -> None:
        self._numbers = numbers
        self._default = default
        self._known: dict[bytes, tuple[str, int, str]] = {}
        self._named: dict[str, int] = {}

    def of(self, raw: bytes) -> tuple[str, int, str]:
        """(rank, new pid, the name that a textual pid was) of a pid's JSON text."""
        found = self._known.get(raw)
        if found is None:
            found = self._known[raw] = self._new(raw)
        return found

    @property
    def all(self) -> list[tuple[str, int, str]]:
        """What `of` has answered so far."""
        return list(self._known.values())

    def _new(self, raw: bytes) -> tuple[str, int, str]:
        told = rank_of_pid(raw)
        label = told or self._default
        prefix = int(self._numbers.prefix(label))
        text = raw.decode("utf-8", "replace")
        if text.startswith('"'):
            text = str(msgspec.json.decode(raw, strict=False))
        if told:
            text = _MERGED_PID.sub("", text)
        if _NUMBER.fullmatch(text) and int(text) < _NAMED:
            return label, int(f"{prefix}{text}"), ""
        place = self._named.setdefault(text, len(self._named))
        return label, prefix * 10_000_000 + _NAMED + place, text


def was_text(pid: int) -> bool:
    """Whether a new process id stands for a textual one."""
    return pid >= 10**9 and pid % 10_000_000 >= _NAMED


def flow_id(prefix: bytes, raw: bytes) -> bytes:
    """The JSON text of a flow's id, apart from those of other ranks."""
    if _FLOW.match(raw):
        return prefix + raw
    return msgspec.json.encode(f"{prefix.decode()}-{raw.decode('utf-8', 'replace')}")


def shifted(raw: bytes, shift_ns: int) -> bytes | None:
    """A time in µs, `shift_ns` later, exact to the ns; None for text that is no time."""
    time = ns(raw)
    if time is None:
        return None
    time += shift_ns
    sign = b"-" if time < 0 else b""
    return sign + b"%d.%03d" % divmod(abs(time), 1000)
