"""Every real torch trace against plain `json` and exact decimals."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import pandas as pd
import pytest

from pytest_sglprof._trace.read import read_window
from tests.support import plain_traces as plain

GPU_FILES = (
    "a100-nccl/rank-0.json.gz",
    "sglang-mi300x/sglang_Qwen3-8B_decode.json.gz",
    "sglang-mi300x/sglang_Qwen3-8B_prefilldecode.json.gz",
)
CPU_FOLDERS = {
    "sglang-cpu-tp2": ("TP0", "TP1"),
    "sglang-cpu-tp2-nostack": ("TP0", "TP1"),
    "sglang-cpu-tp2dp2": ("DP0 TP0", "DP0 TP1", "DP1 TP0", "DP1 TP1"),
    "sglang-cpu-mixtral-tp2ep2": ("TP0 EP0", "TP1 EP1"),
}
WORDS = ("TP", "DP", "EP")


def label(file: Path) -> str:
    """From the name's parts, without the package."""
    words = file.name.removesuffix(".trace.json.gz").split("-")
    found = {word: words[words.index(word) + 1] for word in WORDS if word in words}
    return " ".join(f"{word}{found[word]}" for word in ("DP", "TP", "EP") if word in found)


def rank_files(folder: Path) -> list[Path]:
    return [file for file in folder.iterdir() if not file.name.startswith("merged")]


def read_totals(frame: pd.DataFrame) -> dict[str, tuple[int, int]]:
    sums = frame.groupby("full_name", observed=True)["dur_ns"].agg(["size", "sum"])
    return {str(name): (int(row["size"]), int(row["sum"])) for name, row in sums.iterrows()}


@pytest.mark.parametrize("name", GPU_FILES)
def test_gpu_rows_are_exact(shared_data: Path, name: str) -> None:
    path = shared_data / "torch" / name
    table = read_window(path)
    frame = table.frame
    rows = zip(frame["full_name"], frame["kind"], frame["start_ns"], frame["dur_ns"], strict=True)
    expected = plain.gpu_rows(path)
    assert sorted((str(n), str(k), int(s), int(d)) for n, k, s, d in rows) == expected
    assert (table.ranks, table.source, table.partial, table.notes) == (("TP0",), "gpu", False, ())
    assert read_totals(frame) == plain.totals([(row[0], row[3]) for row in expected])
    by_key = table.by("rank", "full_name")
    assert int(by_key["total_ns"].sum()) == sum(row[3] for row in expected)
    assert int(by_key["count"].sum()) == len(expected)


@pytest.mark.parametrize("name", GPU_FILES)
def test_streams_are_those_of_the_file(shared_data: Path, name: str) -> None:
    path = shared_data / "torch" / name
    frame = read_window(path).frame
    expected: dict[int, int] = defaultdict(int)
    for event in plain.events(path, categories=plain.GPU):
        expected[event["args"]["stream"]] += plain.ns(event["dur"])
    assert frame.groupby("stream")["dur_ns"].sum().to_dict() == dict(expected)


@pytest.mark.parametrize("name", CPU_FOLDERS)
def test_cpu_folders_are_exact_for_each_rank(shared_data: Path, name: str) -> None:
    folder = shared_data / "torch" / name
    table = read_window(folder)
    assert table.ranks == CPU_FOLDERS[name]
    assert (table.source, table.notes, table.partial) == ("cpu_op", (), False)
    files = rank_files(folder)
    assert sorted(map(label, files)) == sorted(table.ranks)
    for file in files:
        of_rank = table.frame[table.frame["rank"] == label(file)]
        assert read_totals(of_rank) == plain.cpu_totals(file)
        collectives = of_rank[of_rank["kind"] == "collective"]
        assert int(collectives["dur_ns"].sum()) == sum(dur for _, dur in plain.collectives(file))
        assert set(collectives["category"]) <= {"communication"}
        assert not any(str(text).startswith("c10d::") for text in set(of_rank["full_name"]))


@pytest.mark.parametrize("name", CPU_FOLDERS)
def test_self_times_add_up_to_the_union_of_each_thread(shared_data: Path, name: str) -> None:
    table = read_window(shared_data / "torch" / name)
    for file in rank_files(shared_data / "torch" / name):
        threads: dict[str, list[tuple[int, int]]] = defaultdict(list)
        for thread, _, start, stop in plain.operators(file):
            threads[thread].append((start, stop))
        ops = table.frame[(table.frame["rank"] == label(file)) & (table.frame["kind"] == "op")]
        assert int(ops["dur_ns"].sum()) == sum(map(plain.union, threads.values()))
        assert int(ops["dur_ns"].min()) >= 0


def test_a_merged_file_equals_its_rank_files(shared_data: Path) -> None:
    folder = shared_data / "torch/sglang-cpu-tp2"
    apart = read_window(folder)
    merged = read_window(next(folder.glob("merged-*")))
    columns = ["rank", "start_ns", "full_name", "dur_ns", "stage", "step", "category", "kind"]

    def plainly(frame: pd.DataFrame, keys: list[str]) -> list[tuple[object, ...]]:
        return sorted(tuple(map(str, row)) for row in frame[keys].itertuples(index=False))

    assert merged.ranks == apart.ranks
    assert plainly(merged.frame, columns) == plainly(apart.frame, columns)
    assert plainly(merged.steps, list(apart.steps)) == plainly(apart.steps, list(apart.steps))


def test_a_folder_prefers_rank_files_to_the_merged_one(shared_data: Path) -> None:
    table = read_window(shared_data / "torch/sglang-cpu-tp2")
    assert [Path(file).name for file in table.files] == sorted(
        file.name for file in rank_files(shared_data / "torch/sglang-cpu-tp2")
    )


def test_idle_ranks_are_listed_without_steps(shared_data: Path) -> None:
    table = read_window(shared_data / "torch/sglang-cpu-tp2dp2")
    assert table.steps["rank"].value_counts().to_dict() == {
        "DP0 TP0": 0,
        "DP0 TP1": 0,
        "DP1 TP0": 11,
        "DP1 TP1": 11,
    }
    idle = table.frame[table.frame["rank"].isin(["DP0 TP0", "DP0 TP1"])]
    assert set(idle["step"]) == {-1}


STEP = "step["


@pytest.mark.parametrize("name", CPU_FOLDERS)
def test_steps_are_those_that_the_server_annotated(shared_data: Path, name: str) -> None:
    table = read_window(shared_data / "torch" / name)
    for file in rank_files(shared_data / "torch" / name):
        base = int(plain.document(file)["baseTimeNanoseconds"])
        spans = sorted(
            (base + plain.ns(event["ts"]), base + plain.end(event), event["name"])
            for event in plain.events(file, categories={"user_annotation"})
            if event["name"].startswith(STEP)
        )
        rows = table.steps[table.steps["rank"] == label(file)]
        read = [
            (int(row.start_ns), int(row.end_ns), row.stage, int(row.batch_size), int(row.tokens))
            for row in rows.itertuples()
        ]
        assert read == [(start, stop, *_meaning(text)) for start, stop, text in spans]
        assert list(rows["step"]) == list(range(len(spans)))
        of_rank = table.frame[table.frame["rank"] == label(file)]
        for number, (start, stop, _) in enumerate(spans):
            inside = of_rank[(of_rank["start_ns"] >= start) & (of_rank["start_ns"] < stop)]
            assert set(inside["step"]) == {number}


def _meaning(text: str) -> tuple[str, int, int]:
    words = text.removeprefix(STEP).rstrip("]").split()
    values = dict(word.split("=") for word in words[1:])
    batch = int(values["bs"])
    if words[0] == "DECODE":
        return "decode", batch, batch
    assert words[0] == "EXTEND"
    return "prefill", batch, int(values["toks"])


def test_kernels_of_a_real_step_are_found_by_their_launches(shared_data: Path) -> None:
    path = shared_data / "torch" / GPU_FILES[2]
    (span,) = [
        event
        for event in plain.events(path, categories={"user_annotation"})
        if event["name"].startswith(STEP)
    ]
    launched = {
        event["args"].get("correlation"): plain.ns(event["ts"])
        for event in plain.events(path, categories={"cuda_runtime"})
    }
    start, stop = plain.ns(span["ts"]), plain.end(span)
    expected = [
        plain.ns(event["dur"])
        for event in plain.events(path, categories=plain.GPU)
        if start <= launched.get(event["args"]["correlation"], -1) < stop
    ]
    frame = read_window(path).frame
    inside = frame[frame["step"] == 0]
    assert (len(inside), int(inside["dur_ns"].sum())) == (len(expected), sum(expected))
    assert set(inside["stage"]) == {"prefill"}


@pytest.mark.parametrize("name", GPU_FILES)
def test_little_kernel_time_is_left_without_a_category(shared_data: Path, name: str) -> None:
    sums = read_window(shared_data / "torch" / name).by("category").set_index("category")
    assert sums["total_ns"].get("other", 0) < 0.05 * sums["total_ns"].sum()


def test_processes_change_nothing(shared_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = shared_data / "torch/sglang-cpu-tp2dp2"
    alone = read_window(folder, processes=1)
    monkeypatch.setattr("pytest_sglprof._trace.torch.assemble.POOL_BYTES", 0)
    shared = read_window(folder, processes=2)
    pd.testing.assert_frame_equal(alone.frame, shared.frame)
