"""One profile window as its document holds it: what was recorded, found and judged."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from pytest_sglprof._analysis.budget import StepBudget, budgets
from pytest_sglprof._analysis.imbalance import ImbalanceFinding, group_findings, steps_per_rank
from pytest_sglprof._analysis.straggler import StragglerFinding, stragglers
from pytest_sglprof._analysis.strata import strata
from pytest_sglprof._analysis.sums import Sums
from pytest_sglprof._analysis.sync import SyncFinding, sync_findings
from pytest_sglprof._analysis.times import GroupCells
from pytest_sglprof._capture.recording import WindowCapture
from pytest_sglprof._config.model import Moment, WindowSpec
from pytest_sglprof._load.triggers import describe_trigger
from pytest_sglprof._report.model import (
    KernelRow,
    LoadAround,
    LoadSeries,
    RecordedArtifact,
    RecordedOnset,
    RecordedSources,
    RecordedSpec,
    RecordedSpread,
    RecordedWindow,
    Repeats,
    StepCounts,
    WindowSteps,
    storable,
    unix_ns,
    utc,
)
from pytest_sglprof._report.series import kernel_spread, lanes, step_times
from pytest_sglprof._trace.steps import CAPTURE
from pytest_sglprof._verdict.judge import Verdict
from pytest_sglprof._verdict.repeats import RepeatedVerdict

if TYPE_CHECKING:
    from pytest_sglprof._trace.table import KernelTable

MAX_KERNEL_FINDINGS = 20


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
    role: str | None = None,
    root: Path | None = None,
    repeat: Repeat | None = None,
    onset: RecordedOnset | None = None,
    load_samples: Sequence[LoadSeries] = (),
    around: LoadAround | None = None,
    moment: Moment | None = None,
    moment_of: str | None = None,
    sources: RecordedSources | None = None,
) -> RecordedWindow:
    """One window as results hold it, redacted.

    table: None when there was nothing to read. load: id of the load that ran meanwhile.
    role: of its server. root: folder that artifact paths are relative to (None: file names only).
    repeat: the windows that it was opened with; `verdict` and `reason` are then those over all
    of them, and the judgements those of this window. onset, load_samples: those that opened it.
    around, moment, moment_of, sources: see `RecordedWindow`.
    """
    together = verdict if repeat is None else repeat.verdict
    window = RecordedWindow(
        id=capture.window_id,
        name=capture.spec.name,
        backend=capture.spec.backend,
        nodeid=nodeid,
        attempt=attempt,
        repeat_of=repeat.of if repeat is not None else None,
        repeat_index=repeat.index if repeat is not None else 1,
        repeats=repeats_document(repeat, verdict) if repeat is not None else None,
        server=server_key,
        standin=standin,
        load=load,
        role=role,
        spec=_spec(capture.spec),
        opened=utc(capture.opened),
        closed=utc(capture.closed),
        duration_s=max(0.0, capture.closed - capture.opened),
        state=capture.state,
        state_reason=capture.reason,
        log=tuple(capture.log),
        notes=(*capture.notes, *(table.notes if table is not None else ())),
        expected_ranks=tuple(capture.expected_ranks),
        missing_ranks=tuple(capture.missing_ranks),
        artifacts=tuple(
            RecordedArtifact(path=_relative(item.path, root), kind=item.kind, rank=item.rank)
            for item in capture.artifacts
        ),
        gpus=tuple(capture.gpus),
        verdict=together.word,
        reason=together.reason,
        pid_ranks={str(pid): rank for pid, rank in capture.pid_ranks.items()},
        gpu_ranks={str(gpu): rank for gpu, rank in capture.gpu_ranks.items()},
        judgements=verdict.judgements,
        decisive=_decisive(verdict),
        onset=onset,
        load_samples=tuple(load_samples),
        around=around,
        moment=moment,
        moment_of=moment_of,
        sources=sources,
        nodes=dict(capture.nodes) or None,
        **(
            _UNMEASURED if table is None else _measured(verdict.sums or Sums(table), capture, onset)
        ),
    )
    return storable(window)


@dataclass(frozen=True)
class Repeat:
    """The place of a window among those that it was opened with.

    of: id of the first of them. index: 1 for the first. typical: id of the one in the middle.
    """

    of: str
    index: int
    typical: str
    verdict: RepeatedVerdict


def repeats_document(repeat: Repeat, alone: Verdict) -> Repeats:
    """The spread of each threshold over the windows, and the verdict of this window alone."""
    return Repeats(
        count=repeat.verdict.count,
        typical=repeat.typical,
        own_verdict=alone.word,
        own_reason=alone.reason,
        spread=tuple(
            RecordedSpread(
                threshold=spread.threshold,
                group=spread.group,
                values=spread.values,
                min=spread.known[0] if spread.known else None,
                median=spread.median,
                max=spread.known[-1] if spread.known else None,
                verdict=spread.verdict,
            )
            for spread in repeat.verdict.spreads
        ),
    )


def finding_document(
    finding: ImbalanceFinding | StragglerFinding | StepBudget | SyncFinding,
) -> dict[str, Any]:
    """One finding as builtin types, for the JSON and CSV of commands."""
    document: dict[str, Any] = msgspec.to_builtins(storable(finding))
    return document


_UNMEASURED: dict[str, Any] = {
    "source": None,
    "partial": False,
    "ranks": (),
    "steps": WindowSteps(per_rank={}, settled=0, groups=()),
    "findings": (),
    "stragglers": (),
    "table": (),
    "step_times": (),
    "kernels": (),
    "lanes": None,
    "strata": (),
}


def _measured(sums: Sums, capture: WindowCapture, onset: RecordedOnset | None) -> dict[str, Any]:
    """The fields of a window that come from its kernel table."""
    table, cells, waited = sums.table, sums.groups, sums.waited
    return {
        "source": table.source,
        "partial": table.partial,
        "ranks": tuple(table.ranks),
        "steps": WindowSteps(
            per_rank=steps_per_rank(table),
            settled=table.settled,
            groups=tuple(_step_counts(group) for group in cells),
            reasons=_reasons(table, capture),
        ),
        "run": dict(table.run),
        "findings": tuple(
            finding
            for group in cells
            for finding in group_findings(group, max_kernels=MAX_KERNEL_FINDINGS)
        ),
        "stragglers": stragglers(table, waited, clocks=capture.gpus, doubt=_doubt(capture)),
        "table": _rows(table),
        "step_times": step_times(table, cells, waited),
        "kernels": kernel_spread(table, cells),
        "strata": strata(table, cells, waited, sums.walls),
        "budgets": budgets(sums.walls),
        "syncs": sync_findings(sums),
        "lanes": lanes(table, cells, onset_ns=unix_ns(onset.time) if onset else None),
    }


def _reasons(table: KernelTable, capture: WindowCapture) -> dict[str, int]:
    """See `WindowSteps.reasons`."""
    marks = table.steps.loc[:, ["step", "excluded"]] if "excluded" in table.steps else None
    reasons = {CAPTURE: 0} if capture.facts.captures else {}
    if marks is not None:
        counts = marks.astype({"excluded": object}).groupby("excluded")["step"].nunique()
        reasons |= {str(why): int(count) for why, count in counts.items() if why}
    return reasons


def _spec(spec: WindowSpec) -> RecordedSpec:
    fields = {name: getattr(spec, name) for name in RecordedSpec.__struct_fields__}
    ring = repr(spec.ring) if spec.ring is not None else None
    return RecordedSpec(**fields | {"trigger": describe_trigger(spec.trigger), "ring": ring})


def _doubt(capture: WindowCapture) -> str | None:
    """Why the window is not whole; None when it is."""
    if capture.missing_ranks:
        return f"ranks are missing: {', '.join(capture.missing_ranks)}"
    return capture.reason if capture.state != "complete" else None


def _step_counts(cells: GroupCells) -> StepCounts:
    return StepCounts(
        group=cells.group.label,
        ranks=tuple(cells.group.ranks),
        compared=len(cells.steps.numbers) if cells.has_steps else None,
        by_stage=dict(Counter(cells.steps.stages)),
        seen=cells.steps.seen,
        unmatched=cells.steps.unmatched,
        cut=cells.steps.cut,
        excluded=cells.steps.excluded,
        other_input=0 if cells.inputs is None else int(cells.inputs.other.sum()),
        assigned_share=cells.assigned_share,
    )


def _rows(table: KernelTable) -> tuple[KernelRow, ...]:
    rows = table.by("rank", "name", "category")
    columns = zip(
        rows["rank"], rows["name"], rows["category"], rows["count"], rows["total_ns"], strict=True
    )
    return tuple(
        KernelRow(
            rank=str(rank),
            name=str(name),
            category=str(category),
            count=int(count),
            total_ns=int(total),
        )
        for rank, name, category, count, total in columns
    )


def _decisive(verdict: Verdict) -> int | None:
    """Index of the judgement that decided."""
    deciding = verdict.deciding
    return None if deciding is None else verdict.judgements.index(deciding)


def _relative(path: Path, root: Path | None) -> str:
    if root is None:
        return path.name
    return Path(os.path.relpath(path, root)).as_posix()
