"""`window.check()` of windows that are opened several times."""

from __future__ import annotations

import pytest

from tests.integration.plugin.test_checks import HEAD

REPEATED = """
def repeated(bench_serving, profile_window):
    with bench_serving.running(num_prompts=4, max_concurrency=4, random_input_len=8,
                               random_output_len=2600, random_range_ratio=1.0, warm_up=False,
                               disable_stream=True):
        with profile_window("hand", num_steps=60, repeat=2, slowdown=LIMITS) as window:
            window.wait()
    return window
"""
TESTS = {
    "test_repeated": """
@slow
def test_repeated(bench_serving, profile_window):
    window = repeated(bench_serving, profile_window)
    assert window.windows[1].check("slowdown", 1.2, scope="moe") == pytest.approx(1.4, rel=0.02)
""",
    "test_repeated_too_little": """
def test_repeated_too_little(bench_serving, profile_window):
    too_little(repeated(bench_serving, profile_window))
""",
}


@pytest.fixture(scope="module")
def outcome_of(run_projects):
    texts = {name: HEAD + REPEATED + tests for name, tests in TESTS.items()}
    return run_projects(texts, "-p", "no:cacheprovider")


@pytest.mark.parametrize(
    ("name", "word"), [("test_repeated", "fail"), ("test_repeated_too_little", "inconclusive")]
)
def test_fault_19_a_check_of_windows_that_were_repeated_is_in_all_of_them(outcome_of, name, word):
    ran = outcome_of(name)
    assert ran.test(name)["verdict"] == word
    windows = ran.windows(name)
    assert len(windows) == 2
    for window in windows:
        (check,) = [j for j in window["judgements"] if j["threshold"]["origin"] == "check"]
        assert check["verdict"] == word
        assert word in [spread["verdict"] for spread in window["repeats"]["spread"]]
        assert window["verdict"] == word
