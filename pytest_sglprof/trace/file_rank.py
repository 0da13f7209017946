"""Whose a torch trace is: its file's name first, then what the file says itself.

A kernel's `pid` is the index of its device, which is not the rank: it is never asked. Only
SGLang's merged files write ranks into it.
"""

from __future__ import annotations

import re
from pathlib import Path

import msgspec

from pytest_sglprof.errors import TraceError
from pytest_sglprof.ranks import Rank

_FILE_RANK = re.compile(r"(?:^|[-_.])rank[-_]?(\d{1,6})(?=[-_.])")
_MERGED_PID = re.compile(r"^\[((?:[A-Z]+\d+-?)+)\]")


class _Distributed(msgspec.Struct):
    rank: int | None = None
    world_size: int | None = None


_DISTRIBUTED = msgspec.json.Decoder(_Distributed)


def rank_of_file(path: Path, distributed: bytes) -> tuple[str, list[str]]:
    """The label of a file's rank, and notes where name and content contradict each other.

    distributed: JSON text of the trace's `distributedInfo`, empty where it has none. A file
    of one process that tells nothing is TP0. Raises `TraceError` when there were several
    processes and nothing tells which this was.
    """
    told = _decoded(distributed)
    several = (told.world_size or 1) > 1
    named = _named(path.name)
    if named is not None:
        # With DP or PP in the name the global rank is another number than tp.
        alone = named.pp is None and named.dp is None
        if alone and several and told.rank is not None and told.rank != named.tp:
            return named.label, [
                f"{path.name}: its name says {named.label}, its distributedInfo rank {told.rank} "
                f"of {told.world_size}; the name was believed"
            ]
        return named.label, []
    if told.rank is None and several:
        raise TraceError(
            f"{path} does not tell its rank: neither its name nor its distributedInfo",
            expected="a name such as ID-TP-1.trace.json.gz",
            hint="rename the file after its rank",
        )
    return Rank(tp=max(told.rank or 0, 0)).label, []


def rank_of_pid(pid: bytes) -> str:
    """`"[TP01-DP00] 83"` of a merged file → `DP0 TP1`; empty for other pids (JSON text)."""
    match = _MERGED_PID.match(pid.decode("utf-8", "replace").strip('"'))
    if match is None:
        return ""
    parts = [re.sub(r"(\D)0*(\d+)$", r"\1\2", part) for part in match[1].split("-")]
    rank = Rank.parse(" ".join(parts))
    return rank.label if rank is not None else match[1]


def _named(name: str) -> Rank | None:
    if (rank := Rank.from_file_name(name)) is not None:
        return rank
    match = _FILE_RANK.search(name)
    return Rank(tp=int(match[1])) if match else None


def _decoded(distributed: bytes) -> _Distributed:
    try:
        return _DISTRIBUTED.decode(distributed) if distributed else _Distributed()
    except msgspec.DecodeError:  # null, or fields of other types
        return _Distributed()
