"""Self time: what a nested span takes itself, without the spans inside it.

CPU operators and NVTX ranges nest, so the sum of their durations counts time again and
again; the sum of their self times is the length of the union of the outermost ones.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence


def self_times(spans: Sequence[tuple[int, int, Hashable]]) -> list[int]:
    """Self time of each `(start, dur, thread)`, in the same order and unit (integers).

    Spans of one thread nest. One that overlaps its predecessor without lying inside it
    (clocks are not perfect) counts as nested in it up to its end.
    """
    own = [dur for _, dur, _ in spans]
    order = sorted(range(len(spans)), key=lambda i: (spans[i][0], -spans[i][1]))
    stacks: dict[Hashable, list[tuple[int, int]]] = {}
    for index in order:
        start, dur, thread = spans[index]
        end = start + dur
        stack = stacks.setdefault(thread, [])
        while stack and stack[-1][1] <= start:
            stack.pop()
        if stack:
            parent, parent_end = stack[-1]
            own[parent] -= min(end, parent_end) - start
        stack.append((index, end))
    return own
