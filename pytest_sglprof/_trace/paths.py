"""Find the files of a window, what reads each of them, and which rank wrote a trace.

`READERS` is the one list of what can be read: a new source is a module that returns
`RankActivities`, and one more row here, which says how its files are recognised.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import msgspec

from pytest_sglprof._errors import NotATrace, TraceError
from pytest_sglprof._limits import UNDECODABLE
from pytest_sglprof._ranks import FILE_END, NamedRank, Rank, named_ranks, node_in_name
from pytest_sglprof._server.sizes import SERVER_INFO
from pytest_sglprof._trace.foreign import EXPECTED, HEAD, kind_of
from pytest_sglprof._trace.nsys.database import KNOWN_TABLES
from pytest_sglprof._trace.nsys.ranks import RANKS, known_ranks
from pytest_sglprof._trace.torch.stream import GZIP, ZSTD

if TYPE_CHECKING:
    from pytest_sglprof._trace.nsys.database import ReportName
    from pytest_sglprof._trace.table import RankActivities


TORCH_ENDINGS = (".json", ".json.gz", ".json.zst")
NSYS_ENDINGS = (".sqlite", ".nsys-rep")
_SQLITE = b"SQLite format 3\x00"
REDUCED_ENDING = ".parquet"
REDUCED_KEY = "pytest_sglprof.reduced"  # of its metadata: the format, and what stood beside
_PARQUET = b"PAR1"  # at both ends of a file
_LARGEST_FOOTER = 1 << 26  # bytes


@dataclass(frozen=True)
class ReadOptions:
    """The arguments of `read_window` that readers need; described there.

    file_ranks: label of each file for which one is given; see `given_labels`. among: all files of
    the window that the same reader reads, where it is given some of them: what their names say
    depends on each other.
    """

    pid_ranks: Mapping[int, str] = field(default_factory=dict)
    gpu_ranks: Mapping[int, str] = field(default_factory=dict)
    file_ranks: Mapping[Path, str] = field(default_factory=dict)
    allow_partial: bool = False
    nsys: str | None = None
    processes: int | None = None
    launches: bool = True
    among: Sequence[Path] = ()


Activities = list[tuple[Path, "RankActivities"]]


class Reader(NamedTuple):
    """One source of activities.

    endings: of the names of its files, by which they are listed in a folder. matches: whether
    a path is of this source, given the first bytes of a file (b"" for a folder). read: the
    activities of each rank in each file. pick: which of a folder's files with these endings
    belong to the window; all of them by default.
    """

    name: str
    endings: tuple[str, ...]
    matches: Callable[[Path, bytes], bool]
    read: Callable[[Sequence[Path], ReadOptions], Activities]
    pick: Callable[[Sequence[Path]], list[Path]] = list


def _is_of_nsys(path: Path, head: bytes) -> bool:
    if path.is_dir() or head.startswith(_SQLITE):
        return True
    return path.suffix in (*NSYS_ENDINGS, ".qdstrm") and not head.startswith((GZIP, ZSTD))


def _read_nsys(files: Sequence[Path], options: ReadOptions) -> Activities:
    from pytest_sglprof._trace.nsys.report import read_recorded

    names = names_of_reports(options.among or files, options.file_ranks)
    parts: Activities = []
    for file in files:
        ranks = known_ranks(file, names[file], options.pid_ranks, options.gpu_ranks)
        activities_by_rank = read_recorded(
            file,
            pid_ranks=ranks.pid_ranks,
            gpu_ranks=ranks.gpu_ranks,
            name=names[file],
            nsys=options.nsys,
        )
        _refuse_several(file, names[file], [part.rank for part in activities_by_rank])
        parts += [(file, part) for part in activities_by_rank]
    return parts


def _refuse_several(file: Path, name: ReportName, labels: Sequence[str]) -> None:
    """Raises `TraceError` where one rank was given for a report of several."""
    if name.is_given and not name.node and labels and [*labels] != [name.rank]:
        raise TraceError(
            f"the rank of {file} is given as {name.rank}, but it holds {', '.join(labels)}",
            expected="a report of one process on one device",
            hint="give the rank of each process, --rank PID=LABEL, or the report a name of its "
            "node: --rank FILE=node1",
        )


def _read_torch(files: Sequence[Path], options: ReadOptions) -> Activities:
    from pytest_sglprof._trace.torch.assemble import read_traces

    ranks, notes = of_ranks(options.among or files)
    chosen = set(files)
    return read_traces(
        [file for file in ranks if file in chosen],
        among=ranks,
        file_ranks=options.file_ranks,
        allow_partial=options.allow_partial,
        processes=options.processes,
        launches=options.launches,
        notes=notes,
    )


def _pick_nsys(files: Sequence[Path]) -> list[Path]:
    """Exports that are up to date, and reports that have none."""
    exports = [file for file in files if file.suffix == ".sqlite" and not _stale(file)]
    stems = {file.stem for file in exports}
    return exports + [f for f in files if f.suffix == ".nsys-rep" and f.stem not in stems]


def _pick_torch(files: Sequence[Path]) -> list[Path]:
    """The traces of single ranks; a merged file only where there are none."""
    traces = [file for file in files if ".trace.json" in file.name] or list(files)
    return [file for file in traces if not file.name.startswith("merged-")] or traces


def is_reduced(file: Path) -> bool:
    """Whether this is a file that `sglprof reduce` wrote, by its end."""
    try:
        with file.open("rb") as stream:
            size = stream.seek(0, 2)
            stream.seek(max(0, size - 8))
            end = stream.read(8)
            length = int.from_bytes(end[:4], "little")
            if end[4:] != _PARQUET or length > min(size, _LARGEST_FOOTER):
                return False
            stream.seek(size - 8 - length)
            return REDUCED_KEY.encode() in stream.read(length)
    except (OSError, ValueError):
        return False


def _read_reduced(files: Sequence[Path], options: ReadOptions) -> Activities:
    from pytest_sglprof._trace.reduced import read_reduced

    return read_reduced(files, options)


def _pick_reduced(files: Sequence[Path]) -> list[Path]:
    return [file for file in files if is_reduced(file)]


# Tried in this order. The last reader takes what no other one matches, and its errors say what
# is wrong with the file.
READERS: tuple[Reader, ...] = (
    Reader(
        "reduced",
        (REDUCED_ENDING,),
        lambda path, head: head.startswith(_PARQUET) and is_reduced(path),
        _read_reduced,
        _pick_reduced,
    ),
    Reader("nsys", NSYS_ENDINGS, _is_of_nsys, _read_nsys, _pick_nsys),
    Reader("torch", TORCH_ENDINGS, lambda path, head: True, _read_torch, _pick_torch),
)


def reader_of(path: Path) -> Reader:
    """The reader of a file or a folder of Parquet files: by content, else by name."""
    try:
        with path.open("rb") as stream:
            head = stream.read(len(_SQLITE))
    except OSError:  # a folder, or an unreadable file, of which the reader says why
        head = b""
    return next(reader for reader in READERS if reader.matches(path, head))


def window_files(paths: str | Path | Sequence[str | Path]) -> list[Path]:
    """The files to read for each path: the path itself, or what a folder holds.

    A folder of Parquet files is one export; of a folder without any files, those in its folders
    that are named after a rank or a node are listed. Hidden files are ignored. Raises `NotATrace`
    when a path does not exist, and when there is nothing to read at all.
    """
    listed = [paths] if isinstance(paths, str | Path) else list(paths)
    files = [file for path in listed for file in _files(Path(path))]
    if not files:
        raise NotATrace(
            "no trace to read" + (f" in {listed[0]}" if listed else ""),
            expected=f"{', '.join(f'*{ending}' for ending in _endings())}, or a folder of them",
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
            expected="a torch trace, an nsys report or nsys export, or a folder of these",
            hint="check the path",
        )
    if not path.is_dir():
        _refuse_captures([path])
        return [path]
    inside = sorted(
        file for file in path.iterdir() if file.name[0] != "." and not _is_beside(file.name)
    )
    tables = [file for file in inside if file.suffix == ".parquet" and not is_reduced(file)]
    if any(file.stem in KNOWN_TABLES for file in tables):
        return [path]
    traces = [
        file
        for reader in READERS
        for file in reader.pick([file for file in inside if file.name.endswith(reader.endings)])
    ]
    if not traces and tables:
        return [path]
    if traces and all(map(_of_a_capture, traces)):
        _refuse_captures(traces)
    if not traces and (folders := _of_ranks_or_nodes(inside)):
        return [file for folder in folders for file in _files(folder)]
    if not traces:
        _refuse_others(inside)
    return [file for file in traces if not _of_a_capture(file)]


def _is_beside(name: str) -> bool:
    """Whether a file says something of the traces beside it."""
    return name == SERVER_INFO or name.endswith(RANKS)


def _of_ranks_or_nodes(inside: Sequence[Path]) -> list[Path]:
    """The folders that are named after a rank or a node (`rank0`)."""
    folders = [path for path in inside if path.is_dir()]
    named = named_ranks(folder / "*" for folder in folders)
    return [f for f in folders if f / "*" in named or node_in_name(f / "*")]


# With SGLANG_ENABLE_CUDA_GRAPH_CAPTURE_TRACE, SGLang traces how it captures its graphs, before
# it serves: kernels that are captured do not run.
_CAPTURE_NAME = re.compile(r"(?:cuda_)?graph_capture[-_]")
_CAPTURE_FOLDERS = frozenset({"graph_capture_profile", "capture_traces"})


def _of_a_capture(file: Path) -> bool:
    folder = file.absolute().parent.name
    return _CAPTURE_NAME.match(file.name) is not None or folder in _CAPTURE_FOLDERS


def _refuse_captures(files: Sequence[Path]) -> None:
    captured = [file for file in files if _of_a_capture(file)]
    if captured:
        raise NotATrace(
            f"{captured[0]} is SGLang's trace of capturing CUDA graphs, not of serving requests",
            expected="a trace of a profile window (ID-TP-0.trace.json.gz)",
            hint="open a window while the server gets requests: sglprof record URL",
        )


def _refuse_others(files: Sequence[Path]) -> None:
    """Raises `NotATrace` for a folder without traces, where one of its files tells what it is."""
    for file in files:
        if file.is_file():
            with file.open("rb") as stream:
                kind = kind_of(stream.read(HEAD))
            if kind is not None:
                raise NotATrace(f"{file} {kind[0]}", expected=EXPECTED, hint=kind[1])


def _endings() -> list[str]:
    return [ending for reader in READERS for ending in reader.endings]


def _stale(export: Path) -> bool:
    """Whether the report of the same name beside it has other contents."""
    report = export.with_suffix(".nsys-rep")
    if not report.is_file():
        return False
    from pytest_sglprof._nsys_export import signed_origin

    origin = signed_origin(export)
    if origin is not None:
        return not origin.is_of(report)
    # The export does not name its report, but it cannot be older than the report.
    return export.stat().st_mtime_ns < report.stat().st_mtime_ns


# Find which rank wrote a trace: from what is given, its file name, else from its contents.
#
# A kernel's `pid` is never used: it is the index of the device, which is not the rank. Only
# files that SGLang merged have ranks in it.

_MERGED_PID = re.compile(r"^\[((?:[A-Z]+\d+-?)+)\]")
# vLLM's process between the clients and the ranks profiles itself, too.
_COORDINATOR = re.compile(r"(?:^|[-_.])async_llm(?=[-_.])")


class _Distributed(msgspec.Struct):
    rank: int | None = None
    world_size: int | None = None


_DISTRIBUTED = msgspec.json.Decoder(_Distributed)


class FileRanks:
    """Which rank wrote each torch trace of a window.

    given: label of each file for which one is given.
    """

    def __init__(self, files: Sequence[Path], given: Mapping[Path, str]) -> None:
        self._given = given
        self._named = named_ranks(files)
        stages = {str(path): FILE_END.sub("", str(path)) for path in files}
        self._alone = len(set(stages.values())) <= 1

    def of(self, path: Path, distributed: bytes) -> tuple[str, list[str]]:
        """The label of a file's rank, and notes on it.

        distributed: JSON text of the trace's `distributedInfo`, empty if it has none. The only
        process of a run is TP0. Raises `TraceError` when the file does not say which of several
        processes wrote it; also when name and contents contradict each other, unless the file is
        alone: then the name is used, with a note.
        """
        if path in self._given:
            return self._given[path], []
        info = _decoded(distributed)
        several = (info.world_size or 1) > 1 or (info.rank or 0) > 0
        if (named := self._named.get(path)) is not None:
            if info.rank is None or not several or named.agrees(info.rank):
                return named.rank.label, []
            return named.rank.label, self._contradiction(path, named, info)
        is_told = info.rank is not None and (several or info.world_size is None)
        if not is_told and (several or not self._alone):
            raise TraceError(
                f"{path} has no rank, neither in its name nor in its distributedInfo",
                expected="a name such as ID-TP-1.trace.json.gz or rank1.json; a bare number may be "
                "that of a step, and tp2 beside tp4 a size",
                hint="rename the file after its rank, or give it: --rank FILE=TP1",
            )
        return Rank(tp=info.rank or 0).label, []

    def _contradiction(self, path: Path, named: NamedRank, info: _Distributed) -> list[str]:
        label = named.rank.label
        values = f"its name says {label}, its distributedInfo rank {info.rank} of {info.world_size}"
        if not self._alone:
            raise TraceError(
                f"{path}: {values}",
                expected="a name and contents of the same rank",
                hint=f"look which is right, and give it: --rank {path.name}={label}",
            )
        # Alone, a file of one of several replicas may have been counted in another way.
        return [f"{path.name}: {values}; the name is used"] if named.rank.dp is None else []


def given_labels(files: Sequence[Path], given: Mapping[str, str]) -> dict[Path, str]:
    """The label of each file for which one is given, by its name, or a path or the end of one.

    Raises `TraceError` for one that is not, or more than once, among `files`.
    """
    labels: dict[Path, str] = {}
    for name, label in given.items():
        parts = Path(name).parts
        ends = {path for path in files if parts and path.parts[-len(parts) :] == parts}
        meant = ends or {path for path in files if path.absolute() == Path(name).absolute()}
        if len(meant) != 1:
            raise TraceError(
                f"the rank of {name} is given as {label}, but {len(meant)} of the files that are "
                "read have that name",
                expected="the name or path of one of the files",
                hint=f"they are {', '.join(dict.fromkeys(map(str, files))) or 'none'}",
            )
        labels[meant.pop()] = label
    return labels


def of_ranks(files: Sequence[Path]) -> tuple[list[Path], list[str]]:
    """Torch traces without those of a coordinator beside the ranks, and notes on these."""
    named = named_ranks(files)
    others = {path for path in files if _COORDINATOR.search(path.name) and path not in named}
    ranks = [path for path in files if path not in others]
    if not ranks:
        return list(files), []
    why = "it is of the process that serves the ranks' clients, not of a rank"
    return ranks, [f"{path.name} is left out: {why}" for path in sorted(others)]


def names_of_reports(files: Sequence[Path], given: Mapping[Path, str]) -> dict[Path, ReportName]:
    """What the names of reports say of their ranks and nodes. given: as of `FileRanks`."""
    from pytest_sglprof._trace.nsys.database import ReportName

    named = named_ranks(files)
    names: dict[Path, ReportName] = {}
    for path in files:
        rank = named[path].rank.label if path in named else ""
        node = (node_in_name(path) or rank) if len(set(files)) > 1 else ""
        names[path] = ReportName(rank, node)
        if (label := given.get(path)) is not None:
            names[path] = ReportName(label, "" if Rank.parse(label) else label, is_given=True)
    return names


def rank_of_pid(pid: bytes) -> str:
    """`"[TP01-DP00] 83"` of a merged file → `DP0 TP1`; empty for other pids (JSON text)."""
    match = _MERGED_PID.match(pid.decode("utf-8", "replace").strip('"'))
    if match is None:
        return ""
    parts = [re.sub(r"(\D)0*(\d+)$", r"\1\2", part) for part in match[1].split("-")]
    rank = Rank.parse(" ".join(parts))
    return rank.label if rank is not None else match[1]


def _decoded(distributed: bytes) -> _Distributed:
    try:
        info = _DISTRIBUTED.decode(distributed) if distributed else _Distributed()
        return _Distributed(None, info.world_size) if (info.rank or 0) < 0 else info
    except UNDECODABLE:  # null, or fields of other types
        return _Distributed()
