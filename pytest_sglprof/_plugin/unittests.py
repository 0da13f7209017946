"""Tests that are methods of a `unittest.TestCase`.

pytest neither parametrises these nor gives them arguments, and keeps what they raise to itself
until it makes the report.
"""

from __future__ import annotations

import inspect
import types
import unittest
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from pytest_sglprof._errors import note
from pytest_sglprof._plugin.markers import (
    SERVER_FIXTURE,
    SERVER_MARK,
    TEST_CASE_FIXTURE,
    is_test_case,
)

ATTRIBUTES = ("sglang_server", "bench_serving", "profile_window")
BEFORE_EACH = ("setUp", "asyncSetUp")


def offer_attributes(node: Any) -> None:
    """Lets the methods of a class with a server have `ATTRIBUTES`."""
    if is_test_case(node) and node.get_closest_marker(SERVER_MARK) is not None:
        node.add_marker(pytest.mark.usefixtures(TEST_CASE_FIXTURE))


def parametrise(item: pytest.Item, generate: Callable[[pytest.Metafunc], None]) -> None:
    """Passes the server to a method as pytest passes it to a function. generate: the hook."""
    method: Any = item  # pytest has no public way to do this
    if not is_test_case(item) or SERVER_FIXTURE not in method.fixturenames:
        return
    metafunc = pytest.Metafunc(
        method,
        method._fixtureinfo,
        item.config,
        cls=method.cls,
        module=method.module,
        _ispytest=True,
    )
    generate(metafunc)
    (method.callspec,) = metafunc._calls


def drives_load(item: pytest.Item) -> bool:
    """Whether a test uses `bench_serving`: it asks for the fixture, or its code names it."""
    test: Any = item
    if "bench_serving" in getattr(item, "fixturenames", ()):
        return True
    return is_test_case(item) and "bench_serving" in _names_used(test.cls, test.obj)


def raise_what_it_raised(item: pytest.Item) -> None:
    """Raises the first exception of a method's body, which pytest kept for the report."""
    kept: list[pytest.ExceptionInfo[BaseException]] | None = getattr(item, "_excinfo", None)
    if kept:
        first = kept[0].value
        kept.clear()
        raise first


def explain_missing(error: AttributeError) -> None:
    """Says why a class has none of our attributes, as in `setUpClass`."""
    is_class = isinstance(error.obj, type) and issubclass(error.obj, unittest.TestCase)
    if error.name in ATTRIBUTES and is_class:
        note(
            error,
            f"pytest-sglprof sets {error.name} before each method, after setUpClass has run: "
            f"use self.{error.name} in setUp or in the test",
        )


def _names_used(cls: type, method: Any) -> set[str]:
    """The names in the code of a method, and of the functions that it names or that set it up."""
    names: set[str] = set()
    seen: set[Any] = set()
    left = [method, *(getattr(cls, name, None) for name in BEFORE_EACH)]
    while left:
        function = inspect.unwrap(getattr(each := left.pop(), "__func__", each))
        if isinstance(function, types.FunctionType) and function not in seen:
            seen.add(function)
            new = set(_names_in(function.__code__))
            names |= new
            left += [getattr(cls, name, function.__globals__.get(name)) for name in new]
    return names


def _names_in(code: types.CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _names_in(constant)
