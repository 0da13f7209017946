"""Strata of a window and two of them against each other, by sums over plain rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import msgspec
import pytest

from pytest_sglprof._analysis import strata as strata_module
from pytest_sglprof._analysis.budget import step_walls
from pytest_sglprof._analysis.collectives import waits
from pytest_sglprof._analysis.compare import compare_strata
from pytest_sglprof._analysis.strata import GroupStrata, StepWork, strata
from pytest_sglprof._analysis.times import sum_times
from pytest_sglprof._trace.table import KernelTable, Step
from tests.support.kernel_tables import build, from_rows, slow

RANKS = ("TP0", "TP1")
Row = tuple[str, str, str, str, int, int, int, int]


def window(
    batches: Sequence[int],
    *,
    ns: Callable[[str, int], int] = lambda name, batch: 1000 * batch,
    names: Sequence[tuple[str, str]] = (("moe_kernel", "moe"), ("all_reduce", "communication")),
    ranks: Sequence[str] = RANKS,
    **more: Any,
) -> tuple[KernelTable, list[Row]]:
    """Decode steps of these batch sizes, and the rows that they were made of."""
    rows: list[Row] = []
    steps = []
    for rank in ranks:
        at = 0
        for number, batch in enumerate(batches):
            begin = at
            for name, category in names:
                dur = ns(name, batch) + (7 if rank == "TP1" else 0)
                rows.append((rank, name, category, "decode", number, 7, at, dur))
                at += dur
            told = {"batch_size": batch, "tokens": batch, "kv_tokens": 1500 * batch, **more}
            steps.append((rank, Step(number, "decode", begin, at, **told)))
    return from_rows(rows, steps=steps, ranks=ranks), rows


def found(table: KernelTable) -> tuple[GroupStrata, ...]:
    waited = waits(table)
    return strata(table, sum_times(table), waited, step_walls(table, waited))


def trimmed_mean(values: Sequence[float]) -> float:
    """Without a fifth of the values at each end."""
    cut = int(0.2 * len(values))
    kept = sorted(values)[cut : len(values) - cut]
    return sum(kept) / len(kept)


def mean(
    rows: Sequence[Row], steps: set[int], name: str = "", ranks: Sequence[str] = RANKS
) -> float:
    """Kernel time a step, mean over steps and ranks; of compute without a name."""
    chosen = (r for r in rows if (r[1] == name if name else r[2] != "communication"))
    return sum(row[7] for row in chosen if row[4] in steps) / len(steps) / len(ranks)


def test_steps_of_equal_work_are_one_stratum() -> None:
    batches = [4, 8, 4, 4, 8, 16]
    table, rows = window(batches)
    (group,) = found(table)
    assert group.steps == {"decode": 6}
    assert [(one.work.batch, one.steps) for one in group.strata] == [(4, 3), (8, 2), (16, 1)]
    for one in group.strata:
        steps = {at for at, batch in enumerate(batches) if batch == one.work.batch}
        assert one.work == StepWork("decode", "", one.work.batch, 10, -1)  # 1500 tokens a request
        assert one.compute_ns == pytest.approx(mean(rows, steps), abs=1e-9)
        for (category, name), ns in zip(group.kernels, one.kernels, strict=True):
            assert ns == pytest.approx(mean(rows, steps, name), abs=1e-9)
            assert one.categories[category] == pytest.approx(ns)


def test_what_is_typical_does_not_follow_slow_steps() -> None:
    """Two of ten steps take ten times as long: the mean is 2.8 times what is typical."""
    rows: list[Row] = []
    steps = []
    durations = [1000 + 10 * at for at in range(8)] + [10_000, 10_100]
    for rank, more in (("TP0", 0), ("TP1", 7)):
        for number, dur in enumerate(durations):
            begin = number * 100_000
            told = {"batch_size": 4, "tokens": 4, "kv_tokens": 6000}
            steps.append((rank, Step(number, "decode", begin, begin + 50_000, **told)))
            rows.append((rank, "moe_kernel", "moe", "decode", number, 7, begin, dur + more))
            rows.append((rank, "gemm", "gemm", "decode", number, 7, begin + 30_000, 500))
    (group,) = found(from_rows(rows, steps=steps, ranks=RANKS))
    (one,) = group.strata
    typical = trimmed_mean([dur + 3.5 for dur in durations])
    assert dict(zip(group.kernels, one.kernels, strict=True)) == {
        ("moe", "moe_kernel"): pytest.approx(typical),
        ("gemm", "gemm"): 500.0,
    }
    assert one.categories == {"moe": pytest.approx(typical), "gemm": 500.0}
    assert one.compute_ns == pytest.approx(typical + 500)
    assert one.calls == (1.0, 1.0)


def test_a_kernel_of_some_steps_is_typical_of_these() -> None:
    """In three of ten steps two calls: a trimmed mean over all ten would be 0.167 of them."""
    rows: list[Row] = []
    for number in range(10):
        rows.append(("TP0", "often", "gemm", "decode", number, 7, number * 1000, 100))
        for call in range(2 if number in (1, 4, 8) else 0):
            rows.append(("TP0", "rare", "moe", "decode", number, 7, number * 1000 + 300, 40 + call))
    steps = [("TP0", Step(n, "decode", n * 1000, n * 1000 + 900, batch_size=4)) for n in range(10)]
    (group,) = found(from_rows(rows, steps=steps))
    (one,) = group.strata
    assert group.kernels == (("gemm", "often"), ("moe", "rare"))
    assert one.kernels == (100.0, pytest.approx(0.3 * 81))
    assert one.calls == (1.0, pytest.approx(0.6))


def test_transfer_wall_and_idle_are_those_of_the_steps() -> None:
    """TP1 arrives 2 µs late at each collective, which then takes 3 µs; 5 µs pass between steps."""
    rows: list[Row] = []
    steps = []
    for rank, late in (("TP0", 0), ("TP1", 2000)):
        for number in range(10):
            begin = number * 20_000
            rows.append((rank, "gemm", "gemm", "decode", number, 7, begin, 10_000 + late))
            call = ("communication", "decode", number, 7, begin + 10_000 + late, 5_000 - late)
            rows.append((rank, "ncclDevKernel_AllReduce_Sum_bf16_RING", *call))
            told = {"batch_size": 4, "tokens": 4, "kv_tokens": 6000}
            steps.append((rank, Step(number, "decode", begin, begin + 15_000, **told)))
    (group,) = found(from_rows(rows, steps=steps, ranks=RANKS))
    (one,) = group.strata
    assert one.transfer_ns == 3_000.0
    assert one.categories["communication"] == 4_000.0  # half of the wait is in it
    walls, gaps = [20_000] * 9 + [15_000], [5_000] * 9 + [0]
    assert one.wall_ns == trimmed_mean(walls)
    assert one.idle_ns == trimmed_mean(gaps)


def test_without_a_timeline_or_peers_no_wall_and_no_transfer() -> None:
    table = build(("TP0",))
    (one,) = strata(table, sum_times(table))[0].strata
    assert (one.transfer_ns, one.wall_ns, one.idle_ns) == (None, None, None)
    (one,) = found(build(with_steps=False))[0].strata
    assert (one.calls, one.transfer_ns, one.wall_ns, one.idle_ns) == (None, None, None, None)


def test_many_steps_are_looked_at_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    names = [(f"k{at}", "gemm") for at in range(7)]
    table, _ = window([4] * 30 + [8] * 30, names=names, ns=lambda name, batch: batch + int(name[1]))
    whole = found(table)
    monkeypatch.setattr(strata_module, "_NUMBERS", 150)  # two kernels of 60 steps
    assert found(table) == whole


def test_the_padded_batch_counts_and_the_longest_cache_bucket() -> None:
    table, _ = window([5, 6, 7], padded_batch=8, substage="DECODE")
    (group,) = found(table)
    assert [one.work for one in group.strata] == [StepWork("decode", "DECODE", 8, 10, -1)]
    table, _ = window([4, 4], kv_tokens=4 * 4096)
    assert found(table)[0].strata[0].work.kv_bucket == 12
    table, _ = window([4, 4], kv_tokens=-1, batch_size=-1)
    assert found(table)[0].strata[0].work == StepWork("decode", "", -1, -1, -1)


def test_prefills_of_other_lengths_are_other_work() -> None:
    steps, rows = [], []
    for number, tokens in enumerate((900, 1000, 5000)):
        steps.append(("TP0", Step(number, "prefill", 0, 1, batch_size=2, tokens=tokens)))
        rows.append(("TP0", "k", "gemm", "prefill", number, 7, number * 10_000, tokens))
    (group,) = found(from_rows(rows, steps=steps))
    assert [(one.work.token_bucket, one.steps) for one in group.strata] == [(9, 2), (12, 1)]


def test_numbers_of_steps_may_be_large_and_have_gaps() -> None:
    """Draft models count their steps beyond every other number."""
    numbers = (5, 7, 2**40 + 5)
    steps = [("TP0", Step(n, "decode", 0, 1, batch_size=n % 2 + 1)) for n in numbers]
    durations = (*zip(numbers, (100, 300, 500), strict=True), (6, 9_000), (-1, 9_000))
    rows = [("TP0", "k", "gemm", "decode", n, 7, n * 1000, ns) for n, ns in durations]
    (group,) = found(from_rows(rows, steps=steps))
    assert [(one.steps, one.kernels) for one in group.strata] == [(3, (300.0,))]


def test_a_planted_kernel_is_found_whatever_the_mix_of_batches() -> None:
    """Sums say the run got faster, and every step of equal work got slower in one kernel."""
    before, old = window([4, 8] * 10 + [32] * 20)
    now, new = window(
        [4] * 20 + [8] * 10 + [32] * 2,
        ns=lambda name, batch: 1000 * batch * (5 if name == "moe_kernel" else 4) // 4,
        names=(("moe_kernel", "moe"),),
    )
    assert sum(r[7] for r in new if r[2] == "moe") < sum(r[7] for r in old if r[2] == "moe")
    (stage,) = compare_strata(found(before), found(now))
    assert (stage.stage, stage.reason, stage.unit) == ("decode", "", "step")
    assert (stage.matched_before, stage.matched_now) == (1.0, 1.0)
    sides = []
    for rows, batches in ((old, [4, 8] * 10 + [32] * 20), (new, [4] * 20 + [8] * 10 + [32] * 2)):
        means = [
            mean(rows, {at for at, one in enumerate(batches) if one == batch}, "moe_kernel")
            for batch in (4, 8, 32)
        ]
        sides.append(sum(means) / 3)
    moe = next(change for change in stage.kernels if change.name == "moe_kernel")
    assert moe.before_ns == pytest.approx(sides[0])
    assert moe.now_ns == pytest.approx(sides[1])
    assert moe.ratio == pytest.approx(sides[1] / sides[0])
    assert moe.share == pytest.approx((sides[1] - sides[0]) / sides[0])  # it is all of compute
    gone = next(change for change in stage.kernels if change.name == "all_reduce")
    assert (gone.now_ns, gone.ratio) == (0.0, 0.0)
    assert {change.category for change in stage.categories} == {"moe", "communication"}


def test_equal_runs_of_another_mix_do_not_differ() -> None:
    before, _ = window([4] * 30 + [64] * 3)
    now, _ = window([4] * 3 + [64] * 30)
    (stage,) = compare_strata(found(before), found(now))
    assert stage.compute is not None
    assert stage.compute.ratio == pytest.approx(1.0)
    assert {change.ratio for change in stage.kernels} == {1.0}


@pytest.mark.parametrize(
    ("now", "share"), [([4] * 5 + [8] * 6, 5 / 11), ([8] * 4, 0.0)], ids=["a part", "nothing"]
)
def test_less_than_half_matched_is_inconclusive(now: list[int], share: float) -> None:
    (stage,) = compare_strata(found(window([4] * 10)[0]), found(window(now)[0]))
    assert stage.matched_now == pytest.approx(share)
    assert "half of each is needed" in stage.reason
    assert stage.kernels == ()
    assert {(one.work.batch, one.before_steps > 0) for one in stage.strata} >= {(8, False)}


def test_half_is_enough() -> None:
    (stage,) = compare_strata(found(window([4] * 10)[0]), found(window([4, 8] * 5)[0]))
    assert (stage.matched_before, stage.matched_now, stage.reason) == (1.0, 0.5, "")


def test_strata_that_were_left_out_are_unmatched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(strata_module, "MAX_STRATA", 2)
    table, _ = window([1, 1, 2, 2, 3, 4, 5, 6])
    (group,) = found(table)
    assert (len(group.strata), group.left_out_strata) == (2, 4)
    (stage,) = compare_strata([group], [group])
    assert stage.matched_now == 0.5


def test_kernels_are_bounded_and_what_is_not_listed_is_unknown(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    names = [(f"k{at:02}", "gemm") for at in range(30)]
    many, rows = window([4] * 3, names=names, ns=lambda name, batch: 1000 - int(name[1:]))
    whole = found(many)
    monkeypatch.setattr(strata_module, "MAX_KERNELS", 20)
    (group,) = found(many)
    assert [name for _, name in group.kernels] == [name for name, _ in names[:20]]
    assert group.left_out_kernels == 10
    assert group.strata[0].compute_ns == pytest.approx(mean(rows, {0, 1, 2}))
    (stage,) = compare_strata([group], whole)
    last = next(change for change in stage.kernels if change.name == "k29")
    assert (last.before_ns, last.ratio, last.difference_ns) == (None, None, None)


def test_stages_are_compared_each_by_itself() -> None:
    def stage(step: int) -> str:
        return "prefill" if step % 5 == 0 else "decode"

    before, now = build(stage=stage), build(scale=slow("TP1", "moe", 1.5))
    decode, prefill = compare_strata(found(before), found(now))
    assert (decode.stage, decode.reason) == ("decode", "")
    assert decode.kernels[0].name == "fused_moe_kernel"
    assert decode.kernels[0].ratio == pytest.approx(1.25)  # mean of a rank at 1.5 and one at 1
    assert (prefill.stage, prefill.reason) == ("prefill", "only the baseline has such steps")


def test_other_ranks_and_missing_groups_are_not_compared() -> None:
    two, four = build(), build(tuple(f"TP{at}" for at in range(4)))
    (stage,) = compare_strata(found(two), found(four))
    assert stage.reason == "other ranks: TP0, TP1 before, TP0, TP1, TP2, TP3 now"
    replicas = build(("DP0 TP0", "DP0 TP1", "DP1 TP0", "DP1 TP1"))
    reasons = {one.group: one.reason for one in compare_strata(found(two), found(replicas))}
    assert reasons["DP0"] == "the baseline has no such group of ranks"
    assert reasons[""] == "this run has no such group of ranks"
    (stage,) = compare_strata(found(two), found(build(with_steps=False)))
    assert stage.reason == "the source of this run has no steps, that of the other does"


def test_steps_that_cover_too_little_do_not_speak_for_the_window() -> None:
    table = build(steps=20)
    table.frame.loc[table.frame["step"] >= 8, "step"] = -1
    (stage,) = compare_strata(found(build()), found(table))
    assert stage.reason == "less than half of the compute of this run lies in known steps"


def test_without_steps_calls_are_compared() -> None:
    """A window of another length holds another number of calls: sums would say anything."""
    before = build(with_steps=False, steps=50)
    now = build(with_steps=False, steps=20, scale=slow("TP0", "moe", 1.5))
    (stage,) = compare_strata(found(before), found(now))
    assert (stage.unit, stage.reason) == ("call", "")
    assert len(stage.cautions) == 1
    moe = next(change for change in stage.kernels if change.name == "fused_moe_kernel")
    assert (moe.before_ns, moe.now_ns, moe.ratio) == (600_000, 750_000, 1.25)
    others = {change.ratio for change in stage.kernels if change is not moe}
    assert others == {1.0}
    assert stage.compute is not None
    assert stage.compute.ratio == pytest.approx((750 + 300 + 200) / (600 + 300 + 200))
    assert moe.share == pytest.approx(150 / 1100)


def test_without_steps_other_kernels_are_other_work() -> None:
    before = build(with_steps=False)
    now = build(with_steps=False, kernels=[("other_moe", "moe", 600_000), ("x", "gemm", 300_000)])
    (stage,) = compare_strata(found(before), found(now))
    assert "half of each is needed" in stage.reason
    shared = [("flash_attention", "attention", 600_000), ("mine", "gemm", 300_000)]
    (stage,) = compare_strata(found(before), found(build(with_steps=False, kernels=shared)))
    assert stage.matched_before == pytest.approx(200 / 1100)


def test_one_category_or_another_is_one_kernel() -> None:
    """Patterns of a later sglprof.toml move kernels between categories."""
    before = build(kernels=[("k", "other", 100_000)])
    now = build(kernels=[("k", "gemm", 110_000)])
    (stage,) = compare_strata(found(before), found(now))
    (only,) = stage.kernels
    assert (only.category, only.ratio) == ("gemm", pytest.approx(1.1))


@pytest.mark.parametrize("with_steps", [True, False])
def test_a_document_holds_all_of_it(with_steps: bool) -> None:
    table = build(with_steps=with_steps)
    groups = found(table)
    again = msgspec.json.decode(msgspec.json.encode(groups), type=tuple[GroupStrata, ...])
    assert again == groups
    assert compare_strata(groups, again)[0].kernels
    for change in compare_strata(groups, again)[0].kernels:
        assert change.ratio == pytest.approx(1.0, abs=1e-6)


def test_silent_ranks_and_empty_windows_have_strata() -> None:
    groups = found(build(silent=("TP1",)))
    assert groups[0].steps == {}  # no step is on every rank
    (stage,) = compare_strata(groups, groups)
    assert stage.reason == "the baseline has no step that can be compared"
    table = build(with_steps=False, silent=RANKS)
    (stage,) = compare_strata(found(table), found(table))
    assert stage.reason


def test_sums_of_strata_are_those_of_the_rows_of_a_real_window(shared_data: Any) -> None:
    from pytest_sglprof import read_window

    traces = sorted((shared_data / "torch" / "sglang-cpu-tp2").glob("1*.json.gz"))
    table = read_window(traces)
    cells = sum_times(table)
    (group,) = strata(table, cells)
    compared = set(cells[0].steps.numbers)
    frame = table.frame[["step", "category", "dur_ns"]].astype({"category": object})
    outside = ("communication", "memory")
    for one in group.strata:
        if one.work.stage != "decode":
            continue
        steps = {
            int(s)
            for s, stage, b in zip(
                table.steps["step"], table.steps["stage"], table.steps["batch_size"], strict=True
            )
            if stage == "decode" and b == one.work.batch and s in compared
        }
        totals = dict.fromkeys(steps, 0)
        for step, category, dur in frame.itertuples(index=False):
            if step in steps and category not in outside:
                totals[step] += int(dur)
        assert one.steps == len(steps)
        assert one.compute_ns == pytest.approx(trimmed_mean([ns / 2 for ns in totals.values()]))
