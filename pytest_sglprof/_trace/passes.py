"""The passes of one rank: its `step[...]` spans read, and numbered alike on every rank."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pytest_sglprof._trace.table import NO_STEP, UNKNOWN_STAGE, Step
from pytest_sglprof._trace.torch.events import Annotation

_STEP = re.compile(r"step\[\s*(\w+)([^\]]*)\]")
_PAIR = re.compile(r"(\w+)=(-?\d{1,18})\b")
STAGES = {
    "DECODE": "decode",
    "VERIFY": "decode",
    "TARGET_VERIFY": "decode",
    "DRAFT": "decode",
    "DRAFT_LOOP": "decode",
    "DRAFT_EXTEND": "decode",
    "DRAFT_EXTEND_V2": "decode",
    "EXTEND": "prefill",
    "PREFILL": "prefill",
    "SPLIT_PREFILL": "prefill",
    "MIXED": "mixed",
    "IDLE": "idle",
}
DRAFTS = 2**40  # beyond every forward id
EPOCH = 2**42  # beyond every number of a pass in one epoch


@dataclass(frozen=True)
class StepSpans:
    """The numbered spans of the CPU and, where the profiler projected them, of the GPU.

    Each in order of start; several spans may be of one pass, and then have its number.
    annotations: that of each step in `cpu`.
    """

    cpu: tuple[Step, ...]
    gpu: tuple[Step, ...]
    annotations: tuple[Annotation, ...] = ()


def step_spans(spans: Sequence[Annotation]) -> StepSpans:
    """Numbers the `step[...]` spans by their pass, or by order where none has a forward id."""
    cpu = _numbered([span for span in spans if not span.gpu])
    on_gpu = [span for span in spans if span.gpu]
    steps = tuple(step for _, step in cpu)
    if any(step.forward_id >= 0 for step in steps):
        gpu = _numbered_as(on_gpu, cpu)
    else:
        gpu = tuple(step for _, step in _numbered(on_gpu))
        if steps and len(steps) != len(gpu):
            gpu = ()  # without ids, spans of different number cannot be told to be the same step
    return StepSpans(steps, gpu, tuple(span for span, _ in cpu))


def _numbered(spans: Sequence[Annotation]) -> list[tuple[Annotation, Step]]:
    """The steps with their numbers, in order of start, without those of an unknown pass."""
    pairs = [(span, step) for span in spans if (step := parse_step(span)) is not None]
    pairs.sort(key=lambda pair: (pair[1].start_ns, -pair[1].end_ns))
    numbers = pass_numbers([step for _, step in pairs])
    return [
        (span, step.changed(step=number))
        for (span, step), number in zip(pairs, numbers, strict=True)
        if number != NO_STEP
    ]


def pass_numbers(steps: Sequence[Step]) -> list[int]:
    """The number of each step's pass, equal on all ranks; by order where no step has an id.

    steps: of one rank, in order of start, of equal starts the longest first. An id that falls
    back (elastic expert parallelism sets it to 0) begins a new epoch, of the target or of the
    draft. A step without id is a part of the pass that encloses it, else of the one before it;
    before the first pass, `NO_STEP`.
    """
    if all(step.forward_id < 0 for step in steps):
        return list(range(len(steps)))
    numbers: list[int] = []
    open_passes: list[tuple[int, int]] = []  # end and number
    before = NO_STEP
    last: dict[int, int] = {}  # of the target and of the draft: the number of the last pass
    for step in steps:
        while open_passes and open_passes[-1][0] <= step.start_ns:
            open_passes.pop()
        if step.forward_id >= 0:
            key = step_key(step)
            model = key // DRAFTS
            latest = last.get(model, key)
            epoch = latest // EPOCH + (key < latest % EPOCH)
            before = last[model] = key + epoch * EPOCH
            open_passes.append((step.end_ns, before))
            numbers.append(before)
        else:
            around = [number for end, number in open_passes if end >= step.end_ns]
            numbers.append(around[-1] if around else before)
    return numbers


def _numbered_as(
    spans: Sequence[Annotation], cpu: Sequence[tuple[Annotation, Step]]
) -> tuple[Step, ...]:
    """The GPU's spans with the numbers of the CPU's spans of which they are projections.

    A pass has one on each stream on which its kernels ran. Where no id ties it to the CPU's span,
    its name does, if that says of which pass it is.
    """
    of_id = {(span.external, span.name): step.step for span, step in cpu if span.external >= 0}
    of_name: dict[str, list[int]] = {}
    for span, step in cpu:
        if step.forward_id >= 0:
            of_name.setdefault(span.name, []).append(step.step)
    times = Counter(span.name for span in spans)
    nth: Counter[str] = Counter()
    steps = []
    for span in sorted(spans, key=lambda span: span.start):
        named = of_name.get(span.name, [])
        number = NO_STEP
        if len(set(named)) == 1 or (named and len(named) == times[span.name]):
            number = named[min(nth[span.name], len(named) - 1)]
        nth[span.name] += 1
        step_read = parse_step(span)
        number = of_id.get((span.external, span.name), number)
        if step_read is not None and number != NO_STEP:
            steps.append(step_read.changed(step=number))
    return tuple(steps)


def passes(steps: Sequence[Step]) -> tuple[Step, ...]:
    """One step of each number: the first, which has the forward id, up to the last one's end.

    steps: of one rank, in order of start.
    """
    first: dict[int, Step] = {}
    ends: dict[int, int] = {}
    for step in steps:
        first.setdefault(step.step, step)
        ends[step.step] = max(step.end_ns, ends.get(step.step, step.end_ns))
    return tuple(
        step if step.end_ns == ends[number] else step.changed(end_ns=ends[number])
        for number, step in first.items()
    )


def is_step(name: str) -> bool:
    """Whether a span of this name is a step."""
    return _STEP.match(name) is not None


def step_key(step: Step) -> int:
    """The number of a forward pass in its epoch; `NO_STEP` without a forward id.

    The target and the draft model of speculative decoding count their passes separately, so
    `DRAFTS` is added to the numbers of drafts.
    """
    if step.forward_id < 0:
        return NO_STEP
    return step.forward_id + (DRAFTS if step.substage.startswith("DRAFT") else 0)


def parse_step(span: Annotation) -> Step | None:
    """Reads `step[DECODE bs=4]`, `step[EXTEND bs=2 toks=14721 forward_id=7]`; None otherwise.

    With detailed annotations (which alone have a forward id) `c_` and `g_` are sums over the
    batch's prefills and decodes: `sq` of query tokens, `sk` of KV tokens, `sqsk` of their
    products. An idle rank has none of them. With `raw_bs`, `bs` is the batch size padded for a
    CUDA graph.
    """
    match = _STEP.match(span.name)
    if match is None:
        return None
    values = {key: int(value) for key, value in _PAIR.findall(match[2])}
    bs = values.get("raw_bs", values.get("bs", -1))
    substage = match[1].upper()
    stage = _stage(substage, bs, values)
    forward_id = values.get("forward_id", -1)
    if not -1 <= forward_id < DRAFTS:
        forward_id = -1
    nothing = 0 if bs == 0 and forward_id >= 0 else -1

    def total(name: str, otherwise: int) -> int:
        parts = [values[key] for key in (f"c_{name}", f"g_{name}") if key in values]
        return sum(parts) if parts else otherwise

    return Step(
        step=NO_STEP,
        stage=stage,
        start_ns=span.start,
        end_ns=span.start + span.dur,
        batch_size=bs,
        tokens=values.get("toks", total("sq", bs if stage == "decode" else nothing)),
        forward_id=forward_id,
        substage=substage,
        padded_batch=values.get("bs", -1) if "raw_bs" in values else -1,
        kv_tokens=total("sk", nothing),
        query_keys=total("sqsk", nothing),
    )


def _stage(substage: str, batch: int, values: Mapping[str, int]) -> str:
    """The stage of a step. `DRAFT` hides the mode of a draft model's pass: the rest tells it."""
    if substage == "DRAFT":
        if batch == 0:
            return "idle"
        if "toks" in values:
            return "prefill"
        if "c" in values and "g" in values:
            return "mixed"
    return STAGES.get(substage, UNKNOWN_STAGE)
