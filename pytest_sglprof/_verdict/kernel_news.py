"""What happened to single kernels between accepted and new server lives.

Nothing fails by it: it explains a verdict, and lists what changed beside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pytest_sglprof._analysis.lives import LifeValue
from pytest_sglprof._analysis.scan import KernelChange, scan
from pytest_sglprof._baselines.figures import Figure, KernelMatrix, kernel_matrix
from pytest_sglprof._baselines.records import LifeRecord
from pytest_sglprof._limits import matching
from pytest_sglprof._trace.categories import NOT_COMPUTE
from pytest_sglprof._verdict.wording import duration, percent, shorten, signed_duration

Floats = npt.NDArray[np.float64]

MAX_NAME = 60
MIN_CALLS_CHANGE = 0.05  # of the calls a step, of which the lives of either side agree
MAX_LISTED = 50  # kernels whose times the document lists


@dataclass(frozen=True)
class OneSided:
    """A kernel that only accepted lives, or only new ones have. ns: of a step."""

    category: str
    name: str
    ns: float


@dataclass(frozen=True)
class KernelNews:
    """changes: kernels of the scan that are listed, the most lost time first. calls: of these
    kernels, calls a step before and now. not_scanned: why there was no scan, "" if there was."""

    scanned: int = 0
    not_scanned: str = ""
    changes: tuple[KernelChange, ...] = ()
    calls: tuple[tuple[float, float], ...] = ()
    appeared: tuple[OneSided, ...] = ()
    vanished: tuple[OneSided, ...] = ()
    findings: tuple[str, ...] = ()
    matrix: KernelMatrix | None = None
    of_level: tuple[int, ...] = ()  # rows of the matrix that are compared with, and new ones
    fresh: tuple[int, ...] = ()


def kernel_news(
    accepted: Sequence[LifeRecord],
    lives: Sequence[LifeValue],
    fresh: Sequence[LifeRecord],
    *,
    limit: float,
) -> KernelNews:
    """Compares every kernel of the lives. lives: host and level of each accepted one."""
    if not accepted or not fresh:
        return KernelNews(not_scanned="no accepted life" if fresh else "no new life")
    matrix = kernel_matrix([*accepted, *fresh])
    if isinstance(matrix, str):
        return KernelNews(not_scanned=matrix)
    split, last = len(accepted), max(each.level for each in lives)
    of_level = tuple(at for at, each in enumerate(lives) if each.level == last)
    new = tuple(range(split, split + len(fresh)))
    with np.errstate(divide="ignore"):
        logs = np.log(matrix.ns)
    hosts = [LifeValue(1.0, record.provenance.host) for record in fresh]
    scanned = scan(
        matrix.names,
        logs[:split],
        logs[split:],
        accepted_lives=lives,
        fresh_lives=hosts,
        limit=limit,
    )
    news = KernelNews(matrix=matrix, of_level=of_level, fresh=new)
    appeared = _one_sided(matrix, new, of_level)
    vanished = _one_sided(matrix, of_level, new)
    sentences = (*_replaced(appeared, vanished), *_calls(matrix, of_level, new))
    changes = () if isinstance(scanned, str) else _listed(scanned)
    return KernelNews(
        scanned=0 if isinstance(scanned, str) else len(scanned),
        not_scanned=scanned if isinstance(scanned, str) else "",
        changes=changes,
        calls=tuple(_calls_of(news, each.name) for each in changes),
        appeared=appeared,
        vanished=vanished,
        findings=sentences,
        matrix=matrix,
        of_level=of_level,
        fresh=new,
    )


def _listed(changes: Sequence[KernelChange]) -> tuple[KernelChange, ...]:
    known = [each for each in changes if each.is_slower or each.is_faster]
    known.sort(key=lambda each: (not each.is_slower, -abs(each.now_ns - each.before_ns)))
    return tuple(known[:MAX_LISTED])


def _calls_of(news: KernelNews, name: str) -> tuple[float, float]:
    assert news.matrix is not None
    at = [listed for _, listed in news.matrix.names].index(name)
    calls = news.matrix.calls
    before, now = calls[list(news.of_level), at].mean(), calls[list(news.fresh), at].mean()
    return float(before), float(now)


def _one_sided(
    matrix: KernelMatrix, having: Sequence[int], lacking: Sequence[int]
) -> tuple[OneSided, ...]:
    """Kernels that all lives of one side have and none of the other, the longest first."""
    has = (matrix.ns[list(having)] > 0).all(axis=0)
    lacks = (matrix.ns[list(lacking)] == 0).all(axis=0)
    kernels = [
        OneSided(*matrix.names[at], float(matrix.ns[list(having), at].mean()))
        for at in np.flatnonzero(has & lacks).tolist()
    ]
    return tuple(sorted(kernels, key=lambda each: (-each.ns, each.name)))


def _replaced(appeared: Sequence[OneSided], vanished: Sequence[OneSided]) -> list[str]:
    """`A replaced by B and C in gemm, together −3 %`, a sentence for each category."""
    sentences = []
    for category in dict.fromkeys(each.category for each in (*vanished, *appeared)):
        old = [each for each in vanished if each.category == category]
        new = [each for each in appeared if each.category == category]
        before, now = sum(each.ns for each in old), sum(each.ns for each in new)
        if old and new:
            together = f"together {percent(now / before - 1, 1, sign=True)}"
            sentences.append(f"{_names(old)} replaced by {_names(new)} in {category}, {together}")
        elif new:
            sentences.append(f"{_names(new)} appeared in {category}: +{duration(now)} a step")
        else:
            sentences.append(f"{_names(old)} vanished from {category}: −{duration(before)} a step")
    return sentences


def _names(kernels: Sequence[OneSided]) -> str:
    names = [shorten(each.name, MAX_NAME) for each in kernels[:3]]
    if len(kernels) > 3:
        names.append(f"{len(kernels) - 3} others")
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _calls(matrix: KernelMatrix, of_level: Sequence[int], fresh: Sequence[int]) -> list[str]:
    """Kernels whose number of calls changed by more than lives of either side differ by."""
    old, new = matrix.calls[list(of_level)], matrix.calls[list(fresh)]
    sentences = []
    for at, (_, name) in enumerate(matrix.names):
        if not (old[:, at].min() > 0 and new[:, at].min() > 0):
            continue
        before, now = float(old[:, at].mean()), float(new[:, at].mean())
        apart = old[:, at].max() < new[:, at].min() or new[:, at].max() < old[:, at].min()
        if apart and abs(now / before - 1) > MIN_CALLS_CHANGE:
            what = shorten(name, MAX_NAME)
            sentences.append(f"{what} is called {now:.3g} times a step, {before:.3g} before")
    return sentences[:5]


def explanation(figure: Figure, news: KernelNews, lost_ns: float) -> str:
    """`; most of it in moe (+90 µs a step): fused_moe_kernel 310 µs → 402 µs a step`.

    lost_ns: what the figure is longer by. "" if nothing stands out, and for steps of one stage,
    since the kernels of all stages would explain another figure.
    """
    matrix = news.matrix
    if matrix is None or figure.stage or figure.name == "idle_share":
        return ""
    before = np.nan_to_num(matrix.ns[list(news.of_level)]).mean(axis=0)
    now = np.nan_to_num(matrix.ns[list(news.fresh)]).mean(axis=0)
    names = (name for _, name in matrix.names)
    matches = matching(figure.kernel, names) if figure.kernel else frozenset()
    longer = {
        at: float(now[at] - before[at])
        for at, (category, name) in enumerate(matrix.names)
        if name in matches or (not figure.kernel and _is_part(figure, category))
    }
    text = ""
    if figure.name == "pass_wall":
        compute = sum(longer.values())
        text = f"; compute is {signed_duration(compute) or '0 ns'} of {signed_duration(lost_ns)}"
        if compute < lost_ns / 2:
            return text
    lost: dict[str, float] = {}
    for at, ns in longer.items():
        lost[matrix.names[at][0]] = lost.get(matrix.names[at][0], 0.0) + ns
    most = max(lost, key=lambda category: lost[category], default="")
    if not most or lost[most] <= 0:
        return text
    at = max((at for at in longer if matrix.names[at][0] == most), key=lambda at: longer[at])
    is_whole = not figure.kernel and figure.name in _OF_ALL
    where = f"{most} ({signed_duration(lost[most])} a step): " if is_whole else ""
    times = f"{duration(float(before[at]))} → {duration(float(now[at]))} a step"
    return f"{text}; most of it in {where}{shorten(matrix.names[at][1], MAX_NAME)} {times}"


_OF_ALL = ("compute", "pass_wall", "all")  # figures that kernels of several categories make


def _is_part(figure: Figure, category: str) -> bool:
    return category not in NOT_COMPUTE if figure.name in _OF_ALL else category == figure.name
