"""The heat map: figures, shades, hostile names, and the command that writes it."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest

from pytest_sglprof._cli.main import main
from pytest_sglprof._report.heat_map import heat_map, heat_map_svg, worst_window
from tests.support.kernel_tables import build, slow
from tests.support.windows import BALANCED, SLOW, as_window, run, window

SVG = "{http://www.w3.org/2000/svg}"
HOSTILE = "<script>alert(1)</script>\"'&\x00\x1b 🦥 " + "z" * 10_000


def luminance(colour: str) -> float:
    """Relative luminance of `#rrggbb` by WCAG 2."""
    parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.03928 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def test_the_slow_ranks_cell_is_the_darkest_and_every_figure_is_text() -> None:
    ranks = tuple(f"TP{at}" for at in range(8))
    document = window(build(ranks, scale=slow("TP3", "moe", 1.4)))
    drawn = heat_map(as_window(document))
    assert drawn.columns[:2] == ("compute", "communication")
    moe = drawn.columns.index("moe")
    shades = {rank: luminance(cells[moe].fill) for rank, _, cells in drawn.rows}
    assert min(shades, key=lambda rank: shades[rank]) == "TP3"
    assert [rank for rank, slowest, _ in drawn.rows if slowest] == ["TP3"]
    assert drawn.rows[3][2][moe].ratio == pytest.approx(1.4 / (8.4 / 8))
    texts = [
        text.text for text in ET.fromstring(heat_map_svg(as_window(document))).iter(f"{SVG}text")
    ]
    assert "1.33×" in texts
    assert "▶ TP3" in texts


@pytest.mark.parametrize("factor", [0.5, 0.8, 0.9, 0.95, 1.0, 1.05, 1.1, 1.2, 1.5, 3.0])
def test_every_figure_has_contrast(factor: float) -> None:
    for _, _, cells in heat_map(as_window(window(build(scale=slow("TP1", "moe", factor))))).rows:
        assert all(contrast(cell.fill, cell.ink) >= 4.5 for cell in cells)


def test_hostile_names_are_text_and_the_picture_stays_small() -> None:
    document = window(SLOW)
    document["nodeid"] = document["reason"] = HOSTILE
    svg = heat_map_svg(as_window(document))
    root = ET.fromstring(svg)
    assert not list(root.iter(f"{SVG}script"))
    assert "<script" not in svg
    assert "🦥" in svg
    assert len(svg) < 20_000
    assert not re.search(r"(href|src)=", svg)


def test_ranks_of_several_groups_and_a_window_without_findings() -> None:
    four = ("DP0 TP0", "DP0 TP1", "DP1 TP0", "DP1 TP1")
    drawn = heat_map(as_window(window(build(four, scale=slow("DP1 TP1", "moe", 1.4)))))
    assert [rank for rank, _, _ in drawn.rows] == list(four)
    assert "No rank could be compared" in heat_map_svg(as_window(window(None, reason="it died")))


def test_the_worst_window_is_chosen() -> None:
    windows = [window(BALANCED, window_id="a"), window(SLOW, window_id="b")]
    found = worst_window([*map(as_window, windows)])
    assert found is not None and found.id == "b"
    assert worst_window([as_window(window(None))]) is None


@pytest.fixture
def results(tmp_path: Path) -> Path:
    windows: list[dict[str, Any]] = [window(BALANCED, window_id="a"), window(SLOW, window_id="b")]
    path = tmp_path / "results.json"
    path.write_text(json.dumps(run(windows)))
    return path


def test_the_command(results: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "heat.svg"
    assert main(["export", "--to", "svg", str(results), "-o", str(out)]) == 0
    assert "fail: TP1 is 1.40x slower" in out.read_text()
    assert main(["export", "--to", "svg", str(results), "-o", str(out), "--window", "a"]) == 0
    assert "pass: " in out.read_text()
    capsys.readouterr()
    for words, message in (
        (["-o", str(tmp_path / "x.gif")], "a name that ends in .svg"),
        (["-o", str(out), "--window", "c"], "its windows: a, b"),
    ):
        assert main(["export", "--to", "svg", str(results), *words]) == 2
        assert message in capsys.readouterr().err
