"""The load driver's figures and its command line, without a server."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from pytest_sglprof.standin.load_driver import (
    Outcome,
    base_url,
    main,
    parse,
    percentile,
    rows,
    summarise,
)


def test_percentiles_are_those_of_numpy() -> None:
    rng = np.random.default_rng(3)
    for size in (1, 2, 7, 40):
        values = rng.exponential(size=size).tolist()
        for percent in (90, 95, 99, 100, 0):
            assert percentile(values, percent) == pytest.approx(np.percentile(values, percent))


def test_figures_of_two_good_requests_and_a_bad_one() -> None:
    good = [
        Outcome(10, 3, True, start=0.0, latency=0.5, ttft=0.1, itl=[0.2, 0.2]),
        Outcome(20, 5, True, start=0.2, latency=1.3, ttft=0.5, itl=[0.2] * 4),
    ]
    found = summarise([*good, Outcome(30, 99, error="refused")], duration=2.0)
    assert found["completed"] == 2
    assert found["total_input_tokens"] == 30
    assert found["total_output_tokens"] == 8
    assert found["output_throughput"] == 4.0
    assert found["mean_e2e_latency_ms"] == pytest.approx(900)
    assert found["median_ttft_ms"] == pytest.approx(300)
    assert found["std_ttft_ms"] == pytest.approx(200)
    assert found["mean_tpot_ms"] == pytest.approx(200)
    assert found["mean_itl_ms"] == pytest.approx(200)
    assert found["concurrency"] == pytest.approx(0.9)
    assert found["max_concurrent_requests"] == 2
    assert found["max_output_tokens_per_s"] == 5  # ends at 0.1, 0.3, 0.5 and 0.7, 0.9 s


def test_figures_of_nothing_are_zero() -> None:
    found = summarise([Outcome(1, 1)], duration=1.0)
    assert found["completed"] == 0
    assert found["mean_ttft_ms"] == 0
    assert found["p99_itl_ms"] == 0


def test_the_fields_are_those_of_the_real_driver_in_its_order(shared_data: Path) -> None:
    line = (shared_data / "logs" / "tp2" / "bench.jsonl").read_text().splitlines()[0]
    real = list(json.loads(line))
    own = list(summarise([], 1.0))
    assert real[real.index("duration") :] == own


def test_rows_follow_the_seed_and_the_range() -> None:
    def lengths(*more: str) -> list[tuple[int, int]]:
        line = ["--num-prompts", "50", "--random-input-len", "40", "--random-output-len", "20"]
        return [(len(row.ids), row.output_len) for row in rows(parse([*line, *more]))]

    assert lengths("--random-range-ratio", "1.0") == [(40, 20)] * 50
    assert lengths("--seed", "1") == lengths("--seed", "1") != lengths("--seed", "2")
    assert all(20 <= n <= 40 and 10 <= m <= 20 for n, m in lengths("--random-range-ratio", "0.5"))
    first, second = rows(parse(["--num-prompts", "2"]))
    assert first.ids != second.ids
    assert len(first.text.split()) == len(first.ids)


def test_addresses_and_headers() -> None:
    assert base_url(parse(["--host", "h", "--port", "5"])) == "http://h:5"
    options = parse(["--base-url", "http://x/", "--header", "A=b=c", "D=e"])
    assert base_url(options) == "http://x"
    assert options.headers == {"A": "b=c", "D": "e"}
    assert parse(["--extra-request-body", '{"a": 1}']).extra == {"a": 1}


@pytest.mark.parametrize(
    "line",
    [
        ["--extra-request-body", "[1]"],
        ["--extra-request-body", "{"],
        ["--random-range-ratio", "2"],
        ["--tokenize-prompt", "--backend", "sglang-oai"],
        ["--dataset-name", "sharegpt"],
        ["--no-such-option"],
    ],
)
def test_what_it_cannot_do_is_refused(line: list[str]) -> None:
    with pytest.raises(SystemExit) as refused:
        parse(line)
    assert refused.value.code == 2


def test_a_server_that_is_not_there_ends_it(capsys: pytest.CaptureFixture[str]) -> None:
    # Port 9 (discard) of this machine: nothing listens there.
    line = ["--host", "127.0.0.1", "--port", "9", "--ready-check-timeout-sec", "1"]
    assert main(line) == 1
    assert "is not ready" in capsys.readouterr().out
