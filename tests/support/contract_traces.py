"""What both kinds of trace files have to look like."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path
from typing import Any

TOP_LEVEL = {
    "schemaVersion",
    "deviceProperties",
    "trace_id",
    "distributedInfo",
    "host_name",
    "displayTimeUnit",
    "baseTimeNanoseconds",
    "traceEvents",
    "traceName",
}
STEP = re.compile(
    r"step\[(DECODE|EXTEND|IDLE) bs=\d+(?: toks=\d+)?(?: [cg]_\w+=\d+)*(?: forward_id=(\d+))?\]$"
)
EVENT_LAYOUT = re.compile(
    r'  \{\n    "ph": "X",\n    "cat": "\w+",\n    "name": "[^\n]*",\n    "pid": \d+,\n'
    r'    "tid": \d+,\n    "ts": \d+\.\d{3},\n    "dur": \d+\.\d{3}\n    ,\n    "args": \{\n'
)


class TraceFile:
    """One rank's file, parsed and as text."""

    def __init__(self, path: Path) -> None:
        self.name = path.name
        self.text = gzip.decompress(path.read_bytes()).decode()
        self.document: dict[str, Any] = json.loads(self.text)
        self.events: list[dict[str, Any]] = self.document["traceEvents"]

    def named(self, category: str) -> list[str]:
        return [event["name"] for event in self.events if event.get("cat") == category]

    def steps(self) -> list[re.Match[str]]:
        spans = [name for name in self.named("user_annotation") if name.startswith("step[")]
        found = [STEP.match(name) for name in spans]
        assert all(found), spans
        return [match for match in found if match]

    def process_names(self) -> set[str]:
        return {
            event["args"]["name"]
            for event in self.events
            if event["ph"] == "M" and event["name"] == "process_name"
        }


def check_shape(trace: TraceFile, rank: int, *, on_cpu: bool, named: bool = True) -> None:
    """Keys, kinds of events, times and layout. named: whether steps have spans."""
    assert trace.document.keys() >= TOP_LEVEL
    assert trace.document["distributedInfo"]["rank"] == rank
    assert trace.document["distributedInfo"]["world_size"] == 2
    assert isinstance(trace.document["baseTimeNanoseconds"], int)
    assert trace.process_names() == {f"sglang::scheduler_TP{rank}"}
    assert {"cpu_op", "Trace", *(("user_annotation",) if named else ())} <= {
        e.get("cat") for e in trace.events
    }
    assert {e["ph"] for e in trace.events} >= {"X", "M", "i"}
    assert bool(trace.named("kernel")) != on_cpu
    assert ("scheduler.run_batch" in trace.named("user_annotation")) == named
    if on_cpu:
        assert "gloo:all_reduce" in trace.named("user_annotation")
    for event in trace.events:
        if event["ph"] == "X":
            assert event["dur"] >= 0
            assert {"cat", "name", "pid", "tid", "ts", "args"} <= event.keys()
    assert EVENT_LAYOUT.search(trace.text)
    assert trace.text.startswith("{\n") or trace.text.startswith(" {\n")
    assert re.search(r'\n  \],"traceName": "[^\n]*" \}$', trace.text)
