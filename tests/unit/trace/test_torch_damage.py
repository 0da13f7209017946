"""Damaged files: the right table, or a `TraceError`; never another exception, never silence.

Every byte of a small trace is flipped, removed with all that follows, and preceded by another.
What no reader can notice is a change that leaves valid JSON (a digit, a letter of a name): the
truth is then what plain `json` reads in the same bytes. Gzip's checksum notices all of it.
"""

from __future__ import annotations

import gzip
import itertools
import json
import zlib
from collections.abc import Iterator
from decimal import Decimal, InvalidOperation
from pathlib import Path

import pytest

from pytest_sglprof._errors import NotATrace, TraceError, TraceTruncated
from pytest_sglprof._trace.read import read_window
from pytest_sglprof._trace.table import KernelTable
from pytest_sglprof._trace.torch import stream
from pytest_sglprof._trace.torch.assemble import read_traces
from tests.support.kineto import Event, document, event, kernel, kineto_text, write

GPU = {"kernel", "gpu_memcpy", "gpu_memset", "memcpy", "memset"}
EVENTS = [
    {"ph": "M", "name": "process_name", "pid": 5, "tid": 0, "args": {"name": "python"}},
    event("python_function", "m.py(3): f", 0, 99, 5, 5),
    kernel("gemm", 10.001, 5.002),
    event("gpu_memset", "Memset (Device)", 20, 7.25, stream=8),
]
DOCUMENT = document(EVENTS, rank=0)
RIGHT = [("Memset (Device)", 7_250), ("gemm", 5_002)]
INSERTED = (b'"', b"]", b"7", b"\xff", b"\\")
FLIPS = (0x01, 0x80, 0x20)


def pairs(table: KernelTable) -> list[tuple[str, int]]:
    frame = table.frame
    return sorted(
        (str(n), int(d)) for n, d in zip(frame["full_name"], frame["dur_ns"], strict=True)
    )


def read(path: Path, *, allow_partial: bool = False) -> tuple[list[tuple[str, int]], list[str]]:
    """(name, ns) of each activity, and the notes; without the cost of a pandas table."""
    ((_, found),) = read_traces([path], allow_partial=allow_partial)
    names = [found.names[code] for code in found.name_codes]
    return sorted(zip(names, map(int, found.dur), strict=True)), list(found.notes)


def damaged(data: bytes) -> Iterator[tuple[str, bytes]]:
    """A cut, a flip and an insertion at every offset; masks and bytes take turns."""
    for at in range(len(data)):
        mask, new = FLIPS[at % len(FLIPS)], INSERTED[at % len(INSERTED)]
        yield f"cut at {at}", data[:at]
        yield f"flip {mask:#x} at {at}", data[:at] + bytes([data[at] ^ mask]) + data[at + 1 :]
        yield f"insert {new!r} at {at}", data[:at] + new + data[at:]


def told_by_json(data: bytes) -> list[tuple[str, int]] | None:
    """The activities that plain `json` sees; None when these bytes are no JSON."""
    try:
        text = data.decode("utf-8-sig")
        doc = json.loads(text, parse_float=Decimal, parse_constant=_refused)
    except ValueError:
        return None
    found = []
    for entry in doc["traceEvents"]:
        if entry.get("ph") != "X" or str(entry.get("cat", "")).lower() not in GPU:
            continue
        try:
            dur = int((Decimal(str(entry["dur"])) * 1000).quantize(1))
            Decimal(str(entry["ts"]))
        except (InvalidOperation, KeyError):
            continue
        if dur >= 0:
            found.append((str(entry.get("name", "")), dur))
    return sorted(found)


def _refused(constant: str) -> None:
    raise ValueError(constant)


@pytest.mark.parametrize("layout", [kineto_text, json.dumps], ids=["kineto", "one line"])
def test_every_byte_of_a_plain_file(tmp_path: Path, layout: object) -> None:
    assert callable(layout)
    data = layout(DOCUMENT).encode()
    assert read(write(tmp_path, data)) == (RIGHT, [])
    silent = []
    for what, content in damaged(data):
        try:
            found, notes = read(write(tmp_path, content))
        except TraceError as error:
            assert str(tmp_path) in error.what
            continue
        if found != RIGHT and not notes and told_by_json(content) != found:
            silent.append((what, found))
    assert silent == []


def test_every_cut_of_a_plain_file_is_told(tmp_path: Path) -> None:
    data = kineto_text(DOCUMENT).rstrip().encode()
    for at in range(1, len(data)):
        path = write(tmp_path, data[:at])
        with pytest.raises(TraceTruncated if b'"traceEvents"' in data[:at] else TraceError):
            read(path)


def test_every_cut_gives_its_front_when_allowed(tmp_path: Path) -> None:
    data = kineto_text(DOCUMENT).encode()
    first = data.index(b'"ph"')
    memset = data.index(b"gpu_memset")
    end = data.rindex(b"}")
    seen = set()
    for at in range(first + 5, end):
        found, notes = read(write(tmp_path, data[:at]), allow_partial=True)
        assert any("truncated" in note for note in notes)
        assert set(found) <= set(RIGHT)
        if at <= memset:
            assert ("Memset (Device)", 7_250) not in found
        seen.add(tuple(found))
    assert seen == {(), (RIGHT[1],), tuple(RIGHT)}


@pytest.fixture(params=["isal", "zlib"])
def inflater(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "zlib":
        monkeypatch.setattr(stream, "_gzip_inflater", stream._ZlibInflater)
    else:
        pytest.importorskip("isal")
    return str(request.param)


def test_every_byte_of_a_packed_file(tmp_path: Path, inflater: str) -> None:
    data = gzip.compress(kineto_text(DOCUMENT).encode(), mtime=0)
    name = "1-TP-0.trace.json.gz"
    for what, content in damaged(data):
        path = tmp_path / name
        path.write_bytes(content)
        try:
            found, notes = read(path)
        except TraceError as error:
            assert str(path) in error.what
            continue
        # Only the header's time stamp, system and hints may change unnoticed.
        assert (found, notes) == (RIGHT, []), what


def test_every_cut_of_a_packed_file_is_told(tmp_path: Path, inflater: str) -> None:
    data = gzip.compress(kineto_text(DOCUMENT).encode(), mtime=0)
    for at in range(2, len(data)):
        with pytest.raises(TraceTruncated, match="ends in the middle"):
            read(_raw(tmp_path, data[:at]))


def _raw(folder: Path, data: bytes) -> Path:
    path = folder / "1-TP-0.trace.json.gz"
    path.write_bytes(data)
    return path


def large(count: int = 4000) -> tuple[Event, int]:
    events = [kernel(f"gemm_{n}", 10 * n, 1 + n % 7) for n in range(count)]
    return document(events, rank=0), count


@pytest.mark.parametrize("share", [0.2, 0.5, 0.9, 0.999])
def test_the_front_of_a_cut_packed_file(tmp_path: Path, inflater: str, share: float) -> None:
    doc, count = large()
    data = gzip.compress(kineto_text(doc).encode(), mtime=0)
    path = _raw(tmp_path, data[: int(len(data) * share)])
    with pytest.raises(TraceTruncated, match=r"1-TP-0\.trace\.json\.gz") as caught:
        read_window(path)
    assert "allow_partial" in caught.value.hint
    table = read_window(path, allow_partial=True)
    assert table.partial
    durs = list(table.frame["dur_ns"])
    assert durs == [1000 * (1 + n % 7) for n in range(len(durs))]
    assert 0 < len(durs) <= count
    assert share > 0.5 or len(durs) < count


def test_nothing_before_the_cut_is_an_error_even_when_allowed(tmp_path: Path) -> None:
    data = gzip.compress(kineto_text(DOCUMENT).encode(), mtime=0)
    for at in (2, 11, 20):
        with pytest.raises(TraceError):
            read_window(_raw(tmp_path, data[:at]), allow_partial=True)


def test_several_members_are_one_file(tmp_path: Path, inflater: str) -> None:
    doc, count = large(300)
    text = kineto_text(doc).encode()
    cuts = [0, 1, 2, len(text) // 3, len(text) // 2, len(text)]
    members = [gzip.compress(text[a:b]) for a, b in itertools.pairwise(cuts)]
    assert len(read_window(_raw(tmp_path, b"".join(members))).frame) == count
    with pytest.raises(TraceTruncated):
        read_window(_raw(tmp_path, b"".join(members)[:-4]))
    whole = read_window(_raw(tmp_path, b"".join(members) + gzip.compress(b"") + b"\0" * 700))
    assert (len(whole.frame), whole.notes) == (count, ())


def test_a_wrong_checksum_shows_at_the_end_and_counts(tmp_path: Path, inflater: str) -> None:
    doc, _ = large()
    data = bytearray(gzip.compress(kineto_text(doc).encode()))
    data[-8] ^= 0x10
    for allowed in (False, True):
        with pytest.raises(TraceError, match="damaged") as caught:
            read_window(_raw(tmp_path, bytes(data)), allow_partial=allowed)
        assert not isinstance(caught.value, TraceTruncated)


@pytest.mark.parametrize("garbage", [b"x", b"\x1f", b"and more", b"\0\0x", b"\x1f\x8b\x08"])
def test_bytes_after_the_last_member(tmp_path: Path, inflater: str, garbage: bytes) -> None:
    data = gzip.compress(kineto_text(DOCUMENT).encode()) + garbage
    with pytest.raises(TraceError):
        read_window(_raw(tmp_path, data))


def test_bytes_after_plain_json(tmp_path: Path) -> None:
    text = kineto_text(DOCUMENT)
    for more in ("x", text, "}", "[]"):
        with pytest.raises(TraceError):
            read_window(write(tmp_path, text + more))


def test_pieces_are_small_and_progress_tells_stored_bytes(tmp_path: Path, inflater: str) -> None:
    doc, _ = large()
    text = kineto_text(doc).encode()
    path = _raw(tmp_path, gzip.compress(text))
    read: list[int] = []
    got = list(stream.pieces(path, size=1000, progress=read.append))
    assert b"".join(got) == text
    assert max(map(len, got)) <= 1000
    assert sum(read) == path.stat().st_size
    plain = write(tmp_path, text, "plain.json")
    read.clear()
    assert b"".join(stream.pieces(plain, size=1000, progress=read.append)) == text
    assert sum(read) == len(text)


def test_zstd_is_read_or_refused_with_the_way_out(tmp_path: Path) -> None:
    path = tmp_path / "1-TP-0.trace.json.zst"
    try:
        from compression import zstd
    except ImportError:
        path.write_bytes(b"\x28\xb5\x2f\xfd" + b"\0" * 9)
        with pytest.raises(TraceError, match="zstd") as caught:
            read_window(path)
        assert "zstd -d" in caught.value.hint
    else:
        path.write_bytes(zstd.compress(kineto_text(DOCUMENT).encode()))
        assert pairs(read_window(path)) == RIGHT


def test_an_unreadable_file(tmp_path: Path) -> None:
    with pytest.raises(NotATrace, match="cannot be opened"):
        list(stream.pieces(tmp_path))


def test_isal_missing_falls_back_to_zlib(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "isal", None)
    assert isinstance(stream._gzip_inflater(), stream._ZlibInflater)
    assert zlib.ZLIB_VERSION
