"""The heat map of a window, rank × category, and as SVG: for a chat, a comment, a report.

A cell is the rank's busy time in the category over the mean of its work group, written
as a number; the shade only repeats it, darker for slower, so that the picture is read
without seeing colours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pytest_sglprof.report.jinja import template
from pytest_sglprof.report.terminal import busy_totals, window_title
from pytest_sglprof.report.text_table import shorten
from pytest_sglprof.values import WORST_FIRST

if TYPE_CHECKING:
    from pytest_sglprof.analysis.imbalance import ImbalanceFinding
    from pytest_sglprof.report.model import RecordedWindow

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
    found = []
    for finding in window.findings:
        if finding.group == group and not finding.kernel:
            ns = busy_totals(window, finding)
            found.append(ScopeTimes(finding, ns, sum(ns.values()) / len(ns) if ns else 0.0))
    return found


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
    verdict = shorten(f"{window.verdict}: {window.reason}", limit)
    return _printable(title), _printable(verdict)


def cell_text(cell: Cell) -> str:
    """`1.33×`; `–` without any time."""
    return "–" if cell.ratio is None else f"{cell.ratio:.2f}×"


def worst_window(windows: Sequence[RecordedWindow]) -> RecordedWindow | None:
    """The first failed window, else the first inconclusive one, else the first; None
    where there is none to draw."""
    drawable = [window for window in windows if window.findings]
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
