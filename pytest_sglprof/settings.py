"""Options, environment, ini and `sglprof.toml` become one frozen `Settings`.

Precedence: command line > environment > ini > configuration file > default.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

from pytest_sglprof.analysis.triggers import as_trigger
from pytest_sglprof.errors import SettingsError
from pytest_sglprof.gate.thresholds import (
    check_threshold,
    default_thresholds,
    merge_thresholds,
    thresholds_from_keywords,
)
from pytest_sglprof.options import OPTIONS, Option, is_on
from pytest_sglprof.spelling import did_you_mean
from pytest_sglprof.trace.kernels import CATEGORIES
from pytest_sglprof.values import (
    BACKENDS,
    METRICS,
    SERVER_KINDS,
    ServerSpec,
    Threshold,
    WindowSpec,
)


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
    min_steps: int = 30
    min_share: float = 0.01
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
        return (*CATEGORIES, *(name for name, _ in self.categories))

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
        lines += [
            f"server {name}: kind={spec.kind} nsys={spec.nsys} args={' '.join(spec.args)}"
            for name, spec in self.servers.items()
        ]
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


def repeats(spec: WindowSpec, settings: Settings) -> int:
    """How often a window is opened: as it says itself, else as the settings say.

    Raises `SettingsError` for one that says so itself but ends by hand or waits for a
    trigger, whose moment comes once; the settings' number is for the others.
    """
    ends_itself = bool(spec.num_steps or spec.duration or spec.backend == "nsys")
    if spec.repeat is None:
        again = ends_itself and not spec.whole_body and spec.trigger is None
        return max(1, settings.repeat) if again else 1
    if spec.repeat > 1 and spec.trigger is not None:
        raise SettingsError(
            f"profile window {spec.name!r}: repeat={spec.repeat} with a trigger",
            expected="a window that can be opened again at any time of the load",
            hint="leave out one of the two",
        )
    if spec.repeat > 1 and not ends_itself:
        raise SettingsError(
            f"profile window {spec.name!r}: repeat={spec.repeat} without num_steps or duration",
            expected="a window that ends by itself, so that it can be opened again",
            hint="give it num_steps=50 or duration=2",
        )
    return spec.repeat


def thresholds_from(document: Mapping[str, Any], origin: str) -> tuple[Threshold, ...]:
    """`[[threshold]]` tables; without any, the default slowdown of compute."""
    categories = (*CATEGORIES, *(table["name"] for table in document.get("category", ())))
    configured = [
        check_threshold(
            Threshold(**table, origin=origin), categories, origin, f"threshold[{number}]."
        )
        for number, table in enumerate(document.get("threshold", ()))
    ]
    return tuple(configured) or default_thresholds()


def refuse_too_few_steps(num_steps: int | None, settings: Settings, origin: str) -> None:
    """Raises `SettingsError` for a window by steps that could never get a verdict."""
    if num_steps is not None and num_steps < settings.min_steps:
        raise SettingsError(
            f"{origin}: num_steps={num_steps} is below min_steps={settings.min_steps}, so every "
            "verdict on its thresholds would be inconclusive",
            expected=f"at least {settings.min_steps} steps",
            hint=f"give num_steps={settings.min_steps} or more, or lower --sglprof-min-steps",
        )


def check_name(given: str, known: Sequence[str], what: str, hint: str = "correct it") -> None:
    """Raises `SettingsError` that says `what`, and the nearest name, unless `given` is known."""
    if given not in known:
        expected = " or ".join(f'"{name}"' for name in known)
        raise SettingsError(what, expected=expected, hint=did_you_mean([given], known, hint))


def window_spec(settings: Settings, keywords: Mapping[str, Any], *, origin: str) -> WindowSpec:
    """A window from the configured defaults and the keywords of a marker or a call.

    Metric names (`slowdown=1.1`, `slowdown={"moe": 1.1}`) become thresholds that replace
    configured ones of the same scope, stage and metric. `SettingsError` for unknown
    keywords, wrong types and contradictions.
    """
    known = {item.name for item in fields(WindowSpec)} - {"thresholds"}
    unknown = sorted(set(keywords) - known - set(METRICS))
    if unknown:
        raise SettingsError(
            f"{origin}: unknown argument{'s' if len(unknown) > 1 else ''} {', '.join(unknown)}",
            expected="one of " + ", ".join(sorted(known)) + ", or a metric: " + ", ".join(METRICS),
            hint=did_you_mean(unknown, (*known, *METRICS), "correct the spelling"),
        )
    options = {key: value for key, value in keywords.items() if key in known}
    limits: dict[str, Any] = {str(key): value for key, value in keywords.items() if key in METRICS}
    for name in ("activities", "profile_stages"):
        if isinstance(options.get(name), list):
            options[name] = tuple(options[name])
    defaults = dict(settings.window)
    if options.get("num_steps") is not None:
        defaults.pop("duration", None)
    if options.get("duration") is not None:
        defaults.pop("num_steps", None)
    if options.get("whole_body"):
        defaults = {k: v for k, v in defaults.items() if k not in _PART_OF_BODY}
    if isinstance(defaults.get("activities"), list):
        defaults["activities"] = tuple(defaults["activities"])
    spec = WindowSpec(**{**defaults, **options})
    _check_window(spec, origin)
    _check_names(spec, origin)
    if spec.trigger is not None:
        spec = replace(spec, trigger=as_trigger(spec.trigger))
    own = thresholds_from_keywords(limits, origin, categories=settings.category_names)
    return replace(spec, thresholds=merge_thresholds(settings.thresholds, own))


_PART_OF_BODY = ("num_steps", "duration", "delay")  # what a window of the whole body cannot have
_SWITCHES = (
    "whole_body",
    "profile_by_stage",
    "with_stack",
    "record_shapes",
    "merge_profiles",
    "detailed_annotations",
)
_TEXTS = ("profile_prefix", "profile_id", "output_dir")
_LISTS = ("activities", "profile_stages")


def _check_window(spec: WindowSpec, origin: str) -> None:
    rules = (
        (_is_number(spec.timeout, above=0), f"timeout={spec.timeout!r}", "seconds above 0"),
        (_is_number(spec.delay), f"delay={spec.delay!r}", "seconds, 0 or more"),
        (_is_number(spec.settle), f"settle={spec.settle!r}", "seconds, 0 or more"),
        (
            spec.duration is None or _is_number(spec.duration, above=0),
            f"duration={spec.duration!r}",
            "seconds above 0",
        ),
        (_is_count(spec.num_steps), f"num_steps={spec.num_steps!r}", "a whole number above 0"),
        (_is_count(spec.repeat), f"repeat={spec.repeat!r}", "a whole number above 0"),
        (
            not (spec.whole_body and (spec.repeat or 1) > 1),
            f"repeat={spec.repeat} with whole_body=True",
            "one of the two: the body runs once",
        ),
        (_is_count(spec.start_step), f"start_step={spec.start_step!r}", "a whole number above 0"),
        (
            not (spec.num_steps and spec.duration),
            f"num_steps={spec.num_steps} with duration={spec.duration}",
            "one of the two",
        ),
        (
            not (spec.whole_body and (spec.num_steps or spec.duration or spec.delay)),
            "whole_body=True with num_steps, duration or delay",
            "whole_body alone: it opens before the body and closes after it",
        ),
        (
            not (spec.profile_by_stage and not spec.num_steps),
            "profile_by_stage=True without num_steps",
            "num_steps as well: without it the server dies at its next batch",
        ),
        (
            spec.trigger is None or not (spec.whole_body or spec.delay or spec.start_step),
            "trigger with whole_body, delay or start_step",
            "the trigger alone: it says when the window opens",
        ),
        (isinstance(spec.name, str) and bool(spec.name), f"name={spec.name!r}", "a text"),
        *_type_rules(spec),
    )
    for fine, found, expected in rules:
        if not fine:
            raise SettingsError(f"{origin}: {found}", expected=expected, hint="correct the marker")


def _check_names(spec: WindowSpec, origin: str) -> None:
    from pytest_sglprof.capture.torch_request import ACTIVITIES
    from pytest_sglprof.capture.torch_request import STAGES as PROFILED

    check_name(spec.backend, BACKENDS, f"{origin}: backend={spec.backend!r}")
    for name in spec.activities or ():
        check_name(name, ACTIVITIES, f"{origin}: activities has {name!r}")
    for name in spec.profile_stages or ():
        check_name(name.lower(), tuple(PROFILED), f"{origin}: profile_stages has {name!r}")


def _type_rules(spec: WindowSpec) -> Iterator[tuple[bool, str, str]]:
    """What needs no thought: True for a right type, what was found, what was expected."""
    for name in _SWITCHES:
        value = getattr(spec, name)
        yield isinstance(value, bool), f"{name}={value!r}", "True or False"
    for name in _TEXTS:
        value = getattr(spec, name)
        yield isinstance(value, str | None), f"{name}={value!r}", "a text"
    for name in _LISTS:
        value = getattr(spec, name)
        of_texts = isinstance(value, tuple) and all(isinstance(text, str) for text in value)
        yield value is None or of_texts, f"{name}={value!r}", "a list of texts"


def _is_number(value: Any, *, above: float | None = None) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return number and (value > above if above is not None else value >= 0)


def _is_count(value: Any) -> bool:
    return value is None or (isinstance(value, int) and not isinstance(value, bool) and value > 0)


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
