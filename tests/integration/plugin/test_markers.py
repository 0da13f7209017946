"""The two markers: what they mean, and what is wrong with them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from pytest_sglprof import ImbalanceOnset, KernelImbalance
from pytest_sglprof._config.load import Settings
from pytest_sglprof._config.model import ServerSpec
from pytest_sglprof._errors import SettingsError
from pytest_sglprof._plugin.markers import check_item, concerns, marked_window, server_spec
from pytest_sglprof._plugin.session import collection_problems, sort_by_server

SERVERS = {
    "default": ServerSpec(),
    "moe": ServerSpec("moe"),
    "traced": ServerSpec("traced", nsys=True),
}
SETTINGS = Settings(Path("out"), servers=SERVERS, min_steps=3)


class FakeItem:
    """As much of a pytest.Item as the markers need; the marks are closest first."""

    def __init__(self, *marks, fixtures=("sglang_server",), name="test_it"):
        self.name = name
        self.fixturenames = fixtures
        self._marks = [mark.mark for mark in marks]

    def get_closest_marker(self, name):
        return next((mark for mark in self._marks if mark.name == name), None)


server, window = pytest.mark.sglang_server, pytest.mark.profile_window


@pytest.mark.parametrize(
    ("marks", "key"),
    [
        ([], "default"),
        ([server("moe")], "moe"),
        ([server(name="moe")], "moe"),
        ([server("moe", nsys=True)], "moe+nsys"),
        ([server("traced")], "traced+nsys"),
        ([server("traced", nsys=False)], "traced"),
        ([server("moe"), server("traced")], "moe"),
        ([window(backend="nsys")], "default+nsys"),
        ([window(backend="torch"), server("moe")], "moe"),
    ],
)
def test_the_server_that_a_test_asks_for(marks, key):
    found = server_spec(FakeItem(*marks), SETTINGS)
    assert found == replace(SERVERS[found.name], nsys=found.nsys)
    assert found.key == key
    assert found == server_spec(FakeItem(*marks), SETTINGS), "so that both tests share one server"


@pytest.mark.parametrize(
    ("mark", "said"),
    [
        (server("none"), "expected: one of default, moe, traced"),
        (server("moe", nys=True), "unexpected nys"),
        (server("moe", "torch"), "2 positional arguments"),
        (server("moe", name="moe"), "1 positional arguments and ['name']"),
        (server(3), "name=3"),
        (server("moe", nsys="yes"), "nsys='yes'"),
        (window("a", "b"), "2 positional arguments"),
        (window("a", name="b"), "its name twice"),
        (window(step=3), "unknown argument step"),
        (window(slowdown="x"), "not a number"),
    ],
)
def test_wrong_markers_are_described(mark, said):
    problem = check_item(FakeItem(mark), SETTINGS)
    assert problem.startswith("test_it: @pytest.mark.")
    assert said in problem


def test_a_window_needs_a_server_and_an_nsys_window_one_under_nsys():
    assert "without a server" in check_item(FakeItem(window(), fixtures=()), SETTINGS)
    refused = FakeItem(window(backend="nsys"), server(nsys=False))
    assert "not started under nsys" in check_item(refused, SETTINGS)
    assert check_item(refused, replace(SETTINGS, server="http://127.0.0.1:1")) is None
    assert check_item(FakeItem(window(backend="nsys")), SETTINGS) is None


@pytest.mark.parametrize(
    ("marks", "key"),
    [
        ([window()], "default+nsys"),
        ([window(backend="torch")], "default"),
        ([], "default"),
    ],
)
def test_a_backend_that_is_configured_needs_a_server_under_nsys_too(marks, key):
    settings = replace(SETTINGS, window={"backend": "nsys"})
    assert server_spec(FakeItem(*marks), settings).key == key
    assert check_item(FakeItem(*marks), settings) is None


def test_all_problems_of_a_module_are_told_in_one_text(monkeypatch):
    monkeypatch.setattr(pytest, "Item", FakeItem)
    nodes = [
        FakeItem(window(step=3), name="test_a"),
        FakeItem(window(num_steps=3), name="test_b"),
        FakeItem(server("none"), name="test_c"),
        object(),
    ]
    text = collection_problems(nodes, SETTINGS)
    assert [name for name in ("test_a", "test_b", "test_c") if name in text] == ["test_a", "test_c"]
    assert collection_problems(nodes[1:2], SETTINGS) == ""


def test_the_closest_window_marker_wins_whole():
    item = FakeItem(window("near", num_steps=3), window("far", duration=2.0, slowdown=1.5))
    spec = marked_window(item, SETTINGS)
    assert (spec.name, spec.num_steps, spec.duration) == ("near", 3, None)
    assert [limit.limit for limit in spec.thresholds] == [1.05]
    assert marked_window(FakeItem(), SETTINGS) is None


def test_a_window_at_a_trigger_has_as_many_steps_or_seconds_as_its_ranks_can_run():
    load, kernels = ImbalanceOnset(), KernelImbalance()
    by_load = marked_window(FakeItem(window("w", trigger=load)), SETTINGS)
    assert (by_load.num_steps, by_load.duration) == (None, 2.0)  # a starved rank runs no steps
    by_kernels = marked_window(FakeItem(window("w", trigger=kernels)), SETTINGS)
    assert (by_kernels.num_steps, by_kernels.duration) == (100, None)


def test_who_is_concerned():
    assert concerns(FakeItem(fixtures=("profile_window", "sglang_server")))
    assert concerns(FakeItem(server("moe"), fixtures=()))
    assert not concerns(FakeItem(fixtures=("tmp_path",)))


def test_every_fixture_of_the_plugin_takes_the_server_by_which_tests_are_recognised(request):
    manager = request.session._fixturemanager
    for name in ("bench_serving", "profile_window", "load_watch"):
        (fixture,) = manager.getfixturedefs(name, request.node)
        assert fixture.func.__module__ == "pytest_sglprof._plugin.hooks"
        assert "sglang_server" in fixture.argnames


def test_tests_of_one_server_move_together_and_the_others_stay():
    names = ["a1", "other1", "b1", "a2", "other2", "b2", "a3"]
    items = {name: FakeItem(name=name) for name in names}
    servers = {items[n]: ServerSpec(n[0]) for n in names if not n.startswith("other")}
    ordered = sort_by_server(list(items.values()), servers)
    assert [item.name for item in ordered] == ["a1", "other1", "a2", "a3", "other2", "b1", "b2"]
    assert sort_by_server(list(items.values()), {}) == list(items.values())


def test_an_unknown_server_is_an_error_of_settings():
    with pytest.raises(SettingsError, match=r'"none"\): there is no such server'):
        server_spec(FakeItem(server("none")), SETTINGS)
