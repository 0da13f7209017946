"""Tables of ranks with requests of their own: passes by number, kernels that need equal time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np

from pytest_sglprof._server.sizes import PassSettings
from pytest_sglprof._trace.table import KernelTable, Step
from tests.support.kernel_tables import from_rows

KERNELS = (
    ("nvjet_qkv", "gemm", 300_000),
    ("rms_norm", "norm", 100_000),
    ("flash_decode", "attention", 200_000),
    ("fused_moe_kernel", "moe", 400_000),
    ("all_reduce", "communication", 50_000),
)
PASS_NS = 2_000_000
GATHER = PassSettings(regime="gather", capture_sizes=(8, 16), graphs=True, dp_attention=True)
REPLICAS = PassSettings(capture_sizes=(8, 16), graphs=True)
FOUR = ("DP0 TP0", "DP0 TP1", "DP1 TP2", "DP1 TP3")  # DP attention: two ranks share requests
TWO = ("DP0 TP0", "DP1 TP1")  # DP attention: nobody has a peer
APART = ("DP0", "DP1")  # plain data parallel
Scale = Callable[[str, str], float]


def decoding(
    ranks: Sequence[str] = FOUR,
    *,
    passes: int | Mapping[str, int] = 80,
    scale: Scale = lambda rank, category: 1.0,
    batch: Callable[[str, int], int] = lambda rank, number: 8,
    settings: PassSettings = GATHER,
    sd: float = 0.01,
    phi: float = 0.0,
    seed: int = 0,
    first: Mapping[str, int] | None = None,
) -> KernelTable:
    """A table of decode passes under graph replay.

    passes: of all ranks, or of each. scale(rank, category): multiplies times. batch(rank, number).
    first: number of the first pass of a rank, 0 if absent. sd, phi: of an autoregressive process by
    whose exponential all kernels of a rank's pass are multiplied.
    """
    random = np.random.default_rng(seed)
    rows, spans = [], []
    for rank in ranks:
        number_of = passes if isinstance(passes, int) else passes[rank]
        begin_at, noise = (first or {}).get(rank, 0), random.normal(0, sd)
        for number in range(begin_at, begin_at + number_of):
            begin = at = number * PASS_NS
            noise = phi * noise + np.sqrt(1 - phi**2) * random.normal(0, sd)
            for name, category, ns in KERNELS:
                dur = round(ns * scale(rank, category) * np.exp(noise))
                rows.append((rank, name, category, "decode", number, 7, at, dur))
                at += dur
            size = batch(rank, number)
            step = Step(number, "decode", begin, at, size, size, forward_id=number)
            spans.append((rank, step.changed(substage="DECODE", graph_share=1.0)))
    return replace(from_rows(rows, steps=spans, ranks=ranks), settings=settings)


def slower(slow_rank: str, factor: float, *categories: str) -> Scale:
    """A rank that is slower in some categories, in all without any."""

    def scale(rank: str, category: str) -> float:
        hit = rank == slow_rank and category != "communication"
        return factor if hit and (category in categories or not categories) else 1.0

    return scale
