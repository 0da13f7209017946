"""The windows of `benchmarks.damage` are as planned, and their damage does not mislead verdicts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from benchmarks.damage import (
    BEGIN,
    END,
    Cell,
    Judged,
    Planted,
    Tally,
    cells,
    content_of,
    is_counted,
    judged_columns,
    judged_files,
    misses,
    planted,
    rewrite,
    tally_of,
)
from benchmarks.damage_model import (
    ALL_REDUCE,
    COPY,
    NAMES,
    RankTrace,
    Window,
    counts_of,
    lost_every_nth,
    lost_front,
    over_the_next,
    planned,
    sound_window,
    write_trace,
)
from pytest_sglprof._trace.paths import FileRanks
from pytest_sglprof._trace.read import build_table, read_window
from pytest_sglprof._trace.table import KernelTable
from pytest_sglprof._trace.torch.assemble import _assembled

WINDOWS = 20
KEPT = (
    "nothing lost 0 % 2 ranks balanced",
    "nothing lost 0 % 8 ranks slow",
    "lost front 20 % 2 ranks slow",
    "lost front 10 % 2 ranks balanced",
    "lost stream 0.2 % 2 ranks slow",
    "lost every nth 10 % 8 ranks slow",
    "over the next 5 % 2 ranks balanced",
    "run of another size 0 % 2 ranks slow",
)


def cell_of(key: str) -> Cell:
    (cell,) = [cell for cell in cells(key) if cell.key == key]
    return cell


@pytest.mark.parametrize("key", KEPT)
def test_verdicts_on_damaged_windows_do_not_mislead(key: str) -> None:
    cell = cell_of(key)
    columns, _ = tally_of(cell, 0, WINDOWS, 0)
    assert columns.windows == WINDOWS
    assert misses(cell, columns) == [], columns.samples


def test_without_detection_a_healthy_rank_is_blamed() -> None:
    cell = cell_of("lost every nth, detection off 20 % 2 ranks balanced")
    columns, _ = tally_of(cell, 0, WINDOWS, 0)
    assert columns.fail_wrong > 0.9 * WINDOWS


# The model.


def sound(*, ranks: int = 2, slow: int | None = None, vendor: str = "cuda") -> Window:
    rng = np.random.default_rng(7)
    return sound_window(rng, planned(rng, ranks, vendor, is_small=True), ranks=ranks, slow=slow)


def rows_of(trace: RankTrace, name: str) -> np.ndarray:
    return trace.kernels.name == NAMES.index(name)


def test_an_all_reduce_ends_on_all_ranks_at_once_and_begins_on_each_alone() -> None:
    ends, starts = [], []
    for trace in sound(ranks=8).traces:
        rows = rows_of(trace, ALL_REDUCE) & (trace.kernels.launch < 60)
        ends.append(trace.kernels.end[rows])
        starts.append(trace.kernels.start[rows])
    assert len(ends[0]) >= 60 * 5
    assert (np.ptp(ends, axis=0) == 0).all()
    assert (np.ptp(starts, axis=0) > 0).all()


def test_the_slow_rank_computes_as_much_longer_as_planted() -> None:
    totals = []
    for trace in sound(slow=1).traces:
        compute = ~rows_of(trace, ALL_REDUCE) & ~rows_of(trace, COPY)
        totals.append(trace.kernels.dur[compute & (trace.kernels.launch < 60)].sum())
    assert totals[1] / totals[0] == pytest.approx(1.15, abs=0.01)


def test_kernels_of_a_stream_follow_each_other() -> None:
    for trace in sound(ranks=8).traces:
        kernels = trace.kernels
        for stream in np.unique(kernels.stream):
            rows = kernels.stream == stream
            assert (kernels.start[rows][1:] >= kernels.end[rows][:-1]).all()


def test_a_window_begins_with_kernels_and_ends_with_launches_of_their_own() -> None:
    for trace in sound().traces:
        first = trace.kernels.launch == 0
        assert first.any()
        assert not trace.is_launched[first].any()
        last = trace.spans[-1].number
        assert (trace.calls.correlation > last * 10_000).any()
        assert trace.outside > 0


def test_decode_replays_one_graph_a_step_and_launches_nothing_else() -> None:
    for trace in sound().traces:
        for span in trace.spans:
            rows = trace.kernels.launch == span.number
            kernels = rows & ~rows_of(trace, COPY)
            if not kernels.any():
                continue  # the last pass ran after the window
            ids = len(np.unique(trace.kernels.correlation[kernels]))
            assert ids == (1 if "DECODE" in span.name else kernels.sum())


# The damage.


def test_every_nth_kernel_is_lost_and_counted() -> None:
    trace = sound().traces[0]
    launched = int(trace.is_launched.sum())
    damaged = lost_every_nth(trace, 0.1, np.random.default_rng(1))
    lost = len(trace.kernels.start) - len(damaged.kernels.start)
    assert lost == pytest.approx(launched / 10, abs=1)
    assert counts_of(trace, damaged) == {lost, lost + trace.outside}


@pytest.mark.parametrize("share", [0.001, 0.1, 0.3, 0.5])
def test_a_lost_front_touches_no_more_steps_than_its_share(share: float) -> None:
    trace = sound().traces[0]
    for seed in range(50):
        left = lost_front(trace, share, np.random.default_rng(seed)).kernels
        steps = [span.number for span in trace.spans if (trace.kernels.launch == span.number).any()]
        before, after = (np.bincount(k.launch, minlength=70) for k in (trace.kernels, left))
        touched = sum(before[number] != after[number] for number in steps)
        assert 1 <= touched <= max(1, share * len(trace.spans))
        assert (np.flatnonzero(before != after) <= touched).all()


def test_kernels_over_the_next_contain_a_whole_one_of_their_stream() -> None:
    trace = sound(vendor="hip").traces[0]
    damaged = over_the_next(trace, 0.2, np.random.default_rng(1)).kernels
    changed = np.flatnonzero(damaged.dur != trace.kernels.dur)
    assert len(changed) == pytest.approx(0.2 * trace.is_launched.sum(), abs=2)
    counts = counts_of(trace, replace(trace, kernels=damaged))
    assert counts == {len(changed), len(changed) + trace.outside}
    for row in changed:
        same = damaged.stream == damaged.stream[row]
        later = same & (damaged.start > damaged.start[row]) & (damaged.end < damaged.end[row])
        assert later.any()


# From windows to tables and verdicts.


def table_of_columns(window: Planted) -> KernelTable:
    named = list(window.named())
    ranks = FileRanks([Path(name) for name, _ in named], {})
    contents = [content_of(name, trace) for name, trace in named]
    return build_table([(c.path, part) for c in contents for part in _assembled(c, ranks)])


@pytest.mark.parametrize(
    "key",
    [
        "nothing lost 0 % 2 ranks slow",
        "lost front 30 % 2 ranks balanced",
        "lost stream 10 % 2 ranks balanced",
        "bad durations 5 % 2 ranks slow",
        "over the next 5 % 2 ranks slow",
        "run of another size 0 % 2 ranks balanced",
    ],
)
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_columns_and_files_of_a_window_give_one_table(tmp_path: Path, key: str, seed: int) -> None:
    window = planted(cell_of(key), np.random.default_rng(seed), is_small=True)
    for name, trace in window.named():
        write_trace(trace, tmp_path / name, np.random.default_rng(seed))
    files, columns = read_window(tmp_path), table_of_columns(window)
    order = ["rank", "stream", "start_ns"]
    listed = [table.frame.sort_values(order, ignore_index=True) for table in (files, columns)]
    texts = [
        frame.astype({key: str for key in frame.columns if key[-3:] != "_ns"}) for frame in listed
    ]
    pd.testing.assert_frame_equal(*texts)
    assert files.incomparable == columns.incomparable
    assert files.steps.astype(str).equals(columns.steps.astype(str))


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("nothing lost 0 % 2 ranks slow", "slower than its peers"),
        ("lost scattered 20 % 2 ranks balanced", "missing"),
        ("swapped files 0 % 2 ranks balanced", "its name says"),
    ],
)
def test_the_command_and_the_columns_give_one_verdict(key: str, words: str) -> None:
    rng = np.random.default_rng(5)
    window = planted(cell_of(key), rng, is_small=True)
    judged = judged_columns(window), judged_files(window, rng)
    assert judged[0][:2] == judged[1][:2]
    assert all(words in each.reason for each in judged)


# Bounds, counts, the table.


@pytest.mark.parametrize(
    ("key", "outcomes", "missed"),
    [
        ("lost stream 5 % 2 ranks slow", {"undecided": 200}, []),
        ("lost stream 5 % 2 ranks slow", {"passed": 1, "undecided": 199}, ["a slow rank passes"]),
        ("lost stream 5 % 2 ranks balanced", {"passed": 200}, []),
        ("lost stream 5 % 2 ranks balanced", {"fail_wrong": 1, "undecided": 199},
         ["a wrong rank is blamed"]),
        ("lost stream 0.2 % 2 ranks slow", {"fail_right": 190, "undecided": 10}, []),
        ("lost stream 0.2 % 2 ranks slow", {"fail_right": 189, "undecided": 11},
         ["too few right verdicts"]),
        ("lost stream 1 % 2 ranks slow", {"fail_right": 160, "undecided": 40}, []),
        ("lost stream 1 % 2 ranks slow", {"fail_right": 159, "undecided": 41},
         ["too few right verdicts"]),
        ("lost front 30 % 2 ranks balanced", {"passed": 159, "undecided": 41},
         ["too few right verdicts"]),
        ("lost front 50 % 2 ranks slow", {"undecided": 200, "counted": 198}, []),
        ("lost front 50 % 2 ranks slow", {"undecided": 200, "counted": 197}, ["wrong counts"]),
        ("lost front 50 % 2 ranks slow", {"undecided": 197, "fail_right": 3, "counted": 198},
         ["too few inconclusive"]),
        ("swapped files 0 % 2 ranks slow", {"undecided": 198, "fail_right": 2}, []),
    ],
)  # fmt: skip
def test_bounds(key: str, outcomes: dict[str, int], missed: list[str]) -> None:
    assert misses(cell_of(key), Tally(windows=200, **outcomes)) == missed


@pytest.mark.parametrize(
    ("reason", "is_right"),
    [
        ("TP1: 40 of 4,800 launched kernels are missing (36 steps)", True),
        ("TP1: 41 of 4,800 launched kernels are missing (36 steps)", True),
        ("TP1: 1,100 of 4,800 launched kernels are missing", True),
        ("TP1: 42 of 4,800 launched kernels are missing (36 steps)", False),
        ("TP0: 40 of 4,800 launched kernels are missing (36 steps)", False),
        ("TP1: 40 of 4,800 launches have no kernel; TP0: 3 of 4,800", False),
        ("30 steps are needed", False),
    ],
)
def test_a_count_is_right_within_one_and_of_the_damaged_rank_alone(
    reason: str, is_right: bool
) -> None:
    window = Planted(Window((), None), places=(1,), counts=frozenset({40, 1100}))
    assert is_counted(window, reason) is is_right


def test_a_failure_that_names_the_slow_rank_is_right_and_any_other_wrong() -> None:
    tally = Tally()
    for slow, blamed in ((1, "TP1"), (1, "TP0"), (None, "TP1")):
        tally.add(Planted(Window((), slow)), Judged("fail", blamed, ""))
    assert (tally.fail_right, tally.fail_wrong) == (1, 2)


def test_only_the_table_of_a_document_is_rewritten(tmp_path: Path) -> None:
    page = tmp_path / "truth.md"
    page.write_text(f"before\n\n{BEGIN}\nold\n{END}\n\nafter\n")
    for _ in range(2):
        rewrite(page, ["| a |", "| - |"])
    assert page.read_text() == f"before\n\n{BEGIN}\n| a |\n| - |\n{END}\n\nafter\n"
