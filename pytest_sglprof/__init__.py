"""pytest-sglprof: profile windows on a running SGLang server, and a verdict.

The public names are imported only when they are used, since this package is loaded by
every pytest run of whoever installed it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pytest_sglprof.analysis.triggers import ImbalanceOnset, QueueGrowth, ThroughputDrop
    from pytest_sglprof.bench_serving.shapes import (
        balanced_load,
        one_rank_load,
        routing_key_load,
        uneven_load,
    )
    from pytest_sglprof.errors import Inconclusive, SglprofError
    from pytest_sglprof.trace.read import read_window
    from pytest_sglprof.trace.table import KernelTable
    from pytest_sglprof.values import LoadResult, LoadSample, ServerSpec, Threshold, WindowSpec
    from pytest_sglprof.verdict_failed import VerdictFailed, VerdictInconclusive

__version__ = "0.1.0"

_HOMES = {
    "ImbalanceOnset": "analysis.triggers",
    "Inconclusive": "errors",
    "KernelTable": "trace.table",
    "LoadResult": "values",
    "LoadSample": "values",
    "QueueGrowth": "analysis.triggers",
    "ServerSpec": "values",
    "SglprofError": "errors",
    "Threshold": "values",
    "ThroughputDrop": "analysis.triggers",
    "VerdictFailed": "verdict_failed",
    "VerdictInconclusive": "verdict_failed",
    "WindowSpec": "values",
    "balanced_load": "bench_serving.shapes",
    "one_rank_load": "bench_serving.shapes",
    "read_window": "trace.read",
    "routing_key_load": "bench_serving.shapes",
    "uneven_load": "bench_serving.shapes",
}

__all__ = [
    "ImbalanceOnset",
    "Inconclusive",
    "KernelTable",
    "LoadResult",
    "LoadSample",
    "QueueGrowth",
    "ServerSpec",
    "SglprofError",
    "Threshold",
    "ThroughputDrop",
    "VerdictFailed",
    "VerdictInconclusive",
    "WindowSpec",
    "__version__",
    "balanced_load",
    "one_rank_load",
    "read_window",
    "routing_key_load",
    "uneven_load",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
