"""When imbalance of load between ranks began: an online detector with hysteresis.

Pure: it is fed samples and told the time, and knows neither a server nor a clock.
"""

from __future__ import annotations

import itertools
import math
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from pytest_sglprof.analysis.rank_board import LOG_STAMP, RankBoard, RankLoad, group_of
from pytest_sglprof.analysis.unequal import (
    KINDS,
    Kind,
    Onset,
    OnsetRule,
    average_factor,
    gap,
    imbalance,
    imbalances,
    sentence,
)
from pytest_sglprof.values import BalanceSample, LoadSample

DIP = 0.25  # of `hold`: for so long figures may fall below and come back
REMEMBERED = 4.0  # times `hold` that is looked back
MAX_ONSETS = 10_000  # that are over and still kept; a load that swings for weeks has more


@dataclass
class _Look:
    """The loads at one moment, which held until the next look, and what they showed."""

    time: float
    loads: tuple[RankLoad, ...]
    shown: dict[Kind, float]


class GroupDetector:
    """Finds onsets among the ranks of one group; see `OnsetDetector`."""

    def __init__(self, rule: OnsetRule, board: RankBoard, source: str, group: str) -> None:
        self.rule = rule
        self.board = board
        self.judged_s = 0.0  # with at least min_running requests a rank
        self.worst = 1.0
        self.is_busy = False  # as much now
        self.open: Onset | None = None
        self.closed: deque[Onset] = deque(maxlen=MAX_ONSETS)
        self._source = source
        self._group = group
        self._looks: deque[_Look] = deque()
        self._calm: float | None = None

    def step(self, now: float) -> Onset | None:
        """Looks at the board at `now`; a newly declared onset, or None."""
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
        running = [load.running for load in loads]
        self.is_busy = bool(running) and sum(running) / len(running) >= self.rule.min_running
        if self.is_busy:
            self.judged_s += max(0.0, now - self._looks[-1].time) if self._looks else 0.0
            self.worst = max(self.worst, imbalance(running))

    def _remember(self, loads: tuple[RankLoad, ...], now: float) -> None:
        """Silence is noticed late: what was thought of the rank meanwhile is corrected."""
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
                group=self._group,
            )
            self.open = replace(onset, sentence=sentence(onset))
            self._calm = None
            return self.open
        return None

    def _since(self, kind: Kind) -> float:
        """Since when it has been shown, but for dips."""
        began = self._looks[-1].time
        for look in reversed(self._looks):
            if kind in look.shown:
                began = look.time
            elif began - look.time > DIP * self.rule.hold:
                break
        return began

    def _changed(self, kind: Kind, began: float) -> float:
        """Where the gap between ranks grew for good, not before `began`.

        Before a real change figures may swing above the limit now and then: the cut that
        explains most squared deviation of the gap is when it began.
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
        """Seconds between the look that showed it first and the one before that.

        Of a log, where a rank without work writes nothing, its interval tells.
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
    """Fed with samples in the order of time, it says when imbalance began.

    ranks: labels of the DP ranks that the server has, where known. source: "loads" or
    "log"; samples of other sources are ignored, and so are expert figures of "metrics"
    unless `source` is "loads". milliseconds: the log's stamps have them.
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
        self._ranks = tuple(ranks)
        self._stamp = LOG_STAMP if source == "log" and not milliseconds else 0.0
        self._groups: dict[str, GroupDetector] = {}
        self._balance: dict[str, _Balance] = {}

    @property
    def groups(self) -> tuple[GroupDetector, ...]:
        """One for each pipeline stage that was heard of."""
        return tuple(self._groups.values())

    @property
    def onsets(self) -> tuple[Onset, ...]:
        """Those that were declared, in order (the newest of very many); the last may go on."""
        onsets = [onset for group in self.groups for onset in group.closed]
        onsets += [group.open for group in self.groups if group.open is not None]
        onsets += [onset for balance in self._balance.values() for onset in balance.declared]
        return tuple(sorted(onsets, key=lambda onset: onset.time))

    @property
    def judged_s(self) -> float:
        """Seconds with enough requests to judge."""
        return max((group.judged_s for group in self.groups), default=0.0)

    @property
    def worst(self) -> float:
        """Largest λ of running requests that was seen while there were enough."""
        return max((group.worst for group in self.groups), default=1.0)

    def add(self, samples: Iterable[LoadSample | BalanceSample], now: float) -> list[Onset]:
        """Takes new samples and the time (Unix s); returns what is declared by them."""
        balances = []
        for sample in samples:
            if isinstance(sample, BalanceSample):
                if sample.source == self.source or self.source == "loads":
                    balances.append(sample)
            elif sample.source == self.source:
                self._group(group_of(sample.rank)).board.add(sample)
        declared = [onset for group in self.groups if (onset := group.step(now)) is not None]
        busy = any(group.is_busy for group in self.groups)
        for balance in balances:
            track = self._balance.setdefault(balance.kind, _Balance(self.rule))
            declared += track.add(balance, busy=busy)
        return declared

    def _group(self, name: str) -> GroupDetector:
        if name not in self._groups:
            ranks = [rank for rank in self._ranks if group_of(rank) == name]
            board = RankBoard(ranks, falls_silent=self.source == "log", stamp=self._stamp)
            self._groups[name] = GroupDetector(self.rule, board, self.source, name)
        return self._groups[name]


class _Balance:
    """Onsets among figures that the server measures itself."""

    def __init__(self, rule: OnsetRule) -> None:
        self.declared: deque[Onset] = deque(maxlen=MAX_ONSETS)
        self._rule = rule
        self._since: list[BalanceSample] = []

    def add(self, sample: BalanceSample, *, busy: bool) -> list[Onset]:
        """busy: with at least min_running requests a rank; the tokens of few are never even."""
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
        )
        self._since.clear()
        self.declared.append(replace(onset, sentence=sentence(onset)))
        return [self.declared[-1]]
