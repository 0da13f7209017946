"""Two nsys windows in one server life, opened by hand under a running load."""

import pytest

pytestmark = pytest.mark.sglang_server(nsys=True)


def test_short_and_long_prompts(bench_serving, profile_window):
    for name, length in (("short", 128), ("long", 4096)):
        with (
            bench_serving.running(num_prompts=200, max_concurrency=32, random_input_len=length),
            profile_window(name, backend="nsys", duration=5) as window,
        ):
            window.wait()
        window.check("slowdown", 1.2, scope="gemm")
