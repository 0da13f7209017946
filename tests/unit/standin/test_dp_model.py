"""The planted truth of DP attention: its laws, its noise, and when everything runs."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import fields, replace

import numpy as np
import pytest

from pytest_sglprof.standin.dp_model import (
    CASES,
    DpPlan,
    DpWindow,
    Prefill,
    Speculative,
    make,
    split,
)
from pytest_sglprof.standin.laws import CATEGORIES, rows_of

CASE = {case.name: case for case in CASES}


def planted(name: str, ranks: int = 4, seed: int = 3, **changed: object) -> DpWindow:
    return make(replace(CASE[name].make(ranks, seed, 0.02, 0.6), **changed))


def plan(**changed: object) -> DpPlan:
    given = {"ranks": 2, "requests": (64, 40), "kv": (4000.0, 4000.0), "layers": 2}
    return DpPlan(**{**given, **changed})


def by_hand(
    layers: int, own: float, shared: float, logits: float, attention: float,
    pairs: list[int], batch: int, *, is_idle_eager: bool = False,
) -> list[float]:  # fmt: skip
    """µs by category in plain Python, from the constants that the laws are documented with."""
    runs = 0.0 if is_idle_eager else 1.0
    return [
        layers * attention,
        runs * layers * (30 + 0.25 * own + 20 + 0.15 * own)
        + layers * (4 + 0.02 * shared + 10 + 0.08 * shared)
        + (30 + 0.10 * logits),
        runs * (layers * (3 + 0.01 * own + 3 + 0.01 * own) + 3 + 0.01 * own),
        runs * layers * (4 + 0.01 * own) + layers * (4 + 0.01 * shared),
        layers * (6 + 0.01 * shared) + sum(25 + 0.10 * n + 15 + 0.05 * n for n in pairs),
        25 + 0.6 * batch if batch else 0.0,
    ]


def pairs_of(window: DpWindow, number: int, rank: int) -> list[int]:
    """Pairs on the rank's experts in each layer, counted one by one."""
    place = window.rank_of_expert.tolist()
    return [
        sum(n for n, at in zip(layer, place, strict=True) if at == rank)
        for layer in window.counts[number].tolist()
    ]


def test_decode_passes_follow_the_bucket_of_the_largest_batch_and_their_own_kv() -> None:
    window = make(plan(requests=(61, 0), passes=5))
    assert window.kind.tolist() == [["DECODE", "IDLE"]] * 5
    assert window.is_graph.all()
    assert (window.bucket == 64).all()  # the capture size ≥ 61, on the idle rank too
    for number in range(5):
        for rank, kv in enumerate((int(window.kv[number, 0]), 0)):
            expected = by_hand(
                2, 64, 64, 64, 20 + 4e-4 * kv, pairs_of(window, number, rank), 61 * (1 - rank)
            )
            assert window.lawful[number, rank].tolist() == pytest.approx(expected)


def test_in_the_local_regime_each_rank_has_its_own_bucket() -> None:
    window = make(plan(regime="local", passes=3))
    assert window.bucket.tolist() == [[64, 40]] * 3
    assert window.shared_rows.tolist() == [[64, 40]] * 3
    expected = by_hand(2, 40, 40, 40, 20 + 4e-4 * int(window.kv[1, 1]), pairs_of(window, 1, 1), 40)
    assert window.lawful[1, 1].tolist() == pytest.approx(expected)
    assert (window.transfer[:, 2] == 0).all()  # the head is each rank's own


def test_a_prompt_makes_all_ranks_eager_on_their_own_rows() -> None:
    prompt = Prefill(0, 1, 5000, chunk=2048)
    window = make(
        plan(ranks=4, requests=(64, 40, 0, 8), kv=(4000.0,) * 4, prefills=(prompt,), passes=6)
    )
    assert window.kind[:, 0].tolist() == ["DECODE", *["EXTEND"] * 3, "DECODE", "DECODE"]
    assert window.is_graph.tolist() == [True, False, False, False, True, True]
    assert window.tokens[1:4, 0].tolist() == [2048, 2048, 904]
    assert window.qk[1:4, 0].tolist() == [2048 * 2048, 2048 * 4096, 904 * 5000]
    assert window.batch[:, 0].tolist() == [64, 1, 1, 1, 65, 65]
    assert window.bucket.tolist()[3:5] == [[0] * 4, [72] * 4]
    shared, logits = (2048 + 40 + 0 + 8) / 4, (1 + 40 + 0 + 8) / 4
    attention = (40 + 8e-5 * 2048 * 4096, 20 + 4e-4 * int(window.kv[2, 1]), 0.0)
    for rank, rows in enumerate((2048, 40, 0)):
        expected = by_hand(
            2, rows, shared, logits, attention[rank], pairs_of(window, 2, rank),
            (1, 40, 0)[rank], is_idle_eager=rank == 2,
        )  # fmt: skip
        assert window.lawful[2, rank].tolist() == pytest.approx(expected)


def test_requests_in_generation_join_the_pass_of_a_prompt_where_chunks_are_mixed() -> None:
    prompt = Prefill(0, 1, 3000, chunk=2000)
    window = make(plan(prefills=(prompt,), passes=4, is_mixed=True, churn=0.0))
    assert window.kind[:, 0].tolist() == ["DECODE", "MIXED", "MIXED", "DECODE"]
    assert window.groups[1, 0].tolist() == [1, 64]
    assert window.generation[1, 0].tolist() == [64, window.kv[0, 0] + 64, 64, window.kv[0, 0] + 64]
    paused = make(plan(prefills=(prompt,), passes=4, churn=0.0))
    assert paused.kv[3, 0] == paused.kv[0, 0] + 64 + 3001 + 0  # one pass before, none beside


def test_a_request_grows_by_one_a_pass_and_others_take_the_place_of_those_that_end() -> None:
    window = make(plan(churn=0.0))
    assert np.diff(window.kv, axis=0).tolist() == [[64, 40]] * 99
    assert window.kv[0, 0] == pytest.approx(64 * 4000, abs=64)
    coming = make(plan(churn=0.05))
    assert (coming.batch == [64, 40]).all()
    assert np.diff(coming.kv, axis=0).std() > 1000
    sparse = make(plan(churn=0.05, vacant=0.5))
    assert 50 < sparse.batch[20:, 0].mean() < 63


def test_every_pair_of_a_token_and_an_expert_is_counted_once() -> None:
    for name in "acgj":
        window = planted(name)
        per_layer = window.counts.sum(axis=2)
        tokens = window.tokens.sum(axis=1)
        layers = np.where(window.is_draft[:, 0], 1, window.plan.layers)
        for number, of in enumerate(per_layer.tolist()):
            ran = [8 * int(tokens[number])] * int(layers[number])
            assert of == ran + [0] * (window.plan.layers - len(ran))
        assert window.expert_tokens.sum() == window.counts.sum()
        assert window.expert_tokens[7].tolist() == [
            sum(pairs_of(window, 7, rank)) for rank in range(4)
        ]


def test_hot_experts_get_so_many_times_the_tokens() -> None:
    for ranks in (2, 8, 64):
        hot, even = (make(replace(CASE[n].make(ranks, 5, 0.0, 0.0), drift=0.0)) for n in "cb")
        about = hot.plan.about

        def share(window: DpWindow, rank: int = about) -> float:
            tokens = window.expert_tokens.sum(axis=0)
            return float(tokens[rank] / (tokens.sum() - tokens[rank]))

        assert share(hot) / share(even) == pytest.approx(1.6, rel=0.03)


def test_times_are_lawful_ones_times_factor_times_noise_to_the_ns() -> None:
    for name in "abcdefghij":
        window = planted(name)
        expected = window.lawful * window.factor * window.noise
        kernels = 4 * window.plan.layers + 1  # of gemm, each rounded
        assert np.abs(window.times - expected).max() < 0.5e-3 * kernels


def test_noise_has_its_deviation_its_memory_and_the_mean_1() -> None:
    noise = make(plan(sd=0.05, phi=0.6, passes=20_000, layers=1, experts=2, requests=(1, 1))).noise
    assert noise.mean(axis=0) == pytest.approx(np.ones((2, 6)), abs=0.005)
    logs = np.log(noise)
    assert logs.std(axis=0) == pytest.approx(np.full((2, 6), 0.05), rel=0.05)
    logs -= logs.mean(axis=0)
    carried = (logs[1:] * logs[:-1]).sum(axis=0) / (logs**2).sum(axis=0)
    assert carried == pytest.approx(np.full((2, 6), 0.6), abs=0.03)
    between = np.corrcoef(logs.reshape(len(logs), -1).T)
    assert between[0, 1] == pytest.approx(0.5, abs=0.05)  # categories of a rank share a half
    assert between[0, 6] == pytest.approx(0.0, abs=0.05)  # ranks nothing


def test_spikes_are_paretos_and_leave_the_mean_at_1() -> None:
    given = plan(noise="pareto", sd=0.01, passes=40_000, layers=1, experts=2, requests=(1, 1))
    noise = make(given).noise[:, :, 0]
    assert noise.mean() == pytest.approx(1.0, abs=0.01)
    typical = np.median(noise)
    assert np.mean(noise > 2 * typical) == pytest.approx(0.02 * 2**-1.5, rel=0.15)
    assert noise.max() < 21 * typical


def test_a_pass_lasts_as_long_as_its_compute_its_waiting_and_its_exchange() -> None:
    for name in "abcdefghij":
        window = planted(name)
        parts = window.times.sum(axis=2) + window.waiting + window.exchange
        assert parts == pytest.approx((window.end - window.start) / 1000, abs=1e-6)
        assert (window.waiting >= 0).all()
        # At each collective somebody is the last, so that nobody waits more than all the rest.
        assert (window.waiting.min(axis=1) < window.times.sum(axis=2).max(axis=1)).all()


def test_no_rank_launches_before_the_last_one_has_come_to_the_gloo_all_gather() -> None:
    window = planted("a", cpu_us=2500.0, cpu_us_a_request=30.0, has_overlap=False)
    assert (window.synced == window.ready.max(axis=1)).all()
    assert (window.start >= window.synced[:, None] + 20_000).all()
    assert (window.start[1:] >= window.end[:-1] + 4_000).all()
    about = window.plan.about  # it has more requests, and the others' GPUs wait for its CPU
    assert window.cpu_wait[:, about].mean() < window.cpu_wait.mean()
    assert (window.head_idle[1:] > 3_000).all()
    hidden = planted("a")
    assert hidden.head_idle[2:] == pytest.approx(np.full((98, 4), 4.0))
    for number in (5, 50):
        for rank in range(4):
            begin, end = window.end[number - 1, rank], window.start[number, rank]
            moments = np.arange(begin, end, 997)
            busy = [
                bool(((window.start[at] <= t) & (t < window.end[at])).any())
                for t in moments
                for at in [number if t >= window.start[number].min() else number - 1]
            ]
            expected = np.mean(busy) * (end - begin) / 1000
            beside = window.head_idle_beside_busy[number, rank]
            assert beside == pytest.approx(expected, abs=3.0)


def test_padding_is_what_rows_without_a_token_cost() -> None:
    window = make(plan(requests=(57, 10), passes=4, sd=0.0, gpu_factor=(1.0, 1.5)))
    shared = 64 - (57 + 10) / 2
    slopes = (2 * 0.25 + 2 * 0.15, 2 * 0.02 + 0.01, 2 * 0.01)  # gemm, norm and head, quantization
    for rank, own in enumerate((64 - 57, 64 - 10)):
        expected = own * sum(slopes) + shared * 2 * (0.02 + 0.08 + 0.01 + 0.01)
        factor = (1.0, 1.5)[rank]
        assert window.padding[:, rank] == pytest.approx(np.full(4, factor * expected))


def test_an_iteration_of_speculation_drafts_verifies_and_extends() -> None:
    window = planted("h", passes=5)
    assert len(window.is_graph) == 20
    assert window.kind[:4, 0].tolist() == ["DRAFT", "DRAFT", "VERIFY", "DRAFT"]
    assert window.is_draft[:4, 0].tolist() == [True, True, False, True]
    first = window.plan.first_id
    drafts, verified = window.is_draft[:, 0], ~window.is_draft[:, 0]
    assert window.forward_id[drafts, 1].tolist() == list(range(first, first + 15))
    assert window.forward_id[verified, 1].tolist() == list(range(first, first + 5))
    assert window.is_graph.tolist() == verified.tolist()
    assert (window.rows[verified] == 4 * 64).all()
    assert (window.tokens[verified] == 4 * 64).all()
    assert (window.qk[verified] == 4 * window.kv[verified]).all()
    attention = window.lawful[verified, :, CATEGORIES.index("attention")]
    assert attention == pytest.approx(window.plan.layers * (24 + 5e-4 * window.kv[verified]))
    synced = np.flatnonzero(np.diff(window.synced, prepend=-1))
    assert synced.tolist() == [0, 4, 8, 12, 16]


def test_graphs_have_the_sizes_of_sglang_which_speculation_makes_finer() -> None:
    assert make(plan(requests=(49, 3), passes=1)).bucket.tolist() == [[56, 56]]
    verify = make(plan(requests=(49, 3), passes=1, speculative=Speculative()))
    assert verify.bucket.tolist() == [[0, 0], [0, 0], [52, 52], [0, 0]]
    given = make(plan(requests=(49, 3), passes=1, capture_sizes=(4, 50), regime="local"))
    assert given.bucket.tolist() == [[50, 4]]


def test_eager_passes_without_a_prompt_are_padded_to_the_largest_unless_that_doubles_them() -> None:
    draft = {"speculative": Speculative(), "passes": 1}
    assert make(plan(requests=(64, 40), **draft)).rows[0].tolist() == [64, 64]
    one = rows_of([64, 0, 0, 0], [64, 0, 0, 0], extends=False, can_replay=False)
    assert one.own_rows == [64, 0, 0, 0]
    assert one.shared_rows == [16.0] * 4
    above = rows_of([300, 1], [300, 1], extends=False)  # no graph is so large
    assert (above.is_graph, above.own_rows) == (False, [300, 300])


def test_ids_begin_anew_and_spans_lack_them_where_planted() -> None:
    window = planted("j")
    target, extended = ~window.is_draft[:, 0], window.kind[:, 0] == "DRAFT_EXTEND_V2"
    ids = window.forward_id[target, 0].tolist()
    assert ids == [*range(1001, 1051), *range(1, 51)]
    assert (window.forward_id[extended] == 0).all()
    assert extended.sum() == 100
    assert window.is_graph[extended].all()


def test_a_window_is_the_same_in_every_process_and_another_with_another_seed() -> None:
    code = (
        "from pytest_sglprof.standin.dp_model import CASES, make\n"
        "window = make(CASES[2].make(4, 3, 0.02, 0.6))\n"
        "print(window.end.sum(), window.counts.std(), window.noise.sum())"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    window = planted("c")
    assert ran.stdout.split() == [
        str(window.end.sum()), str(window.counts.std()), str(window.noise.sum()),
    ]  # fmt: skip
    assert planted("c", seed=7).end.sum() != window.end.sum()
    again = planted("c")
    for each in fields(window):
        if each.name not in ("plan", "durations"):
            assert np.array_equal(getattr(window, each.name), getattr(again, each.name))


PLANTED = {
    "a": ("attention", "load"), "b": ("attention", "load"), "c": ("moe", "load"),
    "d": ("gemm", "speed"), "e": ("attention", "load"), "f": ("gemm", "speed"),
    "g": ("attention", "load"), "h": ("attention", "load"), "i": ("gemm", "speed"),
    "j": ("gemm", "speed"),
}  # fmt: skip


@pytest.mark.parametrize("ranks", [2, 8, 64])
@pytest.mark.parametrize("name", [case.name for case in CASES])
def test_each_case_has_what_it_says(name: str, ranks: int) -> None:
    window = planted(name, ranks=ranks, seed=11)
    about = window.plan.about
    parts = split(window, about)
    category, part = PLANTED[name]
    assert getattr(parts[category], part) > 25
    others = [rank for rank in range(ranks) if rank != about]
    for found in parts.values():
        assert found.load + found.speed + found.rest == pytest.approx(found.total)
    index = CATEGORIES.index("gemm")
    mean = window.times[:, :, index].mean(axis=0)
    assert parts["gemm"].total == pytest.approx(mean[about] - mean[others].mean())
    slow = name in "defij"
    lawful = window.lawful[:, about, index].mean()
    assert parts["gemm"].speed == pytest.approx(0.1 * lawful * slow, abs=1e-9)
    ratio = window.kv[:, about].mean() / window.kv[:, others].mean()
    assert ratio == pytest.approx(1.6 if name in "abefh" else 1.0, rel=0.15) or name == "g"
    assert window.recorded.sum() == window.recorded.size - (name == "i")
    assert window.is_graph.all() == (name not in "ghj")


def test_split_takes_the_passes_that_it_is_asked_about() -> None:
    window = planted("h")
    verified = ~window.is_draft[:, 0]
    of = split(window, 1, verified)["attention"]
    mean = window.lawful[verified][:, :, 0].mean(axis=0)
    assert of.load == pytest.approx(mean[1] - mean[[0, 2, 3]].mean())


@pytest.mark.parametrize(
    ("changed", "match"),
    [
        ({"requests": (1,)}, "one value for each of 2 ranks"),
        ({"gpu_factor": (1.0,)}, "gpu_factor"),
        ({"experts": 3}, "do not divide"),
        ({"prefills": (Prefill(0, 0, 1),), "speculative": Speculative()}, "not modelled"),
    ],
)
def test_plans_that_no_server_runs_are_refused(changed: dict, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        plan(**changed)
