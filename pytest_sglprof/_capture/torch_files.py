"""The files of a torch window in its folder: whose they are, and whether they are whole.

The server writes a trace in place, under its final name, so a file may exist and be incomplete.
It is whole once its gzip stream ends, its checksum holds and its JSON ends.
"""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pytest_sglprof._ranks import FILE_END, Rank

CHUNK = 1 << 20  # bytes read at a time, so that memory stays flat
SUFFIX = ".trace.json.gz"
MERGED = "merged-"
PlaceOfRank = tuple[int, int, int]


def place(rank: Rank) -> PlaceOfRank:
    """(dp, pp, tp) of a rank, with 0 for tags that a log line or file name leaves out."""
    return (rank.dp or 0, rank.pp or 0, rank.tp or 0)


def stage_of(name: str) -> str:
    """``EXTEND`` or ``DECODE`` for a file of a by-stage window, else ""."""
    stem = name.removesuffix(SUFFIX)
    return next((stage for stage in ("EXTEND", "DECODE") if stem.endswith(f"-{stage}")), "")


def full_name(name: str, rank: Rank) -> str:
    """The name of a rank's file with the parts that an older server leaves out.

    So that the folder of the window tells the ranks by itself.
    """
    named, end = Rank.from_file_name(name), FILE_END.search(name)
    if named is None or end is None or (named.pp, named.ep) != (None, None):
        return name
    numbers = {part: getattr(rank, part) for part in ("dp", "pp", "ep")}
    if named.dp is not None:
        del numbers["dp"]
    left_out = [f"-{part.upper()}-{n}" for part, n in numbers.items() if n is not None]
    return "".join((name[: end.start()], *left_out, name[end.start() :]))


def is_whole(path: Path) -> bool:
    """True if the file is complete gzip whose contents end like JSON."""
    end = b""
    try:
        with gzip.open(path, "rb") as stream:
            while chunk := stream.read(CHUNK):
                end = (end + chunk)[-64:]
    except (OSError, EOFError, zlib.error):  # gzip.BadGzipFile is an OSError
        return False
    return end.rstrip().endswith((b"}", b"]"))


@dataclass
class TraceFiles:
    """Watches `folder` for the files of the ranks of one window.

    profile_id: only files with it in their name count, since the folder may be the user's
    and hold others. stages: the suffixes of a by-stage window; empty for an ordinary one.
    before: names of files that were there already, of a server that may choose the id itself:
    then new ones count, if none has the id.
    """

    folder: Path
    ranks: Sequence[Rank]
    profile_id: str = ""
    stages: Sequence[str] = ()
    before: frozenset[str] | None = None
    _sizes: dict[Path, int] = field(default_factory=dict)
    _whole: dict[Path, int] = field(default_factory=dict)

    def rank_files(self) -> dict[Path, Rank]:
        """Every rank's files, whole or not, by path."""
        files: dict[Path, Rank] = {}
        for path in sorted(self._listed()):
            rank = Rank.from_file_name(path.name)
            if rank is not None and not path.name.startswith(MERGED):
                files[path] = self._whose(rank)
        return files

    def _whose(self, named: Rank) -> Rank:
        """The rank of a file that names it like this. Older servers leave DP, PP and EP out."""
        parts = [(part, getattr(named, part)) for part in ("dp", "pp", "tp")]
        fitting = [
            rank
            for rank in self.ranks
            if all(n is None or n == (getattr(rank, part) or 0) for part, n in parts)
        ]
        if len(fitting) == 1:
            return fitting[0]
        return next((rank for rank in fitting if place(rank) == place(named)), named)

    def names(self) -> frozenset[str]:
        """Of all files in the folder, whoever wrote them."""
        return frozenset(path.name for path in self._all())

    def others(self) -> list[Path]:
        """Files of the window that are not the trace of a rank: merged ones, memory snapshots."""
        traces = self.rank_files()
        return [path for path in sorted(self._listed()) if path not in traces]

    def _listed(self) -> list[Path]:
        files = self._all()
        named = [path for path in files if self.profile_id in path.name]
        if named or self.before is None:
            return named
        return [path for path in files if path.name not in self.before]

    def _all(self) -> list[Path]:
        try:
            return [path for path in self.folder.iterdir() if path.is_file()]
        except OSError:
            return []

    def whole(self, *, settled: bool = False) -> dict[Path, Rank]:
        """The complete files of ranks, by path.

        A file is read only if its size has not changed since the last call (settled: at once),
        and is not read again while it keeps the size at which it was whole.
        """
        files = self.rank_files()
        complete: dict[Path, Rank] = {}
        for path, rank in files.items():
            size = _size(path)
            still = settled or self._sizes.get(path) == size
            self._sizes[path] = size
            if self._whole.get(path) == size or (still and size > 0 and is_whole(path)):
                self._whole[path] = size
                complete[path] = rank
        return complete

    def sizes(self) -> Mapping[Path, int]:
        """Size of each file in bytes; while they change, the server is still writing."""
        return {path: _size(path) for path in self._listed()}

    def missing(self, complete: Mapping[Path, Rank]) -> list[Rank]:
        """Ranks without a complete file.

        In a by-stage window: without the file of a stage that another rank has, or without any.
        """
        stages_there = {stage_of(path.name) for path in complete} if self.stages else {""}
        there = {(place(rank), stage_of(path.name)) for path, rank in complete.items()}
        if not self.stages:
            there = {(where, "") for where, _ in there}
        return [
            rank
            for rank in self.ranks
            if not stages_there or any((place(rank), stage) not in there for stage in stages_there)
        ]

    def missing_stages(self, complete: Mapping[Path, Rank]) -> list[str]:
        """Wanted stages that no rank has a complete file of."""
        there = {stage_of(path.name) for path in complete}
        return [stage for stage in self.stages if stage not in there]

    def all_whole(self) -> bool:
        """True if every rank has a complete file for every stage wanted."""
        complete = self.whole()
        there = not self.missing(complete) and not self.missing_stages(complete)
        return there and bool(complete)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return -1
