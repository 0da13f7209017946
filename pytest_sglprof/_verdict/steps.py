"""What a step is made of, in words: the sentences of `idle_share` and `pass_wall`, and a table."""

from __future__ import annotations

from pytest_sglprof._analysis.budget import RankBudget, StepBudget
from pytest_sglprof._config.model import Threshold
from pytest_sglprof._metrics import METRICS
from pytest_sglprof._verdict.wording import (
    beside_limit,
    count,
    duration,
    milliseconds,
    percent,
    text_table,
)

SHOWN_PART = 0.01  # of a wall


def facts_of_steps(budget: StepBudget, threshold: Threshold, value: float) -> dict[str, str]:
    """The fields that the sentence of a metric of `steps` can use.

    value, limit: `31.00 %`, ` (limit 20.00 %)`. a_step: `a decode step`. idlest: the rank whose
    GPU idles most; idle: `: 22 % while kernels are launched, 9 % between steps`. longest: the rank
    with the longest steps; parts: `60 % compute, 25 % transfer, …`, those of 1 % or more. over:
    ` over 50 steps` of that rank.
    """
    shown, limit = beside_limit(METRICS[threshold.metric], value, threshold.limit)
    what = f"{threshold.stage} {budget.unit}".strip()
    article = "the" if not budget.has_steps else "an" if what[0] in "aeiou" else "a"
    is_idle = threshold.metric == "idle_share"
    rank = budget.figure(budget.idle_rank if is_idle else budget.wall_rank)
    known = [] if rank is None else parts_of(rank, budget.unit)
    texts = {word: f"{percent(share)} {word}" for word, share in known}
    steps = None if rank is None else rank.steps
    over = "" if steps is None else f" over {count(steps, budget.unit)}"
    return {
        "value": shown,
        "limit": limit,
        "a_step": f"{article} {what}",
        "idlest": budget.idle_rank or "no rank",
        "idle": f": {', '.join(list(texts.values())[-2:])}," if steps is not None else "",
        "longest": budget.wall_rank or "no rank",
        "parts": ", ".join(texts[word] for word, share in known if share >= SHOWN_PART),
        "over": over,
    }


def parts_of(rank: RankBudget, unit: str = "step") -> list[tuple[str, float]]:
    """The parts of a rank's wall in words, each with its share, 0 to 1; none is left out."""
    split, waiting = rank.transfer_ns or 0, rank.waiting_ns or 0
    rest = "communication" if rank.transfer_ns is None else "other communication"
    parts = [
        ("compute", rank.compute_ns),
        ("transfer", split),
        ("waiting", waiting),
        (rest, rank.communication_ns - split - waiting),
        ("copies", rank.copies_ns),
        ("while kernels are launched", rank.launching_ns),
        (f"between {unit}s", rank.between_ns),
    ]
    if rank.launching_ns is None:
        parts[5:] = [("idle", rank.idle_ns)]
    return [(word, (ns or 0) / max(1, rank.wall_ns)) for word, ns in parts]


def budget_table(budget: StepBudget) -> list[str]:
    """Lines: a title, and a row for each rank with the parts of a mean step, ms; or nothing.

    Without steps the parts are those of the window.
    """
    if not budget.ranks:
        return []
    unit = " ".join(filter(None, (budget.stage, budget.substage, budget.unit)))
    shares = {rank.rank: dict(parts_of(rank, budget.unit)) for rank in budget.ranks}
    words = dict.fromkeys(word for of_rank in shares.values() for word in of_rank)
    # What no rank has is left out.
    shown = [word for word in words if any(of_rank.get(word) for of_rank in shares.values())]
    titles = {"while kernels are launched": "launching", f"between {budget.unit}s": "between"}
    head = ["rank", f"{budget.unit}s", "wall ms", *(titles.get(word, word) for word in shown)]
    rows = []
    for rank in budget.ranks:
        steps = rank.steps or 1
        wall = rank.wall_ns / steps
        cells = [milliseconds(shares[rank.rank].get(word, 0.0) * wall) for word in shown]
        rows.append([rank.rank, f"{steps:,}", milliseconds(wall), *cells])
    what = f"a mean {unit}" if budget.has_steps else "the window"
    lines = [f"what {what} is made of, ms", *text_table(head, rows)]
    return [*lines, *_accepted_lines(budget)]


def _accepted_lines(budget: StepBudget) -> list[str]:
    known = [rank for rank in budget.ranks if rank.ns_per_accepted is not None]
    if not known:
        return []
    slowest = max(known, key=lambda rank: rank.ns_per_accepted or 0.0)
    per_step = (slowest.accepted or 0.0) / (slowest.steps or 1)
    return [
        f"{slowest.rank}: {duration(slowest.ns_per_accepted or 0.0)} an accepted token of a "
        f"request, {per_step:.2f} of which each iteration has"
    ]
