"""A place for projects that several tests of a module look at."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.support.project import SERVERS, Outcome, Project

MakeProject = Callable[..., Project]
OutcomeOf = Callable[[str], Outcome]
RunProjects = Callable[..., OutcomeOf]


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


@pytest.fixture(scope="module")
def run_projects(make_project: MakeProject) -> Iterator[RunProjects]:
    """Starts a project of each text, two at a time: most of a run is a load, which sleeps.

    Returns a function that waits for the outcome of one of them by its name.
    """
    with ThreadPoolExecutor(2) as pool:

        def run(texts: Mapping[str, str], *options: str, **more: str) -> OutcomeOf:
            runs = {
                name: pool.submit(make_project(text, **more).run, *options)
                for name, text in texts.items()
            }
            return lambda name: runs[name].result()

        yield run


RunHere = Callable[..., pytest.RunResult]


@pytest.fixture(scope="session")
def loaded() -> None:
    """`pytester` unloads what was loaded after it, and numpy cannot be loaded twice."""
    for name in ("pandas", "httpx", "jsonschema", "pytest_sglprof._plugin.session"):
        importlib.import_module(name)


@pytest.fixture
def clean_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No setting of whoever runs these tests reaches the run that a test starts."""
    for name in [name for name in os.environ if name.startswith("SGLPROF")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("SGLPROF_LEASE_DIR", str(tmp_path / "leases"))


@pytest.fixture
def run_here(
    pytester: pytest.Pytester, loaded: None, clean_environment: None, secrets_end_here: None
) -> RunHere:
    """Runs pytest in this process: right for all that neither ends it nor looks at imports."""

    def run(*options: str, config: str | None) -> pytest.RunResult:
        if config is not None:
            (pytester.path / "sglprof.toml").write_text(config)
        return pytester.runpytest_inprocess("-W", "error", "--strict-markers", "-rA", *options)

    return run
