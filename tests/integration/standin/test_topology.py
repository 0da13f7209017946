"""Names of ranks, as real servers give them."""

from __future__ import annotations

import pytest

from pytest_sglprof._ranks import Rank
from pytest_sglprof.standin.model import Place, Sizes, places, stage_peers


def names(sizes: Sizes) -> list[tuple[str, str, str]]:
    return [(p.title, p.label, p.file_part) for p in places(sizes)]


def test_names_leave_out_sizes_of_one() -> None:
    assert names(Sizes()) == [("sglang::scheduler", "TP0", "TP-0")]
    assert names(Sizes(tp=2)) == [
        ("sglang::scheduler_TP0", "TP0", "TP-0"),
        ("sglang::scheduler_TP1", "TP1", "TP-1"),
    ]
    assert names(Sizes(dp=2)) == [
        ("sglang::scheduler_DP0", "DP0", "TP-0-DP-0"),
        ("sglang::scheduler_DP1", "DP1", "TP-0-DP-1"),
    ]
    assert names(Sizes(tp=2, ep=2))[1] == ("sglang::scheduler_TP1_EP1", "TP1 EP1", "TP-1-EP-1")
    attention = names(Sizes(tp=2, dp=2, dp_attention=True))
    assert [file for _, _, file in attention] == ["TP-0-DP-0", "TP-1-DP-1"]


@pytest.mark.parametrize(
    "sizes",
    [
        Sizes(),
        Sizes(tp=2),
        Sizes(tp=2, dp=2),
        Sizes(tp=4, dp=2, dp_attention=True),
        Sizes(tp=4, ep=2),
        Sizes(tp=2, pp=2),
        Sizes(tp=2, dp=3, pp=2, ep=2),
    ],
)
def test_title_and_file_name_tell_the_same_rank(sizes: Sizes) -> None:
    found = places(sizes)
    assert len({p.file_part for p in found}) == len(found) == len({p.title for p in found})
    assert len({p.gpu for p in found}) == len(found)
    for place in found:
        by_file = Rank.from_file_name(f"TP-9-x-{place.file_part}.trace.json.gz")
        by_title = Rank.from_process_title(place.title)
        assert by_file is not None
        assert by_title is not None
        assert by_file.matches(by_title)


def test_only_the_first_rank_of_a_batch_logs_batches() -> None:
    def loggers(sizes: Sizes) -> list[str]:
        return [place.label for place in places(sizes) if place.logs_batches]

    assert loggers(Sizes(tp=4)) == ["TP0"]
    assert loggers(Sizes(tp=2, dp=2)) == ["DP0 TP0", "DP1 TP0"]
    assert loggers(Sizes(tp=4, dp=2, dp_attention=True)) == ["DP0 TP0", "DP1 TP2"]


def test_peers_share_replica_and_stage() -> None:
    everyone = places(Sizes(tp=2, dp=2, pp=2))

    def label(place: Place) -> str:
        return place.label

    assert [*map(label, stage_peers(everyone[3], everyone))] == ["DP0 PP1 TP0", "DP0 PP1 TP1"]
