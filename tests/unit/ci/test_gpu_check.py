"""What `python -m ci.gpu_check` makes of recordings; only making them needs a GPU."""

from __future__ import annotations

import contextlib
import gzip
import importlib.util
import json
import random
import shutil
import sqlite3
import sys
from collections.abc import Callable, Iterable, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import psutil
import pytest

from ci import gpu_answers, gpu_check, gpu_recordings
from ci.gpu_answers import REPORTS, TRACE, Answer
from ci.gpu_check import CHECKS
from pytest_sglprof._process import wait_gone
from pytest_sglprof._trace.nsys.report import read_report
from tests.support.kineto import Event, document, event, write
from tests.support.kineto import kernel as torch_kernel
from tests.support.nsys_exports import CPU_FILES, GPU_FILES, by_name, global_id, make_export, nvtx
from tests.support.nsys_exports import kernel as nsys_kernel

GRAPHS = {"4": 3, "8": 5}  # batch size -> kernels
STEPS, EAGER = 12, 4
LOOP = tuple(GRAPHS.items())
LAST = STEPS - 1


def torch_events(
    lost: Iterable[tuple[int, int]] = (),
    *,
    call: str = "cudaLaunchKernel",
    dur: float = 2,
    steps: bool = True,
) -> list[Event]:
    """A decode loop: each step launches kernels one by one, then a graph.

    lost: (step, number of the kernel in it) of kernels that are not recorded; those of the graph
    come last.
    """
    missing = {*lost}
    events: list[Event] = []
    correlation, gpu_time = 0, 100
    for step in range(STEPS):
        batch, size = LOOP[step % len(LOOP)]
        begin = 1000 * step
        if steps:
            events.append(event("user_annotation", f"step[DECODE bs={batch}]", begin, 900, 1, 1))
        for number in range(EAGER + 1):
            correlation += 1
            is_graph = number == EAGER
            name = "cudaGraphLaunch" if is_graph else call
            category = "cuda_driver" if call.startswith("cuL") and not is_graph else "cuda_runtime"
            at = begin + 10 * (number + 1)
            events.append(event(category, name, at, 1, 1, 1, correlation=correlation))
            gpu_time = max(gpu_time, at + 5)
            for node in range(size if is_graph else 1):
                if (step, number + node) not in missing:
                    args: dict[str, Any] = {"correlation": correlation, "context": 1}
                    if is_graph:
                        args["graph node id"] = 100 * size + node + 1
                    events.append(torch_kernel(f"k{number + node}", gpu_time, dur, **args))
                gpu_time += 3
    return events


def torch_answer(name: str, folder: Path, events: list[Event]) -> Answer:
    write(folder, document(events, rank=0, size=1), TRACE)
    return answer_of(name, folder, {"graphs": GRAPHS})


def answer_of(name: str, folder: Path, facts: Mapping[str, Any]) -> Answer:
    (folder / "facts.json").write_text(json.dumps(facts))
    return gpu_check.answered(check(name), folder)


def check(name: str) -> gpu_check.Check:
    return next(each for each in CHECKS if each.name == name)


# The list of questions.


def test_twelve_questions_within_15_minutes() -> None:
    assert len({each.name for each in CHECKS}) == len({each.question for each in CHECKS}) == 12
    assert gpu_check.MACHINE_LIMIT + sum(each.limit for each in CHECKS) <= 15 * 60
    assert {each.recording for each in CHECKS} | {gpu_check.MACHINE} == {*gpu_recordings.RECORDINGS}


def test_what_the_questions_name_is_what_the_answers_use() -> None:
    assert gpu_answers.EDGE_STEPS == 2
    assert "first and last two steps" in check("edges").question
    assert f"{1e6 / gpu_answers.EXPORT_BYTES_PER_SECOND:g} s per MB" in check("stall").question
    assert f"({100 * gpu_answers.SLOWER:g} %)" in check("speed-after-window").question


def test_the_page_has_every_question_and_its_answer(project_root: Path) -> None:
    text = (project_root / "docs/truth.md").read_text()
    rows = [[cell.strip() for cell in line.split(" | ")] for line in text.splitlines()]
    asked = {row[0].removeprefix("| "): row[1:3] for row in rows if len(row) == 4}
    for each in CHECKS:
        question, answer = asked[each.name]
        assert question == each.question
        assert answer in ("not shown", "not run", "yes", "no")


# Torch traces.

WHOLE = ("graph-correlation", "graph-fan-out", "runtime-launches", "edges", "durations")


@pytest.mark.parametrize("name", WHOLE)
def test_a_whole_trace_says_yes(tmp_path: Path, name: str) -> None:
    answer = torch_answer(name, tmp_path, torch_events())
    assert answer.answer == "yes", answer


def test_the_numbers_are_those_of_the_trace(tmp_path: Path) -> None:
    nodes = STEPS // 2 * sum(GRAPHS.values())
    answer = torch_answer("graph-correlation", tmp_path, torch_events())
    assert answer.numbers["replays"] == STEPS
    assert answer.numbers["kernels_of_replays"] == answer.numbers["nodes_with_launch"] == nodes
    inner = STEPS - 4
    answer = torch_answer("graph-fan-out", tmp_path, torch_events())
    assert answer.numbers["replays_by_kernels"] == {"3": inner // 2, "5": inner // 2}
    answer = torch_answer("runtime-launches", tmp_path, torch_events())
    assert answer.numbers["calls"] == {"cudaLaunchKernel": inner * EAGER}


@pytest.mark.parametrize(
    ("name", "lost", "expected"),
    [
        ("graph-fan-out", [(5, EAGER + 1)], "no"),
        ("graph-correlation", [(5, EAGER + node) for node in range(5)], "no"),
        ("runtime-launches", [(5, 0)], "no"),
        ("runtime-launches", [(0, 0), (LAST, 1)], "yes"),
        ("edges", [(5, 0)], "no"),
        ("edges", [(0, 0), (0, 1), (1, 0), (LAST, 3)], "yes"),
        ("durations", [(5, 0)], "yes"),
    ],
)
def test_a_kernel_that_is_not_recorded(
    tmp_path: Path, name: str, lost: list[tuple[int, int]], expected: str
) -> None:
    answer = torch_answer(name, tmp_path, torch_events(lost))
    assert answer.answer == expected, answer


def test_lost_launches_are_counted_by_their_place(tmp_path: Path) -> None:
    lost = [(0, 0), (1, 0), (6, 0), (LAST, 0), (LAST, 1), (LAST, 2)]
    numbers = torch_answer("edges", tmp_path, torch_events(lost)).numbers
    assert [numbers[f"lost_{where}"] for where in ("in_front", "inside", "at_end")] == [2, 1, 3]


def test_nodes_without_the_correlation_of_their_launch(tmp_path: Path) -> None:
    events = torch_events()
    node = next(each for each in events if "graph node id" in each["args"])
    node["args"]["correlation"] = 0
    answer = torch_answer("graph-correlation", tmp_path, events)
    assert answer.answer == "no"
    assert answer.numbers["kernels_without_launch"] == 1


def test_replays_with_another_graph_s_number_of_kernels(tmp_path: Path) -> None:
    write(tmp_path, document(torch_events(), rank=0, size=1), TRACE)
    answer = answer_of("graph-fan-out", tmp_path, {"graphs": {"4": 5, "8": 3}})
    assert answer.answer == "no"
    assert answer.numbers["right"] == 0


@pytest.mark.parametrize("call", ["cuLaunchKernel", "cuLaunchKernelEx"])
def test_launches_of_the_driver(tmp_path: Path, call: str) -> None:
    answer = torch_answer("driver-launches", tmp_path, torch_events(call=call))
    assert answer.answer == "yes"
    assert [*answer.numbers["calls"]] == [call]
    answer = torch_answer("driver-launches", tmp_path, torch_events([(5, 0)], call=call))
    assert answer.answer == "no"
    assert torch_answer("driver-launches", tmp_path, torch_events()).answer == "no"


def test_kernels_of_a_call_that_is_not_known_to_launch(tmp_path: Path) -> None:
    events = torch_events()
    strange = next(each for each in events if each["name"] == "cudaLaunchKernel")
    strange["name"] = "cudaLaunchSomethingNew"
    answer = torch_answer("runtime-launches", tmp_path, events)
    assert answer.answer == "no"
    assert "cudaLaunchSomethingNew" in answer.reason


def test_a_window_of_the_gpu_alone(tmp_path: Path) -> None:
    kernels = [each for each in torch_events() if each["cat"] == "kernel"]
    assert torch_answer("gpu-only", tmp_path, kernels).answer == "yes"
    with_calls = torch_answer("gpu-only", tmp_path, torch_events(steps=False))
    assert with_calls.answer == "no"
    assert with_calls.numbers["launches"] == STEPS * (EAGER + 1)
    assert torch_answer("gpu-only", tmp_path, torch_events()).numbers["steps"] == STEPS


def test_a_kernel_that_runs_over_the_next_one_of_its_stream(tmp_path: Path) -> None:
    kernels = [torch_kernel("a", 10, 5.25, context=1), torch_kernel("b", 15, 5, context=1)]
    answer = torch_answer("durations", tmp_path, kernels)
    assert answer.answer == "no"
    assert answer.numbers["longest_overlap_ns"] == 250
    kernels[1]["args"]["context"] = 2
    kernels.append(torch_kernel("c", 30, 1, context=1))
    assert torch_answer("durations", tmp_path, kernels).answer == "yes"
    nodes = [each | {"args": each["args"] | {"graph node id": 7}} for each in kernels]
    nodes[1]["args"]["context"] = 1
    answer = torch_answer("durations", tmp_path, [*nodes, *torch_events()])
    assert answer.numbers["overlaps"] == 0


@pytest.mark.parametrize("name", [*WHOLE, "gpu-only", "driver-launches"])
def test_a_recording_without_kernels_answers_nothing(tmp_path: Path, name: str) -> None:
    calls = [each for each in torch_events() if each["cat"] != "kernel"]
    answer = torch_answer(name, tmp_path, calls)
    assert answer.answer == "not run"
    assert "has no kernels" in answer.reason


def test_a_recording_of_edges_alone_answers_nothing(tmp_path: Path) -> None:
    few = [each for each in torch_events() if each["ts"] < 4000]
    answer = torch_answer("runtime-launches", tmp_path, few)
    assert answer.answer == "not run"
    assert "4 steps, 5 or more are needed" in answer.reason


def test_real_traces(tmp_path: Path, shared_data: Path) -> None:
    shutil.copy(shared_data / "torch/a100-nccl/rank-0.json.gz", tmp_path / TRACE)
    answer = answer_of("runtime-launches", tmp_path, {})
    text = gzip.decompress((tmp_path / TRACE).read_bytes()).decode()
    events = json.loads(text)["traceEvents"]
    calls = [each["name"] for each in events if each.get("cat") == "cuda_runtime"]
    expected = {name: calls.count(name) for name in ("cudaLaunchKernel", "cudaLaunchKernelExC")}
    assert (answer.answer, answer.numbers["calls"]) == ("yes", expected)
    assert answer_of("durations", tmp_path, {}).answer == "yes"
    assert answer_of("graph-correlation", tmp_path, {}).reason.endswith("no replay of a graph")
    assert answer_of("gpu-only", tmp_path, {}).numbers["launches"] == sum(expected.values())


# What was measured.


@pytest.mark.parametrize(
    ("times", "expected"),
    [((100, 101, 102), "yes"), ((100, 101, 90), "yes"), ((100, 101, 104), "no")],
)
def test_steps_after_a_window(tmp_path: Path, times: tuple[float, ...], expected: str) -> None:
    facts = dict(zip(("first_us", "second_us", "after_us"), times, strict=True))
    write(tmp_path, document(torch_events(), rank=0), TRACE)
    assert answer_of("speed-after-window", tmp_path, facts).answer == expected
    noisy = answer_of("speed-after-window", tmp_path, {**facts, "first_us": 95})
    assert (noisy.answer, "too noisy" in noisy.reason) == ("not run", True)
    calls = [each for each in torch_events() if each["cat"] != "kernel"]
    write(tmp_path, document(calls, rank=0), TRACE)  # whose window recorded nothing
    assert answer_of("speed-after-window", tmp_path, facts).answer == "not run"


@pytest.mark.parametrize(("stop_s", "expected"), [(1.0, "yes"), (2.0, "no")])
def test_the_stall_is_that_of_the_largest_window(
    tmp_path: Path, stop_s: float, expected: str
) -> None:
    write(tmp_path, document(torch_events(), rank=0), TRACE)
    small = {"steps": 2, "bytes": 1_000_000, "stop_s": 9.0, "export_s": 9.0}
    large = {"steps": 20, "bytes": 50_000_000, "stop_s": stop_s, "export_s": 1.25}
    answer = answer_of("stall", tmp_path, {"windows": [small, large]})
    assert answer.answer == expected
    assert f"{(stop_s + 1.25) / 50:.3f} s per MB" in answer.reason


def test_the_process_is_found_by_its_id(tmp_path: Path) -> None:
    gpu = {"pids": [7, 42], "sm_mhz": 1980, "power_limit_w": 700.0, "reasons": "0x1"}
    assert answer_of("nvml", tmp_path, {"pid": 42, "gpus": [gpu]}).answer == "yes"
    other = answer_of("nvml", tmp_path, {"pid": 1, "gpus": [gpu]})
    assert (other.answer, "process 1 is not among [7, 42]" in other.reason) == ("no", True)
    assert answer_of("nvml", tmp_path, {"pid": 42, "gpus": [gpu | {"sm_mhz": 0}]}).answer == "no"
    assert answer_of("nvml", tmp_path, {"error": "NVML: Unknown"}).reason == "NVML: Unknown"


# Reports of nsys.


def nsys_report(
    path: Path,
    *,
    lost: Iterable[tuple[int, int]] = (),
    graph_id: Callable[[int, int], int | None] = lambda step, size: size,
    node_id: Callable[[int, int, int], int] = lambda step, size, node: 100 * size + node + 1,
) -> Path:
    """Replays of two graphs. lost: as above; the ids are of a step, its graph's size, a node."""
    missing = {*lost}
    kernels, calls, ranges = [], [], []
    for step in range(STEPS):
        size = LOOP[step % len(LOOP)][1]
        begin = 100_000 * (step + 1)
        ranges.append(nvtx(begin, begin + 90_000, "scheduler.run_batch"))
        calls.append(
            {
                "start": begin + 10,
                "end": begin + 20,
                "globalTid": global_id(100, 100),
                "correlationId": step + 1,
                "nameId": 2,
            }
        )
        kernels += [
            nsys_kernel(
                begin + 1000 * (node + 1),
                begin + 1000 * (node + 1) + 900,
                correlationId=step + 1,
                graphId=graph_id(step, size),
                graphNodeId=node_id(step, size, node),
            )
            for node in range(size)
            if (step, node) not in missing
        ]
    path.unlink(missing_ok=True)
    names = [{"id": 1, "value": "k"}, {"id": 2, "value": "cudaGraphLaunch_v10000"}]
    tables = {"CUPTI_ACTIVITY_KIND_KERNEL": kernels} if kernels else {}
    return make_export(
        path,
        **tables,
        CUPTI_ACTIVITY_KIND_RUNTIME=calls,
        NVTX_EVENTS=ranges,
        StringIds=[*names, {"id": 9, "value": "s"}, {"id": 77, "value": "HOME=/somewhere"}],
        PROCESSES=[{"globalPid": global_id(100), "pid": 100, "name": "python"}],
        TARGET_INFO_SYSTEM_ENV=[{"name": "DeviceEnvironment", "value": "TOKEN=secret"}],
    )


def nsys_answer(name: str, folder: Path, **second: Any) -> Answer:
    """The answer of two windows, of which the first is whole unless only one is asked for."""
    is_of_one = name == "nsys-earlier-graphs"
    nsys_report(folder / REPORTS[0], **(second if is_of_one else {}))
    nsys_report(folder / REPORTS[1], **second)
    return answer_of(name, folder, {"graphs": GRAPHS})


def test_kernels_of_graphs_that_were_captured_earlier(tmp_path: Path) -> None:
    answer = nsys_answer("nsys-earlier-graphs", tmp_path)
    assert answer.answer == "yes", answer
    assert answer.numbers["replays"] == answer.numbers["right"] == STEPS - 4
    answer = nsys_answer("nsys-earlier-graphs", tmp_path, lost=[(5, 2)])
    assert (answer.answer, answer.numbers["right"]) == ("no", STEPS - 5)


def test_a_report_without_kernels_is_an_answer(tmp_path: Path) -> None:
    everything = [(step, node) for step in range(STEPS) for node in range(5)]
    answer = nsys_answer("nsys-earlier-graphs", tmp_path, lost=everything)
    assert (answer.answer, "no kernels were recorded" in answer.reason) == ("no", True)


@pytest.mark.parametrize(
    ("ids", "expected"),
    [
        ({}, "yes"),
        ({"graph_id": lambda step, size: size + 1}, "no"),
        ({"graph_id": lambda step, size: step}, "no"),
        ({"graph_id": lambda step, size: 1}, "no"),
        ({"graph_id": lambda step, size: None}, "no"),
        ({"node_id": lambda step, size, node: 100 * step + node + 1}, "no"),
    ],
)
def test_ids_of_graphs_and_their_nodes(tmp_path: Path, ids: dict[str, Any], expected: str) -> None:
    answer = nsys_answer("nsys-graph-ids", tmp_path, **ids)
    assert answer.answer == expected, answer


def test_a_reduced_export_has_no_environment(tmp_path: Path) -> None:
    whole = nsys_report(tmp_path / "whole.sqlite")
    gpu_recordings.reduce(whole, tmp_path / REPORTS[0])
    stored = (tmp_path / REPORTS[0]).read_bytes()
    assert b"secret" in whole.read_bytes()
    assert b"HOME=" in whole.read_bytes()
    assert b"secret" not in stored
    assert b"HOME=" not in stored
    answer = answer_of("nsys-earlier-graphs", tmp_path, {"graphs": GRAPHS})
    assert answer.answer == "yes"


@pytest.mark.parametrize("name", [*GPU_FILES, *CPU_FILES])
def test_a_reduced_export_is_read_alike(tmp_path: Path, shared_data: Path, name: str) -> None:
    whole, reduced = shared_data / "nsys" / name, tmp_path / name
    database = shutil.copy(whole, tmp_path / f"copy-{name}")  # the shared one cannot be locked
    gpu_recordings.reduce(database, reduced)
    pairs = zip(read_report(whole), read_report(reduced), strict=True)
    assert all((a.rank, by_name(a)) == (b.rank, by_name(b)) for a, b in pairs)
    with closing(sqlite3.connect(reduced)) as connection:
        tables = {row[0] for row in connection.execute("SELECT name FROM sqlite_master")}
    assert tables <= {*gpu_recordings.KEPT, "StringIds"}


# The command.


@pytest.mark.skipif(importlib.util.find_spec("torch") is not None, reason="torch is installed")
def test_without_torch_nothing_is_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_check.main(["--out", str(tmp_path / "out.json")]) == 3
    stored = json.loads((tmp_path / "out.json").read_text())
    assert [each["id"] for each in stored["checks"]] == [each.name for each in CHECKS]
    assert {each["answer"] for each in stored["checks"]} == {"not run"}
    assert all("torch cannot be imported" in each["reason"] for each in stored["checks"])
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 2 + len(CHECKS)
    assert all(line.startswith("| ") and line.endswith(" |") for line in printed)


def test_answers_from_kept_recordings(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, lost in (("edges", [(0, 0)]), ("runtime-launches", [(5, 0)])):
        (tmp_path / name).mkdir()
        torch_answer(name, tmp_path / name, torch_events(lost))
    read = ["--read", str(tmp_path)]
    assert gpu_check.main([*read, "--only", "edges"]) == 0
    assert gpu_check.main([*read, "--only", "edges", "nvml"]) == 3
    assert gpu_check.main([*read, "--only", "edges", "nvml", "runtime-launches"]) == 1
    assert "| not run | its recording did not end |" in capsys.readouterr().out
    assert (tmp_path / "edges" / TRACE).exists()


def test_a_process_that_dies_or_hangs_costs_one_answer(tmp_path: Path) -> None:
    died = gpu_check.record("no such recording", tmp_path / "a", 60)
    assert died == "its process ended with exit status 1: KeyError: 'no such recording'"
    assert gpu_check.answered(check("nvml"), tmp_path / "a", died) == Answer("not run", died)
    hung = gpu_check.record("machine", tmp_path / "b", 0.01)
    assert hung == "it took longer than 0.01 s"
    gpu = {"pids": [42], "sm_mhz": 1980}
    (tmp_path / "b/facts.json").write_text(json.dumps({"pid": 42, "gpus": [gpu]}))
    late = gpu_check.answered(check("nvml"), tmp_path / "b", "its process ended with SIGSEGV")
    assert (late.answer, "(its process ended with SIGSEGV)" in late.reason) == ("yes", True)


def test_a_crash_is_named_and_what_hangs_is_killed(tmp_path: Path) -> None:
    python = [sys.executable, "-c"]
    crash = "import os, signal; print('CUPTI', flush=True); os.kill(os.getpid(), signal.SIGSEGV)"
    died = gpu_check.run_limited([*python, crash], tmp_path, 60)
    assert died == "its process ended with SIGSEGV: CUPTI"
    hangs = "import os, sys, time; print(os.getpid(), flush=True); time.sleep(600)"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {hangs!r}])"
    assert gpu_check.run_limited([*python, parent], tmp_path, 3) == "it took longer than 3 s"
    child = int((tmp_path / gpu_check.LOG).read_text())
    with contextlib.suppress(psutil.NoSuchProcess):
        assert wait_gone([psutil.Process(child)], 10) == []


def test_a_recording_that_cannot_be_read_costs_one_answer(tmp_path: Path) -> None:
    (tmp_path / TRACE).write_bytes(b"\x1f\x8b")
    cut = answer_of("edges", tmp_path, {})
    assert (cut.answer, "cannot be read" in cut.reason) == ("not run", True)
    odd = answer_of("nvml", tmp_path, {"gpus": 3})
    assert (odd.answer, "was not understood: KeyError" in odd.reason) == ("not run", True)


def test_small_recordings_are_kept_without_anything_else(tmp_path: Path) -> None:
    for name in ("facts.json", REPORTS[0], "log.txt", "stop", "whole.sqlite", "a.nsys-rep"):
        (tmp_path / name).write_text("{}")
    (tmp_path / REPORTS[1]).write_bytes(random.Random(1).randbytes(400_000))
    left_out = gpu_check.tidied(tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {"facts.json", REPORTS[0]}
    assert [name.split(" ")[0] for name in left_out] == [REPORTS[1]]


def test_a_folder_with_files_is_not_kept_in(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "thesis.txt").touch()
    with pytest.raises(SystemExit) as ended:
        gpu_check.main(["--keep", str(tmp_path)])
    assert ended.value.code == 2
    assert "is not empty; give a new folder" in capsys.readouterr().err
