"""What is planted in a window of DP attention: plans, and the cases an analysis is asked about."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

from pytest_sglprof.standin import laws


@dataclass(frozen=True)
class Prefill:
    """A prompt of `tokens` that comes to `rank` before iteration `at`, in pieces of `chunk`."""

    rank: int
    at: int
    tokens: int
    chunk: int = 2048


@dataclass(frozen=True)
class Speculative:
    """An iteration is `steps - 1` draft passes, a verify pass, a pass that extends the draft.

    width: draft tokens that a verify pass checks for each request. accepted: how likely each is.
    is_extend_anonymous: the last pass replays a graph and its span lacks a forward_id, as in
    `multi_layer_eagle_worker_v2`; the others of the draft are eager.
    """

    steps: int = 3
    width: int = 4
    accepted: float = 0.6
    is_extend_anonymous: bool = False


@dataclass(frozen=True)
class DpPlan:
    """What happens in a window.

    ranks, passes: how many, of the target model. about: the rank that the plan is about.
    requests, kv: of each rank in the beginning; kv is the mean of a request. kv_spread: sd of the
    logarithm of a request's KV. churn: share of the requests that end in a pass; another takes
    the place (as where prompts run on other servers). vacant: how likely the place stays empty
    for another pass.
    sd, phi: of the logarithm of the noise of each category; the share `common` of its variance is
    the rank's. noise "pareto": white, and 2 % of a rank's passes last as much longer as Pareto's
    law says.
    gpu_factor: by rank, of all kernels. faults: (rank, category, factor). hot: (rank, factor):
    its experts get so many times the tokens. drift: sd of the logarithm of a rank's share of the
    tokens in a layer, from pass to pass (φ 0.8).
    is_mixed: requests in generation run in the pass of a prompt, else they pause. has_overlap:
    the CPU prepares a pass while the GPU runs the one before. cpu_us, cpu_us_a_request: the CPU's
    work before a pass. late: (rank, passes): its trace begins so many passes late. id_reset: the
    target's ids begin anew at this pass of it. first_id: of both models. capture_sizes: of graphs,
    in requests; none: SGLang's, which are others with speculation.
    """

    ranks: int
    requests: tuple[int, ...]
    kv: tuple[float, ...]
    passes: int = 100
    seed: int = 0
    about: int = 0
    kv_spread: float = 0.5
    churn: float = 0.01
    vacant: float = 0.0
    sd: float = 0.02
    phi: float = 0.6
    noise: Literal["autoregressive", "pareto"] = "autoregressive"
    common: float = 0.5
    regime: laws.Regime = "gather"
    capture_sizes: tuple[int, ...] = ()
    gpu_factor: tuple[float, ...] = ()
    faults: tuple[tuple[int, str, float], ...] = ()
    hot: tuple[tuple[int, float], ...] = ()
    drift: float = 0.15
    experts: int = 256
    layers: int = 8
    prefills: tuple[Prefill, ...] = ()
    is_mixed: bool = False
    speculative: Speculative | None = None
    has_overlap: bool = True
    cpu_us: float = 800.0
    cpu_us_a_request: float = laws.CPU_US_A_REQUEST
    late: tuple[tuple[int, int], ...] = ()
    id_reset: int | None = None
    first_id: int = 1001

    @property
    def graph_sizes(self) -> tuple[int, ...]:
        """The batch sizes that graphs are captured for."""
        usual = laws.SPECULATIVE_CAPTURE_SIZES if self.speculative else laws.CAPTURE_SIZES
        return self.capture_sizes or usual

    def __post_init__(self) -> None:
        """ValueError for a plan that no server runs."""
        if len(self.requests) != self.ranks or len(self.kv) != self.ranks:
            raise ValueError(f"requests and kv need one value for each of {self.ranks} ranks")
        if self.gpu_factor and len(self.gpu_factor) != self.ranks:
            raise ValueError(f"gpu_factor needs one value for each of {self.ranks} ranks")
        if self.experts % self.ranks:
            raise ValueError(f"{self.experts} experts do not divide among {self.ranks} ranks")
        if self.prefills and self.speculative:
            raise ValueError("prefills beside speculation are not modelled")


# The cases that the analysis is asked about.


class Case(NamedTuple):
    """A kind of window. make: plan of (ranks, seed, sd, phi). planted: what is in it."""

    name: str
    make: Callable[[int, int, float, float], DpPlan]
    planted: str


REQUESTS, FEW, KV, RATIO, SLOW = 64, 40, 4000.0, 1.6, 1.10


def _plan(
    ranks: int, seed: int, sd: float, phi: float, *,
    others: int = REQUESTS, kv: float = KV, factor: float = 1.0,
    **more: Any,
) -> DpPlan:  # fmt: skip
    """The rank `seed % ranks` is another than the rest."""
    about = seed % ranks
    is_it = [rank == about for rank in range(ranks)]
    return DpPlan(
        ranks=ranks,
        requests=tuple(REQUESTS if it else others for it in is_it),
        kv=tuple(kv if it else KV for it in is_it),
        gpu_factor=tuple(factor if it else 1.0 for it in is_it),
        seed=seed, sd=sd, phi=phi, about=about, **more,
    )  # fmt: skip


def _hot(ranks: int, seed: int, sd: float, phi: float) -> DpPlan:
    return _plan(ranks, seed, sd, phi, hot=((seed % ranks, RATIO),))


def _chunked(ranks: int, seed: int, sd: float, phi: float) -> DpPlan:
    about = seed % ranks
    prompts = (Prefill(about, 15, 16384), Prefill(about, 60, 12000))
    return _plan(ranks, seed, sd, phi, prefills=prompts)


def _late(ranks: int, seed: int, sd: float, phi: float) -> DpPlan:
    return _plan(ranks, seed, sd, phi, factor=SLOW, late=((seed % ranks, 1),))


CASES = (
    Case("a", partial(_plan, others=FEW), "64 requests on one rank, 40 on each other, all window"),
    Case("b", partial(_plan, kv=RATIO * KV), "equal batches, one rank's KV is 1.6 times as much"),
    Case("c", _hot, "one rank's experts get 1.6 times the tokens"),
    Case("d", partial(_plan, factor=SLOW), "one GPU takes 1.10 times as long, equal load"),
    Case("e", partial(_plan, kv=RATIO * KV, factor=SLOW), "b and d on the same rank"),
    Case(
        "f",
        partial(_plan, others=FEW, factor=SLOW, regime="local"),
        "d in the local regime; the rank's batches replay graphs that no other replays",
    ),
    Case("g", _chunked, "one rank runs two prompts in pieces, and all others eagerly beside it"),
    Case(
        "h",
        partial(_plan, kv=RATIO * KV, speculative=Speculative()),
        "b with draft and verify passes",
    ),
    Case("i", _late, "d; the trace of that rank begins one pass late"),
    Case(
        "j",
        partial(_plan, factor=SLOW, id_reset=50, speculative=Speculative(is_extend_anonymous=True)),
        "d; the target's ids begin anew in the middle, and spans of the draft have none",
    ),
)
