"""Sums of nsys reports by the engine, against SQL, plain Python and the reader of rows."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pytest_sglprof._errors import TraceError
from pytest_sglprof._trace.nsys import report
from pytest_sglprof._trace.nsys.report import read_report
from pytest_sglprof._trace.nsys.sums import KernelSums, read_sums
from pytest_sglprof._trace.read import read_window
from tests.support.nsys_exports import (
    CPU_FILES,
    CPU_PIDS,
    GPU_FILES,
    STRINGS,
    by_name,
    global_id,
    kernel,
    make_export,
    nvtx,
    to_parquet,
)

Sums = dict[tuple[str, str, str], tuple[int, int]]
COPIES = {1: "Host-to-Device", 2: "Device-to-Host", 8: "Device-to-Device"}


def of(sums: KernelSums) -> Sums:
    keys = zip(sums.rank, sums.full_name, sums.kind, strict=True)
    values = zip(sums.count, sums.total_ns, strict=True)
    return dict(zip(keys, values, strict=True))


def from_rows(path: Path, **known: Any) -> Sums:
    """The same from the reader of rows, added up in plain Python."""
    found: Sums = {}
    for part in read_report(path, **known):
        rows = zip(part.name_codes.tolist(), part.kind_codes.tolist(), part.dur.tolist(),
                   strict=True)  # fmt: skip
        for name, kind, dur in rows:
            key = (part.rank, part.names[name], part.kinds[kind])
            count, total = found.get(key, (0, 0))
            found[key] = (count + 1, total + dur)
    return found


@pytest.fixture
def no_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading row by row is an error."""

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("read row by row")

    monkeypatch.setattr(report, "read_report", refuse)


def sql(path: Path, words: str) -> list[tuple[Any, ...]]:
    with closing(sqlite3.connect(f"{path.as_uri()}?immutable=1", uri=True)) as connection:
        return connection.execute(words).fetchall()


@pytest.mark.usefixtures("no_rows")
@pytest.mark.parametrize("form", ["sqlite", "parquet"])
@pytest.mark.parametrize("name", GPU_FILES)
def test_real_sums_are_those_of_sql(
    shared_data: Path, tmp_path: Path, name: str, form: str
) -> None:
    path = shared_data / "nsys" / name
    truth: Sums = {}
    words = (
        "SELECT k.deviceId, s.value, COUNT(*), SUM(k.end - k.start) "
        "FROM CUPTI_ACTIVITY_KIND_KERNEL k JOIN StringIds s ON s.id = k.demangledName GROUP BY 1, 2"
    )
    for device, text, count, total in sql(path, words):
        truth[f"GPU{device}", text, "kernel"] = (count, total)
    words = (
        "SELECT deviceId, copyKind, COUNT(*), SUM(end - start) "
        "FROM CUPTI_ACTIVITY_KIND_MEMCPY GROUP BY 1, 2"
    )
    for device, copy, count, total in sql(path, words):
        truth[f"GPU{device}", f"[CUDA memcpy {COPIES[copy]}]", "memcpy"] = (count, total)
    words = "SELECT deviceId, COUNT(*), SUM(end - start) FROM CUPTI_ACTIVITY_KIND_MEMSET GROUP BY 1"
    for device, count, total in sql(path, words):
        truth[f"GPU{device}", "[CUDA memset]", "memset"] = (count, total)
    found = read_sums(path if form == "sqlite" else to_parquet(path, tmp_path / "pq"))
    assert of(found) == truth
    assert found.source == "gpu"


@pytest.mark.parametrize("known", [{}, {"pid_ranks": CPU_PIDS}])
@pytest.mark.parametrize("form", ["sqlite", "parquet"])
@pytest.mark.parametrize("name", [*GPU_FILES, *CPU_FILES])
def test_real_sums_ranks_and_notes_are_those_of_the_rows(
    shared_data: Path, tmp_path: Path, name: str, form: str, known: dict[str, Any]
) -> None:
    path = shared_data / "nsys" / name
    if form == "parquet":
        path = to_parquet(path, tmp_path / "pq")
    found = read_sums(path, **known)
    assert of(found) == from_rows(path, **known)
    rows = read_report(path, **known)
    assert list(found.notes) == list(dict.fromkeys(note for part in rows for note in part.notes))
    assert {part.source for part in rows} == {found.source}


def both(path: Path, tmp_path: Path) -> list[Path]:
    """The export as it is, and as a Parquet folder."""
    return [path, to_parquet(path, tmp_path / f"{path.stem}-pq")]


@pytest.mark.usefixtures("no_rows")
def test_the_generated_export_has_the_generators_truth(
    tmp_path: Path, project_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(project_root))
    from benchmarks.nsys_generate import nsys_inputs, truth_of
    from benchmarks.nsys_tables import group_by, right

    folder = nsys_inputs(tmp_path, kernels=8 * 220 * 11)  # both kinds of steps
    for name in ("report.sqlite", "report.parquet"):
        assert of(read_sums(folder / name)) == truth_of(folder)
    assert right(group_by(folder), folder)
    assert not right({("GPU0", "x", "kernel"): (1, 1)}, folder)


@pytest.mark.usefixtures("no_rows")
def test_rows_in_no_order_give_the_same_sums(
    tmp_path: Path, project_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(project_root))
    from benchmarks.nsys_generate import nsys_inputs, truth_of

    folder = nsys_inputs(tmp_path, kernels=8 * 220 * 11, parquet=False, in_order=False)
    path = folder / "report.sqlite"
    with closing(sqlite3.connect(path)) as database:
        starts = database.execute("SELECT start FROM CUPTI_ACTIVITY_KIND_KERNEL").fetchall()
    assert starts != sorted(starts)
    for export in both(path, tmp_path):
        assert of(read_sums(export)) == truth_of(folder)


def test_rows_in_no_order_give_the_same_table(
    tmp_path: Path, project_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(project_root))
    from benchmarks.nsys_generate import nsys_inputs

    one, other = (
        read_window(
            nsys_inputs(tmp_path / name, kernels=8 * 220 * 11, parquet=False, in_order=in_order)
            / "report.sqlite"
        )
        for name, in_order in (("sorted", True), ("shuffled", False))
    )
    keys = ("rank", "full_name", "kind", "step", "stream")
    pd.testing.assert_frame_equal(one.by(*keys), other.by(*keys))
    pd.testing.assert_frame_equal(one.steps, other.steps)
    assert one.notes == other.notes
    assert one.incomparable == other.incomparable


def graph(start: int, end: int, device: int = 0) -> dict[str, Any]:
    return {"start": start, "end": end, "deviceId": device, "globalPid": global_id(100)}


@pytest.mark.usefixtures("no_rows")
def test_what_the_engine_adds_up(tmp_path: Path) -> None:
    copy = {"start": 0, "end": 2, "deviceId": 0, "globalPid": global_id(100), "copyKind": 10}
    path = make_export(
        tmp_path / "x.sqlite",
        CUPTI_ACTIVITY_KIND_KERNEL=[
            kernel(0, 10, 1),
            kernel(5, 12, 3),  # an overlap, and another id of the same text
            kernel(5, 12, 2, globalPid=global_id(200), deviceId=3),
            kernel(20, 40, 2, graphNodeId=5),
            kernel(22, 30, 2, graphNodeId=6),  # nodes of a graph run side by side
            kernel(30, 31, 77),  # a text that is nowhere
            kernel(40, None, 1),
            kernel(41, 40, 1),
        ],
        CUPTI_ACTIVITY_KIND_MEMCPY=[copy, {**copy, "copyKind": 99}],
        CUPTI_ACTIVITY_KIND_MEMSET=[{k: v for k, v in copy.items() if k != "copyKind"}],
        CUPTI_ACTIVITY_KIND_GRAPH_TRACE=[graph(0, 2_000_000), graph(0, 500_000, device=1)],
        StringIds=[*STRINGS, {"id": 3, "value": STRINGS[0]["value"]}],
    )
    for export in both(path, tmp_path):
        found = read_sums(export, pid_ranks={200: "TP1"}, gpu_ranks={0: "TP0"})
        assert of(found) == {
            ("TP0", "void a<int>(int)", "kernel"): (2, 17),
            ("TP0", "b", "kernel"): (2, 28),
            ("TP0", "unnamed kernel", "kernel"): (1, 1),
            ("TP0", "[CUDA memcpy Peer-to-Peer]", "memcpy"): (1, 2),
            ("TP0", "[CUDA memcpy Unknown]", "memcpy"): (1, 2),
            ("TP0", "[CUDA memset]", "memset"): (1, 2),
            ("TP1", "b", "kernel"): (1, 7),
        }
        assert found.notes[0] == "skipped 2 GPU activities with a missing or negative duration"
        assert found.notes[1].startswith("2 launches of CUDA graphs (2.500 ms) were recorded as a")
        assert found.rank == ("TP0",) * 6 + ("TP1",)
        assert found.total_ns[:6] == (28, 17, 2, 2, 2, 1)
        assert found.name[1] == "a"
        assert found.category[2] == "memory"


IMPOSSIBLE = [kernel(0, 100, 1), kernel(10, 30, 2)]


@pytest.mark.parametrize(
    "rows",
    [
        IMPOSSIBLE,
        IMPOSSIBLE[::-1],  # not in order of start
        [IMPOSSIBLE[0], kernel(5, 110, 2), IMPOSSIBLE[1]],  # with one that overlaps between
        [IMPOSSIBLE[0], kernel(1, 9, 2, streamId=8), kernel(2, 3, 2, deviceId=1), IMPOSSIBLE[1]],
        [kernel(0, 100, 1, streamId=None), kernel(10, 30, 2, streamId=None)],
        [kernel(0, 100, 1, graphNodeId=0), kernel(10, 30, 2)],
    ],
)
def test_an_impossible_kernel_is_never_added(tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    path = make_export(tmp_path / "x.sqlite", CUPTI_ACTIVITY_KIND_KERNEL=rows, StringIds=STRINGS)
    for export in both(path, tmp_path):
        found = read_sums(export)
        assert of(found) == from_rows(export)
        assert ("GPU0", "void a<int>(int)", "kernel") not in of(found)
        assert found.notes[0].startswith("excluded ")


def test_kernels_out_of_order_without_an_impossible_one_all_count(tmp_path: Path) -> None:
    rows = [kernel(20, 30), kernel(0, 10), kernel(40, 50)]
    path = make_export(tmp_path / "x.sqlite", CUPTI_ACTIVITY_KIND_KERNEL=rows, StringIds=STRINGS)
    for export in both(path, tmp_path):
        assert of(read_sums(export)) == {("GPU0", "void a<int>(int)", "kernel"): (3, 30)}


@pytest.mark.parametrize("odd", [
    {"globalPid": None}, {"deviceId": None}, {"deviceId": -5}, {"deviceId": 300},
    {"demangledName": None}, {"demangledName": -7},
    {"demangledName": 2**31 + 1}, {"demangledName": None, "shortName": None},
    {"streamId": None}, {"streamId": -1}, {"graphNodeId": -3},
])  # fmt: skip
def test_values_that_no_nsys_writes(tmp_path: Path, odd: dict[str, Any]) -> None:
    rows = [kernel(0, 10), kernel(10, 25, **odd), kernel(30, 33)]
    path = make_export(tmp_path / "x.sqlite", CUPTI_ACTIVITY_KIND_KERNEL=rows, StringIds=STRINGS)
    truth = from_rows(path)
    assert sum(count for count, _ in truth.values()) == 3
    assert of(read_sums(path)) == truth
    if all(value is None or value >= 0 for value in odd.values()):
        assert of(read_sums(to_parquet(path, tmp_path / "pq"))) == truth


@pytest.mark.parametrize("gone", ["deviceId", "streamId", "globalPid",
                                  "graphNodeId", "demangledName", "shortName"])  # fmt: skip
def test_schemas_without_a_column(tmp_path: Path, gone: str) -> None:
    rows = [kernel(0, 10), kernel(10, 25, 2, deviceId=1)]
    rows = [{k: v for k, v in row.items() if k != gone} for row in rows]
    path = make_export(tmp_path / "x.sqlite", CUPTI_ACTIVITY_KIND_KERNEL=rows, StringIds=STRINGS)
    for export in both(path, tmp_path):
        assert of(read_sums(export)) == from_rows(export)


def test_reports_without_gpu_rows_or_texts(tmp_path: Path) -> None:
    empty = make_export(tmp_path / "a.sqlite")
    only_ranges = make_export(tmp_path / "b.sqlite", NVTX_EVENTS=[nvtx(0, 10, "x")])
    only_graphs = make_export(
        tmp_path / "c.sqlite", CUPTI_ACTIVITY_KIND_GRAPH_TRACE=[graph(0, 5_000_000)]
    )
    no_texts = make_export(tmp_path / "d.sqlite", CUPTI_ACTIVITY_KIND_KERNEL=[kernel(0, 4)])
    for path in (empty, only_ranges, only_graphs, no_texts):
        for export in both(path, tmp_path):
            found = read_sums(export)
            assert of(found) == from_rows(export)
            rows = read_report(export)
            notes = dict.fromkeys(note for part in rows for note in part.notes)
            assert list(found.notes) == list(notes)
    assert "5.000 ms" in read_sums(only_graphs).notes[0]


spans = st.lists(
    st.tuples(
        st.integers(0, 12),
        st.one_of(st.none(), st.integers(-1, 8)),
        st.integers(0, 1),  # stream
        st.integers(0, 1),  # device
        st.integers(1, 2),  # name
        st.sampled_from([None, 0, 4]),  # graph node
    ),
    max_size=8,
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(spans, st.booleans())
def test_any_rows_give_the_sums_of_the_rows(
    tmp_path_factory: pytest.TempPathFactory, rows: Sequence[tuple[Any, ...]], ordered: bool
) -> None:
    if ordered:
        rows = sorted(rows, key=lambda row: row[0])
    made = [
        kernel(start, None if dur is None else start + dur, name, streamId=stream,
               deviceId=device, graphNodeId=node)
        for start, dur, stream, device, name, node in rows
    ]  # fmt: skip
    folder = tmp_path_factory.mktemp("x")
    tables = {"CUPTI_ACTIVITY_KIND_KERNEL": made} if made else {}
    path = make_export(folder / "x.sqlite", StringIds=STRINGS, **tables)
    for export in both(path, folder):
        found = read_sums(export)
        assert of(found) == from_rows(export)
        notes = (note for part in read_report(export) for note in part.notes)
        assert list(found.notes) == list(dict.fromkeys(notes))


def test_a_truncated_database_is_an_error_or_right(tmp_path: Path, shared_data: Path) -> None:
    source = shared_data / "nsys" / GPU_FILES[0]
    whole, truth = source.read_bytes(), of(read_sums(source))
    path = tmp_path / "cut.sqlite"
    for part in range(1, 24):
        path.write_bytes(whole[: len(whole) * part // 24])
        try:
            assert of(read_sums(path)) == truth
        except TraceError as error:
            assert error.hint


def test_a_flipped_bit_gives_our_error_or_what_the_rows_say(tmp_path: Path) -> None:
    """SQLite has no checksums: some changes cannot be noticed, but both ways must agree."""
    kernels = [kernel(10 * n, 10 * n + 5, 1 + n % 2) for n in range(40)]
    source = make_export(
        tmp_path / "s.sqlite", CUPTI_ACTIVITY_KIND_KERNEL=kernels, StringIds=STRINGS
    )
    whole = source.read_bytes()
    path = tmp_path / "x.sqlite"
    filled = [at for at, byte in enumerate(whole) if byte]
    for number, at in enumerate(filled[::7]):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << number % 8]) + whole[at + 1 :])
        try:
            found = of(read_sums(path))
        except TraceError:
            with pytest.raises(TraceError):
                read_report(path)
        else:
            assert found == from_rows(path), at


def test_a_truncated_parquet_file_is_an_error(tmp_path: Path) -> None:
    path = make_export(
        tmp_path / "x.sqlite", CUPTI_ACTIVITY_KIND_KERNEL=[kernel(0, 1)], StringIds=STRINGS
    )
    folder = to_parquet(path, tmp_path / "pq")
    file = folder / "CUPTI_ACTIVITY_KIND_KERNEL.parquet"
    whole = file.read_bytes()
    for size in range(0, len(whole), 97):
        file.write_bytes(whole[:size])
        with pytest.raises(TraceError, match=r"KERNEL\.parquet cannot be read"):
            read_sums(folder)


def test_sums_need_neither_pandas_nor_numpy(tmp_path: Path, project_root: Path) -> None:
    path = make_export(
        tmp_path / "x.sqlite", CUPTI_ACTIVITY_KIND_KERNEL=[kernel(0, 1)], StringIds=STRINGS
    )
    code = (
        "import sys, pathlib\nfrom pytest_sglprof._trace.nsys.sums import read_sums\n"
        f"assert read_sums(pathlib.Path({str(path)!r})).total_ns == (1,)\n"
        "print(*{'pandas', 'numpy', 'pyarrow'} & set(sys.modules))"
    )
    command = [sys.executable, "-W", "error", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=project_root)
    assert done.stdout.strip() == ""


def test_by_joins_what_the_keys_do_not_tell_apart(tmp_path: Path) -> None:
    rows = [kernel(0, 10, 1), kernel(10, 15, 2), kernel(0, 15, 2, deviceId=1)]
    path = make_export(tmp_path / "x.sqlite", CUPTI_ACTIVITY_KIND_KERNEL=rows, StringIds=STRINGS)
    found = read_sums(path, patterns=[("moe", "^b$")])
    assert found.by("category") == [
        {"category": "moe", "count": 2, "total_ns": 20},
        {"category": "other", "count": 1, "total_ns": 10},
    ]
    assert found.by("kind", "rank") == [
        {"kind": "kernel", "rank": "GPU0", "count": 2, "total_ns": 15},
        {"kind": "kernel", "rank": "GPU1", "count": 1, "total_ns": 15},
    ]
    assert of(found.of("rank", "GPU1")) == {("GPU1", "b", "kernel"): (1, 15)}
    assert by_name(read_report(path)[1]) == {"b": (1, 15)}
