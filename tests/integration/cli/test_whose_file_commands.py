"""`sglprof check` and `kernels` on files whose names tell the rank in other ways than SGLang's."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pytest_sglprof._cli.main import main
from tests.support.kineto import KERNELS, document, write

Output = pytest.CaptureFixture[str]

VLLM = "dp{dp}_pp0_tp{tp}_dcp0_ep{rank}_rank{rank}.1771.pt.trace.json"


@pytest.fixture(scope="module")
def makers(shared_data: Path) -> Path:
    """The folder of the scripts that write traces for tests."""
    folder = shared_data.parent / "cases" / "traces"
    if not folder.is_dir():
        pytest.skip("no makers of traces beside the real data")
    return folder


def make(makers: Path, path: Path, rank: int, world: int, slow: float, flags: str) -> None:
    path.parent.mkdir(exist_ok=True)
    words = [str(path), str(rank), str(world), str(slow), flags]
    subprocess.run([sys.executable, makers / "make_named.py", *words], check=True)


def kernels(capsys: Output, *words: str) -> tuple[dict[str, int], str]:
    """The kernel time of each rank, ns, and what was written to stderr."""
    assert main(["kernels", *words, "--by", "rank", "--format", "json"]) == 0
    out, err = capsys.readouterr()
    return {row["rank"]: row["total_ns"] for row in json.loads(out)}, err


def check(capsys: Output, *words: str) -> dict[str, Any]:
    main(["check", *words, "--format", "json"])
    document: dict[str, Any] = json.loads(capsys.readouterr().out)
    return document


def test_vllm_s_replicas_are_not_four_tensor_ranks(
    makers: Path, tmp_path: Path, capsys: Output
) -> None:
    window = tmp_path / "w"
    for rank in range(4):
        name = VLLM.format(dp=rank // 2, tp=rank % 2, rank=rank)
        slow = 1.3 if rank > 1 else 1.0  # the second replica has more work: that is no slow rank
        make(makers, window / name, rank, 4, slow, "steps,dist")
    make(makers, window / "host_12.async_llm.1771.pt.trace.json", 0, 1, 1.0, "steps")
    times, err = kernels(capsys, str(window))
    assert times == {
        "DP0 TP0": 6_000_000, "DP0 TP1": 6_000_000, "DP1 TP0": 7_800_000, "DP1 TP1": 7_800_000
    }  # fmt: skip
    assert "note: host_12.async_llm.1771.pt.trace.json is left out" in err
    judged = check(capsys, str(window), "--limit", "1.1", "--min-steps", "30")
    assert judged["verdict"] == "pass"
    assert [group["group"] for group in judged["checks"][0]["groups"]] == ["DP0", "DP1"]


def test_numbered_traces_are_refused_until_somebody_names_them(
    makers: Path, tmp_path: Path, capsys: Output
) -> None:
    for rank in (0, 1):
        make(makers, tmp_path / f"trace_{rank}.json", rank, 2, 1.0 + 0.3 * rank, "steps")
    words = ["check", str(tmp_path), "--limit", "1.1", "--min-steps", "30"]
    assert main(words) == 2
    assert "trace_0.json has no rank" in capsys.readouterr().err
    given = ["--rank", "trace_0.json=TP5", "--rank", f"{tmp_path / 'trace_1.json'}=TP4"]
    judged = check(capsys, *words[1:], *given)
    assert (judged["verdict"], judged["checks"][0]["slowest"]) == ("fail", "TP4")
    assert kernels(capsys, str(tmp_path), *given)[0] == {"TP4": 7_800_000, "TP5": 6_000_000}
    assert main([*words, "--rank", "trace_7.json=TP0"]) == 2
    assert "the rank of trace_7.json is given as TP0, but 0 of" in capsys.readouterr().err


def test_reports_a_rank_and_a_node(cases: Path, capsys: Output) -> None:
    times, _ = kernels(capsys, str(cases / "nsys_report_a_rank"))
    assert times == {"TP0": 20_000, "TP1": 24_000}
    alone, _ = kernels(capsys, str(cases / "nsys_report_a_rank" / "rank1.sqlite"))
    assert alone == {"TP1": 24_000}
    times, _ = kernels(capsys, str(cases / "nsys_two_nodes"))
    assert times == {
        "node0 GPU0": 20_000, "node0 GPU1": 22_000, "node1 GPU0": 24_000, "node1 GPU1": 26_000
    }  # fmt: skip
    judged = check(capsys, str(cases / "nsys_report_a_rank"), "--min-steps", "0")
    assert judged["checks"][0]["slowest"] == "TP1"
    judged = check(capsys, str(cases / "nsys_two_nodes"), "--min-steps", "0")
    assert judged["checks"][0]["slowest"] == "node1 GPU1"


def test_reports_of_processes_on_one_device_stay_apart(cases: Path, capsys: Output) -> None:
    for name, count in (("nsys_mps_two_processes", 2), ("nsys_visible_devices", 4)):
        times, _ = kernels(capsys, str(cases / f"{name}.sqlite"))
        assert list(times) == [f"GPU0 pid {100 + at}" for at in range(count)]


@pytest.mark.parametrize(
    ("name", "rank", "total"),
    [("two_contexts_torch", "TP0", 4_400_000), ("nsys_two_contexts.sqlite", "GPU0", 44_000)],
)
def test_two_contexts_lose_nothing(
    cases: Path, name: str, rank: str, total: int, capsys: Output
) -> None:
    times, err = kernels(capsys, str(cases / name))
    assert times == {rank: total}
    assert "excluded" not in err


@pytest.mark.parametrize("words", [["7"], ["=TP0"], ["7="], ["trace.json"], ["trace.json= "]])
def test_a_rank_without_a_label_is_wrong_usage(
    tmp_path: Path, words: list[str], capsys: Output
) -> None:
    trace = write(tmp_path, document(KERNELS))
    assert main(["kernels", str(trace), "--rank", *words]) == 2
    assert "PID=LABEL or FILE=LABEL" in capsys.readouterr().err


def test_a_name_with_an_equals_sign(tmp_path: Path, capsys: Output) -> None:
    path = write(tmp_path, document(KERNELS), "bs=4.json")
    assert kernels(capsys, str(path), "--rank", "bs=4.json=TP3")[0] == {"TP3": 12_252}


def test_a_merged_trace_has_the_given_ranks(tmp_path: Path, capsys: Output) -> None:
    files = [str(write(tmp_path, document(KERNELS), f"trace_{at}.json")) for at in (0, 1)]
    out = tmp_path / "out" / "merged.json"
    out.parent.mkdir()
    words = ["export", "--to", "perfetto", *files, "-o", str(out)]
    assert main(words) == 2
    given = [word for at in (0, 1) for word in ("--rank", f"trace_{at}.json=TP{1 - at}")]
    capsys.readouterr()
    assert main([*words, *given]) == 0
    assert capsys.readouterr().out.splitlines()[:2] == ["TP0: 2 events", "TP1: 2 events"]


def test_a_file_of_the_working_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Output
) -> None:
    """The folder counts also where the path does not name it."""
    folder = tmp_path / "rank3"
    write(folder, document(KERNELS), "trace.json")
    monkeypatch.chdir(folder)
    assert kernels(capsys, "trace.json")[0] == {"TP3": 12_252}
    assert kernels(capsys, os.curdir)[0] == {"TP3": 12_252}
