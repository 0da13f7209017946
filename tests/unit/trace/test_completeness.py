"""Kernels that were launched but not recorded: counted, left out, or a reason for no verdict.

The traces are written here in Kineto's layout, so that what is lost is known exactly.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pytest_sglprof._analysis.imbalance import imbalance
from pytest_sglprof._analysis.work import Work
from pytest_sglprof._config.model import Threshold
from pytest_sglprof._trace.completeness import CALLS, GRAPH_LAUNCH, KERNEL_LAUNCH, LOST
from pytest_sglprof._trace.read import read_window
from pytest_sglprof._trace.table import KernelTable
from pytest_sglprof._trace.torch import assemble
from pytest_sglprof._verdict.judge import Verdict, judge

STEPS, CALLS_A_STEP, FAN_OUT = 80, 5, 60
LIMIT = Threshold(metric="slowdown", limit=1.10, scope="compute")
Lost = Callable[[int, int], bool]


def nothing(step: int, number: int) -> bool:
    return False


def short(number: int) -> float:
    return 1.0


def events(
    *,
    slow: float,
    lost: Lost,
    graphs: bool,
    call: str,
    count: int = 0,
    long: Callable[[int], float] = short,
    steps: bool = True,
) -> Iterator[dict[str, Any]]:
    """One kernel for each call, or, with `graphs`, one graph launch in each step.

    lost: whether the kernel with this number of this step was not recorded. count: of the kernels
    of a step. long: how many times 30 us each of them takes. steps: whether they are marked.
    """
    count = count or (FAN_OUT if graphs else CALLS_A_STEP)
    for step in range(STEPS):
        at = 1000.0 + step * 4000.0
        span = {"ph": "X", "cat": "user_annotation", "pid": 1, "tid": 1, "ts": at, "dur": 3000.0}
        if steps:
            args = {"External id": step}
            yield {**span, "name": f"step[DECODE bs=8 forward_id={step}]", "args": args}
        begin = at + 100
        for number in range(count):
            correlation = 1 + step * count + (0 if graphs else number)
            launch = {"ph": "X", "cat": "cuda_runtime", "name": call, "pid": 1, "tid": 1}
            if number == 0 or not graphs:
                args = {"correlation": correlation}
                yield {**launch, "ts": at + 10 + number, "dur": 1.0, "args": args}
            dur = 30.0 * slow * long(number)
            start, begin = begin, begin + dur + 10.0
            if lost(step, number):
                continue
            kernel = {"ph": "X", "cat": "kernel", "name": f"gemm_{number}", "pid": 0, "tid": 7}
            args = {"device": 0, "stream": 7, "correlation": correlation}
            yield {**kernel, "ts": start, "dur": dur, "args": args}


def window(
    folder: Path,
    *,
    slow: float = 1.0,
    lost: Lost = nothing,
    graphs: bool = False,
    call: str = "",
    count: int = 0,
    peer_count: int = 0,
    **more: Any,
) -> KernelTable:
    """Two ranks; TP1 is `slow` times slower and lost what `lost` says.

    count, peer_count: kernels of a step of TP1 and of TP0. more: as of `events`.
    """
    more |= {"call": call or ("cudaGraphLaunch" if graphs else "cudaLaunchKernel")}
    more |= {"graphs": graphs}
    ranks = [(1.0, nothing, peer_count or count), (slow, lost, count)]
    for rank, (factor, gone, kernels) in enumerate(ranks):
        listed = list(events(slow=factor, lost=gone, count=kernels, **more))
        path = folder / f"w-TP-{rank}.trace.json"
        path.write_text(json.dumps({"traceEvents": listed}))
    return read_window(folder)


def verdict(table: KernelTable) -> Verdict:
    return judge(table, [LIMIT], min_steps=30)


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
    assert judged.reason.endswith("; judged from step 13 on")
    balanced = verdict(window(tmp_path, lost=lambda step, number: step < 12, graphs=graphs))
    assert balanced.word == "pass"
    assert balanced.reason.endswith("; judged from step 13 on")


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
    assert table.notes == (
        "TP1: 1 of 4,800 launched kernels are missing (1 steps)",
        "left out 1 kernel whose counterpart on another rank is lost",
    )
    assert verdict(table).word == "fail"


def in_steps(table: KernelTable) -> tuple[dict[str, int], float]:
    """The number of compared kernels of each rank, and the slowdown."""
    known = table.frame[(table.frame["step"] >= 0) & (table.frame["kind"] == "kernel")]
    found = imbalance(table)
    return known.groupby("rank", observed=True).size().to_dict(), found.slowdown or 0.0


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("graphs", [False, True])
def test_what_one_rank_lost_is_left_out_on_the_other(tmp_path: Path, graphs: bool) -> None:
    """So the figures stay exact, and nothing is said of different numbers of kernels."""
    every = FAN_OUT if graphs else 60
    lost = {(40, 3), (41, 59), (42, 0)}
    table = window(
        tmp_path, slow=1.15, lost=lambda s, n: (s, n) in lost, graphs=graphs, count=every
    )
    counts, slowdown = in_steps(table)
    assert counts == {"TP0": STEPS * every - 3, "TP1": STEPS * every - 3}
    assert slowdown == pytest.approx(1.15)
    assert imbalance(table).work.by != "kernel calls"


@pytest.mark.parametrize(
    ("count", "lost", "is_dropped"), [(60, 3, False), (60, 4, True), (20, 3, True)]
)
def test_a_step_that_lacks_more_than_a_few_is_dropped(
    tmp_path: Path, count: int, lost: int, is_dropped: bool
) -> None:
    table = window(
        tmp_path, slow=1.15, lost=lambda s, n: s == 40 and n < lost, graphs=True, count=count
    )
    assert (table.steps["excluded"] == LOST).any() == is_dropped
    assert in_steps(table)[1] == pytest.approx(1.15)


def test_windows_by_stage_have_two_files_a_rank(tmp_path: Path) -> None:
    """Each stage is compared with the same stage of the other rank; there may be time between."""
    window(tmp_path, slow=1.15, lost=lambda s, n: (s, n) == (40, 3), graphs=True)
    for rank in (0, 1):
        path = tmp_path / f"w-TP-{rank}.trace.json"
        text = path.read_text()
        path.unlink()
        (tmp_path / f"w-TP-{rank}-DECODE.trace.json").write_text(text)
        trace = json.loads(text.replace("step[DECODE", "step[EXTEND"))
        for event in trace["traceEvents"]:
            event["ts"] -= 20e6
            event["name"] = event["name"].replace("forward_id=", "forward_id=1")
        (tmp_path / f"w-TP-{rank}-EXTEND.trace.json").write_text(json.dumps(trace))
    table = read_window(tmp_path)
    assert table.incomparable == ""
    counts, slowdown = in_steps(table)
    assert counts == {"TP0": 2 * (STEPS * FAN_OUT - 1), "TP1": 2 * (STEPS * FAN_OUT - 1)}
    assert slowdown == pytest.approx(1.15)


def test_without_that_the_ranks_would_not_have_the_same_work(tmp_path: Path) -> None:
    """A rank that runs fewer kernels, all of them recorded, is never at the same work."""
    table = window(tmp_path, slow=1.15, count=60, peer_count=50)
    assert table.incomparable == ""
    finding = imbalance(table)
    assert finding.work == Work("more_work", 1.2, "kernel calls")
    assert "the same work" not in verdict(table).reason
    assert "1.20x the kernel calls" in verdict(table).reason


def test_few_kernels_that_take_long_are_weighed_by_their_time(tmp_path: Path) -> None:
    """One in 60 of a step's kernels in 20 of 80 steps, but it takes two fifths of the step."""

    def long(number: int) -> float:
        return 40.0 if number == 7 else 1.0

    lost: Lost = lambda s, n: s % 4 == 2 and n == 7  # noqa: E731
    for slow in (1.0, 1.15):
        table = window(tmp_path, slow=slow, lost=lost, graphs=True, long=long)
        assert verdict(table).word == "inconclusive"
        assert "TP1: 20 of 4,800 launched kernels are missing (20 steps), " in table.incomparable
        assert table.incomparable.endswith("% of its time")


def test_a_step_with_other_kernels_is_dropped(tmp_path: Path) -> None:
    """Where no step has the kernels that are there, it is not known what is missing."""
    window(tmp_path, slow=1.15, lost=lambda s, n: (s, n) == (40, 3), graphs=True)
    path = tmp_path / "w-TP-1.trace.json"
    trace = json.loads(path.read_text())
    for event in trace["traceEvents"]:
        if event["name"] == "gemm_9" and event["args"]["correlation"] == 1 + 40 * FAN_OUT:
            event["name"] = "another"
    path.write_text(json.dumps(trace))
    table = read_window(tmp_path)
    counts, slowdown = in_steps(table)
    assert counts == {"TP0": STEPS * FAN_OUT, "TP1": STEPS * FAN_OUT - 1}  # in steps
    assert list(table.steps.loc[table.steps["excluded"] == LOST, "step"]) == [40]
    assert slowdown == pytest.approx(1.15)


def test_steps_in_which_every_rank_lacks_something(tmp_path: Path) -> None:
    """Other steps of the window tell what is missing in this one."""
    window(tmp_path, slow=1.15, lost=lambda s, n: (s, n) == (40, 3), graphs=True)
    path = tmp_path / "w-TP-0.trace.json"
    trace = json.loads(path.read_text())
    lost = ("gemm_9", 1 + 40 * FAN_OUT)
    trace["traceEvents"] = [
        event
        for event in trace["traceEvents"]
        if (event["name"], event.get("args", {}).get("correlation")) != lost
    ]
    path.write_text(json.dumps(trace))
    table = read_window(tmp_path)
    counts, slowdown = in_steps(table)
    assert counts == {"TP0": STEPS * FAN_OUT - 2, "TP1": STEPS * FAN_OUT - 2}
    assert not (table.steps["excluded"] == LOST).any()
    assert slowdown == pytest.approx(1.15)


def test_impossible_times_are_left_out_on_the_other_rank(tmp_path: Path) -> None:
    """A kernel that runs over the next ones is excluded on its rank, so on its peers as well."""
    window(tmp_path, slow=1.15, count=60)
    path = tmp_path / "w-TP-1.trace.json"
    trace = json.loads(path.read_text())
    kernels = [event for event in trace["traceEvents"] if event["cat"] == "kernel"]
    for event in (kernels[60 * 30 + 5], kernels[60 * 50 + 7]):
        event["dur"] = 400.0
    path.write_text(json.dumps(trace))
    table = read_window(tmp_path)
    counts, slowdown = in_steps(table)
    assert counts["TP0"] == counts["TP1"] == STEPS * 60 - 2
    assert slowdown == pytest.approx(1.15)


def test_pipeline_stages_have_graphs_of_their_own(tmp_path: Path) -> None:
    window(tmp_path, slow=1.01, graphs=True)
    for rank in (0, 1):
        (tmp_path / f"w-TP-{rank}.trace.json").rename(tmp_path / f"w-TP-{rank}-PP-0.trace.json")
    for rank in (0, 1):
        slow = 1.0 + rank / 100
        fewer = list(events(slow=slow, lost=nothing, graphs=True, call="cudaGraphLaunch", count=40))
        path = tmp_path / f"w-TP-{rank}-PP-1.trace.json"
        path.write_text(json.dumps({"traceEvents": fewer}))
    table = read_window(tmp_path)
    assert (table.incomparable, table.notes) == ("", ())


def test_a_stream_lost_in_all_replays_of_a_rank_is_missed(tmp_path: Path) -> None:
    """Alone, the rank looks whole; its peer knows how large the graph is."""
    table = window(tmp_path, lost=lambda s, n: n >= 40 or s % 9 == 0, graphs=True)
    assert "launched kernels are missing" in table.incomparable


@pytest.mark.parametrize(
    ("lost", "text"),
    [
        (lambda s, n: False, ""),
        (lambda s, n: s >= STEPS - 3, ""),  # they may have run after the window
        (lambda s, n: s < 12, "TP1: 720 of 4,800 launches have no kernel"),
        (lambda s, n: (s * 60 + n) % 50 == 9, "TP1: 96 of 4,800 launches have no kernel"),
        (lambda s, n: (s, n) == (40, 3), ""),
    ],
)
def test_windows_without_steps(tmp_path: Path, lost: Lost, text: str) -> None:
    """Their totals are compared, so what is missing at the front counts as well."""
    table = window(tmp_path, slow=1.3, lost=lost, count=60, steps=False)
    assert table.steps.empty
    assert table.incomparable == text


@pytest.mark.usefixtures("way")
def test_what_is_launched_into_a_graph_runs_later(tmp_path: Path) -> None:
    """Capturing a graph calls the same functions, but no kernel runs."""
    window(tmp_path, slow=1.3, count=60, steps=False, lost=lambda s, n: 20 <= s < 30)
    path = tmp_path / "w-TP-1.trace.json"
    trace = json.loads(path.read_text())
    call = {"ph": "X", "cat": "cuda_runtime", "pid": 1, "tid": 1, "dur": 1.0}
    for name, step in (("cudaStreamBeginCapture", 20), ("cudaStreamEndCapture_v10000", 30)):
        more = {"name": name, "ts": 1000.0 + step * 4000.0, "args": {"correlation": 10**6 + step}}
        trace["traceEvents"].append({**call, **more})
    path.write_text(json.dumps(trace))
    assert read_window(tmp_path).incomparable == ""


def other_batches(folder: Path, batch: Callable[[int], int], lost: Lost) -> KernelTable:
    """DP0 replays graphs of the batch sizes that `batch` says, DP1 always that of 8."""
    for rank in (0, 1):
        gone = nothing if rank else lost
        listed = list(events(slow=1.0, lost=gone, graphs=True, call="cudaGraphLaunch"))
        for event in listed:
            if event["name"].startswith("step[") and not rank:
                step = int(event["ts"] - 1000) // 4000
                event["name"] = event["name"].replace("bs=8", f"bs={batch(step)}")
        path = folder / f"w-TP-0-DP-{rank}.trace.json"
        path.write_text(json.dumps({"traceEvents": listed}))
    return read_window(folder)


def test_a_graph_that_ran_seldom_is_not_known(tmp_path: Path) -> None:
    """On one rank, and twice: it may have lost as much in both."""
    table = other_batches(
        tmp_path,
        lambda step: 16 + step if step % 10 == 5 else 8,
        lambda step, number: step in (15, 25) and number == 1,
    )
    assert table.notes == (
        "DP0 TP0: it is not known how many kernels belong to the graphs of 2 steps (2.5 % of its "
        "time), which were replayed fewer than 3 times",
    )


def test_graphs_of_which_none_is_known(tmp_path: Path) -> None:
    """Each of another batch, on one rank, and each with another number of kernels."""
    table = other_batches(tmp_path, lambda step: 16 + step, lambda s, n: n > s % 50)
    assert "DP0 TP0: it is not known how many kernels" in table.incomparable


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


@pytest.mark.parametrize(
    ("name", "word", "text"),
    [
        ("lost_front_12_of_80_tp1_slower", "fail", "TP1 is 1.15x slower"),
        ("lost_kernels_one_in_five", "inconclusive", "TP1: 40 of 200 launches have no kernel"),
        ("rocm_overflow_whole", "inconclusive", "TP1: 40 kernels (20.0 %)"),
        (
            "two_runs",
            "inconclusive",
            "processes 2 (TP0) and 8 (TP1), GPU NVIDIA H100 (TP0) and AMD MI300X (TP1)",
        ),
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
