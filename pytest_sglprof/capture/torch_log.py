"""What the server's log tells of a torch window: which rank began, and which ended."""

from __future__ import annotations

import re
import weakref
from collections import Counter, deque
from dataclasses import dataclass

from pytest_sglprof.capture.torch_files import PlaceOfRank, place
from pytest_sglprof.ranks import Rank
from pytest_sglprof.server.log import ServerLog
from pytest_sglprof.server.log_growth import LogGrowth
from pytest_sglprof.server.log_lines import Entry, EntryReader, highest_iteration

STEP_BYTES = 2**26  # 500,000 lines of batches

_ERROR = re.compile(r"^(?:\w+\.)*\w*(?:Error|Exception)\b")
# How far each log has been read for step numbers, and the highest one so far.
_SHOWN: weakref.WeakKeyDictionary[ServerLog, tuple[LogGrowth, int | None]] = (
    weakref.WeakKeyDictionary()
)


@dataclass(frozen=True)
class Progress:
    """Counts since the window was opened. begun, ended: rank's place -> times.

    strangers: profile ids that began meanwhile and are not ours. batches: forward passes
    that were logged (each prefill, and each so many-th decode, of some ranks only).
    """

    begun: Counter[PlaceOfRank]
    ended: Counter[PlaceOfRank]
    strangers: tuple[str, ...]
    batches: int

    def pending(self) -> list[PlaceOfRank]:
        """Ranks that began more often than they ended."""
        return sorted(where for where, times in self.begun.items() if times > self.ended[where])


class ProgressReader:
    """Follows one window in the log from byte `start` on; what was read is not read again."""

    def __init__(self, log: ServerLog, start: int, profile_id: str) -> None:
        self._log = log
        self._growth = LogGrowth(log.path, start)
        self._entries = EntryReader()
        self._profile_id = profile_id
        self._begun: Counter[PlaceOfRank] = Counter()
        self._ended: Counter[PlaceOfRank] = Counter()
        self._strangers: dict[str, None] = {}
        self._batches = 0

    def read(self) -> Progress:
        """All that the log has told by now."""
        for entry in self._entries.read(self._log.new(self._growth)):
            self._take(entry)
        strangers = tuple(self._strangers)
        return Progress(Counter(self._begun), Counter(self._ended), strangers, self._batches)

    def _take(self, entry: Entry) -> None:
        where = place(entry.rank or Rank(tp=0))
        if entry.kind == "profile_start":
            if entry.profile_id == self._profile_id:
                self._begun[where] += 1
            else:
                self._strangers[entry.profile_id or "?"] = None
        elif entry.kind == "profile_end":
            self._ended[where] += 1
        elif entry.is_batch:
            self._batches += 1


def read_progress(log: ServerLog, start: int, profile_id: str) -> Progress:
    """Reads the log once, from byte `start` on."""
    return ProgressReader(log, start, profile_id).read()


def refusal_reason(log: ServerLog, start: int) -> tuple[str, ...]:
    """The last error since `start`: why a profile request was answered 500."""
    errors = (line for line in log.each(start) if _ERROR.match(line))
    return tuple(deque(errors, maxlen=1))


def last_step(log: ServerLog) -> int | None:
    """The highest step number the log shows; None without SGLANG_LOG_FORWARD_ITERS.

    The first look at a log begins `STEP_BYTES` before its end, since steps only grow; each
    later one looks at what is new.
    """
    growth, highest = _SHOWN.get(log) or (LogGrowth(log.path), None)
    for piece in growth.pieces(at_most=STEP_BYTES):
        shown = highest_iteration(piece)
        highest = max((n for n in (highest, shown) if n is not None), default=None)
    _SHOWN[log] = growth, highest
    return highest
