"""The fixtures; each delegates to the session of `--sglprof`, and imports when it is used."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from pytest_sglprof._bench_serving.bench import BenchServing
    from pytest_sglprof._load.watcher import LoadWatch
    from pytest_sglprof._plugin.session import PluginSession
    from pytest_sglprof._run.window import ProfileWindow
    from pytest_sglprof._server.launch import Server


@pytest.fixture(scope="session")
def sglang_server(request: pytest.FixtureRequest) -> Iterator[Server]:
    """A running SGLang server, shared by all tests that ask for the same one.

    Which one: `@pytest.mark.sglang_server("NAME", nsys=True)`, a `[servers.NAME]` of
    sglprof.toml; without the marker `[server]`. Has `.url`, `.client`, `.info`, `.sizes`,
    `.kind` ("sglang" or "standin") and `.log`.
    """
    with _session(request).serve(request.param) as server:
        yield server


@pytest.fixture
def bench_serving(request: pytest.FixtureRequest, sglang_server: Server) -> BenchServing:
    """Runs SGLang's load driver against the server of this test.

    `bench_serving(num_prompts=200, random_input_len=1024)` waits for its end;
    `with bench_serving.running(...) as load:` runs it beside the block.
    """
    return _session(request).test_run(request.node).bench_serving()


@pytest.fixture
def profile_window(request: pytest.FixtureRequest, sglang_server: Server) -> ProfileWindow:
    """Opens profile windows by hand: `with profile_window("steady", num_steps=50) as window:`.

    Options: docs/windows.md. Every window is judged at the end of its test.
    """
    return _session(request).profile_window(request.node)


@pytest.fixture
def load_watch(request: pytest.FixtureRequest, sglang_server: Server) -> Iterator[LoadWatch]:
    """Watches the load of the server's ranks while the test runs.

    `load_watch.frame` holds the samples as a pandas DataFrame, during the test and after
    it; `load_watch.samples` the same as `LoadSample`s.
    """
    watch = _session(request).test_run(request.node).load_watch()
    try:
        yield watch
    finally:
        watch.stop()


def _session(request: pytest.FixtureRequest) -> PluginSession:
    from pytest_sglprof._config.options import PLUGIN_NAME

    session: PluginSession | None = request.config.pluginmanager.getplugin(PLUGIN_NAME)
    assert session is not None, "tests with our fixtures are skipped without --sglprof"
    return session
