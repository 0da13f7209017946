"""Planted windows as files: spans, graphs, collectives, and what the server says of itself."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from pytest_sglprof._trace.categories import category
from pytest_sglprof._trace.read import read_window
from pytest_sglprof.standin.dp_model import CASES, DpWindow, Prefill, make
from pytest_sglprof.standin.dp_traces import (
    COLLECTIVES,
    NAMES,
    launches_of,
    server_info,
    span_name,
    write_traces,
)
from pytest_sglprof.standin.laws import CATEGORIES, WORKS
from tests.support.plain_traces import document, ns

CASE = {case.name: case for case in CASES}


def planted(name: str, ranks: int = 4, **changed: object) -> DpWindow:
    given = {"passes": 8, "layers": 2, **changed}
    if name == "g":
        given |= {"prefills": (Prefill(1, 2, 5000),)}
    if name == "j":
        given |= {"id_reset": 4}
    return make(replace(CASE[name].make(ranks, 1, 0.02, 0.6), **given))


def complete(path: Path, cat: str) -> list[dict]:
    return [e for e in document(path)["traceEvents"] if e["ph"] == "X" and e["cat"] == cat]


def spans(path: Path) -> list[str]:
    return [e["name"] for e in complete(path, "user_annotation") if e["name"].startswith("step[")]


def test_a_span_says_what_sglang_says() -> None:
    window = planted("g")
    kv = window.kv
    assert span_name(window, 0, 0) == (
        f"step[DECODE bs=64 g_sq=64 g_sqsq=64 g_sqsk={kv[0, 0]} g_sk={kv[0, 0]} forward_id=1001]"
    )
    assert span_name(window, 3, 1) == (
        "step[EXTEND bs=1 toks=2048 c_sq=2048 c_sqsq=4194304 c_sqsk=8388608 c_sk=4096 "
        "forward_id=1004]"
    )
    assert span_name(window, 3, 1, detailed=False) == "step[EXTEND bs=1 toks=2048]"
    mixed = make(replace(window.plan, is_mixed=True))
    g = int(mixed.generation[3, 1, 1])
    assert span_name(mixed, 3, 1) == (
        "step[MIXED bs=65 c=1 g=64 c_sq=2048 c_sk=4096 c_sqsq=4194304 c_sqsk=8388608 "
        f"g_sq=64 g_sk={g} g_sqsq=64 g_sqsk={g} forward_id=1004]"
    )
    idle = make(replace(window.plan, requests=(64, 64, 0, 64)))
    assert span_name(idle, 0, 2) == "step[IDLE bs=0 forward_id=1001]"


def test_spans_of_speculation_name_the_draft_and_the_last_ones_have_no_id() -> None:
    window = planted("j")
    k = [int(window.kv[number, 0]) for number in range(4)]
    assert [span_name(window, number, 0) for number in range(4)] == [
        f"step[DRAFT bs=64 g_sq=64 g_sqsq=64 g_sqsk={k[0]} g_sk={k[0]} forward_id=1001]",
        f"step[DRAFT bs=64 g_sq=64 g_sqsq=64 g_sqsk={k[1]} g_sk={k[1]} forward_id=1002]",
        f"step[VERIFY bs=64 g_sq=256 g_sqsq=1024 g_sqsk={4 * k[2]} g_sk={k[2]} forward_id=1001]",
        f"step[DRAFT_EXTEND_V2 bs=64 c_sq=256 c_sqsq=1024 c_sqsk={4 * k[3]} c_sk={k[3]}]",
    ]
    known = planted("h")
    assert span_name(known, 3, 0).startswith("step[DRAFT bs=64 c_sq=256 ")
    assert span_name(known, 3, 0).endswith(" forward_id=1003]")
    idle = make(replace(window.plan, requests=(64, 0, 64, 64)))
    assert [span_name(idle, number, 1) for number in range(4)] == [
        "step[DRAFT bs=0 forward_id=1001]",
        "step[DRAFT bs=0 forward_id=1002]",
        "step[IDLE bs=0 forward_id=1001]",
        "step[IDLE bs=0]",
    ]


@pytest.mark.parametrize("name", ["a", "f", "g", "h"])
def test_collectives_end_together_and_the_last_to_arrive_only_exchanges(name: str) -> None:
    window = planted(name)
    for number in range(len(window.is_graph)):
        meetings = []
        for rank in range(4):
            start = int(window.start[number, rank])
            launches = launches_of(window, number, rank)
            collectives = [each for each in launches if each.kernel.kind == "collective"]
            meetings.append([(start + c.start_ns, c.dur_ns, c.kernel.name) for c in collectives])
            waited = sum(c.dur_ns for c in collectives) / 1000
            parts = window.waiting[number, rank] + window.exchange[number, rank]
            assert waited == pytest.approx(parts, abs=1e-6)
            end = launches[-1].start_ns + launches[-1].dur_ns
            assert start + end == window.end[number, rank]
        layers, head = int(window.layer_count[number]), int(window.transfer[number, 2] > 0)
        assert len(meetings[0]) == 2 * layers + head
        for at, meeting in enumerate(zip(*meetings, strict=True)):
            assert len({start + lasts for start, lasts, _ in meeting}) == 1
            assert len({kernel for _, _, kernel in meeting}) == 1
            which = 2 if at == 2 * layers else at % 2
            assert min(lasts for _, lasts, _ in meeting) == window.transfer[number, which]


def test_kernels_have_names_of_their_category() -> None:
    assert {work.name: category(NAMES[work.name]) for work in WORKS} == {
        work.name: work.category for work in WORKS
    }
    names = {name for pair in COLLECTIVES.values() for name in pair}
    assert {category(name) for name in names} == {"communication"}


@pytest.mark.parametrize("name", ["b", "f", "g", "j"])
def test_the_files_hold_what_is_planted(name: str, tmp_path: Path) -> None:
    window = planted(name)
    paths = write_traces(window, tmp_path, "w")
    assert [path.name for path in paths] == [
        f"w-TP-{rank}-DP-{rank}-EP-{rank}.trace.json.gz" for rank in range(4)
    ]
    for rank, path in enumerate(paths):
        sums: Counter[str] = Counter()
        for event in complete(path, "kernel"):
            sums[category(event["name"])] += ns(event["dur"])
        planted_ns = 1000 * window.times[:, rank].sum(axis=0)
        for index, each in enumerate(CATEGORIES):
            assert sums.pop(each) == round(planted_ns[index])
        exchanged = window.waiting[:, rank].sum() + window.exchange[:, rank].sum()
        assert sums == {"communication": round(1000 * exchanged)}
        passes = range(len(window.is_graph))
        assert spans(path) == [span_name(window, number, rank) for number in passes]


@pytest.mark.parametrize("name", ["b", "g", "h", "j"])
def test_no_kernel_begins_before_its_launch_and_graphs_have_one(name: str, tmp_path: Path) -> None:
    window = planted(name, ranks=2)
    for path in write_traces(window, tmp_path):
        calls = complete(path, "cuda_runtime")
        launched = {event["args"]["correlation"]: event for event in calls}
        assert len(launched) == len(calls)
        nodes: defaultdict[int, list[int]] = defaultdict(list)
        last = 0
        for event in complete(path, "kernel"):
            args, start = event["args"], ns(event["ts"])
            call = launched[args["correlation"]]
            assert start >= ns(call["ts"]) + ns(call["dur"])
            assert start >= last  # one stream
            last = start + ns(event["dur"])
            assert ("graph node id" in args) == (call["name"] == "cudaGraphLaunch")
            nodes[args["correlation"]].append(args.get("graph node id", 0))
        graphs = [c for c, call in launched.items() if call["name"] == "cudaGraphLaunch"]
        assert len(graphs) == window.is_graph.sum() > 0
        assert all(len(set(nodes[each])) == len(nodes[each]) > 5 for each in graphs)
        assert set(launched) == set(nodes)


def test_the_host_meets_once_an_iteration_and_its_spans_do_not_overlap(tmp_path: Path) -> None:
    window = planted("h")
    for path in write_traces(window, tmp_path):
        annotations = complete(path, "user_annotation")
        steps, batches = [], []
        for event in annotations:
            interval = (ns(event["ts"]), ns(event["ts"]) + ns(event["dur"]))
            (batches if event["name"] == "scheduler.run_batch" else steps).append(interval)
        assert (len(batches), len(steps)) == (8, 32)
        for intervals in (steps, batches):
            assert all(a[1] <= b[0] for a, b in pairwise(intervals))
        for at, (begin, end) in enumerate(steps):
            outer = batches[at // 4]
            assert outer[0] <= begin < end <= outer[1]


def test_the_reader_finds_the_passes_and_sampling_comes_after_the_span(tmp_path: Path) -> None:
    window = planted("g")
    write_traces(window, tmp_path)
    table = read_window(tmp_path)
    assert table.ranks == tuple(f"DP{rank} TP{rank} EP{rank}" for rank in range(4))
    steps = table.steps[table.steps["rank"] == table.ranks[1]]
    assert steps["forward_id"].tolist() == window.forward_id[:, 1].tolist()
    assert steps["batch_size"].tolist() == window.batch[:, 1].tolist()
    kernels = table.frame[table.frame["rank"] == table.ranks[1]]
    inside = kernels[kernels["category"] != "sampling"].groupby("step")["dur_ns"].sum().tolist()
    sampled = window.times[:, 1, CATEGORIES.index("sampling")]
    lasted = (window.end - window.start)[:, 1] - np.rint(1000 * sampled).astype(int)
    assert inside == lasted.tolist()


def test_a_late_rank_lacks_its_first_pass_and_without_ids_none_is_written(tmp_path: Path) -> None:
    window = planted("i")
    paths = write_traces(window, tmp_path, has_ids=False)
    counted = [len(spans(path)) for path in paths]
    assert counted == [8, 7, 8, 8]
    assert all("forward_id" not in name and "g_sk=" in name for name in spans(paths[1]))
    assert document(paths[1])["baseTimeNanoseconds"] == document(paths[0])["baseTimeNanoseconds"]


def test_the_server_says_what_decides_about_the_bucket() -> None:
    gather, local = server_info(planted("a")), server_info(planted("f"))
    keys = ("moe_a2a_backend", "moe_dense_tp_size", "enable_dp_lm_head")
    assert [gather[key] for key in keys] == ["none", None, False]
    assert [local[key] for key in keys] == ["deepep", 1, True]
    assert gather["cuda_graph_config"]["decode"]["bs"][:6] == [1, 2, 4, 8, 12, 16]
    assert (gather["enable_dp_attention"], gather["attn_dp_size"], gather["ep_size"]) == (
        True,
        4,
        4,
    )
    assert gather["speculative_algorithm"] is None
    speculating = server_info(planted("h"))
    assert speculating["speculative_algorithm"] == "EAGLE"
    assert speculating["speculative_num_draft_tokens"] == 4
