"""Both ways through a torch trace: every layout gives the truth, every fault is noticed."""

from __future__ import annotations

import gzip
import json
import time
import zlib
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from pytest_sglprof.errors import SglprofError, TraceError, TraceTruncated
from pytest_sglprof.trace import inflate
from pytest_sglprof.trace.collect import Wanted
from pytest_sglprof.trace.kineto import KINDS, Batch, ns_from_float
from pytest_sglprof.trace.read import read_window
from pytest_sglprof.trace.times import ns
from pytest_sglprof.trace.torch_file import scan_file

BASE = 1_790_857_026_000_000_000
NAME = "1-TP-0.trace.json"
Row = tuple[str, str, int, int]


@pytest.fixture(autouse=True)
def every_file_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pytest_sglprof.trace.torch_window.SCAN_BYTES", 0)


def complete(cat: str, name: str, ts: Any, dur: Any, **args: Any) -> dict[str, Any]:
    event = {"ph": "X", "cat": cat, "name": name, "pid": 0, "tid": 7, "ts": ts, "dur": dur}
    return event | {"args": {"stream": 7, "correlation": 5, **args}}


def events(count: int = 40) -> list[dict[str, Any]]:
    """Kernels, copies and sets between host events, names with braces and quotes included."""
    found: list[dict[str, Any]] = [
        {"ph": "M", "name": "process_name", "ts": 1.5, "pid": 0, "tid": 0, "args": {"name": "x"}}
    ]
    for number in range(count):
        ts = 4_458_676_983_543.183 + number * 1000
        name = ('void f<4, g::{lambda()#1}>(int, "q")', "nvjet_tst", "Memcpy DtoD")[number % 3]
        cat = ("kernel", "kernel", "gpu_memcpy", "gpu_memset")[number % 4]
        found += [
            complete("cpu_op", "aten::mm", ts - 500, 90.001),
            complete("cuda_runtime", "cudaLaunchKernel", ts - 400, 3.25, kernel="f"),
            {"ph": "s", "id": number, "pid": 3, "tid": 3, "ts": ts, "cat": "ac2g", "name": "ac2g"},
            complete(cat, name, round(ts, 3), round(1.001 + number, 3), grid=[1, 1, 1]),
        ]
    return found


def truth(found: list[dict[str, Any]], base: int = BASE) -> list[Row]:
    kinds = {"kernel": "kernel", "gpu_memcpy": "memcpy", "gpu_memset": "memset"}
    rows = []
    for event in json.loads(json.dumps(found), parse_float=Decimal):
        if kind := kinds.get(event.get("cat", "")):
            ns = (int(Decimal(event["ts"]) * 1000) + base, int(Decimal(event["dur"]) * 1000))
            rows.append((event["name"], kind, *ns))
    return sorted(rows)


def document(found: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "schemaVersion": 1,
        "deviceProperties": [{"id": 0}, {"id": 1}],
        "baseTimeNanoseconds": BASE,
        "traceEvents": found,
        "traceName": "x",
    }


def write(folder: Path, content: Any, name: str = NAME, level: int = 6) -> Path:
    text = json.dumps(content) if isinstance(content, (dict, list)) else content
    data = text.encode() if isinstance(text, str) else text
    path = folder / name
    path.write_bytes(gzip.compress(data, level, mtime=0) if name.endswith(".gz") else data)
    return path


def rows_of(path: Path, **options: Any) -> list[Row]:
    frame = read_window(path, **options).frame
    columns = (frame["full_name"], frame["kind"], frame["start_ns"], frame["dur_ns"])
    rows = zip(*(column.tolist() for column in columns), strict=True)
    return sorted((str(name), str(kind), int(start), int(dur)) for name, kind, start, dur in rows)


def one_key_a_line(found: list[dict[str, Any]]) -> str:
    lines = []
    for event in found:
        parts = [f"    {json.dumps(key)}: {json.dumps(value)}" for key, value in event.items()]
        lines.append("  {\n" + ",\n    \n".join(parts) + "\n  }")
    head = f'{{\n  "baseTimeNanoseconds": {BASE},\n  "traceEvents": [\n'
    return head + ",\n".join(lines) + '\n  ],\n  "traceName": "x"\n}\n'


def reordered(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [dict(reversed(event.items())) for event in found]


def footer_first(found: list[dict[str, Any]]) -> dict[str, Any]:
    doc = document(found)
    return {"traceEvents": doc.pop("traceEvents"), **doc}


LAYOUTS: dict[str, Callable[[list[dict[str, Any]]], str]] = {
    "one line": lambda found: json.dumps(document(found)),
    "compact": lambda found: json.dumps(document(found), separators=(",", ":")),
    "indented": lambda found: json.dumps(document(found), indent=1),
    "deeply indented": lambda found: json.dumps(document(found), indent=8),
    "tabs": lambda found: json.dumps(document(found), indent="\t"),
    "sorted keys": lambda found: json.dumps(document(found), sort_keys=True),
    "sorted, indented": lambda found: json.dumps(document(found), sort_keys=True, indent=2),
    "one key a line": one_key_a_line,
    "CRLF": lambda found: json.dumps(document(found), indent=2).replace("\n", "\r\n"),
    "BOM": lambda found: "\ufeff" + json.dumps(document(found)),
    "keys reversed": lambda found: json.dumps(document(reordered(found))),
    "metadata after": lambda found: json.dumps(footer_first(found)),
    "blank before colon": lambda found: json.dumps(document(found), separators=(" , ", " : ")),
    "escaped": lambda found: json.dumps(document(found)).replace("void", "\\u0076oid"),
}


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
    facts = scan_file(path, Wanted(), batches.append, piece=piece)
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


# --- faults -----------------------------------------------------------------------------


def quick_rows(path: Path) -> list[Row]:
    """The rows without the table around them, which would take most of the time."""
    batches: list[Batch] = []
    facts = scan_file(path, Wanted(), batches.append, restart=batches.clear)
    if facts.unsafe:
        return rows_of(path)
    base = int(facts.base or 0)
    rows = []
    for batch in batches:
        for name, kind, start, dur in zip(
            batch.name, batch.kind, batch.start, batch.dur, strict=True
        ):
            times = (start, dur) if batch.exact else (ns_from_float(start), ns_from_float(dur))
            rows.append((facts.names[name], KINDS[kind], times[0] + base, times[1]))
    return sorted(rows)


def outcome(path: Path) -> list[Row] | str:
    """The rows, or the name of our own error; anything else and anything slow fails."""
    begin = time.monotonic()
    try:
        result: list[Row] | str = quick_rows(path)
    except SglprofError as error:
        assert path.name in error.what
        assert error.expected
        assert error.hint
        result = type(error).__name__
    assert time.monotonic() - begin < 1.0
    return result


@pytest.fixture(scope="module")
def packed() -> bytes:
    return gzip.compress(json.dumps(document(events(4))).encode(), mtime=0)


def test_a_packed_file_cut_anywhere_is_truncated(tmp_path: Path, packed: bytes) -> None:
    path = tmp_path / (NAME + ".gz")
    for size in range(len(packed)):
        path.write_bytes(packed[:size])
        assert outcome(path) in ("TraceTruncated", "NotATrace"), size


@pytest.mark.parametrize("change", ["flip", "insert", "delete"])
def test_a_packed_file_changed_anywhere_is_right_or_refused(
    tmp_path: Path, packed: bytes, change: str
) -> None:
    path = tmp_path / (NAME + ".gz")
    expected = truth(events(4))
    refused = 0
    for at in range(len(packed)):
        changed = {
            "flip": lambda at=at: packed[:at] + bytes([packed[at] ^ 0x41]) + packed[at + 1 :],
            "insert": lambda at=at: packed[:at] + b"\x5a" + packed[at:],
            "delete": lambda at=at: packed[:at] + packed[at + 1 :],
        }[change]()
        path.write_bytes(changed)
        found = outcome(path)
        refused += isinstance(found, str)
        assert isinstance(found, str) or found == expected, at
    assert refused > 0.9 * len(packed)


@pytest.mark.parametrize("layout", ["one line", "one key a line"])
def test_a_plain_file_cut_anywhere_is_refused(tmp_path: Path, layout: str) -> None:
    text = LAYOUTS[layout](events(2)).rstrip()
    path = tmp_path / NAME
    for size in range(len(text)):
        path.write_text(text[:size])
        assert outcome(path) in ("TraceTruncated", "NotATrace", "TraceError"), size


@pytest.mark.parametrize("byte", ['"', "{", "}", "]", "\\", "\x00", ","])
def test_a_plain_file_changed_anywhere_is_read_or_refused(tmp_path: Path, byte: str) -> None:
    """Without a checksum a changed digit cannot be noticed; nothing may break, though."""
    text = LAYOUTS["one key a line"](events(1))
    path = tmp_path / NAME
    whole = len(truth(events(1)))
    for at in range(len(text)):
        path.write_text(text[:at] + byte + text[at + 1 :])
        found = outcome(path)
        assert isinstance(found, str) or len(found) <= whole, at


def test_a_cut_file_gives_its_front_when_allowed(tmp_path: Path) -> None:
    found = events()
    data = gzip.compress(LAYOUTS["one line"](found).encode(), 1, mtime=0)
    for size in (len(data) // 2, len(data) - 9, len(data) - 1):
        path = tmp_path / (NAME + ".gz")
        path.write_bytes(data[:size])
        with pytest.raises(TraceTruncated):
            read_window(path)
        table = read_window(path, allow_partial=True)
        assert table.partial
        assert any("truncated" in note for note in table.notes)
        assert set(rows_of(path, allow_partial=True)) <= set(truth(found))
        assert len(table.frame) > 0


def test_an_empty_list_is_an_answer(tmp_path: Path) -> None:
    table = read_window(write(tmp_path, document([])))
    assert (table.ranks, len(table.frame)) == (("TP0",), 0)


# --- compressed streams -----------------------------------------------------------------


def test_members_and_padding(tmp_path: Path) -> None:
    text = json.dumps(document(events())).encode()
    half = len(text) // 2
    data = gzip.compress(text[:half], mtime=0) + gzip.compress(text[half:], mtime=0)
    path = tmp_path / (NAME + ".gz")
    path.write_bytes(data + bytes(300_000))
    assert rows_of(path) == truth(events())
    path.write_bytes(data + b"more")
    with pytest.raises(TraceError, match="bytes after its compressed data"):
        read_window(path)


def test_without_isal_the_standard_library_does_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, packed: bytes
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "isal", None)
    path = tmp_path / (NAME + ".gz")
    path.write_bytes(packed)
    assert rows_of(path) == truth(events(4))
    assert isinstance(inflate._gzip_inflater(), inflate._ZlibInflater)
    path.write_bytes(packed[:-9])
    with pytest.raises(TraceTruncated):
        read_window(path)
    path.write_bytes(packed[:-8] + bytes(4) + packed[-4:])
    with pytest.raises(TraceError, match="damaged"):
        read_window(path)


def test_pieces_stay_small_however_well_a_file_is_packed(tmp_path: Path) -> None:
    path = write(tmp_path, "x" * 5_000_000, NAME + ".gz", level=9)
    sizes = [len(piece) for piece in inflate.pieces(path, size=100_000)]
    assert (max(sizes), sum(sizes)) == (100_000, 5_000_000)
    assert zlib.decompressobj(31).decompress(path.read_bytes())[:3] == b"xxx"


@pytest.mark.parametrize("ns", [0, 1, 999, 8_796_093_022_207_999, 4_458_676_983_543_183])
def test_float_times_below_the_limit_are_exact(ns: int) -> None:
    assert ns_from_float(float(f"{ns // 1000}.{ns % 1000:03d}")) == ns


def test_batches_hold_every_column(tmp_path: Path) -> None:
    batches: list[Batch] = []
    path = write(tmp_path, document(events()))
    facts = scan_file(path, Wanted(), batches.append)
    for batch in batches:
        columns = {len(value) for key, value in vars(batch).items() if key != "exact"}
        assert columns == {len(batch)}
        assert all(KINDS[kind] in ("kernel", "memcpy", "memset") for kind in batch.kind)
        assert all(0 <= code < len(facts.names) for code in batch.name)
