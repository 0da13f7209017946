"""The thresholds by which a command judges: of its options, of a run, or of a configuration."""

from __future__ import annotations

import argparse
import math
from dataclasses import replace
from typing import TYPE_CHECKING

from pytest_sglprof._config.model import Threshold
from pytest_sglprof._errors import did_you_mean

if TYPE_CHECKING:
    from pytest_sglprof._config.load import Settings
    from pytest_sglprof._report.model import WindowHead


def is_selected(args: argparse.Namespace) -> bool:
    options = (args.metric, args.limit, args.scope, args.kernel, args.stage, args.across)
    return any(option is not None for option in options)


def thresholds_of(
    args: argparse.Namespace, settings: Settings, window: WindowHead | None = None
) -> tuple[Threshold, ...]:
    """The threshold of the options, else those of the recorded window, else those configured.

    The limit is infinite where nobody set one.
    """
    if is_selected(args):
        return (_selected(args, settings),)
    judged = window.judgements if window else ()
    is_changed = any(assignment.startswith("threshold") for assignment in args.set or ())
    if judged and args.config is None and not is_changed:
        thresholds = tuple(dict.fromkeys(judgement.threshold for judgement in judged))
    else:
        from pytest_sglprof._config.thresholds import of_role

        thresholds = of_role(settings.thresholds, (window and window.role) or "")
    return tuple(
        replace(each, limit=math.inf) if each.origin == "default" else each for each in thresholds
    )


def _selected(args: argparse.Namespace, settings: Settings) -> Threshold:
    from pytest_sglprof._config.thresholds import (
        check_across,
        check_kernel,
        check_limit,
        check_metric,
        check_stage,
        check_subject,
    )

    origin = "sglprof check"
    metric = check_metric(args.metric or "slowdown", origin)
    scope, stage = args.scope or "compute", args.stage or ""
    where = "--kernel" if args.kernel else "--scope"
    check_subject(metric, scope, args.kernel, origin, where, stage=stage)
    _check_scope(scope, settings, origin, metric)
    check_stage(stage, origin, "--stage")
    across = check_across(metric, args.across or "", origin, "--across")
    limit = math.inf
    if args.limit is not None:
        limit = check_limit(metric, args.limit, origin, "--limit")
    if args.kernel:
        check_kernel(args.kernel, origin, "--kernel")
    kernel = args.kernel or ""
    return Threshold(metric, limit, scope, kernel, stage, origin="command line", across=across)


def _check_scope(scope: str, settings: Settings, origin: str, metric: str) -> None:
    """Raises `SettingsError` for a scope that resembles a known one.

    Any other may be a category of a configuration that is not available here.
    """
    from pytest_sglprof._config.thresholds import SCOPES, check_scope

    known = (*SCOPES, *settings.category_names)
    if scope not in known and did_you_mean([scope], known):
        check_scope(scope, settings.category_names, origin, "--scope", metric=metric)
