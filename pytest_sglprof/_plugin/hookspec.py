"""Hooks that a conftest.py may implement for pytest-sglprof."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from pytest_sglprof._config.model import ServerSpec


# A specification has no body: pluggy calls what implements it.
@pytest.hookspec
def pytest_sglprof_servers(config: pytest.Config) -> Mapping[str, ServerSpec]:  # type: ignore[empty-body]
    """Return server specifications by name, in addition to `[servers.NAME]`, which they override.

    Called once, before tests are collected. Example::

        def pytest_sglprof_servers(config):
            return {"tp4": ServerSpec(name="tp4", model_path=MODEL, args=("--tp", "4"))}
    """
