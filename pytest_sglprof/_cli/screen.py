"""What `watch` shows at a terminal: a table with one row for each rank, and onsets as lines."""

from __future__ import annotations

import threading
import time
from collections import defaultdict, deque
from collections.abc import Iterable, Sequence
from typing import IO, TYPE_CHECKING

from pytest_sglprof._cli.terminal import width
from pytest_sglprof._load.disturbance import Disturbances
from pytest_sglprof._load.onset import Onset, OnsetDetector, imbalance
from pytest_sglprof._load.samples import BalanceSample, LoadSample
from pytest_sglprof._load.watcher import LogSource
from pytest_sglprof._verdict.wording import percent, text_table

if TYPE_CHECKING:
    from pytest_sglprof._cli.watch import JsonLines
    from pytest_sglprof._load.samples import RankLoad
    from pytest_sglprof._load.sources import Sample

BARS = "▁▂▃▄▅▆▇█"
WIDTH = 30  # moments in a sparkline
ONE_RANK = "all"  # label for a server with one DP rank, which logs no tag


class LoadHistory:
    """The latest numbers of running requests of each rank, for sparklines."""

    def __init__(self) -> None:
        self._running: defaultdict[str, deque[int]] = defaultdict(lambda: deque(maxlen=WIDTH))

    def add(self, samples: Iterable[Sample], source: str) -> None:
        """Keeps the load samples of `source`."""
        for sample in samples:
            if isinstance(sample, LoadSample) and sample.source == source:
                self._running[sample.rank].append(sample.running)

    def sparkline(self, rank: str) -> str:
        """The bars of one rank, on the scale of all ranks."""
        top = max((max(values) for values in self._running.values()), default=0)
        return sparkline(self._running.get(rank, ()), top)


def sparkline(values: Iterable[float], top: float) -> str:
    """One character for each value, on a scale from 0 to `top`."""
    return "".join(BARS[round((len(BARS) - 1) * min(1.0, v / top)) if top else 0] for v in values)


def load_table(loads: Sequence[RankLoad], history: LoadHistory) -> list[str]:
    """The table as lines, with the load of each rank over the mean, and λ below it."""
    running = [load.running for load in loads]
    mean = sum(running) / len(running) if running else 0.0
    rows = [
        [
            load.rank or ONE_RANK,
            f"{load.running:.0f}",
            f"{load.waiting:.0f}",
            "-" if load.tokens is None else f"{load.tokens:.0f}",
            "-" if load.usage is None else percent(load.usage),
            "-" if not mean or len(loads) < 2 else f"{load.running / mean:.2f}",
            "silent" if load.silent_since is not None else history.sparkline(load.rank),
        ]
        for load in loads
    ]
    head = ["rank", "running", "waiting", "tokens", "KV", "of mean", "running requests"]
    lines = text_table(head, rows, left=[0, 6])
    if len(loads) > 1:
        lines.append(f"λ {imbalance(running):.2f}")
    return lines


def onset_line(onset: Onset) -> str:
    """`2026-11-24 03:13:51 (± 0.5 s, loads) to 03:14:02: DP1 is starved …`."""
    begin = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(onset.time))
    period = begin
    if onset.ended is not None:
        end = time.strftime("%H:%M:%S", time.localtime(onset.ended))
        period = f"{begin} to {end} ({onset.ended - onset.time:.0f} s)"
    group = f"{onset.group}: " if onset.group else ""
    return (
        f"onset {period}, known to {onset.resolution_s:.1f} s from the {onset.source}: {group}"
        f"{onset.sentence}; λ {onset.factor:.2f}, {percent(onset.lost_capacity)} lost"
    )


class Screen:
    """The terminal. The watching thread adds samples, the main thread draws."""

    def __init__(
        self,
        out: IO[str],
        detector: OnsetDetector,
        lines: JsonLines,
        log: LogSource | None,
        disturbances: Disturbances,
    ) -> None:
        self.onset = threading.Event()
        self.cannot_know = False
        self._log = log
        self._has_untagged = self._has_balance = False
        self._out = out
        self._detector = detector
        self._disturbances = disturbances
        self._lines = lines
        self._history = LoadHistory()
        self._lock = threading.Lock()
        self._new: list[Onset] = []
        self._first: Onset | None = None
        self._ended: set[float] = set()
        self._drawn = 0
        self._is_terminal = out.isatty()

    def _undisturbed(self, samples: Sequence[Sample]) -> Sequence[Sample]:
        """Those that are not what a window did to the load."""
        if not self._disturbances.windows:
            return samples
        return [sample for sample in samples if not self._disturbances.covers(sample.time)]

    def take(self, samples: Sequence[Sample], now: float) -> None:
        """Adds samples; called in the watching thread."""
        with self._lock:
            self._lines.samples(samples)
            self._history.add(samples, self._detector.source)
            new_onsets = self._detector.add(self._undisturbed(samples), now)
            self._has_untagged |= any(s.source == "log" and not s.rank for s in samples)
            self._has_balance |= any(isinstance(sample, BalanceSample) for sample in samples)
            self.cannot_know = self._is_one_rank(now)
            for onset in new_onsets:
                self._lines.onset(onset)
            onsets = self._detector.onsets
            self._ended &= {onset.time for onset in onsets}
            for onset in onsets:
                if onset.ended is not None and onset.time not in self._ended:
                    self._ended.add(onset.time)
                    self._lines.end(onset)
            self._new += new_onsets
            self._first = self._first or next(iter(new_onsets), None)
        if new_onsets:
            self.onset.set()

    def first(self) -> Onset | None:
        """The first onset, or None."""
        with self._lock:
            return self._first

    def _is_one_rank(self, now: float) -> bool:
        """Whether everything read so far is of one DP rank; False before the end of the log."""
        if self._log is not None and not self._log.delay:
            return False
        tagged = any(len(group.board.loads(now)) > 1 for group in self._detector.groups)
        return self._has_untagged and not tagged and not self._has_balance

    def draw(self, footer: Iterable[str] = ()) -> None:
        """Prints new onsets; on a terminal also redraws the table and `footer` below them."""
        with self._lock:
            new, self._new = self._new, []
            tables: list[str] = []
            if self._is_terminal:
                for group in self._detector.groups:
                    tables += [f"{group.name}:"] if self._detector.servers.several else []
                    tables += load_table(group.board.loads(time.time()), self._history)
        self.clear()
        for onset in new:
            self.say(onset_line(onset))
        tables += footer
        if tables:
            columns = width()  # a line that wraps would be two to erase
            self._out.write("".join(f"{line[:columns]}\n" for line in tables))
            self._drawn = len(tables)
        self._out.flush()

    def clear(self) -> None:
        """Erases the table."""
        if self._drawn:
            self._out.write(f"\x1b[{self._drawn}F\x1b[J")
            self._drawn = 0

    def forget(self) -> None:
        """Leaves what is drawn where it is: another program has written below it."""
        self._drawn = 0

    def say(self, text: str) -> None:
        """Prints a line that stays."""
        self._out.write(f"{text}\n")
        self._out.flush()
