from __future__ import annotations

import pytest

from pytest_sglprof._verdict.wording import (
    against_limit,
    count,
    duration,
    milliseconds,
    percent,
    ratio,
    work_words,
)


@pytest.mark.parametrize(
    ("ns", "text"),
    [
        (0, "0 ns"),
        (999, "999 ns"),
        (412_345, "412 µs"),
        (41_234_567, "41.2 ms"),
        (1_234_000_000, "1,234 ms"),
        (12_300_000_000, "12.3 s"),
        (-1_500_000, "-1.50 ms"),
    ],
)
def test_a_time_has_three_figures_and_a_unit(ns: float, text: str) -> None:
    assert duration(ns) == text


def test_figures_of_columns_have_no_unit() -> None:
    assert [milliseconds(ns) for ns in (0, 412_000, 9_996_000, 41_234_567)] == [
        "0", "0.412", "10.0", "41.2",
    ]  # fmt: skip
    assert (percent(None), percent(0.643), ratio(None), ratio(1.385)) == ("-", "64 %", "-", "1.39")
    assert (count(1, "step"), count(50, "step"), count(2, "try", "tries")) == (
        "1 step",
        "50 steps",
        "2 tries",
    )


@pytest.mark.parametrize(
    ("value", "limit", "texts"),
    [
        (1.39, 1.1, ("1.39", " (limit 1.10)")),
        (1.104, 1.1, ("1.104", " (limit 1.10)")),
        (1.1, 1.1, ("1.10", " (limit 1.10)")),
        (1.12, 1.125, ("1.120", " (limit 1.125)")),
        (1.2, float("inf"), ("1.20", "")),
    ],
)
def test_value_and_limit_never_look_equal_when_they_differ(
    value: float, limit: float, texts: tuple[str, str]
) -> None:
    assert against_limit(value, limit) == texts


@pytest.mark.parametrize(
    ("word", "times", "text"),
    [
        ("", None, ""),
        ("same_work", 1.0, "with the same work"),
        ("same_work", 1.004, "with the same work"),
        ("same_work", 1.1, "which its 1.10x the tokens do not explain"),
        ("more_work", 1.5, "with 1.50x the tokens: more work"),
    ],
)
def test_more_work_is_told_from_slowness(word: str, times: float | None, text: str) -> None:
    assert work_words(word, times, "tokens") == text
