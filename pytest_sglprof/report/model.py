"""The results document of a run, composed of what analysis, gate and report make.

`python -m ci.schemas` writes `schemas/results.schema.json` from these types. Readers ignore
keys that they do not know, so that a document of a newer minor version can be read.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from pytest_sglprof.analysis.imbalance import ImbalanceFinding
from pytest_sglprof.analysis.straggler import StragglerFinding
from pytest_sglprof.analysis.strata import GroupStrata
from pytest_sglprof.figures import Amount, Count, Share
from pytest_sglprof.gate.judge import Judgement
from pytest_sglprof.report.lanes import Lanes
from pytest_sglprof.report.load import LoadSeries, RecordedOnset
from pytest_sglprof.report.series import StepSeries
from pytest_sglprof.report.spread import KernelGroup
from pytest_sglprof.values import Backend, GpuClocks, Threshold, VerdictWord

Outcome = Literal["passed", "failed", "skipped", "error", "xfailed", "xpassed"]
Statistics = dict[str, float | None]  # "mean", "median", "p90", "p95", "p99" -> ms


class Version(msgspec.Struct, frozen=True):
    """Of the document's format: a minor one adds, a major one changes what was there."""

    major: Count
    minor: Count


class Run(msgspec.Struct, frozen=True, kw_only=True):
    """Who ran what, where and when. versions: of programs, "" where one is absent."""

    id: str
    started: str | None
    ended: str | None
    host: str
    command: tuple[str, ...]
    versions: dict[str, str]
    min_steps: Count
    exit_status: int


class WindowCounts(msgspec.Struct, frozen=True, kw_only=True, rename={"passed": "pass"}):
    """How many windows have each verdict."""

    fail: Count
    inconclusive: Count
    passed: Count


class Summary(msgspec.Struct, frozen=True, kw_only=True):
    """The worst verdict (None where nothing was judged), and how many there are.

    standin: whether anything was measured on the stand-in.
    """

    verdict: VerdictWord | None
    tests: Count
    windows: WindowCounts
    standin: bool


class Attempt(msgspec.Struct, frozen=True, kw_only=True):
    """One run of one test; a rerun is another one. windows: ids."""

    nodeid: str
    number: Count
    outcome: Outcome
    verdict: VerdictWord | None
    reason: str
    duration_s: Amount
    windows: tuple[str, ...]
    worker: str


class RecordedTest(msgspec.Struct, frozen=True, kw_only=True):
    """One test with the outcome and the verdict of its last attempt."""

    nodeid: str
    outcome: Outcome
    verdict: VerdictWord | None
    reason: str
    attempts: tuple[Attempt, ...]


class RecordedArtifact(msgspec.Struct, frozen=True, kw_only=True):
    """A file of a window. path: relative to the document."""

    path: str
    kind: str
    rank: str


class RecordedSpec(msgspec.Struct, frozen=True, kw_only=True):
    """What was asked of a window, as in `WindowSpec`; its thresholds stand in the judgements.

    trigger: as text. timeout: None where there is no limit.
    """

    name: str
    backend: Backend
    start_step: int | None
    num_steps: int | None
    delay: float
    duration: float | None
    settle: float
    activities: tuple[str, ...] | None
    profile_by_stage: bool
    profile_stages: tuple[str, ...] | None
    with_stack: bool
    record_shapes: bool
    merge_profiles: bool
    profile_prefix: str | None
    profile_id: str | None
    detailed_annotations: bool
    output_dir: str | None
    timeout: float | None
    whole_body: bool
    repeat: int | None
    trigger: str | None


class RecordedSpread(msgspec.Struct, frozen=True, kw_only=True):
    """The figures of one threshold over windows that were opened together.

    values: of each window in their order, None where one gives no figure.
    """

    threshold: Threshold
    group: str
    values: tuple[float | None, ...]
    min: float | None
    median: float | None
    max: float | None
    verdict: VerdictWord


class Repeats(msgspec.Struct, frozen=True, kw_only=True):
    """A window among those that it was opened with. count: as many were meant to be opened.

    typical: id of the one in the middle. own_verdict, own_reason: of this window alone.
    """

    count: Count
    typical: str
    own_verdict: VerdictWord
    own_reason: str
    spread: tuple[RecordedSpread, ...]


class StepCounts(msgspec.Struct, frozen=True, kw_only=True):
    """How many steps of a work group are compared, by stage, and why others are not.

    compared: None where the source tells no steps. assigned_share: of compute, in known steps.
    """

    group: str
    ranks: tuple[str, ...]
    compared: Count | None
    by_stage: dict[str, Count]
    seen: Count
    unmatched: Count
    cut: Count
    excluded: Count
    other_input: Count
    assigned_share: Share


class WindowSteps(msgspec.Struct, frozen=True, kw_only=True):
    """The steps of a window. settled: left out at its front."""

    per_rank: dict[str, Count]
    settled: Count
    groups: tuple[StepCounts, ...]


class KernelRow(msgspec.Struct, frozen=True, kw_only=True):
    """The calls of one kernel on one rank over the whole window."""

    rank: str
    name: str
    category: str
    count: Count
    total_ns: Count


class RecordedWindow(msgspec.Struct, frozen=True, kw_only=True):
    """One profile window: what was recorded, measured and judged.

    retry_of: id of the inconclusive window that this one repeats. repeat_of: id of the first of
    the windows that it was opened with; then `verdict` and `reason` are those over all of them.
    load: id of the load that ran meanwhile. decisive: index of the judgement that decided.
    source: None where there was nothing to read. partial: a trace is truncated.
    """

    id: str
    name: str
    backend: Backend
    nodeid: str
    attempt: Count
    retry_of: str | None
    repeat_of: str | None
    repeat_index: Count
    repeats: Repeats | None
    server: str
    standin: bool
    load: str | None
    spec: RecordedSpec
    opened: str
    closed: str
    duration_s: Amount
    state: Literal["complete", "incomplete", "failed"]
    state_reason: str
    log: tuple[str, ...]
    notes: tuple[str, ...]
    expected_ranks: tuple[str, ...]
    missing_ranks: tuple[str, ...]
    artifacts: tuple[RecordedArtifact, ...]
    gpus: tuple[GpuClocks, ...]
    verdict: VerdictWord
    reason: str
    pid_ranks: dict[str, str]
    gpu_ranks: dict[str, str]
    judgements: tuple[Judgement, ...]
    decisive: Count | None
    onset: RecordedOnset | None
    load_samples: tuple[LoadSeries, ...]
    source: str | None
    partial: bool
    ranks: tuple[str, ...]
    steps: WindowSteps
    findings: tuple[ImbalanceFinding, ...]
    stragglers: tuple[StragglerFinding, ...]
    table: tuple[KernelRow, ...]
    step_times: tuple[StepSeries, ...]
    kernels: tuple[KernelGroup, ...]
    strata: tuple[GroupStrata, ...]
    lanes: Lanes | None

    @property
    def deciding(self) -> Judgement | None:
        """The judgement that decided; None when there is none."""
        return None if self.decisive is None else self.judgements[self.decisive]

    def of_scope(self, scope: str, group: str | None = None) -> tuple[ImbalanceFinding, ...]:
        """The findings of a scope or category as a whole, of all work groups or of one."""
        return tuple(
            finding
            for finding in self.findings
            if finding.scope == scope and not finding.kernel and group in (None, finding.group)
        )


class LockedClock(msgspec.Struct, frozen=True, kw_only=True):
    """A GPU whose clocks were held."""

    uuid: str
    mhz: Count


class RecordedServer(msgspec.Struct, frozen=True, kw_only=True):
    """One server life. log: relative to the document. nsys: its version, "" without.

    started, ready_s (s until it was ready): None where somebody else started it.
    """

    key: str
    kind: Literal["sglang", "standin"]
    standin: bool
    attached: bool
    url: str
    command: tuple[str, ...]
    version: str
    model: str
    sizes: dict[str, int | bool | str]
    nsys: str
    started: str | None
    ready_s: Amount | None
    log: str
    left_behind: tuple[str, ...]
    locked_clocks: tuple[LockedClock, ...]


class RecordedLoad(msgspec.Struct, frozen=True, kw_only=True):
    """One load that ran against a server; figures as in `LoadResult`."""

    id: str
    nodeid: str
    attempt: Count
    server: str
    standin: bool
    started: str | None
    requested: Count
    completed: Count
    duration_s: Amount
    request_throughput: float | None
    output_throughput: float | None
    total_throughput: float | None
    concurrency: float | None
    ttft: Statistics
    tpot: Statistics
    itl: Statistics
    e2e: Statistics
    command: tuple[str, ...]
    warmed_up: bool
    cache_flushed: bool
    raw: dict[str, Any]


class Record(msgspec.Struct, frozen=True, kw_only=True):
    """What travels with the report of a test: its attempt, and what belongs to it.

    attempt: None where servers alone ended. problems: what could not be written, a line each.
    """

    attempt: Attempt | None
    windows: tuple[RecordedWindow, ...]
    servers: tuple[RecordedServer, ...]
    loads: tuple[RecordedLoad, ...]
    problems: tuple[str, ...]


class Results(msgspec.Struct, frozen=True, kw_only=True):
    """The document of a run, of which every view is made."""

    schema_version: Version
    run: Run
    summary: Summary
    tests: tuple[RecordedTest, ...]
    windows: tuple[RecordedWindow, ...]
    servers: tuple[RecordedServer, ...]
    loads: tuple[RecordedLoad, ...]


FORMAT = Version(major=1, minor=0)
NOTHING = Record(attempt=None, windows=(), servers=(), loads=(), problems=())
