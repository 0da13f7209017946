"""The heat map of a window as PNG, for chats that show no SVG. Needs the extra `png` (Pillow)."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

from pytest_sglprof.errors import SettingsError
from pytest_sglprof.report.heat_map import (
    CELL_HEIGHT,
    CELL_WIDTH,
    LEGEND,
    MIN_WIDTH,
    NOBODY,
    HeatMap,
    captions,
    cell_text,
    heat_map,
    label_width,
)

if TYPE_CHECKING:
    from PIL.ImageDraw import ImageDraw
    from PIL.ImageFont import FreeTypeFont, ImageFont

    from pytest_sglprof.report.model import RecordedWindow

SCALE = 2  # device pixels a unit of the SVG, so that text is sharp on a phone
EDGE = "#767676"
_LINE, _HEAD, _FOOT, _MARGIN = 20, 26, 40, 12
_PLAIN = {"×": "x", "…": "...", "–": "-", "▶": ">"}
_MAX_TEXT = 400
_MAX_LINES = 3  # of the title, and of the reason


def heat_map_png(window: RecordedWindow) -> bytes:
    """A whole PNG file. Raises SettingsError where Pillow is not installed."""
    try:
        from PIL import Image, ImageDraw
    except ImportError as error:
        raise SettingsError(
            "a PNG is drawn with Pillow, which is not installed",
            expected="the extra png",
            hint="pip install 'pytest-sglprof[png]', or write an .svg",
        ) from error
    drawn = heat_map(window)
    font, bold = _font(), _font(bold=True)
    labels = label_width([rank for rank, _, _ in drawn.rows])
    width = max(labels + len(drawn.columns) * CELL_WIDTH + 16, MIN_WIDTH)
    room = (width - 2 * _MARGIN) * SCALE
    title, verdict = (
        _wrapped(text, face, room)
        for text, face in zip(captions(window, _MAX_TEXT), (bold, font), strict=True)
    )
    top = _MARGIN + _LINE * (len(title) + len(verdict)) + _HEAD
    height = top + CELL_HEIGHT * len(drawn.rows) + _FOOT
    picture = Image.new("RGB", (width * SCALE, height * SCALE), "#ffffff")
    pen = _Pen(ImageDraw.Draw(picture))
    at = _MARGIN + _LINE // 2
    for lines, face in ((title, bold), (verdict, font)):
        for line in lines:
            pen.text(_MARGIN, at, line, face)
            at += _LINE
    _table(pen, drawn, labels, top, font, bold)
    foot = top + CELL_HEIGHT * len(drawn.rows) + _FOOT // 2
    for line in _wrapped(LEGEND if drawn.rows else NOBODY, font, room)[:1]:
        pen.text(_MARGIN, foot, line, font)
    file = io.BytesIO()
    picture.save(file, "PNG", optimize=True)
    return file.getvalue()


def _table(
    pen: _Pen, drawn: HeatMap, labels: int, top: int, font: _AnyFont, bold: _AnyFont
) -> None:
    for at, column in enumerate(drawn.columns):
        centre = labels + at * CELL_WIDTH + CELL_WIDTH // 2
        pen.text(centre, top - _HEAD // 2, column, font, anchor="mm")
    for row, (rank, slowest, cells) in enumerate(drawn.rows):
        y = top + row * CELL_HEIGHT
        middle = y + CELL_HEIGHT // 2 - 1
        if slowest:
            pen.triangle(_MARGIN, middle)
        pen.text(_MARGIN + (16 if slowest else 0), middle, rank, bold if slowest else font)
        for at, cell in enumerate(cells):
            x = labels + at * CELL_WIDTH
            pen.box(x, y, CELL_WIDTH - 2, CELL_HEIGHT - 2, cell.fill)
            centre = x + CELL_WIDTH // 2 - 1
            pen.text(centre, middle, cell_text(cell), font, anchor="mm", ink=cell.ink)


class _Pen:
    """Draws in units of the SVG; text that the font lacks becomes `?`."""

    def __init__(self, draw: ImageDraw) -> None:
        self._draw = draw

    def text(
        self, x: int, y: int, text: str, font: _AnyFont, *, anchor: str = "lm", ink: str = "#000000"
    ) -> None:
        place = (x * SCALE, y * SCALE)
        self._draw.text(place, _known(text, font), fill=ink, font=font, anchor=anchor)

    def box(self, x: int, y: int, width: int, height: int, fill: str) -> None:
        corners = (x * SCALE, y * SCALE, (x + width) * SCALE - 1, (y + height) * SCALE - 1)
        self._draw.rectangle(corners, fill=fill, outline=EDGE, width=SCALE)

    def triangle(self, x: int, y: int) -> None:
        points = [(x, y - 5), (x + 9, y), (x, y + 5)]
        self._draw.polygon([(a * SCALE, b * SCALE) for a, b in points], fill="#000000")


def _font(*, bold: bool = False) -> _AnyFont:
    """DejaVu Sans where the machine has it, since it knows more letters; else Pillow's own."""
    from PIL import ImageFont

    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    layout = ImageFont.Layout.BASIC
    try:
        return ImageFont.truetype(name, 13 * SCALE, layout_engine=layout)
    except OSError:
        return ImageFont.load_default(13 * SCALE)


def _known(text: str, font: _AnyFont) -> str:
    """Letters that the font lacks look all the same in it: a plain sign is clearer."""
    none = bytes(font.getmask("\ufffe"))
    return "".join(
        letter
        if letter.isascii() or bytes(font.getmask(letter)) != none
        else _PLAIN.get(letter, "?")
        for letter in text
    )


def _wrapped(text: str, font: _AnyFont, room: int) -> list[str]:
    """Lines not longer than `room` pixels; what does not fit into the last one is cut."""
    lines: list[str] = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if not lines[-1] or font.getlength(_known(longer, font)) <= room:
            lines[-1] = longer
        else:
            lines.append(word)
    shown = lines[:_MAX_LINES]
    if len(lines) > _MAX_LINES:
        shown[-1] += " …"
    return [_cut(line, font, room) for line in shown]


def _cut(line: str, font: _AnyFont, room: int) -> str:
    if font.getlength(_known(line, font)) <= room:
        return line
    while line and font.getlength(_known(f"{line}…", font)) > room:
        line = line[:-1]
    return f"{line}…"


if TYPE_CHECKING:
    _AnyFont = FreeTypeFont | ImageFont
