"""Thresholds: read from keywords, checked, and merged so that the closest one counts."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

from pytest_sglprof._config.model import ACROSS, ROLES, STAGES, Across, Threshold
from pytest_sglprof._errors import SettingsError, did_you_mean
from pytest_sglprof._limits import compiled
from pytest_sglprof._metrics import LIFE_FIGURES, LOAD_WORDS, METRICS, UNITS

DEFAULT_SLOWDOWN = 1.05
SCOPES = ("compute", "communication", "all")
WHOLE_STEP = "compute"  # the scope of thresholds that need none: the default of `Threshold`
_KEY = re.compile(
    r"(?P<what>.+?)(\s+in\s+(?P<stage>[A-Za-z_]+))?(\s+across\s+(?P<across>[A-Za-z_]+))?",
    re.DOTALL,
)


def default_thresholds() -> tuple[Threshold, ...]:
    """The threshold without any configuration: slowdown of compute, at most 1.05."""
    return (Threshold(metric="slowdown", limit=DEFAULT_SLOWDOWN, scope="compute"),)


def merge_thresholds(*layers: Sequence[Threshold]) -> tuple[Threshold, ...]:
    """The thresholds of all layers; a later one replaces an earlier one of the same identity.

    One that says who is compared also replaces one of an earlier layer that leaves it open, and
    one for all servers those of earlier layers for one role. The order is that of first
    appearance, so that it is the same in all reports.
    """
    merged: dict[tuple[str, ...], Threshold] = {}
    for layer in layers:
        decided = {(*each.identity[:-1], "") for each in layer if each.identity[-1]}
        decided |= {(role, *each.identity[1:]) for each in layer if not each.role for role in ROLES}
        merged = {key: each for key, each in merged.items() if key not in decided}
        merged |= {each.identity: each for each in layer}
    return tuple(merged.values())


def of_role(thresholds: Sequence[Threshold], role: str) -> tuple[Threshold, ...]:
    """Those of a server with this role; one for the role alone replaces one for all servers.

    Where all of them are for other roles it is the one without any configuration.
    """
    for_all = [each for each in thresholds if not each.role]
    for_role = [replace(each, role="") for each in thresholds if role and each.role == role]
    return merge_thresholds(for_all, for_role) or (default_thresholds() if thresholds else ())


def thresholds_from_keywords(
    keywords: Mapping[str, Any],
    origin: str,
    *,
    across: object = "",
    categories: Collection[str] = (),
) -> tuple[Threshold, ...]:
    """Reads `slowdown=1.1` or `slowdown={"moe": 1.1, "compute in decode": 1.2}`.

    A number limits compute. A key is a scope (compute, communication, all, or a category) or
    `/regex/` over kernel names, optionally followed by ` in STAGE` and ` across WHO`. Metrics of
    whole steps take a stage alone: `idle_share={"decode": 0.2}`; `regression` can also be of
    `pass_wall`, `idle_share` and figures of the load driver: `{"ttft_p99": 1.1}`. across: who is
    compared where the key does not say it; metrics of each rank alone leave it out. categories:
    all that exist; if empty, any scope is accepted. Raises SettingsError.
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
            scope, kernel, stage, who = _subject(key, origin, where)
            compared = who or (across if METRICS[metric].of == "ranks" else "")
            if METRICS[metric].is_of_whole_steps and scope in STAGES:
                scope, stage = WHOLE_STEP, scope
            check_subject(metric, scope, kernel, origin, where, stage=stage)
            if categories and not kernel:
                check_scope(scope, categories, origin, where, metric=metric)
            check_stage(stage, origin, where)
            thresholds.append(
                Threshold(
                    metric=metric,
                    limit=check_limit(metric, limit, origin, where),
                    scope=scope,
                    kernel=kernel,
                    stage=stage,
                    origin=origin,
                    across=check_across(metric, compared, origin, where),
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
    scope, kernel, stage = threshold.scope, threshold.kernel, threshold.stage
    check_subject(metric, scope, kernel, origin, f"{prefix}scope", stage=stage)
    check_kernel(kernel, origin, f"{prefix}kernel")
    check_scope(scope, categories, origin, f"{prefix}scope", metric=metric)
    check_stage(stage, origin, f"{prefix}stage")
    check_min_us(metric, scope, threshold.min_us, origin, f"{prefix}min_us")
    check_across(metric, threshold.across, origin, f"{prefix}across")
    check_role(threshold.role, origin, f"{prefix}role")
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


def check_scope(
    scope: object, categories: Collection[str], origin: str, where: str, *, metric: str
) -> None:
    """Raises SettingsError unless `scope` is in `SCOPES` or `categories`, or `metric` has it."""
    scopes = (*SCOPES, *LIFE_FIGURES) if METRICS[metric].of == "lives" else SCOPES
    known = tuple(dict.fromkeys((*scopes, *categories)))
    if scope not in known:
        raise SettingsError(
            f"{origin}: {where}: {scope!r} is not a scope",
            expected=f"one of {', '.join(known)}, or /regex/ over kernel names",
            hint=did_you_mean([scope], known, "add a [[category]] for a category of your own"),
        )


def check_subject(
    metric: str, scope: object, kernel: object, origin: str, where: str, *, stage: object
) -> None:
    """Raises SettingsError for a scope, kernel or stage that figures of `metric` do not have."""
    row, what = METRICS[metric], f"/{kernel}/" if kernel else repr(scope)
    of_load = row.of == "load" or (row.of == "lives" and scope in LOAD_WORDS)
    if stage and of_load:
        raise SettingsError(
            f"{origin}: {where}: {metric} in {stage}, but the load driver knows no stages",
            expected="no stage",
            hint="limit pass_wall in a stage",
        )
    if scope == WHOLE_STEP and not kernel:
        return
    if kernel and row.of == "lives" and scope != WHOLE_STEP:
        raise SettingsError(
            f"{origin}: {where}: {metric} of {scope!r} and of /{kernel}/",
            expected="a scope, or an expression over kernel names",
            hint="leave one of the two out",
        )
    if row.is_of_whole_steps:
        raise SettingsError(
            f"{origin}: {where}: {metric} of {what}, but {metric} is of whole steps",
            expected=f"no scope and no kernel, or a stage alone: {', '.join(STAGES)}",
            hint="slowdown compares the time of some kernels between ranks",
        )
    if row.of == "load":
        raise SettingsError(
            f"{origin}: {where}: {metric} of {what}, but {metric} is of the whole load",
            expected="a number alone, no scope and no kernel",
            hint=f'regression={{"{metric}": 1.05}} compares it with the accepted lives',
        )


def check_min_us(metric: str, scope: str, min_us: object, origin: str, where: str) -> None:
    """Raises SettingsError unless `min_us` is a number of microseconds that `metric` can have."""
    is_number = isinstance(min_us, int | float) and not isinstance(min_us, bool)
    if not is_number or not 0 <= cast("float", min_us) < math.inf:
        raise SettingsError(
            f"{origin}: {where} is {min_us!r}", expected="microseconds a step, 0 or more"
        )
    of_times = METRICS[metric].of == "lives" and scope not in ("idle_share", *LOAD_WORDS)
    if min_us and not of_times:
        raise SettingsError(
            f"{origin}: {where}: {metric} of {scope!r} is no time a step",
            expected="min_us beside regression of a time: compute, a category, pass_wall, …",
            hint="leave it out",
        )


def check_stage(stage: object, origin: str, where: str) -> None:
    """Raises SettingsError unless `stage` is in `STAGES` or ""."""
    if stage != "" and stage not in STAGES:
        raise SettingsError(
            f"{origin}: {where}: {stage!r} is not a stage",
            expected=f"one of {', '.join(STAGES)}",
            hint=did_you_mean([stage], STAGES, "leave it out for all steps together"),
        )


def check_role(role: object, origin: str, where: str) -> None:
    """Raises SettingsError unless `role` is in `ROLES` or ""."""
    if role != "" and role not in ROLES:
        raise SettingsError(
            f"{origin}: {where}: {role!r} is not a role of a server",
            expected=f"one of {', '.join(ROLES)}",
            hint=did_you_mean([role], ROLES, "leave it out for all servers"),
        )


def check_across(metric: str, across: object, origin: str, where: str) -> Across:
    """`across` if it is in `ACROSS` or "", and `metric` can be of it; else raises SettingsError."""
    row = METRICS[metric]
    if across != "" and across not in ACROSS:
        raise SettingsError(
            f"{origin}: {where}: {across!r} does not say which ranks are compared",
            expected=f"one of {', '.join(ACROSS)}",
            hint=did_you_mean(
                [across], ACROSS, "leave it out for peers, or for sync where no rank has a peer"
            ),
        )
    if across and row.is_of_lives:
        raise SettingsError(
            f"{origin}: {where}: {metric} across {across}, but {metric} is of server lives",
            expected="no across",
            hint="compare ranks with slowdown",
        )
    if across and row.of == "steps":
        raise SettingsError(
            f"{origin}: {where}: {metric} across {across}, but {metric} is of each rank alone",
            expected="no across",
            hint="compare ranks with slowdown",
        )
    if across and row.across not in ("", across):
        raise SettingsError(
            f"{origin}: {where}: {metric} across {across}, but {metric} is what ranks lose by "
            "waiting for each other",
            expected=f"across {row.across}, or no across",
            hint="compare peers with slowdown or lost_share",
        )
    return cast("Across", across)


def _subject(key: object, origin: str, where: str) -> tuple[str, str, str, str]:
    """Scope, kernel expression, stage and who is compared of one key, "" where it has none."""
    if not isinstance(key, str) or not key.strip():
        raise SettingsError(
            f"{origin}: {where}: {key!r} is not a scope",
            expected=f"{', '.join(SCOPES)}, a category, or /regex/ over kernel names",
        )
    parts = _KEY.fullmatch(key.strip())
    assert parts, "any text that is not blank is a key"
    what, stage, across = parts["what"], parts["stage"] or "", parts["across"] or ""
    kernel = ""
    if len(what) > 2 and what.startswith("/") and what.endswith("/"):
        what, kernel = WHOLE_STEP, check_kernel(what[1:-1], origin, where)
    return what, kernel, stage.lower(), across.lower()
