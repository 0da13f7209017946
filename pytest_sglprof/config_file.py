"""`sglprof.toml` (or `[tool.sglprof]`): found, parsed, checked against its JSON Schema."""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator, Mapping, Sequence
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
    """The nearest `sglprof.toml`, or `pyproject.toml` with a `[tool.sglprof]` table.

    Looked for from the common folder of `tests` up to the root of the repository that
    `rootdir` is in; without a repository up to `rootdir`.
    """
    top = next((place for place in (rootdir, *rootdir.parents) if _is_repository(place)), rootdir)
    for folder in _upwards(_common_folder(tests, rootdir), top, otherwise=rootdir):
        candidate, pyproject = folder / "sglprof.toml", folder / "pyproject.toml"
        if candidate.is_file():
            return candidate
        if pyproject.is_file() and "sglprof" in _parse(_read(pyproject), pyproject).get("tool", {}):
            return pyproject
    return None


def load_config(path: Path) -> dict[str, Any]:
    """The document of `path`, valid against the schema; `SettingsError` names line and key."""
    text = _read(path)
    document = _parse(text, path)
    prefix: tuple[str, ...] = ()
    if path.name == "pyproject.toml":
        prefix = ("tool", "sglprof")
        document = document.get("tool", {}).get("sglprof", {})
    problems = []
    for error in _violations(document):
        line, column = position(text, (*prefix, *_place(error)))
        problems.append(f"line {line}, column {column}: {_described(error)}")
    _refuse(problems, f"{path} is not a valid configuration")
    return document


def with_assignments(
    document: Mapping[str, Any], assignments: Sequence[str], flag: str
) -> dict[str, Any]:
    """`document` with each `KEY=VALUE` set, and valid; `SettingsError` names `flag` otherwise.

    KEY is dotted. VALUE is TOML; what is not is taken as a string.
    """
    changed: dict[str, Any] = copy.deepcopy(dict(document))
    for assignment in assignments:
        key, equals, value = assignment.partition("=")
        *tables, last = key.strip().split(".")
        table: Any = changed
        for name in tables:
            table = table.setdefault(name, {}) if isinstance(table, dict) else None
        if not equals or not last or not isinstance(table, dict):
            raise SettingsError(
                f"{flag} {assignment}",
                expected="KEY=VALUE, a dotted key of sglprof.toml",
                hint=f"for example {flag} gate.min_steps=10",
            )
        table[last] = _toml_value(value.strip())
    if assignments:
        given = " ".join(f"{flag} {assignment}" for assignment in assignments)
        problems = [_described(error) for error in _violations(changed)]
        _refuse(problems, f"{given}: this is not a valid configuration")
    return changed


def position(text: str, keys: Sequence[str | int]) -> tuple[int, int]:
    """Line and column, from 1, of what `keys` lead to in a TOML text that is valid.

    Of what stands inside a value, such as an entry of an array, the place is that of the value.
    """
    here: list[str | int] = []  # of the table that a statement is in
    counts: dict[tuple[str | int, ...], int] = {}
    best = (0, 1, 1)  # how many keys agree, line, column
    for line, statement in _statements(text):
        header = statement.startswith("[")
        names = _names(tomllib.loads(statement))
        if statement.startswith("[["):
            count = counts[tuple(names)] = counts.get(tuple(names), -1) + 1
            here = [*names, count]
        elif header:
            here = [*names]
        place = here if header else [*here, *names]
        place = _with_counts(place, counts)
        agreeing = next(
            (at for at, pair in enumerate(zip(place, keys, strict=False)) if pair[0] != pair[1]),
            min(len(place), len(keys)),
        )
        if agreeing > best[0]:
            first = text.splitlines()[line - 1]
            best = (agreeing, line, len(first) - len(first.lstrip()) + 1)
    return best[1:]


def _statements(text: str) -> Iterator[tuple[int, str]]:
    """Each header and each assignment with the line that it begins in; values may have several."""
    begin, statement = 0, ""
    for number, line in enumerate(text.splitlines(), start=1):
        if not statement:
            begin = number
        statement += f"{line}\n"
        try:
            is_whole = tomllib.loads(statement)
        except tomllib.TOMLDecodeError:
            continue
        if is_whole:
            yield begin, statement.strip()
        statement = ""


def _names(table: Any) -> list[str | int]:
    """The keys of one statement: `{"a": {"b": 1}}` has a, b."""
    names: list[str | int] = []
    while isinstance(table, dict) and len(table) == 1:
        ((name, table),) = table.items()
        names.append(name)
        if isinstance(table, list):
            break
    return names


def _with_counts(
    place: Sequence[str | int], counts: Mapping[tuple[str | int, ...], int]
) -> list[str | int]:
    """`place` with the number of the entry behind each array of tables on its way."""
    numbered: list[str | int] = []
    for at, name in enumerate(place):
        numbered.append(name)
        follows = place[at + 1] if at + 1 < len(place) else None
        if tuple(numbered) in counts and isinstance(name, str) and not isinstance(follows, int):
            numbered.append(counts[tuple(numbered)])
    return numbered


def _toml_value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _refuse(problems: Sequence[str], what: str) -> None:
    if problems:
        raise SettingsError(
            f"{what}:\n    " + "\n    ".join(problems),
            expected="the keys and types of docs/configuration.md",
            hint="correct the keys named above",
        )


def _common_folder(tests: Sequence[Path], rootdir: Path) -> Path:
    folders = [path if path.is_dir() else path.parent for path in tests]
    if not folders:
        return rootdir
    common = folders[0]
    for folder in folders[1:]:
        while common != common.parent and common != folder and common not in folder.parents:
            common = common.parent
    return common


def _upwards(folder: Path, top: Path, *, otherwise: Path) -> list[Path]:
    """`folder` and what is above it, up to `top`; only `otherwise` where it is not below."""
    if top != folder and top not in folder.parents:
        return [otherwise]
    chain = [folder, *folder.parents]
    return chain[: chain.index(top) + 1]


def _is_repository(folder: Path) -> bool:
    return (folder / ".git").exists() or (folder / ".hg").is_dir()


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise SettingsError(
            f"the configuration file {path} does not exist",
            expected="a TOML file",
            hint="correct the path, or leave it out",
        ) from None
    except UnicodeDecodeError as error:
        raise _not_toml(path, error) from None


def _parse(text: str, path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise _not_toml(path, error) from None


def _not_toml(path: Path, error: ValueError) -> SettingsError:
    return SettingsError(
        f"{path} is not valid TOML: {error}",
        expected="TOML 1.0 in UTF-8",
        hint="correct that line",
    )


def _violations(document: Mapping[str, Any]) -> list[ValidationError]:
    import json

    import jsonschema

    schema = json.loads(SCHEMA.read_text(encoding="utf-8"))
    schema["$defs"]["threshold"]["properties"]["metric"]["enum"] = list(METRICS)
    validator = jsonschema.Draft202012Validator(
        schema,
        format_checker=jsonschema.FormatChecker(formats=("regex",)),
    )
    return sorted(validator.iter_errors(document), key=lambda error: list(map(str, error.path)))


def _place(error: ValidationError) -> list[str | int]:
    """The keys that lead to what is wrong: to an unknown key itself, not only to its table."""
    return [*error.absolute_path, *_unknown_keys(error)[:1]]


def _unknown_keys(error: ValidationError) -> list[str]:
    given: Any = error.instance
    schema: Any = error.schema
    if error.validator != "additionalProperties":
        return []
    return [key for key in given if key not in schema.get("properties", {})]


def _described(error: ValidationError) -> str:
    """Where it is, what jsonschema says, and the nearest name or all names that there are."""
    given: Any = error.instance
    schema: Any = error.schema
    text = error.message
    if unknown := _unknown_keys(error):
        known = schema.get("properties", {})
        text += f": {did_you_mean(unknown, known, 'expected one of ' + ', '.join(known))}"
    elif error.validator == "enum" and (meant := did_you_mean([given], schema["enum"])):
        text += f": {meant}"
    elif error.validator == "format":
        text = f"{given!r} is no regular expression: {error.cause}"
    return f"{_where(error.absolute_path)}: {text}"


def _where(path: Any) -> str:
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else str(part)
    return text or "top level"
