"""Facts about a run that results.json carries: who ran what, where, with which versions."""

from __future__ import annotations

import platform
from importlib import metadata
from typing import TYPE_CHECKING, Any

import pytest

from pytest_sglprof import __version__
from pytest_sglprof.redact import redact_command

if TYPE_CHECKING:
    from pytest_sglprof.settings import Settings


def run_facts(config: pytest.Config, settings: Settings) -> dict[str, Any]:
    """The constant part of `report.model.Run`."""
    return {
        "command": tuple(redact_command(["pytest", *map(str, config.invocation_params.args)])),
        "host": platform.node(),
        "versions": {
            "pytest_sglprof": __version__,
            "python": platform.python_version(),
            "pytest": pytest.__version__,
            "pandas": metadata.version("pandas"),
            "sglang": "",
            "nsys": "",
        },
        "min_steps": settings.min_steps,
    }
