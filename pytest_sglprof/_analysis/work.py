"""What each rank had to do in each step, and whether that explains that one took longer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import pandas as pd

from pytest_sglprof._analysis.busy import Ints, Mask

Floats = npt.NDArray[np.float64]
WorkWord = Literal["more_work", "same_work"]
Measure = Literal["tokens", "requests", "padded batch", "KV tokens"]

# What explains at least half of a difference is its cause.
EXPLAINED_SHARE = 0.5
# KV lengths that lie further apart are another bucket.
KV_BUCKET = 2.0
UNKNOWN = -1


@dataclass(frozen=True)
class Work:
    """The input of one rank beside that of its peers.

    word: "more_work" where it explains at least half of how much longer the rank took,
    "same_work" where it does not, None where no source tells it. ratio: of the rank's input /
    the median of the others', None where not known. by: in what the input was counted.
    """

    word: WorkWord | None = None
    ratio: float | None = None
    by: Measure | None = None


UNKNOWN_WORK = Work()


@dataclass(frozen=True)
class StepInputs:
    """The input of each rank in each step, shape (steps, ranks); -1 where it is not told.

    batch_size: requests. tokens: new ones. padded_batch: requests that a graph was replayed
    for; where it is not told, batch_size. kv_tokens: of the KV cache. output_tokens: of the
    step on all ranks together, shape (steps,); 0 where a step makes none, NaN where not told.
    """

    batch_size: Ints
    tokens: Ints
    padded_batch: Ints
    kv_tokens: Ints
    output_tokens: Floats

    @property
    def other(self) -> Mask:
        """Steps in which ranks had other input, or ran another graph, shape (steps,)."""
        exact = (self.batch_size, self.tokens, self.padded_batch)
        found: Mask = np.any([_spread(values) > 1.0 for values in exact], axis=0)
        return found | (_spread(self.kv_tokens) >= KV_BUCKET)


def step_inputs(steps: pd.DataFrame, numbers: Sequence[int], ranks: Sequence[str]) -> StepInputs:
    """The inputs of `ranks` in the steps `numbers`. steps: as `KernelTable.steps`."""
    steps = steps[steps["rank"].isin(list(ranks)) & steps["step"].isin(list(numbers))]
    wide = {
        name: _wide(steps, name, numbers, ranks)
        for name in ("batch_size", "tokens", "padded_batch", "kv_tokens", "accept_length")
    }
    batch = wide["batch_size"].astype(np.int64)
    padded = wide["padded_batch"].astype(np.int64)
    return StepInputs(
        batch_size=batch,
        tokens=wide["tokens"].astype(np.int64),
        padded_batch=np.where(padded < 0, batch, padded),
        kv_tokens=wide["kv_tokens"].astype(np.int64),
        output_tokens=_output_tokens(steps, numbers, batch, wide["accept_length"]),
    )


def compare_work(
    inputs: StepInputs, steps: Mask, rank: int, slowdown: float | None, *, attention: bool = False
) -> Work:
    """Whether `rank` had more to do than its peers in the chosen steps.

    slowdown: how many times as long as they it took. attention: whether the figure is about
    attention only, which also grows with the KV cache that it looks back on.
    """
    known: list[Work] = []
    measures: list[tuple[Measure, Ints]] = [("tokens", inputs.tokens)]
    if (inputs.tokens[steps] < 0).any():
        measures = [("requests", inputs.batch_size)]
    measures.append(("padded batch", inputs.padded_batch))
    if attention:
        measures.append(("KV tokens", inputs.kv_tokens))
    for by, values in measures:
        ratio = _ratio(values[steps], rank)
        if ratio is not None:
            known.append(Work(_word(ratio, slowdown), ratio, by))
    more = [work for work in known if work.word == "more_work"]
    other = [work for work in known if work.ratio != 1.0]
    return next(iter([*more, *other, *known]), UNKNOWN_WORK)


def _word(ratio: float, slowdown: float | None) -> WorkWord | None:
    if slowdown is None:
        return None
    explains = ratio > 1.0 and ratio - 1.0 >= EXPLAINED_SHARE * (slowdown - 1.0)
    return "more_work" if explains else "same_work"


def _ratio(values: Ints, rank: int) -> float | None:
    """Of a rank's sum / the median of the others'; None where some value is not known."""
    if not values.size or values.shape[1] < 2 or (values < 0).any():
        return None
    sums = values.sum(axis=0)
    others = float(np.median(np.delete(sums, rank)))
    return float(sums[rank]) / others if others > 0 else None


def _spread(values: Ints) -> Floats:
    """Largest / smallest over ranks, shape (steps,); 1 where some value is not known."""
    if not values.size:
        return np.ones(len(values))
    low, high = values.min(axis=1), values.max(axis=1)
    known = low >= 0
    # A rank without any beside one with some is as far apart as can be.
    return np.where(known & (high > low), high / np.maximum(low, 0.5), 1.0)


def _wide(
    steps: pd.DataFrame, name: str, numbers: Sequence[int], ranks: Sequence[str]
) -> npt.NDArray[np.float64]:
    full = np.full((len(numbers), len(ranks)), float(UNKNOWN))
    if name not in steps:
        return full
    row = pd.Index(list(numbers)).get_indexer(pd.Index(steps["step"]))
    column = pd.Index(list(ranks)).get_indexer(pd.Index(steps["rank"].astype(object)))
    mine = (row >= 0) & (column >= 0)
    full[row[mine], column[mine]] = steps[name].to_numpy(np.float64)[mine]
    return full


def _output_tokens(
    steps: pd.DataFrame, numbers: Sequence[int], batch: Ints, accepted: Floats
) -> Floats:
    """Requests x accept length (1 where it is not told) of decode steps; a draft makes none."""
    per_request = np.where(accepted > 0, accepted, 1.0)
    made = np.where(
        (batch >= 0).all(axis=1), (batch * per_request).max(axis=1, initial=0.0), np.nan
    )
    decoding = steps["stage"].astype(object) == "decode"
    if "substage" in steps:
        decoding &= ~steps["substage"].astype(str).str.startswith("DRAFT")
    found: Floats = np.where(np.isin(numbers, steps.loc[decoding, "step"]), made, 0.0)
    return found
