from __future__ import annotations

import json
from pathlib import Path

import pytest

from pytest_sglprof._bench_serving.command import parse_result, reason, redact_record, requested_of
from pytest_sglprof._errors import LoadError


def test_real_record(shared_data: Path) -> None:
    line = (shared_data / "logs" / "tp2" / "bench.jsonl").read_text()
    truth = json.loads(line)
    result = parse_result(line, requested=40, command=("driver",), cache_flushed=False)
    assert (result.requested, result.completed) == (40, truth["completed"])
    assert result.duration == truth["duration"]
    assert result.output_throughput == truth["output_throughput"]
    assert result.concurrency == truth["concurrency"]
    for name, figures in {
        "ttft": result.ttft,
        "tpot": result.tpot,
        "itl": result.itl,
        "e2e_latency": result.e2e,
    }.items():
        assert figures == {
            s: truth[f"{s}_{name}_ms"] for s in ("mean", "median", "p90", "p95", "p99")
        }
    assert (result.command, result.warmed_up, result.cache_flushed) == (("driver",), True, False)
    assert "server_info" not in result.raw
    # A strict parser, which the web and jsonschema users have, must accept it.
    assert '"request_rate": "Infinity"' in json.dumps(dict(result.raw), allow_nan=False)


def test_figures_without_a_number_are_none() -> None:
    result = parse_result(
        '{"completed": 0, "duration": 1, "mean_ttft_ms": NaN, "p99_ttft_ms": Infinity,'
        ' "concurrency": true, "odd": [-Infinity, {"x": NaN}], "api_key": "hush"}',
        requested=3,
    )
    assert result.ttft == dict.fromkeys(("mean", "median", "p90", "p95", "p99"))
    assert result.concurrency is None
    assert result.raw["odd"] == ["-Infinity", {"x": "NaN"}]
    assert "hush" not in str(result.raw)


def test_more_completed_than_prompts() -> None:
    assert parse_result('{"completed": 9, "duration": 1}', requested=3).requested == 9


@pytest.mark.parametrize(
    "line", ["", "{", "[]", '"x"', '{"completed": 1}', '{"completed": null, "duration": 1}']
)
def test_not_a_record(line: str) -> None:
    with pytest.raises(LoadError, match="cannot be read"):
        parse_result(line, requested=1)


def test_stored_record_has_no_keys(shared_data: Path) -> None:
    line = (shared_data / "logs" / "tp2" / "bench.jsonl").read_text()
    record = json.loads(line)
    record["server_info"]["api_key"] = "hush-hush"
    stored = redact_record(json.dumps(record) + "\n{half a li")
    assert "hush-hush" not in stored
    assert json.loads(stored)["server_info"]["tp_size"] == 2


@pytest.mark.parametrize(
    ("output", "requested"),
    [
        ("no bar", 100),
        ("  0%| | 0/80 [00:00<?, ?it/s]\r100%|#| 80/80 [00:04<00:00, 19it/s]\n", 80),
    ],
)
def test_requested(output: str, requested: int) -> None:
    assert requested_of(output, 100) == requested


def test_reason_is_the_last_traceback() -> None:
    output = (
        "Traceback (most recent call last):\n  old\nKeyError: 1\n"
        "benchmark_args=…\n\r 0%| | 0/8 [00:00]\r"
        'Traceback (most recent call last):\n  File "serving.py", line 3\n    run()\n'
        "ValueError: Warmup failed\nsys:1: RuntimeWarning: tidying up\n"
    )
    assert reason(output) == [
        "Traceback (most recent call last):",
        '  File "serving.py", line 3',
        "    run()",
        "ValueError: Warmup failed",
    ]


def test_reason_of_a_long_traceback_keeps_its_end() -> None:
    frames = "".join(f"  frame {i}\n" for i in range(40))
    lines = reason(f"Traceback (most recent call last):\n{frames}OSError: gone\n")
    assert len(lines) == 12
    assert lines[-1] == "OSError: gone"


def test_reason_without_traceback_is_the_end() -> None:
    assert reason("a\n\nServer at x is not ready. Exiting.\n") == [
        "a",
        "Server at x is not ready. Exiting.",
    ]
