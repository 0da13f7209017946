"""The input of each rank in each step, and whether it explains why a rank took longer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from pytest_sglprof._analysis.busy import Ints, Mask

if TYPE_CHECKING:
    import pandas as pd

Floats = npt.NDArray[np.float64]
WorkWord = Literal["more_work", "same_work"]
InputUnit = Literal["tokens", "requests", "padded batch", "KV tokens", "kernel calls"]

EXPLAINED_SHARE = 0.5  # of a difference: explaining that much of it counts as its cause
KV_BUCKET = 2.0  # KV lengths that differ by this factor or more count as other input
UNKNOWN = -1


@dataclass(frozen=True)
class Work:
    """The input of one rank beside that of its peers.

    word: "more_work" if it explains at least half of the extra time, "same_work" if it does
    not, None if the input is not known. ratio: the rank's input / the median of the others',
    None if not known. by: the unit in which the input was counted.
    """

    word: WorkWord | None = None
    ratio: float | None = None
    by: InputUnit | None = None


UNKNOWN_WORK = Work()


@dataclass(frozen=True)
class StepInputs:
    """The input of each rank in each step, shape (steps, ranks); -1 where it is not known.

    batch_size: requests. tokens: new tokens. padded_batch: batch size of the replayed graph;
    batch_size where it is not known. kv_tokens: tokens in the KV cache. output_tokens: tokens
    that all ranks together generate in the step, shape (steps,); NaN where not known.
    """

    batch_size: Ints
    tokens: Ints
    padded_batch: Ints
    kv_tokens: Ints
    output_tokens: Floats

    @property
    def other(self) -> Mask:
        """Mask of the steps in which ranks differ in input or graph, shape (steps,)."""
        exact = (self.batch_size, self.tokens, self.padded_batch)
        differs: Mask = np.any([_spread(values) > 1.0 for values in exact], axis=0)
        return differs | (_spread(self.kv_tokens) >= KV_BUCKET)


def step_inputs(steps: pd.DataFrame, numbers: Sequence[int], ranks: Sequence[str]) -> StepInputs:
    """The inputs of `ranks` in the steps `numbers`. steps: as `KernelTable.steps`."""
    steps = steps[steps["rank"].isin(list(ranks)) & steps["step"].isin(list(numbers))]
    steps = steps.drop_duplicates(["rank", "step"])  # of several rows of a pass the first
    wide = {
        name: step_matrix(steps, name, numbers, ranks)
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
    inputs: StepInputs,
    steps: Mask,
    rank: int,
    slowdown: float | None,
    *,
    calls: Ints,
    attention: bool = False,
) -> Work:
    """Compares the input of `rank` with that of its peers, over the chosen steps.

    rank: column of `inputs`. slowdown: its time / the median of the others', None if unknown.
    calls: number of kernels of each rank in these steps, shape (ranks,); ranks that run other
    numbers of them do not have the same work, whatever their input.
    attention: True if only attention is timed, whose time also grows with the KV cache.
    """
    known: list[Work] = []
    units: list[tuple[InputUnit, Ints]] = [("tokens", inputs.tokens)]
    if (inputs.tokens[steps] < 0).any():
        units = [("requests", inputs.batch_size)]
    units.append(("padded batch", inputs.padded_batch))
    if attention:
        units.append(("KV tokens", inputs.kv_tokens))
    for by, values in units:
        ratio = _ratio(values[steps], rank)
        if ratio is not None:
            known.append(Work(_word(ratio, slowdown), ratio, by))
    ratio = _ratio(calls[np.newaxis], rank)
    if ratio is not None and ratio != 1.0:
        known.append(Work(_word(ratio, slowdown), ratio, "kernel calls"))
    more = [work for work in known if work.word == "more_work"]
    other = [work for work in known if work.ratio != 1.0]
    return next(iter([*more, *other, *known]), UNKNOWN_WORK)


def _word(ratio: float, slowdown: float | None) -> WorkWord | None:
    if slowdown is None:
        return None
    explains = ratio > 1.0 and ratio - 1.0 >= EXPLAINED_SHARE * (slowdown - 1.0)
    return "more_work" if explains else "same_work"


def _ratio(values: Ints, rank: int) -> float | None:
    """A rank's sum / the median of the others'; None if any value is not known."""
    if not values.size or values.shape[1] < 2 or (values < 0).any():
        return None
    sums = values.sum(axis=0)
    others = float(np.median(np.delete(sums, rank)))
    return float(sums[rank]) / others if others > 0 else None


def _spread(values: Ints) -> Floats:
    """Largest / smallest value over the ranks, shape (steps,); 1 where any is not known."""
    if not values.size:
        return np.ones(len(values))
    low, high = values.min(axis=1), values.max(axis=1)
    known = low >= 0
    # 0.5 instead of 0: a rank without input differs from one with any.
    return np.where(known & (high > low), high / np.maximum(low, 0.5), 1.0)


def step_matrix(
    steps: pd.DataFrame, name: str, numbers: Sequence[int], ranks: Sequence[str]
) -> npt.NDArray[np.float64]:
    """A column of the steps, shape (steps, ranks); -1 where there is none."""
    full = np.full((len(numbers), len(ranks)), float(UNKNOWN))
    if name not in steps:
        return full
    row, column, inside = matrix_places(numbers, ranks, steps["step"], steps["rank"])
    full[row, column] = steps[name].to_numpy(np.float64)[inside]
    return full


def matrix_places(
    numbers: Sequence[int] | Ints,
    ranks: Sequence[str],
    step: pd.Series | Ints,
    rank: pd.Series | pd.Categorical[Any],
) -> tuple[Ints, Ints, Mask]:
    """Where in a matrix of shape (numbers, ranks) rows with a step and a rank have their place.

    Returns row and column of those that have one, and the mask of these.
    """
    import pandas as pd

    labels = pd.Categorical(rank)
    by_code = pd.Index(list(ranks)).get_indexer(labels.categories.astype(object))
    column = np.append(by_code, -1)[labels.codes]  # the code of no label is -1
    row = pd.Index(np.asarray(numbers, np.int64)).get_indexer(pd.Index(step))
    inside = (row >= 0) & (column >= 0)
    return row[inside], column[inside], inside


def _output_tokens(
    steps: pd.DataFrame, numbers: Sequence[int], batch: Ints, accepted: Floats
) -> Floats:
    """Requests x accept length (1 if not known) of decode steps; 0 for others and for drafts."""
    per_request = np.where(accepted > 0, accepted, 1.0)
    made = np.where(
        (batch >= 0).all(axis=1), (batch * per_request).max(axis=1, initial=0.0), np.nan
    )
    decoding = steps["stage"].astype(object) == "decode"
    if "substage" in steps:
        decoding &= ~steps["substage"].astype(str).str.startswith("DRAFT")
    tokens: Floats = np.where(np.isin(numbers, steps.loc[decoding, "step"]), made, 0.0)
    return tokens
