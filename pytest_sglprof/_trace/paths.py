"""Which files a window consists of, from a path that a user gives, and what reads them."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import msgspec

from pytest_sglprof._errors import NotATrace, TraceError
from pytest_sglprof._ranks import Rank
from pytest_sglprof._trace.torch.stream import GZIP, ZSTD

if TYPE_CHECKING:
    from pytest_sglprof._trace.table import RankActivities


TORCH_ENDINGS = (".json", ".json.gz", ".json.zst")
NSYS_ENDINGS = (".sqlite", ".nsys-rep", ".qdstrm")
_SQLITE = b"SQLite format 3\x00"


@dataclass(frozen=True)
class ReadOptions:
    """What a reader may need to know; see `read_window`."""

    pid_ranks: Mapping[int, str] = field(default_factory=dict)
    gpu_ranks: Mapping[int, str] = field(default_factory=dict)
    allow_partial: bool = False
    nsys: str | None = None
    processes: int | None = None
    sequences: bool = True


Activities = list[tuple[Path, "RankActivities"]]


class Reader(NamedTuple):
    """What reads one kind of file.

    matches: whether a path is of that kind, given the first bytes of a file (b"" of a folder).
    read: the activities of each rank in each file.
    """

    name: str
    matches: Callable[[Path, bytes], bool]
    read: Callable[[Sequence[Path], ReadOptions], Activities]


def _is_of_nsys(path: Path, head: bytes) -> bool:
    if path.is_dir() or head.startswith(_SQLITE):
        return True
    return path.suffix in NSYS_ENDINGS and not head.startswith((GZIP, ZSTD))


def _read_nsys(files: Sequence[Path], options: ReadOptions) -> Activities:
    from pytest_sglprof._trace.nsys.report import read_report

    known = {"pid_ranks": options.pid_ranks, "gpu_ranks": options.gpu_ranks}
    return [
        (file, activities)
        for file in files
        for activities in read_report(file, **known, nsys=options.nsys)
    ]


def _read_torch(files: Sequence[Path], options: ReadOptions) -> Activities:
    from pytest_sglprof._trace.torch.assemble import read_traces

    return read_traces(
        files,
        allow_partial=options.allow_partial,
        processes=options.processes,
        sequences=options.sequences,
    )


# Tried in this order. The last one takes what is left, and says what is wrong with it.
READERS: tuple[Reader, ...] = (
    Reader("nsys", _is_of_nsys, _read_nsys),
    Reader("torch", lambda path, head: True, _read_torch),
)


def reader_of(path: Path) -> Reader:
    """What reads a file, a report or a folder of Parquet files: contents decide, then names."""
    try:
        with path.open("rb") as stream:
            head = stream.read(len(_SQLITE))
    except OSError:  # a folder; of a file that cannot be read, the reader says why
        head = b""
    return next(reader for reader in READERS if reader.matches(path, head))


def window_files(paths: str | Path | Sequence[str | Path]) -> list[Path]:
    """What to read of each path: itself, or the traces, exports and reports of a folder.

    A folder of Parquet files is one export. Hidden files are none of the window's. Raises
    `NotATrace` when there is no such path, and when there is nothing to read at all.
    """
    listed = [paths] if isinstance(paths, str | Path) else list(paths)
    files = [file for path in listed for file in _files(Path(path))]
    if not files:
        raise NotATrace(
            "there is no trace to read" + (f" in {listed[0]}" if listed else ""),
            expected="*.trace.json.gz, *.json, *.nsys-rep, *.sqlite or a folder of them",
            hint="check the path",
        )
    return files


def is_nsys(path: Path) -> bool:
    """Whether this is a report, an export or a folder of Parquet files of nsys."""
    return reader_of(path).name == "nsys"


def _files(path: Path) -> list[Path]:
    if not path.exists():
        raise NotATrace(
            f"{path} does not exist",
            expected="a trace, a report, an export or a folder of a window",
            hint="check the path",
        )
    if not path.is_dir():
        return [path]
    inside = sorted(file for file in path.iterdir() if file.name[0] != ".")
    if any(file.suffix == ".parquet" for file in inside):
        return [path]
    traces = [file for file in inside if file.name.endswith(TORCH_ENDINGS)]
    traces = [file for file in traces if ".trace.json" in file.name] or traces
    ranked = [file for file in traces if not file.name.startswith("merged-")]
    exports = [file for file in inside if file.suffix == ".sqlite" and not _stale(file)]
    stems = {file.stem for file in exports}
    reports = [f for f in inside if f.suffix == ".nsys-rep" and f.stem not in stems]
    return (ranked or traces) + exports + reports


def _stale(export: Path) -> bool:
    """Whether the report of the same name beside it holds something else."""
    report = export.with_suffix(".nsys-rep")
    if not report.is_file():
        return False
    from pytest_sglprof._nsys_export import signed_origin

    origin = signed_origin(export)
    if origin is not None:
        return not origin.is_of(report)
    # It does not say what it was made of; but nothing is made of what comes later.
    return export.stat().st_mtime_ns < report.stat().st_mtime_ns


# Whose a torch trace is: its file's name first, then what the file says itself.
#
# A kernel's `pid` is the index of its device, which is not the rank: it is never asked. Only
# SGLang's merged files write ranks into it.


_FILE_RANK = re.compile(r"(?:^|[-_.])rank[-_]?(\d{1,6})(?=[-_.])")
_MERGED_PID = re.compile(r"^\[((?:[A-Z]+\d+-?)+)\]")


class _Distributed(msgspec.Struct):
    rank: int | None = None
    world_size: int | None = None


_DISTRIBUTED = msgspec.json.Decoder(_Distributed)


def rank_of_file(path: Path, distributed: bytes) -> tuple[str, list[str]]:
    """The label of a file's rank, and notes where name and content contradict each other.

    distributed: JSON text of the trace's `distributedInfo`, empty where it has none. A file
    of one process that tells nothing is TP0. Raises `TraceError` when there were several
    processes and nothing tells which this was.
    """
    told = _decoded(distributed)
    several = (told.world_size or 1) > 1
    named = _named(path.name)
    if named is not None:
        # With DP or PP in the name the global rank is another number than tp.
        alone = named.pp is None and named.dp is None
        if alone and several and told.rank is not None and told.rank != named.tp:
            return named.label, [
                f"{path.name}: its name says {named.label}, its distributedInfo rank {told.rank} "
                f"of {told.world_size}; the name was believed"
            ]
        return named.label, []
    if told.rank is None and several:
        raise TraceError(
            f"{path} does not tell its rank: neither its name nor its distributedInfo",
            expected="a name such as ID-TP-1.trace.json.gz",
            hint="rename the file after its rank",
        )
    return Rank(tp=max(told.rank or 0, 0)).label, []


def rank_of_pid(pid: bytes) -> str:
    """`"[TP01-DP00] 83"` of a merged file → `DP0 TP1`; empty for other pids (JSON text)."""
    match = _MERGED_PID.match(pid.decode("utf-8", "replace").strip('"'))
    if match is None:
        return ""
    parts = [re.sub(r"(\D)0*(\d+)$", r"\1\2", part) for part in match[1].split("-")]
    rank = Rank.parse(" ".join(parts))
    return rank.label if rank is not None else match[1]


def _named(name: str) -> Rank | None:
    if (rank := Rank.from_file_name(name)) is not None:
        return rank
    match = _FILE_RANK.search(name)
    return Rank(tp=int(match[1])) if match else None


def _decoded(distributed: bytes) -> _Distributed:
    try:
        return _DISTRIBUTED.decode(distributed) if distributed else _Distributed()
    except msgspec.DecodeError:  # null, or fields of other types
        return _Distributed()
