"""`sglprof check` on ranks with different input, whose truth is planted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from pytest_sglprof._cli.main import main
from pytest_sglprof.standin.dp_model import DpWindow
from pytest_sglprof.standin.dp_traces import write_traces
from pytest_sglprof.standin.laws import CATEGORIES
from tests.support.dp_windows import planted, written
from tests.support.kernel_tables import build


def check(capsys: pytest.CaptureFixture[str], folder: Path, *words: str) -> str:
    assert main(["check", str(folder), *words]) in (0, 3)
    return capsys.readouterr().out


def only_sync(text: str) -> dict[str, Any]:
    (found,) = json.loads(text)["sync"]
    return dict(found)


def waiting_and_idle(window: DpWindow) -> tuple[float, float]:
    """Shares of the wall of all passes but the first, as the planted window has them.

    The kernel of sampling comes after the span of its pass; that of the last one has no pass.
    """
    end = window.end - after_the_last(window)
    wall = float((end[1:] - end[:-1]).sum())
    idle = 1000 * window.head_idle_beside_busy[1:].sum()
    return 1000 * window.waiting[1:].sum() / wall, idle / wall


def after_the_last(window: DpWindow) -> npt.NDArray[np.float64]:
    """ns of sampling after the last pass, 0 for others, shape (passes, ranks)."""
    sampling = np.zeros(window.batch.shape)
    sampling[-1] = 1000 * window.times[-1, :, CATEGORIES.index("sampling")]
    return sampling


def test_json_has_cost_split_and_speed_as_planted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    window = planted("e", 4)
    found = only_sync(check(capsys, written(window, tmp_path), "--format", "json"))
    assert found["kinds"] == {"decode": 60}
    assert found["regime"] == "gather"
    waiting, idle = waiting_and_idle(window)
    assert found["cost"]["waiting"] == pytest.approx(waiting, rel=0.001)
    assert found["cost"]["idle"] == pytest.approx(idle, rel=0.001)
    assert found["cost"]["padding"] == 0
    about = window.plan.about
    assert found["latest"] == f"DP{about} TP{about} EP{about}"
    row = found["ranks"][about]
    others = np.arange(4) != about
    compute = 1000 * window.times.sum(axis=2) - after_the_last(window)
    beyond = (compute[:, about] - compute[:, others].mean(axis=1)).mean()
    assert row["difference_ns"] == pytest.approx(beyond, rel=0.001)
    low, high = row["speed_interval"]
    assert low <= 1.10 <= high
    parts = sum(row[name]["ns"] for name in ("load", "speed", "rest"))
    assert parts + row["unknown_ns"] == pytest.approx(row["difference_ns"], rel=0.001)


def test_the_text_has_sentence_cost_passes_and_a_row_a_rank(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    window = planted("b", 4)
    text = check(capsys, written(window, tmp_path))
    kv = window.kv.mean(axis=0)
    ratio = kv[1] / np.delete(kv, 1).mean()
    assert f"most of it for DP1; load (Σ KV {ratio:.2f}x) explains" in text
    waiting, _ = waiting_and_idle(window)
    assert f"waiting in collectives {100 * waiting:.1f} %, idle" in text
    assert "60 passes: 60 decode; gather regime" in text
    table = text[text.index("compute beside the mean of the other ranks") :].splitlines()
    assert table[1].split()[:3] == ["rank", "difference", "load"]
    assert sorted(line.split()[0] for line in table[3:7]) == ["DP0", "DP1", "DP2", "DP3"]
    assert table[3].startswith("DP1 ")


def test_of_many_ranks_those_that_matter_are_shown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    window = planted("d", 16, passes=24)
    text = check(capsys, written(window, tmp_path))
    assert "and 8 ranks more, for which the others wait less" in text
    table = text[text.index("compute beside the mean of the other ranks") :].splitlines()
    assert table[3].startswith("DP1 ")


def test_passes_pushed_out_of_the_graph_are_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    window = planted("g", 2)
    text = check(capsys, written(window, tmp_path))
    extends = window.kind == "EXTEND"
    beside = int((extends.any(axis=1) & (window.kind == "DECODE").any(axis=1)).sum())
    assert beside > 5
    assert f"{beside} decode beside a prefill, so without a graph" in text
    assert f"in {beside} of 60 passes ranks decode without a graph" in text


def test_passes_without_numbers_are_aligned_by_their_collectives(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_traces(planted("b", 2), tmp_path, has_ids=False)
    text = check(capsys, tmp_path)
    assert "60 passes: 60 decode; unknown regime" in text


def test_ranks_with_peers_have_nothing_of_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("pytest_sglprof._trace.read.read_window", lambda *a, **k: build())
    assert json.loads(check(capsys, Path("window"), "--format", "json"))["sync"] == []
    assert "waits" in (text := check(capsys, Path("window")))
    assert "beside the mean of the other ranks" not in text
