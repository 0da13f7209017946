"""pytest-sglprof: profile windows on a running SGLang server, and a verdict.

The public names are imported only when they are used, since this package is loaded by
every pytest run of whoever installed it. All other modules are private (docs/stability.md).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pytest_sglprof._bench_serving.bench import BenchServing as BenchServing
    from pytest_sglprof._bench_serving.command import LoadResult as LoadResult
    from pytest_sglprof._bench_serving.command import balanced_load as balanced_load
    from pytest_sglprof._bench_serving.command import one_rank_load as one_rank_load
    from pytest_sglprof._bench_serving.command import routing_key_load as routing_key_load
    from pytest_sglprof._bench_serving.command import uneven_load as uneven_load
    from pytest_sglprof._config.model import ServerSpec as ServerSpec
    from pytest_sglprof._config.model import Threshold as Threshold
    from pytest_sglprof._config.model import WindowSpec as WindowSpec
    from pytest_sglprof._errors import Inconclusive as Inconclusive
    from pytest_sglprof._errors import SglprofError as SglprofError
    from pytest_sglprof._load.samples import LoadSample as LoadSample
    from pytest_sglprof._load.triggers import ImbalanceOnset as ImbalanceOnset
    from pytest_sglprof._load.triggers import KernelImbalance as KernelImbalance
    from pytest_sglprof._load.triggers import QueueGrowth as QueueGrowth
    from pytest_sglprof._load.triggers import Ring as Ring
    from pytest_sglprof._load.triggers import ThroughputDrop as ThroughputDrop
    from pytest_sglprof._load.watcher import LoadWatch as LoadWatch
    from pytest_sglprof._plugin.verdicts import VerdictFailed as VerdictFailed
    from pytest_sglprof._plugin.verdicts import VerdictInconclusive as VerdictInconclusive
    from pytest_sglprof._run.attempt import ProfileWindow as ProfileWindow
    from pytest_sglprof._run.roles import RoleWindows as RoleWindows
    from pytest_sglprof._run.shapes import ProfileShapes as ProfileShapes
    from pytest_sglprof._run.shapes import ShapeResult as ShapeResult
    from pytest_sglprof._run.window import Window as Window
    from pytest_sglprof._server.deployment import Deployment as Deployment
    from pytest_sglprof._server.launch import Server as Server
    from pytest_sglprof._trace.read import read_window as read_window
    from pytest_sglprof._trace.table import KernelTable as KernelTable

__version__ = "0.1.0"

_HOMES = {
    "BenchServing": "_bench_serving.bench",
    "Deployment": "_server.deployment",
    "ImbalanceOnset": "_load.triggers",
    "Inconclusive": "_errors",
    "KernelImbalance": "_load.triggers",
    "KernelTable": "_trace.table",
    "LoadResult": "_bench_serving.command",
    "LoadSample": "_load.samples",
    "LoadWatch": "_load.watcher",
    "ProfileShapes": "_run.shapes",
    "ProfileWindow": "_run.attempt",
    "QueueGrowth": "_load.triggers",
    "Ring": "_load.triggers",
    "RoleWindows": "_run.roles",
    "Server": "_server.launch",
    "ServerSpec": "_config.model",
    "SglprofError": "_errors",
    "ShapeResult": "_run.shapes",
    "Threshold": "_config.model",
    "ThroughputDrop": "_load.triggers",
    "VerdictFailed": "_plugin.verdicts",
    "VerdictInconclusive": "_plugin.verdicts",
    "Window": "_run.window",
    "WindowSpec": "_config.model",
    "balanced_load": "_bench_serving.command",
    "one_rank_load": "_bench_serving.command",
    "read_window": "_trace.read",
    "routing_key_load": "_bench_serving.command",
    "uneven_load": "_bench_serving.command",
}

__all__ = [*_HOMES, "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
