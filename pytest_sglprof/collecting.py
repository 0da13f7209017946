"""Collection: mistakes of a module are told at once, and tests of one server stay together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from pytest_sglprof.markers import check_item, concerns
from pytest_sglprof.settings import Settings
from pytest_sglprof.values import ServerSpec


def collection_problems(nodes: Sequence[Any], settings: Settings) -> str:
    """All mistakes in the markers of the tests among `nodes`; "" when there are none."""
    problems = []
    for node in nodes:
        if isinstance(node, pytest.Item) and concerns(node):
            problem = check_item(node, settings)
            if problem is not None:
                problems.append(problem)
    return "\n".join(problems)


def sort_by_server(
    items: Sequence[pytest.Item], servers: Mapping[pytest.Item, ServerSpec]
) -> list[pytest.Item]:
    """Orders the tests that use a server by it, stably; all other tests keep their places."""
    order: dict[str, int] = {}
    for item in items:
        if item in servers:
            order.setdefault(servers[item].key, len(order))
    sorted_items = iter(
        sorted((item for item in items if item in servers), key=lambda i: order[servers[i].key])
    )
    return [next(sorted_items) if item in servers else item for item in items]
