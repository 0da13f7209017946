"""What `benchmarks.truth` measures: the project's verdict on a matrix, an oracle, and mutants."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import NormalDist
from typing import Any
from unittest import mock

import numpy as np
import numpy.typing as npt

from benchmarks.truth_model import Batch, Cell, Floats, mean_deviation
from pytest_sglprof._analysis import certainty
from pytest_sglprof._analysis.certainty import ALPHA, MIN_EFFECTIVE, Estimate, look_alpha, pool
from pytest_sglprof._config.model import MOST_WINDOWS, Threshold
from pytest_sglprof._metrics import PASS_MARGIN
from pytest_sglprof._trace.read import build_table
from pytest_sglprof._trace.table import RankActivities, Step
from pytest_sglprof._verdict.judge import judge, word_of

Bools = npt.NDArray[np.bool_]
LEAST_STEPS = 30  # of the windows here; by default a verdict needs more


def decide(matrix: Floats, limit: float) -> tuple[str, int | None]:
    """The verdict on one window, shape (steps, ranks), and the index of its slowest rank."""
    estimate = certainty.typical_ratio(matrix)
    ends = estimate.ends() if estimate is not None else None
    if estimate is None or ends is None:
        return "inconclusive", None
    return word_of(_threshold(limit), estimate.value, ends), estimate.top


def decide_many(matrices: Sequence[Floats], limit: float) -> tuple[str, int | None, int]:
    """The verdict on windows of one life, looked at from the second on; how many it took."""
    estimates: list[Estimate] = []
    top = None
    for matrix in matrices:
        estimate = certainty.typical_ratio(matrix)
        if estimate is None:
            continue
        estimates.append(estimate)
        if len(estimates) < 2:
            continue
        alpha = look_alpha(len(estimates), MOST_WINDOWS)
        pooled = pool(estimates, alpha)
        top = pooled.top
        if pooled.effective < MIN_EFFECTIVE:
            continue
        ends = pooled.low(alpha), pooled.high(alpha)
        word = word_of(_threshold(limit), pooled.value, ends)
        if word != "inconclusive":
            return word, top, len(estimates)
    return "inconclusive", top, len(estimates)


def _threshold(limit: float) -> Threshold:
    return Threshold(metric="slowdown", limit=limit, scope="compute")


def oracle(cell: Cell, batch: Batch) -> tuple[Bools, Bools]:
    """Which windows fail and which pass by the z-test that knows the sd and correlation."""
    ranks = cell.ranks
    mean = batch.known - batch.known.mean(axis=1, keepdims=True)
    top = (batch.truth + mean * ranks / (ranks - 1)).max(axis=1)
    error = mean_deviation(cell) * np.sqrt(ranks / (ranks - 1))
    z = NormalDist().inv_cdf
    comparisons = 1 if ranks == 2 else ranks  # as `Estimate.comparisons`
    fails = top - z(1 - ALPHA / comparisons) * error > np.log(cell.limit)
    margin = np.log1p(PASS_MARGIN * (cell.limit - 1))
    passes = (top <= np.log(cell.limit)) & (top + z(1 - ALPHA) * error < margin) & ~fails
    return fails, passes


# Mutants: judges that are wrong on purpose.


def _plain_sums(times: Floats) -> Estimate:
    """Ratios of sums, as if steps were independent and normal."""
    steps, ranks = times.shape
    totals = times.sum(axis=0)
    others = np.array([np.median(np.delete(totals, rank)) for rank in range(ranks)])
    spread = times / times.mean(axis=1, keepdims=True)
    error = spread.std(axis=0, ddof=1) * np.sqrt(ranks / (ranks - 1) / steps)
    freedom = (float((ranks - 1) * (steps - 1)),) * ranks
    values = tuple(np.log(totals / others).tolist())
    return Estimate(values, tuple(error.tolist()), freedom, float(steps), steps, ranks, True)


def _every_cosine(steps: int, number: int) -> Floats:
    """With all of them the long-run variance is that of independent steps."""
    angle = np.pi * np.outer(np.arange(1, steps), np.arange(steps) + 0.5) / steps
    terms: Floats = np.sqrt(2 / steps) * np.cos(angle)
    return terms


def _low_of_each(estimate: Estimate, alpha: float = ALPHA) -> float:
    """The largest lower end, each at level `alpha` for its rank alone."""
    return _LOW(estimate, alpha * len(estimate.values))


_LOW = Estimate.low
MUTANTS: dict[str, tuple[tuple[Any, str, Callable[..., Any]], ...]] = {
    "independent steps": (
        (certainty, "correlation", lambda _: 0.0),
        (certainty, "_cosines", _every_cosine),
    ),
    "each rank alone": ((Estimate, "low", _low_of_each),),
    "plain sums": ((certainty, "typical_ratio", _plain_sums),),
}


@contextlib.contextmanager
def mutant(name: str) -> Iterator[None]:
    """The judge with one of its rules left out, a key of `MUTANTS`; "" for the judge itself."""
    with contextlib.ExitStack() as stack:
        for owner, attribute, replacement in MUTANTS[name] if name else ():
            stack.enter_context(mock.patch.object(owner, attribute, replacement))
        yield


# The whole judge, from a kernel table on.


def judged_table(matrix: Floats, limit: float) -> str:
    """The word of the verdict on a kernel table with the times of a matrix, ms."""
    ns = np.rint(np.asarray(matrix) * 1e6).astype(np.int64)
    count = len(ns)
    begin = np.concatenate(([0], np.cumsum(ns.max(axis=1) + 1_000_000)[:-1]))
    parts = []
    for rank, dur in enumerate(ns.T):
        steps = [
            Step(at, "decode", int(start), int(start + took), batch_size=8, forward_id=at)
            for at, (start, took) in enumerate(zip(begin, dur, strict=True))
        ]
        activities = RankActivities(
            rank=f"TP{rank}",
            names=["fused_moe_kernel"],
            name_codes=np.zeros(count, np.int64),
            kinds=["kernel"],
            kind_codes=np.zeros(count, np.int64),
            start=begin,
            dur=dur,
            stream=np.full(count, 7),
            step=np.arange(count),
            steps=steps,
        )
        parts.append((Path(f"TP-{rank}.json"), activities))
    return judge(build_table(parts), [_threshold(limit)], min_steps=LEAST_STEPS).word
