"""What is released: its version and licences, and pages that work outside of the repository."""

from __future__ import annotations

import hashlib
import re
import sys
from importlib import metadata
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

import pytest_sglprof

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

LINK = re.compile(r"\]\(([^)\s]+)\)|(?:href|src)=[\"']([^\"']+)")


def read_toml(path: Path) -> dict[str, Any]:
    return tomllib.loads(path.read_text())


@pytest.fixture(scope="module")
def project(project_root: Path) -> dict[str, Any]:
    """The table `[project]` of pyproject.toml."""
    table: dict[str, Any] = read_toml(project_root / "pyproject.toml")["project"]
    return table


def test_the_version_stands_in_one_place(project: dict[str, Any]) -> None:
    assert project["dynamic"] == ["version"]
    assert metadata.version("pytest-sglprof") == pytest_sglprof.__version__


@pytest.mark.parametrize("page", ["README.md", "SECURITY.md"])
def test_links_are_absolute_and_name_files_of_the_repository(
    project: dict[str, Any], project_root: Path, page: str
) -> None:
    links = [a or b for a, b in LINK.findall((project_root / page).read_text())]
    assert links
    assert [link for link in links if urlsplit(link).scheme != "https"] == []
    files = re.compile(re.escape(project["urls"]["Source"]) + r"/(?:blob|raw|tree)/main/([^#]+)")
    named = [match[1] for link in links if (match := files.match(link))]
    # The package may be an installed one.
    roots = (project_root, Path(pytest_sglprof.__file__).parents[1])
    assert [name for name in named if not any((root / name).exists() for root in roots)] == []


def test_every_address_of_the_project_begins_alike(project: dict[str, Any]) -> None:
    source = project["urls"]["Source"]
    assert [url for url in project["urls"].values() if not url.startswith(source)] == []
    assert {"Documentation", "Changelog", "Issues"} <= project["urls"].keys()


def test_vendored_files_are_as_listed_and_their_licences_are_ours_too(
    project: dict[str, Any], project_root: Path
) -> None:
    package = Path(pytest_sglprof.__file__).parent
    listed: set[Path] = set()
    licences = {"Apache-2.0"}
    for table in package.rglob("vendored.toml"):
        for entry in read_toml(table)["package"]:
            files = {table.parent / name: digest for name, digest in entry["sha256"].items()}
            assert {file: hashlib.sha256(file.read_bytes()).hexdigest() for file in files} == files
            assert f"v{entry['version']}" in "".join(file.read_text()[:200] for file in files)
            licence = table.parent / entry["license_file"]
            assert licence in files
            assert f"{package.name}/{licence.relative_to(package)}" in project["license-files"]
            licences.add(entry["license"])
            listed |= files.keys()
    assert set(package.rglob("*.min.*")) <= listed
    assert set(project["license"].split(" AND ")) == licences
    assert [f for f in project["license-files"] if "/" not in f] == ["LICENSE"]
    assert (project_root / "LICENSE").is_file()
