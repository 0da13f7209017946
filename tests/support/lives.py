"""Records of server lives, made without servers."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from msgspec.structs import replace

from pytest_sglprof._analysis.strata import GroupStrata, StepWork, Stratum
from pytest_sglprof._baselines.records import (
    RECORD_FORMAT,
    BaselineKey,
    LifeRecord,
    LoadFigures,
    Provenance,
)

DECODE = StepWork("decode", "", 4, 10, -1)
KERNELS = (("gemm", "gemm_bf16"), ("moe", "fused_moe"), ("communication", "all_reduce"))
NS = (300_000.0, 500_000.0, 80_000.0)
_numbers = itertools.count(1)


def key(**changes: Any) -> BaselineKey:
    """The key of most lives."""
    fields: dict[str, Any] = {
        "test": "tests/test_serving.py::test_decode",
        "window": "steady",
        "backend": "torch",
        "gpu": "NVIDIA H200",
        "gpus": 2,
        "model": "org/model",
        "quantization": "",
        "kv_dtype": "auto",
        "sizes": {"tp": 2, "dp": 1},
        "load": "11111111",
        "server": "22222222",
        "standin": False,
    }
    return BaselineKey(**{**fields, **changes})


def kind(
    ns: Sequence[float] = NS,
    work: StepWork = DECODE,
    *,
    calls: Sequence[float] | None = None,
    kernels: Sequence[tuple[str, str]] = KERNELS,
    **changes: Any,
) -> Stratum:
    """Fifty steps of one kind."""
    categories: dict[str, float] = {}
    for (category, _), each in zip(kernels, ns, strict=True):
        categories[category] = categories.get(category, 0.0) + each
    compute = sum(each for name, each in categories.items() if name != "communication")
    fields: dict[str, Any] = {
        "work": work,
        "steps": 50,
        "compute_ns": compute,
        "categories": categories,
        "kernels": tuple(ns),
        "calls": tuple(calls or [10.0] * len(ns)),
        "transfer_ns": 50_000.0,
        "wall_ns": 1_000_000.0,
        "idle_ns": 120_000.0,
    }
    return Stratum(**{**fields, **changes})


def group(
    *strata: Stratum, kernels: Sequence[tuple[str, str]] = KERNELS, **changes: Any
) -> GroupStrata:
    """A work group with these kinds of steps."""
    chosen = strata or (kind(),)
    fields: dict[str, Any] = {
        "group": "",
        "ranks": ("TP0", "TP1"),
        "steps": {"decode": sum(each.steps for each in chosen)},
        "assigned_share": 1.0,
        "kernels": tuple(kernels),
        "strata": tuple(chosen),
        "left_out_strata": 0,
        "left_out_kernels": 0,
        "calls": (),
    }
    return GroupStrata(**{**fields, **changes})


def load(**changes: Any) -> LoadFigures:
    """Figures of a load that count."""
    fields: dict[str, Any] = {
        "figures": {"ttft_p99": 250.0, "output_throughput": 1500.0},
        "driven": "rate",
        "requested": 100,
        "completed": 100,
        "queue_grows": False,
    }
    return LoadFigures(**{**fields, **changes})


def life(
    *groups: GroupStrata, night: int | None = None, scale: float = 1.0, **changes: Any
) -> LifeRecord:
    """A life that passed, of its own run. night: the day of November 2026 on which it was."""
    number = next(_numbers)
    run = f"run-202611{number:06}"  # ids sort as they are made
    fields: dict[str, Any] = {
        "format": RECORD_FORMAT,
        "id": f"{run}/steady.1",
        "life": f"{run}/default.1",
        "run": run,
        "recorded": f"2026-11-{night or min(number, 30):02}T02:00:00.000Z",
        "key": key(),
        "groups": tuple(_scaled(each, scale) for each in groups or (group(),)),
        "load": load(),
        "provenance": provenance(),
        "verdict": "pass",
    }
    return LifeRecord(**{**fields, **changes})


def provenance(**changes: Any) -> Provenance:
    """Where most lives come from."""
    options: Mapping[str, str] = {"attention_backend": "fa3"}
    fields: dict[str, Any] = {
        "host": "h1",
        "versions": {"sglang": "0.5.23", "CUDA driver": "12.8"},
        "commit": "",
        "clocks_mhz": {"TP0": 1980.0, "TP1": 1980.0},
        "power_limit_w": {"TP0": 700.0, "TP1": None},
        "options": options,
        "load": {"num_prompts": "100"},
    }
    return Provenance(**{**fields, **changes})


def _scaled(group: GroupStrata, scale: float) -> GroupStrata:
    return replace(
        group,
        strata=tuple(
            replace(
                each,
                compute_ns=each.compute_ns * scale,
                categories={name: ns * scale for name, ns in each.categories.items()},
                kernels=tuple(ns * scale for ns in each.kernels),
            )
            for each in group.strata
        ),
    )
