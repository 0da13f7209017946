"""Everything public stands in tests/data/api.txt, and says that it belongs to the package."""

from __future__ import annotations

import importlib.util
import pkgutil
from pathlib import Path

import pytest

import pytest_sglprof


def test_what_is_public_is_what_the_file_says(project_root: Path) -> None:
    spec = importlib.util.spec_from_file_location("api", project_root / "ci" / "api.py")
    assert spec is not None
    assert spec.loader is not None
    api = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(api)
    listed = (project_root / "tests/data/api.txt").read_text(encoding="utf-8")
    assert api.describe() == listed, "run `python -m ci.api`, and review what it changed"


@pytest.mark.parametrize("name", [n for n in pytest_sglprof.__all__ if n[0].isupper()])
def test_a_public_class_names_the_package_as_its_module(name: str) -> None:
    assert getattr(pytest_sglprof, name).__module__ == "pytest_sglprof"


def test_all_rooms_but_the_stand_in_are_private() -> None:
    names = {module.name for module in pkgutil.iter_modules(pytest_sglprof.__path__)}
    assert {name for name in names if not name.startswith("_")} == {"standin"}


def test_the_fixtures_types_can_be_annotated() -> None:
    from pytest_sglprof import BenchServing, LoadWatch, ProfileWindow, Server, Window

    assert all(isinstance(each, type) for each in (BenchServing, LoadWatch, ProfileWindow, Server))
    assert isinstance(Window, type)
