"""The pytest hooks. Each hands over to `PluginSession`, registered only with `--sglprof`.

This module is imported by every pytest run of whoever installed the package, so it imports
nothing that pytest has not imported already.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

import pytest

from pytest_sglprof._config.options import OPTIONS, PLUGIN_NAME, is_on, shows_config
from pytest_sglprof._plugin import fixtures
from pytest_sglprof._plugin.markers import MARKER_HELP, concerns

sglang_server = fixtures.sglang_server
bench_serving = fixtures.bench_serving
profile_window = fixtures.profile_window
load_watch = fixtures.load_watch

OFF = "needs --sglprof: it starts a server and opens profile windows"


def pytest_addoption(parser: pytest.Parser) -> None:
    """Registers one option group: the rows of `OPTIONS` that pytest has a flag for."""
    group = parser.getgroup("sglprof", "profile windows on SGLang servers (pytest-sglprof)")
    actions = {"flag": "store_true", "list": "append"}
    for option in OPTIONS:
        if option.pytest:
            text = f"{option.help} [{option.env}]"
            more = {"metavar": option.metavar} if option.metavar else {}
            more["action"] = actions.get(option.kind, "store")
            group.addoption(option.pytest_flag, dest=option.dest, default=None, help=text, **more)


def pytest_addhooks(pluginmanager: pytest.PytestPluginManager) -> None:
    """Registers the hooks of `hookspec`."""
    from pytest_sglprof._plugin import hookspec

    pluginmanager.add_hookspecs(hookspec)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> Generator[None, Any, Any]:
    """Before xdist chooses a mode: `-n` without `--dist` becomes loadgroup."""
    if _enabled(config):
        from pytest_sglprof._plugin.xdist import prefer_loadgroup

        prefer_loadgroup(config)
    return (yield)


def pytest_configure(config: pytest.Config) -> None:
    """Registers the markers, and the session object where `--sglprof` is given."""
    for line in MARKER_HELP:
        config.addinivalue_line("markers", line)
    if _enabled(config):
        from pytest_sglprof._plugin.session import PluginSession

        config.pluginmanager.register(PluginSession(config), PLUGIN_NAME)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Without `--sglprof`, skips what needs it."""
    if not config.pluginmanager.has_plugin(PLUGIN_NAME):
        for item in items:
            if concerns(item):
                item.add_marker(pytest.mark.skip(reason=OFF))


def _enabled(config: pytest.Config) -> bool:
    """The main switch, resolved like every option: command line > environment."""
    if config.getoption("sglprof_enabled") is not None or shows_config(config):
        return True
    import os

    return is_on(os.environ.get("SGLPROF", ""))
