"""Detects online when load between ranks became unequal, with hysteresis.

Pure: samples and the time are passed in; it knows neither a server nor a clock.
"""

from __future__ import annotations

import itertools
import math
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from pytest_sglprof._load.samples import (
    LOG_STAMP,
    BalanceSample,
    LoadSample,
    RankBoard,
    RankLoad,
    Servers,
    WaitSample,
    group_of,
)

DIP = 0.25  # of `hold`: figures may fall below the limit for so long and come back
REMEMBERED = 4.0  # x `hold`: how far back looks are kept
MAX_ONSETS = 10_000  # finished onsets that are kept, so that weeks of swings use no more memory


@dataclass
class _Look:
    """The loads at one moment, valid until the next look, and the kinds of imbalance in them."""

    time: float
    loads: tuple[RankLoad, ...]
    shown: dict[Kind, float]


class GroupDetector:
    """Detects onsets among the ranks of one group; see `OnsetDetector`."""

    def __init__(self, rule: OnsetRule, board: RankBoard, source: str, group: str) -> None:
        self.rule = rule
        self.board = board
        self.judged_s = 0.0  # seconds with enough requests, see `judged_figures`
        self.largest_factor = 1.0
        self.is_busy = False  # whether there are as many now
        self.open: Onset | None = None
        self.closed: deque[Onset] = deque(maxlen=MAX_ONSETS)
        self._source = source
        self.name = group
        self._looks: deque[_Look] = deque()
        self._calm: float | None = None

    def step(self, now: float) -> Onset | None:
        """Looks at the board at `now` (Unix s); returns an onset that it declares, or None."""
        loads = self.board.loads(now)
        self._count(loads, now)
        if len(loads) < 2:
            return None
        self._remember(loads, now)
        if self.open is not None:
            self._keep_or_end(loads, now)
            return None
        return self._declare(now)

    def _count(self, loads: Sequence[RankLoad], now: float) -> None:
        figures = judged_figures(loads, self.rule)
        self.is_busy = bool(figures)
        if figures:
            self.judged_s += max(0.0, now - self._looks[-1].time) if self._looks else 0.0
            self.largest_factor = max(self.largest_factor, imbalance(figures))

    def _remember(self, loads: tuple[RankLoad, ...], now: float) -> None:
        """Keeps this look, and corrects earlier ones, since silence is noticed late."""
        for silent in (load for load in loads if load.silent_since is not None):
            for look in self._looks:
                if look.time >= (silent.silent_since or 0.0):
                    old = next((load for load in look.loads if load.rank == silent.rank), silent)
                    if old.silent_since is None:
                        look.loads = tuple(
                            silent if load.rank == silent.rank else load for load in look.loads
                        )
                        look.shown = imbalances(look.loads, self.rule)
        self._looks.append(_Look(now, loads, imbalances(loads, self.rule)))
        oldest = now - REMEMBERED * self.rule.hold - self.board.patience
        while self._looks[0].time < oldest:
            self._looks.popleft()

    def _declare(self, now: float) -> Onset | None:
        newest = self._looks[-1]
        for kind in KINDS:
            if kind not in newest.shown:
                continue
            began = self._since(kind)
            if now - began < self.rule.hold:
                continue
            began = self._changed(kind, began)
            if now - began < self.rule.hold:
                continue
            averages = self._averages(began)
            if (factor := average_factor(kind, averages, self.rule)) is None:
                continue
            onset = Onset(
                time=began,
                declared=now,
                kind=kind,
                factor=factor,
                resolution_s=max(self.board.resolution, self._unseen_before(began)),
                source=self._source,
                ranks=averages,
                group=self.name,
            )
            self.open = replace(onset, sentence=sentence(onset))
            self._calm = None
            return self.open
        return None

    def _since(self, kind: Kind) -> float:
        """Since when `kind` has been shown without interruption, apart from dips."""
        began = self._looks[-1].time
        for look in reversed(self._looks):
            if kind in look.shown:
                began = look.time
            elif began - look.time > DIP * self.rule.hold:
                break
        return began

    def _changed(self, kind: Kind, began: float) -> float:
        """When the gap between ranks grew for good, not before `began`.

        Figures may cross the limit now and then before the real change, which is the cut that
        explains most squared deviation of the gap.
        """
        looks = [look for look in self._looks if look.time >= began - self.rule.hold]
        gaps = [gap(kind, look.loads) for look in looks]
        total, best, change = math.fsum(gaps), 0.0, began
        before = 0.0
        for at in range(1, len(looks)):
            before += gaps[at - 1]
            after = total - before
            rise = after / (len(looks) - at) - before / at
            gain = rise * rise * at * (len(looks) - at)
            if rise > 0 and gain > best:
                best, change = gain, looks[at].time
        return max(began, change)

    def _unseen_before(self, began: float) -> float:
        """Seconds between the look at `began` and the one before it; 0 for a log.

        In a log an idle rank writes nothing, so its interval is the resolution.
        """
        before = [look.time for look in self._looks if look.time < began]
        return began - before[-1] if before and not self.board.falls_silent else 0.0

    def _averages(self, began: float) -> tuple[RankLoad, ...]:
        """Time averages from `began` to the newest look."""
        looks = [look for look in self._looks if look.time >= began]
        newest = looks[-1]
        seconds = newest.time - looks[0].time
        averages = []
        for at, load in enumerate(newest.loads):
            figures = []
            for name in ("running", "waiting", "tokens", "usage"):
                held = (
                    (getattr(one.loads[at], name) or 0.0) * (two.time - one.time)
                    for one, two in itertools.pairwise(looks)
                    if at < len(one.loads)
                )
                figures.append(math.fsum(held) / seconds if seconds > 0 else getattr(load, name))
            running, waiting, tokens, usage = figures
            averages.append(
                replace(
                    load,
                    running=running,
                    waiting=waiting,
                    tokens=None if load.tokens is None else tokens,
                    usage=None if load.usage is None else usage,
                )
            )
        return tuple(averages)

    def _keep_or_end(self, loads: Sequence[RankLoad], now: float) -> None:
        assert self.open is not None
        if imbalances(loads, self.rule.released()):
            self._calm = None
            return
        self._calm = now if self._calm is None else self._calm
        if now - self._calm >= self.rule.hold:
            self.closed.append(replace(self.open, ended=self._calm))
            self.open = None
            self._looks.clear()


class OnsetDetector:
    """Takes samples in order of time and declares the onsets of imbalance.

    ranks: labels of the server's DP ranks, if known. source: "loads" or "log"; samples from
    other sources are ignored, except balances from "metrics" if `source` is "loads".
    milliseconds: whether the log's stamps have them.
    """

    def __init__(
        self,
        rule: OnsetRule,
        *,
        ranks: Sequence[str] = (),
        source: str = "loads",
        milliseconds: bool = False,
    ) -> None:
        self.rule = rule
        self.source = source
        self.servers = Servers()
        self._ranks = tuple(ranks)
        self._stamp = LOG_STAMP if source == "log" and not milliseconds else 0.0
        self._groups: dict[str, GroupDetector] = {}
        self._balance: dict[tuple[str, str], _Balance] = {}

    @property
    def groups(self) -> tuple[GroupDetector, ...]:
        """The detectors, one for each server and pipeline stage seen so far."""
        return tuple(self._groups.values())

    @property
    def onsets(self) -> tuple[Onset, ...]:
        """The onsets declared so far, in order of time; at most the newest 10,000 of a group."""
        onsets = [onset for group in self.groups for onset in group.closed]
        onsets += [group.open for group in self.groups if group.open is not None]
        onsets += [onset for balance in self._balance.values() for onset in balance.declared]
        return tuple(sorted(onsets, key=lambda onset: onset.time))

    @property
    def judged_s(self) -> float:
        """Seconds with enough requests to judge."""
        return max((group.judged_s for group in self.groups), default=0.0)

    @property
    def largest_factor(self) -> float:
        """Largest λ of the requests that were judged, see `judged_figures`."""
        return max((group.largest_factor for group in self.groups), default=1.0)

    def add(
        self, samples: Iterable[LoadSample | BalanceSample | WaitSample], now: float
    ) -> list[Onset]:
        """Takes new samples and the time (Unix s); returns the onsets declared by this look."""
        balances = []
        several = self.servers.several
        for sample in samples:
            if isinstance(sample, BalanceSample):
                if sample.source == self.source or self.source == "loads":
                    balances.append(sample)
            elif isinstance(sample, LoadSample) and sample.source == self.source:
                self.servers.add(sample)
                if self.servers.several != several:  # what was seen of both as one is no load
                    several = True
                    self._groups.clear()
                self._group(sample).board.add(sample)
        declared = [onset for group in self.groups if (onset := group.step(now)) is not None]
        busy = any(group.is_busy for group in self.groups)
        for balance in balances:
            server = self.servers.name(balance.server)
            track = self._balance.setdefault((server, balance.kind), _Balance(self.rule, server))
            declared += track.add(balance, busy=busy)
        return declared

    def _group(self, sample: LoadSample) -> GroupDetector:
        name = self.servers.group(sample)
        if name not in self._groups:
            if self.source == "log":
                board = self.servers.board(sample, self._ranks, self._stamp)
            else:
                ranks = [rank for rank in self._ranks if group_of(rank) == group_of(sample.rank)]
                board = RankBoard(ranks, falls_silent=False)
            self._groups[name] = GroupDetector(self.rule, board, self.source, name)
        return self._groups[name]


class _Balance:
    """Detects onsets in a balance that the server itself measures."""

    def __init__(self, rule: OnsetRule, group: str) -> None:
        self.group = group
        self.declared: deque[Onset] = deque(maxlen=MAX_ONSETS)
        self._rule = rule
        self._since: list[BalanceSample] = []

    def add(self, sample: BalanceSample, *, busy: bool) -> list[Onset]:
        """Takes a sample; returns the onset that it declares, if any.

        busy: whether there are at least min_running requests per rank, since the tokens of a
        few are never even.
        """
        if self.declared and self.declared[-1].ended is None:
            if sample.factor < self._rule.release:
                self.declared[-1] = replace(self.declared[-1], ended=sample.time)
            return []
        if sample.factor < self._rule.factor or not busy:
            self._since.clear()
            return []
        self._since.append(sample)
        first = self._since[0]
        if sample.time - first.time < self._rule.hold:
            return []
        onset = Onset(
            time=first.time,
            declared=sample.time,
            kind=sample.kind,
            factor=math.fsum(s.factor for s in self._since) / len(self._since),
            resolution_s=(sample.time - first.time) / max(1, len(self._since) - 1),
            source=sample.source,
            group=self.group,
        )
        self._since.clear()
        self.declared.append(replace(onset, sentence=sentence(onset)))
        return [self.declared[-1]]


# The rule by which load counts as unequal, its figures, and the sentences about it.

Kind = Literal["running", "tokens", "queue", "starved", "experts", "dp_tokens"]
KINDS: tuple[Kind, ...] = ("starved", "running", "tokens", "queue")  # the most specific first
CANNOT_KNOW = (
    "imbalance of load cannot be known here: this server has one DP rank, whose TP ranks run the "
    "same requests in the same batches, and only TP0 logs them. Compare the ranks' kernels "
    "(sglprof check), or have the server report more: with DP attention --enable-metrics and "
    "SGLANG_ENABLE_METRICS_DP_ATTENTION=1, with experts --expert-distribution-recorder-mode stat "
    "and --expert-balancedness-report-mode server_log"
)
NEARLY = 0.1  # of the mean: a rank that runs less than this on average is starved
RELEASE = 0.6  # of the way from 1 to `factor`: below it an imbalance is over
SUSPECT, SUSPECT_GAP = 1.25, 2.0  # λ, and requests above the mean, for looking more often


@dataclass(frozen=True)
class OnsetRule:
    """When load counts as unequal. Times in s.

    factor: smallest λ = max / mean over the ranks that counts. hold: how long it must last, on
    average, to be declared, and how long it must be over to have ended. min_running: mean
    running requests per rank below which nothing is declared, since few requests cannot be
    spread evenly; or as many waiting ones, to judge the queues by, since those are the load of
    a server that only prefills. min_gap: smallest number of requests by which the fullest rank
    is above the mean; min_gap_usage: the same for tokens, as a share of the KV cache.
    """

    factor: float = 1.5
    hold: float = 2.0
    min_running: float = 8.0
    min_gap: float = 4.0
    min_gap_usage: float = 0.05

    @property
    def release(self) -> float:
        """λ below which an imbalance ends."""
        return 1.0 + RELEASE * (self.factor - 1.0)

    def released(self) -> OnsetRule:
        """The weaker rule that keeps an imbalance alive."""
        return replace(
            self,
            factor=self.release,
            min_running=self.min_running / 2,
            min_gap=self.min_gap / 2,
            min_gap_usage=self.min_gap_usage / 2,
        )


@dataclass(frozen=True)
class Onset:
    """The beginning of an imbalance, or of what a trigger looks for. Times in Unix s.

    time: when it began, to within `resolution_s` seconds. declared: when it had held for long
    enough. kind: a `Kind`, or that of a trigger. factor: λ (or the ratio that the trigger looks
    at), averaged from `time` to `declared`. ranks: their loads, averaged likewise (for a trigger:
    at `declared`). group: server (of a log of several) and pipeline stage, or "".
    ended: None while it lasts.
    """

    time: float
    declared: float
    kind: str
    factor: float
    resolution_s: float
    source: str
    ranks: tuple[RankLoad, ...] = ()
    group: str = ""
    sentence: str = ""
    ended: float | None = None

    @property
    def lost_capacity(self) -> float:
        """1 - 1/λ: the share of the ranks' capacity that waits for the fullest, 0 to 1."""
        return 1.0 - 1.0 / self.factor if self.factor > 1.0 else 0.0


def imbalance(values: Sequence[float]) -> float:
    """λ = max / mean; 1.0 if all values are 0."""
    total = math.fsum(values)
    return max(values) * len(values) / total if total > 0 else 1.0


def imbalances(loads: Sequence[RankLoad], rule: OnsetRule) -> dict[Kind, float]:
    """The kinds of imbalance that these loads show by `rule`, each with its λ."""
    figures = judged_figures(loads, rule)
    if len(loads) < 2 or not figures:
        return {}
    running = [load.running for load in loads]
    factors: dict[Kind, float] = {}
    if (factor := _over([load.waiting for load in loads], rule.min_gap, rule.factor)) is not None:
        factors["queue"] = factor
    if figures != running:
        return factors
    if idle_ranks(loads, 0.0) and max(running) >= rule.min_gap:
        factors["starved"] = imbalance(running)
    if (factor := _over(running, rule.min_gap, rule.factor)) is not None:
        factors["running"] = factor
    usage = [load.usage for load in loads]
    tokens = [load.tokens for load in loads]
    if None not in usage and None not in tokens:
        wide = _over([u or 0.0 for u in usage], rule.min_gap_usage, rule.factor)
        if wide is not None:
            factors["tokens"] = imbalance([t or 0.0 for t in tokens])
    return factors


def judged_figures(loads: Sequence[RankLoad], rule: OnsetRule) -> list[float]:
    """The running requests of the ranks, if there are enough, else the waiting ones, else none.

    Queues are the load of a server that only prefills: one of a disaggregated pair, or of a
    model that embeds.
    """
    for figures in ([load.running for load in loads], [load.waiting for load in loads]):
        if figures and sum(figures) / len(figures) >= rule.min_running:
            return figures
    return []


def seem_unequal(samples: Sequence[LoadSample]) -> bool:
    """Whether requests at one moment differ enough between ranks to look more often."""
    figures = ([s.running for s in samples], [s.waiting for s in samples])
    return len(samples) > 1 and any(_over(f, SUSPECT_GAP, SUSPECT) is not None for f in figures)


def idle_ranks(loads: Sequence[RankLoad], share: float) -> list[str]:
    """Ranks whose running and waiting requests are each at most `share` of the mean running.

    A rank that holds tokens is not idle: it may be prefilling a long prompt in chunks, while
    the server counts only decoding requests as running.
    """
    limit = share * sum(load.running for load in loads) / len(loads)
    held = [load.tokens or 0.0 for load in loads]
    few = 0.05 * sum(held) / len(held)
    return [
        load.rank
        for load in loads
        if load.running <= limit and load.waiting <= limit and (load.tokens or 0.0) <= few
    ]


def _over(values: Sequence[float], gap: float, limit: float) -> float | None:
    factor = imbalance(values)
    far = max(values) - math.fsum(values) / len(values) >= gap
    return factor if far and factor >= limit else None


def gap(kind: Kind, loads: Sequence[RankLoad]) -> float:
    """How far the fullest rank is above the mean, in the figure that `kind` is about.

    For "starved" it is the share of idle ranks, since the others need not take over their
    work.
    """
    if kind == "starved":
        return len(idle_ranks(loads, 0.0)) / len(loads)
    name = {"running": "running", "tokens": "tokens", "queue": "waiting"}[kind]
    values = [float(getattr(load, name) or 0.0) for load in loads]
    return max(values) - math.fsum(values) / len(values)


def average_factor(kind: Kind, averages: Sequence[RankLoad], rule: OnsetRule) -> float | None:
    """λ of one kind in time-averaged loads; None if they do not meet the rule."""
    if kind == "starved":
        idle = idle_ranks(averages, NEARLY)
        return imbalance([load.running for load in averages]) if idle else None
    return imbalances(averages, rule).get(kind)


def sentence(onset: Onset) -> str:
    """The onset in words and numbers, without the time, which each view formats."""
    loads = onset.ranks
    if onset.kind in ("experts", "dp_tokens") or not loads:
        what = "tokens of the experts' GPUs" if onset.kind == "experts" else "tokens of DP ranks"
        return f"{what}: the fullest has {onset.factor:.2f}x the mean, as the server measures it"
    if onset.kind == "starved":
        idle = idle_ranks(loads, NEARLY)
        rest = [load.running for load in loads if load.rank not in idle]
        work = f"{math.fsum(rest) / len(rest):.1f} requests" if rest else "requests"
        are = "is" if len(idle) == 1 else "are"
        return f"{', '.join(idle)} {are} starved while the others run {work} each"
    name = {"running": "running", "tokens": "tokens", "queue": "waiting"}[onset.kind]
    unit = {"running": "running requests", "tokens": "KV tokens", "queue": "waiting requests"}
    figures = {load.rank: getattr(load, name) or 0.0 for load in loads}
    fullest = max(figures, key=lambda rank: figures[rank])
    mean = math.fsum(figures.values()) / len(figures)
    return (
        f"{fullest} has {figures[fullest]:.0f} {unit[onset.kind]}, {onset.factor:.2f}x the mean "
        f"of {mean:.0f} over {len(figures)} ranks"
    )
