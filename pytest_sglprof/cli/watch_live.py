"""`sglprof watch` on what still runs: a table that follows it, onsets as they come."""

from __future__ import annotations

import argparse
import os
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING

from pytest_sglprof.analysis.onset import OnsetDetector
from pytest_sglprof.analysis.unequal import CANNOT_KNOW, Onset, OnsetRule
from pytest_sglprof.cli.watch import is_url
from pytest_sglprof.cli.watch_table import LoadHistory, load_table, onset_line
from pytest_sglprof.errors import ExitStatus, Inconclusive
from pytest_sglprof.server.client import SglangClient
from pytest_sglprof.server.sizes import ServerSizes
from pytest_sglprof.server.transient import patiently
from pytest_sglprof.values import BalanceSample
from pytest_sglprof.watch.log_file import LogFollower
from pytest_sglprof.watch.watcher import LoadWatch, LogSource, server_watch

if TYPE_CHECKING:
    from pytest_sglprof.cli.watch_jsonl import JsonLines
    from pytest_sglprof.watch.log_lines import Sample

REDRAW = 0.5  # s


def watch_live(
    args: argparse.Namespace,
    rule: OnsetRule,
    lines: JsonLines,
    out: IO[str],
    *,
    on_first: Callable[[Onset, Callable[[str], None]], ExitStatus] | None = None,
) -> ExitStatus:
    """Watches until `--for` is over, or Ctrl-C; `EXCEEDED` where there was an onset.

    on_first: called with the first onset and with what shows a line to the user; its answer
    ends the watch.
    """
    log = None
    if is_url(args.target):
        watch, detector = _server(args.target, rule)
    else:
        path = Path(args.target)
        detector = OnsetDetector(rule, source="log", milliseconds=_has_milliseconds(path))
        log = LogSource(path, from_end=False)
        watch = LoadWatch([log], keep=0)
    screen = _Screen(out, detector, lines, log)
    watch.listen(screen.take)
    with watch:
        began = time.monotonic()
        while args.seconds is None or time.monotonic() - began < args.seconds:
            watch.check()
            if screen.cannot_know:
                raise Inconclusive(CANNOT_KNOW)
            screen.onset.wait(REDRAW)
            screen.onset.clear()  # before the look: an onset after it ends the next wait
            first = screen.first()
            if first is not None and on_first is not None:
                screen.clear()
                return on_first(first, screen.say)
            screen.draw()
        screen.clear()
        return _conclusion(screen, detector)


def _conclusion(screen: _Screen, detector: OnsetDetector) -> ExitStatus:
    if detector.onsets:
        return ExitStatus.EXCEEDED
    if detector.judged_s < detector.rule.hold:
        screen.say(
            f"nothing can be said: the load had {detector.rule.min_running:g} requests a rank "
            f"for {detector.judged_s:.0f} s only (--min-running)"
        )
        return ExitStatus.INCONCLUSIVE
    screen.say(f"no onset: balanced for {detector.judged_s:.0f} s, λ at most {detector.worst:.2f}")
    return ExitStatus.DONE


def _server(url: str, rule: OnsetRule) -> tuple[LoadWatch, OnsetDetector]:
    from pytest_sglprof.server.address import checked_url
    from pytest_sglprof.session.opening import records_experts
    from pytest_sglprof.session.server_life import API_KEY_ENV

    key = os.environ.get(API_KEY_ENV, "")
    url = checked_url(url)
    client = SglangClient(url, api_key=key)
    try:
        info = patiently(client.server_info)
    finally:
        client.close()
    count = ServerSizes.from_info(info).dp_ranks
    if count < 2 and not records_experts(info):
        raise Inconclusive(CANNOT_KNOW)
    watch = server_watch(url, api_key=key, metrics=bool(info.get("enable_metrics")), keep=0)
    return watch, OnsetDetector(rule, ranks=[f"DP{number}" for number in range(count)])


def _has_milliseconds(path: Path) -> bool:
    with LogFollower(path) as log:
        for _ in log.blocks():
            return log.lines.has_milliseconds
    return False


class _Screen:
    """Fed by the watching thread, drawn by the main one."""

    def __init__(
        self, out: IO[str], detector: OnsetDetector, lines: JsonLines, log: LogSource | None
    ) -> None:
        self.onset = threading.Event()
        self.cannot_know = False
        self._log = log
        self._has_untagged = self._has_balance = False
        self._out = out
        self._detector = detector
        self._lines = lines
        self._history = LoadHistory()
        self._lock = threading.Lock()
        self._new: list[Onset] = []
        self._first: Onset | None = None
        self._ended: set[float] = set()
        self._drawn = 0
        self._is_terminal = out.isatty()

    def take(self, samples: Sequence[Sample], now: float) -> None:
        """New samples, in the watching thread."""
        with self._lock:
            self._lines.samples(samples)
            self._history.add(samples, self._detector.source)
            found = self._detector.add(samples, now)
            self._has_untagged |= any(s.source == "log" and not s.rank for s in samples)
            self._has_balance |= any(isinstance(sample, BalanceSample) for sample in samples)
            self.cannot_know = self._is_one_rank(now)
            for onset in found:
                self._lines.onset(onset)
            onsets = self._detector.onsets
            self._ended &= {onset.time for onset in onsets}
            for onset in onsets:
                if onset.ended is not None and onset.time not in self._ended:
                    self._ended.add(onset.time)
                    self._lines.end(onset)
            self._new += found
            self._first = self._first or next(iter(found), None)
        if found:
            self.onset.set()

    def first(self) -> Onset | None:
        """The first onset that was declared, if any was."""
        with self._lock:
            return self._first

    def _is_one_rank(self, now: float) -> bool:
        """Whether all that was read so far came of one DP rank; not before the log's end."""
        if self._log is not None and not self._log.delay:
            return False
        tagged = any(len(group.board.loads(now)) > 1 for group in self._detector.groups)
        return self._has_untagged and not tagged and not self._has_balance

    def draw(self) -> None:
        """New onsets; on a terminal the table below them, over the one before."""
        with self._lock:
            new, self._new = self._new, []
            tables: list[str] = []
            if self._is_terminal:
                for group in self._detector.groups:
                    tables += load_table(group.board.loads(time.time()), self._history)
        self.clear()
        for onset in new:
            self.say(onset_line(onset))
        if tables:
            self._out.write("".join(f"{line}\n" for line in tables))
            self._drawn = len(tables)
        self._out.flush()

    def clear(self) -> None:
        """Takes the table away."""
        if self._drawn:
            self._out.write(f"\x1b[{self._drawn}F\x1b[J")
            self._drawn = 0

    def say(self, text: str) -> None:
        """A line that stays."""
        self._out.write(f"{text}\n")
        self._out.flush()
