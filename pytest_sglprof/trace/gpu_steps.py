"""To which step a GPU activity belongs, by the best evidence that the trace has.

Kineto projects a CPU annotation onto every stream that its kernels ran on; the two share
an `External id`. Where those projections exist they are the answer, and the launches need
not be read. Else the launch of an activity (same correlation id) lies in the step's span
on the CPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from pytest_sglprof.trace.arrays import Ints, holding
from pytest_sglprof.trace.kineto import Annotation
from pytest_sglprof.trace.steps import StepIndex, is_step, step_spans
from pytest_sglprof.trace.table import NO_STEP, Step

PROJECTED_SHARE = 0.5  # of the steps; fewer projections mean that the profiler made none


class TraceSteps:
    """The steps of one rank of a torch trace, told by its annotations."""

    def __init__(self, annotations: Sequence[Annotation]) -> None:
        ordered = sorted((a for a in annotations if is_step(a.name)), key=lambda a: a.start)
        cpu = [a for a in ordered if not a.gpu]
        spans = step_spans(ordered)
        self.steps = spans.cpu or spans.gpu
        """All of them, in order of their start."""
        self._by_launch = StepIndex(spans.cpu)
        self._by_gpu_time = StepIndex(spans.gpu)
        self._projections = Projections(spans.cpu, cpu, [a for a in ordered if a.gpu])

    def of_time(self, start: Ints) -> Ints:
        """The step whose span on the CPU holds `start`, else -1."""
        return self._by_launch.of(start)

    def of_gpu(self, start: Ints, stream: npt.NDArray[Any], launched: Ints) -> Ints:
        """The step of each GPU activity, else -1. launched: when the CPU did it, -1 unknown."""
        if self._projections.complete:
            return self._projections.find(start, stream)
        step = self._by_launch.of(launched)
        left = step == NO_STEP
        step[left] = self._by_gpu_time.of(start[left])
        left = step == NO_STEP
        step[left] = self._projections.find(start[left], stream[left])
        return step


class Projections:
    """The steps' spans on the GPU's streams.

    steps: numbered steps; annotations: the CPU annotation of each, in the same order.
    """

    def __init__(
        self, steps: Sequence[Step], cpu: Sequence[Annotation], gpu: Sequence[Annotation]
    ) -> None:
        number_of = {
            (span.external, span.name): step.step
            for step, span in zip(steps, cpu, strict=True)
            if span.external >= 0
        }
        streams: dict[int, list[tuple[int, int, int]]] = {}
        for span in gpu:
            number = number_of.get((span.external, span.name))
            if number is not None and _on_stream(span):
                entry = (span.start, span.start + span.dur, number)
                streams.setdefault(int(span.thread), []).append(entry)
        self.complete = projected(cpu, gpu)
        self._streams = {
            stream: np.array(sorted(entries), dtype=np.int64) for stream, entries in streams.items()
        }

    def find(self, start: Ints, stream: npt.NDArray[Any]) -> Ints:
        """The step whose projection on the activity's own stream holds its start, else -1."""
        found = np.full(len(start), NO_STEP, dtype=np.int64)
        for number, spans in self._streams.items():
            rows = np.flatnonzero(stream == number)
            at = holding(spans[:, 0], spans[:, 1], start[rows])
            found[rows[at >= 0]] = spans[at[at >= 0], 2]
        return found


def projected(cpu: Sequence[Annotation], gpu: Sequence[Annotation]) -> bool:
    """Whether the profiler projected the CPU's steps onto the GPU, at least half of them."""
    known = {(span.external, span.name) for span in cpu if span.external >= 0}
    found = {(span.external, span.name) for span in gpu if _on_stream(span)}
    return len(known & found) >= PROJECTED_SHARE * len(cpu) > 0


def _on_stream(span: Annotation) -> bool:
    return span.thread.lstrip("-").isdigit()
