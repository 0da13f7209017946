"""What the server's log tells of a torch window: which rank began, and which ended."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass

from pytest_sglprof.capture.torch_files import PlaceOfRank, place
from pytest_sglprof.ranks import Rank
from pytest_sglprof.server.log import ServerLog

_ENTRY = re.compile(
    r"^\[[\d-]+ [\d:.]+((?: [A-Z_]+\d+)*)\] "
    r"(Profiling starts|Profiling done|Prefill batch|Decode batch)(.*)$"
)
_ID = re.compile(r"\(with profile id: (.*)\)$")
_ITERATION = re.compile(r"^\[[\d-]+ [\d:.]+(?: [A-Z_]+\d+)*\] (?:Prefill|Decode) batch \[(\d+)\]")
_ERROR = re.compile(r"^(?:\w+\.)*\w*(?:Error|Exception)\b")


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


def read_progress(log: ServerLog, start: int, profile_id: str) -> Progress:
    """Reads the log from byte `start` on."""
    begun: Counter[PlaceOfRank] = Counter()
    ended: Counter[PlaceOfRank] = Counter()
    strangers: list[str] = []
    batches = 0
    for line in log.lines(start):
        match = _ENTRY.match(line)
        if match is None:
            continue
        where = place(Rank.parse(match[1]) or Rank(tp=0))
        if match[2] == "Profiling starts":
            found = _ID.search(match[3])
            if found and found[1] == profile_id:
                begun[where] += 1
            else:
                strangers.append(found[1] if found else "?")
        elif match[2] == "Profiling done":
            ended[where] += 1
        else:
            batches += 1
    return Progress(begun, ended, tuple(dict.fromkeys(strangers)), batches)


def refusal_reason(log: ServerLog, start: int) -> tuple[str, ...]:
    """The last error since `start`: why a profile request was answered 500."""
    errors = [line for line in log.lines(start) if _ERROR.match(line)]
    return tuple(errors[-1:])


def last_step(log: ServerLog) -> int | None:
    """The highest step number the log shows; None without SGLANG_LOG_FORWARD_ITERS."""
    numbers = [int(found[1]) for line in log.lines() if (found := _ITERATION.match(line))]
    return max(numbers, default=None)
