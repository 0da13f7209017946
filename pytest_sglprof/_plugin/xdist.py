"""What the plugin does under pytest-xdist, without importing it.

Tests are grouped by server only to save server starts. Correctness rests on the leases of
servers, GPUs and windows.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from pytest_sglprof._config.model import ServerSpec


GROUPS = "sglprof_groups"  # in the input of a worker


def is_worker(config: pytest.Config) -> bool:
    """True in a worker process of xdist."""
    return hasattr(config, "workerinput")


def is_distributed(config: pytest.Config) -> bool:
    """True in a controller that hands its tests to workers."""
    return not is_worker(config) and bool(config.getoption("numprocesses", None))


def worker_name(config: pytest.Config) -> str:
    """The name of a worker, such as "gw0"; "" in any other process."""
    workerinput: dict[str, Any] = getattr(config, "workerinput", {})
    return str(workerinput.get("workerid", ""))


def prefer_loadgroup(config: pytest.Config) -> None:
    """Makes loadgroup the mode of `-n` without `--dist`: tests of a server go to one worker."""
    if is_worker(config) or config.getoption("numprocesses", None) is None:
        return
    if config.option.dist == "no":
        config.option.dist = "loadgroup"


def take_mode(config: pytest.Config) -> None:
    """In a worker: groups tests if the controller does, which only its command line says."""
    if getattr(config, "workerinput", {}).get(GROUPS):
        config.option.loadgroup = True


def mode_warning(config: pytest.Config) -> str | None:
    """A warning if the mode distributes the tests of one server over several workers, or None."""
    if not is_distributed(config):
        return None
    mode = config.getoption("dist", "no")
    if mode in ("loadgroup", "no"):
        return None
    return (
        f"sglprof: --dist={mode} may give tests of one server to several workers, and each "
        "starts its own; --dist=loadgroup keeps them together"
    )


def add_group(item: pytest.Item, server: ServerSpec) -> None:
    """Puts a test into the group of its server, unless it has a group."""
    if item.get_closest_marker("xdist_group") is None:
        item.add_marker(pytest.mark.xdist_group(name=f"sglprof-{server.key}"))


@contextlib.contextmanager
def grouped_ids(items: Sequence[pytest.Item]) -> Iterator[None]:
    """The node ids name the groups while xdist sends them, and are plain again in reports.

    xdist 3.8 writes the groups where pytest 9.2 does not read them (pytest-xdist#1386).
    """
    nodes: list[Any] = [item for item in items if hasattr(item, "_nodeid")]
    ids = [(getattr(node, "_id", None), node._nodeid) for node in nodes]
    for node, (structured, given) in zip(nodes, ids, strict=True):
        if structured is not None and given != node.nodeid:
            node._id = type(structured).parse(given)
    try:
        yield
    finally:
        for node, (structured, given) in zip(nodes, ids, strict=True):
            node._nodeid = plain_nodeid(given)
            if structured is not None:
                node._id = structured


def plain_nodeid(nodeid: str) -> str:
    """The node id without the `@group` that xdist appends in loadgroup mode."""
    head, at, group = nodeid.rpartition("@")
    return head if at and "::" in head and "]" not in group else nodeid
