"""Kernels that were launched but not recorded: counted, left out, or a reason for no verdict.

The traces are written here in Kineto's layout, so that what is lost is known exactly.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pytest_sglprof._config.model import Threshold
from pytest_sglprof._trace.completeness import CALLS, GRAPH_LAUNCH, KERNEL_LAUNCH
from pytest_sglprof._trace.read import read_window
from pytest_sglprof._trace.table import KernelTable
from pytest_sglprof._trace.torch import assemble
from pytest_sglprof._verdict.judge import Verdict, judge

STEPS, CALLS_A_STEP, FAN_OUT = 80, 5, 60
LIMIT = Threshold(metric="slowdown", limit=1.10, scope="compute")
Lost = Callable[[int, int], bool]


def nothing(step: int, number: int) -> bool:
    return False


def events(*, slow: float, lost: Lost, graphs: bool, call: str) -> Iterator[dict[str, Any]]:
    """One launch in each call, or, with `graphs`, one graph launch in each step.

    lost: whether the kernel with this number of this step was not recorded.
    """
    for step in range(STEPS):
        at = 1000.0 + step * 4000.0
        span = {"ph": "X", "cat": "user_annotation", "pid": 1, "tid": 1, "ts": at, "dur": 3000.0}
        yield {
            **span,
            "name": f"step[DECODE bs=8 forward_id={step}]",
            "args": {"External id": step},
        }
        count = FAN_OUT if graphs else CALLS_A_STEP
        for number in range(count):
            correlation = 1 + step * count + (0 if graphs else number)
            launch = {"ph": "X", "cat": "cuda_runtime", "name": call, "pid": 1, "tid": 1}
            if number == 0 or not graphs:
                args = {"correlation": correlation}
                yield {**launch, "ts": at + 10 + number, "dur": 1.0, "args": args}
            if lost(step, number):
                continue
            long = 30.0 * slow
            kernel = {"ph": "X", "cat": "kernel", "name": f"gemm_{number}", "pid": 0, "tid": 7}
            args = {"device": 0, "stream": 7, "correlation": correlation}
            yield {**kernel, "ts": at + 100 + number * 45.0, "dur": long, "args": args}


def window(
    folder: Path, *, slow: float = 1.0, lost: Lost = nothing, graphs: bool = False, call: str = ""
) -> KernelTable:
    """Two ranks; TP1 is `slow` times slower and lost what `lost` says."""
    call = call or ("cudaGraphLaunch" if graphs else "cudaLaunchKernel")
    for rank, (factor, gone) in enumerate([(1.0, nothing), (slow, lost)]):
        listed = list(events(slow=factor, lost=gone, graphs=graphs, call=call))
        path = folder / f"w-TP-{rank}.trace.json"
        path.write_text(json.dumps({"traceEvents": listed}))
    return read_window(folder)


def verdict(table: KernelTable) -> Verdict:
    return judge(table, [LIMIT])


@pytest.fixture(params=["decoded", "scanned"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways of reading a file."""
    if request.param == "scanned":
        monkeypatch.setattr(assemble, "SCAN_BYTES", 0)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("graphs", [False, True])
def test_a_whole_window_is_judged_as_ever(tmp_path: Path, graphs: bool) -> None:
    table = window(tmp_path, slow=1.15, graphs=graphs)
    assert (table.incomparable, table.notes) == ("", ())
    assert verdict(table).word == "fail"


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize(
    ("graphs", "text"),
    [
        (False, "TP1: 60 of 400 launches have no kernel (its first 12 steps)"),
        (True, "TP1: 720 of 4,800 launched kernels are missing (its first 12 steps)"),
    ],
)
def test_a_lost_front_is_cut_away_on_every_rank(tmp_path: Path, graphs: bool, text: str) -> None:
    table = window(tmp_path, slow=1.15, lost=lambda step, number: step < 12, graphs=graphs)
    assert table.notes == (f"{text}: judged from step 13 on",)
    judged = verdict(table)
    assert judged.word == "fail"
    assert "TP1 is 1.15x slower" in judged.reason
    assert f"over {STEPS - 12} steps" in judged.reason


def test_a_front_that_ends_within_a_step_takes_that_step_with_it(tmp_path: Path) -> None:
    table = window(tmp_path, slow=1.15, lost=lambda step, number: (step, number) < (12, 2))
    assert "TP1: 62 of 400 launches have no kernel (its first 13 steps)" in table.notes[0]
    assert f"over {STEPS - 13} steps" in verdict(table).reason


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize(
    ("lost", "graphs", "text"),
    [
        (lambda s, n: s < 25, False, "125 of 400 launches have no kernel (its first 25 steps)"),
        (lambda s, n: (s * CALLS_A_STEP + n) % 5 == 4, False, "80 of 400 launches"),
        (lambda s, n: n % 3 == 0, True, "1,600 of 4,800 launched kernels"),  # a whole stream
        (lambda s, n: s % 10 == 5, True, "480 of 4,800 launched kernels are missing (8 steps)"),
        (lambda s, n: s < 12 or s == 40, False, "(its first 12 steps and 1 later steps)"),
    ],
)
def test_more_than_that_is_no_verdict(tmp_path: Path, lost: Lost, graphs: bool, text: str) -> None:
    for slow in (1.0, 1.15):
        judged = verdict(window(tmp_path, slow=slow, lost=lost, graphs=graphs))
        assert judged.word == "inconclusive"
        assert text in judged.reason


def test_a_little_is_said_and_judged(tmp_path: Path) -> None:
    table = window(tmp_path, slow=1.15, lost=lambda s, n: (s, n) == (40, 3), graphs=True)
    assert table.notes == ("TP1: 1 of 4,800 launched kernels are missing (1 steps)",)
    assert verdict(table).word == "fail"


def test_what_is_launched_near_the_end_proves_nothing(tmp_path: Path) -> None:
    """Kineto stops while the last kernels run; those steps are not compared either."""
    table = window(tmp_path, slow=1.15, lost=lambda step, number: step >= STEPS - 2)
    assert (table.notes, table.incomparable) == ((), "")
    judged = verdict(table)
    assert judged.word == "fail"
    assert f"over {STEPS - 2} steps" in judged.reason


def test_without_launches_nothing_is_known(tmp_path: Path) -> None:
    table = window(tmp_path, lost=lambda step, number: step < 12, call="cudaEventRecord")
    assert (table.notes, table.incomparable) == ((), "")


def test_ids_that_have_nothing_in_common_tell_nothing(tmp_path: Path) -> None:
    window(tmp_path)
    path = tmp_path / "w-TP-1.trace.json"
    trace = json.loads(path.read_text())
    for event in trace["traceEvents"]:
        if event["cat"] == "kernel":
            event["args"]["correlation"] += 10**6
    path.write_text(json.dumps(trace))
    table = read_window(tmp_path)
    assert (table.notes, table.incomparable) == ((), "")


def test_kernels_with_impossible_times_are_weighed_like_lost_ones(tmp_path: Path) -> None:
    window(tmp_path, slow=1.15)
    path = tmp_path / "w-TP-1.trace.json"
    trace = json.loads(path.read_text())
    kernels = [event for event in trace["traceEvents"] if event["cat"] == "kernel"]
    for event in kernels[::20]:
        event["dur"] = -1.0
    path.write_text(json.dumps(trace))
    judged = verdict(read_window(tmp_path))
    assert judged.word == "inconclusive"
    assert "TP1: 20 kernels (5.0 %) have times that cannot be" in judged.reason


@pytest.mark.parametrize(
    "name",
    [
        "cudaLaunchKernel", "cudaLaunchKernelExC", "cudaLaunchKernel_ptsz", "cuLaunchKernel",
        "cuLaunchKernelEx", "cudaLaunchCooperativeKernel", "cuLaunchCooperativeKernel",
        "cudaLaunchKernelExC_v11060", "hipLaunchKernel", "hipExtLaunchKernel",
        "hipModuleLaunchKernel", "hipExtModuleLaunchKernel", "hipLaunchCooperativeKernel",
        "hipLaunchKernelExC", "hipDrvLaunchKernelEx",
    ],
)  # fmt: skip
def test_calls_that_launch_one_kernel(name: str) -> None:
    assert [word for word in CALLS if word.match(name)] == [KERNEL_LAUNCH]


@pytest.mark.parametrize("name", ["cudaGraphLaunch", "cuGraphLaunch", "hipGraphLaunch_ptsz"])
def test_calls_that_launch_a_graph(name: str) -> None:
    assert [word for word in CALLS if word.match(name)] == [GRAPH_LAUNCH]


@pytest.mark.parametrize(
    "name",
    [
        "cudaLaunchHostFunc", "cuLaunchHostFunc", "cudaMemcpyAsync", "hipGraphInstantiate",
        "cudaLaunchCooperativeKernelMultiDevice", "cudaLaunchKernelSomething", "",
    ],
)  # fmt: skip
def test_other_calls(name: str) -> None:
    assert not [word for word in CALLS if word.match(name)]


def test_windows_far_apart_are_not_one_window(tmp_path: Path) -> None:
    window(tmp_path, slow=1.15)
    path = tmp_path / "w-TP-1.trace.json"
    trace = json.loads(path.read_text())
    for event in trace["traceEvents"]:
        event["ts"] += 3600e6
    path.write_text(json.dumps(trace))
    judged = verdict(read_window(tmp_path))
    assert judged.word == "inconclusive"
    assert "TP1 begins 3,600 s after TP0 ended" in judged.reason


@pytest.mark.parametrize(("sizes", "word"), [((2, 2), "fail"), ((2, 8), "inconclusive")])
def test_files_of_runs_of_different_sizes(
    tmp_path: Path, sizes: tuple[int, int], word: str
) -> None:
    window(tmp_path, slow=1.15)
    for rank, size in enumerate(sizes):
        path = tmp_path / f"w-TP-{rank}.trace.json"
        trace = json.loads(path.read_text())
        trace["distributedInfo"] = {"rank": rank, "world_size": size}
        path.write_text(json.dumps(trace))
    assert verdict(read_window(tmp_path)).word == word


@pytest.fixture(scope="module")
def cases(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The inputs of ../shared/cases/traces, made anew."""
    maker = shared_data.parent / "cases" / "traces" / "make.py"
    if not maker.is_file():
        pytest.skip("no cases/traces/make.py beside the real data")
    folder = tmp_path_factory.mktemp("cases")
    subprocess.run([sys.executable, maker], cwd=folder, check=True, capture_output=True)
    return folder


@pytest.mark.parametrize(
    ("name", "word", "text"),
    [
        ("lost_front_12_of_80_tp1_slower", "fail", "TP1 is 1.15x slower"),
        ("lost_kernels_one_in_five", "inconclusive", "TP1: 40 of 200 launches have no kernel"),
        ("rocm_overflow_whole", "inconclusive", "TP1: 40 kernels (20.0 %)"),
        ("two_runs", "inconclusive", "TP0 is of a run of 2, TP1 is of a run of 8 processes"),
        ("skew_5s_tp1_late", "fail", "TP1 is 1.50x slower"),
    ],
)
def test_public_reports(cases: Path, name: str, word: str, text: str) -> None:
    table = read_window(cases / name)
    judged = verdict(table)
    assert judged.word == word
    assert text in judged.reason
    if name.startswith("lost_front"):
        assert "TP1: 60 of 400 launches have no kernel (its first 12 steps)" in table.notes[-1]
