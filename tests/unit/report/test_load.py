"""The load around a window in its document, and what it says beside the trace."""

from __future__ import annotations

from dataclasses import replace

import pytest

from pytest_sglprof._analysis.load import compute_by_dp, join_load, pearson
from pytest_sglprof._load.onset import Onset
from pytest_sglprof._load.samples import LoadSample, RankLoad
from pytest_sglprof._report.load import load_strip, onset_document
from pytest_sglprof._report.results import validate
from tests.support.kernel_tables import build, from_rows, slow
from tests.support.windows import plain, run, window

ONSET = Onset(
    1_700_000_000.0,
    1_700_000_002.0,
    "tokens",
    1.5,
    0.5,
    "loads",
    (RankLoad("DP0", 10, 0, 900.0, 0.9), RankLoad("DP1", 10, 0, 300.0, 0.3)),
    sentence="DP0 has more",
)


RANKS = ("DP0 TP0", "DP1 TP0")
SLOW = build(RANKS, scale=slow("DP0 TP0", "moe", 1.4))


def test_the_rank_with_more_tokens_computed_longer() -> None:
    compute, per_step = compute_by_dp(SLOW)
    frame = SLOW.frame
    work = frame[~frame["category"].isin(["communication", "memory"])]
    for number, rank in enumerate(SLOW.ranks):
        mine = work[work["rank"] == rank]
        truth = mine["dur_ns"].sum() / frame.loc[frame["rank"] == rank, "step"].nunique()
        assert compute[number] == pytest.approx(truth, rel=0.05)
    assert per_step
    joined = join_load(ONSET, SLOW)
    assert joined.correlation == pytest.approx(1.0)
    ratio = compute[0] / compute[1]
    assert joined.sentence.startswith("the trace confirms it: DP0 had most to do and computed ")
    assert f"{ratio:.2f}x as long a step as the others" in joined.sentence


def test_a_trace_that_says_otherwise_does_not_confirm() -> None:
    joined = join_load(
        replace(ONSET, ranks=(ONSET.ranks[0], replace(ONSET.ranks[1], tokens=999.0))), SLOW
    )
    assert joined.correlation == pytest.approx(-1.0)
    assert joined.sentence.startswith("the trace does not confirm it: DP1")


def test_the_loop_of_an_idle_scheduler_is_no_compute() -> None:
    busy, idle = RANKS
    rows = [(busy, "scheduler.run_batch", "other", "decode", n, 1, n * 10, 8) for n in range(50)]
    rows += [(idle, "scheduler.idle", "other", "unknown", -1, 1, 0, 500)]
    table = from_rows(rows, source="nvtx", ranks=RANKS)
    assert compute_by_dp(table) == ({0: 400.0, 1: 0.0}, False)
    assert "the others nothing" in join_load(ONSET, table).sentence


def test_processes_of_unknown_rank_are_nobodys() -> None:
    rows = [("pid 7", "scheduler.run_batch", "other", "decode", 0, 1, 0, 8)]
    joined = join_load(ONSET, from_rows(rows, source="nvtx"))
    assert joined.sentence == "the trace has no kernels of DP0, DP1"


def test_what_cannot_be_joined_has_no_number() -> None:
    third = RankLoad("DP7", 1, 0, 5.0)
    assert join_load(replace(ONSET, ranks=(*ONSET.ranks, third)), SLOW).correlation is None
    assert join_load(replace(ONSET, ranks=ONSET.ranks[:1]), SLOW).correlation is None
    same = (ONSET.ranks[0], replace(ONSET.ranks[0], rank="DP1"))
    assert join_load(replace(ONSET, ranks=same), SLOW).correlation is None
    assert pearson([1, 2, 3, 4], [1, 3, 2, 5]) == pytest.approx(0.8315, abs=1e-4)


def test_a_document_with_load_is_valid() -> None:
    document = window(SLOW)
    document["onset"] = plain(onset_document(ONSET, join_load(ONSET, SLOW)))
    samples = [
        LoadSample(t / 2, f"DP{r}", t % 9, 0, 5, source="loads")
        for t in range(3000)
        for r in (0, 1)
    ]
    document["load_samples"] = [*map(plain, load_strip(samples, "loads", 100.0, 1400.0))]
    validate(run([document]))
    for rank in document["load_samples"]:
        assert len(rank["time"]) == len(rank["running"]) == len(rank["waiting"]) == 600
        assert (rank["time"][0], rank["time"][-1]) == (100.0, 1400.0)
        assert rank["time"] == sorted(set(rank["time"]))


def test_only_the_samples_of_one_source_are_kept() -> None:
    samples = [LoadSample(1.0, "DP0", 1, 0), LoadSample(1.0, "DP0", 2, 0, source="loads")]
    assert [rank.running for rank in load_strip(samples, "log", 0.0, 2.0)] == [[1]]
    assert load_strip([], "log", 0.0, 2.0) == ()
    assert onset_document(None) is None
