"""What the log told, joined to steps."""

from __future__ import annotations

import pandas as pd

from pytest_sglprof._analysis.groups import compared_steps, step_spans
from pytest_sglprof._server.log_lines import AcceptLength, ServerFacts
from pytest_sglprof._trace.steps import with_server_facts, with_settings
from pytest_sglprof._trace.table import KernelTable, PassSettings, Step
from tests.support.kernel_tables import from_rows

UNIX = 1_795_491_584


def table(base: int = UNIX, ranks: tuple[str, ...] = ("TP0", "TP1")) -> KernelTable:
    """Eight steps of half a second, from second 0 on."""
    steps = [
        (rank, Step(n, "decode", base * 10**9 + n * 500_000_000,
                    base * 10**9 + n * 500_000_000 + 400_000_000, substage=word))
        for rank in ranks for n, word in enumerate(["VERIFY", "DRAFT"] * 4)
    ]  # fmt: skip
    return from_rows([], steps=steps, ranks=ranks)


def test_steps_inside_a_rebalance_are_excluded_on_all_ranks() -> None:
    facts = ServerFacts(rebalances=((UNIX + 1.2, UNIX + 2.1),))
    found = with_server_facts(table(), facts)
    marks = found.steps[found.steps["rank"] == "TP1"]["excluded"].tolist()
    assert marks == ["", "", "eplb rebalance", "eplb rebalance", "eplb rebalance", "", "", ""]
    assert found.notes == ("a rebalance of experts during the window: 3 steps excluded",)
    none = pd.DataFrame({"rank": [], "step": [], "count": []})
    assert compared_steps(step_spans(found), none, found.ranks).excluded == 3


def test_on_another_clock_nothing_is_compared() -> None:
    found = with_server_facts(table(base=5), ServerFacts(rebalances=((UNIX, UNIX + 1.0),)))
    assert set(found.steps["excluded"]) == {"eplb rebalance"}
    assert "their clock is not that of the log" in found.notes[0]


def test_a_rebalance_outside_of_the_steps_changes_nothing() -> None:
    found = with_server_facts(table(), ServerFacts(rebalances=((UNIX - 9.0, UNIX - 8.0),)))
    assert (set(found.steps["excluded"]), found.notes) == ({""}, ())


def test_accept_lengths_belong_to_the_verify_steps_before_their_line() -> None:
    accepted = (AcceptLength(UNIX + 1.5, None, 2.5), AcceptLength(UNIX + 2.5, None, 3.5))
    found = with_server_facts(table(), ServerFacts(accepted=accepted))
    lengths = found.steps[found.steps["rank"] == "TP0"]["accept_length"].tolist()
    assert lengths == [2.5, -1, 2.5, -1, 3.5, -1, -1, -1]


def test_each_replica_has_its_own_accept_length() -> None:
    ranks = ("DP0 TP0", "DP1 TP0")
    accepted = (AcceptLength(UNIX + 9.0, 0, 2.0), AcceptLength(UNIX + 9.0, 1, 4.0))
    found = with_server_facts(table(ranks=ranks), ServerFacts(accepted=accepted))
    by_rank = found.steps[found.steps["substage"] == "VERIFY"].groupby("rank", observed=True)
    assert {k: set(v) for k, v in by_rank["accept_length"]} == {ranks[0]: {2.0}, ranks[1]: {4.0}}


def test_a_replayed_decode_step_was_padded_to_the_next_graph() -> None:
    cases = [(5, 0.9, "decode", 8), (8, 0.9, "decode", 8), (9, 0.9, "decode", -1),
             (5, 0.1, "decode", -1), (5, -1.0, "decode", -1), (5, 0.9, "prefill", -1),
             (-1, 0.9, "decode", -1)]  # fmt: skip
    steps = [
        ("TP0", Step(n, stage, n * 10, n * 10 + 9, batch_size=size, graph_share=share))
        for n, (size, share, stage, _) in enumerate(cases)
    ]
    before = from_rows([], steps=steps, ranks=("TP0",))
    settings = PassSettings(capture_sizes=(1, 2, 4, 8))
    found = with_settings(before, settings)
    assert found.settings == settings
    assert found.steps["padded_batch"].tolist() == [padded for *_, padded in cases]


def test_nothing_told_is_nothing_changed() -> None:
    before = table()
    assert with_server_facts(before, ServerFacts()) is before
