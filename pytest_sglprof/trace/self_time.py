"""Self time: what a nested span takes itself, without the spans inside it.

CPU operators and NVTX ranges nest, so the sum of their durations counts time again and
again; the sum of their self times is the length of the union of the outermost ones.
"""

from __future__ import annotations

import numpy as np

from pytest_sglprof.trace.arrays import Ints


def self_times(start: Ints, dur: Ints, thread: Ints) -> Ints:
    """Self time of each span, ns, shape (spans,).

    Spans of one thread nest. Where one overlaps another without lying inside it (clocks are
    not perfect), the time belongs to the one that began last, so that the sum of a thread
    is always the length of its union.
    """
    order = np.lexsort((-dur, start, thread))
    own = dur[order].tolist()
    starts, ends = start[order].tolist(), (start + dur)[order].tolist()
    threads = thread[order].tolist()
    open_spans: list[int] = []
    for at, (begin, end) in enumerate(zip(starts, ends, strict=True)):
        if at and threads[at] != threads[at - 1]:
            open_spans.clear()
        while open_spans and ends[open_spans[-1]] <= begin:
            open_spans.pop()
        taken = begin  # up to here, the new span's time was taken from the spans around it
        for outer in reversed(open_spans):
            if taken >= end:
                break
            if ends[outer] > taken:
                stop = min(end, ends[outer])
                own[outer] -= stop - taken
                taken = stop
        open_spans.append(at)
    times = np.empty(len(own), dtype=np.int64)
    times[order] = own
    return times
