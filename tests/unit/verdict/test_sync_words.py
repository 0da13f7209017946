"""What is said of ranks with different input, and what is left unsaid."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import pandas as pd
import pytest

from pytest_sglprof._analysis.load_split import CategorySplit, Part
from pytest_sglprof._analysis.sync import DifferentCalls, RankSplit, SyncCost, SyncFinding
from pytest_sglprof._analysis.sync_words import HeadWait, HotExpert, hot_experts, sentence_of
from pytest_sglprof._ranks import short_labels
from pytest_sglprof._verdict.sync import cost_words, heads_words, sync_lines

NOTHING = Part(0.0, (0.0, 0.0))
ATTENTION = CategorySplit(
    category="attention",
    kind="decode",
    passes=100,
    driver="KV tokens",
    ratio=1.6,
    difference_ns=94_000.0,
    load=Part(94_000.0, (90_000.0, 98_000.0)),
    speed=NOTHING,
    rest=NOTHING,
)
COST = SyncCost(
    waiting=0.15, idle=0.03, padding=0.0, padded_rows=0.0, lost=0.18, interval=None, wall_ns=10**9
)


def rank(name: str = "DP3 TP3", **changed: Any) -> RankSplit:
    """A rank that computes 100 µs longer, 94 ± 4 of them by its load."""
    values: dict[str, Any] = {
        "rank": name,
        "difference_ns": 100_000.0,
        "load": Part(94_000.0, (90_000.0, 98_000.0)),
        "speed": NOTHING,
        "rest": NOTHING,
        "unknown_ns": 0.0,
        "load_share": Part(0.94, (0.90, 0.98)),
        "speed_ratio": 1.004,
        "speed_interval": (0.995, 1.012),
        "waits_for": 0.9,
        "slower_in": (),
        "categories": (ATTENTION,),
    }
    return RankSplit(**values | changed)


def finding(*ranks: RankSplit, **changed: Any) -> SyncFinding:
    values: dict[str, Any] = {
        "group": "",
        "kinds": {"decode": 100},
        "missing": 0,
        "pushed_out": 0,
        "regime": "gather",
        "same_work": 100,
        "cost": COST,
        "latest": ranks[0].rank if ranks else None,
        "ranks": ranks,
        "differing": (),
        "hot": None,
        "sentence": "",
        "reason": "",
    }
    return SyncFinding(**values | changed)


def said(*ranks: RankSplit, **changed: Any) -> str:
    return sentence_of(finding(*(ranks or (rank(),)), **changed))


def test_the_sentence_names_rank_driver_remedy_and_speed() -> None:
    assert said() == (
        "18.0 % of GPU time waits, most of it for DP3; load (Σ KV 1.60x) explains 94 ± 4 % of its "
        "longer compute (see SGLang's --load-balance-method total_tokens); as fast as its peers "
        "at the same work (1.00x)"
    )


@pytest.mark.parametrize(
    ("share", "words"),
    [
        (Part(-0.13, (-0.15, -0.11)), "its load is no greater"),
        (Part(0.05, (-0.05, 0.15)), "its load is no greater"),
        (Part(0.12, (0.10, 0.14)), "load explains 12 ± 2 % of its longer compute"),
    ],
)
def test_a_load_that_explains_nothing_is_not_named(share: Part, words: str) -> None:
    sentence = said(rank(load_share=share))
    assert words in sentence.split("; ")
    assert "Σ KV" not in sentence
    assert "-13" not in sentence


def test_of_a_difference_that_is_not_certain_no_share_is_named() -> None:
    sentence = said(rank(load_share=None))
    assert "load makes +94 ± 4 µs a pass of its compute" in sentence
    assert "explains" not in sentence
    unclear = rank(load_share=None, load=Part(2_000.0, (-3_000.0, 7_000.0)))
    assert "its load is no greater" in said(unclear)


def test_what_is_not_known_is_named_together_by_its_reason() -> None:
    lines = tuple(
        msgspec.structs.replace(
            ATTENTION, category=name, load=None, speed=None, rest=None,
            difference_ns=ns, reason=reason,
        )
        for name, ns, reason in (
            ("moe", 30_000.0, "not recorded"),
            ("attention", 50_000.0, "not recorded"),
            ("sampling", 100.0, "not recorded"),
            ("other", 20_000.0, "nothing prices it"),
        )
    )  # fmt: skip
    unknown = rank(
        load_share=Part(-0.1, (-0.2, -0.05)), unknown_ns=100_100.0, categories=(*lines, ATTENTION)
    )
    sentence = said(unknown)
    assert "80 µs a pass in attention and moe are not explained: not recorded" in sentence
    assert "20 µs a pass in other are not explained: nothing prices it" in sentence
    assert "sampling" not in sentence
    assert "load" not in sentence  # of the known part alone it would say too much


@pytest.mark.parametrize(
    ("ratio", "interval", "slower_in", "words"),
    [
        (1.10, (1.09, 1.11), ("gemm",), "takes 1.10x as long, in gemm alone (a kernel rather"),
        (1.10, (1.09, 1.11), ("gemm", "norm"), "as long, in gemm and norm (the GPU itself)"),
        (1.03, (0.95, 1.11), (), "takes 1.03x as long (may be 0.95 to 1.11)"),
        (0.95, (0.94, 0.96), (), "at the same work it takes 0.95x as long"),
        (1.00, (0.99, 1.01), (), "as fast as its peers at the same work (1.00x)"),
        (1.01, (1.005, 1.015), (), "as fast as its peers at the same work (1.01x)"),
    ],
)
def test_the_speed_is_said_as_it_is_known(
    ratio: float, interval: tuple[float, float], slower_in: tuple[str, ...], words: str
) -> None:
    sentence = said(rank(speed_ratio=ratio, speed_interval=interval, slower_in=slower_in))
    assert words in sentence


def test_an_unknown_speed_is_not_spoken_of() -> None:
    assert "same work" not in said(rank(speed_ratio=None, speed_interval=None))


def test_the_hot_expert_is_named_where_experts_are_the_load() -> None:
    hot = HotExpert(layer=12, expert=7, share=0.31, times=79.4)
    moe = msgspec.structs.replace(ATTENTION, category="moe", driver="expert tokens", ratio=1.59)
    assert (
        "load (expert tokens 1.59x) explains 94 ± 4 % of its longer compute: layer 12 expert 7 "
        "gets 31 % of the tokens of its layer, 79.4 times the mean (see SGLang's --enable-eplb)"
    ) in said(rank(categories=(moe,)), hot=hot)
    assert "expert 7" not in said(hot=hot)


@pytest.mark.parametrize(
    ("calls", "words"),
    [
        ((16.0, 32.0), "DP1 runs 32 sqrt calls a pass, its peers 16"),
        ((16.0, 32.0, 16.0), "DP1 runs 32 sqrt calls a pass, its peers 16"),
        ((16.0, 4.0, 16.5), "DP1 runs 4 sqrt calls a pass, its peers 16 to 16.5"),
    ],
)
def test_kernels_that_ranks_call_differently_often(calls: tuple[float, ...], words: str) -> None:
    ranks = [rank(f"DP{at} TP{at}") for at in range(len(calls))]
    assert words in said(*ranks, differing=(DifferentCalls(kernel="sqrt", calls=calls),))


def test_the_cost_says_whom_it_waits_for_and_what_padding_takes() -> None:
    assert "waits, most often for DP3 (31 % of it)" in said(rank(waits_for=0.31))
    assert "waits; DP3 computes longest" in said(rank(waits_for=None))
    assert said(cost=None).startswith("DP3 computes longest; load")
    padded = msgspec.structs.replace(COST, padding=0.04)
    assert "waits, most of it for DP3, 4.0 % computes rows of padding" in said(cost=padded)
    assert "14 of 100 passes ranks decode without a graph" in said(pushed_out=14)
    assert "graph" not in said(pushed_out=5)


def test_a_part_of_the_cost_that_is_not_known_says_so() -> None:
    unknown = msgspec.structs.replace(COST, padding=None, interval=(0.17, 0.19))
    assert cost_words(unknown) == (
        "18.0 % of GPU time (17.0 to 19.0 %): waiting in collectives 15.0 %, idle at the head of a "
        "pass 3.0 %, padding not known"
    )
    assert cost_words(None).startswith("not known: ")


def test_the_table_shows_eight_ranks_and_counts_the_others() -> None:
    shares = np.random.default_rng(1).permutation(64) / 64
    ranks = [rank(f"DP{at} TP{at}", waits_for=float(share)) for at, share in enumerate(shares)]
    lines = sync_lines(finding(*ranks))
    shown = [line.split()[0] for line in lines if line.startswith("DP")]
    assert shown == [f"DP{at}" for at in np.argsort(-shares)[:8]]
    assert lines[-1] == "and 56 ranks more, for which the others wait less"
    assert max(map(len, lines[3:])) < 110


def test_the_table_does_not_show_what_is_not_known_as_0() -> None:
    unknown = msgspec.structs.replace(ATTENTION, load=None, speed=None, rest=None)
    line = sync_lines(finding(rank(load=NOTHING, categories=(unknown,), speed_ratio=None)))[-1]
    assert line.split() == ["DP3", "+100", "-", "-", "-", "0", "not", "known", "90", "%"]


def test_without_passes_only_the_reason_is_said() -> None:
    lines = sync_lines(finding(group="PP1", reason="no pass was recorded on all of DP0, DP1"))
    assert lines == [
        "PP1: ranks with different input are not compared: no pass was recorded on all of DP0, DP1"
    ]


@pytest.mark.parametrize(
    ("labels", "short"),
    [
        (["DP0 TP0 EP0", "DP1 TP1 EP1"], ["DP0", "DP1"]),
        (["DP0 TP0", "DP0 TP1", "DP1 TP2"], ["DP0 TP0", "DP0 TP1", "DP1 TP2"]),
        (["DP0 PP1 TP0", "DP1 PP1 TP1"], ["DP0 PP1 TP0", "DP1 PP1 TP1"]),
        (["one", "two"], ["one", "two"]),
        ([], []),
    ],
)
def test_short_labels(labels: list[str], short: list[str]) -> None:
    assert short_labels(labels) == dict(zip(labels, short, strict=True))


def experts(tokens: np.ndarray, ranks: list[str], step: int = 5) -> pd.DataFrame:
    """Counts of shape (layers, experts); ranks: of each expert."""
    layer, expert = (axis.ravel() for axis in np.indices(tokens.shape))
    return pd.DataFrame(
        {
            "rank": pd.Categorical([ranks[at] for at in expert], ["a", "b"]),
            "step": step,
            "layer": layer,
            "expert": expert,
            "tokens": tokens.ravel(),
        }
    )


RANKS_OF_EXPERTS = ["a"] * 4 + ["b"] * 4


def test_an_expert_is_hot_from_three_times_the_mean_of_its_layer_on() -> None:
    tokens = np.full((2, 8), 100)
    tokens[1, 6] = 420  # of 1120, whose mean is 140
    (hot,) = hot_experts(experts(tokens, RANKS_OF_EXPERTS), np.array([5]))
    assert hot == HotExpert(layer=1, expert=6, share=420 / 1120, times=420 / 140, rank="b")
    tokens[1, 6] = 415
    assert hot_experts(experts(tokens, RANKS_OF_EXPERTS), np.array([5])) == ()


def test_the_hottest_expert_of_any_rank_is_the_first() -> None:
    tokens = np.full((3, 8), 100)
    tokens[0, 1], tokens[2, 7] = 500, 900
    hot = hot_experts(experts(tokens, RANKS_OF_EXPERTS), np.array([5]))
    assert [(each.layer, each.expert, each.rank) for each in hot] == [(2, 7, "b"), (0, 1, "a")]


def test_only_counts_of_the_passes_or_totals_make_an_expert_hot() -> None:
    tokens = np.full((1, 8), 100)
    tokens[0, 6] = 900
    assert hot_experts(experts(tokens, RANKS_OF_EXPERTS), np.array([4])) == ()
    (hot,) = hot_experts(experts(tokens, RANKS_OF_EXPERTS, step=-1), np.array([4]))
    assert hot.expert == 6


def test_an_expert_with_copies_on_two_ranks_is_no_single_ranks() -> None:
    tokens = np.full((1, 8), 100)
    tokens[0, 6] = 900
    both = pd.concat(
        [experts(tokens, RANKS_OF_EXPERTS), experts(tokens, RANKS_OF_EXPERTS[::-1])]
    )  # fmt: skip
    assert hot_experts(both, np.array([5])) == ()


def head(name: str = "DP0 TP0", **changed: Any) -> HeadWait:
    """A pass of 4 ms, of which the GPU idles for 400 µs and its scheduler waits as long."""
    values: dict[str, Any] = {
        "rank": name, "idle_ns": 400e3, "wall_ns": 4e6, "passes": 99, "waited_ns": 400e3,
        "waited_passes": 240, "long_waits": 0,
    }  # fmt: skip
    return HeadWait(**values | changed)


@pytest.mark.parametrize(
    ("changed", "disagrees"),
    [
        ({}, False),
        ({"waited_ns": 590e3}, False),
        ({"waited_ns": 610e3}, True),
        ({"idle_ns": 610e3}, True),
        ({"idle_ns": 0.0}, True),
        ({"idle_ns": 190e3, "waited_ns": 0.0}, False),  # both below 5 % of the wall
        ({"idle_ns": 210e3, "waited_ns": 0.0}, True),
        ({"waited_ns": 9e6, "long_waits": 1}, False),  # behind the export of a trace
    ],
)
def test_measures_that_differ_by_more_than_half_are_said_to(
    changed: dict[str, Any], disagrees: bool
) -> None:
    heads = (head(**changed), head("DP1 TP1"))
    assert heads[0].disagrees == disagrees
    assert ("SGLang's measure" in said(heads=heads)) == disagrees


def test_the_rank_is_named_whose_measures_differ_most() -> None:
    heads = (head(waited_ns=700e3), head("DP1 TP1", waited_ns=50e3), head("DP2 TP2"))
    assert said(heads=heads).endswith(
        "; the GPU of DP1 idles beside busy peers for 400 µs a pass (mean of 99 traced ones), but "
        "its scheduler waits for peers only 50 µs (SGLang's measure, mean of 240): the rest is its "
        "own launching, or not in these passes"
    )
    heads = (head(waited_ns=900e3), *heads[1:])
    assert "; the scheduler of DP0 waits for peers 900 µs (SGLang's measure" in said(heads=heads)


def test_both_measures_are_shown() -> None:
    heads = (head(), head("DP1 TP1", idle_ns=3e3, waited_ns=9e6, long_waits=2))
    (line,) = (each for each in sync_lines(finding(rank(), heads=heads)) if "idles" in each)
    assert line == (
        "before a pass, µs: DP1 idles 3, its scheduler waits 9,000 (2 waits above 0.1 s); "
        "DP0 idles 400, its scheduler waits 400 (means of 99 traced passes, and of 240 by SGLang's "
        "own measure)"
    )
    many = tuple(head(f"DP{n} TP{n}", waited_ns=1e5 * n) for n in range(64))
    assert heads_words(many).count("its scheduler waits") == 8
    assert "; 56 others less (means" in heads_words(many)
    assert not any("idles" in each for each in sync_lines(finding(rank())))
