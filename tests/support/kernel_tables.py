"""Small kernel tables whose figures are known by construction."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np
import pandas as pd

from pytest_sglprof._ranks import rank_order
from pytest_sglprof._trace.table import TEXT_COLUMNS, KernelTable, Step, step_frame

KERNELS = (
    ("fused_moe_kernel", "moe", 600_000),
    ("gemm_kernel", "gemm", 300_000),
    ("flash_attention", "attention", 200_000),
    ("all_reduce", "communication", 150_000),
    ("Memcpy HtoD", "memory", 50_000),
)
STEP_NS = 2_000_000


def build(
    ranks: Sequence[str] = ("TP0", "TP1"),
    *,
    steps: int = 50,
    scale: Callable[[str, str, int], float] = lambda rank, category, step: 1.0,
    stage: Callable[[int], str] = lambda step: "decode",
    kernels: Sequence[tuple[str, str, int]] = KERNELS,
    with_steps: bool = True,
    partial: bool = False,
    silent: Sequence[str] = (),
) -> KernelTable:
    """A table of `steps` steps; `scale(rank, category, step)` multiplies durations."""
    rows = []
    spans = []
    for rank in ranks:
        if rank in silent:
            continue
        for step in range(steps):
            start = step * STEP_NS
            spans.append((rank, step, stage(step), start, start + STEP_NS, 8, 8, step))
            at = start
            for name, category, ns in kernels:
                dur = round(ns * scale(rank, category, step))
                if dur:
                    kind = "memcpy" if category == "memory" else "kernel"
                    number = step if with_steps else -1
                    where = stage(step) if with_steps else "unknown"
                    rows.append((rank, name, f"void {name}<128>", category, kind, where, number))
                    rows[-1] += (7, at, dur)
                    at += dur
    return table_of(rows, spans if with_steps else [], ranks, partial=partial)


def table_of(
    rows: Sequence[tuple[object, ...]],
    spans: Sequence[tuple[object, ...]],
    ranks: Sequence[str],
    *,
    partial: bool = False,
) -> KernelTable:
    """A table of explicit rows and step spans, in the column order of the schema."""
    columns = ["rank", "name", "full_name", "category", "kind", "stage", "step"]
    frame = pd.DataFrame(rows, columns=[*columns, "stream", "start_ns", "dur_ns"])
    frame = frame.astype({"step": np.int64, "start_ns": np.int64, "dur_ns": np.int64})
    frame = frame.astype(dict.fromkeys(columns[:-1], "category"))
    names = ["rank", "step", "stage", "start_ns", "end_ns", "batch_size", "tokens", "forward_id"]
    step_frame = pd.DataFrame(spans, columns=names).astype({"step": np.int64})
    return KernelTable(frame, tuple(ranks), step_frame, partial=partial)


def slow(
    slow_rank: str, slow_category: str, factor: float, from_step: int = 0
) -> Callable[[str, str, int], float]:
    """A `scale` that makes one category of one rank slower."""

    def scale(rank: str, category: str, step: int) -> float:
        hit = rank == slow_rank and category == slow_category and step >= from_step
        return factor if hit else 1.0

    return scale


def from_rows(
    rows: Iterable[tuple[str, str, str, str, int, int, int, int]],
    *,
    steps: Iterable[tuple[str, Step]] = (),
    source: str = "gpu",
    ranks: Sequence[str] | None = None,
) -> KernelTable:
    """A table of explicit `(rank, name, category, stage, step, stream, start, dur)` rows."""
    listed = list(rows)
    labels = tuple(ranks) if ranks is not None else rank_order({row[0] for row in listed})
    columns = list(zip(*listed, strict=True)) or [()] * 8
    rank, name, category, stage, step, stream, start, dur = columns
    kind = ["memcpy" if text == "memory" else "kernel" for text in category]
    texts = dict(zip(TEXT_COLUMNS, (rank, name, name, category, kind, stage), strict=True))
    numbers = {"step": step, "stream": stream, "start_ns": start, "dur_ns": dur}
    frame = pd.DataFrame(
        {key: pd.Categorical(list(values)) for key, values in texts.items()}
        | {key: np.asarray(values, dtype=np.int64) for key, values in numbers.items()}
    )
    frame["rank"] = frame["rank"].cat.set_categories(list(labels), ordered=True)
    return KernelTable(frame, labels, step_frame(list(steps), labels), source)
