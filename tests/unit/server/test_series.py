"""What a server measures of itself, from the text of `/metrics` as SGLang 0.5.23 writes it."""

from __future__ import annotations

import socket
import time
from types import SimpleNamespace
from typing import Any

import pytest

from pytest_sglprof._server.client import SglangClient
from pytest_sglprof._server.log_lines import ServerFacts, SyncWait, read_log_facts
from pytest_sglprof._server.series import between, read_totals, watch_series

LABELS = 'engine_type="unified",model_name="m",moe_ep_rank="{0}",pp_rank="0",tp_rank="{0}"'
DAY = "2026-11-24 03:13:"


def waits(dp: int, total: float, counts: tuple[int, int, int]) -> str:
    """A histogram. counts: of waits up to 0.05 s, up to 0.1 s, and all."""
    name, labels = "sglang:dp_attention_sync_wait_seconds", LABELS.format(dp)
    labels = f'dp_rank="{dp}",{labels}'
    bounds = zip(("0.05", "0.1", "+Inf"), counts, strict=True)
    return "\n".join(
        [
            f"# HELP {name} Wall time of this DP rank's scheduler MLP-sync all-gather per step.",
            f"# TYPE {name} histogram",
            *(f'{name}_bucket{{le="{bound}",{labels}}} {float(count)}' for bound, count in bounds),
            f"{name}_count{{{labels}}} {float(counts[-1])}",
            f"{name}_sum{{{labels}}} {total}",
        ]
    )


def balance(mode: str, total: float, count: int) -> str:
    labels = f'forward_mode="{mode}",{LABELS.format(0)}'
    return (
        f"sglang:eplb_balancedness_count{{{labels}}} {float(count)}\n"
        f"sglang:eplb_balancedness_sum{{{labels}}} {total}\n"
        f"sglang:eplb_balancedness_created{{{labels}}} 1.7e+09"
    )


def facts(before: list[str], after: list[str]) -> ServerFacts:
    return between(*(read_totals("\n".join(lines) + "\n") for lines in (before, after)))


def test_waits_are_means_over_the_passes_between_two_answers() -> None:
    found = facts(
        [waits(0, 7.0, (80, 90, 100)), waits(1, 1.0, (100, 100, 100))],
        [waits(0, 7.5, (320, 340, 350)), waits(1, 1.05, (350, 350, 350))],
    )
    assert found.sync_waits == (
        SyncWait(0, pytest.approx(0.002), 250, 0),
        SyncWait(1, pytest.approx(0.0002), 250, 0),
    )
    assert found.balancedness is None


def test_waits_above_a_tenth_of_a_second_are_counted() -> None:
    found = facts([waits(0, 0.0, (0, 0, 0))], [waits(0, 3.1, (95, 97, 100))])
    assert found.sync_waits == (SyncWait(0, pytest.approx(0.031), 100, 3),)


def test_balancedness_is_a_mean_over_passes_of_all_modes() -> None:
    found = facts(
        [balance("DECODE", 9.0, 10)],
        [balance("DECODE", 39.0, 60), balance("EXTEND", 8.0, 10)],
    )
    assert found.balancedness == pytest.approx((30.0 + 8.0) / 60)
    assert found.sync_waits == ()


@pytest.mark.parametrize(
    "after",
    [
        [],
        [waits(0, 7.0, (100, 100, 100))],  # no pass since
        [waits(0, 0.1, (5, 5, 5))],  # another server by now
        [waits(0, 7.1, (101, 101, 101)).replace('dp_rank="0",', "")],  # no rank of it known
        ['sglang:dp_attention_sync_wait_seconds_sum{dp_rank="0"} NaN'],
        ["sglang:eplb_balancedness_count x", "sglang:eplb_balancedness_sum 1.0"],
    ],
)
def test_without_new_passes_nothing_is_known(after: list[str]) -> None:
    assert facts([waits(0, 7.0, (100, 100, 100))], after) == ServerFacts()


def test_the_log_tells_the_balance_of_the_passes_of_a_window() -> None:
    def line(second: str, balancedness: float) -> str:
        return (
            f"[{DAY}{second} TP0 EP0] [Expert Balancedness] forward_pass_id=12 "
            f"current_pass_balancedness={balancedness:.03f} last_10_average_balancedness=0.111 "
            "gpu_physical_count_sum=64"
        )

    lines = [line("10", 0.1), line("20.500", 0.6), line("21", 0.7), line("22", 0.0)]
    entire = read_log_facts(lines, 0.0)
    assert entire.balancedness == pytest.approx((0.1 + 0.6 + 0.7) / 3)
    opened = time.mktime(time.strptime(f"{DAY}20", "%Y-%m-%d %H:%M:%S"))
    assert read_log_facts(lines, 0.0, opened).balancedness == pytest.approx(0.65)
    assert read_log_facts(lines, 0.0, opened + 100) == ServerFacts()


def server(**info: Any) -> Any:
    """What a watch knows of a server, which nobody reaches."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    return SimpleNamespace(info=info, client=SglangClient(f"http://127.0.0.1:{port}"))


def test_metrics_that_cannot_be_read_are_a_note() -> None:
    watch = watch_series(server(enable_metrics=True, enable_dp_attention=True))
    assert watch is not None
    found, (note,) = watch.finish()
    assert found == ServerFacts()
    assert note.startswith("the server's metrics are left out: http://127.0.0.1:")


@pytest.mark.parametrize(
    ("info", "is_asked"),
    [
        ({}, False),
        ({"enable_dp_attention": True}, False),
        ({"enable_metrics": True}, False),
        ({"enable_metrics": True, "expert_balancedness_report_mode": "server_log"}, False),
        ({"enable_metrics": True, "expert_balancedness_report_mode": "both"}, True),
        ({"enable_metrics": False, "expert_balancedness_report_mode": "both"}, False),
    ],
)
def test_only_a_server_with_such_series_is_asked(info: dict[str, Any], is_asked: bool) -> None:
    assert (watch_series(server(**info)) is not None) == is_asked
