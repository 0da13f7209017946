"""What a table is summed into: once for the verdict and the report, whoever asks first."""

from __future__ import annotations

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_sglprof._analysis.sums import Sums
from pytest_sglprof._analysis.sync import sync_findings
from pytest_sglprof._analysis.work import matrix_places
from pytest_sglprof._config.model import Threshold
from pytest_sglprof._verdict.judge import judge
from tests.support.passes import TWO, decoding
from tests.unit.analysis.test_alignment import ONE_HOST, late, server, window


def test_the_report_has_the_sums_of_the_verdict() -> None:
    verdict = judge(decoding(TWO), [Threshold("sync_lost_share", 0.05)])
    assert verdict.sums is not None
    assert {"waited", "groups", "synced"} <= set(vars(verdict.sums))  # the judge asked for them
    (group,) = verdict.sums.synced
    assert group.waited is verdict.sums.waited[0]
    (finding,) = sync_findings(verdict.sums)
    assert finding.cost is not None
    assert verdict.judgements[0].value == pytest.approx(finding.cost.lost)


def test_passes_that_are_renumbered_have_waits_of_their_own() -> None:
    """By order, passes of two ranks would stand side by side that are 10 ms apart."""
    sums = Sums(window(late(server(40), {"TP0 DP0": 0, "TP1 DP1": 1}), ONE_HOST))
    (group,) = sums.synced
    assert group.table is not sums.table
    (by_order,) = sums.waited
    own = group.waited
    assert own.step.min() == 1  # the pass that both ranks have
    assert own.clocks is not None and by_order.clocks is not None
    assert own.clocks.uncertainty_ns < 20_000 < 1_000_000 < by_order.clocks.uncertainty_ns


NAMES = ("DP0 TP0", "DP1 TP1", "DP2 TP2")


@given(
    rows=st.lists(st.tuples(st.integers(-1, 9), st.sampled_from([*NAMES, None])), max_size=30),
    numbers=st.lists(st.integers(0, 9), unique=True),
    ranks=st.permutations(NAMES).flatmap(lambda all_: st.integers(0, 3).map(lambda n: all_[:n])),
    is_category=st.booleans(),
)
def test_places_are_those_of_the_numbers_and_labels(
    rows: list[tuple[int, str | None]], numbers: list[int], ranks: list[str], is_category: bool
) -> None:
    frame = pd.DataFrame(
        {
            "step": pd.Series([step for step, _ in rows], dtype="int64"),
            "rank": pd.Series([rank for _, rank in rows], dtype=object),
        }
    )
    if is_category:
        frame["rank"] = frame["rank"].astype("category")
    row, column, inside = matrix_places(numbers, ranks, frame["step"], frame["rank"])
    expected = [(step in numbers and rank in ranks) for step, rank in rows]
    assert inside.tolist() == expected
    kept = [each for each, keep in zip(rows, expected, strict=True) if keep]
    assert [(numbers[r], ranks[c]) for r, c in zip(row, column, strict=True)] == kept
