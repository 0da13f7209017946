"""The heat map as PNG: its size, its colours, its text, and what is said without Pillow."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from pytest_sglprof._cli.main import main
from pytest_sglprof._report import heat_map as module
from pytest_sglprof._report.heat_map import (
    CELL_HEIGHT,
    CELL_WIDTH,
    SCALE,
    heat_map,
    heat_map_png,
    label_width,
)
from tests.support.kernel_tables import build, slow
from tests.support.windows import SLOW, as_window, run, window

PIL = pytest.importorskip("PIL", reason="the extra png is not installed")
EIGHT = tuple(f"TP{at}" for at in range(8))
MOE = window(build(EIGHT, scale=slow("TP3", "moe", 1.4)))


def picture(document: dict[str, Any]) -> Any:
    from PIL import Image

    found = Image.open(io.BytesIO(heat_map_png(as_window(document))))
    assert found.format == "PNG"
    found.load()  # every chunk and checksum
    return found.convert("RGB")


def cell(image: Any, row: int, column: int, rows: int) -> Any:
    """The inside of a cell; the table ends 40 units above the picture's end."""
    left = (label_width(EIGHT[:1]) + column * CELL_WIDTH) * SCALE
    top = image.height - (40 + (rows - row) * CELL_HEIGHT) * SCALE
    width, height = (CELL_WIDTH - 2) * SCALE, (CELL_HEIGHT - 2) * SCALE
    edge = 2 * SCALE
    return image.crop((left + edge, top + edge, left + width - edge, top + height - edge))


def hexadecimal(pixel: tuple[int, int, int]) -> str:
    return "#" + "".join(f"{part:02x}" for part in pixel)


def test_every_cell_has_its_colour_and_ink_on_it() -> None:
    drawn, image = heat_map(as_window(MOE)), picture(MOE)
    assert image.width == (label_width(EIGHT) + len(drawn.columns) * CELL_WIDTH + 16) * SCALE
    for row, (_, _, cells) in enumerate(drawn.rows):
        for column, truth in enumerate(cells):
            inside = cell(image, row, column, len(drawn.rows))
            colours = sorted(inside.getcolors(100_000), reverse=True)
            assert hexadecimal(colours[0][1]) == truth.fill
            assert hexadecimal(inside.getpixel((0, 0))) == truth.fill
            assert truth.ink in {hexadecimal(colour) for _, colour in colours}


def test_the_slow_rank_s_cell_is_the_darkest_and_marked() -> None:
    drawn, image = heat_map(as_window(MOE)), picture(MOE)
    moe = drawn.columns.index("moe")
    light = [sum(cell(image, row, moe, 8).getpixel((0, 0))) for row in range(8)]
    assert light.index(min(light)) == 3
    marks = [  # left of the labels
        image.getpixel((14 * SCALE, image.height - int((40 + (8 - row - 0.5) * 34 + 1) * SCALE)))
        for row in range(8)
    ]
    assert [row for row, pixel in enumerate(marks) if pixel == (0, 0, 0)] == [3]


def test_long_and_hostile_texts_stay_inside() -> None:
    document = window(SLOW)
    whole = picture(document)
    document["nodeid"] = "<script>\x00\u202e🦥 " + "z" * 10_000
    document["reason"] = "word " * 500
    image = picture(document)
    assert image.width == whole.width
    assert image.height <= whole.height + 5 * 20 * SCALE
    strip = image.crop((image.width - 6 * SCALE, 0, image.width, image.height))
    assert strip.getcolors() == [(strip.width * strip.height, (255, 255, 255))]


def test_a_window_without_findings_is_told() -> None:
    image = picture(window(None, reason="it died"))
    assert image.width == 480 * SCALE
    assert len(image.getcolors(100_000)) > 2  # its words


def test_a_machine_without_fonts_has_the_figures_too(monkeypatch: pytest.MonkeyPatch) -> None:
    from PIL import ImageFont

    monkeypatch.setattr(module, "_font", lambda bold=False: ImageFont.load_default(26))
    image = picture(MOE)
    assert len(cell(image, 3, 2, 8).getcolors(100_000)) > 2
    assert module._known("1.33×", ImageFont.load_default(26)) == "1.33x"


@pytest.fixture
def results(tmp_path: Path) -> Path:
    (tmp_path / "results.json").write_text(json.dumps(run([MOE])))
    return tmp_path


def test_the_command_takes_a_folder(results: Path) -> None:
    out = results / "heat.PNG"
    assert main(["export", "--to", "png", str(results), "-o", str(out)]) == 0
    assert out.read_bytes() == heat_map_png(as_window(json.loads(json.dumps(MOE))))


def test_without_pillow_the_extra_is_named(
    results: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "PIL", None)
    assert main(["export", "--to", "png", str(results), "-o", str(results / "heat.png")]) == 2
    assert "pip install 'pytest-sglprof[png]'" in capsys.readouterr().err
    assert not (results / "heat.png").exists()
    assert main(["export", "--to", "svg", str(results), "-o", str(results / "heat.svg")]) == 0
