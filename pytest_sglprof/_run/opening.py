"""When a marked window opens: at steady load, or when its trigger fires (`triggered.py`)."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from pytest_sglprof._errors import Inconclusive, ServerError, ServerRefused, WindowRefused
from pytest_sglprof._load.onset import CANNOT_KNOW
from pytest_sglprof._load.triggers import KernelImbalance
from pytest_sglprof._metrics import VerdictWord
from pytest_sglprof._server.client import ABSENT, is_transient
from pytest_sglprof._server.log import LogGrowth, ServerLog
from pytest_sglprof._server.log_lines import Batch, Entry, EntryReader, read_batch
from pytest_sglprof._server.sizes import Role, role_of

if TYPE_CHECKING:
    from pytest_sglprof._capture.recording import Progress
    from pytest_sglprof._load.triggers import Trigger
    from pytest_sglprof._run.window import Window
    from pytest_sglprof._server.launch import Server


# The verdict of a window that was not opened (None: that of its thresholds), and the reason.
NotOpened = tuple[VerdictWord | None, str]


def open_in_time(
    window: Window, load: LoadState, body_is_over: threading.Event, *, drives_load: bool
) -> None:
    """Opens and closes `window` and the windows that repeat it, each when its moment comes.

    drives_load: the test uses `bench_serving`, so that the server is left alone until its load
    begins.
    """
    from pytest_sglprof._run.sources import record_sources
    from pytest_sglprof._run.triggered import await_trigger, look_afterwards

    following: Window | None = window
    while following is not None:
        trigger, not_opened = following.spec.trigger, None
        if trigger is None or isinstance(trigger, KernelImbalance):
            not_opened = _await_steady_load(following, load, body_is_over, drives_load)
        if trigger is not None and not_opened is None:
            not_opened = await_trigger(following, load, body_is_over, drives_load)
        if not_opened is not None:
            following.conclude_unopened(*not_opened)
            return
        following.open()
        try:
            following.wait(body_is_over)
        finally:
            following.close()
        if following.onset is not None:
            look_afterwards(following, load, body_is_over, drives_load)
        following = None if body_is_over.is_set() else following.next()
    record_sources(window, load, body_is_over)


def refuse_trigger(trigger: Trigger | None, server: Server) -> None:
    """Raises `WindowRefused` for a trigger that this server can never fire."""
    if isinstance(trigger, KernelImbalance) and not has_peers(server):
        raise WindowRefused(
            f"{trigger!r} on a server whose ranks have no peers",
            expected="ranks with the same input: tensor parallelism of 2 or more",
            hint="trigger=ImbalanceOnset(...) compares the load of DP ranks",
        )
    if trigger is not None and trigger.compares_ranks and not can_compare(server):
        raise WindowRefused(
            CANNOT_KNOW,
            expected="several DP ranks, whose load differs",
            hint="trigger=KernelImbalance(...) compares the ranks' kernels instead",
        )


def _await_steady_load(
    window: Window, load: LoadState, body_is_over: threading.Event, drives_load: bool
) -> NotOpened | None:
    if window.spec.delay > 0:
        return None  # opening waits for it
    look = LoadLook(window.server)
    while not drives_load or load.wait_for_start(body_is_over):
        is_steady = steady_load(
            window.server,
            load.target or 1,
            timeout=window.spec.timeout,
            stop=body_is_over,
            on_look=window.saw_load,
            look=look,
        )
        if is_steady:
            return None
        if not drives_load:
            break
    if window.load_problem is not None:
        why = f"the load could not be read, so the window never opened: {window.load_problem}"
        return None, why
    return None, (
        "the test's body was over before the load was steady, so the window never "
        f"opened: {look.advice()}, or use whole_body=True"
    )


def has_peers(server: Server) -> bool:
    """False for a server of which it is known that no two ranks have the same input."""
    from pytest_sglprof._analysis.groups import work_groups

    labels = [rank.label for rank in server.sizes.ranks()]
    return not labels or any(len(group.ranks) > 1 for group in work_groups(labels))


def await_driven_load(window: Window, load: LoadState, progress: Progress | None) -> None:
    """Waits for the load of `bench_serving.running`, which takes seconds to build up.

    Raises `Inconclusive` for a window of so many steps if the test's load is over and nobody else
    keeps the server busy: there would be no steps to wait for.
    """
    target, ended = load.driven
    if window.spec.delay or not (target or load.is_over):
        return
    if target:
        if progress is not None:
            progress(f"window {window.spec.name}: waiting for {target} requests to run")
        timeout = window.spec.timeout
        server, on_look = window.server, window.saw_load
        if steady_load(server, target, timeout=timeout, stop=ended, on_look=on_look):
            return
    if load.is_over and window.spec.num_steps and _stays_idle(window.server):
        raise Inconclusive(
            f"the load was over before the window {window.spec.name} could open, and the server is "
            "idle",
            expected=f"a load that lasts for {window.spec.num_steps} steps",
            hint="open the window inside `with bench_serving.running(...):`, and give that more "
            "or longer prompts",
        )


def _stays_idle(server: Server) -> bool:
    """True if the server says for `IDLE` seconds that it has no request."""
    look, deadline = LoadLook(server), time.monotonic() + IDLE
    while time.monotonic() < deadline:
        if look.requests()[0] != 0 or look.is_blind:
            return False
        time.sleep(INTERVAL)
    return True


def can_compare(server: Server) -> bool:
    """True if the load or the balance of several ranks can be read from the server."""
    return server.sizes.dp_ranks > 1 or records_experts(server.info)


def records_experts(info: Mapping[str, Any]) -> bool:
    """True for a server that reports how evenly its experts are used."""
    if not info.get("expert_distribution_recorder_mode"):
        return False
    return str(info.get("expert_balancedness_report_mode") or "off") != "off"


class LoadState:
    """The load that the test drives now. `bench_serving` sets it around a load after its warm-up.

    One lock guards all of it: a load begins in the thread of the test, ends in that of the
    driver, and is read in that of the window.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._target = 0
        self._started = 0
        self._ended = threading.Event()

    @property
    def driven(self) -> tuple[int, threading.Event]:
        """`target` of the current load, and the event that is set at its end."""
        with self._changed:
            return self._target, self._ended

    @property
    def load_index(self) -> int:
        """The number of the current load in the test, from 1; 0 while there is none."""
        with self._changed:
            return self._started if self._target else 0

    @property
    def target(self) -> int:
        """How many requests the current load keeps in flight; 0 while there is none."""
        return self.driven[0]

    @property
    def is_over(self) -> bool:
        """True after the end of a load, until another one begins."""
        with self._changed:
            return bool(self._started) and not self._target

    def start(self, target: int) -> None:
        """Begins a load. target: requests that it keeps in flight."""
        with self._changed:
            self._started += 1
            self._ended = threading.Event()
            self._target = max(1, target)
            self._changed.notify_all()

    def end(self) -> None:
        """Ends the current load."""
        with self._changed:
            self._ended.set()
            self._target = 0
            self._changed.notify_all()

    def wait_for_start(self, stop: threading.Event, poll: float = 0.1) -> bool:
        """Waits for a load to begin; False if `stop` is set before that."""
        with self._changed:
            while not self._target:
                if stop.is_set():
                    return False
                self._changed.wait(poll)
            return True


IDLE = 2.0  # s without a request after the load of a test: no more of it will come
INTERVAL = 0.2  # s between two requests; the server updates its load every few steps
TAIL_BYTES = 2**20  # of a log, in which a server that logs its batches has one
FRESH = 10.0  # s for which a batch line counts: the next one of a busy rank comes before
BUSY = 2.0  # s for which a server of prefills that has logged one counts as busy


def steady_load(
    server: Server,
    target: int,
    *,
    share: float = 0.8,
    hold: float = 2.0,
    timeout: float,
    stop: threading.Event,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], object] | None = None,
    on_look: Callable[[str | None], object] = lambda problem: None,
    look: LoadLook | None = None,
) -> bool:
    """Waits until the server has run at least ``share * target`` requests for `hold` seconds.

    Returns False after `timeout` seconds, if `stop` is set, or if the server dies. target:
    requests that the load keeps in flight, over all DP ranks. A short time without an answer
    only interrupts the `hold`; `ServerRefused` is raised for an error that will not go away. A
    server whose load nothing tells counts as loaded. clock, sleep: for tests. on_look: called
    after each request with the reason why there was no answer, or None. look: at this server's
    load.
    """
    pause = sleep or stop.wait
    deadline = clock() + timeout
    since: float | None = None
    look = look or LoadLook(server)
    while not stop.is_set():
        requests, problem = look.requests()
        on_look(problem)
        if look.is_blind or requests >= share * look.reachable(target):
            since = clock() if since is None else since
            if clock() - since >= hold:
                return True
        else:
            since = None
            if not server.is_alive():
                return False
        if clock() >= deadline:
            return False
        pause(INTERVAL)
    return False


class LoadLook:
    """Looks at how many requests a server has: by its endpoint, else by its log.

    is_blind: whether neither of them tells.
    """

    def __init__(self, server: Server) -> None:
        self.is_blind = False
        self._server = server
        self._role: Role = role_of(server.info)
        self._log: _BatchLines | None = None
        self._lacks = ""  # the endpoint
        self._most = 0

    def reachable(self, target: int) -> int:
        """How many of the `target` requests in flight this server may have at once.

        Those of a prefill and a decode server are on both of them, and the figures of a server
        without decode steps lack the requests of the batch that it runs.
        """
        return 1 if self._role else target

    def advice(self) -> str:
        """What to do about a load that never was steady."""
        if self._role in ("prefill", "embedding"):
            return (
                f"a server without decode steps has load only while requests are in its queues "
                f"({self._most} at most were seen at a time): send more of them at a time"
            )
        return "drive a longer load"

    def requests(self) -> tuple[int, str | None]:
        """Requests of all DP ranks and None, or -1 and the reason why they are unknown.

        Those that run; on a server of a disaggregated pair, or of embeddings, those that are in
        its queues, too.
        """
        count, problem = (-1, self._lacks) if self._lacks else self._by_endpoint()
        if self._lacks or self._role in ("prefill", "embedding"):
            count = max(count, self._by_log())
            blind = self._why_blind()
            self.is_blind = bool(blind)
            problem = blind or (problem if count < 0 else None)
        self._most = max(self._most, count)
        return count, problem

    def _by_endpoint(self) -> tuple[int, str | None]:
        try:
            loads = self._server.client.loads()
        except ServerError as error:
            if isinstance(error, ServerRefused) and error.status in ABSENT:
                self._lacks = f"the server has no endpoint for it ({error.what})"
            elif not is_transient(error):
                raise
            return -1, error.what
        running = sum(load.running for load in loads)
        if self._role == "decode" and not running:
            return 0, None
        return running + sum(load.waiting for load in loads if self._role), None

    def _by_log(self) -> int:
        log = self._server.log
        if self._log is None and log is not None:
            self._log = _BatchLines(log)
        return self._log.requests(by_role=bool(self._role)) if self._log else -1

    def _why_blind(self) -> str:
        if self._log is not None and self._log.has_any:
            return ""
        if self._role == "embedding" and self._log is None:
            return "the figures of a server of embeddings lack the batch that it runs"
        return self._lacks and f"{self._lacks}, and no log here has its batches"


class _BatchLines:
    """The newest batch of each DP rank in a log. has_any: whether it logs batches at all."""

    def __init__(self, log: ServerLog) -> None:
        self._log = log
        self._growth = LogGrowth(log.path, max(log.position() - TAIL_BYTES, 0))
        self._entries = EntryReader()
        self.has_any = any(entry.is_batch for entry in self._new())
        self._newest: dict[int, tuple[float, Batch, bool]] = {}

    def _new(self) -> Iterator[Entry]:
        yield from self._entries.read(self._log.new(self._growth))

    def requests(self, *, by_role: bool) -> int:
        """Requests of all ranks, -1 if none is known. by_role: also those that wait."""
        now = time.monotonic()
        for entry in self._new():
            if entry.is_batch:
                rank = entry.rank
                newest = now, read_batch(entry), entry.kind == "prefill"
                self._newest[(rank.dp if rank else None) or 0] = newest
                self.has_any = True
        counts = [
            max((batch.running or 0) + (batch.waiting if by_role else 0), busy)
            for since, batch, is_prefill in self._newest.values()
            if now - since < FRESH
            for busy in [int(by_role and is_prefill and now - since < BUSY)]
        ]
        return sum(counts) if self.has_any else -1
