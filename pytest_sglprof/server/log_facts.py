"""Facts about a window's forward passes from the server's log: rebalances, accept lengths."""

from __future__ import annotations

from collections.abc import Iterable

from pytest_sglprof.server.log_lines import EntryReader, read_batch
from pytest_sglprof.values import AcceptLength, ServerFacts


def read_log_facts(lines: Iterable[str], until: float) -> ServerFacts:
    """The facts in `lines`, which were written until the Unix time `until` (s).

    Rebalances of all ranks that overlap are one; one without an end lasts until `until`.
    """
    spans: list[tuple[float, float]] = []
    running: dict[str, float] = {}
    accepted: list[AcceptLength] = []
    captures = 0
    for entry in EntryReader().read(lines):
        latest = entry.time + entry.resolution
        if entry.kind == "rebalance_start":
            running.setdefault(entry.tags, entry.time)
        elif entry.kind == "rebalance_end":
            spans.append((running.pop(entry.tags, entry.time), latest))
        elif entry.kind == "capture":
            captures += 1
        elif entry.kind == "decode" and (length := read_batch(entry).accept_length) is not None:
            rank = entry.rank
            accepted.append(AcceptLength(latest, rank.dp if rank else None, length))
    spans += [(begins, until) for begins in running.values()]
    return ServerFacts(tuple(_merged(spans)), tuple(accepted), captures)


def _merged(spans: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    whole: list[tuple[float, float]] = []
    for begins, ends in sorted(spans):
        if whole and begins <= whole[-1][1]:
            whole[-1] = (whole[-1][0], max(ends, whole[-1][1]))
        else:
            whole.append((begins, ends))
    return whole
