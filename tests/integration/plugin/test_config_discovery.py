"""Which sglprof.toml is taken: the nearest one above, up to the repository's root."""

from __future__ import annotations

import pytest

from pytest_sglprof._config.load import find_config


@pytest.fixture
def project(tmp_path):
    """root/{sglprof.toml, one/{sglprof.toml, test_a.py, deep/test_b.py}, two/test_c.py}"""
    root = tmp_path / "root"
    for path in ("one/test_a.py", "one/deep/test_b.py", "two/test_c.py"):
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).touch()
    (root / "sglprof.toml").touch()
    (root / "one" / "sglprof.toml").touch()
    return root


@pytest.mark.parametrize(
    ("tests", "found"),
    [
        (["one/test_a.py"], "one/sglprof.toml"),
        (["one/deep"], "one/sglprof.toml"),
        (["one/test_a.py", "one/deep/test_b.py"], "one/sglprof.toml"),
        (["one/test_a.py", "two/test_c.py"], "sglprof.toml"),
        (["two"], "sglprof.toml"),
        ([], "sglprof.toml"),
    ],
)
def test_nearest_file_above_the_tests(project, tests, found):
    assert find_config([project / test for test in tests], project) == project / found


def test_nothing_beyond_rootdir(project):
    (project.parent / "sglprof.toml").touch()
    (project / "sglprof.toml").unlink()
    assert find_config([project / "two"], project) is None


def test_tests_outside_rootdir_are_looked_up_in_rootdir(project, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    assert find_config([tmp_path / "elsewhere"], project) == project / "sglprof.toml"


def test_pyproject_is_the_last_resort(project):
    (project / "sglprof.toml").unlink()
    pyproject = project / "pyproject.toml"
    pyproject.write_text("[tool.other]\n")
    assert find_config([project / "two"], project) is None
    pyproject.write_text("[tool.sglprof]\n")
    assert find_config([project / "two"], project) == pyproject
    assert find_config([project / "one"], project) == project / "one" / "sglprof.toml"


@pytest.mark.parametrize("mark", [".git", ".hg"])
def test_up_to_the_root_of_the_repository_and_no_further(project, mark):
    (project / "sglprof.toml").unlink()
    (project.parent / "sglprof.toml").touch()
    (project / mark).mkdir()
    assert find_config([project / "two"], project / "two") is None
    (project / "sglprof.toml").touch()
    assert find_config([project / "two"], project / "two") == project / "sglprof.toml"
    assert find_config([], project / "one" / "deep") == project / "one" / "sglprof.toml"


def test_the_nearest_folder_wins_whichever_file_it_has(project):
    pyproject = project / "two" / "pyproject.toml"
    pyproject.write_text("[tool.sglprof]\n")
    assert find_config([project / "two"], project) == pyproject
