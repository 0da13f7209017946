"""The model behind the stand-in's traces: its truth can be known."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import pytest

from pytest_sglprof._trace.categories import category
from pytest_sglprof.standin.model import (
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

STEP_NS = 10_000_000
DECODE = Batch("DECODE", 8, 8, 800)
PREFILL = Batch("EXTEND", 4, 1024, 1024)


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


def test_an_attention_replica_without_requests_only_waits_for_the_others() -> None:
    sizes = Sizes(tp=2, dp=2, dp_attention=True)
    ranks = Model(STEP_NS).step(1, places(sizes), [DECODE, IDLE])
    names = [[launch.kernel.name for launch in launches] for launches in ranks.values()]
    assert names[0] == names[1]
    compute = {
        index: sum(launch.dur_ns for launch in launches if launch.kernel.kind == "kernel")
        for index, launches in ranks.items()
    }
    assert compute[1] < 0.3 * compute[0]
    assert any("AllGather" in name for name in names[0])
    assert any("ReduceScatter" in name for name in names[0])


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
