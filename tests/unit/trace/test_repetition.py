"""Steps by repetition: told only where nothing is left to guess."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_sglprof._errors import SettingsError
from pytest_sglprof._trace.read import _period, read_window
from pytest_sglprof._trace.table import KernelTable
from tests.support.kineto import Event, document, event, kernel, write

PASS = ("embed", "qkv_gemm", "attention", "qkv_gemm", "attention", "argmax_kernel")
STEP = 100.0  # us from step to step; the kernels take 60 of them


def rank_file(
    folder: Path,
    rank: int,
    steps: int = 5,
    *,
    sequence: tuple[str, ...] = PASS,
    skip: int = 0,
    late: float = 0.0,
    more: list[Event] | None = None,
) -> Path:
    """A rank that runs `sequence` again and again; the window opened `skip` kernels late."""
    events = [
        kernel(name, 1000 + late + STEP * step + 10 * n, 8)
        for step in range(steps)
        for n, name in enumerate(sequence)
    ][skip:]
    return write(folder, document([*events, *(more or [])]), f"1-TP-{rank}.trace.json")


def starts(table: KernelTable, rank: str = "TP0") -> list[int]:
    mine = table.steps[table.steps["rank"] == rank]
    return mine["start_ns"].tolist()


def names_by_step(table: KernelTable, rank: str = "TP0") -> dict[int, list[str]]:
    mine = table.frame[table.frame["rank"] == rank].sort_values("start_ns")
    return {int(step): part["name"].tolist() for step, part in mine.groupby("step")}


def test_exact_repetition_is_cut_at_the_longest_pause(tmp_path: Path) -> None:
    table = read_window([rank_file(tmp_path, 0), rank_file(tmp_path, 1, late=3.0)])
    for rank in table.ranks:
        assert names_by_step(table, rank) == {n: list(PASS) for n in range(5)}
    assert set(table.steps["stage"]) == {"unknown"}
    assert any(
        note.startswith("steps are 5 repetitions: found by the sequence") for note in table.notes
    )


def test_ranks_whose_windows_opened_at_other_kernels_are_aligned_by_time(tmp_path: Path) -> None:
    table = read_window([rank_file(tmp_path, 0), rank_file(tmp_path, 1, skip=8)])
    assert names_by_step(table, "TP1") == {
        -1: list(PASS[2:]),
        **{step: list(PASS) for step in range(3)},
    }
    assert names_by_step(table)[0] == list(PASS)
    assert starts(table) == starts(table, "TP1")


def test_other_streams_belong_by_time(tmp_path: Path) -> None:
    more = [kernel("copy_on_the_side", 1000 + STEP * 2 + 5, 1, stream=9)]
    table = read_window(rank_file(tmp_path, 0, more=more))
    assert "copy_on_the_side" in names_by_step(table)[2]


@pytest.mark.parametrize(
    "sequence",
    [
        ("qkv_gemm", "attention"),  # layers of one long prefill
        (*PASS, "argmax_kernel"),  # two passes, or one that samples twice: who knows
        ("qkv_gemm", "topkGatingSoftmax"),
    ],
)
def test_what_need_not_be_a_forward_pass_is_none(tmp_path: Path, sequence: tuple[str, ...]) -> None:
    table = read_window(rank_file(tmp_path, 0, 20, sequence=sequence))
    assert len(table.steps) == 0
    assert set(names_by_step(table)) == {-1}


def test_one_kernel_more_and_nothing_is_told(tmp_path: Path) -> None:
    more = [kernel("prefill_gemm", 1000 + STEP + 70, 1)]
    assert len(read_window(rank_file(tmp_path, 0, more=more)).steps) == 0


def test_in_a_very_long_trace_nobody_looks_unasked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pytest_sglprof._trace.read.MAX_KERNELS", 29)
    table = read_window(rank_file(tmp_path, 0))
    assert (len(table.steps), len(table.notes)) == (0, 1)
    assert len(read_window(rank_file(tmp_path, 0), step_delimiter="embed").steps) == 4


def test_two_repetitions_are_too_few(tmp_path: Path) -> None:
    assert len(read_window(rank_file(tmp_path, 0, 2)).steps) == 0


@pytest.mark.parametrize(
    ("other", "why"),
    [
        ({"sequence": (*PASS[:-2], "other_kernel", PASS[-1])}, "run different kernels"),
        ({"late": 60.0}, "at the same time"),
        ({"late": 9e6}, "hardly overlap"),
        ({"steps": 3}, "fewer than 3"),
    ],
)
def test_ranks_that_differ_have_no_steps_and_a_note(
    tmp_path: Path, other: dict[str, Any], why: str
) -> None:
    files = [rank_file(tmp_path, 0), rank_file(tmp_path, 1, **other)]
    table = read_window(files, step_delimiter="^embed$")
    assert len(table.steps) == 0
    assert any("no steps by the kernel /^embed$/" in note and why in note for note in table.notes)


def test_a_delimiter_allows_steps_that_differ(tmp_path: Path) -> None:
    """A kernel more in one step, on all ranks; what stands outside of delimiters is left out."""
    more = [kernel("prefill_gemm", 1000 + STEP + 70, 1)]
    files = [rank_file(tmp_path, rank, more=list(more), skip=2) for rank in (0, 1)]
    table = read_window(files, step_delimiter="^embed$")
    found = names_by_step(table)
    assert found[-1] == [*PASS[2:], *PASS], "before the first delimiter, and from the last on"
    assert {n: names for n, names in found.items() if n >= 0} == {
        0: [*PASS, "prefill_gemm"], 1: list(PASS), 2: list(PASS)
    }  # fmt: skip


SAMPLED = (*PASS[:-1], "top_p_sampling_kernel", "renorm", "argmax_kernel")  # in three kernels
PREFILL = ("embed", *("prefill_gemm", "attention") * 4, "argmax_kernel")
CHUNK = PREFILL[:-1]  # of a prefill; it samples nothing
LOADED = (SAMPLED, SAMPLED, PREFILL, SAMPLED, CHUNK, PREFILL, SAMPLED, SAMPLED, SAMPLED)


def loaded_file(folder: Path, rank: int, passes: Sequence[Sequence[str]] = LOADED) -> Path:
    """A rank under load: passes of several kinds, on both ranks in the same order."""
    events = [
        kernel(name, 1000 + STEP * step + 7 * n + rank, 6)
        for step, sequence in enumerate(passes)
        for n, name in enumerate(sequence)
    ]
    return write(folder, document(events), f"1-TP-{rank}.trace.json")


def test_under_load_the_sampling_ends_each_step(tmp_path: Path) -> None:
    table = read_window([loaded_file(tmp_path, rank) for rank in (0, 1)])
    # What comes before the first sampling has no beginning.
    expected = [*map(list, (SAMPLED, PREFILL, SAMPLED, (*CHUNK, *PREFILL), *(SAMPLED,) * 3))]
    for rank in table.ranks:
        steps = names_by_step(table, rank)
        assert [steps[number] for number in range(len(expected))] == expected
        assert steps[-1] == list(SAMPLED)
    assert any("found by the sampling of tokens" in note for note in table.notes)


def test_one_rank_under_load_has_no_steps(tmp_path: Path) -> None:
    assert len(read_window(loaded_file(tmp_path, 0)).steps) == 0


@pytest.mark.parametrize(
    "other",
    [
        (SAMPLED, SAMPLED, PREFILL, SAMPLED, SAMPLED, PREFILL, SAMPLED, SAMPLED, SAMPLED),
        (CHUNK,) * len(LOADED),  # a stage of a pipeline that samples nothing
    ],
)
def test_ranks_with_other_passes_have_no_steps_by_sampling(
    tmp_path: Path, other: Sequence[Sequence[str]]
) -> None:
    files = [loaded_file(tmp_path, 0), loaded_file(tmp_path, 1, other)]
    assert len(read_window(files).steps) == 0


def test_steps_of_the_trace_itself_are_never_replaced(tmp_path: Path) -> None:
    more = [event("gpu_user_annotation", "step[DECODE bs=1]", 1000, 50)]
    table = read_window(rank_file(tmp_path, 0, more=more), step_delimiter="embed")
    assert set(table.steps["stage"]) == {"decode"}
    assert len(table.steps) == 1


def test_a_bad_delimiter_is_quoted(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"step delimiter '\('"):
        read_window(rank_file(tmp_path, 0), step_delimiter="(")


@given(st.lists(st.integers(0, 2), min_size=1, max_size=6), st.integers(1, 6), st.integers(0, 5))
def test_the_period_of_any_sequence(unit: list[int], times: int, cut: int) -> None:
    """Against all shifts tried one by one."""
    keys = (unit * times)[min(cut, len(unit) * times - 1) :]
    shifts = [p for p in range(1, len(keys) + 1) if keys[p:] == keys[: len(keys) - p]]
    expected = shifts[0] if len(keys) >= 3 * shifts[0] else None
    assert _period(np.array(keys, dtype=np.int64)) == expected


REAL = (
    "torch/a100-nccl",
    "torch/sglang-mi300x/sglang_Qwen3-8B_decode.json.gz",
    "nsys/mfu_2gpu_after.sqlite",
    "nsys/mfu_2gpu_before.sqlite",
    "nsys/saxpy_perlmutter0.sqlite",
)


@pytest.mark.parametrize("path", REAL)
def test_real_data_gets_no_invented_steps(shared_data: Path, path: str) -> None:
    """Training, a benchmark, and a trace that has its own step."""
    table = read_window(shared_data / path)
    assert not any("repetitions" in note for note in table.notes)
