"""Torch traces by `json` and exact decimals only: the truth that the reader is held against."""

from __future__ import annotations

import gzip
import heapq
import itertools
import json
from collections import defaultdict
from decimal import Decimal
from functools import lru_cache
from pathlib import Path

GPU = {"kernel": "kernel", "gpu_memcpy": "memcpy", "gpu_memset": "memset"}
GPU |= {"memcpy": "memcpy", "memset": "memset"}


def document(path: Path) -> dict:
    data = path.read_bytes()
    if data[:2] == b"\x1f\x8b":
        data = gzip.decompress(data)
    return _parsed(data)


@lru_cache(maxsize=8)
def _parsed(data: bytes) -> dict:
    return json.loads(data, parse_float=Decimal)


def ns(microseconds: object) -> int:
    """Exact, and it fails where a file tells more than whole ns."""
    value = Decimal(str(microseconds)) * 1000
    whole = int(value)
    assert value == whole
    return whole


def events(path: Path, *, categories: set[str] | dict[str, str]) -> list[dict]:
    return [
        event
        for event in document(path)["traceEvents"]
        if event.get("ph") == "X" and str(event.get("cat")).lower() in categories
    ]


def gpu_rows(path: Path) -> list[tuple[str, str, int, int]]:
    """Sorted (name, kind, start, dur) of each GPU activity; absolute ns."""
    base = int(document(path).get("baseTimeNanoseconds", 0))
    return sorted(
        (event["name"], GPU[event["cat"].lower()], base + ns(event["ts"]), ns(event["dur"]))
        for event in events(path, categories=GPU)
    )


def totals(pairs: list[tuple[str, int]]) -> dict[str, tuple[int, int]]:
    """name → (count, sum of ns)."""
    found: dict[str, list[int]] = defaultdict(list)
    for name, dur in pairs:
        found[name].append(dur)
    return {name: (len(durs), sum(durs)) for name, durs in found.items()}


def operators(path: Path) -> list[tuple[str, str, int, int]]:
    """(thread, name, start, end) of CPU operators without the asynchronous `c10d::*`."""
    return [
        (f"{event['pid']}/{event['tid']}", event["name"], ns(event["ts"]), end(event))
        for event in events(path, categories={"cpu_op"})
        if not event["name"].startswith("c10d::")
    ]


def end(event: dict) -> int:
    return ns(event["ts"]) + ns(event["dur"])


def collectives(path: Path) -> list[tuple[str, int]]:
    return [
        (event["name"], ns(event["dur"]))
        for event in events(path, categories={"user_annotation"})
        if event["name"].startswith("gloo:")
    ]


def self_time_of_each(spans: list[tuple[int, int]]) -> list[int]:
    """Each moment belongs to the span that began last: a sweep over all edges, no stack."""
    order = sorted(range(len(spans)), key=lambda i: (spans[i][0], -spans[i][1]))
    edges = sorted({edge for span in spans for edge in span})
    own = [0] * len(spans)
    active: list[tuple[int, int]] = []
    coming = iter([*enumerate(order), (len(order), None)])
    place, index = next(coming)
    for left, right in itertools.pairwise(edges):
        while index is not None and spans[index][0] <= left:
            heapq.heappush(active, (-place, index))
            place, index = next(coming)
        while active and spans[active[0][1]][1] <= left:
            heapq.heappop(active)
        if active:
            own[active[0][1]] += right - left
    return own


def union(spans: list[tuple[int, int]]) -> int:
    """Length of the union of (start, end) intervals."""
    total, reached = 0, None
    for start, stop in sorted(spans):
        if reached is None or start > reached:
            total += stop - start
            reached = stop
        elif stop > reached:
            total += stop - reached
            reached = stop
    return total


def cpu_totals(path: Path) -> dict[str, tuple[int, int]]:
    """name → (count, ns): self time of operators, whole time of collectives."""
    threads: dict[str, list[tuple[str, int, int]]] = defaultdict(list)
    for thread, name, start, stop in operators(path):
        threads[thread].append((name, start, stop))
    pairs = collectives(path)
    for found in threads.values():
        own = self_time_of_each([(start, stop) for _, start, stop in found])
        pairs += [(name, dur) for (name, _, _), dur in zip(found, own, strict=True)]
    return totals(pairs)
