"""The stand-in's own batching on a clock that the test turns: nothing sleeps.

`SimulatedServer` runs `standin.batching.Lane`s step by step in virtual time, answers
`/v1/loads` by the stand-in's own function, and writes the lines of its log.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any, Protocol

import httpx

from pytest_sglprof._load.sources import LOADS_INTERVAL, LoadsSource, Sample
from pytest_sglprof.standin.documents import _load
from pytest_sglprof.standin.engine import PUBLISH_INTERVAL, Lane, Load, Request

START = 1_795_490_000.0
STEP = 0.02
LOG_INTERVAL = 20
CAPACITY = 400_000


class Polled(Protocol):
    """A server whose time is turned by hand."""

    now: float

    def advance(self, seconds: float) -> None: ...
    def transport(self) -> httpx.MockTransport: ...


def poll_until(end: float, server: Polled, take: Callable[[Sequence[Sample], float], Any]) -> None:
    """Asks `/v1/loads` as the watcher does; `take` gets the samples and the time."""

    async def poll() -> None:
        source = LoadsSource(
            "http://127.0.0.1:1",
            interval=LOADS_INTERVAL,
            clock=lambda: server.now,
            transport=server.transport(),
        )
        while server.now < end:
            server.advance(source.delay)
            take(await source.poll(), server.now)
        await source.close()

    asyncio.run(poll())


class SimulatedServer:
    """`ranks` replicas; `wanted(t)` says how many requests each keeps in flight at t."""

    def __init__(self, ranks: int, wanted: Callable[[float], list[int]], seed: int = 0) -> None:
        self.now = START
        self.lanes = [Lane(number, 256, 8192) for number in range(ranks)]
        self.loads = [Load(START, 0, 0, 0, 0.0) for _ in self.lanes]
        self.log: list[str] = []
        self._wanted = wanted
        self._random = random.Random(seed)
        self._decodes = [0] * ranks
        self._options: Any = SimpleNamespace(
            options=SimpleNamespace(
                max_total_tokens=CAPACITY, disaggregation="null", max_running_requests=256
            )
        )

    def advance(self, seconds: float) -> None:
        """Runs all ranks until so many seconds have passed."""
        until = self.now + seconds
        while self.now < until - 1e-9:
            self.now += STEP
            for number, count in enumerate(self._wanted(self.now - START)):
                self._keep(self.lanes[number], count)
                self._step(number)

    def transport(self) -> httpx.MockTransport:
        """Answers `/v1/loads` as the stand-in does, at the virtual time."""

        def answer(request: httpx.Request) -> httpx.Response:
            shown = [_load(self._options, rank, load) for rank, load in enumerate(self.loads)]
            return httpx.Response(200, json={"loads": shown})

        return httpx.MockTransport(answer)

    def _keep(self, lane: Lane, count: int) -> None:
        """New requests come, or clients leave."""
        for request in lane.running[count:]:
            request.aborted = True
        while len(lane.running) + len(lane.waiting) < count:
            length = self._random.randint(50, 200)
            prompt = tuple(self._random.randrange(9999) for _ in range(8))
            lane.add(Request(prompt, length, created=self.now))

    def _step(self, number: int) -> None:
        lane = self.lanes[number]
        batch = lane.next_batch()
        if batch.mode == "IDLE":
            self._publish(number)
            return
        lane.finish(batch)
        if batch.mode == "DECODE":
            self._decodes[number] += 1
            if self._decodes[number] % LOG_INTERVAL == 0:
                self._write(number, batch.size)
        if batch.mode == "EXTEND" or lane.is_empty or self._decodes[number] % PUBLISH_INTERVAL == 0:
            self._publish(number)

    def _publish(self, number: int) -> None:
        lane = self.lanes[number]
        load = Load(self.now, len(lane.running), len(lane.waiting), lane.held_tokens, 0.0)
        self.loads[number] = load

    def _write(self, number: int, running: int) -> None:
        lane = self.lanes[number]
        stamp = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(self.now))
        self.log.append(
            f"[{stamp} DP{number}] Decode batch, #running-req: {running}, "
            f"#token: {lane.held_tokens}, token usage: {lane.held_tokens / CAPACITY:.2f}, "
            f"cuda graph: True, gen throughput (token/s): 100.00, #queue-req: {len(lane.waiting)}"
        )
