"""How long the kernels of a pass take by what the rank has to do: DP attention with experts.

Each law is `fixed + each * x`, in µs a layer, with round constants as on an H100 with the shapes
of DeepSeek-V3 (hidden 7168, latent attention, 8 of 256 experts a token, FP8). Plain arithmetic:
`x` is a number or an array. Where SGLang 0.5.23 says what drives a kernel:

| rows | passes that replay a graph | eager passes |
| --- | --- | --- |
| own (norm, quantization, qkv, o) | the bucket (`decode_cuda_graph_runner`), idle ranks too | the \
rank's own, where a rank extends (SUM_LEN); else all are padded to the largest (MAX_LEN) |
| shared (router, shared experts) | the buckets of all ranks, divided among them | the tokens of \
all ranks, divided among them |

In the local regime (DeepEP-like) nothing is gathered, and all rows are the rank's own.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

Regime = Literal["gather", "local"]

CATEGORIES = ("attention", "gemm", "norm", "quantization", "moe", "sampling")
"""What a pass's compute is divided into."""

TOP_K = 8
"""Experts of a token."""

CPU_US_A_REQUEST = 8.0
"""Of a scheduler's work before a pass, beside what does not depend on its batch."""

CAPTURE_SIZES = (1, 2, 4, 8, 12, *range(16, 257, 8))
"""`cuda_graph_config.decode.bs` where nothing is set and there is no speculation."""

SPECULATIVE_CAPTURE_SIZES = (*range(1, 9), *range(10, 33, 2), *range(40, 65, 4), *range(72, 257, 8))
"""The same with speculation (`generate_decode_cuda_graph_batch_sizes`)."""


@dataclass(frozen=True)
class Law:
    """fixed: µs a layer however little there is to do. each: µs a layer for one more of x."""

    fixed: float
    each: float

    def __call__(self, x: Any) -> Any:
        """µs of one layer; x is a number or an array."""
        return self.fixed + self.each * x


DECODE_ATTENTION = Law(20.0, 4e-4)
"""By Σ KV: 1,152 bytes a token of the latent cache at 3 TB/s."""

VERIFY_ATTENTION = Law(24.0, 5e-4)
"""By Σ KV too: all draft tokens of a request read its cache together."""

EXTEND_ATTENTION = Law(40.0, 8e-5)
"""By Σ query · key: 128 heads of 192 + 128 at about 1,000 TFLOP/s."""

Part = Literal["attention", "experts", "head"]
Driver = Literal["attention", "own_rows", "shared_rows", "pairs", "logits", "batch"]


@dataclass(frozen=True)
class Work:
    """One kernel of a layer, or (part head) of the pass, and what drives it.

    driver: attention: Σ KV, or Σ query · key of a prompt; own or shared rows (see above); pairs:
    of a token and one of the rank's experts; logits: rows of the head; batch: of the rank.
    """

    part: Part
    name: str
    category: str
    driver: Driver
    law: Law


WORKS = (
    Work("attention", "input norm", "norm", "own_rows", Law(3.0, 0.01)),
    Work("attention", "quantize", "quantization", "own_rows", Law(4.0, 0.01)),
    Work("attention", "qkv", "gemm", "own_rows", Law(30.0, 0.25)),
    Work("attention", "attention", "attention", "attention", DECODE_ATTENTION),
    Work("attention", "o", "gemm", "own_rows", Law(20.0, 0.15)),
    Work("attention", "post norm", "norm", "own_rows", Law(3.0, 0.01)),
    Work("experts", "router", "gemm", "shared_rows", Law(4.0, 0.02)),
    Work("experts", "top k", "moe", "shared_rows", Law(6.0, 0.01)),
    Work("experts", "quantize", "quantization", "shared_rows", Law(4.0, 0.01)),
    Work("experts", "up", "moe", "pairs", Law(25.0, 0.10)),
    Work("experts", "down", "moe", "pairs", Law(15.0, 0.05)),
    Work("experts", "shared", "gemm", "shared_rows", Law(10.0, 0.08)),
    Work("head", "final norm", "norm", "own_rows", Law(3.0, 0.01)),
    Work("head", "logits", "gemm", "logits", Law(30.0, 0.10)),
    Work("head", "sample", "sampling", "batch", Law(25.0, 0.60)),
)
"""In the order of the stream. A collective follows each layer's attention and experts, and in
the gather regime the final norm."""

COLLECTIVE = Law(12.0, 0.02)
"""From the last arrival to the end, µs, by shared rows (of the head: by logits)."""

TRANSFER = "transfer"
"""The name of this law in `growth`."""


LAWS = {f"{work.part} {work.name}": work for work in WORKS}
"""Rows of `WORKS` by part and name, such as `experts up`."""


def bucket(size: int, capture_sizes: Sequence[int]) -> int | None:
    """The batch size of the graph that a batch of `size` replays; None above the largest."""
    at = bisect_left(capture_sizes, size)
    return capture_sizes[at] if at < len(capture_sizes) else None


class Rows(NamedTuple):
    """What drives the dense kernels of one pass, by rank. bucket: in requests; 0 where eager."""

    is_graph: bool
    bucket: list[int]
    own_rows: list[int]
    shared_rows: list[float]
    logits: list[float]


def rows_of(
    sizes: Sequence[int],
    tokens: Sequence[int],
    *,
    extends: bool,
    can_replay: bool = True,
    width: int = 1,
    regime: Regime = "gather",
    capture_sizes: Sequence[int] = CAPTURE_SIZES,
) -> Rows:
    """Rows of a pass after padding. sizes, tokens: requests and query tokens of each rank.

    extends: of any rank, which makes all run eagerly. width: query tokens of a request in a
    graph. Eager ranks are padded to the largest where that is less than twice the sum
    (`DpPaddingMode.get_dp_padding_mode`), never beside a prompt.
    """
    ranks, is_gathered = len(sizes), regime == "gather"
    asked = [max(sizes)] * ranks if is_gathered else sizes
    graphs = [bucket(size, capture_sizes) for size in asked]
    replayed = [size for size in graphs if size is not None]
    if can_replay and not extends and len(replayed) == ranks:
        padded = [width * size for size in replayed]
        exact = [float(n) for n in padded]
        return Rows(True, replayed, padded, exact, exact)
    is_padded = is_gathered and not extends and 2 * sum(tokens) >= max(tokens) * ranks
    rows = [max(tokens)] * ranks if is_padded else list(tokens)
    scored = sizes if extends or width == 1 else tokens
    if not is_gathered:
        return Rows(False, [0] * ranks, rows, list(map(float, rows)), list(map(float, scored)))
    shared, logits = sum(rows) / ranks, sum(scored) / ranks
    return Rows(False, [0] * ranks, rows, [shared] * ranks, [logits] * ranks)


class Asked(NamedTuple):
    """What one rank's kernels have to do in a pass; attention: µs of a layer."""

    attention: float
    own_rows: float
    shared_rows: float
    pairs: float
    logits: float
    batch: float

    def time(self, work: Work) -> float:
        """µs of the kernel, 0 where there is nothing to run."""
        if work.driver == "attention":
            return self.attention
        x: float = getattr(self, work.driver)
        return float(work.law(x)) if x > 0 else 0.0


class Running(NamedTuple):
    """A rank's batch: requests, query tokens, Σ KV; a prompt looks back on all of its own KV."""

    size: int
    tokens: int
    kv: int
    extends: bool


def asked(running: Sequence[Running], *, has_graphs: bool = True) -> list[Asked]:
    """What each rank does in a pass without speculation, in the gather regime.

    Every expert is as likely for a token, and the ranks share the experts evenly.
    """
    sizes, tokens = [each.size for each in running], [each.tokens for each in running]
    extends = any(each.extends for each in running)
    rows = rows_of(sizes, tokens, extends=extends, can_replay=has_graphs)
    pairs = TOP_K * sum(tokens) / len(running)
    asks = []
    for rank, each in enumerate(running):
        attention = DECODE_ATTENTION(each.kv)
        if each.extends:
            attention = EXTEND_ATTENTION(each.tokens * each.kv / each.size)
        elif not each.size and not rows.is_graph:
            attention = 0.0
        dense = (rows.own_rows[rank], rows.shared_rows[rank])
        asks.append(Asked(attention, *dense, pairs, rows.logits[rank], each.size))
    return asks


_SMALL = asked([Running(8, 8, 800, False)])[0]


def growth(law: str, asks: Asked) -> float:
    """How many times as long as in a small decode step: 8 requests a rank, Σ KV 800.

    law: a key of `LAWS`, or `TRANSFER`; 1 for any other name.
    """
    if law == TRANSFER:
        return float(COLLECTIVE(asks.shared_rows) / COLLECTIVE(_SMALL.shared_rows))
    work = LAWS.get(law)
    return asks.time(work) / _SMALL.time(work) if work else 1.0
