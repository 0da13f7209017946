"""Steps: which forward pass an activity belongs to, from SGLang's `step[...]` spans."""

from __future__ import annotations

import re
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from pytest_sglprof.trace.arrays import Ints, first_of, holding
from pytest_sglprof.trace.table import NO_STEP, UNKNOWN_STAGE, Step

_STEP = re.compile(r"step\[\s*(\w+)([^\]]*)\]")
_PAIR = re.compile(r"(\w+)=(-?\d{1,18})\b")
STAGES = {
    "DECODE": "decode",
    "VERIFY": "decode",
    "TARGET_VERIFY": "decode",
    "DRAFT": "decode",
    "DRAFT_EXTEND": "decode",
    "EXTEND": "prefill",
    "PREFILL": "prefill",
    "MIXED": "mixed",
    "IDLE": "idle",
}


@dataclass(frozen=True)
class Span:
    """An annotation; ns. gpu: on the GPU's own timeline. thread: of the CPU, as written."""

    name: str
    start: int
    end: int
    gpu: bool = False
    thread: str = ""


@dataclass(frozen=True)
class StepSpans:
    """Steps by the CPU's spans and, where the profiler projected them, by the GPU's."""

    cpu: tuple[Step, ...]
    gpu: tuple[Step, ...]


class Launches:
    """When the CPU launched what: correlation id → ns."""

    def __init__(self) -> None:
        self._ids = array("q")
        self._times = array("q")

    def add(self, correlation: int, time: int) -> None:
        """Remembers one launch."""
        self._ids.append(correlation)
        self._times.append(time)

    def times(self, correlation: Ints) -> Ints:
        """The launch time of each correlation id, -1 where there was none."""
        ids = np.array(self._ids, dtype=np.int64)
        return launch_times(ids, np.array(self._times, dtype=np.int64), correlation)


def launch_times(ids: Ints, times: Ints, correlation: Ints) -> Ints:
    """The time of the first launch with each correlation id, -1 where there was none."""
    order = np.argsort(ids, kind="stable")
    at = first_of(ids[order], correlation)
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


def step_spans(spans: Sequence[Span]) -> StepSpans:
    """Numbers the `step[...]` spans: by forward_id where all have distinct ones, else by order."""
    cpu = _numbered([span for span in spans if not span.gpu])
    gpu = _numbered([span for span in spans if span.gpu])
    if cpu and gpu and len(cpu) != len(gpu) and not all(s.forward_id >= 0 for s in cpu + gpu):
        gpu = ()  # without a key, spans of different number cannot be told to be the same step
    return StepSpans(cpu, gpu)


def _numbered(spans: Sequence[Span]) -> tuple[Step, ...]:
    found = [step for span in spans if (step := parse_step(span)) is not None]
    found.sort(key=lambda step: step.start_ns)
    ids = [step.forward_id for step in found]
    if found and min(ids) >= 0 and len(set(ids)) == len(ids):
        return tuple(replace(step, step=step.forward_id) for step in found)
    return tuple(replace(step, step=number) for number, step in enumerate(found))


def is_step(name: str) -> bool:
    """Whether a span of this name is a step."""
    return _STEP.match(name) is not None


def parse_step(span: Span) -> Step | None:
    """Reads `step[DECODE bs=4]`, `step[EXTEND bs=2 toks=14721 forward_id=7]`; None otherwise."""
    match = _STEP.match(span.name)
    if match is None:
        return None
    values = {key: int(value) for key, value in _PAIR.findall(match[2])}
    bs = values.get("bs", -1)
    stage = STAGES.get(match[1].upper(), UNKNOWN_STAGE)
    return Step(
        step=NO_STEP,
        stage=stage,
        start_ns=span.start,
        end_ns=span.end,
        batch_size=bs,
        tokens=values.get("toks", bs if stage == "decode" else -1),
        forward_id=values.get("forward_id", -1),
    )
