"""What a window must know of its test's load: how much is meant to run, and since when."""

from __future__ import annotations

import threading


class LoadState:
    """Set by `bench_serving` around its measured load (not its warm-up)."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._target = 0
        self._started = 0
        self._ended = threading.Event()

    @property
    def ended(self) -> threading.Event:
        """Set when the load that is driven now (or was last) is over."""
        with self._changed:
            return self._ended

    @property
    def number(self) -> int:
        """Number of the load that is driven now, 1 for the test's first; 0 while none is."""
        with self._changed:
            return self._started if self._target else 0

    @property
    def target(self) -> int:
        """Requests that are meant to run at once now; 0 while none is driven."""
        with self._changed:
            return self._target

    def start(self, target: int) -> None:
        """The measured load begins."""
        self._started += 1
        self._ended = threading.Event()
        self._set(max(1, target))

    def end(self) -> None:
        """The measured load is over."""
        self._ended.set()
        self._set(0)

    def wait_for_start(self, stop: threading.Event, poll: float = 0.1) -> bool:
        """Waits until a load is driven; False when `stop` was set first."""
        with self._changed:
            while not self._target:
                if stop.is_set():
                    return False
                self._changed.wait(poll)
            return True

    def _set(self, target: int) -> None:
        with self._changed:
            self._target = target
            self._changed.notify_all()
