"""What the server's log tells of forward passes; the lines are those of SGLang 0.5.23."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from pytest_sglprof._server.log_lines import AcceptLength, ServerFacts, read_log_facts

DAY = "2026-11-24 03:13:"


def at(second: float) -> float:
    return time.mktime(time.strptime(f"{DAY}00", "%Y-%m-%d %H:%M:%S")) + second


def test_rebalances_of_all_ranks_are_one_span() -> None:
    lines = [
        f"[{DAY}10 TP0 EP0] [EPLBManager] rebalance start",
        f"[{DAY}11 TP1 EP1] [EPLBManager] rebalance start",
        f"[{DAY}12 TP0 EP0] [EPLBManager] rebalance end time=1.500s",
        f"[{DAY}12 TP1 EP1] [EPLBManager] rebalance end",
        f"[{DAY}30.250 TP0 EP0] [EPLBManager] rebalance start",
        f"[{DAY}30.750 TP0 EP0] [EPLBManager] rebalance end time=0.5s",
        f"[{DAY}50 TP0 EP0] [EPLBManager] rebalance start",
        f"[{DAY}51 TP0] [EPLBManager] system started, will rebalance per 1000 iterations.",
    ]
    facts = read_log_facts(lines, at(55.0))
    # A stamp without milliseconds is the beginning of its second: an end may be 1 s later.
    assert facts.rebalances == (
        (at(10), at(13)),
        (pytest.approx(at(30.25)), pytest.approx(at(30.75))),
        (at(50), at(55)),
    )


def test_accept_lengths_are_those_of_decode_lines() -> None:
    head = "Decode batch, #running-req: 1, #token: 70, token usage: 0.00, "
    lines = [
        f"[{DAY}10 TP0] {head}accept len: 2.35, accept rate: 0.45, cpu graph: False",
        f"[{DAY}11 DP1 TP0] {head}block accept len: 9.00, accept len: 3.00, accept rate: 0.5,",
        f"[{DAY}12 TP0] {head}gen throughput (token/s): 0.19",
        f"[{DAY}12 TP0] somebody said accept len: 8.00",
        "accept len: 7.00",
    ]
    assert read_log_facts(lines, at(20)) == ServerFacts(
        accepted=(AcceptLength(at(11), None, 2.35), AcceptLength(at(12), 1, 3.0))
    )


def test_captures() -> None:
    lines = [
        f"[{DAY}10 TP0] Capture target decode CUDA graph begin. avail mem=1.00 GB",
        f"[{DAY}11 TP0] Capture target decode CUDA graph end. elapsed=1.00 s",
    ]
    assert read_log_facts(lines, at(20)) == ServerFacts(captures=1)


@pytest.mark.parametrize("name", ["tp2", "tp2dp2", "mixtral_tp2ep2.log"])
def test_real_logs_without_any_of_it_tell_nothing_wrong(shared_data: Path, name: str) -> None:
    path = shared_data / "logs" / name
    text = (path / "server.log" if path.is_dir() else path).read_text(errors="replace")
    facts = read_log_facts(text.splitlines(), time.time())
    assert (facts.rebalances, facts.accepted) == ((), ())
