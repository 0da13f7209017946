"""What `benchmarks.life_truth` measures: the project's judgement of lives, and a wrong one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from pytest_sglprof._analysis.certainty import trimmed
from pytest_sglprof._analysis.lives import LifeChange
from pytest_sglprof._analysis.strata import GroupStrata, StepWork, Stratum
from pytest_sglprof._baselines.records import (
    RECORD_FORMAT,
    BaselineKey,
    LifeRecord,
    Provenance,
)
from pytest_sglprof._config.load import Settings
from pytest_sglprof._config.model import Threshold
from pytest_sglprof._run.lives import KnownLives, NewLife, TestLives
from pytest_sglprof._verdict.ab import compare_lives
from pytest_sglprof._verdict.regression import Against, KnownLife, LivesVerdict
from pytest_sglprof.standin.life_model import Lives

Floats = npt.NDArray[np.float64]
WINDOW = "steady"
KEY = BaselineKey(
    test="test_planted.py::test_lives",
    window=WINDOW,
    backend="torch",
    gpu="planted",
    gpus=1,
    model="planted",
    quantization="",
    kv_dtype="",
    sizes={"tp": 1},
    load="",
    server="",
    standin=True,
)


class Night(NamedTuple):
    """word: the verdict on the new lives, None where nothing was judged, and its sentence. slower:
    numbers of the kernels that are listed, in that order. change: of compute. fresh: new lives
    that it took. sees: the smallest ratio that it says it sees."""

    word: str | None
    sentence: str
    slower: list[int]
    change: LifeChange | None
    fresh: int
    sees: float | None


def judged(lives: Lives, accepted: int, limit: float, *, confirm: bool = False) -> Night:
    """The verdict on compute of the lives after the first `accepted`, as pytest makes it.

    confirm: take of the new lives only as many as it asks for; else all of them, whatever they are.
    """
    records = records_of(lives)
    test = TestLives(
        _Planted(records[:accepted], confirms=len(records) - accepted - 1 if confirm else 0)
    )
    new = [NewLife(WINDOW, each, (Threshold("regression", limit),)) for each in records[accepted:]]
    if not confirm:
        test.add(new)
        test.judge(can_confirm=False, is_over=True)
        return _night(test.verdicts[WINDOW], lives)
    for number, each in enumerate(new, 1):
        test.add([each])
        if not test.judge(can_confirm=True, is_over=number == len(new)):
            break
    return _night(test.verdicts[WINDOW], lives)


class _Planted(KnownLives):
    """Accepted lives that lie in no folder."""

    def __init__(self, accepted: Sequence[LifeRecord], *, confirms: int) -> None:
        super().__init__(Settings(output=Path("unused"), confirm=confirms), "run")
        self._accepted = tuple(KnownLife(each) for each in accepted)

    def against(self, fresh: Sequence[LifeRecord]) -> Against:
        return Against(KEY.file_name, exists=True, lives=self._accepted)


def _night(verdict: LivesVerdict, lives: Lives) -> Night:
    place = {name: at for at, name in enumerate(lives.names)}
    slower = [place[each.name] for each in verdict.kernels.changes if each.is_slower]
    (compute,) = [each for each in verdict.figures if each.figure.name == "compute"]
    return Night(
        verdict.word,
        verdict.sentence,
        slower,
        compute.change,
        len(verdict.fresh),
        compute.detects,
    )


def records_of(lives: Lives) -> list[LifeRecord]:
    """What is kept of each life: one kind of step, what is typical of its kernels."""
    compute = typical(lives.times.sum(axis=2))
    wall = typical(lives.times.sum(axis=2) + lives.idle)
    idle = typical(lives.idle)
    kernels = kernel_times(lives)
    return [
        LifeRecord(
            format=RECORD_FORMAT,
            id=f"run-{number}/{WINDOW}.1",
            life=f"run-{number}/planted.1",
            run=f"run-{number}",
            recorded="2026-11-29T00:00:00.000Z",
            key=KEY,
            groups=(_group(lives, kernels[number], compute[number], wall[number], idle[number]),),
            load=None,
            provenance=Provenance(
                host=f"h{life.host}", versions={}, commit="", clocks_mhz={}, power_limit_w={},
                options={}, load={},
            ),
            verdict="pass",
        )
        for number, life in enumerate(lives.lives)
    ]  # fmt: skip


def _group(lives: Lives, kernels: Floats, compute: float, wall: float, idle: float) -> GroupStrata:
    steps = lives.times.shape[1]
    of_category = {
        name: float(kernels[[each == name for each in lives.categories]].sum())
        for name in dict.fromkeys(lives.categories)
    }
    return GroupStrata(
        group="",
        ranks=("TP0",),
        steps={"decode": steps},
        assigned_share=1.0,
        kernels=tuple(zip(lives.categories, lives.names, strict=True)),
        strata=(
            Stratum(
                work=StepWork("decode", "", 8, 10, -1),
                steps=steps,
                compute_ns=float(compute),
                categories=of_category,
                kernels=tuple(kernels.tolist()),
                calls=(1.0,) * len(kernels),
                wall_ns=float(wall),
                idle_ns=float(idle),
            ),
        ),
        left_out_strata=0,
        left_out_kernels=0,
        calls=(),
    )


def typical(steps: Floats) -> Floats:
    """Of each life, from shape (lives, steps)."""
    return trimmed(steps.T)[0]


def kernel_times(lives: Lives) -> Floats:
    """ns of each kernel in a typical step, shape (lives, kernels)."""
    return np.stack([trimmed(times)[0] for times in lives.times])


def by_steps(lives: Lives, accepted: int) -> LifeChange:
    """The change of compute as if each step were a life: what no judge may do."""
    logs = np.log(lives.times.sum(axis=2))
    old, new = logs[:accepted].ravel(), logs[accepted:].ravel()
    freedom = len(old) + len(new) - 2
    squares = ((old - old.mean()) ** 2).sum() + ((new - new.mean()) ** 2).sum()
    sd = math.sqrt(squares / freedom)
    return LifeChange(
        accepted=len(old),
        fresh=len(new),
        log_ratio=float(new.mean() - old.mean()),
        error=sd * math.sqrt(1 / len(old) + 1 / len(new)),
        freedom=float(freedom),
        sd=sd,
    )


def compared(lives: Lives, first: int, limit: float) -> list[int]:
    """Which kernels `sglprof ab` calls slower in the lives after the first `first` ones, and that
    are so by more than the limit; the surest first. No kernel is too small for it here.
    """
    sides = "A" * first + "B" * (len(lives.lives) - first)
    result = compare_lives(
        list(zip(sides, records_of(lives), strict=True)),
        a="A",
        b="B",
        seed=0,
        order=sides,
        min_share=0.0,
    )
    place = {name: at for at, name in enumerate(lives.names)}
    rows = [row for row in result.rows if row.kernel and row.word == "slower"]
    return [place[row.name] for row in rows if row.ratio > limit]
