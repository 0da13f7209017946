"""What a pass of ranks with different input is: its kind, its rows, what makes it comparable."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from benchmarks.dp_windows import keys_of, table_of
from pytest_sglprof._analysis.passes import Passes, is_without_peers, sync_passes
from pytest_sglprof._server.sizes import PassSettings
from pytest_sglprof._trace.table import KernelTable
from pytest_sglprof.standin.dp_model import CASES, DpWindow, make
from tests.support.passes import FOUR, GATHER, TWO, decoding

PLANS = {case.name: case.make for case in CASES}


def window(name: str, ranks: int = 4, seed: int = 1) -> DpWindow:
    return make(PLANS[name](ranks, seed, 0.02, 0.6))


def passes_of(table: KernelTable) -> Passes:
    (group,) = sync_passes(table)
    return group.passes


@pytest.mark.parametrize("name", ["a", "b", "f", "g", "h"])
def test_passes_are_those_of_the_model(name: str) -> None:
    """Kinds, rows and inputs, by the model's own arrays, which were written without this code."""
    planted = window(name)
    passes = passes_of(table_of(planted, with_counts=True))
    order = [list(keys_of(planted)[:, 0]).index(number) for number in passes.numbers]
    assert sorted(order) == list(range(len(planted.batch)))
    for field, values in (
        ("batch", planted.batch),
        ("tokens", planted.tokens),
        ("kv_tokens", planted.kv),
        ("query_keys", planted.qk),
        ("expert_tokens", planted.expert_tokens),
    ):
        assert (getattr(passes, field) == values[order]).all(), field
    # Graphs of verify passes have several rows a request; they are counted in requests.
    rows = np.where(planted.is_graph[:, None], planted.bucket, planted.rows)[order]
    assert (passes.rows == rows).all()
    draft, prefills = planted.is_draft[order, 0], (planted.kind[order] == "EXTEND").any(axis=1)
    verify = (planted.kind[order] == "VERIFY").any(axis=1)
    assert (passes.of_kind("draft") == draft).all()
    assert (passes.of_kind("verify") == verify).all()
    beside = prefills & (planted.kind[order] == "DECODE").any(axis=1)
    assert (passes.of_kind("prefill beside decode") == beside).all()
    assert (passes.of_kind("prefill") == prefills & ~beside).all()
    assert passes.pushed_out == int(beside.sum())


def test_in_the_local_regime_ranks_replay_graphs_of_their_own() -> None:
    passes = passes_of(table_of(window("f")))
    assert not passes.has_same_rows.any()
    gathered = passes_of(table_of(window("a")))
    assert gathered.has_same_rows.all()


def test_without_settings_only_equal_batches_have_the_same_rows() -> None:
    different = table_of(window("a"), has_settings=False)
    assert not passes_of(different).has_same_rows.any()
    equal = passes_of(table_of(window("b"), has_settings=False))
    assert equal.has_same_rows.all()


def test_a_batch_beyond_every_graph_runs_without_one() -> None:
    settings = replace(GATHER, capture_sizes=(8, 16))
    table = decoding(TWO, batch=lambda rank, number: 20 if number % 2 else 8, settings=settings)
    table = replace(table, steps=table.steps.assign(graph_share=-1.0))
    assert passes_of(table).counts == {"decode": 40, "eager decode": 40}


def test_nsys_reports_do_not_say_what_ranks_do_but_graphs_of_one_batch_are_the_same() -> None:
    table = decoding(TWO)
    blank = table.steps.assign(batch_size=-1, tokens=-1, stage="unknown", substage="")
    blank["graph_share"] = 1.0
    passes = passes_of(replace(table, steps=blank))
    assert passes.counts == {"unknown": 80}
    assert passes.has_same_rows.all()
    local = PassSettings(regime="local", capture_sizes=(8,), graphs=True)
    assert not passes_of(replace(table, steps=blank, settings=local)).has_same_rows.any()


def test_a_pass_that_a_rank_lacks_is_dropped_on_all() -> None:
    table = decoding(TWO, passes={TWO[0]: 80, TWO[1]: 79}, first={TWO[1]: 1})
    passes = passes_of(table)
    assert (len(passes.numbers), passes.missing) == (79, 1)
    assert passes.numbers[0] == 1


def test_kernels_that_a_rank_calls_more_often_are_named_and_not_compared() -> None:
    table = decoding(TWO)
    rows = table.frame
    extra = rows[(rows["rank"] == TWO[1]) & (rows["name"] == "rms_norm")]
    shifted = extra.assign(start_ns=extra["start_ns"] + 1_500_000, dur_ns=1000)
    (group,) = sync_passes(replace(table, frame=pd.concat([rows, shifted], ignore_index=True)))
    assert group.same_work.steps.numbers == ()
    assert group.differing == (("rms_norm", (1.0, 2.0)),)


def test_who_has_a_peer() -> None:
    assert is_without_peers(decoding(TWO))
    assert not is_without_peers(decoding(FOUR))
