"""Options, environment and `sglprof.toml` become one frozen `Settings`, for pytest and commands.

Precedence: flag > `--set` > environment > configuration file (or what a run stored) > default.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pytest_sglprof._config.model import SERVER_KINDS, ServerSpec, Threshold
from pytest_sglprof._config.options import OPTIONS, Option, compiled, is_on
from pytest_sglprof._config.thresholds import check_threshold, default_thresholds
from pytest_sglprof._config.windows import check_name, refuse_too_few_steps
from pytest_sglprof._errors import SettingsError, did_you_mean
from pytest_sglprof._metrics import METRICS, MIN_SHARE, MIN_STEPS
from pytest_sglprof._redact import redact_command
from pytest_sglprof._trace.categories import CATEGORY_NAMES

if TYPE_CHECKING:
    from jsonschema.exceptions import ValidationError


@dataclass(frozen=True)
class Settings:
    """What this run does. Sizes in bytes, lock_clocks in MHz (0: not locked).

    thresholds: those of the configuration, else the default one. origins: where each name was
    set. stored: the part of the configuration by which a window is measured and judged, as
    plain data; a run keeps it, so that commands read its windows as it did.
    """

    output: Path
    keep: Literal["failed", "all", "none"] = "failed"
    keep_runs: int = 10
    keep_bytes: int = 20 * 2**30
    python: str = ""
    nsys: str = ""
    server: str = ""
    server_dir: tuple[str, str] | None = None
    nsys_session: str = ""
    allow_inconclusive: bool = False
    repeat: int = 1
    min_steps: int = MIN_STEPS
    min_share: float = MIN_SHARE
    servers: Mapping[str, ServerSpec] = field(default_factory=dict)
    window: Mapping[str, Any] = field(default_factory=dict)
    thresholds: tuple[Threshold, ...] = default_thresholds()
    categories: tuple[tuple[str, str], ...] = ()
    step_delimiter: str = ""
    lock_clocks: int = 0
    config_file: Path | None = None
    origins: Mapping[str, str] = field(default_factory=dict)
    stored: Mapping[str, Any] = field(default_factory=dict, repr=False)

    @property
    def category_names(self) -> tuple[str, ...]:
        """Every category that a kernel may have: the built-in ones, and the user's own."""
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
            lines.append(f"server {name}: kind={spec.kind} nsys={spec.nsys} args={args}")
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

    command_line: values of the flags by option name, None where not given. start, rootdir:
    where the configuration file is looked for, see `find_config`. stored: the file in which a
    run kept its configuration, and that; it stands in for the file that would be found.
    """
    values, origins = resolve_options(command_line, environ, of_pytest=of_pytest)
    path, document = stored or (None, {})
    if "config" in values:
        path = invocation_dir / values["config"]
        document = load_config(path)
    elif stored is None:
        path = find_config(start, rootdir)
        document = load_config(path) if path else {}
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
    """Values and origins of the options that were set anywhere; keys are option names."""
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
    document, known = _effective(values, origins, document, where)
    output, gate = document.get("output", {}), document.get("gate", {})
    window = dict(document.get("window", {}))
    base = config_file.parent if config_file else invocation_dir
    servers = {**servers_from(document, base), **(extra_servers or {})}
    mhz = document.get("gpu", {}).get("lock_clocks", 0)
    if values.get("python"):
        servers = {name: replace(s, python=values["python"]) for name, s in servers.items()}
    if mhz:
        servers = {name: replace(s, lock_clocks=mhz) for name, s in servers.items()}
    for name, spec in servers.items():
        check_name(spec.kind, SERVER_KINDS, f"server {name}: kind={spec.kind!r}")
    settings = Settings(
        output=invocation_dir / output.get("dir", ".sglprof"),
        keep=output.get("keep", Settings.keep),
        keep_runs=output.get("runs", Settings.keep_runs),
        keep_bytes=int(output["max_gib"] * 2**30) if "max_gib" in output else Settings.keep_bytes,
        python=values.get("python", ""),
        nsys=values.get("nsys", ""),
        server=values.get("server", ""),
        server_dir=server_dir_pair(values["server_dir"]) if "server_dir" in values else None,
        nsys_session=values.get("nsys_session", ""),
        allow_inconclusive=gate.get("allow_inconclusive", Settings.allow_inconclusive),
        repeat=window.pop("repeat", Settings.repeat),
        min_steps=gate.get("min_steps", Settings.min_steps),
        min_share=gate.get("min_share", Settings.min_share),
        servers=servers,
        window=window,
        thresholds=thresholds_from(document, known.get("thresholds", where)),
        categories=tuple((c["name"], c["pattern"]) for c in document.get("category", ())),
        step_delimiter=document.get("trace", {}).get("step_delimiter", ""),
        lock_clocks=mhz,
        config_file=config_file,
        origins=known,
        stored={name: document[name] for name in _STORED if name in document},
    )
    refuse_too_few_steps(settings.window.get("num_steps"), settings, f"{where}: [window]")
    return settings


def _effective(
    values: Mapping[str, Any], origins: Mapping[str, str], document: Mapping[str, Any], where: str
) -> tuple[dict[str, Any], dict[str, str]]:
    """The document with everything that was set elsewhere, and the origin of each setting."""
    assignments = values.get("set", ())
    flag = origins.get("set", "")
    assigned = {assignment.partition("=")[0].strip() for assignment in assignments}
    document = with_assignments(document, assignments, flag)
    known = {name: origin for name, origin in origins.items() if name not in _NO_SETTING}
    for key, name in (*_FILE_ONLY, *((option.key, option.name) for option in OPTIONS)):
        table, _, last = key.partition(".")
        is_weaker = key in assigned and origins.get(name, "").startswith("SGLPROF_")
        if key and name in values and not is_weaker:
            document.setdefault(table, {})[last] = values[name]
        elif key in assigned:
            known[name] = f"{flag} {key}"
        elif last in document.get(table, {}):
            known[name] = where
    return document, known


_STORED = ("gate", "trace", "category", "threshold")  # nothing of a server: it may hold secrets
_NO_SETTING = ("enabled", "config", "set", "show_config")
_FILE_ONLY = (
    ("output.runs", "keep_runs"),
    ("output.max_gib", "keep_bytes"),
    ("gpu.lock_clocks", "lock_clocks"),
    ("threshold", "thresholds"),
)


def servers_from(document: Mapping[str, Any], base: Path) -> dict[str, ServerSpec]:
    """`[server]` is "default"; `[servers.NAME]` are the others."""
    tables = {"default": document.get("server", {}), **document.get("servers", {})}
    return {name: _server_spec(name, table, base) for name, table in tables.items()}


def thresholds_from(document: Mapping[str, Any], origin: str) -> tuple[Threshold, ...]:
    """`[[threshold]]` tables; without any, the default slowdown of compute."""
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
    if option.kind in ("count", "share"):
        return _number(option.kind, raw, origin)
    if option.choices and raw not in option.choices:
        raise SettingsError(
            f"{origin} is {raw!r}",
            expected=" or ".join(option.choices),
            hint=did_you_mean([raw], option.choices, "correct it"),
        )
    return str(raw)


def _number(kind: str, raw: Any, origin: str) -> float:
    is_count = kind == "count"
    try:
        number = int(raw) if is_count else float(raw)
    except ValueError:
        number = -1
    if not 0 <= number <= (number if is_count else 1):
        expected = "a whole number, 0 or more" if is_count else "a share from 0 to 1"
        raise SettingsError(f"{origin} is {raw!r}", expected=expected, hint="correct it")
    return number


def server_dir_pair(text: str) -> tuple[str, str]:
    """`SERVER:LOCAL` as two absolute paths; `SettingsError` for anything else."""
    server, colon, local = text.partition(":")
    if not colon or not server.startswith("/") or not local:
        raise SettingsError(
            f"the folder of the running server is {text!r}",
            expected="SERVER:LOCAL, an absolute folder on the server's machine and the same here",
            hint="for a server on this machine give the same path twice, /data/prof:/data/prof",
        )
    return server, str(Path(local).resolve())


def _refuse_contradictions(values: Mapping[str, Any]) -> None:
    for name in ("server_dir", "nsys_session"):
        if values.get(name) and not values.get("server"):
            flag = f"--sglprof-{name.replace('_', '-')}"
            raise SettingsError(
                f"{flag} is given without --sglprof-server",
                expected="both: it describes a server that is already running",
                hint=f"add --sglprof-server=URL, or leave {flag} out",
            )


def _server_spec(name: str, table: Mapping[str, Any], base: Path) -> ServerSpec:
    values = dict(table)
    for key in ("args", "standin_args", "secrets", "nsys_args"):
        if key in values:
            values[key] = tuple(values[key])
    if "env" in values:
        values["env"] = tuple(values["env"].items())
    if isinstance(values.get("gpus"), list):
        values["gpus"] = tuple(values["gpus"])
    if values.get("model_path", "").startswith(("./", "../")):
        values["model_path"] = str((base / values["model_path"]).resolve())
    return ServerSpec(name=name, **values)


# `sglprof.toml` (or `[tool.sglprof]`): found, parsed, checked against its JSON Schema.


if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

SCHEMA = Path(__file__).parents[1] / "schemas" / "config.schema.json"


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
