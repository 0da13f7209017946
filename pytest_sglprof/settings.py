"""Options, environment, ini and `sglprof.toml` become one frozen `Settings`.

Precedence: command line > environment > ini > configuration file > default.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

from pytest_sglprof.errors import SettingsError
from pytest_sglprof.gate.thresholds import check_threshold, default_thresholds
from pytest_sglprof.metrics import MIN_SHARE, MIN_STEPS
from pytest_sglprof.options import OPTIONS, Option, is_on
from pytest_sglprof.redact import redact_command
from pytest_sglprof.spelling import did_you_mean
from pytest_sglprof.trace.kernels import CATEGORY_NAMES
from pytest_sglprof.values import SERVER_KINDS, ServerSpec, Threshold
from pytest_sglprof.window_options import check_name, refuse_too_few_steps
from pytest_sglprof.window_options import window_spec as window_spec


@dataclass(frozen=True)
class Settings:
    """What this run does. Sizes in bytes, lock_clocks in MHz (0: not locked).

    `origins` tells where each name was set.
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
    retry_inconclusive: int = 0
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

    @property
    def category_names(self) -> tuple[str, ...]:
        """Every category that a kernel may have: the built-in ones, and the user's own."""
        return (*CATEGORY_NAMES, *(name for name, _ in self.categories))

    def describe(self) -> list[str]:
        """One line a setting, `name = value  (origin)`, for `--sglprof-show-config`."""
        lines = []
        for item in fields(self):
            if item.name in ("origins", "servers", "thresholds", "window"):
                continue
            origin = self.origins.get(item.name, "default")
            lines.append(f"{item.name} = {getattr(self, item.name)}  ({origin})")
        lines += [f"threshold: {limit.describe()}  ({limit.origin})" for limit in self.thresholds]
        lines += [f"window.{name} = {value}  (config)" for name, value in self.window.items()]
        for name, spec in self.servers.items():
            args = " ".join(redact_command(spec.args))
            lines.append(f"server {name}: kind={spec.kind} nsys={spec.nsys} args={args}")
        return lines


def resolve_options(
    command_line: Mapping[str, Any], environ: Mapping[str, str], ini: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, str]]:
    """Values and origins of the options that were set anywhere; keys are option names."""
    values: dict[str, Any] = {}
    origins: dict[str, str] = {}
    for option in OPTIONS:
        sources = (
            (option.flag, command_line.get(option.dest)),
            (option.env, environ.get(option.env) or None),
            (f"ini {option.dest}", ini.get(option.dest)),
        )
        for origin, raw in sources:
            if raw is None or raw == "":
                continue
            values[option.name] = _convert(option, raw, origin)
            origins[option.name] = origin
            break
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
    merged: dict[str, Any] = {}
    known: dict[str, str] = {}
    for name, section, key in _FROM_CONFIG:
        if key in document.get(section, {}):
            merged[name], known[name] = document[section][key], where
    for name, value in values.items():
        if name not in ("enabled", "config", "show_config"):
            merged[name], known[name] = value, origins[name]
    if "max_gib" in document.get("output", {}):
        merged["keep_bytes"] = int(document["output"]["max_gib"] * 2**30)
        known["keep_bytes"] = where
    merged["output"] = invocation_dir / merged.get("output", ".sglprof")
    if "server_dir" in merged:
        merged["server_dir"] = _server_dir(merged["server_dir"])
    _refuse_contradictions(merged)
    base = config_file.parent if config_file else invocation_dir
    servers = {**servers_from(document, base), **(extra_servers or {})}
    if merged.get("python"):
        servers = {name: replace(s, python=merged["python"]) for name, s in servers.items()}
    if mhz := merged.get("lock_clocks"):
        servers = {name: replace(s, lock_clocks=mhz) for name, s in servers.items()}
    for name, spec in servers.items():
        check_name(spec.kind, SERVER_KINDS, f"server {name}: kind={spec.kind!r}")
    settings = Settings(
        **merged,
        servers=servers,
        window=dict(document.get("window", {})),
        thresholds=thresholds_from(document, where),
        categories=tuple((c["name"], c["pattern"]) for c in document.get("category", ())),
        config_file=config_file,
        origins=known,
    )
    refuse_too_few_steps(settings.window.get("num_steps"), settings, f"{where}: [window]")
    return settings


_FROM_CONFIG = (
    ("output", "output", "dir"),
    ("keep", "output", "keep"),
    ("keep_runs", "output", "runs"),
    ("step_delimiter", "trace", "step_delimiter"),
    ("lock_clocks", "gpu", "lock_clocks"),
    ("min_steps", "gate", "min_steps"),
    ("min_share", "gate", "min_share"),
    ("allow_inconclusive", "gate", "allow_inconclusive"),
    ("retry_inconclusive", "gate", "retry_inconclusive"),
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
    if option.kind == "int":
        try:
            number = int(raw)
        except ValueError:
            number = -1
        if number < 0:
            raise SettingsError(
                f"{origin} is {raw!r}", expected="a whole number, 0 or more", hint="correct it"
            )
        return number
    if option.choices and raw not in option.choices:
        raise SettingsError(
            f"{origin} is {raw!r}",
            expected=" or ".join(option.choices),
            hint=did_you_mean([raw], option.choices, "correct it"),
        )
    return str(raw)


def _server_dir(text: str) -> tuple[str, str]:
    server, colon, local = text.partition(":")
    if not colon or not server.startswith("/") or not local:
        raise SettingsError(
            f"--sglprof-server-dir is {text!r}",
            expected="SERVER:LOCAL, an absolute folder on the server's machine and the same here",
            hint="for a server on this machine give the same path twice, /data/prof:/data/prof",
        )
    return server, str(Path(local).resolve())


def _refuse_contradictions(merged: Mapping[str, Any]) -> None:
    for name in ("server_dir", "nsys_session"):
        if merged.get(name) and not merged.get("server"):
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
