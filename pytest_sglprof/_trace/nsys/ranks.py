"""The ranks of a report's processes, in a file beside it: the report itself has only their pids."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import msgspec

from pytest_sglprof._errors import TraceError
from pytest_sglprof._files import atomic_write
from pytest_sglprof._limits import UNDECODABLE, read_bytes, why_undecodable
from pytest_sglprof._trace.nsys.database import ReportName

RANKS = ".ranks.json"  # instead of the ending of the report, or of an export
_ENDINGS = (".nsys-rep", ".sqlite", ".qdstrm", ".parquetdir")


class ReportRanks(msgspec.Struct, frozen=True):
    """Rank label of each process id, else of each device number."""

    pid_ranks: Mapping[int, str] = {}
    gpu_ranks: Mapping[int, str] = {}


def write_ranks(report: Path, ranks: ReportRanks) -> None:
    """Writes them beside the report; nothing where none are known."""
    if ranks.pid_ranks or ranks.gpu_ranks:
        content = msgspec.json.format(msgspec.json.encode(ranks), indent=1)
        atomic_write(_beside(report), content + b"\n")


def known_ranks(
    report: Path, name: ReportName, pid_ranks: Mapping[int, str], gpu_ranks: Mapping[int, str]
) -> ReportRanks:
    """The ranks of the arguments, then those that stand beside the report.

    Those beside do not count where somebody gave the rank of the whole report.
    """
    is_given = name.is_given and not name.node
    beside = ReportRanks() if is_given else ranks_beside(report)
    return ReportRanks({**beside.pid_ranks, **pid_ranks}, {**beside.gpu_ranks, **gpu_ranks})


def ranks_beside(report: Path) -> ReportRanks:
    """What was written beside a report or an export; none without such a file."""
    file = _beside(report)
    try:
        return msgspec.json.decode(read_bytes(file, error=TraceError), type=ReportRanks)
    except FileNotFoundError:
        return ReportRanks()
    except (OSError, *UNDECODABLE) as error:
        raise TraceError(
            f"{file} cannot be read: {why_undecodable(error)}",
            expected='the ranks of processes: {"pid_ranks": {"31205": "TP0"}}',
            hint="correct or remove it; ranks can also be given: --rank 31205=TP0",
        ) from error


def _beside(report: Path) -> Path:
    stem = report.stem if report.suffix in _ENDINGS else report.name
    return report.with_name(stem + RANKS)
