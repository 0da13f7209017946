"""Two versions on one machine: which figures and kernels of B's lives differ from those of A's.

The unit is the server life. All figures and kernels are one family: p is that of max-T over
permutations of the lives (Westfall and Young), so that a difference is found by chance in at most
a share alpha of comparisons, however many kernels there are.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from typing import Literal

import msgspec
import numpy as np
import numpy.typing as npt

from pytest_sglprof._analysis.certainty import Amount, Count, Share, t_quantile
from pytest_sglprof._analysis.lives import (
    FAIL_ALPHA,
    MIN_FLOOR_LIVES,
    PASS_ALPHA,
    POWER,
    LifeChange,
    change_of_logs,
    floor_of,
    upper_factor,
)
from pytest_sglprof._analysis.scan import max_t, without_levels
from pytest_sglprof._baselines.figures import (
    COMMUNICATION,
    IDLE_SHARE,
    PASS_WALL,
    Figure,
    KernelMatrix,
    kernel_matrix,
    life_values,
    why_load_does_not_count,
)
from pytest_sglprof._baselines.records import Floor, LifeRecord
from pytest_sglprof._metrics import METRICS, MIN_SHARE, PASS_MARGIN
from pytest_sglprof._verdict.life_words import figure_label

Floats = npt.NDArray[np.float64]
Word = Literal["not different", "slower", "faster", "inconclusive"]
RowWord = Literal["", "slower", "faster"]
AB_FORMAT = (1, 0)
OF_LOAD = (
    *("ttft_median", "ttft_p99", "tpot_median", "tpot_p99"),
    *("output_throughput", "goodput", "accept_length"),
)
MIN_CALLS_CHANGE = 0.02  # of the calls of a kernel a step
INTERVAL_ALPHA = 0.025  # on either side, of one figure by itself


class ABRow(msgspec.Struct, frozen=True, kw_only=True):
    """A figure or a kernel of both versions.

    kernel: whether it is a kernel, of `category`. a, b: geometric means over lives, in ns a step
    or in the unit of the load's figure; of `idle_share` means of the share. ratio: how many times
    as bad B is (of a throughput A / B; of `idle_share` of the wall time that it costs), and low,
    high: where that is by itself (95 %). p_slower, p_faster: of no
    difference, adjusted for all rows.
    """

    name: str
    category: str
    kernel: bool
    a: Amount
    b: Amount
    ratio: Amount
    low: Amount
    high: Amount
    p_slower: Share
    p_faster: Share
    word: RowWord = ""


class ABResult(msgspec.Struct, frozen=True, kw_only=True):
    """What `sglprof ab` found. order: the sides of the lives, in time. lives: that were compared.

    sees: the smallest ratio of compute that is found in 95 % of comparisons with so many lives;
    None where it is not known. floor: of A/A. notes: kernels of one side only, lives left out.
    """

    format: tuple[int, int]
    a: str
    b: str
    seed: int
    order: str
    lives: tuple[Count, Count]
    alpha: Share
    limit: Amount
    word: Word
    reason: str
    sees: Amount | None
    rows: tuple[ABRow, ...]
    notes: tuple[str, ...]
    records: tuple[LifeRecord, ...]
    floor: Floor | None = None


def order_of(lives: int, seed: int) -> str:
    """`ABBAABBA…`: `lives` of each side; which one starts is drawn with the seed."""
    first = random.Random(seed).choice(("AB", "BA"))
    return "".join(first if at % 2 == 0 else first[::-1] for at in range(lives))


def least_lives(alpha: float) -> int:
    """The fewest lives of each side of which a permutation test can reach alpha."""
    return next(n for n in range(1, 100) if 1 / math.comb(2 * n, n) <= alpha)


def compare_lives(
    records: Sequence[tuple[str, LifeRecord]],
    *,
    a: str,
    b: str,
    seed: int,
    order: str,
    alpha: float = FAIL_ALPHA,
    limit: float = 1.0,
    min_share: float = MIN_SHARE,
) -> ABResult:
    """Judges B's lives against A's. records: ("A" or "B", record), in order of time.

    Lives in which a kernel was compiled are left out. limit: B is slower where a ratio is surely
    above it. min_share: of compute; smaller kernels are not compared.
    """
    usable = [(side, record) for side, record in records if not record.apart]
    sides = [[record for side, record in usable if side == which] for which in "AB"]
    notes = [
        f"a life of {side} is left out: {record.apart}" for side, record in records if record.apart
    ]
    count_a, count_b = map(len, sides)
    word: Word = "inconclusive"
    sees: float | None = None
    rows: tuple[ABRow, ...] = ()
    if not count_a or not count_b or 1 / math.comb(count_a + count_b, count_b) > alpha:
        needed = least_lives(alpha)
        reason = f"{count_a} + {count_b} lives cannot reach p ≤ {alpha:g}: "
        reason += f"{needed} + {needed} are needed"
    else:
        table = _Table(sides[0], sides[1], min_share)
        rows = table.rows(alpha, limit, seed)
        word, reason, sees = _verdict(rows, table, alpha, limit)
        notes += table.notes
    return ABResult(
        format=AB_FORMAT,
        a=a,
        b=b,
        seed=seed,
        order=order,
        lives=(count_a, count_b),
        alpha=alpha,
        limit=limit,
        word=word,
        reason=reason,
        sees=sees,
        rows=rows,
        notes=tuple(notes),
        records=tuple(record for _, record in records),
    )


class _Table:
    """Logarithms of all figures, one row a life, A's first; larger is worse.

    problem: why steps cannot be compared; "" if they can.
    """

    def __init__(self, a: Sequence[LifeRecord], b: Sequence[LifeRecord], min_share: float) -> None:
        self.lives = [*a, *b]
        self.count_a = len(a)
        self.names: list[tuple[str, str, bool]] = []  # name, category, whether it is a kernel
        self.notes: list[str] = []
        self.problem = ""
        self._shown: list[Floats] = []
        self._tested: list[Floats] = []  # what is tested: of kernels without the life's level
        self._raw: list[Floats] = []
        matrix = kernel_matrix(self.lives)
        if isinstance(matrix, str):
            self.problem = matrix
        else:
            compute = self._values(Figure("compute"))
            least = min_share * float(np.mean(compute)) if compute is not None else 0.0
            self._add_figures(matrix, least)
            self._add_kernels(matrix, least)
        self._add_load()

    def _values(self, figure: Figure) -> Floats | None:
        """One number a life; None where a life has none."""
        values = life_values(self.lives, figure)
        if isinstance(values, str) or any(value is None for value in values):
            return None
        return np.array(values, np.float64)

    def _add(
        self, name: str, values: Floats, logs: Floats, tested: Floats, kernel: str = ""
    ) -> None:
        self.names.append((name, kernel, bool(kernel)))
        self._shown.append(values)
        self._raw.append(logs)
        self._tested.append(tested)

    def _add_figures(self, matrix: KernelMatrix, least: float) -> None:
        categories = dict.fromkeys(category for category, _ in matrix.names)
        for name in ("compute", PASS_WALL, COMMUNICATION, IDLE_SHARE, *categories):
            values = self._values(Figure(name))
            if values is None:
                continue
            if name == IDLE_SHARE:  # what it costs of the wall time, since a share of 0 is usual
                logs = -np.log1p(-np.minimum(values, 0.999999))
            elif (values <= 0).any() or (name in categories and values.mean() < least):
                continue
            else:
                logs = np.log(values)
            self._add(name, values, logs, logs)

    def _add_kernels(self, matrix: KernelMatrix, least: float) -> None:
        a, b = matrix.ns[: self.count_a], matrix.ns[self.count_a :]
        for at, (_, name) in enumerate(matrix.names):
            if note := _appearance(a[:, at], b[:, at]) or _calls(matrix.calls[:, at], len(a)):
                self.notes.append(f"{note}: {name}")
        is_whole = np.asarray((np.nan_to_num(matrix.ns) > 0).all(axis=0))
        if not is_whole.any():
            return
        logs = np.log(matrix.ns[:, is_whole])
        tested = without_levels(logs) if is_whole.sum() > 1 else logs
        kept = [name for name, whole in zip(matrix.names, is_whole.tolist(), strict=True) if whole]
        for at, (category, name) in enumerate(kept):
            ns = np.exp(logs[:, at])
            if ns.mean() >= least:
                self._add(name, ns, logs[:, at], tested[:, at], category)

    def _add_load(self) -> None:
        reasons = {why_load_does_not_count(life.load) for life in self.lives} - {""}
        if reasons:
            self.notes.append(f"figures of the load are not compared: {min(reasons)}")
            return
        for name in OF_LOAD:
            values = self._values(Figure(name))
            if values is not None and (values > 0).all():
                sign = -1.0 if METRICS[name].better == "higher" else 1.0
                self._add(name, values, sign * np.log(values), sign * np.log(values))

    def change(self, at: int) -> LifeChange:
        """B − A of one column."""
        return change_of_logs(self._raw[at][: self.count_a], self._raw[at][self.count_a :])

    def rows(self, alpha: float, limit: float, seed: int) -> tuple[ABRow, ...]:
        """All rows, those that differ most surely first.

        p is that of no difference. Those that differ are beyond a limit where their own t-test
        says so, at alpha over their number. (Lives of B less the limit cannot be permuted: then
        all figures that do not differ are surely faster than the limit, and exchanging A and B
        shows it.)
        """
        if not self.names:
            return ()
        tested = np.stack(self._tested, axis=1)
        a, b = tested[: self.count_a], tested[self.count_a :]
        kernels = np.array([is_kernel for _, _, is_kernel in self.names])
        slower = max_t(a, b, are_kernels=kernels, seed=seed)
        faster = max_t(b, a, are_kernels=kernels, seed=seed)
        words = self._words(slower, alpha, limit, 1), self._words(faster, alpha, limit, -1)
        rows = [
            self._row(at, float(slower[at]), float(faster[at]), words[0][at] or words[1][at])
            for at in range(len(self.names))
        ]
        return tuple(sorted(rows, key=lambda row: (min(row.p_slower, row.p_faster), row.kernel)))

    def _words(self, p: Floats, alpha: float, limit: float, sign: int) -> list[RowWord]:
        """ "slower" (sign 1) or "faster" (-1) for each row that surely is, beyond the limit."""
        differs = [bool(each <= alpha) for each in p]
        words: list[RowWord] = []
        for at, is_different in enumerate(differs):
            change = self.change(at)
            reach = 0.0
            if limit > 1 and is_different:
                t = t_quantile(alpha / sum(differs), change.freedom)
                reach = math.log(limit) + t * change.error
            is_beyond = is_different and sign * change.log_ratio > reach
            words.append(("slower" if sign > 0 else "faster") if is_beyond else "")
        return words

    def _row(self, at: int, slower: float, faster: float, word: RowWord) -> ABRow:
        name, category, is_kernel = self.names[at]
        change = self.change(at)
        low, high = change.ends(INTERVAL_ALPHA, INTERVAL_ALPHA)
        means = [
            float(part.mean() if name == IDLE_SHARE else np.exp(np.log(part).mean()))
            for part in (self._shown[at][: self.count_a], self._shown[at][self.count_a :])
        ]
        return ABRow(
            name=name,
            category=category,
            kernel=is_kernel,
            a=means[0],
            b=means[1],
            ratio=change.ratio,
            low=low,
            high=high,
            p_slower=slower,
            p_faster=faster,
            word=word,
        )


def _appearance(a: Floats, b: Floats) -> str:
    """Which side alone has a kernel; "" for both, or where a list was cut."""
    if np.isnan(a).any() or np.isnan(b).any():
        return ""
    if not a.any() and b.all():
        return "only in B"
    return "only in A" if not b.any() and a.all() else ""


def _calls(calls: Floats, count_a: int) -> str:
    before, now = (float(np.median(part)) for part in (calls[:count_a], calls[count_a:]))
    if not before > 0 or not now > 0 or abs(now - before) <= MIN_CALLS_CHANGE * before:
        return ""
    return f"called {before:.4g} times a step in A, {now:.4g} times in B"


def _verdict(
    rows: Sequence[ABRow], table: _Table, alpha: float, limit: float
) -> tuple[Word, str, float | None]:
    """The word, its reason, and the smallest ratio of compute that is seen."""
    sees = _sees(table, alpha, limit)
    slower = [row for row in rows if row.word == "slower"]
    if slower:
        slower.sort(key=lambda row: (row.kernel, row.p_slower))
        return "slower", "; ".join(_said(row) for row in slower[:3]), sees
    if table.problem:
        return "inconclusive", f"steps cannot be compared: {table.problem}", sees
    if not rows:
        return "inconclusive", "no figure is known of all lives", sees
    for at, (name, _, is_kernel) in enumerate(table.names):
        if limit > 1 and name in ("compute", PASS_WALL) and not is_kernel:
            _, high = table.change(at).ends(high_alpha=PASS_ALPHA)
            bound = 1 + PASS_MARGIN * (limit - 1)
            if high >= bound:
                reason = f"{name} may be up to {high:.3f} times as slow, {bound:.3f} is allowed"
                return "inconclusive", f"{reason}: more lives are needed", sees
    faster = [row for row in rows if row.word == "faster"]
    if faster:
        return "faster", "; ".join(_said(row) for row in faster[:3]), sees
    return "not different", f"nothing is surely slower or faster (p ≤ {alpha:g})", sees


def _sees(table: _Table, alpha: float, limit: float) -> float | None:
    """By the t-test of compute alone; in a family of kernels it is a little more."""
    if ("compute", "", False) not in table.names:
        return None
    change = table.change(table.names.index(("compute", "", False)))
    reach = t_quantile(alpha, change.freedom) + t_quantile(1 - POWER, change.freedom)
    return limit * math.exp(reach * change.error)


def _said(row: ABRow) -> str:
    what = f"kernel {row.name}" if row.kernel else row.name
    p = min(row.p_slower, row.p_faster)
    return f"{what} is {row.word}: {row.ratio:.3f} x ({row.low:.3f} to {row.high:.3f}, p {p:.2g})"


# What lives of one version differ by.


def floor_figures(records: Sequence[LifeRecord]) -> Iterator[tuple[str, float]]:
    """The standard deviation between lives of each figure's logarithm, by its label."""
    matrix = kernel_matrix(records)
    stages, categories = [""], dict.fromkeys((COMMUNICATION,))
    if not isinstance(matrix, str):
        categories |= dict.fromkeys(category for category, _ in matrix.names)
        works = {s.work.stage for record in records for g in record.groups for s in g.strata}
        stages += sorted(works - {""})
    for stage in stages:
        for name in ("compute", PASS_WALL, *categories):
            yield from _noise(records, Figure(name, stage=stage))
    for name in OF_LOAD:
        yield from _noise(records, Figure(name))


def _noise(records: Sequence[LifeRecord], figure: Figure) -> Iterator[tuple[str, float]]:
    values = life_values(records, figure)
    if isinstance(values, str) or not all(values):
        return
    noise = floor_of(np.log(np.array(values, np.float64)))
    if not isinstance(noise, str):
        yield figure_label(figure), noise.sd


def floor_result(
    records: Sequence[LifeRecord], *, a: str, seed: int, measured: str, host: str
) -> ABResult:
    """A/A: what the machine shows between lives of one version."""
    lives = [record for record in records if not record.apart]
    sd = dict(floor_figures(lives)) if len(lives) >= MIN_FLOOR_LIVES else {}
    word: Word = "not different" if sd else "inconclusive"
    reason = f"{len(lives)} lives have no figure in common"
    if len(lives) < MIN_FLOOR_LIVES:
        reason = f"{len(lives)} lives, at least {MIN_FLOOR_LIVES} are needed for a floor"
    floor = None
    if sd:
        upper = upper_factor(len(lives))
        floor = Floor(lives=len(lives), sd=sd, upper=upper, measured=measured, host=host)
        reason = f"{len(lives)} lives of one version"
    return ABResult(
        format=AB_FORMAT,
        a=a,
        b=a,
        seed=seed,
        order="A" * len(records),
        lives=(len(lives), 0),
        alpha=FAIL_ALPHA,
        limit=1.0,
        word=word,
        reason=reason,
        sees=None,
        rows=(),
        notes=tuple(f"a life is left out: {r.apart}" for r in records if r.apart),
        records=tuple(records),
        floor=floor,
    )
