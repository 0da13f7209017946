"""Which operator and which line of Python each kernel comes from, in a trace with stacks.

A torch trace of a window `with_stack=True` has the calls of Python functions as spans, beside those
of operators. A kernel belongs to the spans that were open on the thread that launched it at the
moment of the launch; a graph's kernels belong to the line that replays the graph.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import msgspec

from pytest_sglprof._trace.kernel_names import normalise
from pytest_sglprof._trace.torch.events import (
    GPU_KINDS,
    KIND_OF_CATEGORY,
    LAUNCH,
    OPERATOR,
    SUBMITTED,
    arguments,
    ns,
)
from pytest_sglprof._trace.torch.salvage import Document, read_whole

PYTHON = "python_function"
# Functions of SGLang name a kernel best, then those of other libraries.
_IN_SGLANG = re.compile(r"(?:^|/)(?=sglang/)(?!.*/sglang/)")
_OF_RUNTIME = re.compile(
    r"<|nn\.Module: |(?:\S*/)?(?:torch|triton)/|[^/]*$|\S*/lib/python[^/]*/[^/]*$"
)


class SourceLine(msgspec.Struct, frozen=True):
    """What one function of Python launches of one kernel.

    kernel: its short name. operator: the innermost one around the launch, "" for none. line:
    "file(line): function", where the innermost function of SGLang, else of another library, else
    any begins; "" where no stack is known. total_ns: time of its calls (of an operator of a CPU,
    without those inside of it); count: calls.
    """

    kernel: str
    operator: str
    line: str
    total_ns: int
    count: int


class _Event(msgspec.Struct, gc=False):
    ph: str = ""
    cat: str = ""
    name: str = ""
    ts: msgspec.Raw = msgspec.Raw(b"")
    dur: msgspec.Raw = msgspec.Raw(b"")
    pid: int | str | float | None = None
    tid: int | str | float | None = None
    args: msgspec.Raw = msgspec.Raw(b"{}")


_DOCUMENT = msgspec.json.Decoder(Document[_Event] | list[_Event])


class _Launch(NamedTuple):
    """A call that launches work, at a time in ns."""

    at: int
    correlation: int


@dataclass
class _Span:
    """A call of an operator or of a Python function; ns. inner: time of operators inside of it."""

    begin: int
    end: int
    name: str
    is_operator: bool
    inner: int = 0


def source_lines(path: Path) -> tuple[SourceLine, ...]:
    """What each line launched, the longest first; empty for a trace without stacks.

    Reads the whole file into memory, so it is for windows of a few steps. Raises `TraceError`.
    """
    threads: dict[tuple[object, object], tuple[list[_Span], list[_Launch]]] = {}
    kernels: dict[int, list[tuple[str, int]]] = {}
    has_stacks = False
    for event in read_whole(path, _DOCUMENT).events:
        kind, begin, dur = KIND_OF_CATEGORY.get(event.cat), ns(event.ts), ns(event.dur)
        if event.ph != "X" or begin is None or dur is None or dur < 0:
            continue
        if kind in GPU_KINDS:
            kernels.setdefault(arguments(event.args).correlation, []).append((event.name, dur))
            continue
        spans, launches = threads.setdefault((event.pid, event.tid), ([], []))
        if kind == LAUNCH:
            launches.append(_Launch(begin, arguments(event.args).correlation))
        elif kind == OPERATOR or event.cat == PYTHON:
            has_stacks = has_stacks or event.cat == PYTHON
            spans.append(_Span(begin, begin + dur, event.name, kind == OPERATOR))
    if not has_stacks:
        return ()
    totals: dict[tuple[str, str, str], list[int]] = {}
    for spans, launches in threads.values():
        rows = _launched(spans, launches, kernels) if kernels else _ran(spans)
        for kernel, operator, line, dur in rows:
            total = totals.setdefault((normalise(kernel), operator, line), [0, 0])
            total[0] += dur
            total[1] += 1
    lines = (SourceLine(*key, *total) for key, total in totals.items())
    return tuple(sorted(lines, key=lambda row: (-row.total_ns, row.kernel, row.line)))


_Row = tuple[str, str, str, int]  # kernel, operator, line, ns


def _launched(
    spans: list[_Span], launches: list[_Launch], kernels: dict[int, list[tuple[str, int]]]
) -> Iterator[_Row]:
    """The kernels of the launches of one thread."""
    following = iter(sorted(launches))
    launch = next(following, None)
    open_spans: list[_Span] = []
    for span in (*_in_order(spans), None):
        while launch is not None and (span is None or launch.at < span.begin):
            _close(open_spans, launch.at)
            for name, dur in kernels.get(launch.correlation, ()):
                operators = [each.name for each in open_spans if each.is_operator]
                yield name, operators[-1] if operators else "", _line(open_spans), dur
            launch = next(following, None)
        if span is not None:
            _close(open_spans, span.begin)
            open_spans.append(span)


def _ran(spans: list[_Span]) -> Iterator[_Row]:
    """The operators of one thread of a CPU, each with the line that called it."""
    open_spans: list[_Span] = []
    lines = []
    spans = [span for span in spans if not (span.is_operator and span.name.startswith(SUBMITTED))]
    for span in _in_order(spans):
        _close(open_spans, span.begin)
        if span.is_operator:
            outer = [each for each in open_spans if each.is_operator]
            if outer:
                outer[-1].inner += span.end - span.begin
            lines.append((span, _line(open_spans)))
        open_spans.append(span)
    for span, line in lines:
        yield span.name, span.name, line, max(span.end - span.begin - span.inner, 0)


def _in_order(spans: list[_Span]) -> list[_Span]:
    return sorted(spans, key=lambda span: (span.begin, -span.end))


def _close(open_spans: list[_Span], moment: int) -> None:
    while open_spans and open_spans[-1].end <= moment:
        open_spans.pop()


def _line(open_spans: list[_Span]) -> str:
    """The line that the innermost of these calls of Python is best named by."""
    frames = [span.name for span in reversed(open_spans) if not span.is_operator]
    named = [frame for frame in frames if not _OF_RUNTIME.match(frame)]
    of_sglang = [cut for frame in named if (cut := _IN_SGLANG.search(frame))]
    if of_sglang:
        return of_sglang[0].string[of_sglang[0].end() :]
    return (named or frames or [""])[0]
