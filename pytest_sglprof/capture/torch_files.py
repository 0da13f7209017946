"""The files of a torch window while they grow, and when each of them is whole.

The server writes a trace in place, under its final name: that a file exists says nothing.
It is whole when its gzip ends, its checksum holds and its JSON ends.
"""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pytest_sglprof.ranks import Rank

CHUNK = 1 << 20  # bytes read at a time, so that memory stays flat
SUFFIX = ".trace.json.gz"
MERGED = "merged-"
PlaceOfRank = tuple[int, int, int]


def place(rank: Rank) -> PlaceOfRank:
    """(dp, pp, tp): what tells ranks apart, whichever tags a text leaves out."""
    return (rank.dp or 0, rank.pp or 0, rank.tp or 0)


def stage_of(name: str) -> str:
    """``EXTEND`` or ``DECODE`` for a file of a by-stage window, else ""."""
    stem = name.removesuffix(SUFFIX)
    return next((stage for stage in ("EXTEND", "DECODE") if stem.endswith(f"-{stage}")), "")


def is_whole(path: Path) -> bool:
    """True when the file is complete gzip of a text that ends as JSON does."""
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

    profile_id: only files with it in their name count, since the folder may be the
    user's own. stages: the suffixes of a by-stage window; empty for a plain one.
    """

    folder: Path
    ranks: Sequence[Rank]
    profile_id: str = ""
    stages: Sequence[str] = ()
    _sizes: dict[Path, int] = field(default_factory=dict)
    _whole: dict[Path, int] = field(default_factory=dict)

    def found(self) -> dict[Path, Rank]:
        """Every rank file there is, whole or not."""
        known = {place(rank): rank for rank in self.ranks}
        files: dict[Path, Rank] = {}
        for path in sorted(self._listed()):
            rank = Rank.from_file_name(path.name)
            if rank is not None and not path.name.startswith(MERGED):
                files[path] = known.get(place(rank), rank)
        return files

    def others(self) -> list[Path]:
        """Files of the window that are no rank's trace: merged ones, memory snapshots."""
        mine = self.found()
        return [path for path in sorted(self._listed()) if path not in mine]

    def _listed(self) -> list[Path]:
        try:
            return [
                path
                for path in self.folder.iterdir()
                if self.profile_id in path.name and path.is_file()
            ]
        except OSError:
            return []

    def whole(self, *, settled: bool = False) -> dict[Path, Rank]:
        """The complete files. A file is read only when its size stood still since the last
        look (settled: at once), and again only when it changed since it was found whole.
        """
        files = self.found()
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
        """Bytes of each file now; a change means that somebody still writes."""
        return {path: _size(path) for path in self._listed()}

    def missing(self, complete: Mapping[Path, Rank]) -> list[Rank]:
        """Ranks without a complete file; by stage: without one of a stage that others have,
        or of any stage.
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
        """True when each rank has each wanted file, complete."""
        complete = self.whole()
        return not self.missing(complete) and not self.missing_stages(complete)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return -1
