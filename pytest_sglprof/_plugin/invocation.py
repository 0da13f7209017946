"""What pytest was called with: options that lack `--sglprof`, and a value taken for a test.

Imported in runs without `--sglprof`, too, so it imports nothing heavy.
"""

from __future__ import annotations

import itertools
import os
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from pytest_sglprof._config.options import OPTIONS
from pytest_sglprof._errors import SettingsError

OFF = "needs --sglprof: it starts a server and opens profile windows"
OF_PYTEST = tuple(option for option in OPTIONS if option.pytest and option.name != "enabled")


def refuse_options_alone(config: pytest.Config) -> None:
    """Raises `UsageError` for our options on a command line without `--sglprof`."""
    if flags := _typed_flags(config):
        error = SettingsError(
            f"{flags[0]} is given without --sglprof, so that every test that needs a server would "
            "be skipped",
            expected="--sglprof as well, or SGLPROF=1 in the environment",
            hint=f"add --sglprof, or leave {' and '.join(flags)} out",
        )
        raise pytest.UsageError(str(error))


def why_off(config: pytest.Config) -> str:
    """The reason of skipped tests; names our options that addopts or the environment set."""
    flags = _typed_flags(config)
    given = [
        f"{option.pytest_flag} in addopts"
        for option in OF_PYTEST
        if config.getoption(option.dest) is not None and option.pytest_flag not in flags
    ]
    given += [option.env for option in OF_PYTEST if os.environ.get(option.env)]
    return f"{OFF} ({', '.join(given)} alone does not switch it on)" if given else OFF


def _typed_flags(config: pytest.Config) -> list[str]:
    names = (str(word).partition("=")[0] for word in config.invocation_params.args)
    return list(dict.fromkeys(name for name in names if name.startswith("--sglprof-")))


def root_of_tests(config: pytest.Config) -> Path:
    """pytest's rootdir; where the value of an option moved it, what it is without that."""
    return _root_without_values(config) if misread_value(config) else config.rootpath


def misread_value(config: pytest.Config) -> str | None:
    """The option, written `--x=VALUE`, whose value pytest took for a test; None if there is none.

    Before plugins are loaded pytest knows no option of theirs: an existing path that is a word of
    its own counts as one of the tests whose common folder becomes the rootdir.
    """
    if config.getoption("rootdir", None) or config.getoption("inifilename", None):
        return None
    root, proper = config.rootpath, _root_without_values(config)
    is_above = root in proper.parents
    if root == proper or (is_above and (config.inipath or (root / "setup.py").is_file())):
        return None
    for flag, value in _values_apart(config):
        place = Path(os.path.normpath(config.invocation_params.dir / value))
        if place.exists() and (root == place or root in place.parents):
            return f"{flag}={value}"
    return None


def rootdir_warning(config: pytest.Config) -> str | None:
    """A line of the header where `misread_value` moved the rootdir, else None."""
    written = misread_value(config)
    if written is None:
        return None
    return (
        f"sglprof: rootdir is {config.rootpath}, since pytest takes the word after an option for a "
        f"test: write {written}"
    )


def base_of_names(config: pytest.Config, config_file: Path | None) -> Path:
    """The folder to which the names of tests are relative in all that is recorded.

    Windows are paired between runs by these names, so they must not depend on which tests are
    given: it is the folder of pytest's ini file, else of our configuration file.
    """
    if config.inipath is not None and misread_value(config) is None:
        return config.inipath.parent
    return Path(os.path.normpath(config_file)).parent if config_file else root_of_tests(config)


def recorded_name(item: pytest.Item, nodeid: str, base: Path) -> str:
    """`nodeid` with its path relative to `base` instead of to the rootdir."""
    if base == item.config.rootpath:
        return nodeid
    path = Path(os.path.relpath(item.path, base)).as_posix()
    return "::".join([path, *nodeid.split("::")[1:]])


def _values_apart(config: pytest.Config) -> Iterator[tuple[str, str]]:
    """Our options whose value is the next word."""
    words = [*shlex.split(os.environ.get("PYTEST_ADDOPTS", ""))]
    words += map(str, config.invocation_params.args)
    flags = {option.pytest_flag for option in OF_PYTEST if option.kind != "flag"}
    for word, following in itertools.pairwise(words):
        if word in flags:
            yield word, following


def _root_without_values(config: pytest.Config) -> Path:
    """The common folder of the given tests and the working folder, as pytest takes it."""
    here = config.invocation_params.dir
    tests = (here / argument.split("::")[0] for argument in config.args)
    places = [here, *(test if test.is_dir() else test.parent for test in tests if test.exists())]
    return Path(os.path.commonpath([os.path.normpath(place) for place in places]))
