"""What can be judged: one row a metric, data only, so that every room can read it.

Thresholds, marker keywords, the command line, the judge and its sentences, the terminal, the
page, both schemas and the table of docs/metrics.md follow from `METRICS`. A new metric is a
row here, an attribute of the finding that has it, and a line of docs/metrics.md. Loaded in
every pytest run, so nothing heavy is imported.
"""

from __future__ import annotations

import math
from collections.abc import Container, Mapping
from operator import attrgetter
from typing import Any, Literal, NamedTuple

VerdictWord = Literal["pass", "fail", "inconclusive"]


WORST_FIRST: tuple[VerdictWord, ...] = ("fail", "inconclusive", "pass")


def worst_word(words: Container[str | None]) -> VerdictWord | None:
    """The word that decides among several; None where there is none."""
    return next((word for word in WORST_FIRST if word in words), None)


MIN_STEPS = 30  # compared steps that a verdict needs, unless the settings say otherwise
MIN_SHARE = 0.01  # of compute, below which a kernel fails nothing, likewise

Interval = tuple[float, float]
Kind = Literal["ranks"]


class Unit(NamedTuple):
    """How a figure is written. scale: by which it is multiplied before `suffix` is added.

    top: what a figure stays below. example: of a limit.
    """

    scale: float
    suffix: str
    digits: int
    top: float = math.inf
    example: str = ""


UNITS: Mapping[str, Unit] = {
    "ratio": Unit(1.0, "", 2, example="1.10 allows 10 %"),
    "share": Unit(100.0, " %", 1, top=1.0, example="0.05 allows 5 %"),
    "ms": Unit(1.0, " ms", 1),
}


class Metric(NamedTuple):
    """One metric. name: in TOML, markers, on the command line and in results.

    of: which finding has it ("ranks": `ImbalanceFinding`). value, interval: names of that
    finding's attributes, and of the fields in results.json: the figure and its 95 %.
    sentence: of a verdict, with the facts of `gate.reasons.facts`; at_best: where the figure
    is `best`, if that reads better. unit: of `UNITS`. best: no figure is better, so a limit
    beyond it is refused. needs_p: a failure also needs p; else the interval alone decides.
    """

    name: str
    of: Kind
    value: str
    interval: str
    sentence: str
    at_best: str = ""
    unit: str = "ratio"
    better: Literal["lower", "higher"] = "lower"
    best: float = 1.0
    needs_p: bool = True

    @property
    def label(self) -> str:
        """`imbalance factor`."""
        return self.name.replace("_", " ")

    def read(self, finding: object) -> Any:
        """The figure of a finding, a float; None where it has none."""
        return attrgetter(self.value)(finding)

    def read_interval(self, finding: object) -> Any:
        """The 95 % interval of the figure, (low, high); None where there is none."""
        return attrgetter(self.interval)(finding)

    def format(self, value: float | None, *, finer: int = 0, none: str = "-") -> str:
        """`1.39`, `8.2 %`, with so many digits more; `none` where there is none."""
        unit = UNITS[self.unit]
        if value is None:
            return none
        return f"{value * unit.scale:.{unit.digits + finer}f}{unit.suffix}"

    @property
    def bounds(self) -> str:
        """What a limit must be: `≥ 1.0`."""
        top = UNITS[self.unit].top
        if self.better == "higher":
            return "> 0" if math.isinf(self.best) else f"> 0 and ≤ {self.best:.1f}"
        return f"≥ {self.best:.1f}" if math.isinf(top) else f"≥ {self.best:.1f} and < {top:.1f}"

    def allows(self, limit: float) -> bool:
        """True for a limit that a figure can be on either side of."""
        if self.better == "higher":
            return 0 < limit <= self.best and math.isfinite(limit)
        return self.best <= limit < UNITS[self.unit].top

    def badness(self, value: float) -> float:
        """The figure, or its negative where higher is better: more of it is worse."""
        return -value if self.better == "higher" else value

    def is_beyond(self, value: float, limit: float) -> bool:
        """True for a figure on the bad side of the limit; an infinite limit is none."""
        return not math.isinf(limit) and self.badness(value) > self.badness(limit)

    def is_surely_beyond(self, interval: Interval, limit: float) -> bool:
        """True when the whole interval is on the bad side of the limit, but for rounding."""
        low, high = interval
        if self.better == "higher":
            return high < limit * (1 + 1e-9)
        return low > limit * (1 - 1e-9)

    def severity(self, value: float | None, limit: float) -> tuple[float, float]:
        """To sort by: how many times as bad as its limit, then how bad; without a figure worst.

        Of shares, what is left of the whole is compared, so that 0.9 beside 0.5 is 5 times.
        """
        if value is None:
            return math.inf, math.inf
        if math.isinf(limit):
            return 0.0, self.badness(value)
        good, bad = limit, value
        if self.better == "higher":
            good, bad = value, limit
        if self.unit == "share":
            good, bad = 1 - bad, 1 - good
        return bad / max(good, 1e-9), self.badness(value)


_ROWS = (
    Metric(
        name="slowdown",
        of="ranks",
        value="slowdown",
        interval="interval",
        sentence="{slowest_is} {value}x slower than {their} peers in {subject}{limit}: "
        "{most} against {others} a rank{over}",
        at_best="{group}no rank is slower in {subject}{over}{limit}",
    ),
    Metric(
        name="imbalance_factor",
        of="ranks",
        value="factor",
        interval="factor_interval",
        sentence="{group}the imbalance factor of {subject} is {value}{limit}: {slowest} has "
        "{most}, the mean is {mean}{over}{longer}",
    ),
    Metric(
        name="lost_share",
        of="ranks",
        value="lost_share",
        interval="lost_share_interval",
        sentence="{group}{value} of the time in {subject} is lost to imbalance{limit}: "
        "{lost}{over}{longer}",
        unit="share",
        best=0.0,
        needs_p=False,  # it is lost to whoever is slowest in a step, whichever ranks are swapped
    ),
)
METRICS: Mapping[str, Metric] = {row.name: row for row in _ROWS}


def metrics_of(kind: Kind) -> tuple[Metric, ...]:
    """The metrics of one kind of finding, in the order in which they are shown."""
    return tuple(row for row in METRICS.values() if row.of == kind)
