"""Which rank runs what in each pass: requests that grow, come and go, prompts, speculation."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from pytest_sglprof.standin.dp_plan import DpPlan, Speculative

Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]


class Pass(NamedTuple):
    """One pass of all ranks. groups: shape (R, 2); generation, context: shape (R, 4)."""

    kind: list[str]
    width: int  # query tokens of a request, where all have as many
    groups: Ints
    generation: Ints
    context: Ints
    is_draft: bool = False
    can_replay: bool = True
    is_synced: bool = True  # a gloo all-gather precedes
    forward_id: int = 0


class _Requests:
    """The requests of all ranks in slots: `kv` has shape (R, slots); which of them are taken."""

    def __init__(self, plan: DpPlan, rng: np.random.Generator) -> None:
        self.plan, self.rng = plan, rng
        coming = [sum(p.rank == rank for p in plan.prefills) for rank in range(plan.ranks)]
        slots = max(n + more for n, more in zip(plan.requests, coming, strict=True))
        # Places of the requests that the window begins with; those of prompts come after.
        self.is_first = np.arange(slots) < np.array(plan.requests)[:, None]
        self.is_taken = self.is_first.copy()
        lengths = np.where(self.is_first, self._lengths((plan.ranks, slots)), 0)
        mean = lengths.sum(axis=1) / np.maximum(1, self.is_first.sum(axis=1))
        scale = np.array(plan.kv) / np.maximum(1, mean)
        lengths = np.rint(lengths * scale[:, None]).astype(np.int64)
        self.kv: Ints = np.where(self.is_first, lengths, 0)
        self.done = [0] * len(plan.prefills)

    def _lengths(self, shape: tuple[int, int]) -> Ints:
        spread = self.plan.kv_spread
        draws = np.exp(spread * self.rng.standard_normal(shape) - spread**2 / 2)
        lengths = np.rint(draws * np.array(self.plan.kv)[:, None]).astype(np.int64)
        return np.asarray(np.maximum(1, lengths))

    def come_and_go(self) -> None:
        """Ends some requests and fills free slots, of those that the window began with."""
        draws = self.rng.random((2, *self.kv.shape))
        lengths = self._lengths(self.kv.shape)
        self.is_taken &= ~(self.is_first & (draws[0] < self.plan.churn))
        comes = self.is_first & ~self.is_taken & (draws[1] >= self.plan.vacant)
        self.kv = np.where(comes, lengths, self.kv)
        self.is_taken |= comes

    def chunks(self, iteration: int) -> dict[int, tuple[int, int]]:
        """By rank: tokens of a prompt that run now, and how many ran before."""
        running: dict[int, tuple[int, int]] = {}
        for number, prefill in enumerate(self.plan.prefills):
            before, rank = self.done[number], prefill.rank
            if iteration >= prefill.at and before < prefill.tokens and rank not in running:
                running[rank] = (min(prefill.chunk, prefill.tokens - before), before)
                self.done[number] += running[rank][0]
        return running

    def grow(self, ran: Bools, more: Ints) -> None:
        """Adds the tokens that a pass has made. ran, more: of shape (R,) and (R, slots)."""
        self.kv = np.where(self.is_taken & ran[:, None], self.kv + more, self.kv)
        for number, prefill in enumerate(self.plan.prefills):
            if self.done[number] == prefill.tokens:
                free = np.flatnonzero(~(self.is_taken | self.is_first)[prefill.rank])[0]
                self.is_taken[prefill.rank, free] = True
                self.kv[prefill.rank, free] = prefill.tokens + 1
                self.done[number] += 1  # it has joined


def _sums(kv: Ints, taken: Bools, width: int, *, with_own: bool = False) -> Ints:
    """Σ q, Σ k, Σ q², Σ q·k by rank, of requests with `width` query tokens each.

    with_own: the query tokens are keys too, beside those in the cache.
    """
    count, keys = taken.sum(axis=1), np.where(taken, kv + width * with_own, 0).sum(axis=1)
    return np.stack([width * count, keys, width**2 * count, width * keys], axis=1)


def _decode(plan: DpPlan, requests: _Requests, chunks: dict[int, tuple[int, int]]) -> Pass:
    """A pass without speculation; the ranks in `chunks` extend."""
    kind = []
    context, groups = np.zeros((plan.ranks, 4), np.int64), np.zeros((plan.ranks, 2), np.int64)
    runs = requests.is_taken.copy()
    for rank in range(plan.ranks):
        if rank in chunks:
            query, before = chunks[rank]
            key = before + query
            context[rank], groups[rank, 0] = (query, key, query**2, query * key), 1
            runs[rank] &= plan.is_mixed
        kind.append("DECODE" if runs[rank].any() else "IDLE")
        if rank in chunks:
            kind[-1] = "MIXED" if runs[rank].any() else "EXTEND"
    groups[:, 1] = runs.sum(axis=1)
    generation = _sums(requests.kv, runs, 1)
    return Pass(kind, 1, groups, generation, context, can_replay=not chunks)


def _speculate(plan: DpPlan, how: Speculative, requests: _Requests) -> list[Pass]:
    """The passes of one iteration: drafts, verify, extension of the draft."""
    taken = requests.is_taken
    count, none = taken.sum(axis=1), np.zeros((plan.ranks, 4), np.int64)
    generates = np.stack([np.zeros_like(count), count], axis=1)

    def named(kind: str) -> list[str]:
        return [kind if n else "IDLE" for n in count]

    passes = [
        Pass(
            named("DRAFT"), 1, generates, _sums(requests.kv, taken, 1), none,
            is_draft=True, can_replay=False, is_synced=step == 0,
        )
        for step in range(how.steps - 1)
    ]  # fmt: skip
    sums = _sums(requests.kv, taken, how.width)
    passes.append(Pass(named("VERIFY"), how.width, generates, sums, none, is_synced=not passes))
    anonymous = how.is_extend_anonymous
    extended = _sums(requests.kv, taken, how.width, with_own=True)
    kind = named("DRAFT_EXTEND_V2" if anonymous else "DRAFT")
    passes.append(
        Pass(
            kind, how.width, generates[:, ::-1], none, extended,
            is_draft=True, can_replay=anonymous, is_synced=False, forward_id=-1 * anonymous,
        )
    )  # fmt: skip
    return passes


def schedule(plan: DpPlan, rng: np.random.Generator) -> list[Pass]:
    """All passes of the window, with their ids."""
    requests = _Requests(plan, rng)
    passes: list[Pass] = []
    ids = {False: plan.first_id, True: plan.first_id}
    for iteration in range(plan.passes):
        requests.come_and_go()
        if iteration == plan.id_reset:
            ids[False] = 1
        if plan.speculative is None:
            chunks = requests.chunks(iteration)
            new = [_decode(plan, requests, chunks)]
            more = np.ones_like(requests.kv)
            ran = np.array([kind in ("DECODE", "MIXED") for kind in new[0].kind])
        else:
            how = plan.speculative
            new = _speculate(plan, how, requests)
            more = 1 + rng.binomial(how.width - 1, how.accepted, requests.kv.shape)
            ran = np.ones(plan.ranks, bool)
        requests.grow(ran, more)
        for each in new:
            if each.forward_id < 0:
                passes.append(each._replace(forward_id=0))
                continue
            passes.append(each._replace(forward_id=ids[each.is_draft]))
            ids[each.is_draft] += 1
    return passes
