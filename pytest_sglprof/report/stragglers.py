"""Straggler findings as plain documents; see results.schema.json."""

from __future__ import annotations

from typing import Any

from pytest_sglprof.analysis.straggler import RankLateness, StragglerFinding


def straggler_document(finding: StragglerFinding) -> dict[str, Any]:
    """One sync group: who is late, why, and the figures of each rank. Times in ns."""
    offsets = finding.clock_offsets_ns
    return {
        "group": finding.group,
        "straggler": finding.straggler,
        "verdict": finding.verdict,
        "reason": finding.reason,
        "cause": finding.cause,
        "latest": finding.latest,
        "lateness": finding.lateness,
        "interval": finding.interval,
        "p_value": finding.p_value,
        "limit": finding.limit,
        "factor_sync": finding.factor_sync,
        "totals_difference": finding.totals_difference,
        "steps": finding.steps,
        "collectives": finding.collectives,
        "unmatched": finding.unmatched,
        "transfer_ns": finding.transfer_ns,
        "skew_ns": finding.skew_ns,
        "waits_by": finding.method or None,
        "clock_offsets_ns": None if offsets is None else list(offsets),
        "clock_uncertainty_ns": finding.clock_uncertainty_ns,
        "ranks": [_rank_document(rank) for rank in finding.ranks],
    }


def _rank_document(rank: RankLateness) -> dict[str, Any]:
    return {
        "rank": rank.rank,
        "compute_ns": rank.compute_ns,
        "idle_ns": rank.idle_ns,
        "wait_ns": rank.wait_ns,
        "late_ns": rank.late_ns,
        "total_ns": rank.total_ns,
        "slowest_share": rank.slowest_share,
        "explained_share": rank.explained_share,
        "kernels": [{"name": name, "ns": ns} for name, ns in rank.kernels],
    }
