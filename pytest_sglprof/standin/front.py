"""The front process: starts the ranks, owns the replicas, and shuts everything down."""

from __future__ import annotations

import itertools
import os
import signal
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

from pytest_sglprof.standin.engine import (
    Engine,
    Lane,
    Order,
    RankGone,
    RankProcess,
    Request,
    end_all,
)
from pytest_sglprof.standin.handover import Rooms
from pytest_sglprof.standin.model import places
from pytest_sglprof.standin.nodes import far_ranks
from pytest_sglprof.standin.options import Options, log, web

READY = "The server is fired up and ready to roll!"


class Front:
    """State of one server. `start` it, then `wait` in the main thread until it ends."""

    def __init__(self, options: Options, argv: Sequence[str]) -> None:
        self.options = options
        self.argv = tuple(argv)
        self.started = time.time()
        self.ranks: list[RankProcess] = []
        self.engines: list[Engine] = []
        self.ready = False
        self.stopping = False
        self.crashed = threading.Event()
        self.dead_rank: RankProcess | None = None
        self.rooms = Rooms()
        self._ended = threading.Event()
        self._turn = itertools.count()

    @property
    def lanes(self) -> list[tuple[Engine, Lane]]:
        """The batches of all replicas, in the order of their DP rank."""
        return [(engine, lane) for engine in self.engines for lane in engine.lanes]

    def start_ranks(self) -> None:
        """Starts one process a rank; RankGone when one dies while starting."""
        far = far_ranks(self.options) if self.options.nnodes > 1 else {}
        for place in places(self.options.sizes):
            self.ranks.append(RankProcess(place, self.argv, far.get(place.index)))
        for rank in self.ranks:
            rank.receive()
        for number in range(self.options.sizes.engines):
            members = [rank for rank in self.ranks if rank.place.engine == number]
            self.engines.append(Engine(self.options, members, self._rank_died))

    def serve(self) -> None:
        """Lets the replicas run; from then on the server can become ready."""
        for engine in self.engines:
            engine.start()
        threading.Thread(target=self._become_ready, daemon=True).start()
        threading.Thread(target=self._watch_ranks, daemon=True).start()

    def submit(self, request: Request, dp_rank: int | None = None) -> None:
        """Queues a request: at the DP rank asked for, else in turn."""
        lanes = self.lanes
        number = next(self._turn) % len(lanes) if dp_rank is None else dp_rank
        engine, lane = lanes[number]
        request.dp_rank = number
        lane.add(request)
        engine.wake()

    def profile(self, params: Mapping[str, Any] | None) -> dict[str, Any]:
        """Starts (with a body) or stops (None) a window everywhere: the first rank's answer."""
        return self._ask({"op": "profile", "params": params})[0]

    def kill_a_rank(self) -> None:
        """The planted death: the last rank hits an exception."""
        if self.ranks:
            self.ranks[-1].send({"op": "die"})

    def stop(self, signum: int = 0, frame: object = None) -> None:
        """An orderly end, also as a signal handler."""
        if not self.stopping:
            self.stopping = True
            name = signal.Signals(signum or signal.SIGTERM).name
            log(f"{name} received. signum=None frame=None. Draining requests and shutting down...")
        self._ended.set()

    def wait(self) -> int:
        """Blocks until the server is stopped or has crashed; returns its exit status."""
        while not self._ended.wait(0.5):
            pass
        if self.dead_rank is not None and not self.stopping:
            self._crash(self.dead_rank)
        end_all(self.ranks)
        return 0

    def _ask(self, message: dict[str, Any]) -> list[dict[str, Any]]:
        orders = [Order(message) for _ in self.engines]
        for engine, order in zip(self.engines, orders, strict=True):
            engine.orders.put(order)
        for order in orders:
            order.done.wait()
        return [answer for order in orders for answer in order.answers]

    def _become_ready(self) -> None:
        options = self.options
        time.sleep(options.ready_delay / 2)
        if options.never_ready:
            return
        tokens = 1 if options.disaggregation == "prefill" else 8
        warm_up = Request(prompt=tuple(range(7)), max_new_tokens=tokens)
        self.submit(warm_up)
        while warm_up.tokens.get() is not None:
            pass
        self.ready = True
        log(READY)
        if options.die_after is not None:
            time.sleep(options.die_after)
            try:
                self.kill_a_rank()
            except RankGone:
                return

    def _watch_ranks(self) -> None:
        """An idle replica talks to nobody and would not notice that a rank has gone."""
        while not self._ended.wait(0.1):
            for rank in self.ranks:
                if rank.process.poll() is not None:
                    self._rank_died(rank)

    def _rank_died(self, rank: RankProcess) -> None:
        status = rank.exit_status()
        time.sleep(0.2)  # a signal to the whole group reaches the ranks before it reaches us
        if self.stopping or self.crashed.is_set():
            return
        self.dead_rank = rank
        self.crashed.set()
        if status is not None and status < 0:
            log(
                f"Subprocess scheduler_{rank.place.index} (pid={rank.pid}) crashed with exit "
                f"code {status}. Triggering SIGQUIT for cleanup..."
            )
        self._ended.set()

    def _crash(self, rank: RankProcess) -> None:
        """What the real server does once a rank has died: it ends itself by SIGKILL."""
        log("SIGQUIT received. signum=None, frame=None. It usually means one child failed.")
        delay = self.options.crash_delay
        log(f"Sleeping {delay:g} seconds before crash diagnostics to let GPU activity settle.")
        deadline = time.monotonic() + delay
        while time.monotonic() < deadline and not self.stopping:
            time.sleep(0.05)
        end_all(self.ranks)
        log("No live scheduler processes found; skipping py-spy and CUDA coredump.")
        log(
            f"kill_process_tree called: parent_pid={os.getpid()}, include_parent=True, "
            f"pid={os.getpid()}"
        )
        os.kill(os.getpid(), signal.SIGKILL)


def start_failure(options: Options) -> int:
    """A server that dies while starting, by the planted fault `import`: exit status 1."""
    log(f"server_args={{'model_path': {options.model_path!r}, 'port': {options.port}}}")
    try:
        __import__("sgl_kernel_that_is_not_there")
    except ImportError as error:
        sys.excepthook(type(error), error, error.__traceback__)
    return 1


def died_while_starting(gone: RankGone) -> int:
    """A rank's death before the server serves: the front's own words and exit status 1."""
    status = gone.rank.exit_status()
    log(
        f"Rank {gone.rank.place.index} scheduler died during initialization (exit code: "
        f"{status}). If exit code is -9 (SIGKILL), a common cause is the OS OOM killer."
    )
    log("SIGQUIT received. signum=None, frame=None. It usually means one child failed.")
    return 1


def address_in_use(host: str, port: int) -> int:
    """The port is taken, or is said to be by the planted fault: exit status 1."""
    web(
        f"[Errno 98] error while attempting to bind on address ('{host}', {port}): address "
        "already in use",
        "ERROR",
    )
    return 1
