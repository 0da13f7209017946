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
    found = np.full(len(correlation), -1, dtype=np.int64)
    found[at >= 0] = times[order][at[at >= 0]]
    return found


class StepMap:
    """Answers to which step an activity belongs."""

    def __init__(self, spans: StepSpans) -> None:
        self.steps = spans.cpu or spans.gpu
        self._by_launch = _Intervals(spans.cpu)
        self._by_gpu_time = _Intervals(spans.gpu)

    def of_time(self, start: Ints) -> Ints:
        """The step whose CPU span holds `start`; -1 outside."""
        return self._by_launch.find(start)

    def of_gpu(self, start: Ints, launched: Ints) -> Ints:
        """By launch time where it is known, else by the step's span on the GPU."""
        step = self._by_launch.find(launched)
        left = step == NO_STEP
        step[left] = self._by_gpu_time.find(start[left])
        return step


class _Intervals:
    def __init__(self, steps: Sequence[Step]) -> None:
        ordered = sorted(steps, key=lambda step: step.start_ns)
        self._starts = np.array([step.start_ns for step in ordered], dtype=np.int64)
        self._ends = np.array([step.end_ns for step in ordered], dtype=np.int64)
        self._numbers = np.array([step.step for step in ordered], dtype=np.int64)

    def find(self, times: Ints) -> Ints:
        at = holding(self._starts, self._ends, times)
        found = np.full(len(times), NO_STEP, dtype=np.int64)
        found[at >= 0] = self._numbers[at[at >= 0]]
        return found


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
    numbers = np.array([entry.step for entry in steps], dtype=np.int64)
    order = np.argsort(numbers, kind="stable")
    at = first_of(numbers[order], step)
    known = (at >= 0) & kernel
    every = np.bincount(at[known], minlength=len(steps))
    nodes = np.bincount(at[known & graph], minlength=len(steps))
    shares = np.full(len(steps), -1.0)
    shares[order] = np.where(every > 0, nodes / np.maximum(every, 1), -1.0)
    return tuple(
        entry.changed(graph_share=share)
        for entry, share in zip(steps, shares.tolist(), strict=True)
    )
