"""Self time: what a nested span takes itself, without the spans inside it.

CPU operators and NVTX ranges nest, so the sum of their durations counts time again and
again; the sum of their self times is the length of the union of the outermost ones.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence


def self_times(spans: Sequence[tuple[int, int, Hashable]]) -> list[int]:
    """Self time of each `(start, dur, thread)`, in the same order and unit (integers).

    Spans of one thread nest. Where one overlaps another without lying inside it (clocks are
    not perfect), the time belongs to the one that began last, so that the sum of a thread
    is always the length of its union.
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
        taken = start  # up to here, the new span's time was taken from the spans around it
        for outer, outer_end in reversed(stack):
            if taken >= end:
                break
            if outer_end > taken:
                own[outer] -= min(end, outer_end) - taken
                taken = min(end, outer_end)
        stack.append((index, end))
    return own
