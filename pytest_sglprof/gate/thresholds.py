"""Thresholds: where they come from, and which of two replaces the other."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from pytest_sglprof.errors import SettingsError
from pytest_sglprof.patterns import compiled
from pytest_sglprof.values import METRICS, Metric, Threshold

DEFAULT_SLOWDOWN = 1.10
_SCOPES = ("compute", "communication", "all")
_STAGED = re.compile(r"^(?P<what>.+?)\s+in\s+(?P<stage>[A-Za-z_]+)$")


def default_thresholds() -> tuple[Threshold, ...]:
    """What is judged where nothing is configured: slowdown of compute, at most 1.10."""
    return (Threshold(metric="slowdown", limit=DEFAULT_SLOWDOWN, scope="compute"),)


def merge_thresholds(*layers: Sequence[Threshold]) -> tuple[Threshold, ...]:
    """All thresholds of all layers; a later one replaces an earlier of the same identity.

    The order is that of first appearance, so that reports do not jump about.
    """
    merged = {found.identity: found for layer in layers for found in layer}
    return tuple(merged.values())


def thresholds_from_keywords(
    keywords: Mapping[str, Any], origin: str, *, categories: Collection[str] = ()
) -> tuple[Threshold, ...]:
    """Reads `slowdown=1.1` or `slowdown={"moe": 1.1, "compute in decode": 1.2}`.

    A bare number limits compute. A key is a scope (compute, communication, all, or a
    category) or `/regex/` over kernel names, and may end in ` in STAGE`. categories:
    the known ones; when given, any other scope is refused. Raises SettingsError.
    """
    found: list[Threshold] = []
    for name, value in keywords.items():
        metric = _metric(name, origin)
        scopes = value if isinstance(value, Mapping) else {"compute": value}
        if not scopes:
            raise SettingsError(
                f"{origin}: {name} is an empty mapping",
                expected=f'a number, or scopes with limits, such as {name}={{"moe": 1.2}}',
            )
        for key, limit in scopes.items():
            where = f"{name}[{key!r}]" if isinstance(value, Mapping) else name
            scope, kernel, stage = _subject(key, origin, where)
            if not kernel:
                _check_scope(scope, categories, origin, where)
            found.append(
                Threshold(
                    metric=metric,
                    limit=check_limit(metric, limit, origin, where),
                    scope=scope,
                    kernel=kernel,
                    stage=stage,
                    origin=origin,
                )
            )
    return tuple(found)


def check_limit(metric: Metric, limit: object, origin: str, where: str) -> float:
    """`limit` as a float that can separate good from bad; SettingsError otherwise.

    slowdown and imbalance_factor are 1.0 at best, lost_share lies between 0 and 1.
    """
    low, high = (0.0, 1.0) if metric == "lost_share" else (1.0, math.inf)
    expected = "a share from 0 to below 1" if metric == "lost_share" else "a number of at least 1.0"
    if isinstance(limit, bool) or not isinstance(limit, int | float):
        raise SettingsError(f"{origin}: {where} is {limit!r}, not a number", expected=expected)
    if not low <= limit < high:
        raise SettingsError(
            f"{origin}: {where} is {limit!r}, which no measurement could tell good from bad",
            expected=expected,
            hint=f"1.10 allows 10 % ({metric})" if high > 1 else "0.05 allows 5 % to be lost",
        )
    return float(limit)


def check_kernel(expression: str, origin: str, where: str) -> str:
    """`expression` if it compiles; SettingsError otherwise."""
    compiled(
        expression,
        f"{origin}: {where}: {expression!r}",
        expected="a Python regular expression over normalised kernel names",
        hint="`sglprof kernels PATH` lists the names",
    )
    return expression


def _metric(name: str, origin: str) -> Metric:
    for metric in METRICS:
        if name == metric:
            return metric
    close = difflib.get_close_matches(name, METRICS, n=1)
    raise SettingsError(
        f"{origin}: {name!r} is no metric",
        expected=f"one of {', '.join(METRICS)}",
        hint=f"did you mean {close[0]}?" if close else "",
    )


def _subject(key: object, origin: str, where: str) -> tuple[str, str, str]:
    """Scope, kernel expression and stage of one key."""
    if not isinstance(key, str) or not key.strip():
        raise SettingsError(
            f"{origin}: {where}: {key!r} is no scope",
            expected=f"{', '.join(_SCOPES)}, a category, or /regex/ over kernel names",
        )
    what, stage = key.strip(), ""
    staged = _STAGED.match(what)
    if staged:
        what, stage = staged["what"], staged["stage"].lower()
    if len(what) > 2 and what.startswith("/") and what.endswith("/"):
        return "compute", check_kernel(what[1:-1], origin, where), stage
    return what, "", stage


def _check_scope(scope: str, categories: Collection[str], origin: str, where: str) -> None:
    known = (*_SCOPES, *categories)
    if not categories or scope in known:
        return
    close = difflib.get_close_matches(scope, known, n=1)
    raise SettingsError(
        f"{origin}: {where}: {scope!r} is no scope",
        expected=f"one of {', '.join(dict.fromkeys(known))}, or /regex/ over kernel names",
        hint=f"did you mean {close[0]}?" if close else "",
    )
