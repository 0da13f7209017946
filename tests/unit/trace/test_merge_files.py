"""Merging traces: every event is carried over, held against plain json."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from pytest_sglprof._errors import NotATrace, TraceError, TraceTruncated
from pytest_sglprof._trace.merge.files import Merged, merge_files
from tests.support.kineto import BASE, document, event, kernel, kineto_text, write
from tests.support.scanned import LAYOUTS, one_key_a_line

HOSTILE = (
    '<script>alert("x")</script>',
    "</script>",
    "\\ back\\slash \"quotes\" 'single' \x7f",
    "emoji 🦥 and ünïcödé",
    '}, {"ph": "X", "pid": 3, "id": 4}',
    "x" * 10_000,
)
Events = list[dict[str, Any]]


def rank_events(rank: int, count: int = 200) -> Events:
    """Metadata, host events, flows, kernels with hostile names, spans with textual pids."""
    cpu = 4000 + rank
    found: Events = [
        {"ph": "M", "name": "process_name", "ts": 1.5, "pid": cpu, "tid": 0,
         "args": {"name": "python"}},
        {"ph": "M", "name": "process_labels", "ts": 1.5, "pid": 0, "tid": 0,
         "args": {"labels": "GPU 0"}},
        {"ph": "M", "name": "process_sort_index", "ts": 1.5, "pid": 0, "tid": 0,
         "args": {"sort_index": 16777216}},
        {"ph": "M", "name": "thread_name", "ts": 1.5, "pid": 0, "tid": 7,
         "args": {"name": "stream 7 "}},
    ]  # fmt: skip
    for at in range(count):
        found += [
            event("python_function", f"a.py({at}): f", at * 10, 9.5, cpu, cpu, **{"Python id": at}),
            {"ph": "s", "id": at, "pid": cpu, "tid": cpu, "ts": at * 10, "cat": "ac2g",
             "name": "ac2g"},
            kernel(HOSTILE[at % len(HOSTILE)], at * 10 + 2.001, 5.25, correlation=at),
            {"ph": "f", "id": at, "pid": 0, "tid": 7, "ts": at * 10 + 2.001, "cat": "ac2g",
             "name": "ac2g", "bp": "e"},
        ]  # fmt: skip
    found.append(event("Trace", "PyTorch Profiler (0)", 0, 99, "Spans", "PyTorch Profiler"))
    found.append({"ph": "i", "s": "g", "name": "Record Window End", "pid": "", "tid": "", "ts": 9})
    return found


def merged(paths: list[Path], out: Path, **options: Any) -> tuple[Merged, dict[str, Any]]:
    result = merge_files(paths, out, **options)
    return result, json.loads(gzip.decompress(out.read_bytes()))


def key(found: dict[str, Any]) -> tuple[Any, ...]:
    """What of an event may not change: all but its ids."""
    rest = {k: v for k, v in found.items() if k not in ("pid", "id")}
    return (json.dumps(rest, sort_keys=True),)


def of_rank(document: dict[str, Any], rank: int) -> Events:
    return [e for e in document["traceEvents"] if str(e["pid"])[:3] == str(100 + rank)]


def without_metadata(events: Events) -> Counter[tuple[Any, ...]]:
    return Counter(key(e) for e in events if e["ph"] != "M")


def packed(text: str) -> bytes:
    return gzip.compress(text.encode("utf-8", "surrogatepass"), mtime=0)


@pytest.mark.parametrize("layout", [*LAYOUTS, "kineto"])
@pytest.mark.parametrize("piece", [700, 64 * 1024])
def test_every_event_of_every_layout_is_there(
    tmp_path: Path, layout: str, piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pytest_sglprof._trace.merge.files.PIECE", piece)
    paths = []
    for rank in range(2):
        events = rank_events(rank)
        text = kineto_text(document(events)) if layout == "kineto" else LAYOUTS[layout](events)
        paths.append(write(tmp_path, text, f"my-run-TP-{rank}.trace.json.gz"))
    result, found = merged(paths, tmp_path / "out.json.gz")
    assert result.events == {"TP0": len(rank_events(0)), "TP1": len(rank_events(1))}
    assert result.lost == 0
    for rank in range(2):
        truth = json.loads(gzip.decompress(paths[rank].read_bytes()).decode("utf-8-sig"))
        expected = without_metadata(truth["traceEvents"])
        assert without_metadata(of_rank(found, rank)) == expected


def test_ids_never_meet_and_flows_still_join(tmp_path: Path) -> None:
    paths = [
        write(tmp_path, document(rank_events(rank)), f"1-TP-{rank}.trace.json") for rank in range(3)
    ]
    _, found = merged(paths, tmp_path / "out.json.gz")
    ids: list[set[Any]] = []
    for rank in range(3):
        flows = [e for e in of_rank(found, rank) if e.get("cat") == "ac2g"]
        starts = {e["id"] for e in flows if e["ph"] == "s"}
        assert starts == {e["id"] for e in flows if e["ph"] == "f"}
        assert len(starts) == 200
        ids.append(starts)
    assert not set.intersection(*ids)
    assert all(isinstance(e["pid"], int) and e["pid"] < 2**32 for e in found["traceEvents"])


def test_ranks_are_labelled_and_sorted_the_gpu_first(tmp_path: Path) -> None:
    paths = [
        write(tmp_path, document(rank_events(rank)), f"1-TP-{rank}.trace.json") for rank in (1, 0)
    ]
    _, found = merged(paths, tmp_path / "out.json.gz", ranks=("TP0", "TP1"))
    names = {
        e["args"]["name"]: e["pid"] for e in found["traceEvents"] if e["name"] == "process_name"
    }
    places = {
        e["pid"]: e["args"]["sort_index"]
        for e in found["traceEvents"]
        if e["name"] == "process_sort_index"
    }
    threads = {e["args"]["name"] for e in found["traceEvents"] if e["name"] == "thread_name"}
    assert {"TP0 GPU", "TP1 GPU", "TP0 python", "TP1 python", "TP0 Spans"} <= set(names)
    assert {"TP0 stream 7", "TP1 stream 7"} <= threads
    assert places[names["TP0 GPU"]] < places[names["TP1 GPU"]]


def test_two_clocks_become_one_exact_to_the_ns(tmp_path: Path) -> None:
    first = document([kernel("a", 10.001, 5), kernel("b", 30, 5)])
    second = document([kernel("a", 12.002, 5), kernel("b", "31.5", 5)])
    second["baseTimeNanoseconds"] = BASE + 1_234_567
    old = document([kernel("a", f"{BASE // 1000}.125", 5), kernel("b", 1.5, 5)])
    del old["baseTimeNanoseconds"]
    paths = [
        write(tmp_path, doc, f"1-TP-{rank}.trace.json")
        for rank, doc in enumerate((first, second, old))
    ]
    merge_files(paths, tmp_path / "out.json.gz")
    text = gzip.decompress((tmp_path / "out.json.gz").read_bytes()).decode()
    found = json.loads(text, parse_float=str)
    assert found["baseTimeNanoseconds"] == BASE
    times = {(str(e["pid"])[:3], e["name"]): e["ts"] for e in found["traceEvents"] if "ts" in e}
    assert times["100", "a"] == "10.001"
    assert times["101", "a"] == "1246.569"
    assert times["101", "b"] == "1266.067"
    assert times["102", "a"] == "0.125"


def test_a_file_that_sglang_merged_is_taken_apart_again(tmp_path: Path) -> None:
    events = []
    for rank in range(2):
        for e in rank_events(rank):
            events.append({**e, "pid": f"[TP{rank:02d}-DP00] {e['pid']}"})
    path = write(tmp_path, json.dumps({"traceEvents": events}), "merged-1.trace.json.gz")
    result, found = merged([path], tmp_path / "out.json.gz")
    count = len(rank_events(0))
    assert result.events == {"DP0 TP0": count, "DP0 TP1": count}
    for rank in range(2):
        expected = without_metadata(rank_events(rank))
        assert without_metadata(of_rank(found, rank)) == expected


def test_an_event_with_ids_in_its_arguments_keeps_them(tmp_path: Path) -> None:
    args = {"id": 5, "pid": 6, "deep": {"id": 7, "pid": 8}, "list": [{"a": 1}, {"a": 2}]}
    events = [*rank_events(0), *({**kernel("k", at, 1), "args": args} for at in range(50))]
    for layout in ("one line", "indented", "sorted keys", "one key a line"):
        path = write(tmp_path, LAYOUTS[layout](events), "1-TP-0.trace.json")
        result, found = merged([path], tmp_path / "out.json.gz")
        assert result.events == {"TP0": len(events)}
        assert without_metadata(of_rank(found, 0)) == without_metadata(events)


def test_damaged_events_are_mended_or_said(tmp_path: Path) -> None:
    events = rank_events(0)
    text = one_key_a_line(events)
    text = text.replace('"a.py(3): f"', '"a.py(3): "f" \\d"')  # quotes and a stray backslash
    text = text.replace('"a.py(5): f"', '"a.py(5): \x01"')  # a control character
    data = text.encode().replace(b'"a.py(7): f"', b'"a.py(7): \xff"')  # no UTF-8
    data = data.replace(b'"Python id": 9}', b'"Python id": nan}')
    data = data.replace(b'"Python id": 11}', b'"Python id": @!}')  # beyond repair
    path = write(tmp_path, data, "1-TP-0.trace.json.gz")
    result, found = merged([path], tmp_path / "out.json.gz")
    assert result.events == {"TP0": len(events) - 1}
    assert result.lost == 1
    assert "4 events were not valid JSON and were mended" in " ".join(result.notes)
    assert "1 python_function events left out: not valid JSON" in " ".join(result.notes)
    assert found["sglprof"]["notes"] == list(result.notes)
    names = {e["name"] for e in of_rank(found, 0)}
    assert 'a.py(3): "f" \\d' in names
    assert "a.py(11): f" not in names


def test_a_cut_file_is_refused_unless_allowed(tmp_path: Path) -> None:
    whole = packed(kineto_text(document(rank_events(0))))
    path = tmp_path / "1-TP-0.trace.json.gz"
    path.write_bytes(whole[: len(whole) * 2 // 3])
    out = tmp_path / "out" / "merged.json.gz"
    with pytest.raises(TraceTruncated, match="1-TP-0"):
        merge_files([path], out)
    assert not out.exists()
    result, found = merged([path], out, allow_partial=True)
    assert 0 < result.events["TP0"] < len(rank_events(0))
    assert "truncated" in " ".join(result.notes)
    truth = json.loads(gzip.decompress(whole))["traceEvents"]
    assert without_metadata(of_rank(found, 0)) <= without_metadata(truth)


@pytest.mark.parametrize("byte", [-6, -2])
def test_nothing_is_written_when_a_checksum_is_wrong(tmp_path: Path, byte: int) -> None:
    data = bytearray(packed(kineto_text(document(rank_events(0)))))
    data[byte] ^= 1
    path = tmp_path / "1-TP-0.trace.json.gz"
    path.write_bytes(data)
    with pytest.raises(TraceError, match="1-TP-0"):
        merge_files([path], tmp_path / "out.json.gz")
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize(
    ("content", "error"), [("", NotATrace), ("{}", NotATrace), ("not json", NotATrace)]
)
def test_what_is_no_trace_is_refused(tmp_path: Path, content: str, error: type[TraceError]) -> None:
    path = write(tmp_path, content, "1-TP-0.trace.json")
    with pytest.raises(error, match="1-TP-0"):
        merge_files([path], tmp_path / "out.json.gz")


def test_an_idle_rank_and_a_plain_result(tmp_path: Path) -> None:
    paths = [
        write(tmp_path, document([]), "1-TP-0.trace.json"),
        write(tmp_path, document(rank_events(1)), "1-TP-1.trace.json"),
    ]
    seen: list[tuple[int, int]] = []
    progress = lambda done, total: seen.append((done, total))  # noqa: E731
    result = merge_files(paths, tmp_path / "out.json", progress=progress)
    found = json.loads((tmp_path / "out.json").read_text())
    assert result.events == {"TP0": 0, "TP1": len(rank_events(1))}
    assert found["sglprof"]["ranks"] == result.events
    total = sum(path.stat().st_size for path in paths)
    assert seen[-1] == (total, total)


def test_one_rank_twice_is_refused(tmp_path: Path) -> None:
    paths = [write(tmp_path, document(rank_events(0)), f"{run}-TP-0.trace.json") for run in (1, 2)]
    with pytest.raises(TraceError, match="is in two files"):
        merge_files(paths, tmp_path / "out.json.gz")


REAL = (
    "a100-nccl/rank-0.json.gz",
    "sglang-mi300x/sglang_Qwen3-8B_prefilldecode.json.gz",
    "sglang-cpu-tp2",
    "sglang-cpu-tp2-nostack",
    "sglang-cpu-tp2dp2",
    "sglang-cpu-mixtral-tp2ep2",
)


@pytest.mark.parametrize("name", REAL)
def test_every_event_of_real_traces_is_there(shared_data: Path, tmp_path: Path, name: str) -> None:
    path = shared_data / "torch" / name
    inside = sorted(path.glob("[!m]*.json.gz")) if path.is_dir() else [path]
    result, found = merged(inside, tmp_path / "out.json.gz")
    labels = list(result.events)
    total = 0
    for file in inside:
        truth = json.loads(gzip.decompress(file.read_bytes()))["traceEvents"]
        total += len(truth)
        candidates = [
            at for at in range(len(labels))
            if without_metadata(of_rank(found, at)) == without_metadata(truth)
        ]  # fmt: skip
        assert len(candidates) == 1, file.name
        assert result.events[labels[candidates[0]]] == len(truth)
    assert sum(result.events.values()) == total
    assert result.lost == 0


def test_a_merged_file_beside_one_of_its_ranks_is_refused(tmp_path: Path) -> None:
    events = [{**e, "pid": f"[TP00] {e['pid']}"} for e in rank_events(0)]
    text = json.dumps({"baseTimeNanoseconds": BASE, "traceEvents": events})
    paths = [
        write(tmp_path, text, "merged-1.trace.json"),
        write(tmp_path, document(rank_events(0)), "1-TP-0.trace.json"),
    ]
    with pytest.raises(TraceError, match="TP0 is in two files"):
        merge_files(paths, tmp_path / "out.json.gz")
    assert not (tmp_path / "out.json.gz").exists()


def test_the_stages_of_one_rank_become_one_rank(tmp_path: Path) -> None:
    paths = [
        write(tmp_path, document(rank_events(0)), f"1-TP-0-{stage}.trace.json")
        for stage in ("EXTEND", "DECODE")
    ]
    result = merge_files(paths, tmp_path / "out.json.gz")
    assert result.events == {"TP0": 2 * len(rank_events(0))}
