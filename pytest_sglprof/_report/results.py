"""The one results document of a run: built from its parts, written, read and checked."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin

import msgspec

from pytest_sglprof._bench_serving.command import LoadResult
from pytest_sglprof._errors import SettingsError, SglprofError
from pytest_sglprof._files import atomic_write, json_text
from pytest_sglprof._limits import UNDECODABLE, read_bytes, refuse_deep, why_undecodable
from pytest_sglprof._metrics import VerdictWord, worst_word
from pytest_sglprof._redact import redact_command
from pytest_sglprof._report.build import finding_document, window_document
from pytest_sglprof._report.model import (
    FORMAT,
    Attempt,
    LockedClock,
    Outcome,
    RecordedLoad,
    RecordedServer,
    RecordedTest,
    RecordedWindow,
    Results,
    Run,
    Summary,
    Version,
    WindowCounts,
    storable,
    utc,
)
from pytest_sglprof._report.stored import stored_results

__all__ = [
    "attempt_document",
    "finding_document",
    "load_document",
    "load_results",
    "run_document",
    "server_document",
    "validate",
    "window_document",
    "write_results",
]


def attempt_document(
    *,
    nodeid: str,
    number: int,
    outcome: Outcome,
    verdict: VerdictWord | None,
    reason: str,
    duration_s: float,
    windows: Sequence[str] = (),
    worker: str = "",
) -> Attempt:
    """One run of one test; a rerun is another attempt.

    number: 1 for the first. verdict: None when no window was judged. windows: ids.
    """
    return storable(
        Attempt(
            nodeid=nodeid,
            number=number,
            outcome=outcome,
            verdict=verdict,
            reason=reason,
            duration_s=max(0.0, float(duration_s)),
            windows=tuple(windows),
            worker=worker,
        )
    )


def server_document(
    *,
    key: str,
    kind: Any,
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
    keeper_fault: str | None = None,
) -> RecordedServer:
    """One server life. command is redacted here once more; nsys: its version, "" without.

    sizes: a dataclass or mapping. log: path relative to the results. started: Unix time in s.
    ready_s: seconds from the start until it was ready. Both are None where somebody else
    started it. locked_clocks: UUID of a GPU -> MHz.
    """
    return storable(
        RecordedServer(
            key=key,
            kind=kind,
            standin=standin,
            attached=attached,
            url=url,
            command=tuple(redact_command(command)),
            version=version,
            model=model,
            sizes=msgspec.to_builtins(sizes),
            nsys=nsys,
            started=utc(started),
            ready_s=ready_s,
            log=log,
            left_behind=tuple(left_behind),
            locked_clocks=tuple(
                LockedClock(uuid=uuid, mhz=mhz) for uuid, mhz in (locked_clocks or {}).items()
            ),
            keeper_fault=keeper_fault,
        )
    )


def load_document(
    result: LoadResult,
    *,
    load_id: str,
    nodeid: str,
    attempt: int,
    server_key: str,
    standin: bool,
) -> RecordedLoad:
    """One load that ran against a server, as its driver measured it."""
    return storable(
        RecordedLoad(
            id=load_id,
            nodeid=nodeid,
            attempt=attempt,
            server=server_key,
            standin=standin,
            started=utc(result.started),
            requested=result.requested,
            completed=result.completed,
            duration_s=result.duration,
            request_throughput=result.request_throughput,
            output_throughput=result.output_throughput,
            total_throughput=result.total_throughput,
            concurrency=result.concurrency,
            ttft=dict(result.ttft),
            tpot=dict(result.tpot),
            itl=dict(result.itl),
            e2e=dict(result.e2e),
            command=tuple(redact_command(result.command)),
            warmed_up=result.warmed_up,
            cache_flushed=result.cache_flushed,
            raw=dict(result.raw),
        )
    )


def run_document(
    run: Run,
    attempts: Iterable[Attempt],
    windows: Sequence[RecordedWindow],
    servers: Sequence[RecordedServer],
    loads: Sequence[RecordedLoad],
) -> Results:
    """The document of a run, redacted once more: this process may know other secrets.

    attempts: in any order; those of one node id become one test, whose outcome and verdict
    are those of its last attempt.
    """
    tests = _tests(attempts)
    words = [window.verdict for window in windows if window.is_judged]
    return storable(
        Results(
            schema_version=FORMAT,
            run=run,
            summary=Summary(
                verdict=worst_word({test.verdict for test in tests}),
                tests=len(tests),
                windows=WindowCounts(
                    fail=words.count("fail"),
                    inconclusive=words.count("inconclusive"),
                    passed=words.count("pass"),
                ),
                standin=any(
                    [each.standin for each in windows]
                    + [each.standin for each in servers]
                    + [each.standin for each in loads]
                ),
            ),
            tests=tests,
            windows=tuple(windows),
            servers=tuple(servers),
            loads=tuple(loads),
        )
    )


def _tests(attempts: Iterable[Attempt]) -> tuple[RecordedTest, ...]:
    by_node: dict[str, list[Attempt]] = {}
    for attempt in attempts:
        by_node.setdefault(attempt.nodeid, []).append(attempt)
    tests = []
    for nodeid, listed in by_node.items():
        listed.sort(key=lambda attempt: attempt.number)
        last = listed[-1]
        tests.append(
            RecordedTest(
                nodeid=nodeid,
                outcome=last.outcome,
                verdict=last.verdict,
                reason=last.reason,
                attempts=tuple(listed),
            )
        )
    return tuple(tests)


def validate(document: Any) -> Results:
    """Plain data as a typed document. Raises SettingsError that names the place of a mistake."""
    try:
        return msgspec.convert(document, Results)
    except msgspec.ValidationError as error:
        what, _, _ = str(error).partition(" - at ")
        raise SettingsError(
            f"results document: ${_place(document, Results)}: {what}",
            expected=f"what results.schema.json describes (format {_words(FORMAT)})",
        ) from error


def _place(value: Any, kind: Any) -> str:
    """`.windows[0].table[3].total_ns`: the first place that is not of its type.

    msgspec's own message has the names on the way there, but not the index in a list.
    """
    if get_origin(kind) in (Union, UnionType):  # of something and None
        kind = get_args(kind)[0]
    parts: list[tuple[str, Any, Any]] = []
    if isinstance(value, dict) and isinstance(kind, type) and issubclass(kind, msgspec.Struct):
        for field in msgspec.structs.fields(kind):
            if field.encode_name in value:
                parts.append((f".{field.encode_name}", value[field.encode_name], field.type))
    elif isinstance(value, list) and get_origin(kind) in (list, tuple, Sequence):
        item_kind = get_args(kind)[0]
        parts = [(f"[{at}]", item, item_kind) for at, item in enumerate(value)]
    for name, part, part_kind in parts:
        try:
            msgspec.convert(part, part_kind)
        except msgspec.ValidationError:
            return name + _place(part, part_kind)
    return ""


def write_results(document: Results, path: Path) -> None:
    """Writes the document whole or not at all. Raises SettingsError for one that none can read."""
    text = json_text(document, _is_one_line)
    try:
        msgspec.json.decode(text, type=Results)
    except msgspec.ValidationError:
        validate(json.loads(text))
        raise
    atomic_write(path, text)


def _is_one_line(value: Any) -> bool:
    """Lists of numbers are."""
    return isinstance(value, list | tuple) and all(
        item is None or isinstance(item, int | float) for item in value
    )


class _Head(msgspec.Struct):
    schema_version: Version


def load_results(path: Path) -> Results:
    """Reads a results document; of a large one, the windows when they are asked for.

    Raises SglprofError that names the file and the place in it.
    """
    expected = "a results.json that pytest-sglprof wrote, or the folder that holds it"
    try:
        if stored := stored_results(path):
            return stored
        text = read_bytes(path)
    except OSError as error:
        raise SglprofError(
            f"{path} cannot be read: {error.strerror or error}",
            expected=expected,
            hint="check the path; the newest run of pytest is .sglprof/latest",
        ) from error
    try:
        head = msgspec.json.decode(text, type=_Head)
        if head.schema_version.major <= FORMAT.major:
            document = msgspec.json.decode(text, type=Results)
            refuse_deep([dict(load.raw) for load in document.loads])
            return document
    except msgspec.ValidationError as error:
        _refuse(path, text)
        raise SglprofError(f"{path}: {error}", expected=expected) from error
    except UNDECODABLE as error:
        what = f"{path} is not JSON: {why_undecodable(error)}"
        raise SglprofError(what, expected=expected) from error
    raise SglprofError(
        f"{path} is of format {_words(head.schema_version)}, which this version cannot read",
        expected=f"format {FORMAT.major}, this version writes {_words(FORMAT)}",
        hint="read it with the version of pytest-sglprof that wrote it, or a later one",
    )


def _refuse(path: Path, text: bytes) -> None:
    """Raises for what is JSON at its beginning, but no results document."""
    try:
        validate(msgspec.json.decode(text))
    except SettingsError as error:
        raise SglprofError(f"{path}: {error.what}", expected=error.expected) from error
    except UNDECODABLE as error:
        raise SglprofError(
            f"{path} is not JSON: {why_undecodable(error)}",
            expected="a results.json that pytest-sglprof wrote",
        ) from error


def _words(version: Version) -> str:
    return f"{version.major}.{version.minor}"
