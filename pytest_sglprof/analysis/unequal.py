"""When load counts as unequal: the rule, the figures that it looks at, and the words for it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from pytest_sglprof.analysis.rank_board import RankLoad
from pytest_sglprof.values import LoadSample

Kind = Literal["running", "tokens", "queue", "starved", "experts", "dp_tokens"]
KINDS: tuple[Kind, ...] = ("starved", "running", "tokens", "queue")  # the telling first
CANNOT_KNOW = (
    "imbalance of load cannot be known here: this server has one DP rank, whose TP ranks run the "
    "same requests in the same batches, and only TP0 logs them. Compare the ranks' kernels "
    "(sglprof check), or switch on what tells more: with DP attention --enable-metrics and "
    "SGLANG_ENABLE_METRICS_DP_ATTENTION=1, with experts --expert-distribution-recorder-mode stat "
    "and --expert-balancedness-report-mode server_log"
)
NEARLY = 0.1  # of the mean: what a rank that is starved on average may have run
RELEASE = 0.6  # of the way from 1 to `factor`: below it an imbalance is over
SUSPECT, SUSPECT_GAP = 1.25, 2.0  # λ, and requests above the mean, that deserve a closer look


@dataclass(frozen=True)
class OnsetRule:
    """When load counts as unequal. Times in s.

    factor: λ = max / mean over the ranks from which on it is. hold: how long it must last,
    averaged; and how long it must be over to have ended. min_running: mean requests a rank
    below which nothing is declared: few requests cannot be spread evenly. min_gap:
    requests of the fullest rank above the mean; min_gap_usage: the same of tokens, as a
    share of the KV cache.
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
    """A moment at which something began. Times in Unix s. kind: a `Kind`, or of a trigger.

    time: when it began; known to `resolution_s` s, as its source allows. declared: when it
    had held for long enough. factor: λ (or the ratio that the trigger looks at), averaged
    from `time` to `declared`. lost_share: 1 - 1/λ, the share of the ranks' capacity that
    waits for the fullest. ranks: their loads at `declared`. group: pipeline stage, "".
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
    def lost_share(self) -> float:
        """0 to 1: what perfect balance would save of the running work."""
        return 1.0 - 1.0 / self.factor if self.factor > 1.0 else 0.0


def imbalance(values: Sequence[float]) -> float:
    """λ = max / mean; 1.0 where there is nothing."""
    total = math.fsum(values)
    return max(values) * len(values) / total if total > 0 else 1.0


def imbalances(loads: Sequence[RankLoad], rule: OnsetRule) -> dict[Kind, float]:
    """The kinds of imbalance that these loads show by `rule`, each with its λ."""
    running = [load.running for load in loads]
    if len(loads) < 2 or sum(running) / len(running) < rule.min_running:
        return {}
    factors: dict[Kind, float] = {}
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
    if (factor := _over([load.waiting for load in loads], rule.min_gap, rule.factor)) is not None:
        factors["queue"] = factor
    return factors


def seem_unequal(samples: Sequence[LoadSample]) -> bool:
    """Whether the ranks' requests at one moment are far enough apart to look closer."""
    figures = ([s.running for s in samples], [s.waiting for s in samples])
    return len(samples) > 1 and any(_over(f, SUSPECT_GAP, SUSPECT) is not None for f in figures)


def idle_ranks(loads: Sequence[RankLoad], share: float) -> list[str]:
    """Ranks that run and queue at most `share` of the mean number of running requests.

    One that holds tokens is not idle: it may be filling them in, a long prompt in chunks,
    while the server counts as running only what decodes.
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

    Of a starved rank the share of ranks that are idle: others may take its work or not.
    """
    if kind == "starved":
        return len(idle_ranks(loads, 0.0)) / len(loads)
    name = {"running": "running", "tokens": "tokens", "queue": "waiting"}[kind]
    values = [float(getattr(load, name) or 0.0) for load in loads]
    return max(values) - math.fsum(values) / len(values)


def average_factor(kind: Kind, averages: Sequence[RankLoad], rule: OnsetRule) -> float | None:
    """λ of one kind in loads that were averaged over time; None where the rule is not met."""
    if kind == "starved":
        idle = idle_ranks(averages, NEARLY)
        return imbalance([load.running for load in averages]) if idle else None
    return imbalances(averages, rule).get(kind)


def sentence(onset: Onset) -> str:
    """What began, in words and with its numbers; without the time, which views format."""
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
