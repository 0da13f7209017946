"""The results document of a run, composed of what analysis, gate and report make.

`python -m ci.schemas` writes `schemas/results.schema.json` from these types. Readers ignore
keys that they do not know, so that a document of a newer minor version can be read.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from datetime import datetime, timezone
from typing import Annotated, Any, Literal, TypeVar, overload

import msgspec

from pytest_sglprof._analysis.budget import StepBudget
from pytest_sglprof._analysis.certainty import Amount, Count, Share
from pytest_sglprof._analysis.imbalance import ImbalanceFinding
from pytest_sglprof._analysis.straggler import StragglerFinding
from pytest_sglprof._analysis.strata import GroupStrata
from pytest_sglprof._analysis.sync import SyncFinding
from pytest_sglprof._baselines.records import LifeRecord
from pytest_sglprof._capture.recording import WindowCost
from pytest_sglprof._config.backends import Backend
from pytest_sglprof._config.model import LauncherName, Moment, Threshold
from pytest_sglprof._errors import SglprofError
from pytest_sglprof._metrics import MEASURED, VerdictWord
from pytest_sglprof._redact import HIDDEN, is_secret_name, redact_text
from pytest_sglprof._report.regression import RecordedRegression
from pytest_sglprof._report.series import KernelGroup, Lanes, StepSeries
from pytest_sglprof._server.nvml import GpuClocks
from pytest_sglprof._trace.torch.source_lines import SourceLine
from pytest_sglprof._verdict.judge import Judgement

# passed, failed, skipped, error, xfailed, xpassed, or what another plugin calls it: "retried".
Outcome = Annotated[str, msgspec.Meta(min_length=1)]
Statistics = dict[str, float | None]  # "mean", "median", "p90", "p95", "p99" -> ms


class Version(msgspec.Struct, frozen=True):
    """Of the document's format: a minor one adds, a major one changes what was there."""

    major: Count
    minor: Count


class Run(msgspec.Struct, frozen=True, kw_only=True):
    """Who ran what, where and when. versions: of programs, "" where one is absent.

    interrupted: why only a part is here; None for a run that ended, and in older documents.
    """

    id: str
    started: str | None
    ended: str | None
    host: str
    command: tuple[str, ...]
    versions: dict[str, str]
    min_steps: Count
    exit_status: int
    interrupted: str | None = None


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

    trigger, ring: as text. timeout: None where there is no limit.
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
    repeat: int | Literal["certain"] | None
    trigger: str | None
    max_time: float | None = None
    max_stall: float | None = None
    max_mib: float | None = None
    ring: str | None = None
    source_lines: bool | None = None
    roles: tuple[str, ...] | None = None


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

    compared: None where the source has no step markers. assigned_share: of compute, in known steps.
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
    """The steps of a window. settled: left out at its front.

    reasons: why steps are excluded (of any rank) -> number of these; 0 where only the server's log
    tells of it. None in older documents.
    """

    per_rank: dict[str, Count]
    settled: Count
    groups: tuple[StepCounts, ...]
    reasons: dict[str, Count] | None = None


class KernelRow(msgspec.Struct, frozen=True, kw_only=True):
    """The calls of one kernel on one rank over the whole window."""

    rank: str
    name: str
    category: str
    count: Count
    total_ns: Count


class RecordedSources(msgspec.Struct, frozen=True, kw_only=True):
    """The lines that launched the kernels of one rank, from a short window after a fail.

    window: id of that window, None where none was opened. lines: those with most time.
    reason: why there are none, "" if there are.
    """

    rank: str
    window: str | None
    lines: tuple[SourceLine, ...]
    reason: str


class WindowHead(msgspec.Struct, frozen=True, kw_only=True):
    """What is said of a window in a list of many: how it was recorded and judged.

    repeat_of: id of the first of the windows that it was opened with; then `verdict` and
    `reason` are those over all of them. load: id of the load that ran meanwhile.
    decisive: index of the judgement that decided. source: None where there was nothing to read.
    moment: where it lies, seen from the onset that opened the window `moment_of`, or "sources"
    after that one failed; only "at" is judged. Both are None without a trigger, and in older
    documents. role: of its server ("prefill", "decode", "embedding"), None for all of them.
    partial: a trace is truncated. run: what the traces say of the run that recorded them (`GPU`,
    `CUDA driver` …). nodes: rank -> the node that it ran on; None for a server of one machine.
    `run`, `cost` and `nodes` are None in older documents.
    """

    id: str
    name: str
    backend: Backend
    nodeid: str
    attempt: Count
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
    source: str | None
    partial: bool
    ranks: tuple[str, ...]
    steps: WindowSteps
    run: dict[str, str] | None = None
    moment: Moment | None = None
    moment_of: str | None = None
    cost: WindowCost | None = None
    nodes: dict[str, str] | None = None
    role: str | None = None

    @property
    def is_judged(self) -> bool:
        """False for the short windows beside another one, whose verdict says nothing."""
        return self.moment in (None, "at")

    @property
    def word(self) -> VerdictWord | Literal["measured"]:
        """What people read: the verdict, or "measured" where there was no limit to pass."""
        return MEASURED if self.verdict == "pass" and not self.judgements else self.verdict

    @property
    def deciding(self) -> Judgement | None:
        """The judgement that decided; None when there is none, whatever a file names."""
        return None if self.decisive is None else next(iter(self.judgements[self.decisive :]), None)


class RecordedWindow(WindowHead, frozen=True, kw_only=True):
    """One profile window: its head, and all that was measured.

    budgets: what steps are made of, by kind; None in older documents. syncs: of the groups of ranks
    that meet in collectives and have different input; None in older documents. around: what else
    was known of the load around it without a profiler; None without a trigger, and in older
    documents. regression: against accepted lives; None where nothing was compared. sources: None
    where no lines were asked for, and in older documents.
    """

    onset: RecordedOnset | None
    load_samples: tuple[LoadSeries, ...]
    findings: tuple[ImbalanceFinding, ...]
    stragglers: tuple[StragglerFinding, ...]
    table: tuple[KernelRow, ...]
    step_times: tuple[StepSeries, ...]
    kernels: tuple[KernelGroup, ...]
    strata: tuple[GroupStrata, ...]
    lanes: Lanes | None
    budgets: tuple[StepBudget, ...] | None = None
    syncs: tuple[SyncFinding, ...] | None = None
    regression: RecordedRegression | None = None
    around: LoadAround | None = None
    sources: RecordedSources | None = None

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

    started, ready_s (s until it was ready): None where somebody else started it. keeper_fault:
    how its keeper ended although nobody had asked it to; None where it did not.
    """

    key: str
    kind: LauncherName
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
    keeper_fault: str | None = None


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
    lives: what the attempt left of its server life. before: the attempts on the server lives before
    this one, which only together decide. repeated: earlier attempts that had no report.
    """

    attempt: Attempt | None
    windows: tuple[RecordedWindow, ...]
    servers: tuple[RecordedServer, ...]
    loads: tuple[RecordedLoad, ...]
    problems: tuple[str, ...]
    lives: tuple[LifeRecord, ...] = ()
    before: tuple[Record, ...] = ()
    repeated: tuple[Record, ...] = ()


class Results(msgspec.Struct, frozen=True, kw_only=True):
    """The document of a run, of which every view is made.

    windows: those of a large file are decoded each time that one is asked for.
    """

    schema_version: Version
    run: Run
    summary: Summary
    tests: tuple[RecordedTest, ...]
    windows: Sequence[RecordedWindow]
    servers: tuple[RecordedServer, ...]
    loads: tuple[RecordedLoad, ...]


FORMAT = Version(major=1, minor=2)
NOTHING = Record(attempt=None, windows=(), servers=(), loads=(), problems=())


# An onset and the load around a window, as a document holds them.


MAX_POINTS = 600  # of a rank in a document; a strip on a page is no wider
_Correlation = Annotated[float, msgspec.Meta(ge=-1.000001, le=1.000001)]
Measured = Literal["experts", "dp_tokens", "sync_wait"]
_Source = Annotated[str, msgspec.Meta(pattern="^(loads|log|metrics|kernels)$")]


class LoadAtOnset(msgspec.Struct, frozen=True, kw_only=True):
    """The load of one rank when an imbalance was declared: requests, and KV tokens held."""

    rank: str
    running: Amount
    waiting: Amount
    tokens: Amount | None


class RecordedOnset(msgspec.Struct, frozen=True, kw_only=True):
    """What opened a window; fields as in `_load.onset.Onset`, times as text.

    sentence: with what the trace says about it. correlation: as in `LoadJoin`.
    """

    time: str
    declared: str
    kind: str
    factor: Amount
    resolution_s: Amount
    source: _Source
    ranks: tuple[LoadAtOnset, ...]
    sentence: str
    correlation: _Correlation | None


class LoadSeries(msgspec.Struct, frozen=True, kw_only=True):
    """The load of one rank over time, one item of each list a moment. time: Unix time, s.

    token_ms: for how long a running request waited for a token, which without speculative
    decoding is the time of a decode step: running requests / tokens a second, ms. None in older
    documents.
    """

    rank: str
    source: _Source
    time: list[float]
    running: list[Count]
    waiting: list[Count]
    tokens: list[Count | None]
    token_ms: list[float | None] | None = None


class MetricSeries(msgspec.Struct, frozen=True, kw_only=True):
    """What a server measured of itself over time. time: Unix time, s.

    kind: "experts" and "dp_tokens" are λ = max / mean over the ranks; "sync_wait" is how long a
    DP rank's scheduler waited for the others before a pass, s, the mean of the passes between two
    answers. rank: "" for a figure of all ranks.
    """

    kind: Measured
    rank: str
    time: list[float]
    values: list[float]


class SampledRatios(msgspec.Struct, frozen=True, kw_only=True):
    """How much longer than its peers a rank computed, in the samples of `KernelImbalance`.

    time: Unix time, s. ratios: to the median of its peers; 1.0 is alike.
    """

    rank: str
    time: list[float]
    ratios: list[float]


class LoadAround(msgspec.Struct, frozen=True, kw_only=True):
    """What costs nothing, of the time before a window and shortly after it; and samples.

    log: load of each rank by its log, whatever source the trigger reads. sampled: all samples of
    the ranks' kernels that were taken until the window was opened.
    """

    log: tuple[LoadSeries, ...]
    metrics: tuple[MetricSeries, ...]
    sampled: tuple[SampledRatios, ...]


# Values as a stored document may hold them, and times as text.


T = TypeVar("T")


def storable(value: T) -> T:
    """`value` without secrets, and with None for each NaN or ±inf, which JSON cannot hold.

    Walks Structs, dataclasses, dicts, lists and tuples. What holds nothing of the kind comes
    back as it is, not copied: a window has millions of numbers. An interval (a field of that
    name) with an end that is not finite is None as a whole.
    """
    stored: T = _storable(value)
    return stored


def _storable(value: Any) -> Any:
    if isinstance(value, str):
        text = redact_text(value)
        return value if text == value else text
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, msgspec.Struct):
        changes = _changes(value, value.__struct_fields__)
        return msgspec.structs.replace(value, **changes) if changes else value
    if isinstance(value, list | tuple):
        if all(type(item) is int for item in value):
            return value
        items = [_storable(item) for item in value]
        same = all(new is old for new, old in zip(items, value, strict=True))
        return value if same else type(value)(items)
    if isinstance(value, dict):
        entries = {key: _storable_item(str(key), item) for key, item in value.items()}
        return value if all(entries[key] is item for key, item in value.items()) else entries
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        changes = _changes(value, tuple(field.name for field in dataclasses.fields(value)))
        return dataclasses.replace(value, **changes) if changes else value
    return value


def _changes(value: object, names: tuple[str, ...]) -> dict[str, Any]:
    changes = {}
    for name in names:
        old = getattr(value, name)
        new = _storable(old)
        if name.endswith("interval") and new is not None and None in new:
            new = None
        if new is not old:
            changes[name] = new
    return changes


def _storable_item(key: str, item: Any) -> Any:
    hidden = item and isinstance(item, str) and is_secret_name(key)
    return HIDDEN if hidden else _storable(item)


def unix_ns(text: str) -> int:
    """The Unix time in ns of what `utc` wrote. Raises `SglprofError` for any other text."""
    try:
        time = datetime.fromisoformat(text.replace("Z", "+00:00")).timestamp()
    except (ValueError, OverflowError) as error:
        raise SglprofError(
            f"a results document has {text[:40]!r} in the place of a time",
            expected="a time such as 2026-11-24T06:08:42.123Z",
        ) from error
    return round(time * 1000) * 10**6


@overload
def utc(moment: float | str) -> str: ...
@overload
def utc(moment: float | str | None) -> str | None: ...
def utc(moment: float | str | None) -> str | None:
    """Unix time in seconds as `2026-11-24T06:08:42.123Z`; text and None stay as they are."""
    if moment is None or isinstance(moment, str):
        return moment
    text = datetime.fromtimestamp(moment, timezone.utc).isoformat(timespec="milliseconds")
    return text.replace("+00:00", "Z")
