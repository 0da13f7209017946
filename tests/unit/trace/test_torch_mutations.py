"""More than a hundred changes of a trace: its rows are those of a plain parse, or it is refused.

A row of the plain parse that is not in the table stands in a note.
"""

from __future__ import annotations

import copy
import json
import random
import re
import sys
from collections.abc import Callable
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any

import pytest

from pytest_sglprof._errors import SglprofError
from pytest_sglprof._trace.torch import assemble
from pytest_sglprof._trace.torch.assemble import read_traces

Trace = dict[str, Any]
Rows = list[tuple[str, int]]
DATA = Path(__file__).parents[2] / "data/fuzz/1-TP-0.trace.json"
TRACE: Trace = json.loads(DATA.read_text())
KERNELS = [at for at, e in enumerate(TRACE["traceEvents"]) if e.get("cat") == "kernel"]
GPU = {"kernel", "gpu_memcpy", "gpu_memset", "memcpy", "memset"}
LONGEST, LARGEST = 2**50, 2**62  # ns, of a duration and of a time; as the documentation says


def rows(text: str) -> Rows | None:
    """Name and ns of each GPU activity, by `json` and decimals alone; None for no document."""
    most = sys.getrecursionlimit()
    sys.setrecursionlimit(8_000)
    try:
        document = json.loads(text, parse_float=Decimal, parse_constant=_refused)
    except (ValueError, RecursionError):
        return None
    finally:
        sys.setrecursionlimit(most)
    events = document if isinstance(document, list) else document.get("traceEvents")
    if not isinstance(events, list) or not all(isinstance(event, dict) for event in events):
        return None
    return sorted(filter(None, map(_row, events)))


def _row(event: Trace) -> tuple[str, int] | None:
    if event.get("ph") != "X" or str(event.get("cat")).lower() not in GPU:
        return None
    try:
        start, dur = (_ns(event[key]) for key in ("ts", "dur"))
    except (KeyError, InvalidOperation, TypeError, ValueError):
        return None
    possible = abs(start) < LARGEST and 0 <= dur < LONGEST
    return (str(event.get("name", "")), dur) if possible else None


def _ns(value: Any) -> int:
    if not isinstance(value, int | Decimal | str) or isinstance(value, bool):
        raise TypeError(value)
    return int((Decimal(str(value).strip()) * 1000 * 2 + 1) // 2)


def _refused(constant: str) -> None:
    raise ValueError(constant)


def read(path: Path) -> tuple[Rows, list[str]]:
    ((_, part),) = read_traces([path])
    names = [part.names[code] for code in part.name_codes]
    is_gpu = part.source == "gpu"
    return sorted(zip(names, map(int, part.dur), strict=True)) if is_gpu else [], [*part.notes]


ODD: dict[str, list[Any]] = {
    "dur": [-5, 0, 1e15, 1e18, 1e30, "12.5", "abc", None, True, [1], {}, 2**63, 2**64 + 5, -(2**63),
            0.0004, 1e-9],
    "ts": [-1, 0, 1e30, 1e19, "5", "x", None, [], 2**63],
    "name": [None, "", 5, ["x"], {"a": 1}, "a" * 100_000, "\u0000", "\ud800x", "=1+1"],
    "cat": [None, 7, "KERNEL", "Kernel", "kernel ", "gpu", ["kernel"], "cpu_op"],
    "ph": ["B", "x", "X ", None, 3, "i"],
    "pid": [None, "abc", -1, 2**70, 1.5, [], "[TP0] 7", "[TP1] \ud800"],
    "tid": [None, "abc", 2**70, []],
    "args": [None, [], "x", {"device": 99}, {"device": -5}, {"device": "0"}, {"device": 2**40},
             {"stream": "7"}, {"stream": 2**70}, {"stream": None}, {"correlation": 1e300}],
}  # fmt: skip
Change = Callable[[Trace], None]


def each(count: int, change: Callable[[Trace], object]) -> Change:
    def apply(trace: Trace) -> None:
        for at in KERNELS[-count:]:
            change(trace["traceEvents"][at])

    return apply


def put(key: str, value: Any) -> Callable[[Trace], object]:
    return lambda event: event.__setitem__(key, copy.deepcopy(value))


def at_top(**values: Any) -> Change:
    return lambda trace: trace.update(values)


DOCUMENTS: dict[str, Change] = {
    **{f"no {key}": each(3, lambda event, key=key: event.pop(key, None)) for key in ODD},
    **{f"{key} {str(v)[:20]!r}": each(3, put(key, v)) for key, odd in ODD.items() for v in odd},
    "all durations negative": each(99, lambda event: event.update(dur=-event["dur"])),
    "all durations strings": each(99, lambda event: event.update(dur=str(event["dur"]))),
    "all categories upper case": each(99, put("cat", "KERNEL")),
    "one duration of an hour": each(1, put("dur", 3.6e9)),
    "times doubled in place": each(99, lambda event: event.update(ts=event["ts"] * 2)),
    "shuffled": lambda trace: random.Random(1).shuffle(trace["traceEvents"]),
    "events twice": lambda trace: trace["traceEvents"].extend(trace["traceEvents"][:]),
    "one kernel many times": lambda trace: trace["traceEvents"].extend(
        [trace["traceEvents"][KERNELS[0]]] * 50
    ),
    "no events": at_top(traceEvents=[]),
    "events null": at_top(traceEvents=None),
    "events an object": at_top(traceEvents={}),
    "events a string": at_top(traceEvents="x"),
    "event null": lambda trace: trace["traceEvents"].insert(5, None),
    "event a list": lambda trace: trace["traceEvents"].insert(5, []),
    "event a string": lambda trace: trace["traceEvents"].insert(5, "x"),
    "event in an event": lambda trace: trace["traceEvents"].insert(
        5, {"a": trace["traceEvents"][KERNELS[0]]}
    ),
    "events elsewhere": lambda trace: trace.update(x=[trace["traceEvents"][KERNELS[0]]] * 5),
    "no base": lambda trace: trace.pop("baseTimeNanoseconds"),
    "base a string": at_top(baseTimeNanoseconds="1790857026000000000"),
    "base too large": at_top(baseTimeNanoseconds=2**70),
    "rank of another": at_top(distributedInfo={"rank": 5, "world_size": 8}),
    "rank a string": at_top(distributedInfo={"rank": "5", "world_size": None}),
    "devices null": at_top(deviceProperties=None),
}


def _with(old: str, new: str) -> str:
    text = json.dumps(TRACE)
    assert text.count(old) >= 1
    return text.replace(old, new, 1)


LAST = json.dumps(TRACE["traceEvents"][KERNELS[-1]])
DUR = f'"dur": {TRACE["traceEvents"][KERNELS[-1]]["dur"]}'
WHOLE = json.dumps(TRACE)
DEEP = '{"a":' * 2_000 + "1" + "}" * 2_000
TEXTS = {
    "as it is": WHOLE,
    "the list alone": json.dumps(TRACE["traceEvents"]),
    "duration twice": _with(LAST, LAST[:-1] + ', "dur": 77.0}'),
    "category twice": _with(LAST, LAST[:-1] + ', "cat": "cpu_op"}'),
    "events twice, empty": WHOLE[:-1] + ', "traceEvents": []}',
    "events twice, the same": WHOLE[:-1] + f', "traceEvents": {json.dumps(TRACE["traceEvents"])}}}',
    "another document": WHOLE + '{"traceEvents": []}',
    "text behind": WHOLE + "x",
    "duration NaN": _with(LAST, LAST.replace(DUR, '"dur": NaN')),
    "duration infinite": _with(LAST, LAST.replace(DUR, '"dur": Infinity')),
    "duration 1e400": _with(LAST, LAST.replace(DUR, '"dur": 1e400')),
    "duration of 5,000 digits": _with(LAST, LAST.replace(DUR, '"dur": ' + "9" * 5_000)),
    "a kernel in a name": _with(LAST, LAST + "," + json.dumps({"ph": "i", "name": LAST, "ts": 1})),
    "single quotes": WHOLE.replace('"', "'"),
    "a comma too many": WHOLE.replace("}]", "},]", 1),
    "deep arguments of a kernel": _with(LAST, LAST[:-2] + f', "x": {DEEP}}}}}'),
    "deep arguments of an operator": _with('"Group size": 2', f'"Group size": {DEEP}'),
    "deep instead of events": '{"traceEvents": ' + "[" * 100_000 + "]" * 100_000 + "}",
    "lists without end": '{"traceEvents": [{"ph": "X", "cat": "kernel", "name": "' + "]" * 50_000,
}  # fmt: skip
CASES = {
    **TEXTS,
    **DOCUMENTS,
}


# The scan looks for categories as the first events write them.
UNSEEN = ("cat 'KERNEL'", "cat 'Kernel'")


@pytest.mark.parametrize(
    ("name", "least"),
    [(n, least) for n in CASES for least in (assemble.SCAN_BYTES, 0) if least or n not in UNSEEN],
)
def test_a_changed_trace_gives_the_rows_of_a_plain_parse_or_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, least: int
) -> None:
    monkeypatch.setattr(assemble, "SCAN_BYTES", least)
    case = CASES[name]
    if callable(case):
        trace = copy.deepcopy(TRACE)
        case(trace)
        case = json.dumps(trace)
    path = tmp_path / "1-TP-0.trace.json"
    path.write_text(case)
    truth = rows(case)
    try:
        table, notes = read(path)
    except SglprofError as error:
        assert error.expected
        assert error.hint
        assert name != "as it is"
        return
    if truth is None or table != truth:
        counted = sum(int(n) for note in notes for n in re.findall(r"(?<![\w.])(\d+)(?= )", note))
        assert notes
        assert truth is None or len(truth) - len(table) <= counted, (notes, truth, table)


def test_there_are_more_than_a_hundred() -> None:
    assert len(CASES) > 100
