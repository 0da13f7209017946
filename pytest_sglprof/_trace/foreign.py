"""What a file is that is neither a trace of the torch profiler nor a report of nsys.

By its first bytes (`refuse_foreign`), whatever its name, and by the events of its JSON
(`refuse_dialect`): many programs write the same "Trace Event Format" as torch.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import NoReturn

from pytest_sglprof._errors import NotATrace

HEAD = 600  # bytes that are looked at; a tar archive shows at byte 257
EXPECTED = "a Kineto trace of the torch profiler (.json, .json.gz), or an nsys report"
_GIVE = "give the *.trace.json.gz files that the server wrote, or an nsys report"
_UNPACK = "unpack it, and give the traces that are in it"
_OTHER_PROFILER = "record the window with the torch profiler of SGLang, or with nsys"

# (how such a file begins, what it is, what to do); the first row that fits counts.
_BEGINNINGS: tuple[tuple[bytes, str, str], ...] = (
    (rb"PK(?:\x03\x04|\x05\x06|\x07\x08)", "is an archive (zip)", _UNPACK),
    (rb"(?s:.{257})ustar", "is an archive (tar)", _UNPACK),
    (rb"7z\xbc\xaf\x27\x1c", "is an archive (7z)", _UNPACK),
    (rb"Rar!\x1a\x07", "is an archive (rar)", _UNPACK),
    (rb"\xfd7zXZ\x00", "is an archive or a file packed with xz", _UNPACK),
    (rb"BZh[1-9]", "is an archive or a file packed with bzip2", _UNPACK),
    (rb"\x04\x22\x4d\x18", "is an archive or a file packed with lz4", _UNPACK),
    (rb"\x1f\x8b", "is packed with gzip twice", "unpack it once: gunzip"),
    (rb"\x28\xb5\x2f\xfd", "is packed twice, with zstd inside", "unpack it first: zstd -d"),
    (rb"\x89PNG", "is a picture (PNG)", _GIVE),
    (rb"\xff\xd8\xff", "is a picture (JPEG)", _GIVE),
    (rb"GIF8", "is a picture (GIF)", _GIVE),
    (rb"%PDF-", "is a PDF document", _GIVE),
    (rb"\x7fELF", "is a program or a library", _GIVE),
    (
        rb"PAR1",
        "is a Parquet file",
        "give the whole folder of the nsys export that it belongs to, or the .nsys-rep",
    ),
    (rb"SQLite format 3\x00", "has an SQLite database inside", "unpack it first"),
    (rb"\x89HDF", "is an HDF5 file", "export the report with nsys export --type=sqlite"),
    (rb"\x80[\x02-\x05]", "is a Python pickle, such as torch's memory snapshots", _GIVE),
    (
        rb"version https://git-lfs",
        "is a pointer of Git LFS, not the file itself",
        "fetch the file: git lfs pull",
    ),
    (rb"\xff\xfe|\xfe\xff|[{\[]\x00|\x00[{\[]", "is text in UTF-16", "save it as UTF-8"),
    (
        rb"(?i)\s*<(?:!doctype|html|head|\?xml|svg)",
        "is a page of HTML or XML",
        "a download that needs a login gives a page instead of the file: download it again",
    ),
    (
        rb"(?s)\n.{1,400}?(?:/device:|/host:|Task Environment)",
        "is a profile of JAX or TensorFlow (XSpace, .xplane.pb)",
        _OTHER_PROFILER,
    ),
    (
        rb'(?i)[^{}\[\]\n]*,"?kernel_?name"?,',
        "is a table (CSV) of rocprof",
        "record the window with the torch profiler of SGLang, which also runs on AMD",
    ),
    (
        rb'[^{}\[\]\n]*"?Total Time \(ns\)"?,',
        "is a table (CSV) of nsys stats",
        "give the .nsys-rep that it was made of",
    ),
    (
        rb"(?i)[^{}\[\]\n]*(?:accelerator core|aicore_time|task type)",
        "is a table (CSV) of Ascend's profiler",
        _OTHER_PROFILER,
    ),
    (rb"[^,{}\[\]\n\x00-\x08]+(?:,[^,{}\[\]\n\x00-\x08]*){2,}\n", "is a table (CSV)", _GIVE),
)
_KINDS = tuple((re.compile(begins), what, hint) for begins, what, hint in _BEGINNINGS)
_BOM = b"\xef\xbb\xbf"

# (what stands in names and arguments of the first events, whose trace it is, what to do).
_DIALECTS = tuple(
    (re.compile(words), whose, hint)
    for words, whose, hint in (
        (rb"Ascend Hardware|\bCANN\b|\bHCCL\b", "Ascend's profiler (msprof)", _OTHER_PROFILER),
        (rb"/device:|/host:CPU|hlo_op|hlo_module", "JAX or TensorFlow", _OTHER_PROFILER),
        (rb"\bHSA\b|\bhsa_|rocprof|\broctx", "rocprof", _OTHER_PROFILER),
        (rb"CrRendererMain|CrBrowserMain|devtools", "a browser", _GIVE),
    )
)
_ASCEND = _DIALECTS[0]


def refuse_foreign(path: Path, head: bytes) -> None:
    """Raises `NotATrace` where a file's plain contents begin as no JSON of a trace does.

    head: the first bytes, unpacked where the file is compressed; `HEAD` of them are enough.
    """
    kind = kind_of(head)
    if kind is not None:
        what, hint = kind
        raise NotATrace(f"{path} {what}", expected=EXPECTED, hint=hint)
    text = head[:HEAD].removeprefix(_BOM).lstrip()
    if text and text[:1] not in b"{[":
        raise NotATrace(f"{path} {_unknown(text)}", expected=EXPECTED, hint=_GIVE)


def kind_of(head: bytes) -> tuple[str, str] | None:
    """What a file with these first bytes is ("is a picture (PNG)"), and what to do."""
    begin = head[:HEAD]
    return next(((what, hint) for begins, what, hint in _KINDS if begins.match(begin)), None)


def _unknown(text: bytes) -> str:
    line = text[:24].decode("utf-8", "replace").partition("\n")[0].rstrip()
    if line and line.isprintable() and "\ufffd" not in line:
        return f"is not a torch trace: it begins with {line!r}"
    return "is not a torch trace, but binary data of an unknown kind"


def refuse_dialect(path: Path, texts: Iterable[bytes], *, is_torch: bool, count: int) -> None:
    """Raises `NotATrace` for the trace of another program than torch.

    texts: names and arguments of the first events. is_torch: whether an event has one of
    Kineto's categories; Ascend's profiler has them too, for operators of the CPU, but not for
    kernels. count: the number of events with a duration.
    """
    sample = b"\n".join(texts)
    for words, whose, hint in (_ASCEND,) if is_torch else _DIALECTS:
        if words.search(sample):
            _refuse_trace_of(path, whose, hint)
    if not is_torch and count:
        raise NotATrace(
            f"{path} is not a torch trace: none of its {count} events has a category of the "
            "torch profiler",
            expected=EXPECTED,
            hint=_GIVE,
        )


def _refuse_trace_of(path: Path, whose: str, hint: str) -> NoReturn:
    raise NotATrace(
        f"{path} is a trace of {whose}, not of the torch profiler", expected=EXPECTED, hint=hint
    )


# (a key of the whole document, what it is, what to do), for JSON without a list of events.
_DOCUMENTS = (
    (b'"rocprofiler-sdk-tool"', "is the JSON of rocprofv3", _OTHER_PROFILER),
    (b"speedscope.app/file-format", "is a profile for speedscope", _GIVE),
    (b'"schema_version"', "holds results of sglprof", "give the traces of its windows"),
    (b'"nodes"', "is a CPU profile of a browser or Node.js", _GIVE),
)


def refuse_document(path: Path, data: bytes | bytearray) -> NoReturn:
    """Raises `NotATrace` for JSON that has no list of events."""
    if data.lstrip().startswith(b"["):
        raise NotATrace(
            f"{path} is not a torch trace, but an empty list", expected=EXPECTED, hint=_GIVE
        )
    for key, what, hint in _DOCUMENTS:
        if key in data:
            raise NotATrace(f"{path} {what}, not a trace", expected=EXPECTED, hint=hint)
    raise NotATrace(
        f"{path} is JSON, but not a trace: it has no traceEvents", expected=EXPECTED, hint=_GIVE
    )


def refuse_empty(path: Path, *, packed: bool) -> NoReturn:
    """Raises `NotATrace` for a file without contents."""
    raise NotATrace(
        f"{path} is empty" + (": there is nothing inside its compressed data" if packed else ""),
        expected="a Kineto trace (.json or .json.gz)",
        hint="the profiler was stopped before it wrote the file; open the window again",
    )
