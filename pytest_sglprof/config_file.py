"""`sglprof.toml` (or `[tool.sglprof]`): found, parsed, checked against its JSON Schema."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytest_sglprof.errors import SettingsError
from pytest_sglprof.metrics import METRICS
from pytest_sglprof.spelling import did_you_mean

if TYPE_CHECKING:
    from jsonschema.exceptions import ValidationError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

SCHEMA = Path(__file__).parent / "schemas" / "config.schema.json"


def find_config(tests: Sequence[Path], rootdir: Path) -> Path | None:
    """The nearest `sglprof.toml` from the common folder of `tests` up to `rootdir`.

    Falls back to rootdir's `pyproject.toml` where that has a `[tool.sglprof]` table.
    """
    for folder in _upwards(_common_folder(tests, rootdir), rootdir):
        candidate = folder / "sglprof.toml"
        if candidate.is_file():
            return candidate
    pyproject = rootdir / "pyproject.toml"
    if pyproject.is_file() and "sglprof" in _parse(pyproject).get("tool", {}):
        return pyproject
    return None


def load_config(path: Path) -> dict[str, Any]:
    """The document of `path`, valid against the schema; `SettingsError` names line or key."""
    document = _parse(path)
    if path.name == "pyproject.toml":
        document = document.get("tool", {}).get("sglprof", {})
    problems = _violations(document)
    if problems:
        raise SettingsError(
            f"{path} is not a valid configuration:\n    " + "\n    ".join(problems),
            expected="the keys and types of docs/configuration.md",
            hint="correct the keys named above",
        )
    return document


def _common_folder(tests: Sequence[Path], rootdir: Path) -> Path:
    folders = [path if path.is_dir() else path.parent for path in tests]
    if not folders:
        return rootdir
    common = folders[0]
    for folder in folders[1:]:
        while common != common.parent and common != folder and common not in folder.parents:
            common = common.parent
    return common


def _upwards(folder: Path, rootdir: Path) -> list[Path]:
    if rootdir != folder and rootdir not in folder.parents:
        return [rootdir]
    chain = [folder, *folder.parents]
    return chain[: chain.index(rootdir) + 1]


def _parse(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise SettingsError(
            f"the configuration file {path} does not exist",
            expected="a TOML file",
            hint="correct --sglprof-config, or leave it out",
        ) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SettingsError(
            f"{path} is not valid TOML: {error}",
            expected="TOML 1.0 in UTF-8",
            hint="correct that line",
        ) from None


def _violations(document: Mapping[str, Any]) -> list[str]:
    import json

    import jsonschema

    schema = json.loads(SCHEMA.read_text(encoding="utf-8"))
    schema["$defs"]["threshold"]["properties"]["metric"]["enum"] = list(METRICS)
    validator = jsonschema.Draft202012Validator(
        schema,
        format_checker=jsonschema.FormatChecker(formats=("regex",)),
    )
    errors = sorted(validator.iter_errors(document), key=lambda error: list(map(str, error.path)))
    return [f"{_where(error.absolute_path)}: {_violation(error)}" for error in errors]


def _violation(error: ValidationError) -> str:
    """What jsonschema says of it, and the nearest name where one was mistyped."""
    given: Any = error.instance
    schema: Any = error.schema
    meant = ""
    if error.validator == "additionalProperties":
        known = schema.get("properties", {})
        meant = did_you_mean((key for key in given if key not in known), known)
    elif error.validator == "enum":
        meant = did_you_mean([given], schema["enum"])
    elif error.validator == "format":
        return f"{given!r} is no regular expression: {error.cause}"
    return f"{error.message}: {meant}" if meant else error.message


def _where(path: Any) -> str:
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else str(part)
    return text or "top level"
