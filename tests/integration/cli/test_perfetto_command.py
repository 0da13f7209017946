"""`sglprof export --to perfetto` as a user runs it."""

from __future__ import annotations

import base64
import gzip
import json
import re
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from pytest_sglprof._cli.main import main
from pytest_sglprof._report import perfetto
from tests.support import plain_traces as plain

MERGE = ("export", "--to", "perfetto")
Output = pytest.CaptureFixture[str]
HOSTILE = ("<script>alert(1)</script>", "</script>", "a\"b'c\\d", "🦥", "y" * 10_000)


def trace(rank: int, scale: float = 1.0) -> dict[str, Any]:
    """60 steps of five hostile kernels and one collective."""
    events: list[dict[str, Any]] = []
    at = 1000.0
    for step in range(60):
        begin = at
        for name in (*HOSTILE, "ncclDevKernel_AllReduce_Sum_bf16"):
            dur = round(50 * (1.0 if "nccl" in name else scale), 3)
            events.append(
                {"ph": "X", "cat": "kernel", "name": name, "pid": 0, "tid": 7, "ts": at,
                 "dur": dur, "args": {"stream": 7, "device": 0, "correlation": 0}}
            )  # fmt: skip
            at = round(at + dur + 1, 3)
        name = f"step[DECODE bs=4 forward_id={step}]"
        for cat, pid in (("gpu_user_annotation", 0), ("user_annotation", 99)):
            events.append(
                {"ph": "X", "cat": cat, "name": name, "pid": pid, "tid": 7, "ts": begin,
                 "dur": round(at - begin, 3), "args": {"External id": step + 1}}
            )  # fmt: skip
        at += 100
    info = {"backend": "nccl", "rank": rank, "world_size": 2}
    return {"baseTimeNanoseconds": 10**18, "distributedInfo": info, "traceEvents": events}


@pytest.fixture
def window(tmp_path: Path) -> Path:
    folder = tmp_path / "window"
    folder.mkdir()
    for rank in range(2):
        text = json.dumps(trace(rank, 1.4 if rank else 1.0))
        (folder / f"p-1-TP-{rank}.trace.json.gz").write_bytes(gzip.compress(text.encode()))
    return folder


def load(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(gzip.decompress(path.read_bytes()))
    return found


def named(found: dict[str, Any], what: str) -> dict[tuple[int, int], str]:
    return {
        (e["pid"], e["tid"]): e["args"]["name"] for e in found["traceEvents"] if e["name"] == what
    }


def test_events_summary_rows_and_findings(window: Path, tmp_path: Path, capsys: Output) -> None:
    out = tmp_path / "merged.json.gz"
    assert main([*MERGE, str(window), "-o", str(out)]) == 0
    printed, errors = capsys.readouterr()
    assert printed.splitlines()[:2] == ["TP0: 480 events", "TP1: 480 events"]
    assert errors == ""
    found = load(out)
    events = found["traceEvents"]
    for rank in range(2):
        mine = Counter(
            (e["cat"], e["name"]) for e in events if str(e["pid"])[:3] == f"{100 + rank}"
            and e["ph"] == "X"
        )  # fmt: skip
        assert mine == Counter((e["cat"], e["name"]) for e in trace(rank)["traceEvents"])
    rows = named(found, "thread_name")
    summary = [name for (pid, _), name in sorted(rows.items()) if pid == 1]
    assert summary == [
        "TP0 step", "TP1 step", "TP0 compute", "TP1 compute",
        "TP0 communication", "TP1 communication",
    ]  # fmt: skip
    sort = {e["pid"]: e["args"]["sort_index"] for e in events if e["name"] == "process_sort_index"}
    assert min(sort, key=lambda pid: sort[pid]) == 1
    slices = [e for e in events if e["pid"] == 1 and e["ph"] == "X"]
    assert Counter(e["cat"] for e in slices) == {
        "sglprof step": 120, "sglprof compute": 120, "sglprof communication": 120,
    }  # fmt: skip
    compute = [e for e in slices if rows[1, e["tid"]] == "TP1 compute"]
    assert {e["args"]["kernel_ns"] for e in compute} == {5 * 70_000}
    assert {e["args"]["kernels"] for e in compute} == {5}
    first = min(e["ts"] for e in events if e.get("cat") == "kernel" and str(e["pid"])[:3] == "101")
    assert min(e["ts"] for e in compute) == first
    findings = [e for e in events if e["ph"] == "i"]
    assert findings[0]["name"].startswith("TP1 is 1.40x slower than its peers in compute")
    assert all(rows[1, e["tid"]] == "TP1 compute" and e["pid"] == 1 for e in findings)


def test_only_kernels_is_the_kernel_table(window: Path, tmp_path: Path) -> None:
    out = tmp_path / "small.json.gz"
    assert main([*MERGE, str(window), "--only", "kernels", "-o", str(out)]) == 0
    found = load(out)
    base = found["baseTimeNanoseconds"]
    for rank, file in enumerate(sorted(window.iterdir())):
        mine = sorted(
            (e["name"], "kernel", base + plain.ns(e["ts"]), plain.ns(e["dur"]))
            for e in found["traceEvents"]
            if e.get("cat") == "kernel" and e["pid"] == 1000 + rank
        )
        assert mine == plain.gpu_rows(file)
    assert named(found, "thread_name")[1001, 7] == "TP1 stream 7"


def test_only_kernels_takes_an_nsys_export(shared_data: Path, tmp_path: Path) -> None:
    import sqlite3

    report = shared_data / "nsys" / "mfu_2gpu_before.sqlite"
    out = tmp_path / "small.json.gz"
    assert main([*MERGE, str(report), "--only", "kernels", "-o", str(out)]) == 0
    found = Counter(e["cat"] for e in load(out)["traceEvents"] if e.get("pid", 0) >= 1000
                    and e["ph"] == "X")  # fmt: skip
    with sqlite3.connect(f"file:{report}?mode=ro&immutable=1", uri=True) as database:
        query = "select count(*) from CUPTI_ACTIVITY_KIND_KERNEL"
        assert found["kernel"] == database.execute(query).fetchone()[0]


def test_a_report_of_nsys_as_a_whole_is_refused(tmp_path: Path, capsys: Output) -> None:
    (tmp_path / "a.sqlite").write_bytes(b"SQLite format 3\0")
    out = tmp_path / "o.json.gz"
    assert main([*MERGE, str(tmp_path / "a.sqlite"), "-o", str(out)]) == 2
    assert "--only kernels" in capsys.readouterr().err
    assert not out.exists()


def test_real_ranks_with_a_prefix_and_an_idle_replica(shared_data: Path, tmp_path: Path) -> None:
    out = tmp_path / "merged.json.gz"
    folder = shared_data / "torch/sglang-cpu-tp2dp2"
    assert main([*MERGE, str(folder), "-o", str(out)]) == 0
    found = load(out)
    assert list(found["sglprof"]["ranks"]) == ["DP0 TP0", "DP0 TP1", "DP1 TP0", "DP1 TP1"]
    total = sum(len(load(file)["traceEvents"]) for file in folder.iterdir())
    assert sum(found["sglprof"]["ranks"].values()) == total
    page = (tmp_path / "merged.open.html").read_text()
    assert "DP1 TP1) (step|compute|communication)" in page


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["none"], "does not exist"),
        (["{window}", "-o", "x.pftrace"], ".json.gz"),
        (["{window}"], "-o"),
        (["{window}/p-1-TP-0.trace.json.gz", "-o", "{window}/p-1-TP-0.trace.json.gz"], "to merge"),
        (["{window}", "{window}", "-o", "{window}/o.json.gz"], "twice"),
    ],
)
def test_what_is_wrong_is_said(
    window: Path, capsys: Output, words: list[str], message: str
) -> None:
    told = [word.format(window=window) for word in words]
    if "-o" not in told and message != "-o":
        told += ["-o", str(window / "o.json.gz")]
    assert main([*MERGE, *told]) == 2
    assert message in capsys.readouterr().err
    assert not (window / "o.json.gz").exists()


def test_a_cut_file(window: Path, tmp_path: Path, capsys: Output) -> None:
    file = window / "p-1-TP-1.trace.json.gz"
    file.write_bytes(file.read_bytes()[:-200])
    out = tmp_path / "merged.json.gz"
    assert main([*MERGE, str(window), "-o", str(out)]) == 2
    assert not out.exists()
    capsys.readouterr()
    assert main([*MERGE, str(window), "-o", str(out), "--allow-partial"]) == 0
    errors = capsys.readouterr().err
    assert "truncated" in errors
    assert 0 < load(out)["sglprof"]["ranks"]["TP1"] < 480


class Page(HTMLParser):
    """Tags with their attributes, and the texts of scripts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))


def test_the_page_holds_the_trace_and_the_documented_commands(window: Path, tmp_path: Path) -> None:
    name = "m <script>alert(1)<&\"'.json.gz"
    out = tmp_path / name.replace("/", "")
    assert main([*MERGE, str(window), "-o", str(out)]) == 0
    text = out.with_name(out.name.replace("json.gz", "open.html")).read_text()
    page = Page(text)
    assert [tag for tag, _ in page.tags].count("script") == 2
    data = next(attrs for tag, attrs in page.tags if attrs.get("id") == "data")
    assert data["data-name"] == out.name
    assert base64.b64decode(data["data-trace"] or "") == out.read_bytes()
    commands = json.loads(data["data-commands"] or "")
    assert [command["id"] for command in commands] == [
        "dev.perfetto.CollapseTracksByRegex",
        "dev.perfetto.PinTracksByRegex",
    ]
    pattern = re.compile(commands[1]["args"][0])
    rows = set(named(load(out), "thread_name").values())
    assert {row for row in rows if pattern.search(row)} == {"TP0 stream 7", "TP1 stream 7"}
    loaded = [attrs for tag, attrs in page.tags if tag in ("script", "link", "img", "iframe")]
    assert all("src" not in attrs and "href" not in attrs for attrs in loaded)


def test_a_large_trace_is_not_embedded(
    window: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(perfetto, "EMBED_BYTES", 10)
    assert main([*MERGE, str(window), "-o", str(tmp_path / "m.json.gz")]) == 0
    page = Page((tmp_path / "m.open.html").read_text())
    assert next(a for _, a in page.tags if a.get("id") == "data")["data-trace"] == ""


def test_pages_of_two_traces_lie_beside_each_other(window: Path, tmp_path: Path) -> None:
    for name in ("before.json.gz", "after.trace.json"):
        assert main([*MERGE, str(window), "-o", str(tmp_path / name)]) == 0
    before, after = ((tmp_path / f"{name}.open.html").read_text() for name in ("before", "after"))
    assert "before.json.gz" in before
    assert "after.trace.json" in after
    assert "8000/after.open.html" in after
