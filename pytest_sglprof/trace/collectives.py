"""What kind of communication a kernel is, by its name: only some let a straggler be seen."""

from __future__ import annotations

import re
from typing import Literal

CollectiveKind = Literal["collective", "all_to_all", "p2p", "fused"]

# The first that is found decides. A fused kernel computes and communicates, so its time is
# neither; between point-to-point peers the receiver always waits; in an all-to-all the
# bytes differ from rank to rank. What is left is symmetric: everybody waits for the last.
_KINDS: tuple[tuple[CollectiveKind, str], ...] = (
    (
        "fused",
        r"all_?reduce_?(fusion|rms|add|norm|residual)|fused_?(all_?reduce|allreduce|rs|ag|moe_?ep)"
        r"|(rms_?norm|gemm).*(all_?reduce|reduce_?scatter|all_?gather)"
        r"|(all_?reduce|reduce_?scatter|all_?gather).*(rms_?norm|gemm|lamport)|moe_?finalize_?all",
    ),
    (
        "all_to_all",
        r"all_?to_?all|a2a|deep_?ep|(intra|inter)node::|low_latency.*(dispatch|combine)"
        r"|(moe|ep|mooncake)_?\w*?(dispatch|combine)|mooncake",
    ),
    ("p2p", r"send_?recv|isend|irecv|gloo:(send|recv)|\b(send|recv)\b|p2p(?!_?all)"),
)
_COMPILED = tuple((kind, re.compile(pattern, re.IGNORECASE)) for kind, pattern in _KINDS)


def collective_kind(name: str) -> CollectiveKind:
    """The kind of a communication kernel (any name; full names tell most)."""
    for kind, pattern in _COMPILED:
        if pattern.search(name):
            return kind
    return "collective"


# The root of these waits for nobody, and nobody need wait for the rest.
_ROOTED = re.compile(
    r"broadcast|(?<!all)(?<!all_)gather|(?<!reduce)(?<!reduce_)scatter"
    r"|(?<!all)(?<!all_)reduce(?!_?scatter|_?[12]stage|_prototype)(?=_Sum|_Max|_Min|_Prod|$)",
    re.IGNORECASE,
)
_SYMMETRIC = re.compile(r"all_?(reduce|gather)|reduce_?scatter|cross_device_reduce|barrier", re.I)


def is_symmetric(name: str) -> bool:
    """True for a collective in which every rank waits for the last one to arrive."""
    if collective_kind(name) != "collective":
        return False
    return _SYMMETRIC.search(name) is not None or _ROOTED.search(name) is None
