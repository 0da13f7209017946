"""When imbalance of load between ranks began: an online detector with hysteresis.

Pure: it is fed samples and told the time, and knows neither a server nor a clock.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

from pytest_sglprof.analysis.rank_board import LOG_STAMP, RankBoard, RankLoad, group_of
from pytest_sglprof.analysis.unequal import (
    KINDS,
    Kind,
    Onset,
    OnsetRule,
    average_factor,
    excess,
    imbalance,
    sentence,
)
from pytest_sglprof.values import BalanceSample, LoadSample

DIP = 0.25  # of `hold`: for so long figures may fall below and come back


@dataclass
class _Track:
    """One kind of imbalance that may become an onset: since when, and what was seen since."""

    since: float
    at: float
    dip: float | None = None
    sums: dict[str, list[float]] = field(default_factory=dict)

    def integrate(self, loads: Sequence[RankLoad], now: float) -> None:
        seconds = max(0.0, now - self.at)
        for load in loads:
            total = self.sums.setdefault(load.rank, [0.0, 0.0, 0.0, 0.0])
            figures = (load.running, load.waiting, load.tokens or 0.0, load.usage or 0.0)
            for at, figure in enumerate(figures):
                total[at] += figure * seconds
        self.at = now

    def averages(self, loads: Sequence[RankLoad]) -> list[RankLoad]:
        """Time averages since it began; the loads themselves where no time has passed."""
        seconds = self.at - self.since
        if seconds <= 0:
            return list(loads)
        found = []
        for load in loads:
            running, waiting, tokens, usage = (s / seconds for s in self.sums[load.rank])
            known = load.tokens is not None
            found.append(
                replace(
                    load,
                    running=running,
                    waiting=waiting,
                    tokens=tokens if known else None,
                    usage=usage if load.usage is not None else None,
                )
            )
        return found


class GroupDetector:
    """Finds onsets among the ranks of one group; see `OnsetDetector`."""

    def __init__(self, rule: OnsetRule, board: RankBoard, source: str, group: str) -> None:
        self.rule = rule
        self.board = board
        self.judged_s = 0.0  # with at least min_running requests a rank
        self.worst = 1.0
        self.open: Onset | None = None
        self.closed: list[Onset] = []
        self._source = source
        self._group = group
        self._tracks: dict[Kind, _Track] = {}
        self._at: float | None = None
        self._loads: tuple[RankLoad, ...] = ()
        self._calm: float | None = None
        self._busy_since: float | None = None

    @property
    def is_busy(self) -> bool:
        """True while there are at least min_running requests a rank."""
        return self._busy_since is not None

    def step(self, now: float) -> Onset | None:
        """Looks at the board at `now`; a newly declared onset, or None."""
        before, loads = self._loads, self.board.loads(now)
        seconds = 0.0 if self._at is None else max(0.0, now - self._at)
        self._at, self._loads = now, loads
        running = [load.running for load in loads]
        if running and sum(running) / len(running) >= self.rule.min_running:
            self._busy_since = now if self._busy_since is None else self._busy_since
            self.judged_s += seconds
            self.worst = max(self.worst, imbalance(running))
        else:
            self._busy_since = None
        if len(loads) < 2:
            return None
        if self.open is not None:
            self._keep_or_end(loads, now)
            return None
        shown = excess(loads, self.rule)
        for kind in KINDS:
            self._follow(kind, kind in shown, before, loads, now)
        return self._declare(loads, now)

    def _follow(
        self,
        kind: Kind,
        shows: bool,
        before: Sequence[RankLoad],
        loads: Sequence[RankLoad],
        now: float,
    ) -> None:
        track = self._tracks.get(kind)
        if track is None:
            if shows:
                began = self._starved_since(loads, now) if kind == "starved" else now
                track = self._tracks[kind] = _Track(began, began)
                track.integrate(loads, now)
            return
        track.integrate(before, now)
        if shows:
            track.dip = None
        elif track.dip is None:
            track.dip = now
        elif now - track.dip > DIP * self.rule.hold:
            del self._tracks[kind]

    def _starved_since(self, loads: Sequence[RankLoad], now: float) -> float:
        """Silence is noticed late: it began when the rank fell silent while there was work."""
        silent = [load.silent_since for load in loads if load.silent_since is not None]
        if not silent or self._busy_since is None:
            return now
        return min(now, max(*silent, self._busy_since))

    def _declare(self, loads: tuple[RankLoad, ...], now: float) -> Onset | None:
        for kind in KINDS:
            track = self._tracks.get(kind)
            if track is None or track.dip is not None or now - track.since < self.rule.hold:
                continue
            averages = track.averages(loads)
            if (factor := average_factor(kind, averages, self.rule)) is None:
                continue
            found = Onset(
                time=track.since,
                declared=now,
                kind=kind,
                factor=factor,
                resolution_s=self.board.resolution,
                source=self._source,
                ranks=tuple(averages),
                group=self._group,
            )
            self.open = replace(found, sentence=sentence(found))
            self._tracks.clear()
            self._calm = None
            return self.open
        return None

    def _keep_or_end(self, loads: Sequence[RankLoad], now: float) -> None:
        assert self.open is not None
        if excess(loads, self.rule.released()):
            self._calm = None
            return
        self._calm = now if self._calm is None else self._calm
        if now - self._calm >= self.rule.hold:
            self.closed.append(replace(self.open, ended=self._calm))
            self.open = None


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
        """All that were declared so far, in order; the last may not have ended."""
        found = [onset for group in self.groups for onset in group.closed]
        found += [group.open for group in self.groups if group.open is not None]
        found += [onset for balance in self._balance.values() for onset in balance.declared]
        return tuple(sorted(found, key=lambda onset: onset.time))

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
            mine = [rank for rank in self._ranks if group_of(rank) == name]
            board = RankBoard(mine, falls_silent=self.source == "log", stamp=self._stamp)
            self._groups[name] = GroupDetector(self.rule, board, self.source, name)
        return self._groups[name]


class _Balance:
    """Onsets among figures that the server measures itself."""

    def __init__(self, rule: OnsetRule) -> None:
        self.declared: list[Onset] = []
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
        found = Onset(
            time=first.time,
            declared=sample.time,
            kind=sample.kind,
            factor=math.fsum(s.factor for s in self._since) / len(self._since),
            resolution_s=(sample.time - first.time) / max(1, len(self._since) - 1),
            source=sample.source,
        )
        self._since.clear()
        self.declared.append(replace(found, sentence=sentence(found)))
        return [self.declared[-1]]
