"""What is no trace of one window is refused, and named for what it is, by library and commands."""

from __future__ import annotations

import gzip
import io
import json
import re
import struct
import sys
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pytest_sglprof._cli.main import main
from pytest_sglprof._errors import NoKernels, NotATrace, TraceError, TraceTruncated
from pytest_sglprof._trace.merge.files import merge_files
from pytest_sglprof._trace.read import read_window
from pytest_sglprof._trace.torch import assemble
from tests.support.kineto import KERNELS, document, event, kernel, kineto_text, write
from tests.support.kineto import ROWS as RIGHT
from tests.support.kineto import rows as rows_of

Output = pytest.CaptureFixture[str]
TEXT = kineto_text(document(KERNELS, rank=0)).encode()
# No codec's words, and no name of a function.
CODEC = re.compile(
    r"Error -|while decompressing|Input data was truncated|malformed|Expected `|zlib"
)


def commands(path: Path, out: Path) -> list[list[str]]:
    """Every command that reads traces."""
    return [
        ["kernels", str(path)],
        ["check", str(path)],
        ["check", str(path), "--metric", "lateness"],
        ["export", "--to", "perfetto", str(path), "-o", str(out / "merged.json.gz")],
        ["export", "--to", "perfetto", "--only", "kernels", str(path), "-o", str(out / "k.json")],
    ]


def refused_everywhere(path: Path, out: Path, words: str, capsys: Output) -> None:
    """Each command ends with 2 (`check` may say 3), names the reason, and writes nothing."""
    for command in commands(path, out):
        status = main(command)
        stdout, stderr = capsys.readouterr()
        assert status in ((2, 3) if command[0] == "check" else (2,)), command
        assert re.search(words, stdout + stderr), (command, stdout, stderr)
        assert not CODEC.search(stdout + stderr), (command, stderr)
        assert "allow_partial=True" not in stdout + stderr
    assert not list(out.glob("*.json*"))


def tarred(data: bytes, mode: Any) -> bytes:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode=mode) as archive:
        member = tarfile.TarInfo("rank-0.json")
        member.size = len(data)
        archive.addfile(member, io.BytesIO(data))
    return packed.getvalue()


def zipped(data: bytes) -> bytes:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr("rank-0.json", data)
    return packed.getvalue()


def png() -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        checksum = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + checksum

    header = struct.pack(">IIBBBBB", 1, 1, 8, 0, 0, 0, 0)
    pixels = chunk(b"IDAT", zlib.compress(b"\0\0"))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + pixels + chunk(b"IEND", b"")


FILES: dict[str, tuple[bytes, str]] = {
    "zip": (zipped(TEXT), r"is an archive \(zip\)\n.*\n  next: unpack it"),
    "tar": (tarred(TEXT, "w"), r"is an archive \(tar\)\n.*\n  next: unpack it"),
    "tar.gz": (tarred(TEXT, "w:gz"), r"is an archive \(tar\)\n.*\n  next: unpack it"),
    "tar.bz2": (tarred(TEXT, "w:bz2"), "bzip2"),
    "tar.xz": (tarred(TEXT, "w:xz"), "xz"),
    "7z": (b"7z\xbc\xaf\x27\x1c\x00\x04" + b"\0" * 40, r"is an archive \(7z\)"),
    "zstd in gzip": (gzip.compress(b"\x28\xb5\x2f\xfd" + b"\0" * 9), "zstd inside"),
    "gzip twice": (gzip.compress(gzip.compress(TEXT)), "gzip twice"),
    "picture": (png(), r"is a picture \(PNG\)"),
    "packed picture": (gzip.compress(png()), r"is a picture \(PNG\)"),
    "page": (b"\n<!DOCTYPE html><html><title>Sign in</title>", "is a page of HTML"),
    "Parquet": (b"PAR1" + b"\0" * 40 + b"PAR1", "is a Parquet file"),
    "xplane": (
        b"\x0a\x9a\x01\x12\x12/device:GPU:0\x1a\x00\x22\xff" + bytes(range(256)),
        "JAX or TensorFlow",
    ),
    "rocprof": (b'"Kind","Agent_Id","Queue_Id","Kernel_Name","Start"\n"K",1,2,"x",5\n', "rocprof"),
    "old rocprof": (b"Index,KernelName,gpu-id\n0,x,1\n", "rocprof"),
    "nsys stats": (b"Time (%),Total Time (ns),Instances\n99,12,1\n", "nsys stats"),
    "Ascend's table": (b"Step Id,Device_id,Name,Type,Accelerator Core\n", "Ascend"),
    "any table": (b"rank,name,total\n0,x,1\n", r"is a table \(CSV\)"),
    "pickle": (b"\x80\x04\x95\x0b\0\0\0\0\0\0\0}", "pickle"),
    "LFS pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS"),
    "UTF-16": (TEXT.decode().encode("utf-16"), "UTF-16"),
    "UTF-16 without mark": (TEXT.decode().encode("utf-16-le"), "UTF-16"),
    "nothing": (b"", "is empty"),
    "spaces": (b" \n\n", "is empty"),
    "empty gzip": (gzip.compress(b""), "is empty: there is nothing inside its compressed data"),
    "text": (b"Traceback (most recent call last):\n", "it begins with 'Traceback"),
    "binary": (bytes(range(1, 32)) * 9, "binary data"),
    "rocprofv3": (b'{"rocprofiler-sdk-tool": [{"metadata": {}}]}', "rocprofv3"),
    "other JSON": (b'{"rank": 0}', "no traceEvents"),
    "list of numbers": (b"[1, 2, 3]", "is not a torch trace"),
    "broken JSON": (b'{"rank": 0, ]}', "broken at byte 12"),
    "cut JSON": (b'{"schemaVersion": 1, "devic', "ends in the middle of its JSON"),
}


@pytest.mark.parametrize("what", FILES)
def test_other_files_are_named_by_every_command(tmp_path: Path, capsys: Output, what: str) -> None:
    content, words = FILES[what]
    path = tmp_path / "in" / "1-TP-0.trace.json"
    path.parent.mkdir()
    path.write_bytes(content)
    with pytest.raises(TraceError, match=words) as caught:
        read_window(path)
    assert "1-TP-0.trace.json" in caught.value.what
    assert caught.value.hint
    refused_everywhere(path, tmp_path, words, capsys)
    refused_everywhere(path.parent, tmp_path, words, capsys)


@pytest.mark.parametrize("what", ["zip", "tar", "picture"])
def test_a_name_of_nsys_does_not_hide_what_it_is(tmp_path: Path, what: str, capsys: Output) -> None:
    path = tmp_path / "x.sqlite"
    path.write_bytes(FILES[what][0])
    assert main(["kernels", str(path)]) == 2
    assert re.search(FILES[what][1].partition("\\n")[0], capsys.readouterr().err)


def test_an_archive_alone_in_a_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "traces.zip").write_bytes(zipped(TEXT))
    with pytest.raises(NotATrace, match=r"traces\.zip is an archive"):
        read_window(tmp_path)


def test_an_archive_of_zstd_is_refused_with_the_way_out(tmp_path: Path) -> None:
    path = tmp_path / "window.tar.zst"
    path.write_bytes(b"\x28\xb5\x2f\xfd" + b"\0" * 9)
    with pytest.raises(TraceError) as caught:
        read_window(path)
    if "compression" not in sys.modules:
        assert "is an archive compressed with zstd" in caught.value.what
        assert "tar --zstd -xf" in caught.value.hint


def test_a_stray_parquet_file_hides_no_trace(tmp_path: Path) -> None:
    write(tmp_path, TEXT)
    (tmp_path / "notes.parquet").write_bytes(b"PAR1")
    assert rows_of(read_window(tmp_path)) == RIGHT


# Traces of other programs ------------------------------------------------------------------


def span(name: str, ts: float, dur: float, **more: Any) -> dict[str, Any]:
    return {"ph": "X", "name": name, "pid": 1, "tid": 3, "ts": ts, "dur": dur, **more}


def process(name: str) -> dict[str, Any]:
    return {"ph": "M", "name": "process_name", "pid": 1, "args": {"name": name}}


OTHERS: dict[str, tuple[Any, str]] = {
    "JAX": (
        {"traceEvents": [process("/device:GPU:0"), span("fusion", 1, 2), {}]},
        "is a trace of JAX or TensorFlow",
    ),
    "JAX by its arguments": (
        {"traceEvents": [span("f", n, 1, args={"hlo_op": "dot.1"}) for n in range(9)]},
        "is a trace of JAX or TensorFlow",
    ),
    "msprof": (
        [process("Ascend Hardware"), span("MatMulV2", 1, 2, args={"Task Type": "AI_CORE"})],
        "is a trace of Ascend's profiler",
    ),
    # Its operators of the CPU have Kineto's category; its kernels have none.
    "torch_npu": (
        [*(span("aten::mm", n, 1, cat="cpu_op") for n in range(2_500)),
         process("Ascend Hardware"), span("MatMulV2", 1, 2)],
        "is a trace of Ascend's profiler",
    ),
    "a browser": (
        {"traceEvents": [span("V8.Run", 1, 2, cat="v8"), process("CrBrowserMain")]},
        "is a trace of a browser",
    ),
    "nobody we know": (
        {"traceEvents": [span("work", n, 1, cat="mine") for n in range(3)]},
        "none of its 3 events has a category of the torch profiler",
    ),
}  # fmt: skip


@pytest.mark.parametrize("scanned", [False, True])
@pytest.mark.parametrize("whose", OTHERS)
def test_traces_of_other_programs_are_named(
    tmp_path: Path, capsys: Output, monkeypatch: pytest.MonkeyPatch, whose: str, scanned: bool
) -> None:
    if scanned:
        monkeypatch.setattr(assemble, "SCAN_BYTES", 0)
    content, words = OTHERS[whose]
    path = write(tmp_path / "in", json.dumps(content), "1-TP-0.trace.json")
    with pytest.raises(NotATrace, match=words):
        read_window(path)
    refused_everywhere(path, tmp_path, words, capsys)


# Two documents, and a list of events alone ---------------------------------------------------


def two_of(first: Any, second: Any, between: str = "") -> bytes:
    return f"{json.dumps(first)}{between}{json.dumps(second)}".encode()


# Events as Kineto has them: the first and the last ones are none that a scan looks at.
MANY = [
    event("cpu_op", "aten::mm", 0, 1),
    *(kernel(f"gemm_{n}", 10 * n, 5) for n in range(9)),
    event("cpu_op", "aten::mm", 99, 1),
]
DOCUMENTS: dict[str, bytes] = {
    "at once": two_of(document(MANY), document(MANY)),
    "two lines": two_of(document(MANY), document(MANY), "\n"),
    "lists": two_of(MANY, MANY, "\n"),
    "Kineto's layout": kineto_text(document(MANY)).encode() * 2,
    "the first one cut": kineto_text(document(MANY)).encode()[:-70]
    + kineto_text(document(MANY)).encode(),
    "members of gzip": gzip.compress(TEXT) + gzip.compress(TEXT),
    "a broken name": kineto_text(document(MANY)).replace("aten::mm", 'a"b').encode() * 2,
}


@pytest.mark.parametrize("scanned", [False, True])
@pytest.mark.parametrize("what", DOCUMENTS)
def test_two_documents_in_one_file_are_refused(
    tmp_path: Path, capsys: Output, monkeypatch: pytest.MonkeyPatch, what: str, scanned: bool
) -> None:
    if scanned:
        monkeypatch.setattr(assemble, "SCAN_BYTES", 0)
    path = tmp_path / "in" / "1-TP-0.trace.json"
    path.parent.mkdir()
    path.write_bytes(DOCUMENTS[what])
    with pytest.raises(TraceError, match="holds two documents"):
        read_window(path)
    with pytest.raises(TraceError, match="holds two documents"):
        merge_files([path], tmp_path / "merged.json.gz")
    refused_everywhere(path, tmp_path, "holds two documents", capsys)


def test_two_large_documents_are_seen_while_scanning(tmp_path: Path) -> None:
    events = [event("cpu_op", "x" * 60, 0, 1) if n % 9 == 0 else kernel("k", n, 1)
              for n in range(19_000)]  # fmt: skip
    text = kineto_text(document(events, rank=0)).encode()
    path = tmp_path / "1-TP-0.trace.json"
    path.write_bytes(text * 2)
    assert path.stat().st_size > assemble.SCAN_BYTES
    with pytest.raises(TraceError, match="holds two documents"):
        read_window(path)
    with pytest.raises(TraceError, match="holds two documents"):
        merge_files([path], tmp_path / "merged.json")


@pytest.mark.parametrize("scanned", [False, True])
@pytest.mark.parametrize("text", [json.dumps(document(MANY)), json.dumps(MANY)])
@pytest.mark.parametrize("rest", ["x", " tail", "]", "}"])
def test_what_stands_behind_the_end_is_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, rest: str, scanned: bool
) -> None:
    if scanned:
        monkeypatch.setattr(assemble, "SCAN_BYTES", 0)
    with pytest.raises(TraceError, match="has text behind the end of its JSON") as caught:
        read_window(write(tmp_path, text + rest))
    assert repr(rest.strip()) in caught.value.what


LISTS: dict[str, Callable[[list[Any]], str]] = {
    "one line": json.dumps,
    "indented": lambda events: json.dumps(events, indent=2),
    "with space around": lambda events: f"\n {json.dumps(events)} \n",
    "with a mark": lambda events: "\ufeff" + json.dumps(events),
    "an empty event last": lambda events: json.dumps([*events, {}]),
}


@pytest.mark.parametrize("scanned", [False, True])
@pytest.mark.parametrize("layout", LISTS)
def test_a_list_of_events_alone_is_a_trace(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layout: str, scanned: bool
) -> None:
    if scanned:
        monkeypatch.setattr(assemble, "SCAN_BYTES", 0)
    path = write(tmp_path, LISTS[layout](KERNELS))
    table = read_window(path)
    assert rows_of(table, base=0) == RIGHT
    assert [note for note in table.notes if "decoded" in note] == []
    result = merge_files([path], tmp_path / "merged.json")
    assert result.events["TP0"] == len(json.loads(path.read_text("utf-8-sig")))
    assert rows_of(read_window(tmp_path / "merged.json"), base=0) == RIGHT


@pytest.mark.parametrize("scanned", [False, True])
def test_a_list_that_is_cut_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scanned: bool
) -> None:
    if scanned:
        monkeypatch.setattr(assemble, "SCAN_BYTES", 0)
    text = json.dumps([*KERNELS, kernel("last", 99, 1)])
    path = write(tmp_path, text[:-20])
    with pytest.raises(TraceTruncated):
        read_window(path)
    table = read_window(path, allow_partial=True)
    assert (rows_of(table, base=0), table.partial) == (RIGHT, True)


def test_a_large_list_is_scanned(tmp_path: Path) -> None:
    events = [kernel(f"gemm_{n % 7}", n, 0.5) for n in range(24_000)]
    path = write(tmp_path, json.dumps(events))
    assert path.stat().st_size > assemble.SCAN_BYTES
    table = read_window(path)
    assert (len(table.frame), table.notes) == (24_000, ())


# The option of the door ----------------------------------------------------------------------


@pytest.mark.parametrize("packed", [False, True])
def test_a_cut_file_names_the_option_of_the_door(
    tmp_path: Path, capsys: Output, packed: bool
) -> None:
    data = gzip.compress(TEXT)[:-30] if packed else TEXT[:-60]
    path = tmp_path / "1-TP-0.trace.json"
    path.write_bytes(data)
    with pytest.raises(TraceTruncated) as caught:
        read_window(path)
    assert "allow_partial=True" in str(caught.value)
    assert "--allow-partial" not in str(caught.value)
    assert main(["kernels", str(path)]) == 2
    error = capsys.readouterr().err
    assert "--allow-partial" in error
    assert "allow_partial=True" not in error


def test_damaged_compression_is_told_in_our_words(tmp_path: Path, capsys: Output) -> None:
    data = bytearray(gzip.compress(TEXT))
    data[40] ^= 0xFF
    path = tmp_path / "1-TP-0.trace.json.gz"
    path.write_bytes(data)
    assert main(["kernels", str(path)]) == 2
    error = capsys.readouterr().err
    assert "is damaged" in error
    assert not CODEC.search(error)


# The given cases -----------------------------------------------------------------------------

CASES = {
    "two_docs": "holds two documents",
    "two_docs_nl": "holds two documents",
    "zipped.json": r"is an archive \(zip\)",
    "jax": "is a trace of JAX or TensorFlow",
    "cupti_failed": "200 launches.*, but no kernels were recorded",
    "mtia": "events of MTIA",
    "nsys_table_v3.sqlite": "CUPTI_ACTIVITY_KIND_KERNEL_V3",
    "nsys_runtime_only.sqlite": "1 CUDA call, but no kernels were recorded",
}


@pytest.mark.parametrize("case", CASES)
def test_given_cases(cases: Path, tmp_path: Path, capsys: Output, case: str) -> None:
    words = CASES[case]
    with pytest.raises(TraceError, match=words):
        read_window(cases / case)
    for command in commands(cases / case, tmp_path):
        status = main(command)
        printed = "".join(capsys.readouterr())
        assert status in (2, 3), command
        if not ("perfetto" in command and "sqlite" in case and "--only" not in command):
            assert re.search(words, printed), command


def test_a_zip_is_unpacked_by_commands_and_named_by_the_reader(cases: Path, capsys: Output) -> None:
    with pytest.raises(NotATrace, match=r"is an archive \(zip\)"):
        read_window(cases / "zipped.zip")
    assert main(["kernels", str(cases / "zipped.zip")]) == 0
    assert "TP0" in capsys.readouterr().out


def test_kernels_that_were_not_recorded_are_inconclusive(cases: Path, capsys: Output) -> None:
    for more in ([], ["--metric", "lateness"], ["--limit", "1.1"]):
        words = ["check", str(cases / "cupti_failed"), "--min-steps", "30", *more]
        assert main([*words, "--format", "json"]) == 3
        found = json.loads(capsys.readouterr().out)
        assert found["verdict"] == "inconclusive"
        assert "TP1 (rank-1.json): 200 launches" in found["reason"]
        assert "CUPTI failed to attach" in found["notes"][0]
        assert main([*words, "--format", "csv"]) == 3
        assert main([*words, "--exit-zero"]) == 0
        capsys.readouterr()
    assert issubclass(NoKernels, TraceError)  # a window of pytest is inconclusive for these
