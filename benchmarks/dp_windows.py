"""Planted windows of DP attention (`standin.dp_model`) as kernel tables, without files."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pandas as pd

from pytest_sglprof._server.sizes import pass_settings
from pytest_sglprof._trace.passes import DRAFTS, STAGES
from pytest_sglprof._trace.table import (
    COLUMNS,
    TEXT_COLUMNS,
    KernelTable,
    expert_frame,
)
from pytest_sglprof.standin import laws
from pytest_sglprof.standin.dp_model import DpWindow
from pytest_sglprof.standin.dp_traces import server_info

NAMES = {
    "attention": "mla_decode_kernel",
    "gemm": "nvjet_gemm",
    "norm": "rms_norm_kernel",
    "quantization": "quant_kernel",
    "moe": "fused_moe_kernel",
    "sampling": "sampling_kernel",
}


def keys_of(window: DpWindow) -> npt.NDArray[np.int64]:
    """The number of each pass, shape (passes, ranks)."""
    keys: npt.NDArray[np.int64] = window.forward_id + np.where(window.is_draft, DRAFTS, 0)
    return keys


def table_of(
    window: DpWindow, *, has_settings: bool = True, with_counts: bool = False
) -> KernelTable:
    """One kernel a category, pass and rank, one after the other from the start of the pass."""
    ranks = window.plan.ranks
    labels = tuple(f"DP{rank} TP{rank}" for rank in range(ranks))
    ns = np.rint(1000 * window.times).astype(np.int64)
    begin = window.start[..., None] + np.cumsum(ns, axis=2) - ns
    keys = keys_of(window)
    at, rank, category = (axis.ravel() for axis in np.indices(ns.shape))
    kept = window.recorded[at, rank] & (ns.ravel() > 0)
    at, rank, category = at[kept], rank[kept], category[kept]
    names = [NAMES[name] for name in laws.CATEGORIES]
    frame = pd.DataFrame(
        {
            "rank": pd.Categorical.from_codes(rank, list(labels), ordered=True),
            "name": pd.Categorical.from_codes(category, names),
            "full_name": pd.Categorical.from_codes(category, names),
            "category": pd.Categorical.from_codes(category, list(laws.CATEGORIES)),
            "kind": pd.Categorical.from_codes(np.zeros(len(at), int), ["kernel"]),
            "stage": pd.Categorical.from_codes(np.zeros(len(at), int), ["decode"]),
            "step": keys[at, rank],
            "stream": np.full(len(at), 7),
            "start_ns": begin.ravel()[kept],
            "dur_ns": ns.ravel()[kept],
        },
        columns=list(COLUMNS),
    )
    assert set(TEXT_COLUMNS) <= set(frame)
    return KernelTable(
        frame,
        labels,
        _steps(window, labels, keys),
        settings=pass_settings(server_info(window)) if has_settings else None,
        experts=_experts(window, labels, keys) if with_counts else expert_frame(()),
    )


def _steps(window: DpWindow, labels: tuple[str, ...], keys: np.ndarray) -> pd.DataFrame:
    at, rank = np.nonzero(window.recorded)
    kind = window.kind[at, rank]
    stage = [STAGES.get(str(word), "decode") for word in kind]
    values = {
        "rank": pd.Categorical.from_codes(rank, list(labels), ordered=True),
        "step": keys[at, rank],
        "stage": pd.Categorical(stage),
        "start_ns": window.start[at, rank],
        "end_ns": window.end[at, rank],
        "batch_size": window.batch[at, rank],
        "tokens": window.tokens[at, rank],
        "forward_id": window.forward_id[at, rank],
        "substage": pd.Categorical([str(word) for word in kind]),
        "padded_batch": np.full(len(at), -1),
        "kv_tokens": window.kv[at, rank],
        "graph_share": window.is_graph[at].astype(float),
        "accept_length": np.full(len(at), -1.0),
        "excluded": pd.Categorical([""] * len(at)),
        "query_keys": window.qk[at, rank],
    }
    return pd.DataFrame(values)


def _experts(window: DpWindow, labels: tuple[str, ...], keys: np.ndarray) -> pd.DataFrame:
    """As a recorder by pass counts them: `rank, step, layer, expert, tokens`."""
    at, layer, expert = (axis.ravel() for axis in np.indices(window.counts.shape))
    rank = window.rank_of_expert[expert]
    return pd.DataFrame(
        {
            "rank": pd.Categorical.from_codes(rank, list(labels), ordered=True),
            "step": keys[at, rank],
            "layer": layer,
            "expert": expert,
            "tokens": window.counts.ravel(),
        }
    )
