"""Windows of DP attention with experts whose truth is known, as SGLang 0.5.23 runs them.

`make(plan)` gives a `DpWindow`; everything in it follows from the plan and its seed. P passes,
R ranks, C categories (`laws.CATEGORIES`), L layers, E experts. A pass is one forward of the
target or of the draft model, on all ranks.

| field | shape | what it is |
| --- | --- | --- |
| `forward_id` | P, R | of the span; counted for target and draft apart; 0: the span has none |
| `is_draft` | P, R | a pass of the draft model |
| `kind` | P, R | IDLE, EXTEND, DECODE, MIXED, VERIFY; of a draft DRAFT or DRAFT_EXTEND_V2 |
| `is_graph` | P | all ranks replay a graph |
| `batch` | P, R | requests of the rank (`bs` of the span: before padding) |
| `tokens` | P, R | query tokens of the rank: before padding |
| `kv`, `qk` | P, R | Σ KV, Σ query · key of the rank: `g_sk + c_sk`, `g_sqsk + c_sqsk` |
| `generation`, `context` | P, R, 4 | Σ q, Σ k, Σ q², Σ q·k of requests in generation (`g_`), in \
their prompt (`c_`) |
| `groups` | P, R, 2 | requests in their prompt, and in generation |
| `bucket` | P, R | requests of the graph that the rank replays; 0 in eager passes |
| `rows`, `shared_rows` | P, R | rows of own and of shared dense kernels, padding among them |
| `counts` | P, L, E | pairs of a token and an expert, as a recorder by pass counts them |
| `expert_tokens` | P, R | sum of `counts` over the rank's experts (`rank_of_expert`) and layers |
| `lawful` | P, R, C | µs of compute by the laws: without factor, without noise |
| `factor` | R, C | planted: how many times as long the rank's kernels take |
| `noise` | P, R, C | what each time is multiplied with; its mean is 1 |
| `times` | P, R, C | µs of compute: lawful · factor · noise, in whole ns |
| `durations` | P, R, L or 1 | ns of each row of `laws.WORKS`, by its place there; 0: not run |
| `transfer` | P, 3 | ns of a collective after attention, after experts, in the head |
| `ready` | P, R | ns: the CPU comes to the gloo all-gather before the pass |
| `synced` | P | ns: all have come and launch; the same as before where none precedes the pass |
| `start`, `end` | P, R | ns: the rank's first kernel begins, its last one ends |
| `waiting` | P, R | µs in device collectives before the last rank has come |
| `exchange` | P, R | µs in device collectives after that |
| `cpu_wait` | P, R | µs in the gloo all-gather, as `sglang:dp_attention_sync_wait_seconds` |
| `head_idle` | P, R | µs in which the GPU has nothing to do before the pass (first pass: 0) |
| `head_idle_beside_busy` | P, R | the part of it in which a peer's GPU works or waits |
| `padding` | P, R | µs of compute that rows of padding cost (of the head: of its norm alone) |
| `recorded` | P, R | the pass is in the rank's trace |

`end - start` is compute + waiting + exchange, to the ns. `split(window, rank)` is the planted
truth: by category the load part, speed part and rest of a rank's difference to the others.
`dp_traces` writes a window as files.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from pytest_sglprof.standin import laws
from pytest_sglprof.standin.dp_passes import Pass, schedule
from pytest_sglprof.standin.dp_plan import CASES, Case, DpPlan, Prefill, Speculative

__all__ = [
    "CASES",
    "Case",
    "DpPlan",
    "DpWindow",
    "Prefill",
    "Speculative",
    "Split",
    "make",
    "split",
]

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]
Texts = npt.NDArray[np.str_]

DRAFT_LAYERS = 1  # of the draft model
LAUNCH_NS = 20_000  # from the end of the gloo all-gather to the first kernel of a graph
BETWEEN_NS = 4_000  # from the last kernel of a pass to the first of the next, at least
SPIKE_SHARE, SPIKE_POWER, SPIKE_MOST = 0.02, 1.5, 20.0  # of passes; Pareto's law; at most


@dataclass(frozen=True)
class DpWindow:
    """What a plan came to; the table above says what each array is."""

    plan: DpPlan
    forward_id: Ints
    is_draft: Bools
    kind: Texts
    is_graph: Bools
    batch: Ints
    tokens: Ints
    generation: Ints
    context: Ints
    groups: Ints
    bucket: Ints
    rows: Ints
    shared_rows: Floats
    counts: Ints
    lawful: Floats
    factor: Floats
    noise: Floats
    durations: tuple[Ints, ...]
    transfer: Ints
    ready: Ints
    synced: Ints
    start: Ints
    end: Ints
    waiting: Floats
    exchange: Floats
    recorded: Bools

    @property
    def kv(self) -> Ints:
        """Σ KV of each pass and rank."""
        return self.generation[..., 1] + self.context[..., 1]

    @property
    def qk(self) -> Ints:
        """Σ query · key of each pass and rank."""
        return self.generation[..., 3] + self.context[..., 3]

    @property
    def rank_of_expert(self) -> Ints:
        """Shape (E,)."""
        return rank_of_expert(self.plan)

    @property
    def expert_tokens(self) -> Ints:
        """Pairs that came to the experts of each rank, over all layers."""
        by_rank = self.counts.reshape(*self.counts.shape[:2], self.plan.ranks, -1)
        return np.asarray(by_rank.sum(axis=(1, 3)))

    @property
    def times(self) -> Floats:
        """µs of compute, shape (P, R, C)."""
        return _categories(self.durations, self.layer_count) / 1000

    @property
    def layer_count(self) -> Ints:
        """Layers of the model that runs in each pass, shape (P,)."""
        return np.where(self.is_draft[:, 0], DRAFT_LAYERS, self.plan.layers)

    @property
    def padding(self) -> Floats:
        """µs of compute on rows of padding: by the slope of the dense laws alone, shape (P, R)."""
        real = self.tokens.astype(float)
        shared = (
            real if self.plan.regime == "local" else real.mean(axis=1, keepdims=True) + 0 * real
        )
        more = {"own_rows": self.rows - real, "shared_rows": self.shared_rows - shared}
        lasts = self.factor * self.noise
        padding = np.zeros(real.shape)
        for work in laws.WORKS:
            if work.driver in more:
                layers = 1 if work.part == "head" else self.layer_count[:, None]
                of = lasts[..., laws.CATEGORIES.index(work.category)]
                padding += layers * work.law.each * more[work.driver] * of
        return padding

    @property
    def cpu_wait(self) -> Floats:
        """µs that each rank waits in the gloo all-gather before the pass."""
        return (self.synced[:, None] - self.ready) / 1000

    @property
    def head_idle(self) -> Floats:
        """µs in which the GPU has nothing to do before the pass."""
        idle = np.zeros(self.start.shape)
        idle[1:] = (self.start[1:] - self.end[:-1]) / 1000
        return idle

    @property
    def head_idle_beside_busy(self) -> Floats:
        """The part of `head_idle` in which a peer is busy: in the pass before or in this one."""
        idle = np.zeros(self.start.shape)
        begin, end = self.end[:-1], self.start[1:]
        free = np.minimum(end, end.min(axis=1, keepdims=True)) - np.maximum(
            begin, begin.max(axis=1, keepdims=True)
        )
        idle[1:] = (end - begin - np.maximum(free, 0)) / 1000
        return idle


class Split(NamedTuple):
    """µs a pass by which a rank's category lasts longer than the mean of the others'.

    load: what the law says for its work, less what it says for theirs. speed: (f - 1) of its
    own lawful time, less the same of theirs. rest: what noise makes of it. They add up to total.
    """

    load: float
    speed: float
    rest: float
    total: float


def split(window: DpWindow, rank: int, passes: Bools | None = None) -> dict[str, Split]:
    """The planted truth of a rank by category, over the given passes (all), shape (P,)."""
    chosen = np.ones(len(window.is_graph), bool) if passes is None else passes
    others = np.arange(window.plan.ranks) != rank

    def above(values: Floats) -> Floats:
        of_passes = values[chosen]
        mean = (of_passes[:, rank] - of_passes[:, others].mean(axis=1)).mean(axis=0)
        return np.asarray(mean)

    load = above(window.lawful)
    speed = above(window.lawful * (window.factor - 1))
    total = above(window.times)
    return {
        name: Split(*(float(part[i]) for part in (load, speed, total - load - speed, total)))
        for i, name in enumerate(laws.CATEGORIES)
    }


def rank_of_expert(plan: DpPlan) -> Ints:
    """Experts lie on the ranks in order, as without redundant ones."""
    return np.repeat(np.arange(plan.ranks), plan.experts // plan.ranks)


# What each pass asks of the kernels: rows after padding, tokens of experts.


class _Drivers(NamedTuple):
    """What the laws take as x, each of shape (P, R); counts: (P, L, E)."""

    is_graph: Bools
    bucket: Ints
    own_rows: Ints
    shared_rows: Floats
    logits: Floats
    counts: Ints


def _drivers(plan: DpPlan, passes: list[Pass], rng: np.random.Generator) -> _Drivers:
    rows = [
        laws.rows_of(
            each.groups.sum(axis=1).tolist(),
            (each.generation[:, 0] + each.context[:, 0]).tolist(),
            extends=bool({"EXTEND", "MIXED"} & set(each.kind)),
            can_replay=each.can_replay,
            width=each.width,
            regime=plan.regime,
            capture_sizes=plan.graph_sizes,
        )
        for each in passes
    ]
    total = laws.TOP_K * np.array([(p.generation[:, 0] + p.context[:, 0]).sum() for p in passes])
    layers = np.where([p.is_draft for p in passes], DRAFT_LAYERS, plan.layers)
    pairs = np.where(np.arange(plan.layers) < layers[:, None], total[:, None], 0)
    counts = rng.multinomial(pairs, _routing(plan, len(passes), rng)).astype(np.int64)
    return _Drivers._make([*(np.array(of) for of in zip(*rows, strict=True)), counts])


def _routing(plan: DpPlan, passes: int, rng: np.random.Generator) -> Floats:
    """How likely a pair lands on each expert, shape (P, L, E), sums 1.

    Some experts are liked more in a layer; a quarter of a hot rank's experts carry all that it
    has more; the texts of the moment prefer the experts of one rank or another.
    """
    weight = np.exp(0.3 * rng.standard_normal((plan.layers, plan.experts)))
    each = plan.experts // plan.ranks
    for rank, factor in plan.hot:
        of = weight[:, rank * each : (rank + 1) * each]
        carry = max(1, each // 4)
        more = (factor - 1) * of.sum(axis=1, keepdims=True)
        of[:, :carry] += more * of[:, :carry] / of[:, :carry].sum(axis=1, keepdims=True)
    drift = _autoregressive(rng, (passes, plan.layers, plan.ranks), 0.8)
    likely = weight * np.repeat(np.exp(plan.drift * drift), each, axis=2)
    return np.asarray(likely / likely.sum(axis=2, keepdims=True))


def _autoregressive(rng: np.random.Generator, shape: tuple[int, ...], phi: float) -> Floats:
    """Stationary, of order 1 along the first axis, with standard deviation 1."""
    noise = rng.standard_normal(shape)
    noise[1:] *= np.sqrt(1 - phi**2)
    for number in range(1, shape[0]):
        noise[number] += phi * noise[number - 1]
    return noise


def _noise(plan: DpPlan, passes: int, rng: np.random.Generator) -> Floats:
    """What each time is multiplied with, shape (P, R, C); the mean is 1."""
    phi = plan.phi if plan.noise == "autoregressive" else 0.0
    ranks = _autoregressive(rng, (passes, plan.ranks, 1), phi)
    each = _autoregressive(rng, (passes, plan.ranks, len(laws.CATEGORIES)), phi)
    mixed = np.sqrt(plan.common) * ranks + np.sqrt(1 - plan.common) * each
    factor = np.exp(plan.sd * mixed - plan.sd**2 / 2)
    if plan.noise == "pareto":
        draws = rng.random((2, passes, plan.ranks, 1))
        power, most = SPIKE_POWER, SPIKE_MOST
        spike = np.minimum(draws[0] ** (-1 / power), most)
        mean = (power - most ** (1 - power)) / (power - 1)
        factor = factor * np.where(draws[1] < SPIKE_SHARE, spike, 1.0)
        factor = factor / (1 + SPIKE_SHARE * (mean - 1))
    return np.asarray(factor)


# How long the kernels take, and when they run.


def _attention_us(passes: list[Pass], is_graph: Bools) -> Floats:
    """µs of the attention kernel of one layer, shape (P, R)."""
    rows = []
    for each, graph in zip(passes, is_graph.tolist(), strict=True):
        keys, pairs = each.generation[:, 1], each.context[:, 3]
        extends = each.context[:, 0] > 0
        generates = laws.VERIFY_ATTENTION if "VERIFY" in each.kind else laws.DECODE_ATTENTION
        extending = laws.EXTEND_ATTENTION(pairs) + laws.DECODE_ATTENTION.each * keys
        works = np.where(extends, extending, generates(keys))
        idle = laws.EXTEND_ATTENTION if "DRAFT_EXTEND_V2" in each.kind else generates
        rows.append(np.where(each.groups.sum(axis=1) > 0, works, idle(0) if graph else 0.0))
    return np.array(rows)


def _lawful(plan: DpPlan, passes: list[Pass], drivers: _Drivers) -> list[Floats]:
    """µs of each row of `laws.WORKS` by the laws: shape (P, R, L), or (P, R, 1) where alike."""
    batch = np.array([each.groups.sum(axis=1) for each in passes])
    by_rank = drivers.counts.reshape(*drivers.counts.shape[:2], plan.ranks, -1).sum(axis=3)
    pairs = by_rank.transpose(0, 2, 1)
    runs = (
        np.arange(plan.layers)
        < np.where([p.is_draft for p in passes], DRAFT_LAYERS, plan.layers)[:, None]
    )
    x = {**drivers._asdict(), "batch": batch}
    parts = []
    for work in laws.WORKS:
        if work.driver == "attention":
            parts.append(_attention_us(passes, drivers.is_graph)[..., None])
        elif work.driver == "pairs":
            parts.append(np.where(runs[:, None, :], work.law(pairs), 0.0))
        else:
            of = x[work.driver]
            parts.append(np.where(of > 0, work.law(of), 0.0)[..., None])
    return parts


def _categories(parts: Sequence[Floats | Ints], layers: Ints) -> Floats:
    """Sums of the rows of `laws.WORKS` by category and over layers, shape (P, R, C)."""
    sums = np.zeros((*parts[0].shape[:2], len(laws.CATEGORIES)))
    for work, part in zip(laws.WORKS, parts, strict=True):
        times = 1 if work.driver == "pairs" or work.part == "head" else layers[:, None]
        sums[..., laws.CATEGORIES.index(work.category)] += part.sum(axis=2) * times
    return sums


class _Times(NamedTuple):
    ready: Ints
    synced: Ints
    start: Ints
    end: Ints
    waiting: Floats
    exchange: Floats


def _part(durations: list[Ints], part: str, skip: str = "") -> Ints:
    """ns from one collective to the next, shape (P, R, L or 1)."""
    of = (
        d for w, d in zip(laws.WORKS, durations, strict=True) if w.part == part and w.name != skip
    )
    return np.asarray(sum(of))


def _times(
    plan: DpPlan, passes: list[Pass], durations: list[Ints], transfer: Ints,
    rng: np.random.Generator,
) -> _Times:  # fmt: skip
    """When all run. After its first collective a pass goes in step on all ranks."""
    layers = np.where([p.is_draft for p in passes], DRAFT_LAYERS, plan.layers)
    runs = (np.arange(plan.layers) < layers[:, None])[:, None, :]
    attention = _part(durations, "attention")[..., 0]
    experts = np.where(runs, _part(durations, "experts"), 0)
    before = durations[[w.name for w in laws.WORKS].index("final norm")][..., 0]
    after = _part(durations, "head", skip="final norm")[..., 0]
    if plan.regime == "local":
        before, after = np.zeros_like(before), before + after
    slowest = experts.max(axis=1)
    waits = (layers - 1)[:, None] * (attention.max(axis=1, keepdims=True) - attention)
    waits += (slowest[:, None, :] - experts).sum(axis=2)
    waits += before.max(axis=1, keepdims=True) - before
    exchange = layers * transfer[:, :2].sum(axis=1) + transfer[:, 2]
    together = (layers - 1) * attention.max(axis=1) + slowest.sum(axis=1) + before.max(axis=1)
    together += exchange
    asks = plan.cpu_us + plan.cpu_us_a_request * np.array([p.groups.sum(axis=1) for p in passes])
    cpu = np.rint(1000 * asks * np.exp(0.05 * rng.standard_normal(asks.shape))).astype(np.int64)
    ready, start, end = (np.zeros(asks.shape, np.int64) for _ in range(3))
    synced = np.zeros(len(passes), np.int64)
    last = before = previous = np.zeros(plan.ranks, np.int64)  # ends of passes and iterations
    for number, each in enumerate(passes):
        if each.is_synced:
            before, previous = previous, last
            free = before if plan.has_overlap else previous
            ready[number] = np.maximum(free, synced[number - 1] if number else 0) + cpu[number]
            synced[number] = ready[number].max()
        else:
            ready[number] = synced[number] = synced[number - 1]
        start[number] = np.maximum(last + BETWEEN_NS, synced[number] + LAUNCH_NS)
        first = start[number] + attention[number]
        waits[number] += first.max() - first
        last = first.max() + together[number] + after[number]
        end[number] = last
    return _Times(ready, synced, start, end, waits / 1000, (exchange / 1000)[:, None] + 0 * asks)


def make(plan: DpPlan) -> DpWindow:
    """The window that a plan comes to; the same one each time."""
    streams = np.random.SeedSequence(plan.seed).spawn(4)
    scheduling, routing, noising, cpu = (np.random.default_rng(stream) for stream in streams)
    passes = schedule(plan, scheduling)
    drivers = _drivers(plan, passes, routing)
    parts = _lawful(plan, passes, drivers)
    layers = np.where([p.is_draft for p in passes], DRAFT_LAYERS, plan.layers)
    factor = np.ones((plan.ranks, len(laws.CATEGORIES)))
    factor *= np.array(plan.gpu_factor or np.ones(plan.ranks))[:, None]
    for rank, category, slower in plan.faults:
        factor[rank, laws.CATEGORIES.index(category)] *= slower
    noise = _noise(plan, len(passes), noising)
    places = [laws.CATEGORIES.index(work.category) for work in laws.WORKS]
    durations = [
        np.rint(1000 * part * (factor * noise)[..., place, None]).astype(np.int64)
        for part, place in zip(parts, places, strict=True)
    ]
    rows = np.stack([drivers.shared_rows.max(axis=1)] * 2 + [drivers.logits.max(axis=1)], axis=1)
    transfer = np.rint(1000 * laws.COLLECTIVE(rows)).astype(np.int64)
    if plan.regime == "local":
        transfer[:, 2] = 0
    recorded = np.ones((len(passes), plan.ranks), bool)
    for rank, late in plan.late:
        recorded[:late, rank] = False
    times = _times(plan, passes, durations, transfer, cpu)
    everywhere = np.ones(plan.ranks, np.int64)
    return DpWindow(
        plan=plan,
        forward_id=np.array([p.forward_id for p in passes])[:, None] * everywhere,
        is_draft=np.array([p.is_draft for p in passes])[:, None] & (everywhere > 0),
        kind=np.array([p.kind for p in passes]),
        is_graph=drivers.is_graph,
        batch=np.array([p.groups.sum(axis=1) for p in passes]),
        tokens=np.array([p.generation[:, 0] + p.context[:, 0] for p in passes]),
        generation=np.array([p.generation for p in passes]),
        context=np.array([p.context for p in passes]),
        groups=np.array([p.groups for p in passes]),
        bucket=drivers.bucket,
        rows=drivers.own_rows,
        shared_rows=drivers.shared_rows,
        counts=drivers.counts,
        lawful=_categories(parts, layers),
        factor=factor,
        noise=noise,
        durations=tuple(durations),
        transfer=transfer,
        recorded=recorded,
        **times._asdict(),
    )
