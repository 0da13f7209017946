"""The heat map of a window, rank × category, and as SVG: for a chat, a comment, a report.

A cell is the rank's busy time in the category over the mean of its work group, written
as a number; the shade only repeats it, darker for slower, so that the picture is read
without seeing colours.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pytest_sglprof._errors import SettingsError
from pytest_sglprof._metrics import WORST_FIRST
from pytest_sglprof._report.page.jinja import template
from pytest_sglprof._report.terminal import busy_totals, window_title
from pytest_sglprof._verdict.wording import shorten

if TYPE_CHECKING:
    from PIL.ImageDraw import ImageDraw
    from PIL.ImageFont import FreeTypeFont, ImageFont

    from pytest_sglprof._analysis.imbalance import ImbalanceFinding
    from pytest_sglprof._report.model import RecordedWindow


LIGHTEST, DARKEST = 1.0, 1.25  # over the mean: what is not slow has no shade
MAX_TEXT = 120
CELL_WIDTH, CELL_HEIGHT, MIN_WIDTH = 112, 34, 480  # of the pictures
LEGEND = "busy time over the mean of the work group; darker is slower; ▶ slowest in compute"
NOBODY = "No rank could be compared."
_DARK, _LIGHT = (0x4A, 0x1D, 0x06), (0xFF, 0xF4, 0xE8)
# Black ink above this luminance, white below: both then have a contrast of 4.58 or more.
_INK_LUMINANCE = 0.179


@dataclass(frozen=True)
class Cell:
    """ratio: to the group's mean; None without any time. busy_ns: busy time, ns.

    fill, ink: colours as `#rrggbb`.
    """

    ratio: float | None
    busy_ns: int
    fill: str = "#ffffff"
    ink: str = "#000000"


@dataclass(frozen=True)
class HeatMap:
    """columns: scopes, compute first. rows: (rank, it is the slowest of its group, cells)."""

    columns: tuple[str, ...]
    rows: tuple[tuple[str, bool, tuple[Cell, ...]], ...]


@dataclass(frozen=True)
class ScopeTimes:
    """The ranks of a work group in one scope. ns: by rank, busy time. mean: over them, ns."""

    finding: ImbalanceFinding
    ns: dict[str, int]
    mean: float

    def ratio(self, rank: str) -> float | None:
        """The rank's time over the mean; None without any time."""
        return self.ns[rank] / self.mean if self.mean else None


def scope_times(window: RecordedWindow, group: str) -> list[ScopeTimes]:
    """Compute, communication and each category of a work group, in this order."""
    scopes = []
    for finding in window.findings:
        if finding.group == group and not finding.kernel:
            ns = busy_totals(window, finding)
            scopes.append(ScopeTimes(finding, ns, sum(ns.values()) / len(ns) if ns else 0.0))
    return scopes


def heat_map(window: RecordedWindow) -> HeatMap:
    """The cells of one window of a results document; no rows where nothing was found."""
    computes = window.of_scope("compute")
    slowest = {compute.slowest for compute in computes}
    times = [each for compute in computes for each in scope_times(window, compute.group)]
    columns = tuple(dict.fromkeys(each.finding.scope for each in times))
    cells = {
        (rank, each.finding.scope): _cell(each.ns[rank], each.ratio(rank))
        for each in times
        for rank in each.ns
    }
    ranks = [rank for rank in window.ranks if (rank, "compute") in cells]
    return HeatMap(
        columns,
        tuple(
            (rank, rank in slowest, tuple(cells.get((rank, c), Cell(None, 0)) for c in columns))
            for rank in ranks
        ),
    )


def heat_map_svg(window: RecordedWindow) -> str:
    """A whole SVG document. All names are escaped; it refers to nothing outside."""
    drawn = heat_map(window)
    title, verdict = captions(window)
    return template("heat_map.svg").render(
        map=drawn,
        title=title,
        verdict=verdict,
        label_width=label_width([rank for rank, _, _ in drawn.rows]),
        cell_text=cell_text,
        cell_w=CELL_WIDTH,
        cell_h=CELL_HEIGHT,
        min_width=MIN_WIDTH,
        legend=LEGEND,
        nobody=NOBODY,
    )


def captions(window: RecordedWindow, limit: int = MAX_TEXT) -> tuple[str, str]:
    """What the window is, and its verdict and reason; short, without control characters."""
    title = shorten(f"{window.nodeid} {window_title(window)}", limit)
    verdict = shorten(f"{window.word}: {window.reason}", limit)
    return _printable(title), _printable(verdict)


def cell_text(cell: Cell) -> str:
    """`1.33×`; `–` without any time."""
    return "–" if cell.ratio is None else f"{cell.ratio:.2f}×"


def worst_window(windows: Iterable[RecordedWindow]) -> RecordedWindow | None:
    """The first failed window, else the first inconclusive one, else the first; None
    where there is none to draw."""
    drawable = (window for window in windows if window.findings)
    return min(drawable, key=lambda window: WORST_FIRST.index(window.verdict), default=None)


def _cell(busy: int, ratio: float | None) -> Cell:
    if ratio is None:
        return Cell(None, busy)
    shade = min(1.0, max(0.0, (ratio - LIGHTEST) / (DARKEST - LIGHTEST)))
    mixed = [round(a + (b - a) * shade) for a, b in zip(_LIGHT, _DARK, strict=True)]
    ink = "#000000" if _luminance(mixed) > _INK_LUMINANCE else "#ffffff"
    return Cell(ratio, busy, "#" + "".join(f"{part:02x}" for part in mixed), ink)


def _luminance(colour: Sequence[int]) -> float:
    """Relative luminance of red, green, blue (0 to 255), 0 to 1, as WCAG 2 defines it."""
    parts = [part / 255 for part in colour]
    red, green, blue = (p / 12.92 if p <= 0.03928 else ((p + 0.055) / 1.055) ** 2.4 for p in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def label_width(labels: Sequence[str]) -> int:
    """Room for the longest rank label, in units of the pictures."""
    return 40 + 8 * max((len(label) for label in labels), default=0)


def _printable(text: str) -> str:
    """Without the control characters that XML forbids."""
    return "".join(char if char.isprintable() else " " for char in text)


# The heat map of a window as PNG, for chats that show no SVG. Needs the extra `png` (Pillow).


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
