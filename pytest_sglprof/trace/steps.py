"""Steps: which forward pass an activity belongs to, from SGLang's `step[...]` spans."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pytest_sglprof.trace.arrays import Flags, Ints, first_of, holding
from pytest_sglprof.trace.kineto import Annotation
from pytest_sglprof.trace.table import NO_STEP, UNKNOWN_STAGE, Step

_STEP = re.compile(r"step\[\s*(\w+)([^\]]*)\]")
_PAIR = re.compile(r"(\w+)=(-?\d{1,18})\b")
STAGES = {
    "DECODE": "decode",
    "VERIFY": "decode",
    "TARGET_VERIFY": "decode",
    "DRAFT": "decode",
    "DRAFT_LOOP": "decode",
    "DRAFT_EXTEND": "decode",
    "EXTEND": "prefill",
    "PREFILL": "prefill",
    "MIXED": "mixed",
    "IDLE": "idle",
}
DRAFTS = 2**40  # beyond every forward id


@dataclass(frozen=True)
class StepSpans:
    """Steps by the CPU's spans and, where the profiler projected them, by the GPU's."""

    cpu: tuple[Step, ...]
    gpu: tuple[Step, ...]


def launch_times(ids: Ints, times: Ints, correlation: Ints) -> Ints:
    """The time of the first launch with each correlation id, -1 where there was none.

    An id of 0 or less ties nothing.
    """
    order = np.argsort(ids, kind="stable")
    at = np.where(correlation > 0, first_of(ids[order], correlation), -1)
    return _taken(times[order], at, -1)


class StepIndex:
    """Finds the steps of one rank, by time or by number."""

    def __init__(self, steps: Sequence[Step]) -> None:
        times = [(step.start_ns, step.end_ns, step.step) for step in steps]
        starts, ends, self._numbers = np.array(times, dtype=np.int64).reshape(-1, 3).T
        self._by_start = np.argsort(starts, kind="stable")
        self._starts = starts[self._by_start]
        # A step without length holds the moment at which it stands.
        self._ends = np.maximum(ends, starts + 1)[self._by_start]
        self._by_number = np.argsort(self._numbers, kind="stable")

    def holding(self, times: Ints) -> Ints:
        """The index of the step that holds each time, -1 for none; of several the latest."""
        return _taken(self._by_start, holding(self._starts, self._ends, times), -1)

    def of(self, times: Ints) -> Ints:
        """The number of the step that holds each time, -1 for none."""
        return _taken(self._numbers, self.holding(times), NO_STEP)

    def numbered(self, numbers: Ints) -> Ints:
        """The index of the step with each number, -1 for none; of several the first."""
        at = first_of(self._numbers[self._by_number], numbers)
        return _taken(self._by_number, at, -1)


def _taken(values: Ints, at: Ints, otherwise: int) -> Ints:
    """`values[at]`, and `otherwise` where `at` is -1."""
    taken = np.full(len(at), otherwise, dtype=np.int64)
    taken[at >= 0] = values[at[at >= 0]]
    return taken


def step_spans(spans: Sequence[Annotation]) -> StepSpans:
    """Numbers the `step[...]` spans: by `step_key` where all have distinct ones, else by order."""
    cpu = _numbered([span for span in spans if not span.gpu])
    gpu = _numbered([span for span in spans if span.gpu])
    if cpu and gpu and len(cpu) != len(gpu) and not all(s.forward_id >= 0 for s in cpu + gpu):
        gpu = ()  # without a key, spans of different number cannot be told to be the same step
    return StepSpans(cpu, gpu)


def _numbered(spans: Sequence[Annotation]) -> tuple[Step, ...]:
    found = [step for span in spans if (step := parse_step(span)) is not None]
    found.sort(key=lambda step: step.start_ns)
    keys = [step_key(step) for step in found]
    if found and min(keys) >= 0 and len(set(keys)) == len(keys):
        return tuple(step.changed(step=key) for step, key in zip(found, keys, strict=True))
    return tuple(step.changed(step=number) for number, step in enumerate(found))


def is_step(name: str) -> bool:
    """Whether a span of this name is a step."""
    return _STEP.match(name) is not None


def step_key(step: Step) -> int:
    """The number that means the same forward pass on every rank; -1 without a forward id.

    The target and the draft model of speculative decoding count their passes each by
    itself, so a draft's number is moved out of the way.
    """
    if step.forward_id < 0:
        return NO_STEP
    return step.forward_id + (DRAFTS if step.substage.startswith("DRAFT") else 0)


def parse_step(span: Annotation) -> Step | None:
    """Reads `step[DECODE bs=4]`, `step[EXTEND bs=2 toks=14721 forward_id=7]`; None otherwise.

    With detailed annotations `c_sk` and `g_sk` are the KV tokens of the batch's prefills and
    decodes. `raw_bs` beside `bs` tells that `bs` is padded for a graph.
    """
    match = _STEP.match(span.name)
    if match is None:
        return None
    values = {key: int(value) for key, value in _PAIR.findall(match[2])}
    bs = values.get("raw_bs", values.get("bs", -1))
    substage = match[1].upper()
    stage = STAGES.get(substage, UNKNOWN_STAGE)
    kv = [values[key] for key in ("c_sk", "g_sk") if key in values]
    return Step(
        step=NO_STEP,
        stage=stage,
        start_ns=span.start,
        end_ns=span.start + span.dur,
        batch_size=bs,
        tokens=values.get("toks", bs if stage == "decode" else -1),
        forward_id=values.get("forward_id", -1),
        substage=substage,
        padded_batch=values.get("bs", -1) if "raw_bs" in values else -1,
        kv_tokens=sum(kv) if kv else -1,
    )


def with_graph_share(
    steps: Sequence[Step], step: Ints, kernel: Flags, graph: Flags
) -> tuple[Step, ...]:
    """The steps with the share of their kernels that are nodes of a graph.

    step, kernel, graph: the step of each activity, whether it is a kernel, and whether a
    graph's node. A rank without any node tells nothing: old profilers, and those of AMD,
    do not mark nodes.
    """
    if not steps or not graph.any():
        return tuple(steps)
    at = StepIndex(steps).numbered(step)
    known = (at >= 0) & kernel
    every = np.bincount(at[known], minlength=len(steps))
    nodes = np.bincount(at[known & graph], minlength=len(steps))
    shares = np.where(every > 0, nodes / np.maximum(every, 1), -1.0)
    return tuple(
        entry.changed(graph_share=share)
        for entry, share in zip(steps, shares.tolist(), strict=True)
    )
