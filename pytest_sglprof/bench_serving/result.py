"""The load driver's record (one line of JSON) → `LoadResult`."""

from __future__ import annotations

import contextlib
import json
import math
import re
from collections.abc import Mapping
from typing import Any

from pytest_sglprof.errors import LoadError
from pytest_sglprof.redact import redact
from pytest_sglprof.values import LoadResult

STATISTICS = ("mean", "median", "p90", "p95", "p99")
_REASON_LINES = 12
_BAR = re.compile(r"(\d+)/(\d+) \[")


def parse_result(
    line: str,
    *,
    requested: int,
    command: tuple[str, ...] = (),
    warmed_up: bool = True,
    cache_flushed: bool = True,
    started: float | None = None,
) -> LoadResult:
    """One line of the driver's output file, as a result.

    Python's JSON dialect is read, in which the driver writes `Infinity` and `NaN`.
    `raw` is the record as plain JSON: secrets hidden, non-finite numbers as text, without
    `server_info` (hundreds of settings that are recorded with the server already).
    requested: how many requests were asked for; a driver that completed more (several
    turns a prompt) had more to do. Raises LoadError when `line` is not such a record.
    """
    try:
        record = json.loads(line)
        completed, duration = int(record["completed"]), float(record["duration"])
    except (ValueError, KeyError, TypeError) as error:
        raise LoadError(
            f"the load driver's result cannot be read: {error!r}",
            expected='a line of JSON with at least "completed" and "duration"',
            log=[line[:200]],
        ) from None
    return LoadResult(
        requested=max(requested, completed),
        completed=completed,
        duration=duration,
        request_throughput=_figure(record, "request_throughput"),
        output_throughput=_figure(record, "output_throughput"),
        total_throughput=_figure(record, "total_throughput"),
        concurrency=_figure(record, "concurrency"),
        ttft=_statistics(record, "ttft"),
        tpot=_statistics(record, "tpot"),
        itl=_statistics(record, "itl"),
        e2e=_statistics(record, "e2e_latency"),
        command=command,
        warmed_up=warmed_up,
        cache_flushed=cache_flushed,
        started=started,
        raw={key: plain(value) for key, value in redact(record).items() if key != "server_info"},
    )


def _statistics(record: Mapping[str, Any], name: str) -> dict[str, float | None]:
    return {statistic: _figure(record, f"{statistic}_{name}_ms") for statistic in STATISTICS}


def _figure(record: Mapping[str, Any], key: str) -> float | None:
    value = record.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def plain(value: Any) -> Any:
    """`value` with every infinite or undefined number as text, as strict JSON needs it."""
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else ("Infinity" if value > 0 else "-Infinity")
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [plain(item) for item in value]
    return value


def redact_record(text: str) -> str:
    """The driver's output file with the values of secret keys hidden; other lines are dropped."""
    kept = []
    for line in text.splitlines():
        # A driver that was killed may have left half a line: nothing to keep, and not redactable.
        with contextlib.suppress(ValueError):
            kept.append(json.dumps(redact(json.loads(line))) + "\n")
    return "".join(kept)


def requested_of(output: str, asked: int) -> int:
    """How many requests the driver had: the total of its last progress bar, else `asked`.

    A data set may hold fewer prompts than were asked for; that is not a failed request.
    """
    bars = _BAR.findall(output)
    return int(bars[-1][1]) if bars else asked


def reason(output: str) -> list[str]:
    """The lines of the driver's output that say why it failed: its last traceback, or its end."""
    lines = [line for line in re.split(r"[\r\n]+", output) if line.strip()]
    starts = [i for i, line in enumerate(lines) if line.startswith("Traceback (most recent call")]
    if not starts:
        return lines[-6:]
    block = lines[starts[-1] :]
    # The exception stands after the last indented line; whatever follows is tidying up.
    last = max((i for i, line in enumerate(block) if line.startswith(" ")), default=0)
    return block[: last + 2][-_REASON_LINES:]
