"""Two ranks as torch trace files, one with twice the work in some kernels."""

from __future__ import annotations

import gzip
import json
import random
from pathlib import Path
from typing import Any

import pytest

from pytest_sglprof._analysis.straggler import stragglers
from pytest_sglprof._cli.main import main
from pytest_sglprof._trace.read import read_window
from tests.support.kineto import Event, document, event, kernel, write

STEPS = 50
LAYERS = 2
COLLECTIVE = "ncclDevKernel_AllReduce_Sum_bf16_RING_LL"
TRANSFER_US = 15.0
# (name, µs on rank 0, times as long on rank 1)
KERNELS = (
    ("void flash_fwd_kernel<128>(Params)", 60.0, 1),
    ("nvjet_tst_128x64_64x8_2x1_v_bz_TNT", 40.0, 2),
    ("fused_moe_kernel", 80.0, 2),
    ("void rms_norm_kernel<bf16>(int)", 10.0, 1),
)
SLOWER = [name for name, _, factor in sorted(KERNELS, key=lambda k: -k[1]) if factor > 1]


def rank_events() -> tuple[list[Event], list[Event]]:
    """Each layer both compute, then meet: who is early waits inside the all-reduce."""
    dice = random.Random(7)
    events: tuple[list[Event], list[Event]] = ([], [])
    now, correlation = 100.0, 0
    for step in range(STEPS):
        begin = now
        for _ in range(LAYERS):
            arrivals = []
            for rank, found in enumerate(events):
                at = now
                for name, us, factor in KERNELS:
                    dur = round(us * (factor if rank else 1) * dice.uniform(0.97, 1.03), 3)
                    correlation += 1
                    found.append(launch(begin, correlation))
                    found.append(kernel(name, round(at, 3), dur, correlation=correlation))
                    at += dur + 1.0
                arrivals.append(round(at, 3))
            end = max(arrivals) + TRANSFER_US
            correlation += 1
            for found, at in zip(events, arrivals, strict=True):
                found.append(launch(begin, correlation))
                dur = round(end - at, 3)
                found.append(kernel(COLLECTIVE, at, dur, correlation=correlation))
            now = end + 1.0
        for found in events:
            text = f"step[DECODE bs=8 forward_id={step}]"
            found.append(event("user_annotation", text, begin, 5.0, 5, 5))
        now += 20.0
    return events


def launch(begin: float, correlation: int) -> Event:
    at = round(begin + 1, 3)
    return event("cuda_runtime", "cudaLaunchKernel", at, 1, 5, 5, correlation=correlation)


LATE = ("check", "--metric", "lateness", "--limit", "0.02")


@pytest.fixture(scope="module")
def window(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("window")
    for rank, events in enumerate(rank_events()):
        write(folder, document(events, rank=rank), f"1-TP-{rank}.trace.json.gz")
    return folder


def plain(window: Path, rank: int) -> list[tuple[str, int, int]]:
    """(name, start, dur) in ns of a rank's kernels in order of time, by plain json."""
    data = gzip.decompress((window / f"1-TP-{rank}.trace.json.gz").read_bytes())
    found = [
        (str(e["name"]), round(e["ts"] * 1000), round(e["dur"] * 1000))
        for e in json.loads(data)["traceEvents"]
        if e["cat"] == "kernel"
    ]
    return sorted(found, key=lambda entry: entry[1])


@pytest.fixture
def found(window: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    assert main([*LATE, str(window), "--format", "json"]) == 1
    document: dict[str, Any] = json.loads(capsys.readouterr().out)["stragglers"]
    return document


def test_the_rank_with_twice_the_work_is_named(found: dict[str, Any]) -> None:
    assert (found["straggler"], found["verdict"], found["cause"]) == ("TP1", "fail", "kernel")
    assert (found["steps"], found["collectives"]) == (STEPS, STEPS * LAYERS)
    assert found["unmatched"] == 0
    first, second = found["ranks"]
    assert second["wait_ns"] < first["wait_ns"]
    assert second["explained_share"] == pytest.approx(1.0)
    assert second["slowest_share"] == 1.0


def test_its_kernels_come_by_what_they_contribute(window: Path, found: dict[str, Any]) -> None:
    sums: dict[str, list[int]] = {}
    for rank in (0, 1):
        # Before the first meeting nobody knows when the ranks set out.
        for name, _, dur in plain(window, rank)[len(KERNELS) + 1 :]:
            sums.setdefault(name, [0, 0])[rank] += dur
    expected = {name: times[1] - times[0] for name, times in sums.items()}
    kernels = found["ranks"][1]["kernels"]
    contributions = [entry["ns"] for entry in kernels]
    assert contributions == sorted(contributions, reverse=True)
    for entry, name in zip(kernels, SLOWER, strict=False):
        assert entry["name"] in name
        assert entry["ns"] == expected[name]
    assert len(kernels) >= len(SLOWER)


def test_waits_and_compute_are_those_of_the_files(window: Path, found: dict[str, Any]) -> None:
    ranks = [plain(window, rank) for rank in (0, 1)]
    meets = [[entry for entry in rank if entry[0] == COLLECTIVE] for rank in ranks]
    slack = found["clock_uncertainty_ns"] * STEPS * LAYERS
    assert slack <= 0.001 * found["ranks"][0]["wait_ns"]
    latest = [max(pair[0][1], pair[1][1]) for pair in zip(*meets, strict=True)]
    for rank in (0, 1):
        waited = sum(last - entry[1] for last, entry in zip(latest, meets[rank], strict=True))
        # The first meeting tells where the first segment begins; its wait is not counted.
        waited -= latest[0] - meets[rank][0][1]
        assert found["ranks"][rank]["wait_ns"] == pytest.approx(waited, abs=slack)
        after = meets[rank][0][1]
        compute = sum(
            dur for name, start, dur in ranks[rank] if name != COLLECTIVE and start > after
        )
        assert found["ranks"][rank]["compute_ns"] == compute
        assert found["ranks"][rank]["total_ns"] == sum(dur for _, _, dur in ranks[rank])
    assert found["transfer_ns"] == pytest.approx(TRANSFER_US * 1000, abs=2)


def test_sums_of_all_kernels_mislead_and_are_shown(
    window: Path, found: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    totals = [sum(dur for _, _, dur in plain(window, rank)) for rank in (0, 1)]
    difference = (max(totals) - min(totals)) / max(totals)
    assert difference < 0.15
    assert found["totals_difference"] == pytest.approx(difference)
    assert main([*LATE, str(window)]) == 1
    text = capsys.readouterr().out
    assert f"sums of all kernels differ by {100 * difference:.1f} % only" in text


def test_the_table_gives_the_same_answer(window: Path, found: dict[str, Any]) -> None:
    (finding,) = stragglers(read_window(window))
    assert finding.straggler == found["straggler"]
    assert [rank.wait_ns for rank in finding.ranks] == [r["wait_ns"] for r in found["ranks"]]


def test_calls_that_may_be_transfers_between_stages_are_not_used_and_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of two ranks without a place, SendRecv may be either; of TP0 and TP1 it is an all-to-all."""
    for rank, events in enumerate(rank_events()):
        named = [
            {**each, "name": "ncclDevKernel_SendRecv"} if each["name"] == COLLECTIVE else each
            for each in events
        ]
        write(tmp_path, document(named), f"{'ab'[rank]}.json")
    given = [f"--rank={file}.json" for file in "ab"]
    words = [*LATE, str(tmp_path)]
    assert main([*words, f"{given[0]}=GPU0", f"{given[1]}=GPU1"]) == 3
    assert f"not used: {2 * STEPS * LAYERS} calls that may be p2p or" in capsys.readouterr().out
    assert main([*words, f"{given[0]}=TP0", f"{given[1]}=TP1"]) == 1
    out = capsys.readouterr().out
    assert "TP1 arrives" in out
    assert "not used" not in out
    assert "clocks agree within 0 ns" in out
