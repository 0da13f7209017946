"""Waits for what opens a triggered window, and says what it means that it did not come."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pytest_sglprof.analysis.triggers import Detector, Trigger, as_trigger
from pytest_sglprof.analysis.unequal import CANNOT_KNOW, Onset
from pytest_sglprof.values import LoadSample, VerdictWord

if TYPE_CHECKING:
    from pytest_sglprof.server.server import Server
    from pytest_sglprof.session.load_state import LoadState
    from pytest_sglprof.session.window_run import WindowRun
    from pytest_sglprof.watch.log_lines import Sample
    from pytest_sglprof.watch.watcher import LoadWatch

POLL = 0.05  # s; the window has to open within a second of the onset


class TriggerWait:
    """One wait, beside the test's body."""

    def __init__(
        self,
        window: WindowRun,
        server: Server,
        load: LoadState,
        watch: LoadWatch,
        *,
        drives_load: bool,
    ) -> None:
        self._window = window
        self._server = server
        self._load = load
        self._watch = watch
        self._drives_load = drives_load
        self._trigger: Trigger = as_trigger(window.spec.trigger)
        self._detector: Detector = self._trigger.detector(load_ranks(server))
        self._fired = threading.Event()
        self._onset: Onset | None = None
        self._samples = 0

    def wait(self, stop: threading.Event) -> bool:
        """True when the window has to open now; else it has been told what its verdict is."""
        if self._trigger.compares_ranks and not can_compare(self._server):
            self._window.spare("inconclusive", CANNOT_KNOW)
            return False
        if self._drives_load and not self._load.wait_for_start(stop):
            self._window.spare("inconclusive", "the test drove no load by bench_serving")
            return False
        began = time.monotonic()
        self._watch.listen(self._listen)
        try:
            while not self._fired.wait(POLL):
                self._watch.check()
                over = time.monotonic() - began >= self._trigger.within
                if over or stop.is_set():
                    self._window.spare(*self._none(time.monotonic() - began))
                    return False
        finally:
            self._watch.unlisten(self._listen)
        self._window.onset = self._onset
        return True

    def _listen(self, samples: Sequence[Sample], now: float) -> None:
        """In the watching thread: what is raised here ends it, and is raised in the test."""
        self._samples += sum(isinstance(sample, LoadSample) for sample in samples)
        declared = self._detector.add(samples, now)
        if declared and self._onset is None:
            self._onset = declared[0]
            self._fired.set()

    def _none(self, seconds: float) -> tuple[VerdictWord, str]:
        trigger = self._trigger
        if not self._samples:
            why = f" ({self._watch.problem})" if self._watch.problem else ""
            return (
                "inconclusive",
                f"no load was told for {seconds:.0f} s, so nothing was watched{why}",
            )
        if not trigger.compares_ranks:
            return trigger.on_no_onset, f"the trigger did not fire in {seconds:.0f} s"
        judged = self._detector.judged_s
        if judged < getattr(trigger, "hold", 0.0):
            least = getattr(trigger, "min_running", 0.0)
            return "inconclusive", (
                f"the load had {least:g} requests a rank for {judged:.0f} s only: too little to "
                "tell whether it was balanced (drive more at once, or lower min_running)"
            )
        return trigger.on_no_onset, (
            f"balanced for {judged:.0f} s (λ of running requests at most "
            f"{self._detector.worst:.2f}, without an onset)"
        )


def load_ranks(server: Server) -> list[str]:
    """Labels of the DP ranks that the server has, as samples name them."""
    count = server.sizes.dp_ranks
    return [f"DP{number}" for number in range(count)] if count > 1 else []


def can_compare(server: Server) -> bool:
    """True where load or a balance of several ranks can be seen from outside."""
    return server.sizes.dp_ranks > 1 or records_experts(server.info)


def records_experts(info: Mapping[str, Any]) -> bool:
    """True for a server that tells how evenly its experts are used."""
    if not info.get("expert_distribution_recorder_mode"):
        return False
    return str(info.get("expert_balancedness_report_mode") or "off") != "off"
