from __future__ import annotations

import csv
import gzip
import io
import json
import sqlite3
import threading
from fractions import Fraction
from pathlib import Path
from statistics import median
from typing import Any

import pytest

from pytest_sglprof._cli.main import main
from tests.support.kernel_tables import build

LATE = ("check", "--metric", "lateness")
Capsys = pytest.CaptureFixture[str]


def straggler(capsys: Capsys, *words: str) -> tuple[int, dict[str, Any]]:
    """What `--metric lateness` says, with the limit that a finding has by itself."""
    given = () if "--limit" in words else ("--limit", "0.02")
    status = main([*LATE, *words, *given, "--format", "json"])
    document = json.loads(capsys.readouterr().out)
    found: dict[str, Any] = document["stragglers"]
    assert (document["verdict"], document["reason"]) == (found["verdict"], found["reason"])
    return status, {**found, "source": document["source"]}


@pytest.mark.parametrize("name", ["mfu_2gpu_before.sqlite", "mfu_2gpu_after.sqlite"])
def test_two_gpus_that_exchange_by_send_and_receive_meet_in_it(
    shared_data: Path, capsys: Capsys, name: str
) -> None:
    path = shared_data / "nsys" / name
    status, found = straggler(capsys, str(path))
    assert (status, found["straggler"], found["verdict"]) == (3, None, "inconclusive")
    assert "collectives with matched collectives, 50 are needed" in found["reason"]
    assert set(found["kinds"]) == {"all_to_all"}
    assert found["waits_by"] == "arrival"
    with sqlite3.connect(path) as report:
        rows = report.execute(
            "WITH ordered AS (SELECT deviceId, start, end, max(end) OVER (PARTITION BY deviceId "
            "ORDER BY start, end ROWS BETWEEN UNBOUNDED PRECEDING AND 1 PRECEDING) AS reached "
            "FROM CUPTI_ACTIVITY_KIND_KERNEL JOIN StringIds ON id = demangledName "
            "WHERE value NOT LIKE '%nccl%') "
            "SELECT deviceId, sum(max(0, end - max(start, coalesce(reached, start)))), "
            "sum(end - start) FROM ordered GROUP BY deviceId ORDER BY deviceId"
        ).fetchall()
    report.close()
    assert [rank["compute_ns"] for rank in found["ranks"]] == _between_exchanges(path)
    main([*LATE, str(path)])
    apart = "clocks are 15.8 µs apart" if "before" in name else "clocks agree within 7.36 µs"
    assert apart in capsys.readouterr().out
    main(["check", str(path), "--format", "json"])
    ranks = json.loads(capsys.readouterr().out)["checks"][0]["ranks"]
    # Few kernels overlap here; without steps these are of the whole window.
    assert [(rank["busy_ns"], rank["total_ns"]) for rank in ranks] == [row[1:] for row in rows]


def _between_exchanges(path: Path) -> list[int]:
    """Busy time of compute of each GPU between its first and last SendRecv, ns."""
    with sqlite3.connect(path) as report:
        rows = report.execute(
            "SELECT deviceId, start, end, value LIKE '%nccl%' FROM CUPTI_ACTIVITY_KIND_KERNEL "
            "JOIN StringIds ON id = demangledName ORDER BY start"
        ).fetchall()
    report.close()
    sums = []
    for gpu in (0, 1):
        calls = [start for device, start, _, meets in rows if meets and device == gpu]
        inside = [
            row for row in rows if row[0] == gpu and not row[3] and calls[0] <= row[1] < calls[-1]
        ]
        reached = busy = 0
        for _, start, end, _ in inside:
            busy += max(0, end - max(start, reached))
            reached = max(reached, end)
        sums.append(busy)
    return sums


def test_one_rank_has_nobody_to_wait_for(shared_data: Path, capsys: Capsys) -> None:
    for path in sorted((shared_data / "torch" / "sglang-mi300x").glob("*.json.gz")):
        status, found = straggler(capsys, str(path))
        assert (status, found["straggler"]) == (3, None)
        assert found["reason"] == "TP0 is the only rank, so it waits for nobody"


def _all_reduces(path: Path) -> list[tuple[int, int]]:
    """(start, end) in ns of the all-reduces inside of steps, by plain json and fractions."""
    document = json.loads(gzip.decompress(path.read_bytes()), parse_float=Fraction)
    base = int(document["baseTimeNanoseconds"])
    events = [event for event in document["traceEvents"] if event.get("ph") == "X"]

    def spans(begin: str) -> list[tuple[int, int]]:
        mine = [event for event in events if event["name"].startswith(begin)]
        times = [(base + int(e["ts"] * 1000), int(e["dur"] * 1000)) for e in mine]
        return sorted((start, start + dur) for start, dur in times)

    steps = spans("step[")
    found = [*spans("gloo:all_reduce"), *spans("gloo:all_gather")]
    return sorted(f for f in found if any(s[0] <= f[0] < s[1] for s in steps))


def test_waits_of_a_real_server_are_those_of_its_files(shared_data: Path, capsys: Capsys) -> None:
    files = sorted((shared_data / "torch" / "sglang-cpu-tp2").glob("1*-TP-*.json.gz"))
    status, found = straggler(capsys, *map(str, files), "--min-steps", "5")
    ranks = [_all_reduces(path) for path in files]
    assert len(ranks[0]) == len(ranks[1]) == found["collectives"]
    durations = [[end - start for start, end in rank] for rank in ranks]
    pairs = list(zip(*durations, strict=True))
    assert found["transfer_ns"] == median(min(pair) for pair in pairs)
    # By durations, which need no clock, the waits are about those that arrivals give.
    slack = found["clock_uncertainty_ns"] * len(pairs)
    for at in (0, 1):
        by_duration = sum(pair[at] - min(pair) for pair in pairs[1:])
        assert found["ranks"][at]["wait_ns"] == pytest.approx(by_duration, abs=slack)
    assert found["waits_by"] == "arrival"
    assert status == 3  # five steps of two ranks cannot be significant
    assert found["straggler"] is None


@pytest.mark.parametrize("name", ["sglang-cpu-tp2-nostack", "sglang-cpu-mixtral-tp2ep2"])
def test_waits_by_duration_are_those_of_the_files(
    shared_data: Path, capsys: Capsys, name: str
) -> None:
    files = sorted((shared_data / "torch" / name).glob("*.json.gz"))
    status, found = straggler(capsys, *map(str, files), "--min-steps", "5")
    durations = [[end - start for start, end in _all_reduces(path)] for path in files]
    pairs = list(zip(*durations, strict=True))
    assert (len(pairs), found["unmatched"]) == (found["collectives"], 0)
    assert found["waits_by"] == "duration"
    assert found["transfer_ns"] == median(min(pair) for pair in pairs)
    for at in (0, 1):
        waited = sum(pair[at] - min(pair) for pair in pairs[1:])
        assert found["ranks"][at]["wait_ns"] == waited
    assert (status, found["straggler"]) == (3, None)
    assert found["reason"]


def test_a_report_without_communication_blames_nobody(shared_data: Path, capsys: Capsys) -> None:
    path = shared_data / "nsys" / "sglang_cpu_tp2_win_b.sqlite"
    status, found = straggler(capsys, str(path))
    assert (status, found["straggler"], found["collectives"]) == (3, None, 0)
    assert found["reason"] == "no communication was recorded"


def test_every_form_on_the_stand_in_names_the_slow_rank(tmp_path: Path, capsys: Capsys) -> None:
    folder = _window(tmp_path, "--slow", "rank=1,category=moe,factor=1.4")
    status, found = straggler(capsys, str(folder))
    assert (status, found["straggler"], found["verdict"]) == (1, "TP1", "fail"), found["reason"]
    assert found["cause"] == "kernel"
    first, second = found["ranks"]
    assert second["wait_ns"] < first["wait_ns"]
    assert "moe" in second["kernels"][0]["name"]
    assert main([*LATE, str(folder), "--limit", "0.02"]) == 1
    text = capsys.readouterr().out
    assert text.startswith("fail: TP1 arrives ")
    assert "ranks that arrive early wait inside the collective" in text
    assert main([*LATE, str(folder), "--limit", "0.02", "--format", "csv"]) == 1
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [(row["rank"], row["straggler"]) for row in rows] == [("TP0", "TP1"), ("TP1", "TP1")]
    assert main([*LATE, str(folder), "--limit", "0.9"]) == 0
    capsys.readouterr()
    assert main([*LATE, str(folder)]) == 0
    assert capsys.readouterr().out.startswith("measured: TP1 arrives ")
    assert main(["check", str(folder)]) == 0
    text = capsys.readouterr().out
    assert text.startswith("measured: TP1 is ")
    assert "\nmeasured: TP1 arrives " in text


def test_a_balanced_stand_in_has_no_straggler(tmp_path: Path, capsys: Capsys) -> None:
    status, found = straggler(capsys, str(_window(tmp_path)))
    assert (status, found["straggler"], found["verdict"]) == (0, None, "pass"), found["reason"]


def _window(folder: Path, *faults: str) -> Path:
    """The folder of a window of 40 steps on a stand-in of two ranks under load."""
    import httpx

    from pytest_sglprof._config.model import ServerSpec, WindowSpec
    from pytest_sglprof._run.window import Window
    from pytest_sglprof._server.launch import launch

    spec = ServerSpec(kind="standin", args=("--tp", "2"), standin_args=("--step-ms", "4", *faults))
    server = launch(spec, folder=folder / "server")
    try:
        request = {"text": "x " * 20, "sampling_params": {"max_new_tokens": 400}}
        send = threading.Thread(
            target=lambda: httpx.post(f"{server.url}/generate", json=request, timeout=60)
        )
        where = folder / "window"
        window = Window(server, WindowSpec(num_steps=60, timeout=60), where)
        window.open()
        send.start()
        window.wait()
        closed = window.close()
        send.join()
        assert closed.state == "complete", closed.reason
        return closed.artifacts[0].path.parent
    finally:
        assert server.stop() == ()


def test_no_rank_at_all_is_inconclusive(monkeypatch: pytest.MonkeyPatch, capsys: Capsys) -> None:
    monkeypatch.setattr("pytest_sglprof._trace.read.read_window", lambda *a, **k: build(()))
    for form in ("json", "csv", "table"):
        assert main([*LATE, "window", "--format", form]) == 3
    capsys.readouterr()


@pytest.mark.parametrize("words", [["--limit", "1"], ["--min-steps", "0"]])
def test_nonsense_is_refused(words: list[str], capsys: Capsys) -> None:
    assert main([*LATE, "window", *words]) == 2
    assert "must be" in capsys.readouterr().err
