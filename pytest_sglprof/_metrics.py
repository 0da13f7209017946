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
MEASURED: Literal["measured"] = "measured"  # shown instead of "pass" where there was no limit


def worst_word(words: Container[str | None]) -> VerdictWord | None:
    """The word that decides among several; None if there are none."""
    return next((word for word in WORST_FIRST if word in words), None)


MIN_STEPS = 50  # default number of compared steps that a verdict needs
PASS_MARGIN = 1.5  # of what a limit allows: a figure that passes is surely below that
MIN_SHARE = 0.01  # default share of compute below which a kernel cannot fail

Interval = tuple[float, float]
Kind = Literal["ranks", "steps", "lives", "load"]


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
    "ms": Unit(1.0, " ms", 1, example="20 allows 20 ms"),
    "tokens/s": Unit(1.0, " tokens/s", 0, example="1500 asks for 1,500 tokens/s"),
    "requests/s": Unit(1.0, " requests/s", 2, example="2.5 asks for 2.5 requests/s"),
    "tokens": Unit(1.0, " tokens", 2, example="2.8 asks for 2.8 tokens"),
}


class Metric(NamedTuple):
    """One metric. name: in TOML, markers, on the command line and in results.

    of: the kind of finding that has it ("ranks": `ImbalanceFinding`; "steps": `StepBudget`;
    "lives": `LifeChange`; "load": `LoadFigure`). The first two are of one window; the others are
    of server lives, see `_verdict.regression`.
    value, interval: the attributes of that finding with the figure and what it may be. estimate:
    how both are found, a key of `ESTIMATES` in `_analysis.imbalance` or `_analysis.budget`.
    sentence: the reason of a verdict, with the fields of `_verdict.reasons.facts`; at_best: the
    sentence for a figure that is written like `best`, "" for the same one. unit: a key of `UNITS`.
    best: the best possible figure; a limit beyond it is refused.
    across: "sync" if it is of ranks that wait for each other, whatever their input.
    """

    name: str
    of: Kind
    value: str
    interval: str
    estimate: str
    sentence: str
    at_best: str = ""
    unit: str = "ratio"
    better: Literal["lower", "higher"] = "lower"
    best: float = 1.0
    across: Literal["", "sync"] = ""

    @property
    def is_of_whole_steps(self) -> bool:
        """Whether it has a stage, but neither scope nor kernel."""
        return self.of == "steps" or bool(self.across)

    @property
    def is_of_lives(self) -> bool:
        """Whether it is judged at the end of a test, with all that its server lives left."""
        return self.of in ("lives", "load")

    @property
    def label(self) -> str:
        """`imbalance factor`."""
        return self.name.replace("_", " ")

    def read(self, finding: object) -> Any:
        """The figure of a finding, a float; None if it has none."""
        return attrgetter(self.value)(finding)

    def read_interval(self, finding: object) -> Any:
        """What the figure may be, (low, high); None if that is not known."""
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

    def pass_bound(self, limit: float) -> float:
        """What a figure that passes is surely not beyond: 1.5 times what the limit allows."""
        return self.best + PASS_MARGIN * (limit - self.best)

    def is_surely_within(self, interval: Interval, limit: float) -> bool:
        """True if the whole interval is on the good side of the pass bound, with rounding."""
        low, high = interval
        bound = self.pass_bound(limit)
        rounding = 1e-9 * (1 + abs(bound))
        return low > bound - rounding if self.better == "higher" else high < bound + rounding

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
        estimate="typical_ratio",
        sentence="{slowest_is} {value}x slower than {peers} in {subject}{limit}: "
        "{most} against {others}{over}",
        at_best="{group}no rank is slower in {subject} ({value}{within}){over}",
    ),
    Metric(
        name="imbalance_factor",
        of="ranks",
        value="factor",
        interval="factor_interval",
        estimate="share_of_mean",
        sentence="{group}the imbalance factor of {subject} is {value}{limit}: {heaviest} has "
        "{largest}, the mean is {mean}{over}{longer}",
        at_best="{group}no rank takes longer than the mean in {subject} ({value}{within}){over}",
    ),
    Metric(
        name="lost_share",
        of="ranks",
        value="judged_lost_share",
        interval="lost_share_interval",
        estimate="lost_share",
        sentence="{group}{value} of the time in {subject} is lost to imbalance{limit}: "
        "{lost}{over}, of which {noise} is what noise alone loses{longer}",
        at_best="{group}no time in {subject} is lost to imbalance ({value}{within}){over}",
        unit="share",
        best=0.0,
    ),
    Metric(
        name="spike_share",
        of="ranks",
        value="spike_share",
        interval="spike_interval",
        estimate="spike_shares",
        sentence="{group}{spiky} loses {value} of the time in {subject} in spikes{limit}: it has "
        "{spikes} above 1.3 times its usual{over}",
        at_best="{group}no rank has a spike in {subject} ({value}{within}){over}",
        unit="share",
        best=0.0,
    ),
    Metric(
        name="sync_lost_share",
        of="ranks",
        value="sync_lost_share",
        interval="sync_lost_interval",
        estimate="lost_of_wall",
        sentence="{group}{value} of the time of all GPUs is lost by waiting for each other"
        "{limit}{over}",
        unit="share",
        best=0.0,
        across="sync",
    ),
    Metric(
        name="idle_share",
        of="steps",
        value="idle_share",
        interval="idle_interval",
        estimate="idle_of_wall",
        sentence="{idlest}'s GPU is idle for {value} of {a_step}{limit}{idle}{over}",
        unit="share",
        best=0.0,
    ),
    Metric(
        name="pass_wall",
        of="steps",
        value="pass_wall",
        interval="wall_interval",
        estimate="mean_wall",
        sentence="{a_step} takes {value} on {longest}{limit}: {parts}{over}",
        unit="ms",
        best=0.0,
    ),
)
LATENCIES = {  # of the load driver -> what its figures are of
    "ttft": "the time to the first token",
    "tpot": "the time per output token",
    "itl": "the time between tokens",
}
STATISTICS = ("mean", "median", "p90", "p95", "p99")
_RATES = {  # name -> what it is, unit
    "output_throughput": ("the output throughput", "tokens/s"),
    "goodput": ("the goodput", "requests/s"),
    "accept_length": ("the accept length", "tokens"),
}
_LOAD_SENTENCE = "{subject} is {value}{limit}{over}"
_OF_LIVES = (
    Metric(
        name="regression",
        of="lives",
        value="ratio",
        interval="interval",
        estimate="log_ratio",
        sentence="{subject} is {value}x as {much} as in the accepted lives{limit}: "
        "{before} → {now}{over}",
        at_best="{subject} is as {much} as in the accepted lives ({value}{within}): "
        "{before} → {now}{over}",
    ),
    *(
        Metric(
            name=f"{latency}_{statistic}",
            of="load",
            value="value",
            interval="interval",
            estimate="mean_of_lives",
            sentence=_LOAD_SENTENCE,
            unit="ms",
            best=0.0,
        )
        for latency in LATENCIES
        for statistic in STATISTICS
    ),
    *(
        Metric(
            name=name,
            of="load",
            value="value",
            interval="interval",
            estimate="mean_of_lives",
            sentence=_LOAD_SENTENCE,
            unit=unit,
            better="higher",
            best=math.inf,
        )
        for name, (_, unit) in _RATES.items()
    ),
)
METRICS: Mapping[str, Metric] = {row.name: row for row in (*_ROWS, *_OF_LIVES)}
OF_STEPS = ("pass_wall", "idle_share")  # figures of whole steps, which `regression` can be of
LOAD_WORDS: Mapping[str, str] = {  # figure of the load driver -> `the p99 of the time to …`
    **{
        f"{latency}_{statistic}": f"the {statistic} of {words}"
        for latency, words in LATENCIES.items()
        for statistic in STATISTICS
    },
    **{name: words for name, (words, _) in _RATES.items()},
}
LIFE_FIGURES = (*OF_STEPS, *LOAD_WORDS)  # scopes that only `regression` has


def metrics_of(kind: Kind) -> tuple[Metric, ...]:
    """The metrics of one kind of finding, in the order in which they are shown."""
    return tuple(row for row in METRICS.values() if row.of == kind)
