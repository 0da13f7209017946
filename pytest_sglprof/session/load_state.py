"""What a window must know of its test's load: how much is meant to run, and since when."""

from __future__ import annotations

import threading


class LoadState:
    """Set by `bench_serving` around its measured load (not its warm-up).

    Everything in it is read and written under one lock, since a load begins in the test's
    thread, ends in the driver's, and is asked about in the window's.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._target = 0
        self._started = 0
        self._ended = threading.Event()

    @property
    def driven(self) -> tuple[int, threading.Event]:
        """`target`, and the event that is set at the end, of one and the same load."""
        with self._changed:
            return self._target, self._ended

    @property
    def load_index(self) -> int:
        """Which of the test's loads is driven now, 1 for the first; 0 while none is."""
        with self._changed:
            return self._started if self._target else 0

    @property
    def target(self) -> int:
        """Requests that are meant to run at once now; 0 while none is driven."""
        return self.driven[0]

    def start(self, target: int) -> None:
        """The measured load begins."""
        with self._changed:
            self._started += 1
            self._ended = threading.Event()
            self._target = max(1, target)
            self._changed.notify_all()

    def end(self) -> None:
        """The measured load is over."""
        with self._changed:
            self._ended.set()
            self._target = 0
            self._changed.notify_all()

    def wait_for_start(self, stop: threading.Event, poll: float = 0.1) -> bool:
        """Waits until a load is driven; False when `stop` was set first."""
        with self._changed:
            while not self._target:
                if stop.is_set():
                    return False
                self._changed.wait(poll)
            return True
