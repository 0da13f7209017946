"""Strata of a window as a plain document, and back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pytest_sglprof.analysis.strata import GroupStrata, StepWork, Stratum

DIGITS = 3  # decimals of a mean, ns


def strata_document(groups: Sequence[GroupStrata]) -> list[dict[str, Any]]:
    """One object a work group; see results.schema.json."""
    return [
        {
            "group": group.group,
            "ranks": list(group.ranks),
            "steps": None if group.steps is None else dict(group.steps),
            "assigned_share": group.assigned_share,
            "kernels": [{"name": name, "category": category} for category, name in group.kernels],
            "strata": [
                {
                    **vars(one.work),
                    "steps": one.steps,
                    "compute_ns": round(one.compute_ns, DIGITS),
                    "categories": {name: round(ns, DIGITS) for name, ns in one.categories.items()},
                    "kernel_ns": [round(ns, DIGITS) for ns in one.kernels],
                }
                for one in group.strata
            ],
            "calls": list(group.calls),
            "left_out": {"strata": group.left_out_strata, "kernels": group.left_out_kernels},
        }
        for group in groups
    ]


def strata_of(window: Mapping[str, Any]) -> tuple[GroupStrata, ...]:
    """The strata of a window of a results document; none where it is older than they are."""
    return tuple(_group(found) for found in window.get("strata") or ())


def _group(found: Mapping[str, Any]) -> GroupStrata:
    return GroupStrata(
        group=found["group"],
        ranks=tuple(found["ranks"]),
        steps=found["steps"],
        assigned_share=found["assigned_share"],
        kernels=tuple((kernel["category"], kernel["name"]) for kernel in found["kernels"]),
        strata=tuple(_stratum(one) for one in found["strata"]),
        left_out_strata=found["left_out"]["strata"],
        left_out_kernels=found["left_out"]["kernels"],
        calls=tuple(found["calls"]),
    )


def _stratum(one: Mapping[str, Any]) -> Stratum:
    names = ("stage", "substage", "batch", "kv_bucket", "token_bucket")
    return Stratum(
        work=StepWork(**{name: one[name] for name in names}),
        steps=one["steps"],
        compute_ns=one["compute_ns"],
        categories=one["categories"],
        kernels=tuple(one["kernel_ns"]),
    )
