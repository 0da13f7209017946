"""The model behind the stand-in's traces: its truth can be known."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from dataclasses import replace
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import pytest

from pytest_sglprof._trace.categories import category
from pytest_sglprof.standin.model import (
    EVERY_RANK,
    FILL,
    IDLE,
    JITTER,
    LEAD,
    Batch,
    Launch,
    Model,
    Sizes,
    Slow,
    places,
)
from pytest_sglprof.standin.noise import LifeNoise, StepNoise

STEP_NS = 10_000_000
DECODE = Batch("DECODE", 8, 8, 800)
PREFILL = Batch("EXTEND", 4, 1024, 1024)
COMPUTE = ("attention", "gemm", "moe", "norm", "activation", "sampling", "elementwise")


def totals(model: Model, sizes: Sizes, batches: list[Batch], steps: int) -> Counter[str]:
    found: Counter[str] = Counter()
    for step in range(1, steps + 1):
        for index, launches in model.step(step, places(sizes), batches).items():
            for launch in launches:
                found[f"{index} {launch.kernel.category}"] += launch.dur_ns
    return found


def ends(launches: list[Launch]) -> list[int]:
    return [launch.start_ns + launch.dur_ns for launch in launches]


def test_a_slowed_category_takes_exactly_the_factor_and_nothing_else_changes() -> None:
    model = Model(STEP_NS, slow=(Slow("TP1", "moe", 1.4),))
    found = totals(model, Sizes(tp=2), [DECODE], 50)
    assert found["1 moe"] / found["0 moe"] == pytest.approx(1.4, rel=0.005)
    for name in ("attention", "gemm", "norm", "activation", "sampling", "elementwise", "memory"):
        assert found[f"1 {name}"] / found[f"0 {name}"] == pytest.approx(1, rel=0.005)


def test_the_jitter_of_a_kernel_is_small_and_does_not_bias_the_total() -> None:
    sizes = Sizes(tp=1)
    noisy = totals(Model(STEP_NS), sizes, [DECODE], 50)
    model = Model(STEP_NS)
    nominal = model.step(1, places(sizes), [DECODE], jitter=False)[0]
    exact: Counter[str] = Counter()
    for launch in nominal:
        exact[f"0 {launch.kernel.category}"] += 50 * launch.dur_ns
    for name, total in exact.items():
        assert noisy[name] == pytest.approx(total, rel=0.003)
    one = model.step(1, places(sizes), [DECODE])[0]
    assert any(a.dur_ns != b.dur_ns for a, b in zip(one, nominal, strict=True))
    for a, b in zip(one, nominal, strict=True):
        assert a.dur_ns == pytest.approx(b.dur_ns, rel=JITTER + 1e-3)


def test_a_collective_ends_everywhere_at_once_and_the_last_to_arrive_waits_least() -> None:
    model = Model(STEP_NS, slow=(Slow("3", "compute", 1.5),))
    ranks = model.step(7, places(Sizes(tp=4)), [DECODE])
    collectives = [
        [launch for launch in launches if launch.kernel.kind == "collective"]
        for launches in ranks.values()
    ]
    assert len(collectives[0]) == 2 * model.layers + 1
    for meeting in zip(*collectives, strict=True):
        assert len({launch.start_ns + launch.dur_ns for launch in meeting}) == 1
        shortest = min(meeting, key=lambda launch: launch.dur_ns)
        assert shortest.start_ns == max(launch.start_ns for launch in meeting)
        assert shortest is meeting[3]


@pytest.mark.parametrize("batch", [DECODE, PREFILL])
def test_kernels_of_a_stream_do_not_overlap_and_fit_into_the_step(batch: Batch) -> None:
    model = Model(STEP_NS, slow=(Slow("1", "gemm", 3.0),))
    peers = places(Sizes(tp=2))
    wall = model.wall_ns(5, peers, [batch])
    for launches in model.step(5, peers, [batch]).values():
        assert all(a.start_ns + a.dur_ns < b.start_ns for a, b in pairwise(launches))
        assert max(ends(launches)) < wall


def test_a_balanced_decode_step_takes_the_asked_wall_time() -> None:
    wall = Model(STEP_NS).wall_ns(1, places(Sizes(tp=2)), [DECODE])
    assert wall == pytest.approx(STEP_NS, rel=0.03)
    assert FILL + LEAD < 1


def test_faults_hold_only_in_their_steps() -> None:
    model = Model(STEP_NS, slow=(Slow("0", "gemm", 2.0, from_step=10, until_step=12),))
    peers = places(Sizes())
    lengths = [ends(model.step(step, peers, [DECODE])[0])[-1] for step in range(8, 14)]
    assert [length > 1.15 * lengths[0] for length in lengths] == [
        False, False, True, True, False, False,
    ]  # fmt: skip


def by_category(launches: list[Launch]) -> Counter[str]:
    found: Counter[str] = Counter()
    for launch in launches:
        found[launch.kernel.category] += launch.dur_ns
    return found


QUIET = StepNoise(0.0)
DP2 = Sizes(tp=2, dp=2, dp_attention=True)


def test_an_idle_attention_replica_replays_the_bucket_of_the_others() -> None:
    ranks = Model(STEP_NS, step_noise=QUIET).step(1, places(DP2), [DECODE, IDLE])
    names = [[launch.kernel.name for launch in launches] for launches in ranks.values()]
    sampled = {launch.kernel.name for launch in ranks[0] if launch.kernel.law == "head sample"}
    assert [each for each in names[0] if each not in sampled] == names[1]
    busy, idle = (by_category(launches) for launches in ranks.values())
    for name in ("gemm", "norm", "moe", "activation"):
        assert idle[name] == busy[name] > 0
    assert 0 < idle["attention"] < busy["attention"]
    assert idle["sampling"] == 0 < busy["sampling"]
    assert idle["communication"] > busy["communication"]
    assert any("AllGather" in name for name in names[0])
    assert any("ReduceScatter" in name for name in names[0])


def test_with_dp_attention_each_category_grows_with_what_drives_it() -> None:
    def of(*batches: Batch) -> list[Counter[str]]:
        ranks = Model(STEP_NS, step_noise=QUIET).step(1, places(DP2), batches)
        return [by_category(launches) for launches in ranks.values()]

    few, many = Batch("DECODE", 40, 40, 160_000), Batch("DECODE", 64, 64, 256_000)
    less, more = of(few, many)
    for name in ("gemm", "norm", "moe"):  # the bucket, and tokens of both ranks
        assert less[name] == more[name]
    layers = Model(STEP_NS).layers
    quiet = of(Batch("DECODE", 8, 8, 800), Batch("DECODE", 8, 8, 800))[0]
    attention = next(
        launch.dur_ns
        for launch in Model(STEP_NS, step_noise=QUIET).step(
            1, places(DP2), [Batch("DECODE", 8, 8, 800)] * 2
        )[0]
        if launch.kernel.law == "attention attention"
    )
    slope = attention * 4e-4 / (20 + 4e-4 * 800)  # µs a layer: 20 + 0.0004 Σ KV
    added = more["attention"] - less["attention"]
    assert added == pytest.approx(layers * slope * 96_000, rel=1e-3)
    assert quiet["moe"] < less["moe"]
    longer = of(few, Batch("DECODE", 64, 64, 512_000))
    assert longer[0] != less  # it waits longer
    assert {**longer[0], "communication": 0} == {**less, "communication": 0}


def test_a_prompt_makes_all_attention_replicas_run_eagerly_on_their_own_rows() -> None:
    prompt, busy = Batch("EXTEND", 1, 4096, 4096), Batch("DECODE", 8, 8, 32_000)
    sizes = Sizes(tp=3, dp=3, dp_attention=True)
    model = Model(STEP_NS, step_noise=QUIET)
    extending, decoding, idle = (
        by_category(launches)
        for launches in model.step(1, places(sizes), [prompt, busy, IDLE]).values()
    )
    names = [
        {launch.kernel.name for launch in launches if launch.kernel.category == "attention"}
        for launches in model.step(1, places(sizes), [prompt, busy, IDLE]).values()
    ]
    assert any("Prefill" in name for name in names[0])
    assert any("Decode" in name for name in names[1])
    assert not names[2]
    assert extending["gemm"] > decoding["gemm"] > idle["gemm"] > 0  # the rest is shared rows
    assert extending["moe"] == decoding["moe"] == idle["moe"]
    assert idle["attention"] == 0


def test_with_dp_attention_only_the_noise_of_steps_varies() -> None:
    sizes, batches = DP2, [DECODE, DECODE]
    assert totals(Model(STEP_NS, step_noise=QUIET), sizes, batches, 2)["0 gemm"] == (
        2 * totals(Model(STEP_NS, step_noise=QUIET), sizes, batches, 1)["0 gemm"]
    )
    quiet = totals(Model(STEP_NS, step_noise=QUIET), sizes, batches, 1)["0 gemm"]
    model = Model(STEP_NS)
    steps = [
        by_category(model.step(step, places(sizes), batches)[0])["gemm"] / quiet
        for step in range(1, 401)
    ]
    logs = np.log(steps)
    assert logs.std() == pytest.approx(0.02, rel=0.2)
    centred = logs - logs.mean()
    assert (centred[1:] * centred[:-1]).sum() / (centred**2).sum() == pytest.approx(0.6, abs=0.15)


def test_every_rank_derives_the_same_timeline_and_seeds_differ() -> None:
    peers = places(Sizes(tp=2))
    assert Model(STEP_NS).step(3, peers, [DECODE]) == Model(STEP_NS).step(3, peers, [DECODE])
    assert Model(STEP_NS).step(3, peers, [DECODE]) != Model(STEP_NS, seed=1).step(
        3, peers, [DECODE]
    )


@pytest.mark.parametrize("batch", [DECODE, PREFILL])
@pytest.mark.parametrize("sizes", [Sizes(tp=2), Sizes(tp=2, dp=2, dp_attention=True)])
def test_the_categories_are_those_that_the_project_finds_in_the_names(
    batch: Batch, sizes: Sizes
) -> None:
    batches = [batch] * sizes.queues
    launches = Model(STEP_NS).step(1, places(sizes), batches)[0]
    known = {launch.kernel.name: launch.kernel.category for launch in launches}
    assert {name: category(name) for name in known} == known


def compute_of(model: Model, sizes: Sizes, steps: int) -> npt.NDArray[np.float64]:
    """Compute of each step and rank / the nominal one, shape (steps, ranks)."""
    quiet = totals(replace(model, step_noise=None), sizes, [DECODE], steps)
    exact = sum(quiet[f"0 {name}"] for name in COMPUTE) / steps
    found = np.zeros((steps, sizes.tp))
    for step in range(1, steps + 1):
        for rank, launches in model.step(step, places(sizes), [DECODE]).items():
            of = (each.dur_ns for each in launches if each.kernel.kind == "kernel")
            found[step - 1, rank] = sum(of) / exact
    return found


def test_steps_are_as_noisy_as_asked_and_the_mean_stays() -> None:
    noise = StepNoise(sd=0.1, phi=0.6)
    found = compute_of(Model(STEP_NS, layers=1, step_noise=noise), Sizes(tp=2), 2000)
    # 2,000 such steps are worth 500: the mean of 1 has a standard error of 0.0045.
    assert found.mean(axis=0) == pytest.approx([1, 1], abs=0.018)
    logs = np.log(found)
    assert logs.std(axis=0) == pytest.approx([0.1, 0.1], rel=0.1)
    logs -= logs.mean(axis=0)
    carried = (logs[1:] * logs[:-1]).sum(axis=0) / (logs**2).sum(axis=0)
    assert carried == pytest.approx([0.6, 0.6], abs=0.08)
    assert abs(np.corrcoef(logs.T)[0, 1]) < 0.15  # each rank has its own


def test_noise_of_steps_is_the_same_in_every_process_and_order_and_differs_by_seed() -> None:
    noise = StepNoise(sd=0.1, phi=0.6)
    code = (
        "from pytest_sglprof.standin.model import StepNoise\n"
        "print([StepNoise(0.1, 0.6).factor(5, 1, step) for step in (40, 7, 8)])"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == str([noise.factor(5, 1, step) for step in (40, 7, 8)])
    factors = {noise.factor(seed, rank, 7) for seed in (5, 6) for rank in (0, 1)}
    assert len(factors) == 4


def test_a_step_that_noise_makes_longer_still_fits_into_its_wall_time() -> None:
    model = Model(STEP_NS, step_noise=StepNoise(sd=0.3))
    peers = places(Sizes(tp=4))
    for step in range(1, 50):
        launches = model.step(step, peers, [DECODE])
        wall = model.wall_ns(step, peers, [DECODE])
        assert max(end for rank in launches.values() for end in ends(rank)) < wall


def test_noise_of_steps_leaves_collectives_and_copies_alone() -> None:
    sizes = Sizes(tp=1)
    quiet = totals(Model(STEP_NS), sizes, [DECODE], 5)
    noisy = totals(Model(STEP_NS, step_noise=StepNoise(sd=0.3)), sizes, [DECODE], 5)
    assert noisy["0 memory"] == quiet["0 memory"]
    assert noisy["0 gemm"] != quiet["0 gemm"]


# Lives.


def test_a_category_is_slow_on_every_rank() -> None:
    sizes = Sizes(tp=2)
    usual = totals(Model(STEP_NS), sizes, [DECODE], 5)
    slow = totals(Model(STEP_NS, slow=(Slow(EVERY_RANK, "moe", 1.15),)), sizes, [DECODE], 5)
    for of in COMPUTE:
        factor = 1.15 if of == "moe" else 1.0
        for name in (f"0 {of}", f"1 {of}"):
            assert slow[name] / usual[name] == pytest.approx(factor, rel=1e-6)


def test_a_life_multiplies_each_kernel_by_one_factor_on_all_ranks_and_in_all_steps() -> None:
    noise = LifeNoise(0.05, 3)
    usual, other = (
        [
            Model(STEP_NS, life_noise=life).step(step, places(Sizes(tp=2)), [DECODE])
            for step in (1, 9)
        ]
        for life in (None, noise)
    )
    factors: dict[str, set[float]] = {}
    for before, after in zip(usual, other, strict=True):
        for rank in (0, 1):
            for one, two in zip(before[rank], after[rank], strict=True):
                if one.kernel.kind != "collective":  # these wait, too
                    factors.setdefault(one.kernel.name, set()).add(two.dur_ns / one.dur_ns)
    assert len(factors) > 10
    for name, found in factors.items():
        assert list(found) == pytest.approx([noise.factor(name)] * len(found), rel=1e-4)
    assert len({round(min(found), 6) for found in factors.values()}) == len(factors)


def test_the_transfer_of_collectives_is_of_the_life_too() -> None:
    launches = [
        Model(STEP_NS, life_noise=life).step(1, places(Sizes(tp=2)), [DECODE], jitter=False)[0]
        for life in (None, LifeNoise(0.05, 3))
    ]
    for one, two in zip(*launches, strict=True):
        if one.kernel.kind == "collective":
            expected = LifeNoise(0.05, 3).factor(one.kernel.name)
            assert two.dur_ns / one.dur_ns == pytest.approx(expected, rel=1e-3)


def test_lives_differ_by_the_deviation_that_is_asked_for() -> None:
    kernels = ("fused_moe_kernel", "norm", "copy")
    logs = np.log(
        [[LifeNoise(0.01, seed).factor(name) for name in kernels] for seed in range(2000)]
    )
    assert logs.std(axis=0) == pytest.approx([0.01 * np.sqrt(2)] * 3, rel=0.06)
    assert np.corrcoef(logs.T)[0, 1] == pytest.approx(0.5, abs=0.06)
    assert abs(logs.mean()) < 0.001


def test_a_life_without_noise_is_that_of_today() -> None:
    batches = [DECODE]
    today = Model(STEP_NS).step(3, places(Sizes(tp=2)), batches)
    assert (
        Model(STEP_NS, life_noise=LifeNoise(0.0, 9)).step(3, places(Sizes(tp=2)), batches) == today
    )
