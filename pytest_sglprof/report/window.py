"""One profile window as a plain document: what was recorded, found and judged."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytest_sglprof.analysis.cells import GroupCells, measure
from pytest_sglprof.analysis.imbalance import ImbalanceFinding, group_findings, steps_per_rank
from pytest_sglprof.analysis.straggler import stragglers
from pytest_sglprof.analysis.strata import strata
from pytest_sglprof.analysis.triggers import describe_trigger
from pytest_sglprof.analysis.waits import waits
from pytest_sglprof.gate.judge import Judgement, Verdict
from pytest_sglprof.gate.repeats import RepeatedVerdict
from pytest_sglprof.metrics import metrics_of
from pytest_sglprof.redact import redact
from pytest_sglprof.report.lanes import lanes
from pytest_sglprof.report.plain import plain, unix_ns, utc
from pytest_sglprof.report.series import step_times
from pytest_sglprof.report.spread import kernel_spread
from pytest_sglprof.report.stragglers import straggler_document
from pytest_sglprof.report.strata import strata_document
from pytest_sglprof.values import WindowCapture

if TYPE_CHECKING:
    from pytest_sglprof.trace.table import KernelTable

MAX_KERNEL_FINDINGS = 20
MAX_CONTRIBUTORS = 5


def window_document(
    capture: WindowCapture,
    table: KernelTable | None,
    verdict: Verdict,
    *,
    nodeid: str,
    attempt: int,
    server_key: str,
    standin: bool,
    load: str | None,
    root: Path | None = None,
    retry_of: str | None = None,
    repeat: Repeat | None = None,
    onset: dict[str, Any] | None = None,
    load_samples: Sequence[dict[str, Any]] = (),
) -> dict[str, Any]:
    """The document of one window, JSON-plain and redacted; see results.schema.json.

    table: None when there was nothing to read. load: id of the load that ran meanwhile.
    root: folder that artifact paths are relative to (None: file names only).
    retry_of: id of the inconclusive window that this one repeats. repeat: the windows that
    it was opened with; `verdict` and `reason` are then those over all of them, and the
    judgements its own. onset, load_samples: see `report.load`.
    """
    spec = plain(replace(capture.spec, trigger=describe_trigger(capture.spec.trigger)))
    spec.pop("thresholds")  # every one of them stands in a judgement
    document = {
        "id": capture.window_id,
        "name": capture.spec.name,
        "backend": capture.spec.backend,
        "nodeid": nodeid,
        "attempt": attempt,
        "retry_of": retry_of,
        "repeat_of": repeat.of if repeat is not None else None,
        "repeat_index": repeat.index if repeat is not None else 1,
        "repeats": repeats_document(repeat, verdict) if repeat is not None else None,
        "server": server_key,
        "standin": standin,
        "load": load,
        "spec": spec,
        "opened": utc(capture.opened),
        "closed": utc(capture.closed),
        "duration_s": max(0.0, capture.closed - capture.opened),
        "state": capture.state,
        "state_reason": capture.reason,
        "log": list(capture.log),
        "notes": [*capture.notes, *(table.notes if table is not None else ())],
        "expected_ranks": list(capture.expected_ranks),
        "missing_ranks": list(capture.missing_ranks),
        "artifacts": [
            {"path": _relative(item.path, root), "kind": item.kind, "rank": item.rank}
            for item in capture.artifacts
        ],
        "gpus": [plain(clocks) for clocks in capture.gpus],
        "verdict": verdict.word if repeat is None else repeat.verdict.word,
        "reason": verdict.reason if repeat is None else repeat.verdict.reason,
        "pid_ranks": capture.pid_ranks,
        "gpu_ranks": capture.gpu_ranks,
        "judgements": [judgement_document(judgement) for judgement in verdict.judgements],
        "decisive": _decisive(verdict),
        "onset": onset,
        "load_samples": list(load_samples),
        **_measured(table, verdict.groups, capture, onset),
    }
    whole: dict[str, Any] = redact(plain(document))
    return whole


@dataclass(frozen=True)
class Repeat:
    """Where a window stands among those that it was opened with.

    of: id of the first of them. index: 1 for the first. typical: id of the one in the middle.
    """

    of: str
    index: int
    typical: str
    verdict: RepeatedVerdict


def repeats_document(repeat: Repeat, own: Verdict) -> dict[str, Any]:
    """The spread of each threshold over the windows, and this window's own verdict."""
    return {
        "count": repeat.verdict.count,
        "typical": repeat.typical,
        "own_verdict": own.word,
        "own_reason": own.reason,
        "spread": [
            {
                "metric": spread.threshold.metric,
                "scope": spread.threshold.scope,
                "kernel": spread.threshold.kernel,
                "stage": spread.threshold.stage,
                "group": spread.group,
                "limit": spread.threshold.limit,
                "values": list(spread.values),
                "min": spread.known[0] if spread.known else None,
                "median": spread.median,
                "max": spread.known[-1] if spread.known else None,
                "verdict": spread.verdict,
            }
            for spread in repeat.verdict.spreads
        ],
    }


def judgement_document(judgement: Judgement) -> dict[str, Any]:
    """One threshold, what was measured for it, and the word."""
    threshold, finding = judgement.threshold, judgement.finding
    return {
        "metric": threshold.metric,
        "scope": threshold.scope,
        "kernel": threshold.kernel,
        "stage": threshold.stage,
        "limit": threshold.limit,
        "origin": threshold.origin,
        "value": judgement.value,
        "verdict": judgement.verdict,
        "reason": judgement.reason,
        "finding": None if finding is None else finding_document(finding),
    }


def finding_document(finding: ImbalanceFinding) -> dict[str, Any]:
    """One finding; of the contributors only the largest."""
    return {
        "group": finding.group,
        "scope": finding.scope,
        "kernel": finding.kernel,
        "stage": finding.stage,
        **{row.value: row.read(finding) for row in metrics_of("ranks")},
        **{row.interval: row.read_interval(finding) for row in metrics_of("ranks")},
        "lost_ns": finding.lost_ns,
        "slowest": finding.slowest,
        "others_ns": finding.others_ns,
        "share_of_compute": finding.share_of_compute,
        "p_value": finding.p_value,
        "factor_sync": finding.factor_sync,
        "cv": finding.cv,
        "lost_ns_per_step": finding.lost_ns_per_step,
        "share_of_step": finding.share_of_step,
        "work": finding.work.word or None,
        "work_ratio": finding.work.ratio,
        "work_by": finding.work.by or None,
        "other_input_steps": finding.other_input_steps,
        "output_tokens": finding.output_tokens,
        "ns_per_token": finding.ns_per_token,
        "lost_ns_per_token": finding.lost_ns_per_token,
        "steps": finding.steps if finding.has_steps else None,
        "compared_steps": finding.compared_steps if finding.has_steps else None,
        "dropped_steps": finding.dropped_steps,
        "reason": finding.reason,
        "ranks": [
            {
                "rank": figure.rank,
                "total_ns": figure.total_ns,
                "busy_ns": figure.busy_ns,
                "slowest_share": figure.slowest_share,
            }
            for figure in finding.ranks
        ],
        "contributors": _named(finding.contributors),
        "category_contributors": _named(finding.category_contributors),
    }


def _measured(
    table: KernelTable | None,
    groups: Sequence[GroupCells],
    capture: WindowCapture,
    onset: dict[str, Any] | None,
) -> dict[str, Any]:
    """What comes from the kernel table; empty where there is none."""
    if table is None:
        return {
            "source": None,
            "partial": False,
            "ranks": [],
            "steps": {"per_rank": {}, "settled": 0, "groups": []},
            "findings": [],
            "stragglers": [],
            "table": [],
            "step_times": [],
            "kernels": [],
            "lanes": None,
            "strata": [],
        }
    cells, waited = groups or measure(table), waits(table)
    findings = [
        finding_document(finding)
        for group in cells
        for finding in group_findings(group, max_kernels=MAX_KERNEL_FINDINGS)
    ]
    return {
        "source": table.source,
        "partial": table.partial,
        "ranks": list(table.ranks),
        "steps": {
            "per_rank": steps_per_rank(table),
            "settled": table.settled,
            "groups": [_step_counts(group) for group in cells],
        },
        "findings": findings,
        "stragglers": [
            straggler_document(found)
            for found in stragglers(table, waited, clocks=capture.gpus, doubt=_doubt(capture))
        ],
        "table": _rows(table),
        "step_times": step_times(table, cells, waited),
        "kernels": kernel_spread(table, cells),
        "strata": strata_document(strata(table, cells)),
        "lanes": lanes(table, cells, onset_ns=unix_ns(onset["time"]) if onset else None),
    }


def _doubt(capture: WindowCapture) -> str | None:
    """Why the window is not whole; None when it is."""
    if capture.missing_ranks:
        return f"ranks are missing: {', '.join(capture.missing_ranks)}"
    return capture.reason if capture.state != "complete" else None


def _step_counts(cells: GroupCells) -> dict[str, Any]:
    """How many steps of a work group are compared, by stage, and why others are not."""
    stages: dict[str, int] = {}
    for stage in cells.steps.stages:
        stages[stage] = stages.get(stage, 0) + 1
    return {
        "group": cells.group.label,
        "ranks": list(cells.group.ranks),
        "compared": len(cells.steps.numbers) if cells.has_steps else None,
        "by_stage": stages,
        "seen": cells.steps.seen,
        "unmatched": cells.steps.unmatched,
        "cut": cells.steps.cut,
        "excluded": cells.steps.excluded,
        "other_input": 0 if cells.inputs is None else int(cells.inputs.other.sum()),
        "assigned_share": cells.assigned_share,
    }


def _rows(table: KernelTable) -> list[dict[str, Any]]:
    rows = table.by("rank", "name", "category")
    columns = zip(
        rows["rank"], rows["name"], rows["category"], rows["count"], rows["total_ns"], strict=True
    )
    return [
        {
            "rank": str(rank),
            "name": str(name),
            "category": str(category),
            "count": int(count),
            "total_ns": int(total),
        }
        for rank, name, category, count, total in columns
    ]


def _decisive(verdict: Verdict) -> int | None:
    """Index of the judgement that decided."""
    worst = verdict.worst
    return None if worst is None else verdict.judgements.index(worst)


def _named(pairs: Sequence[tuple[str, float]]) -> list[dict[str, Any]]:
    return [{"name": name, "ns": ns} for name, ns in pairs[:MAX_CONTRIBUTORS]]


def _relative(path: Path, root: Path | None) -> str:
    if root is None:
        return path.name
    return Path(os.path.relpath(path, root)).as_posix()
