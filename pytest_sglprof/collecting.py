"""Collection: mistakes of a module are told at once, and tests of one server stay together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from pytest_sglprof.markers import ServerKey, check_item, concerns
from pytest_sglprof.settings import Settings


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
    items: Sequence[pytest.Item], keys: Mapping[pytest.Item, ServerKey]
) -> list[pytest.Item]:
    """Orders the tests that use a server by it, stably; all other tests keep their places."""
    order: dict[ServerKey, int] = {}
    for item in items:
        if item in keys:
            order.setdefault(keys[item], len(order))
    ours = iter(
        sorted((item for item in items if item in keys), key=lambda item: order[keys[item]])
    )
    return [next(ours) if item in keys else item for item in items]
