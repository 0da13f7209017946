"""docs/api.md against the code: signatures, what they return, and that nothing is left out."""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import pytest_sglprof
from ci.api import OF_FIXTURES
from pytest_sglprof._plugin import hooks
from pytest_sglprof._run.shapes import ShapeResult

DOCUMENTED: dict[str, Callable[..., Any]] = {
    "bench_serving": pytest_sglprof.BenchServing.__call__,
    "bench_serving.running": pytest_sglprof.BenchServing.running,
    "profile_window": pytest_sglprof.ProfileWindow.__call__,
    "profile_shapes": pytest_sglprof.ProfileShapes.__call__,
    "window.open": pytest_sglprof.Window.open,
    "window.wait": pytest_sglprof.Window.wait,
    "window.close": pytest_sglprof.Window.close,
    "window.check": pytest_sglprof.Window.check,
}


@pytest.fixture(scope="module")
def text(project_root: Path) -> str:
    return (project_root / "docs" / "api.md").read_text(encoding="utf-8")


def signature(name: str, value: Callable[..., Any]) -> str:
    found = inspect.signature(value)
    parameters = [
        each.replace(annotation=inspect.Parameter.empty)
        for each in list(found.parameters.values())[1:]
    ]
    bare = found.replace(parameters=parameters, return_annotation=inspect.Signature.empty)
    return f"{name}{bare} -> {found.return_annotation}"


def test_the_signatures_are_those_of_the_code(text: str) -> None:
    lines = re.findall(r"^([\w.]+\(.*\) -> .+)$", text, re.M)
    assert sorted(lines) == sorted(signature(name, value) for name, value in DOCUMENTED.items())


def test_every_fixture_has_its_row(text: str) -> None:
    fixtures = [
        value.name or name
        for name, value in vars(hooks).items()
        if type(value).__name__ == "FixtureFunctionDefinition" and not name.startswith("_")
    ]
    rows = re.findall(r"^\| `(\w+)` \| `(\w+)` \|", text, re.M)
    returned = {name: getattr(hooks, name)._get_wrapped_function() for name in fixtures}
    for name, kind in rows:
        assert kind in str(inspect.signature(returned[name]).return_annotation), name
    assert sorted(name for name, _ in rows) == sorted(fixtures)


def test_what_is_promised_of_their_values_is_described(text: str) -> None:
    prose = re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S)
    words = set(re.findall(r"\w+", " ".join(re.findall(r"`([^`]+)`", prose))))
    for kind, members in OF_FIXTURES.items():
        missing = {member for member in members if not member.startswith("_")} - words
        assert not missing, (kind, missing)
    for result in (pytest_sglprof.LoadResult, ShapeResult):
        missing = {field.name for field in dataclasses.fields(result)} - words
        assert not missing, (result, missing)
