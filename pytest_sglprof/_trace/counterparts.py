"""Find which kernels of a step a rank lost, and their counterparts on its peers.

Ranks with the same input run the same kernels in the same order on each stream. So a rank that
lost some has the sequence of a whole rank with gaps; the gaps are what is lost. The whole
sequence is that of a peer in the same step, or, where all of them lack something, that of
another step with as many kernels.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from pytest_sglprof._trace.table import Ints, RankActivities

_MAX_PATTERNS = 8  # other steps whose kernels are tried


@dataclass(frozen=True)
class Gaps:
    """What ranks lost in one step.

    lost_ns: time of what each rank lost, as another one measured it, ns; 0 for a whole rank.
    left_out: the activities of each rank whose counterparts another one lost: indices.
    """

    lost_ns: Mapping[int, float]
    left_out: Mapping[int, Sequence[int]]


class Counterparts:
    """The steps of ranks with the same input.

    group: the ranks, by a number of the caller's. expected: for each of them the number of kernels
    of each of its steps, and how many of them are lost.
    """

    def __init__(
        self,
        group: Mapping[int, RankActivities],
        expected: Mapping[int, Mapping[int, tuple[int, int]]],
    ) -> None:
        names: dict[str, int] = {}
        self._sequences = {member: _Sequences(part, names) for member, part in group.items()}
        self._expected = expected
        self._gaps: dict[int, Gaps | None] = {}
        self._patterns: dict[int, list[tuple[int, int]]] = {}  # number of kernels -> whole steps
        for member, steps in expected.items():
            for step, (count, lost) in steps.items():
                listed = self._patterns.setdefault(count, [])
                if not lost and len(listed) < _MAX_PATTERNS:
                    listed.append((member, step))

    def of(self, step: int) -> Gaps | None:
        """What is missing in this step, which all ranks have; None if that is not known."""
        if step not in self._gaps:
            self._gaps[step] = self._settle(step)
        return self._gaps[step]

    def settled(self) -> Iterator[Gaps]:
        """What is known of all steps that were asked for."""
        return (gaps for gaps in self._gaps.values() if gaps is not None)

    def _settle(self, step: int) -> Gaps | None:
        counts = {member: steps[step] for member, steps in self._expected.items()}
        kernels = {member: self._sequences[member].of(step) for member in counts}
        losers = [member for member, (_, lost) in counts.items() if lost]
        whole = [(member, step) for member, (_, lost) in counts.items() if not lost]
        for peer, of_step in (*whole, *self._patterns.get(counts[losers[0]][0], ())):
            pattern_rows, pattern = self._sequences[peer].of(of_step)
            if any(len(kernels[one][1]) + counts[one][1] != len(pattern) for one in losers):
                continue
            places = {one: _missing_places(kernels[one][1], pattern) for one in losers}
            lost = {one: missing for one, missing in places.items() if missing is not None}
            if len(lost) == len(losers):
                dur = self._sequences[peer].dur[pattern_rows]
                left_out = _left_out(pattern, lost, kernels)
                lost_ns = {one: float(dur[lost.get(one, [])].sum()) for one in counts}
                return None if left_out is None else Gaps(lost_ns, left_out)
        return None


class _Sequences:
    """The kernels of one rank in each step, in order of stream and start.

    names: a number for each name, common to all ranks; it grows.
    """

    def __init__(self, part: RankActivities, names: dict[str, int]) -> None:
        self.dur = part.dur
        rows = np.flatnonzero(part.is_kernel & (part.step >= 0))
        order = np.lexsort((part.start[rows], part.stream[rows], part.step[rows]))
        self._rows = rows[order]
        self._steps = part.step[self._rows]
        numbers = [names.setdefault(name, len(names)) for name in part.names]
        name = np.array(numbers or [0], np.int64)[part.name_codes[self._rows]]
        self._keys = (name << 32) + (part.stream[self._rows].astype(np.int64) & 0xFFFFFFFF)

    def of(self, step: int) -> tuple[Ints, Ints]:
        """The rows of a step, and a key of each: its name and stream."""
        first, end = np.searchsorted(self._steps, [step, step + 1])
        return self._rows[first:end], self._keys[first:end]


def _missing_places(incomplete: Ints, whole: Ints) -> list[int] | None:
    """The places of `whole` that `incomplete` lacks; None unless it is `whole` with gaps.

    incomplete: no longer than whole.
    """
    missing: list[int] = []
    at = 0  # up to here, the two are alike but for what is missing
    while True:
        rest = incomplete[at:]
        shift = len(missing)
        unlike = np.flatnonzero(rest != whole[at + shift : len(incomplete) + shift])
        if shift == len(whole) - len(incomplete):
            return None if len(unlike) else missing
        at += int(unlike[0]) if len(unlike) else len(rest)
        missing.append(at + shift)


def _left_out(
    pattern: Ints, lost: Mapping[int, Sequence[int]], kernels: Mapping[int, tuple[Ints, Ints]]
) -> dict[int, list[int]] | None:
    """The rows of each rank at the places of `pattern` that another rank lost.

    None if a whole rank runs another number of these kernels than the pattern does.
    """
    missed = {place for missing in lost.values() for place in missing}
    places = np.array(sorted(missed), np.int64)
    left_out: dict[int, list[int]] = {}
    for member, (rows, keys) in kernels.items():
        if member in lost:
            others = np.setdiff1d(places, lost[member])
            at = others - np.searchsorted(lost[member], others)
        elif np.array_equal(keys, pattern):
            at = places
        else:
            chosen = [_same(place, pattern, keys) for place in places]
            if None in chosen:
                return None
            at = np.array(chosen)
        left_out[member] = rows[at].tolist()
    return left_out


def _same(place: int, pattern: Ints, keys: Ints) -> int | None:
    """Where `keys` has what stands in this place of `pattern`, if both have as many of it."""
    places, at = (np.flatnonzero(listed == pattern[place]) for listed in (pattern, keys))
    return int(at[np.searchsorted(places, place)]) if len(places) == len(at) else None
