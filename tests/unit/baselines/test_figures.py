"""One number of each life for a figure, on equal work only."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from msgspec.structs import replace

from pytest_sglprof._analysis.strata import StepWork
from pytest_sglprof._baselines.figures import (
    Figure,
    describe,
    kernel_matrix,
    life_values,
    why_load_does_not_count,
)
from tests.support.lives import DECODE, KERNELS, group, kind, life, load

WIDE = StepWork("decode", "", 8, 10, -1)
PREFILL = StepWork("prefill", "", 1, -1, 10)


@pytest.mark.parametrize(
    ("figure", "value"),
    [
        (Figure("compute"), 800_000.0),
        (Figure("all"), 880_000.0),
        (Figure("communication"), 50_000.0),  # the transfer, not the kernels that wait
        (Figure("moe"), 500_000.0),
        (Figure("attention"), 0.0),
        (Figure("compute", kernel="^fused|reduce$"), 580_000.0),
        (Figure("pass_wall"), 1_000_000.0),
        (Figure("idle_share"), 0.12),
        (Figure("ttft_p99"), 250.0),
        (Figure("output_throughput"), 1500.0),
        (Figure("itl_mean"), None),  # the driver did not measure it
    ],
)
def test_a_figure_of_a_life(figure: Figure, value: float | None) -> None:
    assert life_values([life()], figure) == [value if value is None else pytest.approx(value)]


def test_kinds_that_all_lives_have_weigh_equally() -> None:
    """Ten times as many steps of one kind are no reason; nor is a kind that one life lacks."""
    small, large = kind((100.0, 200.0, 1.0)), kind((1000.0, 2000.0, 1.0), WIDE, steps=500)
    prefill = kind((9e9, 9e9, 9e9), PREFILL)
    lives = [life(group(small, large)), life(group(large, small, prefill))]
    assert life_values(lives, Figure("compute")) == [1650.0, 1650.0]
    assert life_values([lives[0], life(group(small))], Figure("compute")) == [300.0, 300.0]


def test_no_life_has_no_value() -> None:
    assert life_values([], Figure("compute")) == []
    assert life_values([], Figure("idle_share")) == []


def test_a_stage_alone() -> None:
    lives = [life(group(kind(), kind((7.0, 8.0, 9.0), PREFILL)))] * 2
    assert life_values(lives, Figure("compute", stage="prefill")) == [15.0, 15.0]
    assert life_values(lives, Figure("compute", stage="mixed")) == (
        f"life {lives[0].id} has no kind of mixed step with enough steps"
    )


def test_other_work_is_not_compared_and_both_are_named() -> None:
    first, second = life(), life(group(kind(work=WIDE)))
    assert life_values([first, second], Figure("compute")) == (
        "no kind of step is in all lives: decode of 8 requests, 1024 to 2047 KV tokens each in "
        f"life {second.id}, decode of 4 requests, 1024 to 2047 KV tokens each in those before it"
    )


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"ranks": ("TP0",)}, "other ranks: TP0, TP1 in life {0}, TP0 in life {1}"),
        ({"assigned_share": 0.4}, "less than half of the compute of life {1} lies in known steps"),
        (
            {"steps": None, "calls": (1.0, 1.0, 1.0)},
            "the traces of life {1} have no steps, those of {0} do",
        ),
    ],
)
def test_groups_that_cannot_be_compared(changes: dict[str, Any], words: str) -> None:
    lives = [life(), life(group(**changes))]
    expected = words.format(*(each.id for each in lives))
    assert life_values(lives, Figure("compute")) == expected
    assert kernel_matrix(lives) == expected


def test_a_life_that_is_kept_apart_is_compared_with_nothing() -> None:
    compiled = life(apart="a kernel was compiled inside of the window")
    assert life_values([life(), compiled], Figure("compute")) == (
        f"life {compiled.id} is kept apart: a kernel was compiled inside of the window"
    )


def test_what_a_life_lacks_is_none() -> None:
    lives = [life(), life(group(kind(transfer_ns=None, wall_ns=None, idle_ns=None)), load=None)]
    for name in ("communication", "pass_wall", "idle_share", "ttft_p99"):
        values = life_values(lives, Figure(name))
        assert values[0] is not None
        assert values[1] is None


def test_idle_share_is_of_all_time() -> None:
    """A mean of shares would be 0.3."""
    kinds = kind(wall_ns=100.0, idle_ns=50.0), kind(work=WIDE, wall_ns=900.0, idle_ns=90.0)
    (value,) = life_values([life(group(*kinds))], Figure("idle_share"))
    assert value == pytest.approx(140 / 1000)


def test_drafts_have_no_wall_of_their_own() -> None:
    """It is that of the iteration, which is called by its pass of the target model."""
    draft = kind(work=StepWork("decode", "DRAFT", 4, 10, -1), wall_ns=None, idle_ns=None)
    lives = [life(group(kind(), draft)), life(group(draft, kind(wall_ns=2e6)))]
    assert life_values(lives, Figure("pass_wall")) == [1e6, 2e6]
    assert life_values(lives, Figure("idle_share")) == [0.12, 0.06]
    only = [life(group(draft)), life(group(draft))]
    assert life_values(only, Figure("pass_wall")) == [None, None]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"driven": "unlimited"}, "as fast as possible"),
        ({"completed": 93}, "7 of 100 requests did not complete"),
        ({"queue_grows": True}, "waited longer and longer"),
    ],
)
def test_loads_that_do_not_count(changes: dict[str, Any], words: str) -> None:
    other = load(**changes)
    assert words in why_load_does_not_count(other)
    assert life_values([life(), life(load=other)], Figure("ttft_p99")) == [250.0, None]
    assert why_load_does_not_count(load(driven="concurrency")) == ""


def test_kernels_of_lives() -> None:
    before = life(group(kind((100.0, 200.0, 9.0), calls=(1, 2, 3)), kind((300.0, 0.0, 9.0), WIDE)))
    kernels = (("gemm", "gemm_bf16"), ("moe", "fast_moe"), ("communication", "all_reduce"))
    strata = [kind((100.0, 150.0, 9.0), work, kernels=kernels) for work in (DECODE, WIDE)]
    now = life(group(*strata, kernels=kernels))
    found = kernel_matrix([before, now])
    assert not isinstance(found, str)
    assert found.names == (("gemm", "gemm_bf16"), ("moe", "fused_moe"), ("moe", "fast_moe"))
    assert found.ns.tolist() == [[200.0, 100.0, 0.0], [100.0, 0.0, 150.0]]
    assert found.calls.tolist() == [[5.5, 6.0, 0.0], [10.0, 0.0, 10.0]]
    everything = kernel_matrix([before, now], with_communication=True)
    assert not isinstance(everything, str)
    assert ("communication", "all_reduce") in everything.names


def test_a_kernel_beyond_the_list_is_not_known() -> None:
    short = group(kind((300.0,), kernels=KERNELS[:1]), kernels=KERNELS[:1])
    found = kernel_matrix([life(), life(replace(short, left_out_kernels=7)), life(short)])
    assert not isinstance(found, str)
    at = found.names.index(("moe", "fused_moe"))
    assert found.ns[0, at] == 500_000.0
    assert math.isnan(found.ns[1, at])
    assert found.ns[2, at] == 0.0
    cut = life(replace(short, left_out_kernels=7))
    assert life_values([cut], Figure("compute", kernel="fused")) == [None]
    assert life_values([life(short)], Figure("compute", kernel="fused")) == [0]


def test_a_kernel_that_changed_its_category_is_one() -> None:
    moved = (("gemm", "gemm_bf16"), ("other", "fused_moe"), ("communication", "all_reduce"))
    found = kernel_matrix([life(), life(group(kind(kernels=moved), kernels=moved))])
    assert not isinstance(found, str)
    assert found.names == (("gemm", "gemm_bf16"), ("other", "fused_moe"))
    assert found.ns[0].tolist() == found.ns[1].tolist()


# Without steps.

WINDOW = StepWork("", "", -1, -1, -1)


def by_call(calls: tuple[float, ...], per_call: tuple[float, ...], **changes: Any) -> Any:
    ns = tuple(c * each for c, each in zip(calls, per_call, strict=True))
    whole = kind(ns, WINDOW, steps=1, transfer_ns=None, wall_ns=None, idle_ns=None)
    return life(group(replace(whole, calls=None), steps=None, calls=calls, **changes))


def test_without_steps_equal_numbers_of_calls_are_compared() -> None:
    """A window twice as long holds twice the calls, and its compute is no regression."""
    lives = [by_call((10, 20, 5), (100.0, 50.0, 9.0)), by_call((20, 40, 10), (100.0, 55.0, 9.0))]
    values = life_values(lives, Figure("compute"))
    assert values == [pytest.approx(15 * 100 + 30 * 50), pytest.approx(15 * 100 + 30 * 55)]
    assert life_values(lives, Figure("compute", kernel="moe")) == [1500.0, 1650.0]
    assert life_values(lives, Figure("pass_wall")) == [None, None]
    found = kernel_matrix(lives)
    assert not isinstance(found, str)
    assert np.allclose(found.ns, [[1500.0, 1500.0], [1500.0, 1650.0]])
    assert np.allclose(found.calls, [[15, 30], [15, 30]])


def test_without_steps_and_common_kernels_nothing_is_compared() -> None:
    other = (("gemm", "gemm_bf16"), ("moe", "other_moe"), ("communication", "all_reduce"))
    ns = (100.0, 5_000.0, 1.0)
    whole = replace(kind(ns, WINDOW, steps=1, kernels=other), calls=None)
    now = life(group(whole, kernels=other, steps=None, calls=(1.0, 1.0, 1.0)))
    values = life_values([by_call((1, 1, 1), (100.0, 50.0, 1.0)), now], Figure("compute"))
    share = "less than half of the compute of life {} is in kernels that all lives have"
    first = by_call((1, 1, 1), (100.0, 50.0, 1.0))
    assert values == share.format(now.id)
    assert life_values([first], Figure("compute", stage="decode")) == (
        f"the traces of life {first.id} have no steps, so none are decode steps"
    )


def test_work_in_words() -> None:
    assert describe(DECODE) == "decode of 4 requests, 1024 to 2047 KV tokens each"
    assert describe(PREFILL) == "prefill of 1 request, 1024 to 2047 new tokens"
    assert describe(WINDOW) == "the whole window"
