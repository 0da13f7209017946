"""Which files a window consists of, from a path that a user gives."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pytest_sglprof.errors import NotATrace

TORCH_ENDINGS = (".json", ".json.gz", ".json.zst")
NSYS_ENDINGS = (".sqlite", ".nsys-rep", ".qdstrm")


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
    """Whether this is a report, an export or a folder of Parquet files, by its name."""
    return path.is_dir() or path.suffix in NSYS_ENDINGS


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
    from pytest_sglprof.nsys_origin import signed_origin

    origin = signed_origin(export)
    if origin is not None:
        return not origin.is_of(report)
    # It does not say what it was made of; but nothing is made of what comes later.
    return export.stat().st_mtime_ns < report.stat().st_mtime_ns
