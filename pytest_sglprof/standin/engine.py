"""One replica: a loop that forms batches, lets its ranks run them, and logs them."""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import os
import queue
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from pytest_sglprof.standin.laws import CPU_US_A_REQUEST
from pytest_sglprof.standin.model import IDLE, Batch, Place, is_idle, stage_peers
from pytest_sglprof.standin.nodes import FarProcess
from pytest_sglprof.standin.options import Options, env_flag, log

PUBLISH_INTERVAL = 15
"""Decode passes between two refreshes of `/v1/loads`, as in the real server."""


@dataclass
class Order:
    """A control request to the loop, answered through `done`."""

    message: dict[str, Any]
    done: threading.Event = field(default_factory=threading.Event)
    answers: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True)
class Load:
    """A refreshed state of a lane, what `/v1/loads` shows."""

    timestamp: float
    running: int
    waiting: int
    tokens: int
    throughput: float
    waiting_tokens: int = 0


SYNC_WAITS = "sglang:dp_attention_sync_wait_seconds"
SYNC_WAIT_BOUNDS = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25,
                    0.5, 1.0, math.inf)  # fmt: skip


@dataclass
class SyncWaits:
    """Of the scheduler of a lane for its peers: the histogram that SGLang makes of them, s."""

    sum: float = 0.0
    counts: list[int] = field(default_factory=lambda: [0] * len(SYNC_WAIT_BOUNDS))

    def add(self, seconds: float) -> None:
        """Counts one wait, in every bucket that holds it."""
        self.sum += seconds
        for at, bound in enumerate(SYNC_WAIT_BOUNDS):
            self.counts[at] += seconds <= bound

    def lines(self, labels: str) -> list[str]:
        """The series as `/metrics` has them."""
        bounds = ["+Inf" if math.isinf(bound) else f"{bound}" for bound in SYNC_WAIT_BOUNDS]
        buckets = [
            f'{SYNC_WAITS}_bucket{{{labels},le="{bound}"}} {count}.0'
            for bound, count in zip(bounds, self.counts, strict=True)
        ]
        count = f"{SYNC_WAITS}_count{{{labels}}} {self.counts[-1]}.0"
        return [*buckets, count, f"{SYNC_WAITS}_sum{{{labels}}} {self.sum}"]


class Engine(threading.Thread):
    """The scheduler of one replica. Everything else talks to it through its methods."""

    def __init__(
        self,
        options: Options,
        ranks: Sequence[RankProcess],
        on_death: Callable[[RankProcess], None],
    ) -> None:
        super().__init__(daemon=True, name=f"engine-{ranks[0].place.engine}")
        self.options = options
        self.ranks = ranks
        self.on_death = on_death
        places = [rank.place for rank in ranks]
        self.peers = stage_peers(places[0], tuple(places))
        leaders = [p for p in self.peers if p.attention_rank == 0]
        chunk = options.chunked_prefill_size
        limit, decodes = options.max_running_requests, options.disaggregation == "decode"
        self.lanes = [Lane(p.dp or 0, limit, chunk, decodes=decodes) for p in leaders]
        self.tags = [p.tags for p in leaders]
        self.step = 0
        self.last_progress = 0.0
        self.forward_sleep: float | None = None
        self.orders: queue.SimpleQueue[Order | None] = queue.SimpleQueue()
        self.loads = [Load(time.time(), 0, 0, 0, 0.0) for _ in self.lanes]
        self.decodes = [0 for _ in self.lanes]
        self.generated = [0 for _ in self.lanes]
        self.last_decode_log = [time.perf_counter() for _ in self.lanes]
        self.last_prefill_log = [time.perf_counter() for _ in self.lanes]
        speech = options.speech
        self.show_step = speech.logs_steps and env_flag("SGLANG_LOG_FORWARD_ITERS")
        measures = options.sizes.dp_attention and env_flag("SGLANG_ENABLE_METRICS_DP_ATTENTION")
        self.sync_waits = [SyncWaits() for _ in self.lanes] if measures else []

    def wake(self) -> None:
        """Tells an idle loop that a request was queued."""
        self.orders.put(None)

    def flush(self) -> bool:
        """Forgets the prefix caches of an idle replica; False when it is busy."""
        if not all(lane.is_empty for lane in self.lanes):
            return False
        for lane, tags in zip(self.lanes, self.tags, strict=True):
            lane.flush()
            log("Cache flushed successfully!", tags)
        return True

    def run(self) -> None:
        """The loop; ends only with the death of a rank."""
        try:
            while True:
                self._serve_orders(block=all(lane.is_empty for lane in self.lanes))
                batches = tuple(lane.next_batch() for lane in self.lanes)
                if not is_idle(batches):
                    self._forward(batches)
                else:  # all clients have left
                    for number in range(len(self.lanes)):
                        self._publish(number)
        except RankGone as gone:
            self.on_death(gone.rank)

    def _serve_orders(self, *, block: bool) -> None:
        while block or not self.orders.empty():
            order = self.orders.get()
            block = False
            if order is not None:
                self._ask(order)

    def _ask(self, order: Order) -> None:
        """The first stage of a pipeline answers; the others get to it later."""
        message = {**order.message, "step": self.step}
        order.answers = ask_all([rank for rank in self.ranks if not rank.place.pp], message)
        order.done.set()
        ask_all([rank for rank in self.ranks if rank.place.pp], message)

    def _forward(self, batches: tuple[Batch, ...]) -> None:
        self.step += 1
        if self.forward_sleep is not None:
            log(f"Scheduler.run_batch sleep {self.forward_sleep}s", self.tags[0])
            time.sleep(self.forward_sleep)
        most = max(batch.size for batch in batches)
        for waits, batch in zip(self.sync_waits, batches, strict=False):
            waits.add(1e-6 * CPU_US_A_REQUEST * (most - batch.size))
        wall = self.options.model.wall_ns(self.step, self.peers, batches)
        ask_all(
            self.ranks,
            {
                "op": "step",
                "step": self.step,
                "start": time.time_ns(),
                "wall": wall,
                "batches": [(b.mode, b.size, b.tokens, b.kv) for b in batches],
            },
        )
        self.last_progress = time.time()
        for number, batch in enumerate(batches):
            if batch.mode == "EXTEND":
                self._log_prefill(number, batch)
            self.generated[number] += self.lanes[number].finish(batch)
            if batch.mode == "DECODE":
                self.decodes[number] += 1
                if self.decodes[number] % self.options.decode_log_interval == 0:
                    self._log_decode(number, batch)
            ended = self.lanes[number].is_empty
            if batch.mode == "EXTEND" or ended or self.decodes[number] % PUBLISH_INTERVAL == 0:
                self._publish(number)

    def _publish(self, number: int) -> None:
        lane, now = self.lanes[number], time.time()
        with lane.lock:
            waiting = sum(len(request.prompt) for request in lane.waiting)
        running = len(lane.running)
        rate = running * 1e9 / self.options.model.step_ns
        self.loads[number] = Load(now, running, len(lane.waiting), lane.held_tokens, rate, waiting)

    def _iteration(self) -> str:
        return f" [{self.step}]" if self.show_step else ""

    def _log_prefill(self, number: int, batch: Batch) -> None:
        lane, now = self.lanes[number], time.perf_counter()
        rate = batch.tokens / max(1e-9, now - self.last_prefill_log[number])
        self.last_prefill_log[number] = now
        cached = sum(request.cached for request in lane.admitted)
        usage = (lane.held_tokens + batch.kv) / self.options.max_total_tokens
        line = self.options.speech.prefill.format(
            iteration=self._iteration(),
            new_seq=batch.size,
            new_token=batch.tokens,
            cached_token=cached,
            token_usage=usage,
            running=len(lane.running),
            waiting=len(lane.waiting),
            pending=0,
            device=self._device,
            graph=False,
            throughput=rate,
        )
        log(line, self.tags[number])

    def _log_decode(self, number: int, batch: Batch) -> None:
        lane, now = self.lanes[number], time.perf_counter()
        rate = self.generated[number] / max(1e-9, now - self.last_decode_log[number])
        self.last_decode_log[number], self.generated[number] = now, 0
        usage = lane.held_tokens / self.options.max_total_tokens
        line = self.options.speech.decode.format(
            iteration=self._iteration(),
            running=batch.size,
            tokens=lane.held_tokens,
            token_usage=usage,
            device=self._device,
            graph=self.options.device != "cpu",
            throughput=rate,
            waiting=len(lane.waiting),
        )
        log(line, self.tags[number])

    @property
    def _device(self) -> str:
        return "cpu" if self.options.device == "cpu" else "cuda"


# Continuous batching in its simplest form: who waits, who runs, who gets a token.


_numbers = itertools.count()


@dataclass
class Request:
    """One generation. `tokens` receives the count of tokens so far, or None at the end.

    prompt: token ids, or words; only their number and equality matter.
    """

    prompt: tuple[object, ...]
    max_new_tokens: int
    rid: str = ""
    made: int = 0
    cached: int = 0
    prefilled: int = 0
    dp_rank: int = 0
    created: float = field(default_factory=time.time)
    tokens: queue.SimpleQueue[int | None] = field(default_factory=queue.SimpleQueue)
    number: int = field(default_factory=lambda: next(_numbers))
    aborted: bool = False
    prompt_ran: threading.Event = field(default_factory=threading.Event)

    @property
    def length(self) -> int:
        """Tokens that it holds in the cache."""
        return self.prefilled + self.made


class Lane:
    """The requests of one batch: a replica, or an attention replica of one.

    `lock` guards `waiting`, which other threads fill; the rest belongs to the engine. decodes: the
    prompts have run on a prefill server.
    """

    def __init__(self, dp_rank: int, limit: int, chunk: int, *, decodes: bool = False) -> None:
        self.dp_rank = dp_rank
        self.limit = limit
        self.chunk = chunk
        self.decodes = decodes
        self.lock = threading.Lock()
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self.admitted: list[Request] = []
        self.seen: set[tuple[object, ...]] = set()

    @property
    def is_empty(self) -> bool:
        """True when nothing waits or runs."""
        return not (self.waiting or self.admitted or self.running)

    @property
    def held_tokens(self) -> int:
        """Tokens of the running requests."""
        return sum(request.length for request in self.running)

    def add(self, request: Request) -> None:
        """Queues a request; called from the threads of the HTTP server."""
        with self.lock:
            self.waiting.append(request)

    def next_batch(self) -> Batch:
        """A prefill of what waits and fits, else a decode step of what runs, else idle."""
        self.running = [request for request in self.running if not request.aborted]
        self.admitted = self._admit()
        if self.decodes:
            self._take(self.admitted)
        if self.admitted:
            tokens = sum(len(request.prompt) - request.cached for request in self.admitted)
            kv = sum(len(request.prompt) for request in self.admitted)
            return Batch("EXTEND", len(self.admitted), tokens, kv)
        if self.running:
            return Batch("DECODE", len(self.running), len(self.running), self.held_tokens)
        return IDLE

    def finish(self, batch: Batch) -> int:
        """Hands out the tokens of a batch that has run; how many there were."""
        given = self.admitted if batch.mode == "EXTEND" else list(self.running)
        if batch.mode == "EXTEND":
            self._take(given)
        for request in given:
            request.made += 1
            request.tokens.put(request.made)
            if request.made >= request.max_new_tokens:
                request.tokens.put(None)
        self.running = [r for r in self.running if r.made < r.max_new_tokens]
        return len(given)

    def _take(self, requests: Sequence[Request]) -> None:
        """Requests run from now on, whose prompts have run."""
        for request in requests:
            request.prefilled = len(request.prompt)
            self.seen.add(request.prompt)
            request.prompt_ran.set()
        self.running += requests
        self.admitted = []

    def flush(self) -> bool:
        """Forgets the prefix cache; False while something waits or runs."""
        if self.is_empty:
            self.seen.clear()
            return True
        return False

    def _admit(self) -> list[Request]:
        admitted: list[Request] = []
        budget = self.chunk
        with self.lock:
            while self.waiting and len(self.running) + len(admitted) < self.limit:
                request = self.waiting[0]
                if request.aborted:
                    self.waiting.popleft()
                    continue
                request.cached = len(request.prompt) - 1 if request.prompt in self.seen else 0
                tokens = len(request.prompt) - request.cached
                if admitted and tokens > budget:
                    break
                budget -= tokens
                admitted.append(self.waiting.popleft())
        return admitted


class RankGone(Exception):
    """The process of `rank` has ended without being asked to."""

    def __init__(self, rank: RankProcess) -> None:
        super().__init__(rank.place.label)
        self.rank = rank


class RankProcess:
    """One running rank. Messages are answered in order, one line each."""

    def __init__(self, place: Place, argv: Sequence[str], far: FarProcess | None = None) -> None:
        self.place = place
        self.process: FarProcess | subprocess.Popen[bytes]
        if far is not None:
            self.process = far
            return
        command = [sys.executable, "-m", "pytest_sglprof.standin.rank", place.title]
        self.process = subprocess.Popen(
            [*command, str(place.index), str(os.getpid()), *argv],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        )

    @property
    def pid(self) -> int:
        """Process id."""
        return self.process.pid

    def send(self, message: dict[str, Any]) -> None:
        """Sends without waiting; RankGone when nobody listens."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(message).encode() + b"\n")
            self.process.stdin.flush()
        except (OSError, ValueError) as error:  # ValueError: closed by `end_all` meanwhile
            raise RankGone(self) from error

    def receive(self) -> dict[str, Any]:
        """The next answer; RankGone at the end of its output."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line.endswith(b"\n"):
            raise RankGone(self)
        answer: dict[str, Any] = json.loads(line)
        return answer

    def exit_status(self, patience: float = 2.0) -> int | None:
        """Its exit status once it has ended, negative for a signal; None while it runs."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self.process.wait(patience)
        return None


def ask_all(ranks: Sequence[RankProcess], message: dict[str, Any]) -> list[dict[str, Any]]:
    """One message to all, then the answers of all, in order."""
    for rank in ranks:
        rank.send(message)
    return [rank.receive() for rank in ranks]


def end_all(ranks: Sequence[RankProcess], grace: float = 1.0) -> None:
    """Ends all and reaps them: they see the end of stdin, then SIGTERM, then SIGKILL.

    grace: seconds before SIGKILL; a third of it passes before SIGTERM.
    """
    for rank in ranks:
        if rank.process.stdin is not None:
            with contextlib.suppress(OSError):
                rank.process.stdin.close()
    deadline = time.monotonic() + grace / 3
    for rank in ranks:
        with contextlib.suppress(subprocess.TimeoutExpired):
            rank.process.wait(max(0.0, deadline - time.monotonic()))
    for rank in ranks:
        if rank.process.poll() is None:
            rank.process.terminate()
    for rank in ranks:
        try:
            rank.process.wait(grace)
        except subprocess.TimeoutExpired:
            rank.process.kill()
            rank.process.wait()
