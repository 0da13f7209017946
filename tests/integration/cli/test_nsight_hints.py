"""`sglprof export --to nsight`, held against SQL."""

from __future__ import annotations

import json
import sqlite3
from pathlib import Path

import pytest

from pytest_sglprof._cli.main import main

QUERY = """
    select (globalPid >> 24) & 0xFFFFFF, deviceId, streamId, count(*), sum("end" - start)
    from CUPTI_ACTIVITY_KIND_KERNEL group by 1, 2, 3
"""
HINTS = ("export", "--to", "nsight")
Output = pytest.CaptureFixture[str]


@pytest.mark.parametrize("name", ["mfu_2gpu_before", "mfu_2gpu_after"])
def test_every_stream_of_every_process(shared_data: Path, capsys: Output, name: str) -> None:
    report = shared_data / "nsys" / f"{name}.sqlite"
    with sqlite3.connect(f"file:{report}?mode=ro&immutable=1", uri=True) as database:
        truth = sorted(database.execute(QUERY).fetchall())
    words = [str(report), "--rank", f"{truth[0][0]}=TP0"]
    assert main([*HINTS, *words, "--format", "json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    keys = ("pid", "device", "stream", "kernels", "total_ns")
    assert sorted(tuple(row[key] for key in keys) for row in rows) == truth
    assert {row["rank"] for row in rows if row["pid"] == truth[0][0]} == {"TP0"}
    assert main([*HINTS, *words]) == 0
    text = capsys.readouterr().out
    pid, device, stream, _, _ = truth[0]
    assert f"Processes > [{pid}] > CUDA HW (device {device}) > Stream {stream}" in text
    assert "Pin row" in text


def test_a_report_without_kernels(shared_data: Path, capsys: Output) -> None:
    report = shared_data / "nsys" / "sglang_cpu_tp2_win_b.sqlite"
    assert main([*HINTS, str(report), "--format", "json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out) == []
    assert "no kernels in sglang_cpu_tp2_win_b.sqlite" in err


def test_what_is_wrong_is_said(tmp_path: Path, capsys: Output) -> None:
    trace = tmp_path / "1-TP-0.trace.json"
    trace.write_text("{}")
    assert main([*HINTS, str(trace)]) == 2
    assert "sglprof export --to perfetto" in capsys.readouterr().err
    assert main([*HINTS, str(trace), "--rank", "TP0"]) == 2
    assert "PID=LABEL" in capsys.readouterr().err
