"""What happens until a trigger fires and after that: the short windows around an onset.

An onset is known only after it has lasted. So a first suspicion opens a window of a few steps
("before"), the onset the long one, which alone is judged ("at"), and a third one shows whether the
ranks are alike again ("after").
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from pytest_sglprof._load.disturbance import Detector, Undisturbed
from pytest_sglprof._load.onset import Onset
from pytest_sglprof._load.samples import LoadSample
from pytest_sglprof._load.triggers import KernelImbalance, Trigger, as_trigger
from pytest_sglprof._run.sampling import POLL, RingOfWindows, Sampler, open_short

if TYPE_CHECKING:
    from pytest_sglprof._load.sources import Sample
    from pytest_sglprof._load.watcher import LoadWatch
    from pytest_sglprof._run.opening import LoadState, NotOpened
    from pytest_sglprof._run.window import Window
    from pytest_sglprof._server.launch import Server

SUSPICION_GAP = 60.0  # s between two suspicions that open a window


@dataclass
class _Listener:
    """Passes samples to the detectors, in the watching thread. An exception ends that thread."""

    detector: Detector
    suspecting: Detector | None
    onsets: list[Onset] = field(default_factory=list)
    sample_count: int = 0
    fired: threading.Event = field(default_factory=threading.Event)
    suspects: threading.Event = field(default_factory=threading.Event)

    def __call__(self, samples: Sequence[Sample], now: float) -> None:
        self.sample_count += sum(isinstance(sample, LoadSample) for sample in samples)
        if self.suspecting is not None and self.suspecting.add(samples, now):
            self.suspects.set()
        self.onsets.extend(self.detector.add(samples, now))
        if self.onsets:
            self.fired.set()


def await_trigger(
    window: Window, load: LoadState, body_is_over: threading.Event, drives_load: bool
) -> NotOpened | None:
    """Returns None once the trigger fires, else the verdict of a window that was not opened."""
    trigger, watch = as_trigger(window.spec.trigger), window.watch
    assert watch is not None, "a window with a trigger has a watch"
    if drives_load and not load.wait_for_start(body_is_over):
        return "inconclusive", "the test drove no load with bench_serving"
    if isinstance(trigger, KernelImbalance):
        return _await_kernels(window, trigger, load, body_is_over, drives_load)
    listener = _listener(trigger, watch, load_ranks(window.server))
    ring = RingOfWindows(window) if window.spec.ring is not None else None
    began = time.monotonic()
    may_suspect = began
    watch.listen(listener)
    try:
        while not listener.fired.wait(POLL):
            watch.check()
            seconds = time.monotonic() - began
            if body_is_over.is_set() or seconds >= trigger.within:
                if not listener.sample_count:
                    why = f" ({watch.problem})" if watch.problem else ""
                    return "inconclusive", f"no load was reported for {seconds:.0f} s{why}"
                return _without_onset(trigger, listener.detector, seconds)
            if listener.suspects.is_set() and time.monotonic() >= may_suspect:
                open_short(window, "before", body_is_over)
                listener.suspects.clear()
                may_suspect = time.monotonic() + SUSPICION_GAP
            elif ring is not None and (why := ring.go_on(body_is_over)):
                return "inconclusive", why
    finally:
        watch.unlisten(listener)
    _fire(window, listener.onsets[0])
    return None


def _fire(window: Window, onset: Onset) -> None:
    window.onset, window.moment, window.moment_of = onset, "at", window.id


def _await_kernels(
    window: Window,
    trigger: KernelImbalance,
    load: LoadState,
    body_is_over: threading.Event,
    drives_load: bool,
) -> NotOpened | None:
    """Takes samples of the ranks' kernels until one of them has become slower."""
    from pytest_sglprof._analysis.sampled import log_ratios

    detector, sampler = trigger.detector(()), Sampler(window, trigger, at_once=True)
    began, problem = time.monotonic(), ""
    while not body_is_over.wait(POLL):
        if (seconds := time.monotonic() - began) >= trigger.within:
            break
        if why := sampler.too_dear():
            return "inconclusive", why
        if not sampler.is_due() or (drives_load and not load.target):
            continue
        sample = sampler.take("sample", body_is_over)
        if sample is None:
            continue
        table = sample.measured.table
        ratios = log_ratios(table) if table is not None else {}
        problem = problem if ratios else sample.verdict.reason
        moment = sample.capture.opened
        sample.drop()
        if not ratios:
            continue
        window.sampled.append((moment, ratios))
        if onset := detector.sample(ratios, moment):
            _fire(window, onset)
            return None
    seconds = time.monotonic() - began
    if not detector.count:
        reason = problem or "the load was too short for one"
        return "inconclusive", f"no sample of the ranks' kernels in {seconds:.0f} s: {reason}"
    return trigger.on_no_onset, (
        f"no rank was slower for certain in {detector.count} samples of {seconds:.0f} s (at most "
        f"{detector.largest_factor:.2f}x its peers)"
    )


def _listener(trigger: Trigger, watch: LoadWatch, ranks: Sequence[str]) -> _Listener:
    make = getattr(trigger, "suspecting", None)  # triggers of users have none
    suspecting: Detector | None = make(ranks) if make is not None else None
    return _Listener(
        Undisturbed(trigger.detector(ranks), watch.disturbances),
        Undisturbed(suspecting, watch.disturbances) if suspecting is not None else None,
    )


def _without_onset(trigger: Trigger, detector: Detector, seconds: float) -> NotOpened:
    if not trigger.compares_ranks:
        return trigger.on_no_onset, f"the trigger did not fire in {seconds:.0f} s"
    judged = detector.judged_s
    if judged < getattr(trigger, "hold", 0.0):
        least = getattr(trigger, "min_running", 0.0)
        return "inconclusive", (
            f"the load had {least:g} requests a rank for only {judged:.0f} s: too little to "
            "tell whether it was balanced (drive more at once, or lower min_running)"
        )
    return trigger.on_no_onset, (
        f"balanced for {judged:.0f} s (λ of running requests at most "
        f"{detector.largest_factor:.2f}, without an onset)"
    )


def load_ranks(server: Server) -> list[str]:
    """Labels of the server's DP ranks, as in samples; empty for one rank."""
    count = server.sizes.dp_ranks
    return [f"DP{number}" for number in range(count)] if count > 1 else []


def look_afterwards(
    window: Window, load: LoadState, body_is_over: threading.Event, drives_load: bool
) -> None:
    """Opens a short window after the one at the onset, if the load goes on until it is calm."""
    if window.watch is None or not getattr(window.spec.trigger, "suspicion", False):
        return
    while window.watch.disturbances.covers(time.time()):
        if body_is_over.wait(POLL):
            return
    if body_is_over.is_set() or (drives_load and not load.target):
        return
    open_short(window, "after", body_is_over)
