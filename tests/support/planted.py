"""Windows of many ranks whose fault is planted, so that the right answer is known.

Every step is a few layers; in each the ranks compute and then meet in a collective, which
ends everywhere a transfer after the last of them arrived. That is all of the truth: what
the table shows (waits, totals, starts) follows from it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import pandas as pd

from pytest_sglprof._analysis.busy import Activities, busy_times
from pytest_sglprof._analysis.groups import ComparedSteps, RankGroup
from pytest_sglprof._analysis.times import GroupCells
from pytest_sglprof._trace.table import KernelTable

Floats = npt.NDArray[np.float64]

KERNELS = (
    ("flash_attention", "attention", 50_000),
    ("gemm_kernel", "gemm", 100_000),
    ("fused_moe_kernel", "moe", 150_000),
)
COLLECTIVE = "ncclDevKernel_AllReduce_Sum_bf16_RING_LL"
P2P = "ncclDevKernel_SendRecv"
FULL_MHZ, LOW_MHZ = 1980, 1500  # compute takes longer in proportion


@dataclass(frozen=True)
class Plan:
    """One window. Times in ns; ranks by number.

    jitter: relative, of a rank's whole step. slow: (rank, category or "" for all) -> factor,
    from `slow_from` on. tokens: rank -> factor of its tokens and of its compute. late: rank ->
    idle before each layer. offset, drift: of a rank's clock, ns and relative. hot: factor of
    moe on one rank, another in each layer. overlap: ns by which a kernel starts before its
    predecessor ends. p2p_only: they do not meet: even ranks send to odd ones. all_to_all: they
    meet in an all-to-all, for which NCCL has the kernel of its transfers. early: rank -> ns by
    which its kernels are launched before that and wait for it, which counts in their durations.
    early_meeting: the same of its collectives. missing: (rank, step) without any activity.
    throttled: rank -> NVML's reasons for which its GPU runs at a lower clock in the second half
    (`recorded_clocks`).
    """

    ranks: int = 2
    steps: int = 100
    layers: int = 3
    jitter: float = 0.03
    seed: int = 0
    slow: Mapping[tuple[int, str], float] = field(default_factory=dict)
    slow_from: int = 0
    tokens: Mapping[int, float] = field(default_factory=dict)
    late: Mapping[int, int] = field(default_factory=dict)
    offset: Mapping[int, int] = field(default_factory=dict)
    drift: Mapping[int, float] = field(default_factory=dict)
    hot: float = 1.0
    overlap: int = 0
    early: Mapping[int, int] = field(default_factory=dict)
    early_meeting: Mapping[int, int] = field(default_factory=dict)
    transfer: int = 20_000
    p2p_only: bool = False
    all_to_all: bool = False
    missing: tuple[tuple[int, int], ...] = ()
    throttled: Mapping[int, int] = field(default_factory=dict)

    @property
    def labels(self) -> tuple[str, ...]:
        return tuple(f"TP{rank}" for rank in range(self.ranks))


def window(plan: Plan) -> KernelTable:
    """The kernel table of a plan."""
    compute = _durations(plan)  # (step, layer, rank, kernel)
    idle = np.full(plan.ranks, 2_000.0)
    for rank, ns in plan.late.items():
        idle[rank] += ns
    overlap = plan.overlap * (len(KERNELS) - 1)
    ready = compute.sum(axis=3) - overlap + idle
    length = ready.max(axis=2) + plan.transfer
    begin = (np.cumsum(length.ravel()) - length.ravel()).reshape(length.shape)
    ahead = np.cumsum(compute, axis=3) - compute - plan.overlap * np.arange(len(KERNELS))
    start = begin[:, :, None, None] + idle[:, None] + ahead
    arrival = begin[:, :, None] + ready
    for rank, ns in plan.early.items():
        start[:, :, rank, 1:] -= ns
        compute[:, :, rank, 1:] += ns
    # Ranks leave a collective within a few hundred ns of each other.
    leaving = np.random.default_rng(plan.seed + 1).normal(0, 200, arrival.shape)
    waiting = (begin + length)[:, :, None] + leaving - arrival
    if plan.p2p_only:  # a sender does not wait for the receiver
        waiting[:, :, ::2] = plan.transfer + leaving[:, :, ::2]
    for rank, ns in plan.early_meeting.items():
        arrival[:, :, rank] -= ns
        waiting[:, :, rank] += ns
    starts = np.concatenate((start, arrival[..., None]), axis=3)
    durs = np.concatenate((compute, waiting[..., None]), axis=3)
    return _table(plan, starts, durs, begin[:, 0], (begin + length)[:, -1])


def _durations(plan: Plan) -> Floats:
    rng = np.random.default_rng(plan.seed)
    base = np.array([ns for _, _, ns in KERNELS], float)
    shape = (plan.steps, plan.layers, plan.ranks, len(KERNELS))
    noise = 1 + rng.normal(0, plan.jitter, (plan.steps, 1, plan.ranks, 1))
    found: Floats = np.broadcast_to(base, shape) * noise
    for (rank, category), factor in plan.slow.items():
        chosen = [not category or category == of for _, of, _ in KERNELS]
        found[plan.slow_from :, :, rank, chosen] *= factor
    for rank in plan.throttled:
        found[plan.steps // 2 :, :, rank] *= FULL_MHZ / LOW_MHZ
    for rank, factor in plan.tokens.items():
        found[:, :, rank] *= factor
    for layer in range(plan.layers):
        found[:, layer, layer % plan.ranks, 2] *= plan.hot
    return found


def _table(plan: Plan, starts: Floats, durs: Floats, begin: Floats, end: Floats) -> KernelTable:
    meeting = P2P if plan.p2p_only or plan.all_to_all else COLLECTIVE
    names = [*(name for name, _, _ in KERNELS), meeting]
    categories = [*(category for _, category, _ in KERNELS), "communication"]
    step, _, rank, kernel = (axis.ravel() for axis in np.indices(starts.shape))
    rate = 1 + np.array([plan.drift.get(r, 0.0) for r in range(plan.ranks)])
    ahead = np.array([plan.offset.get(r, 0) for r in range(plan.ranks)])
    text = {
        "rank": pd.Categorical.from_codes(rank, list(plan.labels), ordered=True),
        "name": pd.Categorical.from_codes(kernel, names),
        "full_name": pd.Categorical.from_codes(kernel, names),
        "category": pd.Categorical.from_codes(kernel, categories),
        "kind": pd.Categorical.from_codes(np.zeros(len(step), int), ["kernel"]),
        "stage": pd.Categorical.from_codes(np.zeros(len(step), int), ["decode"]),
    }
    begun, ended = (
        np.rint(at.ravel() * rate[rank] + ahead[rank]).astype(np.int64)
        for at in (starts, starts + durs)
    )
    frame = pd.DataFrame(
        {
            **text,
            "step": step.astype(np.int64),
            "stream": np.full(len(step), 7, np.int64),
            "start_ns": begun,
            "dur_ns": ended - begun,
        }
    )
    at, of = (axis.ravel() for axis in np.indices((plan.steps, plan.ranks)))
    tokens = np.array([round(64 * plan.tokens.get(r, 1.0)) for r in range(plan.ranks)])
    spans = pd.DataFrame(
        {
            "rank": pd.Categorical.from_codes(of, list(plan.labels), ordered=True),
            "step": at.astype(np.int64),
            "stage": pd.Categorical.from_codes(np.zeros(len(at), int), ["decode"]),
            "start_ns": np.rint(begin[at] * rate[of] + ahead[of]).astype(np.int64),
            "end_ns": np.rint(end[at] * rate[of] + ahead[of]).astype(np.int64),
            "batch_size": tokens[of],
            "tokens": tokens[of],
            "forward_id": at.astype(np.int64),
        }
    )
    for lost, number in plan.missing:
        gone = (frame["rank"] == plan.labels[lost]) & (frame["step"] == number)
        frame = frame[~gone]
        spans = spans[~((spans["rank"] == plan.labels[lost]) & (spans["step"] == number))]
    return KernelTable(frame.reset_index(drop=True), plan.labels, spans.reset_index(drop=True))


def matrix(
    ranks: int,
    seed: int,
    *,
    steps: int = 100,
    jitter: float = 0.03,
    slow: float = 1.0,
    inherited: float = 0.0,
) -> npt.NDArray[np.int64]:
    """Compute of each step and rank, ns; the last rank is slow. Shape (steps, ranks).

    inherited: φ of noise in which each step resembles the one before (AR(1)); its standard
    deviation is `jitter` all the same.
    """
    noise = np.random.default_rng(seed).normal(0, jitter, (steps, ranks))
    for step in range(1, steps):
        noise[step] = inherited * noise[step - 1] + (1 - inherited**2) ** 0.5 * noise[step]
    times = 1e6 * (1 + noise)
    times[:, -1] *= slow
    return np.rint(times).astype(np.int64)


def cells(times: npt.NDArray[np.int64]) -> GroupCells:
    """The cells of one kernel whose times are known, as `measure` makes them of a table."""
    steps, ranks = times.shape
    step, rank = (axis.ravel() for axis in np.indices(times.shape))
    labels = tuple(f"TP{number}" for number in range(ranks))
    owner = (rank * steps + step).astype(np.int64)
    none = np.zeros(times.size, np.int64)
    activities = Activities(none, owner, none, times.ravel())
    return GroupCells(
        group=RankGroup("", labels),
        steps=ComparedSteps(tuple(range(steps)), ("decode",) * steps, 0, 0),
        has_steps=True,
        kernels=(("gemm", "gemm_kernel"),),
        times=busy_times(activities, 1, steps * ranks, is_timeline=True),
        assigned_share=1.0,
        active=frozenset(labels),
    )
