"""Turn the keywords of a marker or of `profile_window(...)` into a checked `WindowSpec`."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any, Literal

from pytest_sglprof._config.backends import BACKENDS
from pytest_sglprof._config.model import CERTAIN, ROLES, WindowSpec
from pytest_sglprof._config.thresholds import (
    listed_thresholds,
    merge_thresholds,
    thresholds_from_keywords,
)
from pytest_sglprof._errors import SettingsError, did_you_mean
from pytest_sglprof._load.triggers import KernelImbalance, Ring, as_trigger
from pytest_sglprof._metrics import METRICS

if TYPE_CHECKING:
    from pytest_sglprof._config.load import Settings
    from pytest_sglprof._config.model import Threshold


def window_spec(settings: Settings, keywords: Mapping[str, Any], *, origin: str) -> WindowSpec:
    """A window with the configured defaults and the keywords of a marker or a call.

    Metric names (`slowdown=1.1`, `slowdown={"moe": 1.1}`), all of them of the ranks that `across`
    says, and `thresholds=[Threshold(...)]` replace configured thresholds of the same scope, stage
    and metric. Raises `SettingsError` for unknown keywords, wrong types and contradictions.
    """
    keywords = dict(keywords)
    across = keywords.pop("across", "")
    known = {item.name for item in fields(WindowSpec)}
    unknown = sorted(set(keywords) - known - set(METRICS))
    if unknown:
        raise SettingsError(
            f"{origin}: unknown argument{'s' if len(unknown) > 1 else ''} {', '.join(unknown)}",
            expected="one of "
            + ", ".join(sorted({*known, "across"}))
            + ", or a metric: "
            + ", ".join(METRICS),
            hint=did_you_mean(unknown, (*known, "across", *METRICS), "correct the spelling"),
        )
    options = {key: value for key, value in keywords.items() if key in known}
    listed = options.pop("thresholds", ())
    limits = {name: keywords[name] for name in keywords if name in METRICS}
    if across != "" and not any(METRICS[name].of == "ranks" for name in limits):
        raise SettingsError(
            f"{origin}: across={across!r} without a metric that compares ranks",
            expected="a limit beside it, such as slowdown=1.05",
            hint="in thresholds=[...], each Threshold has its own across",
        )
    for name in _LISTS:
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
    categories = settings.category_names
    thresholds = merge_thresholds(
        settings.thresholds,
        (
            *thresholds_from_keywords(limits, origin, across=across, categories=categories),
            *listed_thresholds(listed, origin, categories),
        ),
    )
    _refuse_stepless(spec, settings, thresholds, origin)
    return replace(spec, thresholds=thresholds)


def _refuse_stepless(
    spec: WindowSpec, settings: Settings, thresholds: Sequence[Threshold], origin: str
) -> None:
    """Raises `SettingsError` for limits on the steps of a torch window that records none."""
    given = [each for each in thresholds if each.origin != "default"]
    judged = [each for each in given if METRICS[each.metric].of != "load"]
    if spec.backend != "torch" or not judged or settings.step_delimiter:
        return
    if spec.activities and "GPU" in spec.activities and "CPU" not in spec.activities:
        raise SettingsError(
            f"{origin}: activities={list(spec.activities)} with {judged[0].describe()}",
            expected="CPU among them: the spans that say where a step begins are recorded by it, "
            "and a verdict needs steps",
            hint="leave activities out: CPU and GPU without stacks and shapes are the default; or "
            "name the kernel that begins a step (trace.step_delimiter)",
        )


def window_by_hand(settings: Settings, name: str, options: Mapping[str, Any]) -> WindowSpec:
    """The window that `profile_window(name, **options)` makes."""
    if options.get("trigger") is not None:
        raise SettingsError(
            f"profile_window({name!r}, trigger=…): you open this window yourself",
            expected="@pytest.mark.profile_window(trigger=…) on the test",
        )
    origin = f"profile_window({name!r})"
    spec = window_spec(settings, {"name": name, **options}, origin=origin)
    refuse_too_few_steps(spec.num_steps, settings, origin)
    return spec


def refuse_too_few_steps(num_steps: int | None, settings: Settings, origin: str) -> None:
    """Raises `SettingsError` for a window with too few steps for any verdict."""
    if num_steps is not None and num_steps < settings.min_steps:
        raise SettingsError(
            f"{origin}: num_steps={num_steps} is below min_steps={settings.min_steps}, so every "
            "verdict on it would be inconclusive",
            expected=f"at least {settings.min_steps} steps",
            hint=f"give num_steps={2 * settings.min_steps}, or lower gate.min_steps",
        )


def check_name(given: str, known: Sequence[str], what: str, hint: str = "correct it") -> None:
    """Raises `SettingsError` unless `given` is in `known`. what: what is wrong, for the message."""
    if given not in known:
        expected = " or ".join(f'"{name}"' for name in known)
        raise SettingsError(what, expected=expected, hint=did_you_mean([given], known, hint))


def repeats(spec: WindowSpec, settings: Settings) -> int | Literal["certain"]:
    """How many times a window is opened: its `repeat`, else that of the settings.

    A window that is closed by hand, or opened by a trigger, cannot be repeated: it ignores the
    settings, and its own `repeat` other than 1 raises `SettingsError`.
    """
    ends_itself = bool(spec.num_steps or spec.duration or BACKENDS[spec.backend].default_seconds)
    if spec.repeat is None:
        is_repeatable = ends_itself and not spec.whole_body and spec.trigger is None
        return settings.repeat if is_repeatable else 1
    if spec.repeat != 1 and spec.trigger is not None:
        raise SettingsError(
            f"profile window {spec.name!r}: repeat={spec.repeat} with a trigger",
            expected="a window that can be opened again at any time of the load",
            hint="leave one of the two out",
        )
    if spec.repeat != 1 and not ends_itself:
        raise SettingsError(
            f"profile window {spec.name!r}: repeat={spec.repeat} without num_steps or duration",
            expected="a window that ends by itself, so that it can be opened again",
            hint="give it num_steps=100 or duration=5",
        )
    return spec.repeat


# What a window of the whole body cannot have.
_PART_OF_BODY = ("num_steps", "duration", "delay", "max_stall", "max_mib")
_Rule = tuple[bool, str, str]  # whether right, what was given, what is expected
_SWITCHES = (
    "whole_body",
    "profile_by_stage",
    "with_stack",
    "record_shapes",
    "merge_profiles",
    "detailed_annotations",
    "source_lines",
)
_TEXTS = ("profile_prefix", "profile_id", "output_dir")
_LISTS = ("activities", "profile_stages", "roles")


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
        (
            spec.ring is None or isinstance(spec.ring, Ring),
            f"ring={spec.ring!r}",
            "Ring(steps=10, every=60, keep=3)",
        ),
        (
            spec.ring is None
            or (spec.trigger is not None and not isinstance(spec.trigger, KernelImbalance)),
            f"ring without a trigger that it waits for (trigger={spec.trigger!r})",
            "trigger=ImbalanceOnset(...) or another one beside it; KernelImbalance takes samples "
            "of its own",
        ),
        (
            not spec.source_lines or (spec.backend == "torch" and not spec.whole_body),
            f"source_lines=True with backend={spec.backend!r}, whole_body={spec.whole_body}",
            'backend="torch", and a window that is closed while the load goes on: nsys records no '
            "line of Python for a kernel",
        ),
        (isinstance(spec.name, str) and bool(spec.name), f"name={spec.name!r}", "a string"),
        *_repeat_rules(spec),
        *_cost_rules(spec),
        *_type_rules(spec),
    )
    for holds, given, expected in rules:
        if not holds:
            raise SettingsError(f"{origin}: {given}", expected=expected, hint="correct this value")


def _check_names(spec: WindowSpec, origin: str) -> None:
    from pytest_sglprof._capture.torch_request import STAGES as PROFILED

    check_name(spec.backend, tuple(BACKENDS), f"{origin}: backend={spec.backend!r}")
    for role in spec.roles or ():
        check_name(role, ROLES, f"{origin}: roles has {role!r}")
    for name in spec.profile_stages or ():
        check_name(name.lower(), tuple(PROFILED), f"{origin}: profile_stages has {name!r}")


def _repeat_rules(spec: WindowSpec) -> tuple[_Rule, ...]:
    """How many times it is opened."""
    return (
        (
            spec.repeat == CERTAIN or _is_count(spec.repeat),
            f"repeat={spec.repeat!r}",
            'a whole number above 0, or "certain"',
        ),
        (
            spec.max_time is None or _is_number(spec.max_time, above=0),
            f"max_time={spec.max_time!r}",
            "seconds above 0",
        ),
        (
            spec.max_time is None or spec.repeat in (None, CERTAIN),
            f"max_time={spec.max_time!r} with repeat={spec.repeat!r}",
            'repeat="certain": another number of windows is opened whatever it takes',
        ),
        (
            not (spec.whole_body and (spec.repeat or 1) != 1),
            f"repeat={spec.repeat} with whole_body=True",
            "one of the two: the body runs once",
        ),
    )


def _cost_rules(spec: WindowSpec) -> tuple[_Rule, ...]:
    """What it may cost."""
    return (
        (
            spec.max_stall is None or _is_number(spec.max_stall, above=0),
            f"max_stall={spec.max_stall!r}",
            "seconds above 0",
        ),
        (
            spec.max_mib is None or _is_number(spec.max_mib, above=0),
            f"max_mib={spec.max_mib!r}",
            "MiB above 0",
        ),
        (
            not (spec.whole_body and (spec.max_stall or spec.max_mib)),
            "whole_body=True with max_stall or max_mib",
            "a window of so many steps, which can be fewer",
        ),
    )


def _type_rules(spec: WindowSpec) -> Iterator[_Rule]:
    """The types of switches, strings and lists."""
    for name in _SWITCHES:
        value = getattr(spec, name)
        yield isinstance(value, bool), f"{name}={value!r}", "True or False"
    for name in _TEXTS:
        value = getattr(spec, name)
        yield isinstance(value, str | None), f"{name}={value!r}", "a string"
    for name in _LISTS:
        value = getattr(spec, name)
        of_strings = isinstance(value, tuple) and all(isinstance(text, str) for text in value)
        yield value is None or of_strings, f"{name}={value!r}", "a list of strings"


def _is_number(value: Any, *, above: float | None = None) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return number and (value > above if above is not None else value >= 0)


def _is_count(value: Any) -> bool:
    return value is None or (isinstance(value, int) and not isinstance(value, bool) and value > 0)
