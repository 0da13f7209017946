"""The main job in two tests: a balanced server passes, a slow rank is caught."""

import pytest

from pytest_sglprof import VerdictFailed


@pytest.mark.profile_window(num_steps=100)
def test_ranks_are_balanced(sglang_server, bench_serving):
    """A window of 100 steps opens once the load is steady; its verdict is this test's."""
    load = bench_serving(
        num_prompts=64, max_concurrency=8, random_input_len=64, random_output_len=256
    )
    assert load.completed == 64


@pytest.mark.sglang_server("slow_rank")
@pytest.mark.profile_window(num_steps=100)
@pytest.mark.xfail(raises=VerdictFailed, strict=True, reason="rank 1 is slowed on purpose")
def test_a_slow_rank_is_caught(sglang_server, bench_serving):
    """Run with --runxfail to see how a slow rank looks."""
    if sglang_server.kind != "standin":
        pytest.skip("a slow rank can be planted in the stand-in only")
    bench_serving(num_prompts=64, max_concurrency=8, random_input_len=64, random_output_len=256)
