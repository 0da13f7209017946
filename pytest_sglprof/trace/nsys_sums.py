"""Sums by rank and kernel of an nsys report, without a row in memory: `read_sums`.

For what needs only totals. Neither pandas nor (for SQLite) numpy is imported.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pytest_sglprof.ranks import rank_order
from pytest_sglprof.trace.kernel_names import normalise
from pytest_sglprof.trace.kernels import category
from pytest_sglprof.trace.nsys_counted import Counted
from pytest_sglprof.trace.nsys_database import open_database
from pytest_sglprof.trace.nsys_files import readable
from pytest_sglprof.trace.nsys_ranks import Owner, label_owners, not_recorded
from pytest_sglprof.trace.nsys_sums_sqlite import count_database

KEYS = ("rank", "name", "full_name", "category", "kind")

_Labelled = dict[tuple[str, str, str], tuple[int, int]]  # (rank, full name, kind)


@dataclass(frozen=True)
class KernelSums:
    """Count and total time of each rank, full name and kind: columns of one length.

    rank: in rank order; within a rank the largest total first. name, full_name, category,
    kind, source and notes: as in a `KernelTable`. total_ns: sum of durations, ns.
    """

    rank: tuple[str, ...]
    name: tuple[str, ...]
    full_name: tuple[str, ...]
    category: tuple[str, ...]
    kind: tuple[str, ...]
    count: tuple[int, ...]
    total_ns: tuple[int, ...]
    source: str = "gpu"
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.rank)

    def of(self, key: str, text: str) -> KernelSums:
        """Only those whose `key` (out of `KEYS`) is `text`."""
        chosen = [at for at, own in enumerate(getattr(self, key)) if own == text]
        columns: dict[str, Any] = {
            name: tuple(getattr(self, name)[at] for at in chosen)
            for name in (*KEYS, "count", "total_ns")
        }
        return replace(self, **columns)

    def by(self, *keys: str) -> list[dict[str, str | int]]:
        """Count and total time for each combination of `keys` (out of `KEYS`).

        Ordered as by `KernelTable.by`: by rank where that is a key, then by total, largest
        first, then by the keys' texts.
        """
        columns = [getattr(self, key) for key in keys]
        sums: dict[tuple[str, ...], tuple[int, int]] = {}
        for *texts, count, total in zip(*columns, self.count, self.total_ns, strict=True):
            before = sums.get(tuple(texts), (0, 0))
            sums[tuple(texts)] = (before[0] + count, before[1] + total)
        place = {rank: number for number, rank in enumerate(rank_order(set(self.rank)))}
        at = keys.index("rank") if "rank" in keys else None

        def order(texts: tuple[str, ...]) -> tuple[int, int, tuple[str, ...]]:
            return (place[texts[at]] if at is not None else 0, -sums[texts][1], texts)

        return [
            {**dict(zip(keys, texts, strict=True)), "count": sums[texts][0],
             "total_ns": sums[texts][1]}
            for texts in sorted(sums, key=order)
        ]  # fmt: skip


def read_sums(
    path: Path,
    *,
    pid_ranks: Mapping[int, str] | None = None,
    gpu_ranks: Mapping[int, str] | None = None,
    patterns: Sequence[tuple[str, str]] = (),
    nsys: str | None = None,
) -> KernelSums:
    """The sums of a `.sqlite` export, a `.nsys-rep` or a Parquet folder.

    They are those of `read_report`, to the nanosecond, with the same arguments and errors;
    patterns: (category, regex) tried before the built-in ones. A report without GPU
    activities, or with kernels that may not be counted, is read row by row instead.
    """
    with readable(path, nsys) as export:
        counted = _counted(export)
        if counted is not None and counted.owners:
            labelled, notes = _labelled(counted, pid_ranks or {}, gpu_ranks or {})
            return _sums(labelled, patterns, "gpu", notes)
        from pytest_sglprof.trace.nsys_report import read_report

        found = read_report(export, pid_ranks=pid_ranks, gpu_ranks=gpu_ranks)
    sums: _Labelled = {}
    for part in found:
        rows = zip(part.name_codes.tolist(), part.kind_codes.tolist(), part.dur.tolist(),
                   strict=True)  # fmt: skip
        for name, kind, dur in rows:
            _add(sums, (part.rank, part.names[name], part.kinds[kind]), 1, dur)
    notes = list(dict.fromkeys(note for part in found for note in part.notes))
    return _sums(sums, patterns, found[0].source if found else "gpu", notes)


def _counted(export: Path) -> Counted | None:
    if export.is_dir():
        from pytest_sglprof.trace.nsys_sums_parquet import count_folder

        return count_folder(export)
    with open_database(export) as database:
        return count_database(database)


def _labelled(
    counted: Counted, pid_ranks: Mapping[int, str], gpu_ranks: Mapping[int, str]
) -> tuple[_Labelled, list[str]]:
    owners = sorted(Owner(pid, device) for pid, device in counted.owners)
    labels, how = label_owners(
        owners, pid_ranks=pid_ranks, gpu_ranks=gpu_ranks, recorded=counted.recorded
    )
    sums: _Labelled = {}
    for (pid, device, kind, name), (count, total) in counted.sums.items():
        _add(sums, (labels[Owner(pid, device)], name, kind), count, total)
    seen = counted.recorded | {owner.pid for owner in owners}
    return sums, [*counted.notes, *how, *not_recorded(pid_ranks, seen)]


def _add(sums: _Labelled, key: tuple[str, str, str], count: int, total: int) -> None:
    before = sums.get(key, (0, 0))
    sums[key] = (before[0] + count, before[1] + total)


def _sums(
    labelled: _Labelled, patterns: Sequence[tuple[str, str]], source: str, notes: Sequence[str]
) -> KernelSums:
    place = {rank: at for at, rank in enumerate(rank_order({rank for rank, _, _ in labelled}))}
    keys = sorted(labelled, key=lambda key: (place[key[0]], -labelled[key][1], key))
    names = {full: normalise(full) for _, full, _ in keys}
    categories = {full: category(full, patterns) for full in names}
    return KernelSums(
        rank=tuple(rank for rank, _, _ in keys),
        name=tuple(names[full] for _, full, _ in keys),
        full_name=tuple(full for _, full, _ in keys),
        category=tuple(categories[full] for _, full, _ in keys),
        kind=tuple(kind for _, _, kind in keys),
        count=tuple(labelled[key][0] for key in keys),
        total_ns=tuple(labelled[key][1] for key in keys),
        source=source,
        notes=tuple(dict.fromkeys(notes)),
    )
