"""The pytest hooks and fixtures. They hand over to `PluginSession`, which `--sglprof` registers.

Every pytest run imports this module if the package is installed, so it imports nothing that
pytest has not imported already. To add a fixture, add it here; if it needs a server it takes
`sglang_server`, by which tests are recognised that need `--sglprof`.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from typing import TYPE_CHECKING, Any

import pytest

from pytest_sglprof._config.options import OPTIONS, PLUGIN_NAME, is_on, shows_config
from pytest_sglprof._plugin.invocation import refuse_options_alone, why_off
from pytest_sglprof._plugin.markers import MARKER_HELP, TEST_CASE_FIXTURE, concerns

if TYPE_CHECKING:
    from pytest_sglprof._bench_serving.bench import BenchServing
    from pytest_sglprof._load.watcher import LoadWatch
    from pytest_sglprof._plugin.session import PluginSession
    from pytest_sglprof._run.attempt import ProfileWindow
    from pytest_sglprof._run.shapes import ProfileShapes
    from pytest_sglprof._server.launch import Server


def pytest_addoption(parser: pytest.Parser) -> None:
    """Registers one option group: the rows of `OPTIONS` with `pytest=True`."""
    group = parser.getgroup(
        "sglprof",
        "profile windows on SGLang servers (pytest-sglprof); [ENVIRONMENT VARIABLE]",
    )
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
    """Turns `-n` without `--dist` into `--dist=loadgroup`, before xdist chooses a mode."""
    if _enabled(config):
        from pytest_sglprof._plugin.xdist import prefer_loadgroup

        prefer_loadgroup(config)
    return (yield)


def pytest_configure(config: pytest.Config) -> None:
    """Registers the markers, and with `--sglprof` the session."""
    for line in MARKER_HELP:
        config.addinivalue_line("markers", line)
    if _enabled(config):
        from pytest_sglprof._plugin.confirming import Confirming
        from pytest_sglprof._plugin.session import PluginSession

        session = PluginSession(config)
        config.pluginmanager.register(session, PLUGIN_NAME)
        confirming = Confirming(
            session.wants_life, session.announce_life, session.attach_last_attempt
        )
        config.pluginmanager.register(confirming, f"{PLUGIN_NAME}-lives")
    else:
        refuse_options_alone(config)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Without `--sglprof`, skips the tests that need it."""
    if not config.pluginmanager.has_plugin(PLUGIN_NAME):
        reason = why_off(config)
        for item in items:
            if concerns(item):
                item.add_marker(pytest.mark.skip(reason=reason))


def _enabled(config: pytest.Config) -> bool:
    """Whether `--sglprof` is on, on the command line or in the environment."""
    if config.getoption("sglprof_enabled") is not None or shows_config(config):
        return True
    import os

    return is_on(os.environ.get("SGLPROF", ""))


@pytest.fixture(scope="session")
def sglang_server(request: pytest.FixtureRequest) -> Iterator[Server]:
    """A running SGLang server, shared by all tests whose marker names the same one.

    `@pytest.mark.sglang_server("NAME", nsys=True)` chooses `[servers.NAME]` of sglprof.toml;
    without the marker it is `[server]`. It has `.url`, `.client`, `.info`, `.sizes`, `.kind`
    ("sglang" or "standin") and `.log`.
    """
    with _session(request).serve(request.param) as server:
        yield server


@pytest.fixture
def bench_serving(request: pytest.FixtureRequest, sglang_server: Server) -> BenchServing:
    """Runs SGLang's load driver against the server of this test.

    `bench_serving(num_prompts=200, random_input_len=1024)` waits until the load is over;
    `with bench_serving.running(...) as load:` runs it beside the block.
    """
    return _session(request).test_run(request.node).bench_serving()


@pytest.fixture
def profile_window(request: pytest.FixtureRequest, sglang_server: Server) -> ProfileWindow:
    """Opens profile windows by hand: `with profile_window("steady", num_steps=50) as window:`.

    Its options are those of the marker. Each window is judged at the end of its test.
    """
    return _session(request).profile_window(request.node)


@pytest.fixture
def profile_shapes(request: pytest.FixtureRequest, sglang_server: Server) -> ProfileShapes:
    """Profiles batches of fixed shapes: `profile_shapes(batch=[1, 8, 64], input=1024, output=128)`.

    SGLang's `one_batch_server` sends each batch, first without a window, then with one, called
    `bs1`, `bs8` and `bs64`. Returns a result for each: `.latency`, `.ttft`, `.output_throughput`,
    `.window`. Other keywords are options of the windows.
    """
    return _session(request).test_run(request.node).profile_shapes()


@pytest.fixture
def load_watch(request: pytest.FixtureRequest, sglang_server: Server) -> Iterator[LoadWatch]:
    """Watches the load of the server's ranks while the test runs.

    `load_watch.frame` holds the samples as a pandas DataFrame, also after the test;
    `load_watch.samples` holds them as a list of `LoadSample`.
    """
    watch = _session(request).test_run(request.node).load_watch()
    try:
        yield watch
    finally:
        watch.stop()


@pytest.fixture(name=TEST_CASE_FIXTURE)
def _test_case(
    request: pytest.FixtureRequest, sglang_server: Server, profile_window: ProfileWindow
) -> None:
    """Gives a method of a marked `unittest.TestCase` what a function has as arguments."""
    test: Any = request.instance
    test.sglang_server, test.profile_window = sglang_server, profile_window
    test.bench_serving = _session(request).test_run(request.node).bench_serving()


def _session(request: pytest.FixtureRequest) -> PluginSession:
    session: PluginSession | None = request.config.pluginmanager.getplugin(PLUGIN_NAME)
    if session is None:  # only known now: `getfixturevalue`
        pytest.skip(why_off(request.config))
    return session
