"""The table of `sglprof watch`: a row a rank, and onsets as lines."""

from __future__ import annotations

import time
from collections import defaultdict, deque
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from pytest_sglprof.analysis.unequal import Onset, imbalance
from pytest_sglprof.gate.wording import percent
from pytest_sglprof.report.text_table import text_table
from pytest_sglprof.values import LoadSample

if TYPE_CHECKING:
    from pytest_sglprof.analysis.rank_board import RankLoad
    from pytest_sglprof.watch.log_lines import Sample

BARS = "▁▂▃▄▅▆▇█"
WIDTH = 30  # moments in a sparkline
ONE_RANK = "all"  # shown where the server has one DP rank, and logs no tag


class LoadHistory:
    """The newest running requests of each rank, for sparklines."""

    def __init__(self) -> None:
        self._running: defaultdict[str, deque[int]] = defaultdict(lambda: deque(maxlen=WIDTH))

    def add(self, samples: Iterable[Sample], source: str) -> None:
        """Takes the load samples of `source`."""
        for sample in samples:
            if isinstance(sample, LoadSample) and sample.source == source:
                self._running[sample.rank].append(sample.running)

    def sparkline(self, rank: str) -> str:
        """Bars of one height scale for all ranks."""
        top = max((max(values) for values in self._running.values()), default=0)
        return sparkline(self._running.get(rank, ()), top)


def sparkline(values: Iterable[float], top: float) -> str:
    """One character a value, from 0 to `top`."""
    return "".join(BARS[round((len(BARS) - 1) * min(1.0, v / top)) if top else 0] for v in values)


def load_table(loads: Sequence[RankLoad], history: LoadHistory) -> list[str]:
    """Lines: rank, running, waiting, tokens, λ so far as that rank makes it, sparkline."""
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
        f"{onset.sentence}; λ {onset.factor:.2f}, {percent(onset.lost_share)} lost"
    )
