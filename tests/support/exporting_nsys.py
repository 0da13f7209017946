"""A fake nsys that exports one kernel, and the report that it exports."""

from __future__ import annotations

from pathlib import Path

import pytest

from pytest_sglprof._trace.nsys.report import read_report
from tests.support.nsys_exports import STRINGS, by_name, kernel, make_export, one, to_parquet

SCRIPT = """#!/bin/sh
case "$1 $2" in
  "--version "*) echo "NVIDIA Nsight Systems version 2023.4.4.54-234433681190v0" ;;
  "profile "*) echo "  -Y, --start-later=" ;;
  "export --help") echo "sqlite {types}" ;;
  "export "*)
    echo "$2" >> "{calls}"
    for word in "$@"; do
      case "$word" in --output=*) target="${{word#--output=}}" ;; esac
    done
    sleep {seconds}
    case "$2" in *parquetdir) cp -r "{folder}" "$target" ;; *) cp "{database}" "$target" ;; esac ;;
esac
"""
ROWS = {"void a<int>(int)": (1, 5)}


class ExportingNsys:
    """An nsys and a report. types: what it exports besides SQLite; seconds: how long it takes."""

    def __init__(self, folder: Path, types: str = "", seconds: float = 0.0) -> None:
        if types:
            pytest.importorskip("pyarrow")
        self.types = types
        self.calls = folder / "calls.txt"
        self.parquet = folder / "source"
        words = {"calls": self.calls, "database": folder / "source.db", "folder": self.parquet}
        make_export(words["database"], CUPTI_ACTIVITY_KIND_KERNEL=[kernel(0, 5)], StringIds=STRINGS)
        if types:
            to_parquet(words["database"], self.parquet)
        self.nsys = folder / "nsys"
        self.nsys.write_text(SCRIPT.format(types=types, seconds=seconds, **words))
        self.nsys.chmod(0o755)
        (folder / "w").mkdir()
        self.report = folder / "w" / "w.nsys-rep"
        self.report.write_bytes(b"x")

    def read(self) -> dict[str, tuple[int, int]]:
        return by_name(one(read_report(self.report, nsys=str(self.nsys))))

    @property
    def export_types(self) -> list[str]:
        """The first option of each export."""
        return self.calls.read_text().split() if self.calls.exists() else []

    @property
    def exports(self) -> int:
        return len(self.export_types)

    @property
    def kept(self) -> list[Path]:
        return sorted(path for path in self.report.parent.iterdir() if path != self.report)
