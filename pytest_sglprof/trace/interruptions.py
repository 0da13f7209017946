"""What makes a forward pass unlike its peers: kernels compiled, or graphs captured, inside it.

Both show as calls of the driver. A step with one is excluded from comparison, since its
launches waited for the host, and the rank's notes count them.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

import numpy as np

from pytest_sglprof.trace.steps import StepIndex
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
    if not calls:
        return tuple(steps), []
    listed = sorted(calls)
    at = StepIndex(steps).holding(np.array([time for time, _ in listed], dtype=np.int64))
    hit: dict[int, str] = {}
    for place, (_, what) in zip(at.tolist(), listed, strict=True):
        if place >= 0:
            hit.setdefault(place, what)
    marked = tuple(
        step.changed(excluded=step.excluded or hit.get(place, ""))
        for place, step in enumerate(steps)
    )
    in_steps = Counter(hit.values())
    notes = [
        f"{label}: {what} inside the window ({count} calls), in {in_steps[what]} steps, "
        "which are not compared"
        for what, count in sorted(Counter(what for _, what in listed).items())
    ]
    return marked, notes
