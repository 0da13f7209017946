"""The metrics that can be judged: one row each, data only, so that every room can read it.

Thresholds, marker keywords, the command line, the judge and its sentences, the terminal, the
page, both schemas and the table of docs/metrics.md follow from `METRICS`. A new metric needs a
row here, an attribute of its finding, and a row in docs/metrics.md. A figure that follows from
stored ones is a property of the finding; a new stored field has the default None, so that older
results can still be read. This module is loaded in every pytest run, so it imports nothing heavy.
"""

from __future__ import annotations

import math
from collections.abc import Container, Mapping
from operator import attrgetter
from typing import Any, Literal, NamedTuple

VerdictWord = Literal["pass", "fail", "inconclusive"]
WORST_FIRST: tuple[VerdictWord, ...] = ("fail", "inconclusive", "pass")


def worst_word(words: Container[str | None]) -> VerdictWord | None:
    """The word that decides among several; None if there are none."""
    return next((word for word in WORST_FIRST if word in words), None)


MIN_STEPS = 30  # default number of compared steps that a verdict needs
MIN_SHARE = 0.01  # default share of compute below which a kernel cannot fail

Interval = tuple[float, float]
Kind = Literal["ranks"]


class Unit(NamedTuple):
    """How a figure is written: multiplied by `scale`, with `digits` decimals and `suffix`.

    top: upper bound of the figure, exclusive. example: of a limit, for help texts.
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

    of: the kind of finding that has it ("ranks": `ImbalanceFinding`). value, interval: the
    attributes of that finding with the figure and its 95 % interval; also the names of the
    fields in results.json. sentence: the reason of a verdict, with the fields of
    `_verdict.judge.facts`; at_best: the sentence for a figure equal to `best`, "" for the same
    one. unit: a key of `UNITS`. best: the best possible figure; a limit beyond it is refused.
    needs_p: whether a failure needs a small p as well as an interval beyond the limit.
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
        """The figure of a finding, a float; None if it has none."""
        return attrgetter(self.value)(finding)

    def read_interval(self, finding: object) -> Any:
        """The 95 % interval of the figure, (low, high); None if there is none."""
        return attrgetter(self.interval)(finding)

    def format(self, value: float | None, *, finer: int = 0, none: str = "-") -> str:
        """`1.39`, `8.2 %`, with `finer` more digits; `none` for None."""
        unit = UNITS[self.unit]
        if value is None:
            return none
        return f"{value * unit.scale:.{unit.digits + finer}f}{unit.suffix}"

    @property
    def bounds(self) -> str:
        """The allowed limits, as text: `≥ 1.0`."""
        top = UNITS[self.unit].top
        if self.better == "higher":
            return "> 0" if math.isinf(self.best) else f"> 0 and ≤ {self.best:.1f}"
        return f"≥ {self.best:.1f}" if math.isinf(top) else f"≥ {self.best:.1f} and < {top:.1f}"

    def allows(self, limit: float) -> bool:
        """True if figures can be on either side of the limit."""
        if self.better == "higher":
            return 0 < limit <= self.best and math.isfinite(limit)
        return self.best <= limit < UNITS[self.unit].top

    def badness(self, value: float) -> float:
        """The figure, negated if higher is better, so that a larger number is always worse."""
        return -value if self.better == "higher" else value

    def is_beyond(self, value: float, limit: float) -> bool:
        """True for a figure on the bad side of the limit. Nothing is beyond an infinite limit."""
        return not math.isinf(limit) and self.badness(value) > self.badness(limit)

    def is_surely_beyond(self, interval: Interval, limit: float) -> bool:
        """True if the whole interval is on the bad side of the limit, give or take rounding."""
        low, high = interval
        if self.better == "higher":
            return high < limit * (1 + 1e-9)
        return low > limit * (1 - 1e-9)

    def severity(self, value: float | None, limit: float) -> tuple[float, float]:
        """Sort key: how many times as bad as the limit, then how bad. No figure is worst.

        Shares are compared by what they leave of the whole: 0.9 against 0.5 is 5 times as bad.
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
        "{most} against {others}{over}",
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
        needs_p=False,  # swapping ranks within a step does not change it
    ),
)
METRICS: Mapping[str, Metric] = {row.name: row for row in _ROWS}


def metrics_of(kind: Kind) -> tuple[Metric, ...]:
    """The metrics of one kind of finding, in the order in which they are shown."""
    return tuple(row for row in METRICS.values() if row.of == kind)
