"""What makes a forward pass unlike its peers: kernels compiled, or graphs captured, inside it.

Both show as calls of the driver. A step with one is excluded from comparison, since its
launches waited for the host, and the rank's notes count them.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

import numpy as np

from pytest_sglprof.trace.arrays import holding
from pytest_sglprof.trace.table import Step

JIT = "jit compilation"
CAPTURE = "graph capture"
_CALLS = (
    (CAPTURE, re.compile(r"(cuda|cu|hip)(StreamBeginCapture|GraphInstantiate)")),
    (JIT, re.compile(r"(cuda|cu|hip)(Module|Library)Load|(cu|hip)LinkCreate|(nv|hip)rtc[A-Z]")),
)

Call = tuple[int, str]


def interruption(call: str) -> str:
    """ "jit compilation", "graph capture", or "" for any other call's name."""
    return next((what for what, pattern in _CALLS if pattern.match(call)), "")


def with_interruptions(
    label: str, steps: Sequence[Step], calls: Sequence[Call]
) -> tuple[tuple[Step, ...], list[str]]:
    """The steps, those around one of `calls` excluded, and notes on them.

    calls: (start in ns on the steps' clock, what), what being an answer of `interruption`.
    """
    found = sorted(calls)
    if not found:
        return tuple(steps), []
    ordered = sorted(steps, key=lambda step: step.start_ns)
    starts = np.array([step.start_ns for step in ordered], dtype=np.int64)
    ends = np.array([step.end_ns for step in ordered], dtype=np.int64)
    at = holding(starts, ends, np.array([time for time, _ in found], dtype=np.int64))
    hit: dict[tuple[int, int], str] = {}
    for place, (_, what) in zip(at.tolist(), found, strict=True):
        if place >= 0:
            step = ordered[place]
            hit.setdefault((step.step, step.start_ns), what)
    marked = tuple(
        step.changed(excluded=step.excluded or hit.get((step.step, step.start_ns), ""))
        for step in steps
    )
    in_steps = Counter(hit.values())
    notes = [
        f"{label}: {what} inside the window ({count} calls), in {in_steps[what]} steps, "
        "which are not compared"
        for what, count in sorted(Counter(what for _, what in found).items())
    ]
    return marked, notes
