"""Windows of a few steps beside the one that is judged: alone, or one after another."""

from __future__ import annotations

import statistics
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from pytest_sglprof._bench_serving.driver import Over
from pytest_sglprof._config.backends import BACKENDS
from pytest_sglprof._config.model import Moment, WindowSpec
from pytest_sglprof._errors import LeaseError
from pytest_sglprof._load.disturbance import MOST_GAP, SETTLED, Disturbance, gap_after
from pytest_sglprof._load.samples import LoadSample
from pytest_sglprof._load.triggers import KernelImbalance, Ring

if TYPE_CHECKING:
    from pytest_sglprof._run.window import Window

POLL = 0.05  # s; a window has to open within a second of the onset
SHORT_STEPS = 5  # of a window before or after the onset
SHORT_SECONDS = 0.1  # such a window lasts at least, where steps cannot be counted
USUAL_STEP = 0.02  # s; where the load does not tell how long a step takes
MOST_SECONDS = 10.0  # s to wait for so few steps: the load may have ended


class Sampler:
    """Opens windows of a few steps, as far apart as the stall of each of them allows.

    at_once: the first is opened now, else after `every` s.
    """

    def __init__(self, window: Window, plan: Ring | KernelImbalance, *, at_once: bool) -> None:
        self._window = window
        self._plan = plan
        self._due = time.time() + (0.0 if at_once else plan.every)
        self._newest: float | None = None  # when the newest was opened

    def is_due(self) -> bool:
        """Whether the next one may be opened."""
        newest = self._disturbance()
        if newest is None:
            return time.time() >= self._due
        gap = gap_after(newest, self._plan.every, self._plan.max_share)
        return time.time() >= newest.opened + gap

    def too_dear(self) -> str:
        """Why windows cannot go on; "" while they can."""
        newest, share = self._disturbance(), self._plan.max_share
        if newest is None or (newest.stall_s is None and time.time() < newest.closed + SETTLED):
            return ""
        gap = gap_after(newest, self._plan.every, share)
        if gap <= MOST_GAP:
            return ""
        return (
            f"a window of {self._plan.steps} steps stalls this server for {newest.stall:.1f} s, so "
            f"that for {share:.1%} of the time at most they would be {gap / 60:.0f} min apart, "
            f"more than {MOST_GAP / 60:.0f}: ask for fewer steps, or allow a larger max_share"
        )

    def take(self, name: str, body_is_over: threading.Event) -> Window | None:
        """Opens and closes the next one; None where the test has a window open by hand."""
        self._due = time.time() + self._plan.every
        short = open_short(self._window, "before", body_is_over, name=name, steps=self._plan.steps)
        if short is not None:
            self._newest = short.capture.opened
        return short

    def _disturbance(self) -> Disturbance | None:
        assert self._window.watch is not None, "its load is watched"
        windows = self._window.watch.disturbances.windows
        return windows[-1] if windows and self._newest is not None else None


class RingOfWindows:
    """The newest windows of a ring; the others are deleted."""

    def __init__(self, window: Window) -> None:
        self._plan: Ring = window.spec.ring
        self._sampler = Sampler(window, self._plan, at_once=False)
        self._kept: deque[Window] = deque()

    def go_on(self, body_is_over: threading.Event) -> str:
        """Opens the next window if it is due; returns why the ring cannot go on, or ""."""
        if self._sampler.is_due():
            taken = self._sampler.take("ring", body_is_over)
            if taken is not None:
                self._kept.append(taken)
            while len(self._kept) > self._plan.keep:
                self._kept.popleft().drop()
        return self._sampler.too_dear()


def open_short(
    window: Window,
    moment: Moment,
    body_is_over: threading.Event,
    *,
    name: str = "",
    steps: int = SHORT_STEPS,
    with_stack: bool = False,
) -> Window | None:
    """Opens and closes one beside `window`; None where the test has opened one by hand."""
    samples = window.watch.samples if window.watch is not None else ()
    spec = short_spec(window, name or moment, samples, steps)
    spec = replace(spec, with_stack=spec.with_stack or with_stack)
    return open_beside(window, moment, spec, body_is_over)


def open_beside(
    window: Window, moment: Moment, spec: WindowSpec, body_is_over: threading.Event
) -> Window | None:
    """Opens and closes a window of a few steps; None where the test has opened one by hand."""
    short = window.beside(moment, spec)
    try:
        short.open()
    except LeaseError:
        short.drop()
        return None
    over = time.monotonic() + MOST_SECONDS
    try:
        short.wait(Over(lambda: body_is_over.is_set() or time.monotonic() >= over))
    finally:
        short.close()
    return short


def short_spec(window: Window, name: str, samples: Sequence[LoadSample], steps: int) -> WindowSpec:
    """A window of a few steps beside `window`.

    Replicas do not step together, and one without work never ends a count of steps; nsys counts
    none by itself. There it lasts as long as these steps take.
    """
    sizes, spec = window.server.sizes, window.spec
    counts = BACKENDS[spec.backend].default_steps is not None and (
        sizes.dp_ranks == 1 or sizes.dp_attention
    )
    newest = [each for each in samples[-100:] if each.running and each.throughput]
    times = [each.running / each.throughput for each in newest if each.throughput]
    step_s = statistics.median(times) if times else USUAL_STEP
    return replace(
        spec,
        name=f"{spec.name}-{name}",
        num_steps=steps if counts else None,
        duration=None if counts else max(SHORT_SECONDS, steps * step_s),
        profile_by_stage=False,
        profile_stages=None,
        profile_id=None,
        merge_profiles=False,
        settle=0.0,
        repeat=1,
        max_time=None,
        max_stall=None,
        max_mib=None,
        source_lines=False,
        trigger=None,
        ring=None,
        thresholds=(),
    )
