"""NVTX ranges of an nsys report: the scheduler's batches, and self times."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from pytest_sglprof.trace.arrays import Flags, Ints
from pytest_sglprof.trace.nsys_tables import MISSING, ReportTables, coded, pid_of, usable
from pytest_sglprof.trace.table import UNKNOWN_STAGE, Step

RUN_BATCH = "scheduler.run_batch"  # SGLang with SGLANG_ENABLE_NVTX_SCHEDULER=1
PUSH_POP, START_END = 59, 60  # ENUM_NSYS_EVENT_TYPE


@dataclass(frozen=True)
class Ranges:
    """Finished ranges, arrays of shape (ranges,). Times in ns.

    thread: globalTid. nests: of push and pop, so it nests within its thread. name: codes
    into names. notes: what was left out.
    """

    start: Ints
    dur: Ints
    thread: Ints
    nests: Flags
    name: Ints
    names: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def take(self, chosen: Flags | Ints) -> Ranges:
        """The ranges that `chosen` (a mask or indices) selects."""
        return Ranges(
            start=self.start[chosen],
            dur=self.dur[chosen],
            thread=self.thread[chosen],
            nests=self.nests[chosen],
            name=self.name[chosen],
            names=self.names,
        )

    def of_pids(self, pids: Iterable[int]) -> Ranges:
        """The ranges of these processes."""
        return self.take(np.isin(pid_of(self.thread), list(pids)))


def read_ranges(tables: ReportTables) -> Ranges:
    """All push/pop and start/end ranges of a report; marks and domains are no ranges."""
    columns = ("start", "end", "eventType", "globalTid", "textId")
    start, end, kind, thread, text_id = tables.integers("NVTX_EVENTS", columns)
    own, names = tables.texts("NVTX_EVENTS", "text")
    wanted = (kind == PUSH_POP) | (kind == START_END)
    done = wanted & usable(start, end)[0]
    code = own if len(own) else np.full(len(start), -1, dtype=np.int64)
    lost = int(wanted.sum() - done.sum())
    registered = np.where(code < 0, text_id, MISSING)[done]
    ids, at = coded(registered)
    texts = tables.strings(int(number) for number in ids if number != MISSING)
    code_of = {name: number for number, name in enumerate(names)}
    codes = [code_of.setdefault(texts.get(int(number), ""), len(code_of)) for number in ids]
    code = np.where(code[done] < 0, np.array(codes, dtype=np.int64)[at], code[done])
    return Ranges(
        start=start[done],
        dur=end[done] - start[done],
        thread=thread[done],
        nests=kind[done] == PUSH_POP,
        name=code,
        names=tuple(name or "unnamed" for name in code_of),
        notes=(f"skipped {lost} NVTX ranges without an end",) if lost else (),
    )


def run_batches(ranges: Ranges) -> tuple[Step, ...]:
    """The steps of one rank: its outermost `scheduler.run_batch` ranges, in order of start."""
    if RUN_BATCH not in ranges.names:
        return ()
    found = ranges.take(ranges.name == ranges.names.index(RUN_BATCH))
    found = found.take(np.lexsort((-found.dur, found.start)))
    steps: list[Step] = []
    for start, dur in zip(found.start.tolist(), found.dur.tolist(), strict=True):
        if not steps or start >= steps[-1].end_ns:
            steps.append(Step(len(steps), UNKNOWN_STAGE, start, start + dur))
    return tuple(steps)
