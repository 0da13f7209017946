"""Both ways through a torch trace: every layout gives the truth, every fault is noticed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pytest_sglprof._trace.read import read_window
from pytest_sglprof._trace.torch.collect import ScanRequest
from pytest_sglprof._trace.torch.events import Batch, ns
from pytest_sglprof._trace.torch.scan import scan_file
from tests.support.scanned import (
    BASE,
    LAYOUTS,
    NAME,
    complete,
    document,
    events,
    one_key_a_line,
    rows_of,
    truth,
    write,
)


@pytest.fixture(autouse=True)
def every_file_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pytest_sglprof._trace.torch.assemble.SCAN_BYTES", 0)


@pytest.mark.parametrize("name", [NAME, NAME + ".gz"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_rows(tmp_path: Path, layout: str, name: str) -> None:
    found = events()
    path = write(tmp_path, LAYOUTS[layout](found), name)
    assert rows_of(path) == truth(found)
    assert read_window(path).notes == ()  # the quick way, every time


@pytest.mark.parametrize("piece", [64, 100, 777, 4096])
@pytest.mark.parametrize("layout", ["one line", "one key a line", "metadata after"])
def test_where_pieces_end_changes_nothing(tmp_path: Path, layout: str, piece: int) -> None:
    found = events()
    path = write(tmp_path, LAYOUTS[layout](found), NAME + ".gz")
    batches: list[Batch] = []
    facts = scan_file(path, ScanRequest(), batches.append, piece=piece)
    assert sum(map(len, batches)) == len(truth(found))
    assert (facts.base, facts.unsafe) == (str(BASE), "")


def test_spacing_may_change_from_event_to_event(tmp_path: Path) -> None:
    text = json.dumps(document(events())).replace('"cat": "k', '"cat"  :\n "k', 3)
    assert rows_of(write(tmp_path, text)) == truth(events())


@pytest.mark.parametrize(
    "change", [lambda doc: doc | {"traceEvents": doc["traceEvents"][-1:]}, lambda doc: doc]
)
def test_what_cannot_be_scanned_is_decoded_and_said(
    tmp_path: Path, change: Callable[[dict[str, Any]], dict[str, Any]]
) -> None:
    doc = change(document(events(4)))
    text = json.dumps(doc)
    if len(doc["traceEvents"]) > 1:  # a kernel between other brackets than learned
        text = text.replace(
            ', {"ph": "X", "cat": "kernel"', ',{"ph":"X","name":7,"cat": "kernel"', 1
        )
        doc = json.loads(text)
    path = write(tmp_path, text)
    assert len(rows_of(path)) == len(truth(doc["traceEvents"]))
    assert any("decoded as a whole, since" in note for note in read_window(path).notes)


def spoiled(mark: str, by: str) -> str:
    """The kineto layout with one host event or one kernel made invalid."""
    return one_key_a_line(events()).replace(mark, by, 1)


@pytest.mark.parametrize(
    "spoil",
    [
        ('"aten::mm"', '"a "quoted" name"'),
        ('"aten::mm"', '"a stray \\x backslash"'),
        ('"aten::mm"', '"a control \x01 character"'),
        ('"aten::mm"', '"unterminated'),
        ("90.001", "inf"),
        ("90.001", "NaN"),
        ("3.25", "3.25,"),
    ],
)
def test_invalid_host_events_do_no_harm(tmp_path: Path, spoil: tuple[str, str]) -> None:
    assert rows_of(write(tmp_path, spoiled(*spoil))) == truth(events())


@pytest.mark.parametrize("value", ["inf", "-inf", "nan", "NaN", "Infinity", "[1, 1, 1,]"])
def test_kernels_with_invalid_arguments_are_mended(tmp_path: Path, value: str) -> None:
    text = spoiled('"grid": [1, 1, 1]', f'"grid": {value}')
    assert rows_of(write(tmp_path, text)) == truth(events())


def test_bad_utf8_in_a_kernel_is_replaced(tmp_path: Path) -> None:
    data = one_key_a_line(events()).encode().replace(b"nvjet_tst", b"nvjet\xff_tst", 1)
    rows = rows_of(write(tmp_path, data))
    assert [row[2:] for row in sorted(rows, key=lambda r: r[2])] == [
        row[2:] for row in sorted(truth(events()), key=lambda r: r[2])
    ]
    assert sum("\ufffd" in row[0] for row in rows) == 1


@pytest.mark.parametrize(
    "other",
    [
        {"ph": "i", "name": "instant"},
        {"name": "no phase", "cat": "kernel", "ts": 1.5, "dur": 1},
        {"ph": "", "name": "an empty phase", "cat": "kernel", "ts": 1.5, "dur": 1},
        {"ph": "?", "name": "an unknown phase", "cat": "kernel", "ts": 1.5, "dur": 1},
        {"ph": "B", "name": "no span", "cat": "kernel", "ts": "soon", "dur": None, "args": 5},
        complete("python_function", "f", 1.5, 3, device="cuda:0", stream="none"),
        complete("cpu_op", "g", "soon", 3),
        complete("cuda_runtime", "cudaLaunchKernel", 5.5, 3, kernel="kernel"),
        complete("user_annotation", "kernel", 5.5, 3),
    ],
)
def test_what_lies_between_kernels_changes_nothing(tmp_path: Path, other: dict[str, Any]) -> None:
    found = [event for event in events() if event.get("cat") in ("kernel", "gpu_memset", "ac2g")]
    mixed = [each for event in found for each in (event, other, other)]
    path = write(tmp_path, document(mixed))
    assert rows_of(path) == truth(found)
    assert read_window(path).notes == ()


@pytest.mark.parametrize("gap", [10, 1_500, 2_500, 50_000])
def test_how_far_apart_kernels_lie_changes_nothing(tmp_path: Path, gap: int) -> None:
    """Near ones are decoded together with what lies between them, far ones each alone."""
    filler = complete("cpu_op", "x" * gap, 1.5, 3)
    mixed = [each for event in events(60) for each in (event, filler)]
    mixed = [*events(7), *mixed, *events(9)]
    assert rows_of(write(tmp_path, document(mixed))) == truth(mixed)


def test_missing_and_negative_durations_are_counted(tmp_path: Path) -> None:
    found = events()
    kernels = [event for event in found if event.get("cat") == "kernel"]
    del kernels[0]["dur"]
    kernels[1]["dur"] = -3.5
    kernels[2]["dur"] = "soon"
    table = read_window(write(tmp_path, document(found)))
    assert len(table.frame) == len(truth(events())) - 3
    assert sorted(table.notes) == [
        "TP0: skipped 1 kernel events with a negative time",
        "TP0: skipped 2 kernel events with a missing or unreadable time",
    ]


@pytest.mark.parametrize("kind", [str, lambda value: value])
@pytest.mark.parametrize("start", [1_700_000_000_123_456, 1_700_000_000_123_456.5, 12.5])
def test_absolute_and_quoted_times_are_exact(tmp_path: Path, start: float, kind: Any) -> None:
    found = [complete("kernel", "k", kind(start + n), kind(0.001 * n + 0.001)) for n in range(6)]
    path = write(tmp_path, document(found) | {"baseTimeNanoseconds": 0})
    expected = [(ns(str(e["ts"]).encode()), ns(str(e["dur"]).encode())) for e in found]
    assert [row[2:] for row in rows_of(path)] == expected


def test_categories_of_before_2022(tmp_path: Path) -> None:
    found = [
        complete("Operator", "aten::mm", 1, 5),
        complete("Runtime", "cudaLaunchKernel", 2, 1),
        complete("Kernel", "gemm", 3, 4),
        complete("Memcpy", "Memcpy HtoD", 8, 2),
        complete("Memset", "Memset (Device)", 11, 1),
    ]
    rows = rows_of(write(tmp_path, document(found)))
    assert [(name, kind, dur) for name, kind, _, dur in rows] == [
        ("Memcpy HtoD", "memcpy", 2000),
        ("Memset (Device)", "memset", 1000),
        ("gemm", "kernel", 4000),
    ]


def test_ids_of_any_type(tmp_path: Path) -> None:
    found = events(4)
    for event in found:
        if event.get("cat") == "kernel":
            event["args"]["stream"] = "default"
            event["pid"], event["tid"] = "Spans", ""
    assert rows_of(write(tmp_path, document(found))) == truth(found)


def test_a_category_in_the_arguments_is_no_event(tmp_path: Path) -> None:
    found = events(4)
    found[2]["args"]["inner"] = {"cat": "kernel"}
    assert rows_of(write(tmp_path, document(found))) == truth(found)


def test_a_name_that_is_a_category_counts_once(tmp_path: Path) -> None:
    found = events()
    copies = [event for event in found if event.get("cat") == "gpu_memcpy"]
    assert copies
    for event in copies:
        event["name"] = "kernel"
    assert rows_of(write(tmp_path, json.dumps(document(found)))) == truth(found)


@pytest.mark.parametrize("odd", ['{"ph": "f", "ts": nan}', '{"ph": "i"}', '{"ph": 1, "ts": "2"}'])
def test_what_stands_between_two_kernels_does_no_harm(tmp_path: Path, odd: str) -> None:
    parts = [json.dumps(event) for event in events()]
    text = json.dumps(document([])).replace("[]", "[" + f", {odd}, ".join(parts) + "]", 1)
    path = write(tmp_path, text)
    assert rows_of(path) == truth(events())
    assert read_window(path).notes == ()
