"""The parts of a wall of real GPUs, and of large planted windows, against plain Python."""

from __future__ import annotations

import sqlite3
from collections import defaultdict
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import pytest

from pytest_sglprof._analysis.budget import StepBudget, budgets, step_walls
from pytest_sglprof._trace.categories import category
from pytest_sglprof._trace.read import read_window
from tests.support import plain_traces as plain
from tests.support.planted import Plan, window
from tests.unit.analysis.test_budget import parts

TORCH = (
    "sglang-mi300x/sglang_Qwen3-8B_decode.json.gz",
    "sglang-mi300x/sglang_Qwen3-8B_prefilldecode.json.gz",
    "a100-nccl/rank-0.json.gz",
)
REPORTS = ("mfu_2gpu_before.sqlite", "mfu_2gpu_after.sqlite", "saxpy_perlmutter0.sqlite")
Interval = tuple[str, int, int]  # part, start, end


def merged(rows: Sequence[Interval], begin: int, stop: int) -> dict[str, int]:
    """ns of each part in [begin, stop), from a queue of begins and ends."""
    moments: list[tuple[int, int, str]] = []
    for part, start, end in rows:
        moments += [(max(start, begin), 1, part), (max(min(end, stop), begin), -1, part)]
    moments.append((stop, 0, "idle"))
    depth = dict.fromkeys(("compute", "communication", "copies"), 0)
    found, reached = dict.fromkeys((*depth, "idle"), 0), begin
    for at, change, part in sorted(moments):
        at = min(at, stop)
        found[next((each for each in depth if depth[each]), "idle")] += at - reached
        reached = at
        if change:
            depth[part] += change
    return found


def part_of(name: str) -> str:
    of = category(name)
    return {"communication": of, "memory": "copies"}.get(of, "compute")


def assert_adds_up(
    found: StepBudget, rank: str, rows: Sequence[Interval], span: tuple[int, int]
) -> None:
    figures = found.figure(rank)
    assert figures is not None
    begin, stop = span
    assert figures.wall_ns == stop - begin
    assert (
        sum(parts(found, rank).values()) + (figures.idle_ns if figures.launching_ns is None else 0)
        == figures.wall_ns
    )
    for part, ns in merged(rows, begin, stop).items():
        assert getattr(figures, f"{part}_ns") == pytest.approx(ns, abs=0.01 * figures.wall_ns), part


@pytest.mark.parametrize("name", TORCH)
def test_parts_of_a_real_torch_trace_add_up(shared_data: Path, name: str) -> None:
    path = shared_data / "torch" / name
    read = read_window(path)
    (found,) = budgets(step_walls(read))
    rows = [(part_of(text), at, at + dur) for text, _, at, dur in plain.gpu_rows(path)]
    inside = read.frame[read.frame["step"] >= 0] if found.has_steps else read.frame
    span = int(inside["start_ns"].min()), int((inside["start_ns"] + inside["dur_ns"]).max())
    assert_adds_up(found, read.ranks[0], rows, span)


@pytest.mark.parametrize("name", REPORTS)
def test_parts_of_a_real_report_add_up(shared_data: Path, name: str) -> None:
    path = shared_data / "nsys" / name
    rows: dict[str, list[Interval]] = defaultdict(list)
    with closing(sqlite3.connect(path)) as report:
        kernels = report.execute(
            "SELECT deviceId, value, start, end FROM CUPTI_ACTIVITY_KIND_KERNEL "
            "JOIN StringIds ON id = demangledName"
        )
        for device, text, start, end in kernels:
            rows[f"GPU{device}"].append((part_of(text), start, end))
        for kind in ("MEMCPY", "MEMSET"):
            listed = f"SELECT name FROM sqlite_master WHERE name = 'CUPTI_ACTIVITY_KIND_{kind}'"
            for (there,) in report.execute(listed).fetchall():
                for device, start, end in report.execute(
                    f"SELECT deviceId, start, end FROM {there}"
                ):
                    rows[f"GPU{device}"].append(("copies", start, end))
    (found,) = budgets(step_walls(read_window(path)))
    assert {rank.rank for rank in found.ranks} == set(rows)
    origin = min(start for each in rows.values() for _, start, _ in each)
    for rank, own in rows.items():
        span = min(start for _, start, _ in own) - origin, max(end for *_, end in own) - origin
        shifted = [(part, start - origin, end - origin) for part, start, end in own]
        assert_adds_up(found, rank, shifted, span)


def test_a_real_server_on_cpu_has_no_figure(shared_data: Path) -> None:
    (found,) = budgets(step_walls(read_window(shared_data / "torch" / "sglang-cpu-tp2-nostack")))
    assert found.reason.startswith("activities are CPU operators")


@pytest.mark.parametrize(
    "plan",
    [
        Plan(),
        Plan(late={1: 40_000}, offset={0: 3_000_000}, drift={1: 2e-5}),
        Plan(early={0: 30_000}, early_meeting={1: 20_000}, overlap=5_000),
        Plan(all_to_all=True, late={0: 40_000}),
        Plan(p2p_only=True),
        Plan(missing=((1, 7), (1, 40))),
    ],
    ids=("plain", "other clocks", "launched early", "all-to-all", "p2p", "a rank lacks steps"),
)
def test_large_windows_are_split_to_the_nanosecond(plan: Plan) -> None:
    read = window(plan)
    (found,) = budgets(step_walls(read))
    for figures in found.ranks:
        frame = read.frame[read.frame["rank"] == figures.rank]
        kinds = {"communication": "communication", "memory": "copies"}
        starts, ends = frame["start_ns"].tolist(), (frame["start_ns"] + frame["dur_ns"]).tolist()
        rows = [
            (kinds.get(of, "compute"), start, end)
            for of, start, end in zip(frame["category"], starts, ends, strict=True)
        ]
        plain_sums = merged(rows, min(starts), max(ends))
        assert {part: getattr(figures, f"{part}_ns") for part in plain_sums} == plain_sums
        split, waiting = figures.transfer_ns or 0, figures.waiting_ns or 0
        assert split + waiting <= figures.communication_ns
        assert (figures.transfer_ns is None) == plan.p2p_only
        assert (
            sum(parts(found, figures.rank).values()) == figures.wall_ns == sum(plain_sums.values())
        )
