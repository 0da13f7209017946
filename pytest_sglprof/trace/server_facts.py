"""Joins what the server's log told of a window to the steps of its kernel table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pandas as pd

from pytest_sglprof.ranks import Rank
from pytest_sglprof.trace.table import KernelTable
from pytest_sglprof.values import AcceptLength, ServerFacts

REBALANCE = "eplb rebalance"
GRAPH_SHARE = 0.5  # of a step's kernels; a replayed decode step has a few launched by hand
_UNIX_NS = 10**18  # September 2001; clocks that count from a start are far below


def with_server_facts(table: KernelTable, facts: ServerFacts) -> KernelTable:
    """The table with steps inside a rebalance excluded, and accept lengths filled in.

    Both need steps on the Unix clock, as torch traces have them. On another clock nobody
    knows which steps a rebalance hit: then all of them are excluded.
    """
    if table.steps.empty or facts == ServerFacts():
        return table
    steps = table.steps.copy()
    if facts.graph_batches:
        steps["padded_batch"] = _padded(steps, facts.graph_batches)
    notes = list(table.notes)
    is_unix = bool((steps["start_ns"] > _UNIX_NS).all())
    if facts.rebalances:
        inside = _inside(steps, facts.rebalances) if is_unix else np.ones(len(steps), bool)
        if inside.any():
            marks = steps["excluded"].astype(object)
            steps["excluded"] = pd.Categorical(marks.mask(inside & (marks == ""), REBALANCE))
            count = steps.loc[inside, "step"].nunique()
            how = "" if is_unix else " (all: their clock is not that of the log)"
            notes.append(f"a rebalance of experts during the window: {count} steps{how} excluded")
    if facts.captures:
        notes.append("graphs were captured during the window, as the server's log says")
    if facts.accepted and is_unix:
        steps["accept_length"] = _accept_lengths(steps, facts.accepted)
    return replace(table, steps=steps, notes=tuple(notes))


def _padded(steps: pd.DataFrame, batches: Sequence[int]) -> np.ndarray:
    """The batch size of the graph that each step replayed; only of steps made of graph nodes."""
    known = np.array([*batches, -1], dtype=np.int64)
    size = steps["batch_size"].to_numpy()
    padded = steps["padded_batch"].to_numpy().copy()
    replayed = (steps["stage"] == "decode") & (steps["graph_share"] > GRAPH_SHARE)
    chosen = (padded < 0) & (size > 0) & replayed.to_numpy()
    padded[chosen] = known[np.searchsorted(known[:-1], size[chosen])]
    return padded


def _inside(steps: pd.DataFrame, spans: Sequence[tuple[float, float]]) -> np.ndarray:
    """Which steps overlap one of the spans (Unix time, s)."""
    start, end = steps["start_ns"].to_numpy() / 1e9, steps["end_ns"].to_numpy() / 1e9
    inside = np.zeros(len(steps), bool)
    for begins, ends in spans:
        inside |= (start < ends) & (end > begins)
    return inside


def _accept_lengths(steps: pd.DataFrame, accepted: Sequence[AcceptLength]) -> np.ndarray:
    """A line's figure is the mean since the line before: it holds for the steps between."""
    lengths = steps["accept_length"].to_numpy(float).copy()
    end = steps["end_ns"].to_numpy() / 1e9
    drafts = steps["substage"].astype(str).str.startswith("DRAFT")
    verifies = ((steps["stage"] == "decode") & ~drafts).to_numpy()
    labels = steps["rank"].astype(str)
    for label in labels.unique():
        rank = Rank.parse(label)
        mine = [a for a in accepted if a.dp is None or rank is None or rank.dp in (None, a.dp)]
        if not mine:
            continue
        rows = np.flatnonzero((labels == label).to_numpy() & verifies)
        mine.sort(key=lambda sample: sample.time)
        at = np.searchsorted([sample.time for sample in mine], end[rows])
        values = np.array([*(sample.length for sample in mine), -1.0])
        lengths[rows] = values[at]
    return lengths
