"""The load driver against a running stand-in."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pytest_sglprof.standin import load_driver
from pytest_sglprof.standin.load_driver import main
from tests.support.running import Running, standin

SHAPE = ["--num-prompts", "6", "--random-input-len", "8", "--random-output-len", "5"]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("load")
    with standin(folder, "--api-key", "secret", "--step-ms", "1", "--dp", "2") as running:
        yield running


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    monkeypatch.setattr(load_driver, "SETTLE_S", 0.01)


def run(server: Running, folder: Path, *more: str) -> dict[str, Any]:
    file = folder / "result.jsonl"
    line = ["--base-url", server.url, "--random-range-ratio", "1.0", *SHAPE]
    assert main([*line, "--output-file", str(file), *more]) == 0
    result: dict[str, Any] = json.loads(file.read_text().splitlines()[-1])
    return result


@pytest.mark.parametrize(
    "more",
    [
        [],
        ["--max-concurrency", "2"],
        ["--disable-stream"],
        ["--tokenize-prompt"],
        ["--backend", "sglang-oai"],
        ["--backend", "sglang-oai-chat"],
        ["--backend", "sglang-oai-chat", "--disable-stream"],
        ["--request-rate", "200", "--flush-cache", "--top-p", "0.5"],
    ],
)
def test_every_way_completes_all_requests(server: Running, tmp_path: Path, more: list[str]) -> None:
    result = run(server, tmp_path, *more)
    assert result["completed"] == 6
    assert result["total_output_tokens"] == 30
    assert result["total_input_tokens"] == 48
    assert 0 < result["mean_ttft_ms"] <= result["mean_e2e_latency_ms"] or "stream" in str(more)
    assert result["server_info"]["dp_size"] == 2


def test_extra_body_and_headers_reach_the_server(server: Running, tmp_path: Path) -> None:
    before = len(server.lines(r" DP1\] Prefill"))
    run(server, tmp_path, "--extra-request-body", '{"routed_dp_rank": 1}', "--header", "X-A=b")
    assert len(server.lines(r" DP1\] Prefill")) > before
    tail = server.lines("Prefill batch")[-2:]
    assert all(" DP1]" in line for line in tail)


def test_failed_requests_end_with_status_0_and_are_counted(
    server: Running, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = ["--extra-request-body", '{"routed_dp_rank": 9}', "--warmup-requests", "0"]
    result = run(server, tmp_path, *bad, "--output-details", "--tag", "t")
    assert result["completed"] == 0
    assert result["tag"] == "t"
    assert len(result["errors"]) == 6
    assert "out of range" in capsys.readouterr().out


def test_a_failed_warm_up_ends_with_status_1(
    server: Running, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = ["--base-url", server.url, *SHAPE, "--extra-request-body", '{"routed_dp_rank": 9}']
    assert main(line) == 1
    assert "Warmup failed" in capsys.readouterr().out


def test_without_the_key_the_server_never_gets_ready(
    server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OPENAI_API_KEY")
    assert main(["--base-url", server.url, "--ready-check-timeout-sec", "1"]) == 1
