"""What the server's log tells of the forward passes of a window: rebalances, accept lengths.

SGLang 0.5.23 writes `[EPLBManager] rebalance start` and `[EPLBManager] rebalance end` on every
rank, `accept len: 2.35` in the decode lines of the ranks that log them, and
`Capture … begin` around the capture of graphs.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterable

from pytest_sglprof.ranks import Rank
from pytest_sglprof.values import AcceptLength, ServerFacts

_LINE = re.compile(r"^\[(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d)(\.\d+)?((?: [A-Z_]+\d+)*)\] (.*)$")
_ACCEPT = re.compile(r"(?<!block )\baccept len: (\d+(?:\.\d+)?)")
_CAPTURE = re.compile(r"Capture \w.* begin\b|Capture (?:cuda|cpu) graph")
SECOND = 1.0  # resolution of a stamp without SGLANG_LOG_MS=1


def read_log_facts(lines: Iterable[str], until: float) -> ServerFacts:
    """The facts in `lines`, which were written until the Unix time `until` (s).

    Stamps are taken as this machine's local time, as the server writes them. Rebalances of
    all ranks that overlap are one; one without an end lasts until `until`.
    """
    spans: list[tuple[float, float]] = []
    running: dict[str, float] = {}
    accepted: list[AcceptLength] = []
    captures = 0
    for line in lines:
        match = _LINE.match(line)
        if match is None:
            continue
        stamp, part, tags, text = match.groups()
        begins = time.mktime(time.strptime(stamp, "%Y-%m-%d %H:%M:%S")) + float(part or 0.0)
        ends = begins if part else begins + SECOND
        if text.startswith("[EPLBManager] rebalance start"):
            running.setdefault(tags, begins)
        elif text.startswith("[EPLBManager] rebalance end"):
            spans.append((running.pop(tags, begins), ends))
        elif _CAPTURE.match(text):
            captures += 1
        elif text.startswith("Decode batch") and (found := _ACCEPT.search(text)):
            rank = Rank.parse(tags.strip())
            accepted.append(AcceptLength(ends, rank.dp if rank else None, float(found[1])))
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
