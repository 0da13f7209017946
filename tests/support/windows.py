"""Window and run documents that the tests of all views share."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from pytest_sglprof._bench_serving.command import LoadResult
from pytest_sglprof._capture.recording import Artifact, WindowCapture
from pytest_sglprof._config.model import WindowSpec
from pytest_sglprof._config.thresholds import thresholds_from_keywords
from pytest_sglprof._redact import redact_command
from pytest_sglprof._report.model import Attempt, RecordedLoad, RecordedWindow, Results, Run, utc
from pytest_sglprof._report.results import (
    attempt_document,
    load_document,
    run_document,
    server_document,
    validate,
    window_document,
)
from pytest_sglprof._trace.table import KernelTable
from pytest_sglprof._verdict.judge import judge
from tests.support.kernel_tables import build, slow

KEYWORDS: dict[str, Any] = {"slowdown": {"compute": 1.1, "moe": 1.1}}
SLOW = build(scale=slow("TP1", "moe", 1.4))
BALANCED = build(scale=slow("TP1", "moe", 1.02))
SHORT = build(steps=3)


def plain(value: msgspec.Struct) -> dict[str, Any]:
    """As it stands in results.json, so that a test can change it."""
    document: dict[str, Any] = msgspec.json.decode(msgspec.json.encode(value))
    return document


def as_window(document: dict[str, Any]) -> RecordedWindow:
    return msgspec.convert(document, RecordedWindow)


def as_load(document: dict[str, Any]) -> RecordedLoad:
    return msgspec.convert(document, RecordedLoad)


def as_run(document: dict[str, Any]) -> Results:
    return validate(document)


def window(
    table: KernelTable | None,
    *,
    keywords: dict[str, Any] = KEYWORDS,
    window_id: str = "w1",
    standin: bool = False,
    state: Any = "complete",
    reason: str = "",
    log: Sequence[str] = (),
    attempt: int = 1,
    expected: Sequence[str] = (),
) -> dict[str, Any]:
    capture = WindowCapture(
        window_id,
        WindowSpec(name="steady", num_steps=50, timeout=float("inf")),
        state,
        1_700_000_000.0,
        1_700_000_003.5,
        artifacts=(Artifact(Path("/run/windows/w1/a-TP-0.trace.json.gz"), "torch", "TP0"),),
        expected_ranks=tuple(expected),
        pid_ranks={11: "TP0"},
        reason=reason,
        log=tuple(log),
        notes=("opened late",),
    )
    verdict = judge(
        table,
        thresholds_from_keywords(keywords, "marker"),
        incomplete_reason=reason,
        expected_ranks=expected,
    )
    made = window_document(
        capture,
        table,
        verdict,
        nodeid="tests/test_a.py::test_b[x|y]",
        attempt=attempt,
        server_key="default",
        standin=standin,
        load="l1",
        root=Path("/run"),
    )
    return plain(made)


LOAD = LoadResult(
    requested=10,
    completed=9,
    duration=2.5,
    request_throughput=4.0,
    output_throughput=float("inf"),
    total_throughput=None,
    concurrency=3.5,
    ttft={"mean": 1.5, "p99": float("nan")},
    tpot={},
    itl={},
    e2e={},
    command=("bench", "--api-key", "sk-very-secret"),
    raw={"api_key": "sk-very-secret", "itl": float("-inf")},
)


def run(
    windows: Sequence[dict[str, Any]],
    *,
    tests: Sequence[Attempt] | None = None,
    left_behind: Sequence[str] = (),
    standin: bool = False,
) -> dict[str, Any]:
    one = attempt_document(
        nodeid="tests/test_a.py::test_b[x|y]",
        number=1,
        outcome="failed",
        verdict="fail",
        reason="slow",
        duration_s=1.5,
        windows=["w1"],
    )
    server = server_document(
        key="default",
        kind="standin" if standin else "sglang",
        url="http://127.0.0.1:1",
        command=["serve", "--api-key=sk-very-secret"],
        version="0.5.23",
        sizes={"tp": 2},
        standin=standin,
        left_behind=left_behind,
        started=1_700_000_000.0,
    )
    load = load_document(
        LOAD, load_id="l1", nodeid="t", attempt=1, server_key="default", standin=standin
    )
    header = Run(
        id="r1",
        started=utc(1_700_000_000.0),
        ended=utc(1_700_000_100.25),
        host="node",
        command=tuple(redact_command(["pytest", "--api-key", "sk-very-secret"])),
        versions={"pytest_sglprof": "0.1.0", "python": "3.11.2", "nsys": ""},
        min_steps=30,
        exit_status=1,
    )
    attempts = [one] if tests is None else tests
    return plain(run_document(header, attempts, [*map(as_window, windows)], [server], [load]))
