import pytest


@pytest.mark.parametrize(
    "size",
    [pytest.param(size, marks=pytest.mark.sglang_server(f"tp{size}")) for size in (2, 4, 8)],
)
@pytest.mark.profile_window(slowdown={"compute": 1.05, "moe": 1.2})
def test_balance_at_every_size(size, sglang_server, bench_serving):
    bench_serving(num_prompts=64 * size, max_concurrency=16 * size)
