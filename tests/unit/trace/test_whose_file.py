"""Which rank a file is of: its name, its folder, its contents, or what somebody says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pytest_sglprof._errors import TraceError
from pytest_sglprof._ranks import NAME_PATTERNS, Rank, named_ranks
from pytest_sglprof._trace.merge.files import merge_files
from pytest_sglprof._trace.nsys.database import ReportName
from pytest_sglprof._trace.nsys.report import stream_rows
from pytest_sglprof._trace.nsys.sums import read_sums
from pytest_sglprof._trace.paths import names_of_reports, window_files
from pytest_sglprof._trace.read import read_window
from tests.support.kineto import KERNELS, ROWS, document, rows, write
from tests.support.kineto import kernel as trace_kernel
from tests.support.nsys_exports import STRINGS, global_id, kernel, make_export, to_parquet

PRIMUS = "primus-megatron-exp[dsv3-mbs_2-PP_4-EP_8-VPP_1]-rank[{}].1773739477.pt.trace.json"

WINDOWS = [  # names of a window's files, and the ranks that they tell
    (["1-TP-0.trace.json", "1-TP-1.trace.json.gz"], ["TP0", "TP1"]),
    (["TP-3-1-TP-1-PP-2-DECODE.trace.json"], ["PP2 TP1"]),
    (
        [
            "dp0_pp0_tp0_dcp0_ep0_rank0.1771.pt.trace.json",
            "warm_dp0_pp0_tp1_dcp0_ep1_rank1.1771.pt.trace.json.gz",
            "dp1_pp0_tp0_dcp0_ep2_rank2.1771.pt.trace.json",
            "dp1_pp1_tp1_dcp0_ep3_rank7.1771.pt.trace.json",
        ],
        ["DP0 TP0", "DP0 TP1", "DP1 TP0", "DP1 PP1 TP1"],
    ),
    (["vllm-9f3a1-rank-3.1771.pt.trace.json.gz"], ["TP3"]),
    ([PRIMUS.format(0), PRIMUS.format(11)], ["TP0", "TP11"]),
    (["rank0_trace.json", "rank1_trace.json"], ["TP0", "TP1"]),
    (["rank0/trace.json", "rank1/trace.json"], ["TP0", "TP1"]),
    (["rank-2/host_7.1771.pt.trace.json"], ["TP2"]),
    (["run/tp0/trace.json", "run/tp1/trace.json"], ["TP0", "TP1"]),
    (["rank0of8.json", "Rank7of8.json"], ["TP0", "TP7"]),
    (["worker0_step_12.1771.pt.trace.json", "worker1_step_12.1771.pt.trace.json"], ["TP0", "TP1"]),
    (["tp0.json", "tp1.json"], ["TP0", "TP1"]),
    (["run_tp_rank_0.json", "run_tp_rank_1.json"], ["TP0", "TP1"]),
    (["TP01-DP00.json", "TP00-DP00.json"], ["DP0 TP1", "DP0 TP0"]),
    (["dp0.json", "dp1.json"], ["DP0", "DP1"]),
    (["r0.json", "trace-r1.json"], ["TP0", "TP1"]),
    (["lora-rank-16-rank-3.json", "rank-1-lora_rank64.json"], ["TP3", "TP1"]),
    (["tp8_pp2-rank0.json", "tp8_pp2-rank1.json"], ["TP0", "TP1"]),
    (["rank-1-step-0.json", "2026-11-29-rank-0-h100.json"], ["TP1", "TP0"]),
]

NO_RANKS = [
    "trace_0.json",
    "step_12.json",
    "lora-rank-16.json",
    "qlora_rank8.json",
    "node_rank_1.json",
    "low-rank-0.json",
    "reranker-0.json",
    "prank0.json",
    "frank-0.json",
    "HTTP-1.trace.json",
    "myTP-1.trace.json",
    "TP-1x.trace.json",
    "h100.json",
    "2026-11-29.json",
    "1771234567.trace.json",
    "llama-tp8.json",
    "tp2_dp2.json",
    "exp-r2.json",
    "ep0.json",
    "gpu-node0_4242.1771234567.pt.trace.json",
    "worker-0_4242.1771234567.pt.trace.json",
    "sglang-cpu-tp0x/trace.json",
    "lora-rank-16/trace.json",
    "run-of-tp0-and-more/trace.json",
]


@pytest.mark.parametrize(("names", "labels"), WINDOWS)
def test_a_name_tells_the_rank(tmp_path: Path, names: list[str], labels: list[str]) -> None:
    files = [write(tmp_path, document(KERNELS), name) for name in names]
    table = read_window(files)
    assert set(table.ranks) == set(labels)
    assert [str(rank) for rank in table.frame["rank"]].count(labels[0]) == len(KERNELS)
    assert table.notes == ()
    named = named_ranks(files)
    assert [named[file].rank.label for file in files] == labels


@pytest.mark.parametrize("name", NO_RANKS)
def test_a_name_that_only_looks_like_a_rank(tmp_path: Path, name: str) -> None:
    unnamed = write(tmp_path, document(KERNELS), name)
    assert named_ranks([unnamed]) == {}
    beside = write(tmp_path, document(KERNELS), "1-TP-1.trace.json")
    with pytest.raises(TraceError, match="has no rank") as caught:
        read_window([unnamed, beside])
    assert str(unnamed) in caught.value.what
    assert "--rank FILE=TP1" in caught.value.hint
    given = read_window([unnamed, beside], file_ranks={name: "TP0"})
    assert given.ranks == ("TP0", "TP1")


def test_every_row_of_names_is_used() -> None:
    files = [Path(name) for names, _ in WINDOWS for name in names]
    for row in NAME_PATTERNS:
        assert any(row.pattern.search(path.name) for path in files), row.producer


def test_sizes_are_not_compared_as_if_they_were_ranks(tmp_path: Path) -> None:
    files = [write(tmp_path, document(KERNELS), f"llama-tp{size}.json") for size in (2, 4)]
    with pytest.raises(TraceError, match="has no rank"):
        read_window(files)


def test_numbered_traces_tell_no_rank_but_their_contents_may(tmp_path: Path) -> None:
    names = ["trace_0.json", "trace_1.json"]
    silent = [write(tmp_path, document(KERNELS), name) for name in names]
    with pytest.raises(TraceError, match=r"trace_0\.json has no rank") as caught:
        read_window(silent)
    assert "that of a step" in caught.value.expected
    # Each the only process of its run: neither says which of the two it is.
    alone = [write(tmp_path, document(KERNELS, rank=0, size=1), name) for name in names]
    with pytest.raises(TraceError, match=r"trace_0\.json has no rank"):
        read_window(alone)
    told = [write(tmp_path, document(KERNELS, rank=1 - at), name) for at, name in enumerate(names)]
    table = read_window(told)
    assert (table.ranks, table.notes) == (("TP0", "TP1"), ())


def test_the_handler_of_tensorboard_leaves_it_to_the_contents(tmp_path: Path) -> None:
    for rank in (0, 1):
        name = f"worker-0_{4242 + rank}.177123456{rank}.pt.trace.json"
        write(tmp_path, document([trace_kernel("a", 1, 2 + rank)], rank=rank), name)
    table = read_window(tmp_path)
    pairs = zip(table.frame["rank"], table.frame["dur_ns"], strict=True)
    assert [(str(rank), dur) for rank, dur in pairs] == [("TP0", 2000), ("TP1", 3000)]


@pytest.mark.parametrize(
    ("names", "contents"),
    [
        (["1-TP-0.trace.json", "1-TP-1.trace.json"], (1, 0)),
        (["1-TP-0-DP-0.trace.json", "1-TP-1-DP-0.trace.json"], (1, 0)),
        (["rank0.json", "rank1.json"], (1, 0)),
        (["rank0/trace.json", "rank1/trace.json"], (1, 0)),
        (["dp0_pp0_tp0_ep0_rank0.json", "dp0_pp0_tp1_ep1_rank1.json"], (1, 0)),
        (["dp1_pp0_tp0_ep2_rank2.json", "dp1_pp0_tp1_ep3_rank3.json"], (3, 2)),
        (["tp0.json", "tp1.json"], (1, 0)),
    ],
)
def test_swapped_files_are_refused_with_both_values(
    tmp_path: Path, names: list[str], contents: tuple[int, int]
) -> None:
    files = [
        write(tmp_path, document(KERNELS, rank=rank, size=4), name)
        for name, rank in zip(names, contents, strict=True)
    ]
    with pytest.raises(TraceError, match=r"its name says .*, its distributedInfo rank \d of 4"):
        read_window(files)
    with pytest.raises(TraceError, match="its name says"):
        merge_files(files, tmp_path / "out.json")
    given = read_window(files, file_ranks={str(files[0]): "TP1", str(files[1]): "TP0"})
    assert (given.ranks, given.notes) == (("TP0", "TP1"), ())


@pytest.mark.parametrize(
    ("name", "rank"),
    [
        ("dp1_pp0_tp1_dcp0_ep3_rank3.json", 3),  # counted through all replicas
        ("dp1_pp0_tp1_dcp0_ep3_rank1.json", 3),  # counted within its own
        ("1-TP-1-DP-3.trace.json", 1),
        ("1-TP-1-PP-1.trace.json", 3),
    ],
)
def test_replicas_are_counted_in_two_ways(tmp_path: Path, name: str, rank: int) -> None:
    other = write(tmp_path, document(KERNELS), "dp0_pp0_tp0_dcp0_ep0_rank0.json")
    table = read_window([write(tmp_path, document(KERNELS, rank=rank, size=8), name), other])
    assert (len(table.ranks), table.notes) == (2, ())


def test_the_two_stages_of_one_process_are_no_several_files(tmp_path: Path) -> None:
    files = [
        write(tmp_path, document(KERNELS), f"a-{stage}.json") for stage in ("EXTEND", "DECODE")
    ]
    assert (read_window(files).ranks, len(read_window(files).frame)) == (("TP0",), 4)
    with pytest.raises(TraceError, match="has no rank"):
        read_window([*files, write(tmp_path, document(KERNELS), "b-DECODE.json")])


@pytest.mark.parametrize(
    "info", [{"rank": -1, "world_size": 8}, {"rank": None, "world_size": 8}, {"world_size": 2}]
)
def test_contents_of_one_of_many_may_hold_no_rank(tmp_path: Path, info: dict[str, Any]) -> None:
    path = write(tmp_path, document(KERNELS, distributedInfo=info), "a.json")
    with pytest.raises(TraceError, match=r"a\.json has no rank"):
        read_window(path)
    assert read_window(path, file_ranks={"a.json": "TP6"}).ranks == ("TP6",)


# A coordinator beside the ranks --------------------------------------------------------------


def test_a_coordinator_is_left_out_with_a_note(tmp_path: Path) -> None:
    window = tmp_path / "window"
    for rank in (0, 1):
        write(
            window, document(KERNELS), f"dp0_pp0_tp{rank}_dcp0_ep{rank}_rank{rank}.1.pt.trace.json"
        )
    front = write(window, document(KERNELS), "host_12.async_llm.1771.pt.trace.json")
    for paths in (window, sorted(window.iterdir())):
        table = read_window(paths)
        assert table.ranks == ("DP0 TP0", "DP0 TP1")
        assert len(table.frame) == 2 * len(KERNELS)
        (note,) = table.notes
        assert note.startswith(f"{front.name} is left out")
        assert str(front) not in table.files
    merged = merge_files(window_files(window), tmp_path / "merged.json")
    assert list(merged.events) == ["DP0 TP0", "DP0 TP1"]
    assert [note for note in merged.notes if "left out" in note] == [note]
    # Alone it is what was asked for; and a word of a prefix makes no coordinator of a rank.
    assert rows(read_window(front)) == ROWS
    prefixed = write(tmp_path, document(KERNELS), "async_llm-1-TP-1.trace.json")
    assert read_window([front.rename(tmp_path / "rank0.json"), prefixed]).ranks == ("TP0", "TP1")


# What somebody says ---------------------------------------------------------------------------


def test_a_file_is_given_by_name_path_or_the_end_of_its_path(tmp_path: Path) -> None:
    files = [write(tmp_path, document(KERNELS), f"{folder}/trace_0.json") for folder in "ab"]
    ends = {"a/trace_0.json": "TP3", str(files[1]): "TP2"}
    assert read_window(files, file_ranks=ends).ranks == ("TP2", "TP3")
    for name, count in (("trace_0.json", 2), ("trace.json", 0), ("", 0), ("0.json", 0)):
        with pytest.raises(TraceError, match=rf"is given as TP0, but {count} of the files"):
            read_window(files, file_ranks={name: "TP0"})


def test_one_label_for_two_files_is_one_rank_in_two_files(tmp_path: Path) -> None:
    files = [write(tmp_path, document(KERNELS), name) for name in ("a.json", "b.json")]
    with pytest.raises(TraceError, match="rank TP0 is in two files"):
        read_window(files, file_ranks={"a.json": "TP0", "b.json": "TP0"})


def test_the_folder_of_a_run_may_hold_a_folder_for_each_rank(tmp_path: Path) -> None:
    for rank in (0, 1):
        write(tmp_path, document(KERNELS), f"run/rank{rank}/trace.json")
    write(tmp_path, document(KERNELS), "run/other/trace.json")
    table = read_window(tmp_path / "run")
    assert table.ranks == ("TP0", "TP1")
    assert len(table.files) == 2


# Reports of nsys ------------------------------------------------------------------------------


def report(path: Path, *owners: tuple[int, int], dur: int = 500) -> Path:
    """An export with ten kernels of each (process, device)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    table = [
        kernel(1000 * (1 + at), 1000 * (1 + at) + dur, deviceId=device, globalPid=global_id(pid))
        for pid, device in owners
        for at in range(10)
    ]
    return make_export(path, CUPTI_ACTIVITY_KIND_KERNEL=table, StringIds=STRINGS)


@pytest.mark.parametrize("names", ["rank{}.sqlite", "run-rank-{}.sqlite", "rank{}/report.sqlite"])
def test_a_report_a_rank(tmp_path: Path, names: str) -> None:
    files = [report(tmp_path / names.format(at), (100, 0), dur=500 + at) for at in (0, 1)]
    table = read_window(files)
    assert table.ranks == ("TP0", "TP1")
    sums = table.by("rank").set_index("rank")["total_ns"].to_dict()
    assert sums == {"TP0": 5000, "TP1": 5010}
    assert "ranks of nsys activities: by the report's name: TP1" in table.notes
    # Added up by the engine, or drawn as rows, a report has the same rank.
    name = names_of_reports(files, {})[files[1]]
    assert read_sums(files[1], name=name).rank == ("TP1",)
    assert [row.rank for row in stream_rows(files[1], name=name)] == ["TP1"]
    assert set(read_sums(to_parquet(files[1], tmp_path / "p"), name=name).rank) == {"TP1"}


@pytest.mark.parametrize("names", ["node{}.sqlite", "w.node-{}.sqlite", "node{}/report.sqlite"])
def test_a_report_a_node(tmp_path: Path, names: str) -> None:
    files = [report(tmp_path / names.format(at), (100, 0), (101, 1)) for at in (0, 1)]
    node = "node-{}" if "-" in names else "node{}"
    table = read_window(files)
    assert table.ranks == tuple(f"{node.format(n)} GPU{gpu}" for n in (0, 1) for gpu in (0, 1))
    assert read_window(files[0]).ranks == ("GPU0", "GPU1"), "alone it needs no node"
    known = read_window(files[0], pid_ranks={100: "TP0", 101: "TP1"})
    assert known.ranks == ("TP0", "TP1")


def test_reports_of_unknown_ranks_are_refused_until_somebody_names_them(tmp_path: Path) -> None:
    files = [report(tmp_path / f"report{at}.sqlite", (100, 0)) for at in (1, 2)]
    with pytest.raises(TraceError, match="GPU0 is in two files") as caught:
        read_window(files)  # two ranks, or one rank twice: the names do not say
    assert "--rank FILE=LABEL" in caught.value.hint
    given = {"report1.sqlite": "TP0", "report2.sqlite": "TP1"}
    assert read_window(files, file_ranks=given).ranks == ("TP0", "TP1")
    known = {100: "TP4"}  # which is the same process in both
    with pytest.raises(TraceError, match="TP4 is in two files"):
        read_window(files, pid_ranks=known)


def test_a_report_of_several_ranks_takes_a_node_and_no_rank(tmp_path: Path) -> None:
    files = [report(tmp_path / f"{name}.sqlite", (100, 0), (101, 1)) for name in "ab"]
    nodes = {"a.sqlite": "left", "b.sqlite": "right"}
    labels = ("left GPU0", "left GPU1", "right GPU0", "right GPU1")
    assert read_window(files, file_ranks=nodes).ranks == labels
    with pytest.raises(TraceError, match="is given as TP0, but it holds GPU0, GPU1"):
        read_window(files[0], file_ranks={"a.sqlite": "TP0"})


def test_a_trace_beside_a_report_may_be_given(tmp_path: Path) -> None:
    paths = [report(tmp_path / "a.sqlite", (100, 0)), write(tmp_path, document(KERNELS), "t.json")]
    given = {"a.sqlite": "TP0", "t.json": "TP1"}
    assert read_window(paths, file_ranks=given).ranks == ("TP0", "TP1")


def test_devices_of_one_process_in_a_report_a_rank(tmp_path: Path) -> None:
    files = [report(tmp_path / f"rank{at}.sqlite", (100, 0), (100, 1)) for at in (0, 1)]
    assert read_window(files).ranks == ("TP0 GPU0", "TP0 GPU1", "TP1 GPU0", "TP1 GPU1")
    assert names_of_reports(files[:1], {}) == {files[0]: ReportName("TP0")}


# Streams --------------------------------------------------------------------------------------


def two_contexts(size: int, **more: Any) -> list[dict[str, Any]]:
    """A short kernel of one context inside a long one of another, on their streams 7."""
    return [
        trace_kernel(name, start + 100 * at, dur, context=context, **more)
        for at in range(size)
        for name, start, dur, context in (("long_gemm", 0, 90, 1), ("short_norm", 10, 20, 2))
    ]


@pytest.mark.parametrize("size", [40, 20_000])  # decoded, and scanned
def test_two_contexts_of_one_process_are_two_streams(tmp_path: Path, size: int) -> None:
    name = "1-TP-0.trace.json"
    table = read_window(write(tmp_path, document(two_contexts(size, pad="x" * 80)), name))
    assert (len(table.frame), table.notes) == (2 * size, ())
    assert table.frame["dur_ns"].sum() == size * 110_000
    # Within one context the same is still impossible.
    events = two_contexts(size)
    for event in events:
        event["args"]["context"] = 1
    table = read_window(write(tmp_path, document(events), name))
    assert len(table.frame) == size
    assert f"excluded {size} kernels" in table.notes[0]


@pytest.mark.parametrize("context", [-1, 2**40, "0x7f", 2**70, None])
def test_odd_contexts_change_no_figure(tmp_path: Path, context: Any) -> None:
    events = two_contexts(20_000, pad="x" * 80)
    for event in events[1::2]:
        event["args"]["context"] = context
    table = read_window(write(tmp_path, document(events), "1-TP-0.trace.json"))
    assert table.frame["dur_ns"].sum() == 20_000 * 110_000


def test_two_contexts_of_one_process_in_a_report(tmp_path: Path) -> None:
    pairs = [(0, 900, 1), (100, 300, 2)]
    table = [
        kernel(1000 * (1 + at) + start, 1000 * (1 + at) + end, contextId=context)
        for at in range(10)
        for start, end, context in pairs
    ]
    path = make_export(tmp_path / "w.sqlite", CUPTI_ACTIVITY_KIND_KERNEL=table, StringIds=STRINGS)
    for source in (path, to_parquet(path, tmp_path / "parquet")):
        both = read_window(source)
        assert (len(both.frame), int(both.frame["dur_ns"].sum())) == (20, 11_000)
        sums = read_sums(source)
        assert (sum(sums.count), sum(sums.total_ns)) == (20, 11_000)


def test_the_server_s_own_name_is_the_first_row() -> None:
    assert Rank.from_file_name("p-1-TP-1-DP-0-EP-1-DECODE.trace.json.gz") == Rank(dp=0, tp=1, ep=1)
    for name in ("1-TP-1.txt", "1-DP-1.trace.json", "rank-1.json", "1-TP-1-DP-0-DP-1.trace.json"):
        assert Rank.from_file_name(name) is None
