"""`sglprof reduce`: several small files say exactly what their traces say together."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from pytest_sglprof._cli.main import main
from pytest_sglprof._trace.read import read_window
from pytest_sglprof._trace.table import KernelTable
from tests.support.dp_windows import planted, written

Paths = Sequence[Path]


def reduce_to(output: Path, files: Paths, *words: str) -> Path:
    assert main(["reduce", *map(str, files), *words, "-o", str(output)]) == 0
    return output


def same(one: KernelTable, other: KernelTable) -> None:
    for name in ("frame", "steps", "collectives", "experts"):
        pd.testing.assert_frame_equal(getattr(one, name), getattr(other, name))
    for name in ("ranks", "source", "partial", "notes", "settled", "incomparable", "front"):
        assert getattr(one, name) == getattr(other, name)
    for name in ("hosts", "settings", "run"):
        assert getattr(one, name) == getattr(other, name)


def said(capsys: pytest.CaptureFixture[str], command: str, paths: Paths, *words: str) -> Any:
    capsys.readouterr()
    status = main([command, *map(str, paths), "--format", "json", *words])
    text = capsys.readouterr().out
    return status, json.loads(text)


@pytest.fixture(scope="module")
def traces(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Of four ranks."""
    folder = written(planted("e", 4), tmp_path_factory.mktemp("traces"))
    return sorted(folder.glob("*.json.gz"))


@pytest.fixture(scope="module")
def nodes(traces: list[Path], tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("nodes")
    parts = {"node1": traces[:2], "node2": traces[2:]}
    return [reduce_to(folder / f"{name}.parquet", files) for name, files in parts.items()]


def test_two_files_are_the_table_of_all_traces(traces: list[Path], nodes: list[Path]) -> None:
    same(read_window(traces), read_window(nodes))
    same(read_window(traces, launches=False), read_window(nodes, launches=False))


@pytest.mark.parametrize(
    ("command", "words"), [("check", ("--limit", "1.05")), ("kernels", ("--by", "rank,name"))]
)
def test_commands_say_the_same(
    traces: list[Path],
    nodes: list[Path],
    capsys: pytest.CaptureFixture[str],
    command: str,
    words: tuple[str, ...],
) -> None:
    whole = said(capsys, command, traces, *words)
    assert said(capsys, command, nodes, *words) == whole
    assert whole[0] in (0, 1)


def test_a_folder_of_them_is_one_window(nodes: list[Path]) -> None:
    assert read_window(nodes[0].parent).ranks == read_window(nodes).ranks


def test_sums_are_those_of_the_events(traces: list[Path], nodes: list[Path]) -> None:
    """Against the trace by plain json."""
    import gzip

    table = read_window(nodes)
    for trace, rank in zip(traces, table.ranks, strict=True):
        events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
        spent = [each["dur"] for each in events if each.get("cat") == "kernel"]
        rows = table.frame[(table.frame["rank"] == rank) & (table.frame["kind"] == "kernel")]
        assert len(rows) == len(spent)
        assert rows["dur_ns"].sum() == pytest.approx(1000 * np.sum(spent), abs=len(spent))


def test_it_is_small(traces: list[Path], nodes: list[Path]) -> None:
    rows = len(read_window(nodes).frame)
    assert sum(node.stat().st_size for node in nodes) < 24 * rows + 100_000


def test_settings_and_doubts_travel_with_it(traces: list[Path], tmp_path: Path) -> None:
    place = tmp_path / "window"
    place.mkdir()
    twice = [place / "a-TP-0.trace.json.gz", place / "a-TP-1.trace.json.gz"]
    for path in twice:
        path.write_bytes(traces[0].read_bytes())
    (place / "server_info.json").write_text('{"tp_size": 2, "disable_overlap_schedule": true}')
    node = reduce_to(
        tmp_path / "node.parquet",
        twice,
        "--rank",
        "a-TP-0.trace.json.gz=TP0",
        "--rank",
        "a-TP-1.trace.json.gz=TP1",
    )
    table = read_window(node)
    assert "have the same contents" in table.incomparable
    assert "have the same contents" not in read_window(node, force=True).incomparable


@pytest.mark.parametrize("keep", [0.0, 0.5, 0.99])
def test_a_file_that_is_cut_off_is_refused(
    nodes: list[Path], tmp_path: Path, keep: float, capsys: pytest.CaptureFixture[str]
) -> None:
    content = nodes[0].read_bytes()
    cut = tmp_path / "cut.parquet"
    cut.write_bytes(content[: int(keep * len(content))])
    assert main(["check", str(cut)]) == 2
    assert str(cut) in capsys.readouterr().err


def test_another_ending_is_refused(
    traces: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["reduce", *map(str, traces), "-o", str(tmp_path / "x.json")]) == 2
    assert "a name that ends in .parquet" in capsys.readouterr().err


@pytest.mark.parametrize(
    "name",
    ["torch/sglang-cpu-tp2dp2", "torch/a100-nccl", "nsys/mfu_2gpu_before.sqlite"],
)
def test_recorded_windows_are_the_same(name: str, shared_data: Path, tmp_path: Path) -> None:
    place = shared_data / name
    if not place.exists():
        pytest.skip(f"{place} is absent")
    node = reduce_to(tmp_path / "node.parquet", [place])
    same(read_window(place), read_window(node))


def test_a_file_that_was_changed_is_read_or_refused(nodes: list[Path], tmp_path: Path) -> None:
    content = nodes[0].read_bytes()
    random = np.random.default_rng(7)
    for number in range(16):
        changed = bytearray(content)
        for at in random.integers(0, len(content), 1 + number % 8):
            changed[at] = random.integers(256)
        file = tmp_path / "changed.parquet"
        file.write_bytes(changed)
        assert main(["check", str(file)]) in (0, 1, 2, 3)
