"""Windows against accepted lives, as a run would leave them: drawn, with a known change."""

from __future__ import annotations

from typing import Any

import numpy as np

from pytest_sglprof._analysis.scan import KernelChange
from pytest_sglprof._baselines.records import Floor
from pytest_sglprof._report.regression import (
    RecordedFigure,
    RecordedKernel,
    RecordedKernelChange,
    RecordedLife,
    RecordedRegression,
)

FIGURES: tuple[tuple[str, str, str, float], ...] = (
    ("compute", "", "", 21.4e6),
    ("moe", "decode", "", 4.12e6),
    ("communication", "", "", 3.3e6),
    ("ttft_p99", "", "", 212.0),
    ("output_throughput", "", "", 2214.0),
    ("compute", "", "cutlass_80_tensorop_.*_bf16_128x256_32x3", 9e5),
)  # fmt: skip
CHANGE = 1.15  # of the second figure, and of the only one where there is one


def life(at: int, **changes: Any) -> RecordedLife:
    values: dict[str, Any] = {
        "life": f"life-{at:02}",
        "run": f"run-{at:02}",
        "recorded": f"2026-{10 + at // 30:02}-{1 + at % 30:02}T02:10:00.000Z",
        "host": "h5" if at % 3 else "h6",
        "version": "0.5.23 (b88f031)" if at > 20 else "0.5.22",
        "is_level": True,
        "begins_level": False,
        "reason": "",
        "accepted": f"2026-{10 + at // 30:02}-{1 + at % 30:02}T08:00:00.000Z",
        "verdict": "pass",
    }
    return RecordedLife(**values | changes)


def regression(
    *, lives: int = 10, fresh: int = 1, figures: int = 6, nights: int = 40, level: bool = True
) -> RecordedRegression:
    """`lives` accepted ones of which the last three began a new level, `fresh` new ones.

    The second figure (the first, where there is one) is 1.15 times what it was.
    """
    draw = np.random.default_rng([lives, fresh, figures])
    begins = lives - 3 if level and lives > 5 else 0
    accepted = [
        life(
            nights - lives + at,
            is_level=at >= begins,
            begins_level=at == begins > 0,
            reason="FP8 KV cache by default" if at == begins > 0 else "",
        )
        for at in range(lives)
    ]
    new = [life(nights + at, accepted="", verdict="fail") for at in range(fresh)]
    history = [life(at, accepted="", verdict="inconclusive") for at in range(nights - lives)]
    return RecordedRegression(
        file="tests_perf_test_decode.py_test_decode-steady-1f3a9c02.json",
        exists=True,
        accepted=tuple(accepted),
        fresh=tuple(new),
        history=(*history, *accepted, *new),
        confirming=fresh - 1,
        sentence="moe in decode takes 1.15x as long as in 10 accepted lives (limit 1.05): 4.74 ms "
        "a step against 4.12 ms, surely above 1.123",
        not_comparable="",
        floor=Floor(
            lives=10,
            sd={"compute": 0.006},
            upper=1.65,
            measured="2026-10-01T00:00:00.000Z",
            host="h5",
        ),
        floor_sentence="lives of one version differ by sd 0.6 % here (10 lives of 2026-10-01; up "
        "to 1.0 %): a limit below 1.02 cannot be judged",
        detection="with 10 accepted lives (sd 0.9 %) this sees +7.9 % or more",
        figures=tuple(_figure(draw, at, figures, accepted, new, nights) for at in range(figures)),
        scanned=187,
        not_scanned="",
        kernels=tuple(_kernel(at) for at in range(14)),
        appeared=(
            RecordedKernel(category="moe", name="fused_moe_kernel_v2", ns=3.1e6),
            RecordedKernel(category="moe", name="moe_align_block_size_kernel", ns=2.1e5),
        ),
        vanished=(RecordedKernel(category="moe", name="fused_moe_kernel", ns=3.2e6),),
        findings=("fused_moe_kernel is replaced by two kernels, together −3 %",),
    )


def _figure(
    draw: np.random.Generator,
    at: int,
    figures: int,
    accepted: list[RecordedLife],
    new: list[RecordedLife],
    nights: int,
) -> RecordedFigure:
    name, stage, kernel, size = FIGURES[at]
    changed = at == min(1, figures - 1)
    noise = np.exp(0.009 * draw.standard_normal(nights + len(new)))
    noise[: nights - 8] *= 0.96  # a change eight nights ago
    if changed:
        noise[nights:] *= CHANGE
    is_higher = name == "output_throughput"
    values = [float(size / factor if is_higher else size * factor) for factor in noise]
    old = noise[nights - len(accepted) : nights]
    level = [each for each, one in zip(old, accepted, strict=True) if one.is_level]
    before, now = (float(np.exp(np.log(each).mean())) for each in (level, noise[nights:]))
    ratio = now / before
    return RecordedFigure(
        name=name,
        stage=stage,
        kernel=kernel,
        accepted=tuple(values[nights - len(accepted) : nights]),
        fresh=tuple(values[nights:]),
        history=tuple(values),
        changes=(nights - 8,),
        before=size / before if is_higher else size * before,
        now=size / now if is_higher else size * now,
        ratio=ratio,
        low=ratio / 1.026,
        high=ratio * 1.02,
        limit=250.0 if name == "ttft_p99" else 1.05,
        limit_of="figure" if name == "ttft_p99" else "ratio",
        pass_bound=None if name == "ttft_p99" else 1.075,
        sd=0.009,
        detects=1.079,
        verdict="fail" if changed else "inconclusive" if at == 3 else "pass",
        reason=f"{name}: a sentence of its own",
    )


def _kernel(at: int) -> RecordedKernelChange:
    ratio = 1.31 - 0.03 * at
    change = KernelChange(
        category="moe" if at < 2 else "gemm",
        name=f"void cutlass::device_kernel<at::cuda::enable_sm90<{'Shape, ' * 9}{at}>>",
        ratio=ratio,
        low=ratio - 0.02,
        high=ratio + 0.02,
        relative=ratio - 0.01,
        before_ns=1e6 / (at + 1),
        now_ns=1e6 / (at + 1) * ratio,
        p=1e-5 * 10**at if at < 5 else 0.6,
        q=2e-4 * 10**at if at < 3 else 0.8,
        is_slower=at < 3,
        is_faster=False,
    )
    calls = 24.0 if at else 48.0
    return RecordedKernelChange(change=change, before_calls=24.0, now_calls=calls)
