"""Options, environment and `sglprof.toml` become one frozen `Settings`, for pytest and commands.

Precedence: flag > `--set` > environment > configuration file (or what a run stored) > default.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

from pytest_sglprof.config_file import find_config, load_config, with_assignments
from pytest_sglprof.errors import SettingsError
from pytest_sglprof.gate.thresholds import check_threshold, default_thresholds
from pytest_sglprof.metrics import MIN_SHARE, MIN_STEPS
from pytest_sglprof.options import OPTIONS, Option, is_on
from pytest_sglprof.patterns import compiled
from pytest_sglprof.redact import redact_command
from pytest_sglprof.spelling import did_you_mean
from pytest_sglprof.trace.kernels import CATEGORY_NAMES
from pytest_sglprof.values import SERVER_KINDS, ServerSpec, Threshold
from pytest_sglprof.window_options import check_name, refuse_too_few_steps
from pytest_sglprof.window_options import window_spec as window_spec


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
