from __future__ import annotations

import pytest

from pytest_sglprof._analysis.groups import RankGroup, work_groups
from pytest_sglprof._ranks import work_group


@pytest.mark.parametrize(
    ("labels", "groups"),
    [
        (["TP0", "TP1"], [("", ("TP0", "TP1"))]),
        (
            ["DP0 TP0", "DP0 TP1", "DP1 TP0", "DP1 TP1"],
            [("DP0", ("DP0 TP0", "DP0 TP1")), ("DP1", ("DP1 TP0", "DP1 TP1"))],
        ),
        # Data-parallel attention: every rank has requests of its own, nobody has a peer.
        (["DP0 TP0", "DP1 TP1"], [("DP0", ("DP0 TP0",)), ("DP1", ("DP1 TP1",))]),
        (["PP0 TP0", "PP1 TP0"], [("PP0", ("PP0 TP0",)), ("PP1", ("PP1 TP0",))]),
        (["TP0 EP0", "TP1 EP1"], [("", ("TP0 EP0", "TP1 EP1"))]),
        (["GPU0", "GPU1"], [("", ("GPU0", "GPU1"))]),
        (
            ["ATTN_CP0 TP0", "ATTN_CP1 TP0"],
            [("ATTN_CP0", ("ATTN_CP0 TP0",)), ("ATTN_CP1", ("ATTN_CP1 TP0",))],
        ),
        # A size of 1 that only one source writes does not split the group.
        (["DP0 TP0", "TP1"], [("", ("DP0 TP0", "TP1"))]),
        (["host3", "host4", "TP0"], [("unnamed", ("host3", "host4")), ("DP0", ("TP0",))]),
        ([], []),
    ],
)
def test_ranks_with_identical_input_form_a_group(
    labels: list[str], groups: list[tuple[str, tuple[str, ...]]]
) -> None:
    assert work_groups(labels) == tuple(RankGroup(name, ranks) for name, ranks in groups)


def test_an_absent_dimension_is_one_of_size_1() -> None:
    assert work_group("TP0") == work_group("DP0 PP0 TP1") == work_group("PP0 TP3 EP1")
    assert work_group("TP0") != work_group("DP1 TP0") != work_group("PP1 TP0")
    assert work_group("pid 4711") is None
