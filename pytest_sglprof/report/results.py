"""The one results document of a run: built from plain parts, checked, written, read."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from pytest_sglprof.errors import SettingsError, SglprofError
from pytest_sglprof.files import atomic_write
from pytest_sglprof.metrics import METRICS, metrics_of
from pytest_sglprof.redact import redact, redact_command
from pytest_sglprof.report.plain import plain, utc
from pytest_sglprof.report.window import finding_document, judgement_document, window_document
from pytest_sglprof.values import WORST_FIRST, LoadResult, worst_word

__all__ = [
    "SCHEMA_VERSION",
    "attempt_document",
    "finding_document",
    "judgement_document",
    "load_document",
    "load_results",
    "results_schema",
    "run_document",
    "server_document",
    "validate",
    "window_document",
    "write_results",
]

SCHEMA_VERSION = 1


def attempt_document(
    *,
    nodeid: str,
    number: int,
    outcome: str,
    verdict: str | None,
    reason: str,
    duration_s: float,
    windows: Sequence[str] = (),
    worker: str = "",
) -> dict[str, Any]:
    """One run of one test; a rerun is another attempt.

    number: 1 for the first. outcome: "passed", "failed", "skipped", "error", "xfailed"
    or "xpassed". verdict: None when no window was judged. windows: ids.
    """
    attempt: dict[str, Any] = redact(
        {
            "nodeid": nodeid,
            "number": number,
            "outcome": outcome,
            "verdict": verdict,
            "reason": reason,
            "duration_s": max(0.0, float(duration_s)),
            "windows": list(windows),
            "worker": worker,
        }
    )
    return attempt


def server_document(
    *,
    key: str,
    kind: str,
    url: str,
    command: Sequence[str],
    version: str,
    sizes: Any,
    attached: bool = False,
    nsys: str = "",
    standin: bool = False,
    model: str = "",
    started: float | None = None,
    ready_s: float | None = None,
    log: str = "",
    left_behind: Sequence[str] = (),
    locked_clocks: Mapping[str, int] | None = None,
) -> dict[str, Any]:
    """One server life. command is redacted here once more; nsys: its version, "" without.

    sizes: a dataclass or mapping. log: path relative to the results. started: Unix time in s.
    ready_s: seconds from the start until it was ready. Both are None where somebody else
    started it. locked_clocks: UUID of a GPU -> MHz.
    """
    return {
        "key": key,
        "kind": kind,
        "standin": standin,
        "attached": attached,
        "url": url,
        "command": redact_command(command),
        "version": version,
        "model": model,
        "sizes": redact(plain(sizes)),
        "nsys": nsys,
        "started": utc(started),
        "ready_s": ready_s,
        "log": log,
        "left_behind": list(left_behind),
        "locked_clocks": [{"uuid": u, "mhz": mhz} for u, mhz in (locked_clocks or {}).items()],
    }


def load_document(
    result: LoadResult,
    *,
    load_id: str,
    nodeid: str,
    attempt: int,
    server_key: str,
    standin: bool,
) -> dict[str, Any]:
    """One load that ran against a server, as its driver measured it."""
    document = plain(result)
    document["command"] = redact_command(result.command)
    document["duration_s"] = document.pop("duration")
    document["started"] = utc(document["started"])
    load: dict[str, Any] = redact(
        {
            "id": load_id,
            "nodeid": nodeid,
            "attempt": attempt,
            "server": server_key,
            "standin": standin,
            **document,
        }
    )
    return load


def run_document(
    run: Mapping[str, Any],
    tests: Sequence[Mapping[str, Any]],
    windows: Sequence[Mapping[str, Any]],
    servers: Sequence[Mapping[str, Any]],
    loads: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    """The document of a run. Plain data, redacted, not yet validated.

    run: at least id, started, ended (Unix seconds or text), host and versions (a mapping
    of pytest_sglprof, python, pytest, sglang, nsys; "" where absent); more keys are kept.
    tests: attempts from `attempt_document`, in any order; those of one node id become
    one test, whose outcome and verdict are those of its last attempt.
    """
    header = {**run, "started": utc(run.get("started")), "ended": utc(run.get("ended"))}
    grouped = _tests(tests)
    counts = {word: sum(window["verdict"] == word for window in windows) for word in WORST_FIRST}
    document = {
        "schema_version": SCHEMA_VERSION,
        "run": header,
        "summary": {
            "verdict": worst_word({test["verdict"] for test in grouped}),
            "tests": len(grouped),
            "windows": counts,
            "standin": any(item.get("standin", False) for item in (*windows, *servers, *loads)),
        },
        "tests": grouped,
        "windows": list(windows),
        "servers": list(servers),
        "loads": list(loads),
    }
    whole: dict[str, Any] = redact(plain(document))
    return whole


def _tests(attempts: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    by_node: dict[str, list[dict[str, Any]]] = {}
    for attempt in attempts:
        own = {key: value for key, value in attempt.items() if key != "nodeid"}
        by_node.setdefault(str(attempt["nodeid"]), []).append(own)
    tests = []
    for nodeid, mine in by_node.items():
        mine.sort(key=lambda attempt: int(attempt["number"]))
        last = mine[-1]
        tests.append(
            {
                "nodeid": nodeid,
                "outcome": last["outcome"],
                "verdict": last["verdict"],
                "reason": last["reason"],
                "attempts": mine,
            }
        )
    return tests


@cache
def results_schema() -> dict[str, Any]:
    """The JSON Schema (draft 2020-12) that every results document satisfies."""
    source = resources.files("pytest_sglprof.schemas").joinpath("results.schema.json")
    schema: dict[str, Any] = json.loads(source.read_text(encoding="utf-8"))
    judgement, finding = (schema["$defs"][name]["properties"] for name in ("judgement", "finding"))
    judgement["metric"]["enum"] = list(METRICS)
    for row in metrics_of("ranks"):
        finding.setdefault(row.value, {"type": ["number", "null"]})
        finding.setdefault(row.interval, finding["interval"])
    return schema


def validate(document: Any) -> None:
    """Raises SettingsError that names the path of the first violation in the document."""
    from jsonschema import Draft202012Validator
    from jsonschema.exceptions import best_match

    worst = best_match(Draft202012Validator(results_schema()).iter_errors(document))
    if worst is not None:
        raise SettingsError(
            f"results document: {worst.json_path}: {worst.message}",
            expected=f"what results.schema.json (version {SCHEMA_VERSION}) describes",
        )


def write_results(document: Mapping[str, Any], path: Path) -> None:
    """Validates `document` and writes it whole or not at all. Raises SettingsError."""
    validate(document)
    atomic_write(path, "".join(_indented(document, "\n")) + "\n")


def _indented(value: Any, line: str) -> Iterator[str]:
    """JSON for people and for `diff`: one item a line, but lists of numbers on one."""
    if isinstance(value, Mapping) and value:
        mark = "{"
        for key, item in value.items():
            yield f"{mark}{line} {json.dumps(key, ensure_ascii=False)}: "
            yield from _indented(item, f"{line} ")
            mark = ","
        yield f"{line}}}"
    elif isinstance(value, list) and any(isinstance(item, str | list | dict) for item in value):
        mark = "["
        for item in value:
            yield f"{mark}{line} "
            yield from _indented(item, f"{line} ")
            mark = ","
        yield f"{line}]"
    else:
        yield json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def load_results(path: Path) -> dict[str, Any]:
    """Reads and validates a results document. Raises SglprofError that names the file."""
    expected = "a results.json that pytest-sglprof wrote"
    try:
        document: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SglprofError(
            f"{path} cannot be read: {error.strerror or error}", expected=expected
        ) from error
    except (ValueError, RecursionError) as error:
        raise SglprofError(f"{path} is not JSON: {error}", expected=expected) from error
    try:
        validate(document)
    except SettingsError as error:
        raise SglprofError(f"{path}: {error.what}", expected=error.expected) from error
    return document
