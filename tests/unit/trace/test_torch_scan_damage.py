"""The scan on damaged files: every fault is noticed, or does no harm."""

from __future__ import annotations

import gzip
import json
import time
import zlib
from array import array
from pathlib import Path

import pytest

from pytest_sglprof._errors import SglprofError, TraceError, TraceTruncated
from pytest_sglprof._trace.read import read_window
from pytest_sglprof._trace.torch import stream
from pytest_sglprof._trace.torch.collect import ScanRequest
from pytest_sglprof._trace.torch.events import KINDS, Batch, exact_ns
from pytest_sglprof._trace.torch.scan import scan_file
from tests.support.scanned import LAYOUTS, NAME, Row, document, events, rows_of, truth, write


@pytest.fixture(autouse=True)
def every_file_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pytest_sglprof._trace.torch.assemble.SCAN_BYTES", 0)


def quick_rows(path: Path) -> list[Row]:
    """The rows without the table around them, which would take most of the time."""
    batches: list[Batch] = []
    facts = scan_file(path, ScanRequest(), batches.append, restart=batches.clear)
    if facts.unsafe:
        return rows_of(path)
    base = int(facts.base or 0)
    rows = []
    for batch in batches:
        starts = exact_ns(batch.start, batch.exact).tolist()
        durs = exact_ns(batch.dur, batch.exact).tolist()
        for name, kind, start, dur in zip(batch.name, batch.kind, starts, durs, strict=True):
            rows.append((facts.names[name], KINDS[kind], start + base, dur))
    return sorted(rows)


def outcome(path: Path) -> list[Row] | str:
    """The rows, or the name of our own error; anything else and anything slow fails."""
    begin = time.process_time()  # a busy machine is no fault
    try:
        result: list[Row] | str = quick_rows(path)
    except SglprofError as error:
        assert path.name in error.what
        assert error.expected
        assert error.hint
        result = type(error).__name__
    assert time.process_time() - begin < 1.0
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
    assert isinstance(stream._gzip_inflater(), stream._ZlibInflater)
    path.write_bytes(packed[:-9])
    with pytest.raises(TraceTruncated):
        read_window(path)
    path.write_bytes(packed[:-8] + bytes(4) + packed[-4:])
    with pytest.raises(TraceError, match="damaged"):
        read_window(path)


def test_pieces_stay_small_however_well_a_file_is_packed(tmp_path: Path) -> None:
    path = write(tmp_path, "x" * 5_000_000, NAME + ".gz", level=9)
    sizes = [len(piece) for piece in stream.pieces(path, size=100_000)]
    assert (max(sizes), sum(sizes)) == (100_000, 5_000_000)
    assert zlib.decompressobj(31).decompress(path.read_bytes())[:3] == b"xxx"


@pytest.mark.parametrize("ns", [0, 1, 999, 8_796_093_022_207_999, 4_458_676_983_543_183])
def test_float_times_below_the_limit_are_exact(ns: int) -> None:
    microseconds = array("d", [float(f"{ns // 1000}.{ns % 1000:03d}")])
    assert exact_ns(microseconds, exact=False).tolist() == [ns]


def test_batches_hold_every_column(tmp_path: Path) -> None:
    batches: list[Batch] = []
    path = write(tmp_path, document(events()))
    facts = scan_file(path, ScanRequest(), batches.append)
    for batch in batches:
        own = {key: getattr(batch, key) for key in batch.__struct_fields__ if key != "exact"}
        calls = {len(own.pop(key)) for key in list(own) if key.startswith("call_")}
        assert calls == {0}  # no process group is told here
        assert {len(value) for value in own.values()} == {len(batch)}
        assert all(KINDS[kind] in ("kernel", "memcpy", "memset") for kind in batch.kind)
        assert all(0 <= code < len(facts.names) for code in batch.name)
