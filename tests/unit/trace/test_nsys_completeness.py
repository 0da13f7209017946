"""Kernels that were launched but not recorded, in reports of nsys.

An export names the graph of each kernel, so that steps need no batch size to be compared.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pytest_sglprof._config.model import Threshold
from pytest_sglprof._trace.nsys.report import read_recorded, read_report
from pytest_sglprof._trace.read import read_window
from pytest_sglprof._trace.table import KernelTable
from pytest_sglprof._verdict.judge import Verdict, judge
from tests.support.nsys_exports import global_id, kernel, make_export, nvtx, to_parquet

STEPS, FAN_OUT = 80, 60
PIDS = {100: "TP0", 200: "TP1"}
Lost = Callable[[int, int], bool]
LIMIT = Threshold(metric="slowdown", limit=1.10, scope="compute")


def nothing(step: int, number: int) -> bool:
    return False


def export(
    path: Path,
    *,
    slow: float = 1.0,
    lost: Lost = nothing,
    graphs: bool = True,
    marked: bool = True,
    runtime: bool = True,
) -> Path:
    """One report of two ranks; TP1 is `slow` times slower and lost what `lost` says.

    graphs: every step is one launch of one of two graphs, else one launch for each kernel.
    marked: whether steps have their NVTX range. runtime: whether launches are recorded.
    """
    kernels, ranges, calls = [], [], []
    for pid in PIDS:
        factor = slow if pid == 200 else 1.0
        for step in range(STEPS):
            at = 1_000_000 + step * 4_000_000
            thread = global_id(pid, pid)
            if marked:
                ranges.append(nvtx(at, at + 3_000_000, "scheduler.run_batch", globalTid=thread))
            graph = 1 + step % 2
            size = FAN_OUT - 20 * (step % 2) if graphs else FAN_OUT
            for number in range(size):
                launch = 1 + step * FAN_OUT + (0 if graphs else number)
                if number == 0 or not graphs:
                    call: dict[str, Any] = {"start": at + 10_000 + number, "globalTid": thread}
                    name = 21 if graphs else 22
                    calls.append({**call, "correlationId": launch, "nameId": name})
                if pid == 200 and lost(step, number):
                    continue
                begin = at + 100_000 + number * 45_000
                more = (
                    {"graphNodeId": number + 1, "graphId": graph} if graphs else {"graphId": None}
                )
                end = begin + round(30_000 * factor)
                own = {"globalPid": global_id(pid), "correlationId": launch}
                kernels.append(kernel(begin, end, 100 + number, **own, **more))
    names = [{"id": 21, "value": "cudaGraphLaunch_v10000"}, {"id": 9, "value": "s"}]
    names += [{"id": 22, "value": "cuLaunchKernelEx"}]
    names += [{"id": 100 + number, "value": f"gemm_{number}"} for number in range(FAN_OUT)]
    tables: dict[str, Any] = {"CUPTI_ACTIVITY_KIND_KERNEL": kernels, "StringIds": names}
    if marked:
        tables["NVTX_EVENTS"] = ranges
    if runtime:
        tables["CUPTI_ACTIVITY_KIND_RUNTIME"] = calls
    return make_export(path, **tables)


def read(path: Path) -> KernelTable:
    return read_window(path, pid_ranks=PIDS)


def verdict(table: KernelTable) -> Verdict:
    return judge(table, [LIMIT])


@pytest.mark.parametrize("graphs", [False, True])
def test_a_whole_report_is_judged(tmp_path: Path, graphs: bool) -> None:
    table = read(export(tmp_path / "r.sqlite", slow=1.15, graphs=graphs))
    assert table.incomparable == ""
    assert not [note for note in table.notes if "missing" in note or "no kernel" in note]
    assert "TP1 is 1.15x slower" in verdict(table).reason
    assert verdict(table).word == "fail"


@pytest.mark.parametrize(
    ("graphs", "text"),
    [
        (True, "TP1: 600 of 4,000 launched kernels are missing (its first 12 steps)"),
        (False, "TP1: 720 of 4,800 launches have no kernel (its first 12 steps)"),
    ],
)
def test_a_lost_front_is_cut_away(tmp_path: Path, graphs: bool, text: str) -> None:
    lost: Lost = lambda step, number: step < 12  # noqa: E731
    table = read(export(tmp_path / "r.sqlite", slow=1.15, lost=lost, graphs=graphs))
    assert f"{text}: judged from step 13 on" in table.notes
    assert verdict(table).word == "fail"
    assert f"over {STEPS - 12} steps" in verdict(table).reason


@pytest.mark.parametrize(
    ("lost", "text"),
    [
        (lambda s, n: n % 3 == 0, "1,360 of 4,000 launched kernels are missing"),  # a stream
        (lambda s, n: s % 10 == 5, "TP1: 320 of 4,000 launched kernels are missing (8 steps)"),
    ],
)
def test_more_than_that_is_no_verdict(tmp_path: Path, lost: Lost, text: str) -> None:
    for slow in (1.0, 1.15):
        path = export(tmp_path / f"{slow}.sqlite", slow=slow, lost=lost)
        assert verdict(read(path)).word == "inconclusive"
        assert text in verdict(read(path)).reason


def test_a_parquet_folder_tells_the_same(tmp_path: Path) -> None:
    path = export(tmp_path / "r.sqlite", lost=lambda s, n: s % 10 == 5)
    folder = to_parquet(path, tmp_path / "parquet")
    assert read(folder).incomparable == read(path).incomparable != ""


def test_what_one_rank_lost_is_left_out_on_the_other(tmp_path: Path) -> None:
    table = read(export(tmp_path / "r.sqlite", slow=1.15, lost=lambda s, n: (s, n) == (40, 3)))
    assert "left out 1 kernel whose counterpart on another rank is lost" in table.notes
    counts = table.frame[table.frame["step"] >= 0].groupby("rank", observed=True).size()
    assert counts["TP0"] == counts["TP1"]
    assert verdict(table).word == "fail"


def test_without_steps_the_whole_window_counts(tmp_path: Path) -> None:
    lost: Lost = lambda s, n: s < 12  # noqa: E731
    table = read(export(tmp_path / "r.sqlite", lost=lost, marked=False))
    assert table.incomparable == "TP1: 720 of 4,120 launched kernels are missing"
    assert read(export(tmp_path / "whole.sqlite", marked=False)).incomparable == ""


def test_without_the_calls_nothing_is_known(tmp_path: Path) -> None:
    lost: Lost = lambda s, n: s < 12  # noqa: E731
    assert read(export(tmp_path / "r.sqlite", lost=lost, runtime=False)).incomparable == ""


def test_only_a_comparison_reads_the_calls(tmp_path: Path) -> None:
    path = export(tmp_path / "r.sqlite")
    assert all(part.launches is None for part in read_report(path, pid_ranks=PIDS))
    assert all(part.launches is not None for part in read_recorded(path, pid_ranks=PIDS))
