"""What is set for xdist: its mode, its groups, and who is who."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from pytest_sglprof._config.model import ServerSpec
from pytest_sglprof._plugin.xdist import (
    add_group,
    is_distributed,
    is_worker,
    mode_warning,
    prefer_loadgroup,
    worker_name,
)


class FakeConfig:
    """A config with xdist's options, or without xdist; a worker's has `workerinput`."""

    def __init__(self, worker: str = "", **options):
        self.option = SimpleNamespace(**options)
        if worker:
            self.workerinput = {"workerid": worker}

    def getoption(self, name, default=None):
        return getattr(self.option, name, default)


@pytest.mark.parametrize(
    ("options", "mode"),
    [
        ({"numprocesses": 2, "dist": "no"}, "loadgroup"),
        ({"numprocesses": 0, "dist": "no"}, "loadgroup"),
        ({"numprocesses": 2, "dist": "loadfile"}, "loadfile"),
        ({"numprocesses": None, "dist": "no"}, "no"),
        ({"worker": "gw0", "numprocesses": 2, "dist": "no"}, "no"),
    ],
)
def test_n_without_dist_means_loadgroup(options, mode):
    config = FakeConfig(**options)
    prefer_loadgroup(config)
    assert config.option.dist == mode


def test_a_pytest_without_xdist_is_left_alone():
    config = FakeConfig()
    prefer_loadgroup(config)
    assert (is_worker(config), is_distributed(config), worker_name(config)) == (False, False, "")
    assert mode_warning(config) is None


@pytest.mark.parametrize(
    ("mode", "warned"), [("loadgroup", False), ("no", False), ("load", True), ("loadscope", True)]
)
def test_other_modes_are_warned_of(mode, warned):
    text = mode_warning(FakeConfig(numprocesses=2, dist=mode))
    assert (text is not None) == warned
    assert text is None or f"--dist={mode}" in text


def test_a_worker_knows_its_name_and_distributes_nothing():
    config = FakeConfig("gw3", numprocesses=2)
    assert (is_worker(config), is_distributed(config), worker_name(config)) == (True, False, "gw3")


class FakeItem:
    def __init__(self, *marks):
        self.marks = [mark.mark for mark in marks]

    def get_closest_marker(self, name):
        return next((mark for mark in reversed(self.marks) if mark.name == name), None)

    def add_marker(self, mark):
        self.marks.append(mark.mark)


def test_tests_of_one_server_form_a_group_unless_the_user_made_one():
    ours, theirs = FakeItem(), FakeItem(pytest.mark.xdist_group("mine"))
    for item in (ours, theirs):
        add_group(item, ServerSpec("moe", nsys=True))
    assert ours.get_closest_marker("xdist_group").kwargs == {"name": "sglprof-moe+nsys"}
    assert [mark.args for mark in theirs.marks] == [("mine",)]
