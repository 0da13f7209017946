"""Continuous batching in its simplest form: who waits, who runs, who gets a token."""

from __future__ import annotations

import itertools
import queue
import threading
import time
from collections import deque
from dataclasses import dataclass, field

from pytest_sglprof.standin.kernels import IDLE, Batch

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

    @property
    def length(self) -> int:
        """Tokens that it holds in the cache."""
        return self.prefilled + self.made


class Lane:
    """The requests of one batch: a replica, or an attention replica of one.

    `lock` guards `waiting`, which other threads fill; the rest belongs to the engine.
    """

    def __init__(self, dp_rank: int, limit: int, chunk: int) -> None:
        self.dp_rank = dp_rank
        self.limit = limit
        self.chunk = chunk
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
            for request in given:
                request.prefilled = len(request.prompt)
                self.seen.add(request.prompt)
            self.running += given
            self.admitted = []
        for request in given:
            request.made += 1
            request.tokens.put(request.made)
            if request.made >= request.max_new_tokens:
                request.tokens.put(None)
        self.running = [r for r in self.running if r.made < r.max_new_tokens]
        return len(given)

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
