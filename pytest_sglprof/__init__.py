"""pytest-sglprof: profile windows on a running SGLang server, and a verdict.

The public names are imported only when they are used, since this package is loaded by
every pytest run of whoever installed it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pytest_sglprof.errors import Inconclusive, SglprofError
    from pytest_sglprof.trace.read import read_window
    from pytest_sglprof.trace.table import KernelTable
    from pytest_sglprof.values import LoadResult, ServerSpec, Threshold, WindowSpec
    from pytest_sglprof.verdict_failed import VerdictFailed, VerdictInconclusive

__version__ = "0.1.0"

_HOMES = {
    "Inconclusive": "errors",
    "KernelTable": "trace.table",
    "LoadResult": "values",
    "ServerSpec": "values",
    "SglprofError": "errors",
    "Threshold": "values",
    "VerdictFailed": "verdict_failed",
    "VerdictInconclusive": "verdict_failed",
    "WindowSpec": "values",
    "read_window": "trace.read",
}

__all__ = [
    "Inconclusive",
    "KernelTable",
    "LoadResult",
    "ServerSpec",
    "SglprofError",
    "Threshold",
    "VerdictFailed",
    "VerdictInconclusive",
    "WindowSpec",
    "__version__",
    "read_window",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
