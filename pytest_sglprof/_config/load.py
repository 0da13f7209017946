"""Merge options, the environment and `sglprof.toml` into one frozen `Settings`.

Precedence: flag > `--set` > environment > configuration file (or what a run stored) > default.
"""

from __future__ import annotations

import copy
import math
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pytest_sglprof._config.model import CERTAIN, ServerSpec, Threshold
from pytest_sglprof._config.options import OPTIONS, Option, is_on
from pytest_sglprof._config.servers import check_servers, server_dir_pair, servers_from
from pytest_sglprof._config.thresholds import check_threshold, default_thresholds
from pytest_sglprof._config.windows import refuse_too_few_steps, window_spec
from pytest_sglprof._errors import SettingsError, did_you_mean, docs
from pytest_sglprof._limits import (
    NOT_PATTERN,
    UNDECODABLE,
    compiled,
    read_bytes,
    refuse_odd,
    why_undecodable,
)
from pytest_sglprof._metrics import METRICS, MIN_SHARE, MIN_STEPS
from pytest_sglprof._redact import redact_command, redact_text
from pytest_sglprof._trace.categories import CATEGORY_NAMES

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

if TYPE_CHECKING:
    from jsonschema.exceptions import ValidationError


@dataclass(frozen=True)
class Settings:
    """The settings of a run of pytest or of one command.

    A row of `OPTIONS` with a key is the field of its name. lock_clocks: MHz, 0: clocks are left
    alone. baselines: None without a folder. thresholds: those configured, else the default one.
    origins: where each field was set. stored: what a run keeps, so that commands read it alike.
    """

    output: Path
    keep: Literal["failed", "all", "none"] = "failed"
    runs: int = 10
    max_gib: float = 20.0
    python: str = ""
    nsys: str = ""
    executor: str = ""
    server: str = ""
    server_dir: tuple[str, str] | None = None
    server_ca: str = ""
    nsys_session: str = ""
    allow_inconclusive: bool = False
    repeat: int | Literal["certain"] = 1
    min_steps: int = MIN_STEPS
    min_share: float = MIN_SHARE
    servers: Mapping[str, ServerSpec] = field(default_factory=dict)
    window: Mapping[str, Any] = field(default_factory=dict)
    thresholds: tuple[Threshold, ...] = default_thresholds()
    categories: tuple[tuple[str, str], ...] = ()
    step_delimiter: str = ""
    lock_clocks: int = 0
    baselines: Path | None = None
    accept: Literal["", "new", "all"] = ""
    require_baseline: bool = False
    min_age_days: int = 0
    min_age_lives: int = 0
    confirm: int = 3
    fail_after: int = 1
    keep_lives: int = 20
    config_file: Path | None = None
    origins: Mapping[str, str] = field(default_factory=dict)
    stored: Mapping[str, Any] = field(default_factory=dict, repr=False)

    @property
    def category_names(self) -> tuple[str, ...]:
        """All categories that a kernel can have: the built-in ones and those of the user."""
        return (*CATEGORY_NAMES, *(name for name, _ in self.categories))

    def describe(self) -> list[str]:
        """One line a setting, `name = value  (origin)`, for `--sglprof-show-config`."""
        lines = []
        for item in fields(self):
            if item.name in ("origins", "servers", "stored", "thresholds", "window"):
                continue
            origin = self.origins.get(item.name, "default")
            lines.append(f"{item.name} = {getattr(self, item.name)}  ({origin})")
        lines += [f"threshold: {limit.describe()}  ({limit.origin})" for limit in self.thresholds]
        lines += [f"window.{name} = {value}  (config)" for name, value in self.window.items()]
        for name, spec in self.servers.items():
            args = " ".join(redact_command(spec.args))
            if spec.url:
                lines.append(f"server {name}: url={redact_text(spec.url)}")
                continue
            of = "".join(f" {role}={server}" for role, server in spec.members)
            lines.append(f"server {name}: kind={spec.kind} nsys={spec.nsys}{of} args={args}")
        return lines


def read_settings(
    command_line: Mapping[str, Any],
    environ: Mapping[str, str],
    *,
    start: Sequence[Path],
    rootdir: Path,
    invocation_dir: Path,
    of_pytest: bool,
    stored: tuple[Path, Mapping[str, Any]] | None = None,
    extra_servers: Mapping[str, ServerSpec] | None = None,
) -> Settings:
    """The settings of a run of pytest or of one command.

    command_line: values of the flags by option name, None for those that are not given. start,
    rootdir: where the configuration file is searched for, see `find_config`. stored: run.json of
    the run that is read, and the configuration in it, which replaces that of the file; only the
    tools of this machine still come from the file.
    """
    values, origins = resolve_options(command_line, environ, of_pytest=of_pytest)
    if "config" in values:
        path: Path | None = invocation_dir / values["config"]
    else:
        path = find_config(start, rootdir)
    document = load_config(path) if path is not None else {}
    if stored is not None and "config" not in values:
        path = stored[0]
        problems = [_described(error) for error in _violations(stored[1])] if stored[1] else []
        _refuse(problems[:_MOST_PROBLEMS], f"{path} holds no valid configuration")
        tools = {"tools": document["tools"]} if "tools" in document else {}
        document = {**tools, **stored[1]}
    return build_settings(
        values,
        origins,
        document,
        config_file=path,
        invocation_dir=invocation_dir,
        extra_servers=extra_servers,
    )


def resolve_options(
    command_line: Mapping[str, Any], environ: Mapping[str, str], *, of_pytest: bool = True
) -> tuple[dict[str, Any], dict[str, str]]:
    """Values and origins, by name, of the options on the command line or in the environment."""
    values: dict[str, Any] = {}
    origins: dict[str, str] = {}
    for option in OPTIONS:
        flag = option.pytest_flag if of_pytest else option.flag
        sources = (
            (flag, command_line.get(option.name)),
            (option.env, environ.get(option.env) or None),
        )
        for origin, raw in sources:
            if raw is None or raw == "":
                continue
            values[option.name] = _convert(option, raw, origin)
            origins[option.name] = origin
            break
    if of_pytest:  # a command names its server itself
        _refuse_contradictions(values)
    return values, origins


def build_settings(
    values: Mapping[str, Any],
    origins: Mapping[str, str],
    document: Mapping[str, Any],
    *,
    config_file: Path | None,
    invocation_dir: Path,
    extra_servers: Mapping[str, ServerSpec] | None = None,
) -> Settings:
    """Merges resolved options with a valid configuration document."""
    where = config_file.name if config_file else "default"
    document, effective_origins = _effective(values, origins, document, where)
    rows = {
        option.name: document[option.table][option.last_key]
        for option in OPTIONS
        if option.key and option.last_key in document.get(option.table, {})
    }
    base = config_file.parent if config_file else invocation_dir
    servers = {**servers_from(document, base), **(extra_servers or {})}
    if python := rows.get("python"):
        is_default = effective_origins["python"] == where  # weaker than `python` of a server
        servers = {
            name: replace(spec, python=((is_default or spec.members) and spec.python) or python)
            for name, spec in servers.items()
        }
    if folder := rows.get("baselines"):
        is_of_file = effective_origins["baselines"] == where
        rows["baselines"] = (base if is_of_file else invocation_dir) / folder
    if mhz := rows.get("lock_clocks"):
        servers = {name: replace(spec, lock_clocks=mhz) for name, spec in servers.items()}
    check_servers(servers)
    window = document.get("window", {})
    settings = Settings(
        **{**rows, "output": invocation_dir / rows.get("output", ".sglprof")},
        server=values.get("server", ""),
        accept=values.get("accept", ""),
        server_dir=server_dir_pair(values["server_dir"]) if "server_dir" in values else None,
        server_ca=values.get("server_ca", ""),
        nsys_session=values.get("nsys_session", ""),
        servers=servers,
        window={key: value for key, value in window.items() if key not in rows},
        thresholds=thresholds_from(document, effective_origins.get("thresholds", where)),
        categories=tuple((c["name"], c["pattern"]) for c in document.get("category", ())),
        config_file=config_file,
        origins=effective_origins,
        stored={name: document[name] for name in _STORED if name in document},
    )
    if settings.window:
        window_spec(settings, {}, origin=f"{where}: [window]")
    refuse_too_few_steps(settings.window.get("num_steps"), settings, f"{where}: [window]")
    if settings.accept and settings.baselines is None:
        raise SettingsError(
            f"{effective_origins['accept']}={settings.accept} without a folder of baselines",
            expected="a folder to accept server lives into",
            hint="add --sglprof-baselines=DIR, or [baseline] dir to sglprof.toml",
        )
    return settings


def _effective(
    values: Mapping[str, Any], origins: Mapping[str, str], document: Mapping[str, Any], where: str
) -> tuple[dict[str, Any], dict[str, str]]:
    """The document with all options and assignments in it, and the origin of each setting."""
    assignments = values.get("set", ())
    flag = origins.get("set", "")
    assigned = {assignment.partition("=")[0].strip() for assignment in assignments}
    document = with_assignments(document, assignments, flag)
    effective = {name: origin for name, origin in origins.items() if name not in _NO_SETTING}
    for option in OPTIONS:
        if not option.key:
            continue
        is_weaker = option.key in assigned and origins.get(option.name) == option.env
        if option.name in values and not is_weaker:
            document.setdefault(option.table, {})[option.last_key] = values[option.name]
        elif option.key in assigned:
            effective[option.name] = f"{flag} {option.key}"
        elif option.last_key in document.get(option.table, {}):
            effective[option.name] = where
    for table, name in (("threshold", "thresholds"), ("category", "categories")):
        if table in document:
            effective[name] = f"{flag} {table}" if table in assigned else where
    return document, effective


_STORED = ("gate", "trace", "category", "threshold")  # nothing of a server: it may hold secrets
_NO_SETTING = ("enabled", "config", "set", "show_config")


def thresholds_from(document: Mapping[str, Any], origin: str) -> tuple[Threshold, ...]:
    """The `[[threshold]]` tables, or `default_thresholds` if there are none."""
    categories = (*CATEGORY_NAMES, *(table["name"] for table in document.get("category", ())))
    configured = [
        check_threshold(
            Threshold(**table, origin=origin), categories, origin, f"threshold[{number}]."
        )
        for number, table in enumerate(document.get("threshold", ()))
    ]
    return tuple(configured) or default_thresholds()


def _convert(option: Option, raw: Any, origin: str) -> Any:
    if option.kind == "flag":
        if isinstance(raw, bool):
            return raw
        if is_on(raw):
            return True
        if str(raw).lower() in ("0", "false", "no", "off"):
            return False
        raise SettingsError(f"{origin} is {raw!r}", expected="true or false", hint="correct it")
    if option.kind == "list":
        return raw.splitlines() if isinstance(raw, str) else list(raw)
    if option.kind == "regex":
        return compiled(raw, f"{origin} {raw!r}").pattern
    if option.kind == "repeat":
        return CERTAIN if raw == CERTAIN else int(_number(option.kind, raw, origin))
    if option.kind in _NUMBERS:
        return _number(option.kind, raw, origin)
    if option.choices and raw not in option.choices:
        raise SettingsError(
            f"{origin} is {raw!r}",
            expected=" or ".join(option.choices),
            hint=did_you_mean([raw], option.choices, "correct it"),
        )
    return str(raw)


def _number(kind: str, raw: Any, origin: str) -> float:
    convert, is_allowed, expected = _NUMBERS[kind]
    try:
        number = convert(raw)
    except ValueError:
        number = None
    if number is None or not is_allowed(number):
        raise SettingsError(f"{origin} is {raw!r}", expected=expected, hint="correct it")
    return number


_NUMBERS: dict[str, tuple[Callable[[Any], float], Callable[[float], bool], str]] = {
    "count": (int, lambda number: number >= 0, "a whole number, 0 or more"),
    "positive": (int, lambda number: number >= 1, "a whole number, 1 or more"),
    "confirm": (int, lambda number: 0 <= number <= 3, "a whole number, 0 to 3"),
    "repeat": (int, lambda number: number >= 1, 'a whole number, 1 or more, or "certain"'),
    "size": (float, lambda number: 0 < number < math.inf, "a number above 0"),
    "share": (float, lambda number: 0 <= number <= 1, "a share from 0 to 1"),
}


def _refuse_contradictions(values: Mapping[str, Any]) -> None:
    for name in ("server_dir", "server_ca", "nsys_session"):
        if values.get(name) and not values.get("server"):
            flag = f"--sglprof-{name.replace('_', '-')}"
            raise SettingsError(
                f"{flag} is given without --sglprof-server",
                expected="both: it describes a running server",
                hint=f"add --sglprof-server=URL, or leave {flag} out",
            )


# `sglprof.toml`, or `[tool.sglprof]` of pyproject.toml: search, parse, check against the schema.

_MOST_PROBLEMS = 20  # that are named, each with its place
SCHEMA = Path(__file__).parents[1] / "schemas" / "config.schema.json"


def find_config(tests: Sequence[Path], rootdir: Path) -> Path | None:
    """The nearest `sglprof.toml`, or `pyproject.toml` with a `[tool.sglprof]` table.

    The search goes from the common folder of `tests` up to the root of the repository that
    `rootdir` is in; without a repository, up to `rootdir`.
    """
    top = next((each for each in (rootdir, *rootdir.parents) if _is_repository(each)), rootdir)
    for folder in _upwards(_common_folder(tests, rootdir), top, otherwise=rootdir):
        candidate, pyproject = folder / "sglprof.toml", folder / "pyproject.toml"
        if candidate.is_file():
            return candidate
        if pyproject.is_file() and "sglprof" in _tools(_parse(_read(pyproject), pyproject)):
            return pyproject
    return None


def _tools(pyproject: Mapping[str, Any]) -> Mapping[str, Any]:
    tools = pyproject.get("tool")
    return tools if isinstance(tools, dict) else {}


def load_config(path: Path) -> dict[str, Any]:
    """The valid configuration in `path`; `SettingsError` names line and key of each mistake."""
    text = _read(path)
    document = _parse(text, path)
    prefix: tuple[str, ...] = ()
    if path.name == "pyproject.toml":
        prefix = ("tool", "sglprof")
        document = _tools(document).get("sglprof", {})
    problems = []
    violations = _violations(document)
    for error in violations[:_MOST_PROBLEMS]:
        line, column = position(text, (*prefix, *_place(error)))
        problems.append(f"line {line}, column {column}: {_described(error)}")
    if more := len(violations) - len(problems):
        problems.append(f"and {more} more")
    _refuse(problems, f"{path} is not a valid configuration")
    return document


def with_assignments(
    document: Mapping[str, Any], assignments: Sequence[str], flag: str
) -> dict[str, Any]:
    """`document` with each `KEY=VALUE` set; raises `SettingsError` if that is not valid.

    KEY is dotted. VALUE is TOML, else a string. flag: how assignments are given, for messages.
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
        _refuse(problems, f"{given}: not a valid configuration")
    return changed


def position(text: str, keys: Sequence[str | int]) -> tuple[int, int]:
    """Line and column, from 1, of the value at `keys` in a valid TOML text.

    For something inside a value, such as an entry of an array, they are those of the value.
    """
    current: list[str | int] = []  # keys of the table that a statement is in
    counts: dict[tuple[str | int, ...], int] = {}
    best = (0, 1, 1)  # number of keys that agree, line, column
    for line, statement in _statements(text):
        header = statement.startswith("[")
        names = _names(tomllib.loads(statement))
        if statement.startswith("[["):
            count = counts[tuple(names)] = counts.get(tuple(names), -1) + 1
            current = [*names, count]
        elif header:
            current = [*names]
        path = _with_counts(current if header else [*current, *names], counts)
        agreeing = next(
            (at for at, pair in enumerate(zip(path, keys, strict=False)) if pair[0] != pair[1]),
            min(len(path), len(keys)),
        )
        if agreeing > best[0]:
            first = text.split("\n")[line - 1]
            best = (agreeing, line, len(first) - len(first.lstrip()) + 1)
    return best[1:]


_LAST_LINE = re.compile(r"[\]}]|\"\"\"|'''")  # what ends a value of several lines


def _statements(text: str) -> Iterator[tuple[int, str]]:
    """Each header and assignment with the number of its first line; values may span several."""
    begin, statement = 0, ""
    for number, line in enumerate(text.split("\n"), start=1):
        is_first = not statement
        begin = number if is_first else begin
        statement += f"{line}\n"
        if not is_first and not _LAST_LINE.search(line):
            continue
        try:
            is_whole = tomllib.loads(statement)
        except tomllib.TOMLDecodeError:
            continue
        if is_whole:
            yield begin, statement.strip()
        statement = ""


def _names(table: Any) -> list[str | int]:
    """The keys of one statement: a, b for `{"a": {"b": 1}}`."""
    names: list[str | int] = []
    while isinstance(table, dict) and len(table) == 1:
        ((name, table),) = table.items()
        names.append(name)
        if isinstance(table, list):
            break
    return names


def _with_counts(
    path: Sequence[str | int], counts: Mapping[tuple[str | int, ...], int]
) -> list[str | int]:
    """`path` with the index of the current entry after the name of each array of tables."""
    numbered: list[str | int] = []
    for at, name in enumerate(path):
        numbered.append(name)
        follows = path[at + 1] if at + 1 < len(path) else None
        if tuple(numbered) in counts and isinstance(name, str) and not isinstance(follows, int):
            numbered.append(counts[tuple(numbered)])
    return numbered


def _toml_value(text: str) -> Any:
    try:
        document = tomllib.loads(f"value = {text}")
        refuse_odd(document)
    except UNDECODABLE:
        return text
    return document["value"]


def _refuse(problems: Sequence[str], what: str) -> None:
    if problems:
        raise SettingsError(
            f"{what}:\n    " + "\n    ".join(problems),
            expected="the keys and types of " + docs("configuration"),
            hint="correct the lines named above",
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
    """`folder` and its parents up to `top`; only `otherwise` if it is not below `top`."""
    if top != folder and top not in folder.parents:
        return [otherwise]
    chain = [folder, *folder.parents]
    return chain[: chain.index(top) + 1]


def _is_repository(folder: Path) -> bool:
    return (folder / ".git").exists() or (folder / ".hg").is_dir()


def _read(path: Path) -> str:
    try:
        return read_bytes(path, error=SettingsError).decode("utf-8")
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
        document = tomllib.loads(text)
        refuse_odd(document)
    except UNDECODABLE as error:
        raise _not_toml(path, error) from None
    return document


def _not_toml(path: Path, error: Exception) -> SettingsError:
    return SettingsError(
        f"{path} is not valid TOML: {why_undecodable(error)}",
        expected="TOML 1.0 in UTF-8",
        hint="correct that line",
    )


def _violations(document: Mapping[str, Any]) -> list[ValidationError]:
    import json

    import jsonschema

    schema = json.loads(SCHEMA.read_text(encoding="utf-8"))
    schema["$defs"]["threshold"]["properties"]["metric"]["enum"] = list(METRICS)
    formats = jsonschema.FormatChecker(formats=())
    formats.checks("regex", raises=NOT_PATTERN)(_is_pattern)
    validator = jsonschema.Draft202012Validator(schema, format_checker=formats)
    return sorted(validator.iter_errors(document), key=lambda error: list(map(str, error.path)))


def _is_pattern(value: object) -> bool:
    """Whether it is a regular expression, where it is a string at all; else raises."""
    return not isinstance(value, str) or bool(re.compile(value))


def _place(error: ValidationError) -> list[str | int]:
    """The path of keys to the mistake; to an unknown key, not to its table."""
    return [*error.absolute_path, *_unknown_keys(error)[:1]]


def _unknown_keys(error: ValidationError) -> list[str]:
    table: Any = error.instance
    schema: Any = error.schema
    if error.validator != "additionalProperties":
        return []
    return [key for key in table if key not in schema.get("properties", {})]


def _described(error: ValidationError) -> str:
    """The path of keys, the message of jsonschema, and the nearest name or all possible names."""
    value: Any = error.instance
    schema: Any = error.schema
    text = error.message
    if unknown := _unknown_keys(error):
        known = schema.get("properties", {})
        nearest = did_you_mean(unknown, known, "its keys are " + ", ".join(known))
        text = f"unknown key {' or '.join(unknown)} ({nearest})"
    elif error.validator == "enum" and (meant := did_you_mean([value], schema["enum"])):
        text += f": {meant}"
    elif error.validator == "format":
        text = f"{value!r} is not a regular expression: {error.cause}"
    return f"{_where(error.absolute_path)}: {text}"


def _where(path: Any) -> str:
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else str(part)
    return text or "top level"
