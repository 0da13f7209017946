"""Thresholds: read from keywords, checked, and merged so that the closest one counts."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

from pytest_sglprof._config.model import STAGES, Threshold
from pytest_sglprof._config.options import compiled
from pytest_sglprof._errors import SettingsError, did_you_mean
from pytest_sglprof._metrics import METRICS, UNITS

DEFAULT_SLOWDOWN = 1.10
SCOPES = ("compute", "communication", "all")
_STAGED = re.compile(r"^(?P<what>.+?)\s+in\s+(?P<stage>[A-Za-z_]+)$")


def default_thresholds() -> tuple[Threshold, ...]:
    """The threshold without any configuration: slowdown of compute, at most 1.10."""
    return (Threshold(metric="slowdown", limit=DEFAULT_SLOWDOWN, scope="compute"),)


def merge_thresholds(*layers: Sequence[Threshold]) -> tuple[Threshold, ...]:
    """The thresholds of all layers; a later one replaces an earlier one of the same identity.

    The order is that of first appearance, so that it is the same in all reports.
    """
    merged = {threshold.identity: threshold for layer in layers for threshold in layer}
    return tuple(merged.values())


def thresholds_from_keywords(
    keywords: Mapping[str, Any], origin: str, *, categories: Collection[str] = ()
) -> tuple[Threshold, ...]:
    """Reads `slowdown=1.1` or `slowdown={"moe": 1.1, "compute in decode": 1.2}`.

    A number limits compute. A key is a scope (compute, communication, all, or a category) or
    `/regex/` over kernel names, optionally followed by ` in STAGE`. categories: all that
    exist; if empty, any scope is accepted. Raises SettingsError.
    """
    thresholds: list[Threshold] = []
    for name, value in keywords.items():
        metric = check_metric(name, origin)
        scopes = value if isinstance(value, Mapping) else {"compute": value}
        if not scopes:
            raise SettingsError(
                f"{origin}: {name} is an empty mapping",
                expected=f'a number, or scopes with limits, such as {name}={{"moe": 1.2}}',
            )
        for key, limit in scopes.items():
            where = f"{name}[{key!r}]" if isinstance(value, Mapping) else name
            scope, kernel, stage = _subject(key, origin, where)
            if categories and not kernel:
                check_scope(scope, categories, origin, where)
            check_stage(stage, origin, where)
            thresholds.append(
                Threshold(
                    metric=metric,
                    limit=check_limit(metric, limit, origin, where),
                    scope=scope,
                    kernel=kernel,
                    stage=stage,
                    origin=origin,
                )
            )
    return tuple(thresholds)


def listed_thresholds(
    thresholds: object, origin: str, categories: Collection[str]
) -> tuple[Threshold, ...]:
    """Checks `thresholds=[Threshold("slowdown", 1.2, scope="moe")]`; raises SettingsError."""
    expected = 'a list such as [Threshold("slowdown", 1.2, scope="moe", stage="decode")]'
    if not isinstance(thresholds, list | tuple):
        raise SettingsError(f"{origin}: thresholds is {thresholds!r}", expected=expected)
    for number, threshold in enumerate(thresholds):
        if not isinstance(threshold, Threshold):
            raise SettingsError(
                f"{origin}: thresholds[{number}] is {threshold!r}", expected=expected
            )
        check_threshold(threshold, categories, origin, f"thresholds[{number}].")
    return tuple(replace(threshold, origin=origin) for threshold in thresholds)


def check_limit(metric: str, limit: object, origin: str, where: str) -> float:
    """`limit` as a float.

    Raises SettingsError for anything but a number, and for a limit that every possible value of
    `metric` exceeds, or none does.
    """
    row = METRICS[metric]
    expected = f"a {row.unit} that is {row.bounds}"
    if isinstance(limit, bool) or not isinstance(limit, int | float):
        raise SettingsError(f"{origin}: {where} is {limit!r}, not a number", expected=expected)
    if not row.allows(limit):
        raise SettingsError(
            f"{origin}: {where} is {limit!r}, but a limit of {metric} must be {row.bounds}",
            expected=expected,
            hint=UNITS[row.unit].example,
        )
    return float(limit)


def check_threshold(
    threshold: Threshold, categories: Collection[str], origin: str, prefix: str = ""
) -> Threshold:
    """`threshold` if all names in it exist and its limit is possible; else raises SettingsError.

    categories: all that exist. prefix: put before the names of fields in messages, for example
    `threshold[0].`.
    """
    metric = check_metric(threshold.metric, origin)
    check_limit(metric, threshold.limit, origin, f"{prefix}limit")
    check_kernel(threshold.kernel, origin, f"{prefix}kernel")
    check_scope(threshold.scope, categories, origin, f"{prefix}scope")
    check_stage(threshold.stage, origin, f"{prefix}stage")
    return threshold


def check_kernel(expression: str, origin: str, where: str) -> str:
    """`expression` if it compiles; else raises SettingsError."""
    expected = "a Python regular expression over normalised kernel names"
    if not isinstance(expression, str):
        raise SettingsError(f"{origin}: {where} is {expression!r}", expected=expected)
    compiled(
        expression,
        f"{origin}: {where}: {expression!r}",
        expected=expected,
        hint="`sglprof kernels PATH` lists the names",
    )
    return expression


def check_metric(name: object, origin: str) -> str:
    """`name` if it is a metric; else raises SettingsError."""
    if not isinstance(name, str) or name not in METRICS:
        raise SettingsError(
            f"{origin}: {name!r} is not a metric",
            expected=f"one of {', '.join(METRICS)}",
            hint=did_you_mean([name], METRICS),
        )
    return name


def check_scope(scope: object, categories: Collection[str], origin: str, where: str) -> None:
    """Raises SettingsError unless `scope` is in `SCOPES` or `categories`."""
    known = tuple(dict.fromkeys((*SCOPES, *categories)))
    if scope not in known:
        raise SettingsError(
            f"{origin}: {where}: {scope!r} is not a scope",
            expected=f"one of {', '.join(known)}, or /regex/ over kernel names",
            hint=did_you_mean([scope], known, "add a [[category]] for a category of your own"),
        )


def check_stage(stage: object, origin: str, where: str) -> None:
    """Raises SettingsError unless `stage` is in `STAGES` or ""."""
    if stage != "" and stage not in STAGES:
        raise SettingsError(
            f"{origin}: {where}: {stage!r} is not a stage",
            expected=f"one of {', '.join(STAGES)}",
            hint=did_you_mean([stage], STAGES, "leave it out for all steps together"),
        )


def _subject(key: object, origin: str, where: str) -> tuple[str, str, str]:
    """Scope, kernel expression and stage of one key, "" where the key has none."""
    if not isinstance(key, str) or not key.strip():
        raise SettingsError(
            f"{origin}: {where}: {key!r} is not a scope",
            expected=f"{', '.join(SCOPES)}, a category, or /regex/ over kernel names",
        )
    what, stage = key.strip(), ""
    staged = _STAGED.match(what)
    if staged:
        what, stage = staged["what"], staged["stage"].lower()
    if len(what) > 2 and what.startswith("/") and what.endswith("/"):
        return "compute", check_kernel(what[1:-1], origin, where), stage
    return what, "", stage
