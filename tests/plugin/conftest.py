"""A place for projects that several tests of a module look at."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from .project import SERVERS, Project

MakeProject = Callable[..., Project]


@pytest.fixture(scope="module")
def make_project(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MakeProject]:
    """Writes a project; when the module is over, nothing of it may be left."""
    projects = []

    def make(tests: str, config: str = SERVERS, *, folder: Path | None = None) -> Project:
        place = folder or tmp_path_factory.mktemp("project")
        project = Project(place, tests, config)
        projects.append(project)
        return project

    yield make
    left = {str(project.folder): project.left_over(within=20.0) for project in projects}
    for project in projects:
        for process in project.family():
            process.kill()
    assert not any(left.values()), left
