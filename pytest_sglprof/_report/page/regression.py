"""What the page draws of a window against accepted lives: dots on one axis, and past nights.

Places are percents of a drawing's width or height, so that templates only place them. Everything
that is drawn also stands in words or in a table.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from pytest_sglprof._baselines.figures import IDLE_SHARE, Figure
from pytest_sglprof._metrics import METRICS
from pytest_sglprof._report.page.figures import amount_alone, amount_unit
from pytest_sglprof._report.page.jinja import NONE, in_microseconds
from pytest_sglprof._report.regression import (
    RecordedFigure,
    RecordedKernelChange,
    RecordedLife,
    RecordedRegression,
)
from pytest_sglprof._verdict.life_words import amount, figure_label
from pytest_sglprof._verdict.regression import cost
from pytest_sglprof._verdict.wording import count, percent, ratio, shorten

FIRST_KERNELS = 6  # rows of the scan that stand on the screen
SHOWN_NIGHTS = 60  # of the strip, the last ones; the table has all
LEAST_SPAN = 0.06  # of the axis, a ratio: noise of 0.1 % must not look like a change
WIDEST = (0.5, 2.0)  # ratios; what lies beyond is drawn at the end of the axis
TICKS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5)
MOST_TICKS = 7
MOST_LETTERS = 30  # of a kernel among the figures; twice as many in the scan


@dataclass(frozen=True)
class Dot:
    """A life. left, top: percents. of: its classes in the style sheet. words: of a tooltip."""

    left: float
    top: float
    of: str
    words: str


@dataclass(frozen=True)
class Tick:
    """A ratio on the axis. left: percent."""

    left: float
    text: str


@dataclass(frozen=True)
class Level:
    """The mean of the lives between two changes. All in percents."""

    left: float
    width: float
    top: float


@dataclass(frozen=True)
class Strip:
    """Past nights of one figure. changes: where something changed, percents; limit: where the
    limit lies, None outside of the strip. words: all of it."""

    dots: tuple[Dot, ...]
    levels: tuple[Level, ...]
    changes: tuple[float, ...]
    limit: float | None
    words: str


@dataclass(frozen=True)
class FigureRow:
    """A figure; unit: of it, in words. limit, bound, one: places of the limit, of the pass bound
    and of 1. interval: its left end and width. words: all that is drawn."""

    figure: RecordedFigure
    name: str
    unit: str
    before: str
    now: str
    ratio: str
    ends: str
    limit_words: str
    detects: str
    one: float
    limit: float | None
    bound: float | None
    interval: tuple[float, float] | None
    dots: tuple[Dot, ...]
    words: str
    strip: Strip | None

    @property
    def inverse(self) -> str:
        """That accepted / now is compared, so that above 1 is always worse; else ""."""
        figure = self.figure.figure
        if figure.is_of_load:
            is_higher = METRICS[figure.name].better == "higher"
            return "inverse: higher is better" if is_higher else ""
        is_share = figure.name == IDLE_SHARE and not figure.kernel
        return "of the busy share, inverse" if is_share else ""


@dataclass(frozen=True)
class KernelChangeRow:
    """A kernel of the scan, as text. mark: "slower", "faster" or "" where that is not sure."""

    name: str
    full: str
    mark: str
    cells: tuple[str, ...]


@dataclass(frozen=True)
class LifeRow:
    """A life with its figures, as text. role: what it counts for."""

    life: RecordedLife
    role: str
    figures: tuple[str, ...]
    is_new: bool


@dataclass(frozen=True)
class RegressionPicture:
    """A window against its baseline. facts: label and words, one a line."""

    doc: RecordedRegression
    facts: tuple[tuple[str, str], ...]
    ticks: tuple[Tick, ...]
    rows: tuple[FigureRow, ...]
    kernels: tuple[KernelChangeRow, ...]
    more_kernels: tuple[KernelChangeRow, ...]
    scan_words: str
    lives: tuple[LifeRow, ...]
    nights: tuple[LifeRow, ...]

    @property
    def has_history(self) -> bool:
        """Whether a figure has past nights."""
        return any(row.strip is not None for row in self.rows)


def regression_picture(doc: RecordedRegression | None) -> RegressionPicture | None:
    """The picture of a window against its baseline; None where nothing was compared."""
    if doc is None:
        return None
    axis = _Axis.over(doc.figures, doc.accepted)
    kernels = tuple(map(_kernel_row, doc.kernels))
    return RegressionPicture(
        doc=doc,
        facts=tuple(_facts(doc)),
        ticks=axis.ticks(),
        rows=tuple(_figure_row(doc, each, axis) for each in doc.figures),
        kernels=kernels[:FIRST_KERNELS],
        more_kernels=kernels[FIRST_KERNELS:],
        scan_words=_scan_words(doc),
        lives=_life_rows(doc),
        nights=_nights(doc),
    )


@dataclass(frozen=True)
class _Scale:
    """Ratio 1 of the axis: what is typical of the accepted lives of the present level.

    base: in the unit of the figure; None where no accepted life has it.
    """

    figure: Figure
    base: float | None

    @classmethod
    def of(cls, figure: RecordedFigure, accepted: Sequence[RecordedLife]) -> _Scale:
        if figure.before is not None:
            return cls(figure.figure, figure.before)
        values = [
            value
            for value, life in zip(figure.accepted, accepted, strict=True)
            if life.is_level and value is not None
        ]
        return cls(figure.figure, median(values) if values else None)

    def ratio(self, value: float | None) -> float | None:
        """How many times as bad as the base."""
        if self.base is None or value is None:
            return None
        worse, base = cost(self.figure, value), cost(self.figure, self.base)
        return worse / base if 0 < worse < math.inf and 0 < base < math.inf else None

    def limit(self, figure: RecordedFigure) -> float | None:
        """The limit as a ratio."""
        return figure.limit if figure.limit_of == "ratio" else self.ratio(figure.limit)


@dataclass(frozen=True)
class _Axis:
    """Ratios from `low` to `high`, on a scale of logarithms."""

    low: float
    high: float

    @classmethod
    def over(cls, figures: Sequence[RecordedFigure], accepted: Sequence[RecordedLife]) -> _Axis:
        ratios = [1 - LEAST_SPAN / 2, 1 + LEAST_SPAN / 2]
        for figure in figures:
            scale = _Scale.of(figure, accepted)
            drawn = [scale.ratio(each) for each in (*figure.accepted, *figure.fresh)]
            drawn += [scale.limit(figure), figure.pass_bound, figure.low, figure.high]
            ratios += [each for each in drawn if each]
        lowest, highest = WIDEST
        low, high = max(min(ratios), lowest), min(max(ratios), highest)
        margin = (high / low) ** 0.04
        return cls(low / margin, high * margin)

    def place(self, ratio: float) -> float:
        """Percent of the width; what lies beyond is at an end."""
        share = math.log(ratio / self.low) / math.log(self.high / self.low)
        return 100 * min(max(share, 0.0), 1.0)

    def is_beyond(self, ratio: float) -> bool:
        return not self.low <= ratio <= self.high

    def ticks(self) -> tuple[Tick, ...]:
        step = next((s for s in TICKS if (self.high - self.low) / s <= MOST_TICKS), TICKS[-1])
        first, last = math.ceil(self.low / step), math.floor(self.high / step)
        digits = 3 if step < 0.01 else 2
        places = [(self.place(at * step), at * step) for at in range(first, last + 1)]
        # Words at either end would stick out into the next column.
        return tuple(
            Tick(left, f"{ratio:.{digits}f}" if 3 < left < 97 else "") for left, ratio in places
        )


def _facts(doc: RecordedRegression) -> list[tuple[str, str]]:
    facts = [("Baseline", _baseline_words(doc))]
    if began := [life for life in doc.accepted if life.begins_level]:
        last = began[-1]
        earlier = sum(not life.is_level for life in doc.accepted)
        before = f"; {count(earlier, 'life', 'lives')} before it for the variance alone"
        facts.append(
            ("Level", f"new since {last.recorded[:10]}: “{last.reason}”{before if earlier else ''}")
        )
    if doc.fresh:
        confirming = f", {doc.confirming} of them to confirm" if doc.confirming else ""
        versions = ", ".join(dict.fromkeys(life.version for life in doc.fresh if life.version))
        new = f"{count(len(doc.fresh), 'life', 'lives')}{confirming}, {_hosts(doc.fresh)}"
        facts.append(("Now", f"{new}; {versions}" if versions else new))
    if doc.floor_sentence:
        facts.append(("Floor", doc.floor_sentence))
    if doc.detection:
        main = next((each for each in doc.figures if each.detects is not None), None)
        of_main = f"{_label(main)}: " if main is not None else ""
        facts.append(("Sees", f"{of_main}{doc.detection}"))
    return facts


def _baseline_words(doc: RecordedRegression) -> str:
    if not doc.exists:
        return f"{doc.file} does not exist yet"
    lives = count(len(doc.accepted), "accepted life", "accepted lives")
    words = f"{doc.file}: {lives}"
    if doc.accepted:
        words += f" since {doc.accepted[0].recorded[:10]}, {_hosts(doc.accepted)}"
    return words


def _hosts(lives: Sequence[RecordedLife]) -> str:
    """`on h5`, `on h5 (7) and h6 (3)`."""
    hosts = Counter(life.host or "an unknown host" for life in lives).most_common()
    if len(hosts) == 1:
        return f"on {hosts[0][0]}"
    named = [f"{host} ({number})" for host, number in hosts]
    return f"on {', '.join(named[:-1])} and {named[-1]}"


def _label(figure: RecordedFigure) -> str:
    """`moe in decode`; a pattern of kernels is cut where it is long."""
    kernel = shorten(figure.kernel, MOST_LETTERS)
    return figure_label(Figure(figure.name, kernel, figure.stage))


def _words(figure: RecordedFigure, value: float | None) -> str:
    """`412 µs`, `8.2 % idle`, `2,214 tokens/s`."""
    return NONE if value is None else amount(figure.figure, value)


def _figure_row(doc: RecordedRegression, figure: RecordedFigure, axis: _Axis) -> FigureRow:
    scale = _Scale.of(figure, doc.accepted)
    limit, bound = scale.limit(figure), figure.pass_bound
    has_ends, of = figure.low is not None and figure.high is not None, figure.figure
    known = [value for value in figure.fresh if value is not None]
    now = figure.now if figure.now is not None or not known else median(known)
    limit_words = NONE
    if figure.limit is not None:
        is_ratio = figure.limit_of == "ratio"
        limit_words = f"{figure.limit:g}" if is_ratio else amount_alone(of, figure.limit)
    return FigureRow(
        figure=figure,
        name=_label(figure),
        unit=amount_unit(of),
        before=amount_alone(of, scale.base),
        now=amount_alone(of, now),
        ratio=ratio(figure.ratio, 3, none=NONE),
        ends=f"{ratio(figure.low, 3)} to {ratio(figure.high, 3)}" if has_ends else NONE,
        limit_words=limit_words,
        detects=NONE if figure.detects is None else _signed_percent(figure.detects - 1),
        one=axis.place(1.0),
        limit=None if limit is None else axis.place(limit),
        bound=None if bound is None else axis.place(bound),
        interval=_interval(figure, axis),
        dots=(
            *_dots(scale, axis, doc.accepted, figure.accepted, 28),
            *_dots(scale, axis, doc.fresh, figure.fresh, 72, of="life new"),
        ),
        words=_dots_words(figure, scale),
        strip=_strip(doc, figure, scale),
    )


def _interval(figure: RecordedFigure, axis: _Axis) -> tuple[float, float] | None:
    if not figure.low or not figure.high:
        return None
    left = axis.place(figure.low)
    return left, axis.place(figure.high) - left


def _dots(
    scale: _Scale,
    axis: _Axis,
    lives: Sequence[RecordedLife],
    values: Sequence[float | None],
    top: float,
    of: str = "",
) -> list[Dot]:
    dots = []
    for life, value in zip(lives, values, strict=True):
        ratio = scale.ratio(value)
        if value is not None and ratio is not None:
            kind = of or ("life" if life.is_level else "life earlier")
            beyond = " beyond" if axis.is_beyond(ratio) else ""
            what = f"{amount(scale.figure, value)}, {ratio:.3f} beside the accepted lives"
            words = f"{life.recorded[:10]} {life.host}: {what}"
            dots.append(Dot(axis.place(ratio), top, f"{kind}{beyond}", words))
    return dots


def _dots_words(figure: RecordedFigure, scale: _Scale) -> str:
    before = [each for each in map(scale.ratio, figure.accepted) if each is not None]
    now = [f"{each:.3f}" for each in map(scale.ratio, figure.fresh) if each is not None]
    if not before:
        return f"{_label(figure)}: no accepted life has this figure"
    lives = count(len(before), "accepted life", "accepted lives")
    parts = [
        f"{_label(figure)}: {lives} from {min(before):.3f} to {max(before):.3f}",
        f"new {', '.join(now) or NONE}",
    ]
    if figure.low is not None and figure.high is not None:
        parts.append(f"the ratio is {ratio(figure.low, 3)} to {ratio(figure.high, 3)}")
    if (limit := scale.limit(figure)) is not None:
        bound = f", passes surely below {figure.pass_bound:g}" if figure.pass_bound else ""
        parts.append(f"limit {round(limit, 3):g}{bound}")
    return "; ".join(parts)


# Past nights.


def _strip(doc: RecordedRegression, figure: RecordedFigure, scale: _Scale) -> Strip | None:
    first = max(len(doc.history) - SHOWN_NIGHTS, 0)
    shown = len(doc.history) - first
    ratios = {
        at: ratio
        for at, value in enumerate(figure.history[first:])
        if (ratio := scale.ratio(value)) is not None
    }
    if not ratios:
        return None
    lives, values = doc.history[first:], figure.history[first:]
    limit = scale.limit(figure)
    low = min([*ratios.values(), 1 - LEAST_SPAN / 2])
    high = max([*ratios.values(), limit or 1.0, 1 + LEAST_SPAN / 2])
    changes = [at - first for at in figure.changes if at > first]

    def left(at: float) -> float:
        return 100 * (at + 0.5) / shown

    def top(ratio: float) -> float:
        return 88 - 76 * math.log(ratio / low) / math.log(high / low)

    return Strip(
        dots=tuple(
            Dot(
                left(at),
                top(each),
                _night_class(lives[at]),
                _night_words(figure, lives[at], values[at]),
            )
            for at, each in ratios.items()
        ),
        levels=tuple(
            Level(left(begin - 0.5), left(end - 0.5) - left(begin - 0.5), top(mean))
            for begin, end, mean in _levels(ratios, changes, shown)
        ),
        changes=tuple(left(at - 0.5) for at in changes),
        limit=None if limit is None else top(limit),
        words=_strip_words(figure, lives, [lives[at] for at in ratios], changes),
    )


def _levels(
    ratios: dict[int, float], changes: Sequence[int], shown: int
) -> list[tuple[int, int, float]]:
    """Begin, end and mean ratio of each stretch between two changes."""
    ends = [0, *changes, shown]
    levels = []
    for begin, end in itertools.pairwise(ends):
        logs = [math.log(ratio) for at, ratio in ratios.items() if begin <= at < end]
        if logs:
            levels.append((begin, end, math.exp(sum(logs) / len(logs))))
    return levels


def _night_class(life: RecordedLife) -> str:
    word = life.verdict or "none"
    return f"night {'accepted' if life.accepted else 'candidate'} {word}"


def _night_words(figure: RecordedFigure, life: RecordedLife, value: float | None) -> str:
    parts = [f"{life.recorded[:10]} {life.host} {life.version}".strip(), _words(figure, value)]
    if life.verdict:
        parts.append(life.verdict)
    if life.accepted:
        parts.append("accepted" + (f": {life.reason}" if life.reason else ""))
    return ", ".join(parts)


def _strip_words(
    figure: RecordedFigure,
    lives: Sequence[RecordedLife],
    known: Sequence[RecordedLife],
    changes: Sequence[int],
) -> str:
    accepted = sum(bool(life.accepted) for life in known)
    failed = sum(life.verdict == "fail" for life in known)
    words = f"{_label(figure)}, {count(len(known), 'life', 'lives')} since "
    words += f"{known[0].recorded[:10]}: {accepted} accepted, {failed} failed"
    dates = [lives[at].recorded[:10] for at in changes]
    return f"{words}; changes on {', '.join(dates)}" if dates else f"{words}; no change"


# Tables.


def _kernel_row(kernel: RecordedKernelChange) -> KernelChangeRow:
    change, before, now = kernel.change, kernel.before_calls, kernel.now_calls
    mark = "slower" if change.is_slower else "faster" if change.is_faster else ""
    before_ns, now_ns = in_microseconds(change.before_ns), in_microseconds(change.now_ns)
    calls = NONE
    if before is not None and now is not None:
        was, became = f"{before:.4g}", f"{now:.4g}"
        calls = was if was == became else f"{was} → {became}"
    return KernelChangeRow(
        name=shorten(change.name, 2 * MOST_LETTERS),
        full=change.name,
        mark=mark,
        cells=(
            change.category,
            before_ns if before_ns == now_ns else f"{before_ns} → {now_ns}",
            ratio(change.ratio, 3),
            f"{ratio(change.low, 3)} to {ratio(change.high, 3)}",
            f"{change.q:.2g}" if change.q >= 1e-4 else "< 0.0001",
            calls,
        ),
    )


def _scan_words(doc: RecordedRegression) -> str:
    if doc.not_scanned:
        return f"Kernels are not scanned: {doc.not_scanned}."
    slower = sum(each.change.is_slower for each in doc.kernels)
    words = f"{count(doc.scanned, 'kernel')} scanned, {slower} slower"
    if faster := sum(each.change.is_faster for each in doc.kernels):
        words += f", {faster} faster"
    return f"{words}. The scan explains and lists; it fails nothing."


def _life_rows(doc: RecordedRegression) -> tuple[LifeRow, ...]:
    rows = [
        LifeRow(
            life,
            _role(life),
            tuple(amount_alone(each.figure, each.accepted[at]) for each in doc.figures),
            is_new=False,
        )
        for at, life in enumerate(doc.accepted)
    ]
    return (
        *rows,
        *(
            LifeRow(
                life,
                "new",
                tuple(amount_alone(each.figure, each.fresh[at]) for each in doc.figures),
                is_new=True,
            )
            for at, life in enumerate(doc.fresh)
        ),
    )


def _signed_percent(share: float) -> str:
    return percent(share, 1, sign=True).removesuffix(" %")


def _role(life: RecordedLife) -> str:
    role = "mean and variance" if life.is_level else "variance alone"
    return f"{role}; begins a level: {life.reason}" if life.begins_level else role


def _nights(doc: RecordedRegression) -> tuple[LifeRow, ...]:
    """The newest night first."""
    rows = []
    for at in reversed(range(len(doc.history))):
        life = doc.history[at]
        changed = [_label(each) for each in doc.figures if at in each.changes]
        role = "accepted" + (f": {life.reason}" if life.reason else "") if life.accepted else ""
        if changed:
            role = f"{role}; " * bool(role) + f"change of {', '.join(changed)}"
        figures = tuple(amount_alone(each.figure, each.history[at]) for each in doc.figures)
        rows.append(LifeRow(life, role or NONE, figures, is_new=False))
    return tuple(rows)
