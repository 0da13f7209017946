"""When a rank opens and closes windows, and what its files hold."""

from __future__ import annotations

import gzip
import json
import pickle
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from pytest_sglprof.standin.model import Batch, places
from pytest_sglprof.standin.options import parse
from pytest_sglprof.standin.rank import NOT_RUNNING, RUNNING, Profiler
from pytest_sglprof.standin.traces import Recorded

DECODE = Batch("DECODE", 4, 4, 400)
EXTEND = Batch("EXTEND", 2, 128, 128)
T0_NS = 1_795_489_852_000_000_000


class Rank:
    """A profiler and the forward passes that a scheduler would run around it."""

    def __init__(self, arguments: str = "", index: int = 0) -> None:
        options = parse(arguments.split())
        self.profiler = Profiler(places(options.sizes)[index], options)
        self.step = 0

    def run(self, *batches: Batch) -> None:
        for batch in batches:
            self.run_queues(batch)

    def run_queues(self, *batches: Batch) -> None:
        """One forward pass, of a batch for each queue."""
        self.step += 1
        self.profiler.before_step(self.step, batches[self.profiler.place.queue])
        start = T0_NS + self.step * 10_000_000
        self.profiler.record(Recorded(self.step, start, 10_000_000, batches))

    def start(self, **params: Any) -> tuple[bool, str]:
        return self.profiler.request({"profile_id": "w", **params}, self.step)

    def stop(self) -> tuple[bool, str]:
        return self.profiler.request(None, self.step)


def events(path: Path) -> list[dict[str, Any]]:
    document = json.loads(gzip.decompress(path.read_bytes()))
    found: list[dict[str, Any]] = document["traceEvents"]
    return found


def spans(path: Path, cat: str = "user_annotation") -> list[str]:
    return [e["name"] for e in events(path) if e.get("cat") == cat and "step[" in e["name"]]


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_window_of_steps_holds_so_many_and_ends_by_itself(tmp_path: Path) -> None:
    rank = Rank()
    rank.run(*[DECODE] * 7)
    assert rank.start(num_steps=3, output_dir=str(tmp_path / "deep" / "new")) == (True, "Succeeded")
    rank.run(*[DECODE] * 9)
    assert rank.stop() == (False, NOT_RUNNING)
    file = tmp_path / "deep" / "new" / "w-TP-0.trace.json.gz"
    assert spans(file) == ["step[DECODE bs=4]"] * 3


@pytest.mark.parametrize(("version", "steps"), [("0.5.14", 2), ("0.5.20", 3)])
def test_up_to_0_5_14_a_window_of_steps_lacks_the_last(
    version: str, steps: int, tmp_path: Path
) -> None:
    rank = Rank(f"--speak {version}")
    rank.start(num_steps=3, output_dir=str(tmp_path))
    rank.run(*[DECODE] * 9)
    assert len(spans(tmp_path / "w-TP-0.trace.json.gz")) == steps


@pytest.mark.parametrize(("version", "size"), [("0.5.14", 4), ("0.5.20", 8)])
def test_a_decode_window_by_stage_waits_for_its_batch_size(
    version: str, size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SGLANG_PROFILE_BY_STAGE_DECODE_MIN_BS", "8")
    rank = Rank(f"--speak {version}")
    rank.start(num_steps=2, profile_by_stage=True, output_dir=str(tmp_path))
    rank.run(EXTEND, *[DECODE] * 3, *[Batch("DECODE", 8, 8, 900)] * 4)
    named = spans(tmp_path / "w-TP-0-DECODE.trace.json.gz")
    assert named == [f"step[DECODE bs={size}]"] * 2


@pytest.mark.parametrize("arguments", ["--speak 0.5.9", "--speak 0.5.9 --device cpu"])
def test_steps_have_no_names_up_to_0_5_9(arguments: str, tmp_path: Path) -> None:
    rank = Rank(arguments)
    rank.start(output_dir=str(tmp_path), detailed_annotations=True, with_stack=False)
    rank.run(EXTEND, DECODE)
    rank.stop()
    names = {event["name"] for event in events(tmp_path / "w-TP-0.trace.json.gz")}
    assert not any("step[" in name or "run_batch" in name for name in names)
    assert any(name.startswith("aten::") for name in names)


def test_a_window_by_hand_ends_when_told(tmp_path: Path) -> None:
    rank = Rank("--tp 2 --dp 2 --ep 2", index=3)
    assert rank.stop() == (False, NOT_RUNNING)
    rank.start(output_dir=str(tmp_path), profile_prefix="TP-7", detailed_annotations=True)
    rank.run(EXTEND, DECODE)
    assert rank.stop()[0]
    assert files(tmp_path) == ["TP-7-w-TP-1-DP-1-EP-1.trace.json.gz"]
    assert spans(tmp_path / files(tmp_path)[0]) == [
        "step[EXTEND bs=2 toks=128 c_sq=128 c_sqsq=8192 c_sqsk=8192 c_sk=128 forward_id=1]",
        "step[DECODE bs=4 g_sq=4 g_sqsq=4 g_sqsk=400 g_sk=400 forward_id=2]",
    ]


def test_a_window_without_steps_leaves_a_small_valid_file(tmp_path: Path) -> None:
    rank = Rank()
    rank.start(output_dir=str(tmp_path))
    rank.stop()
    assert not spans(tmp_path / "w-TP-0.trace.json.gz")


def test_a_second_start_throws_the_first_window_away(tmp_path: Path) -> None:
    rank = Rank()
    rank.start(output_dir=str(tmp_path), profile_id="first")
    rank.run(*[DECODE] * 5)
    assert rank.start(output_dir=str(tmp_path), profile_id="second") == (True, "Succeeded")
    rank.run(DECODE)
    rank.stop()
    assert files(tmp_path) == ["first-TP-0.trace.json.gz"]
    assert len(spans(tmp_path / files(tmp_path)[0])) == 1
    rank.start(output_dir=str(tmp_path), profile_id="third")
    assert rank.start(start_step=90) == (False, RUNNING)


def test_an_armed_start_step_fires_inside_a_later_window(tmp_path: Path) -> None:
    rank = Rank()
    rank.start(start_step=6, num_steps=2, output_dir=str(tmp_path), profile_id="armed")
    assert rank.stop() == (False, NOT_RUNNING)
    rank.start(output_dir=str(tmp_path), profile_id="later")
    rank.run(*[DECODE] * 9)
    rank.stop()
    assert files(tmp_path) == ["later-TP-0.trace.json.gz"]
    assert len(spans(tmp_path / files(tmp_path)[0])) == 4  # steps 6 to 9 of 1 to 9


def test_start_step_is_absolute_and_never_in_the_past(tmp_path: Path) -> None:
    rank = Rank()
    rank.run(*[DECODE] * 5)
    rank.start(start_step=8, num_steps=2, output_dir=str(tmp_path), profile_id="a")
    rank.run(*[DECODE] * 6)
    rank.start(
        start_step=2,
        num_steps=2,
        output_dir=str(tmp_path),
        profile_id="b",
        detailed_annotations=True,
    )
    rank.run(*[DECODE] * 6)
    assert files(tmp_path) == ["a-TP-0.trace.json.gz", "b-TP-0.trace.json.gz"]
    ids = [name.split("forward_id=")[1] for name in spans(tmp_path / "b-TP-0.trace.json.gz")]
    assert ids == ["12]", "13]"]


def test_by_stage_leaves_a_file_a_stage(tmp_path: Path) -> None:
    rank = Rank()
    answer = rank.start(profile_by_stage=True, num_steps=2, output_dir=str(tmp_path))
    assert answer == (True, "Succeeded")
    rank.run(EXTEND, DECODE, DECODE, DECODE, DECODE, EXTEND)
    assert files(tmp_path) == ["w-TP-0-DECODE.trace.json.gz", "w-TP-0-EXTEND.trace.json.gz"]
    assert len(spans(tmp_path / "w-TP-0-DECODE.trace.json.gz")) == 2
    assert len(spans(tmp_path / "w-TP-0-EXTEND.trace.json.gz")) == 1


@pytest.mark.parametrize(
    ("arguments", "params", "error"),
    [
        ("", {"profile_by_stage": True}, TypeError),
        ("", {"profile_prefix": "tests/a.py::b"}, FileNotFoundError),
        ("--device cpu", {"activities": ["GPU"]}, AssertionError),
        ("--device cpu", {"activities": ["CPU", "MEM"]}, RuntimeError),
        ("--die-in-window 1", {}, RuntimeError),
    ],
)
def test_deadly_requests_raise_in_the_rank(
    arguments: str, params: dict[str, Any], error: type[Exception], tmp_path: Path
) -> None:
    rank = Rank(arguments)

    def window() -> None:
        rank.start(output_dir=str(tmp_path), **params)
        rank.run(DECODE)
        rank.stop()

    with pytest.raises(error):
        window()


def test_a_folder_that_cannot_be_made_is_deadly(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    rank = Rank()
    rank.start(output_dir=str(tmp_path / "file" / "below"))
    with pytest.raises(NotADirectoryError):
        rank.stop()


@pytest.mark.parametrize("activities", [["FOO"], [], ["cpu"]])
def test_unknown_activities_record_nothing(activities: list[str], tmp_path: Path) -> None:
    rank = Rank()
    assert rank.start(activities=activities, output_dir=str(tmp_path)) == (True, "Succeeded")
    rank.run(DECODE)
    assert rank.stop() == (False, NOT_RUNNING)
    assert files(tmp_path) == []


def test_activities_choose_what_is_recorded(tmp_path: Path) -> None:
    def categories(name: str, arguments: str = "", **params: Any) -> set[str]:
        rank = Rank(arguments)
        rank.start(output_dir=str(tmp_path), profile_id=name, **params)
        rank.run(DECODE)
        rank.stop()
        return {e.get("cat") for e in events(tmp_path / f"{name}-TP-0.trace.json.gz")}

    both = {"kernel", "gpu_memcpy", "gpu_memset", "cuda_runtime", "ac2g", "cpu_op"}
    notes = {"user_annotation", "gpu_user_annotation", "python_function", "Trace", None}
    assert categories("both") == both | notes
    assert categories("nostack", with_stack=False) == (both | notes) - {"python_function"}
    cpu = categories("cpu", activities=["CPU"], with_stack=False)
    assert cpu == {"cuda_runtime", "ac2g", "cpu_op", "user_annotation", "Trace", None}
    gpu = categories("gpu", activities=["GPU"])
    assert gpu == {*both, "Trace", None} - {"cpu_op"}
    assert categories("host", "--device cpu", with_stack=False) == {
        "cpu_op",
        "user_annotation",
        "Trace",
        None,
    }


def test_a_memory_snapshot_is_a_pickle(tmp_path: Path) -> None:
    rank = Rank()
    rank.start(activities=["MEM"], output_dir=str(tmp_path), profile_prefix="m")
    assert rank.stop()[0]
    (name,) = files(tmp_path)
    assert name.endswith("-TP-0-memory.pickle")
    assert "segments" in pickle.loads((tmp_path / name).read_bytes())


def test_merging_joins_the_ranks_and_finds_nothing_with_a_prefix(tmp_path: Path) -> None:
    for index in (1, 0):
        rank = Rank("--tp 2", index)
        rank.start(output_dir=str(tmp_path), merge_profiles=True)
        rank.run(DECODE)
        answer = rank.stop()
    assert "Merged trace" in answer[1]
    merged = events(tmp_path / "merged-w.trace.json.gz")
    owners = Counter(str(event["pid"]).split()[0] for event in merged)
    assert owners["[TP00]"] == owners["[TP01]"] > 0
    rank = Rank("--tp 2")
    rank.start(output_dir=str(tmp_path), merge_profiles=True, profile_prefix="p", profile_id="z")
    assert "No trace files found for profile_id: z" in rank.stop()[1]


def test_times_are_exact_nanoseconds_and_launches_precede_their_kernels(tmp_path: Path) -> None:
    rank = Rank("--tp 2 --slow rank=1,category=gemm,factor=1.5", index=1)
    rank.start(output_dir=str(tmp_path))
    rank.run(DECODE)
    rank.stop()
    text = gzip.decompress((tmp_path / "w-TP-1.trace.json.gz").read_bytes()).decode()
    document = json.loads(text, parse_float=str)
    kernels = [e for e in document["traceEvents"] if e.get("cat") == "kernel"]
    model = rank.profiler.options.model
    expected = model.step(1, places(rank.profiler.options.sizes), (DECODE,))[1]
    on_gpu = [launch for launch in expected if launch.kernel.kind in ("kernel", "collective")]
    base = document["baseTimeNanoseconds"]
    for event, launch in zip(kernels, on_gpu, strict=True):
        assert int(event["ts"].replace(".", "")) + base == T0_NS + 10_000_000 + launch.start_ns
        assert int(event["dur"].replace(".", "")) == launch.dur_ns
        assert event["name"] == launch.kernel.name
        assert (event["pid"], event["tid"]) == (1, 7)
    launched = {
        e["args"]["correlation"]: float(e["ts"])
        for e in document["traceEvents"]
        if e.get("cat") == "cuda_runtime"
    }
    assert len(launched) == len(expected)
    assert all(launched[e["args"]["correlation"]] < float(e["ts"]) for e in kernels)
    assert document["distributedInfo"]["rank"] == 1
    assert [device["id"] for device in document["deviceProperties"]] == [0, 1]


def test_with_dp_attention_decode_passes_replay_a_graph_unless_a_peer_has_a_prompt(
    tmp_path: Path,
) -> None:
    rank = Rank("--tp 2 --dp 2 --enable-dp-attention", index=1)
    rank.start(output_dir=str(tmp_path), detailed_annotations=True)
    idle = Batch("IDLE", 0, 0, 0)
    rank.run_queues(DECODE, DECODE)
    rank.run_queues(EXTEND, DECODE)
    rank.run_queues(DECODE, idle)
    rank.stop()
    document = json.loads(gzip.decompress((tmp_path / "w-TP-1-DP-1.trace.json.gz").read_bytes()))
    of: dict[str, list[dict[str, Any]]] = {"cuda_runtime": [], "kernel": [], "user_annotation": []}
    for event in document["traceEvents"]:
        of.setdefault(event.get("cat"), []).append(event)
    assert [e["name"] for e in of["user_annotation"] if e["name"].startswith("step[")] == [
        "step[DECODE bs=4 g_sq=4 g_sqsq=4 g_sqsk=400 g_sk=400 forward_id=1]",
        "step[DECODE bs=4 g_sq=4 g_sqsq=4 g_sqsk=400 g_sk=400 forward_id=2]",
        "step[IDLE bs=0 forward_id=3]",
    ]
    launches = {e["args"]["correlation"]: e for e in of["cuda_runtime"]}
    graphs = [c for c, e in launches.items() if e["name"] == "cudaGraphLaunch"]
    nodes = Counter(e["args"]["correlation"] for e in of["kernel"] if "graph node id" in e["args"])
    assert list(nodes) == graphs
    assert len(graphs) == 2
    assert min(nodes.values()) > 50
    alone = [e for e in of["kernel"] if "graph node id" not in e["args"]]
    assert len(alone) == len(of["kernel"]) - sum(nodes.values()) > 50
    assert all(launches[e["args"]["correlation"]]["name"] != "cudaGraphLaunch" for e in alone)
    assert all(
        float(launches[e["args"]["correlation"]]["ts"]) < float(e["ts"]) for e in of["kernel"]
    )


def test_replicas_of_plain_data_parallel_each_believe_to_be_alone(tmp_path: Path) -> None:
    rank = Rank("--dp 2", index=1)
    rank.start(output_dir=str(tmp_path))
    rank.stop()
    document = json.loads(gzip.decompress((tmp_path / "w-TP-0-DP-1.trace.json.gz").read_bytes()))
    assert document["distributedInfo"]["rank"] == 0
    assert document["distributedInfo"]["world_size"] == 1
