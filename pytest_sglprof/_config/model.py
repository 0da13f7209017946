"""Frozen values that several rooms hand to each other; no behaviour beyond naming them."""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pytest_sglprof._metrics import METRICS

Backend = Literal["torch", "nsys"]
ServerKind = Literal["sglang", "standin", "auto"]
VerdictWord = Literal["pass", "fail", "inconclusive"]
WORST_FIRST: tuple[VerdictWord, ...] = ("fail", "inconclusive", "pass")
SERVER_KINDS: tuple[ServerKind, ...] = ("sglang", "standin", "auto")
STAGES = ("decode", "prefill", "mixed", "idle")  # of a step that a trace tells


def worst_word(words: Container[str | None]) -> VerdictWord | None:
    """The word that decides among several; None where there is none."""
    return next((word for word in WORST_FIRST if word in words), None)


@dataclass(frozen=True)
class ServerSpec:
    """How to start one server. Durations in seconds.

    kind: "sglang", "standin", or "auto" (SGLang where it is installed, else the stand-in).
    args: passed to SGLang as they are. standin_args: passed to the stand-in only.
    env: added to the server's environment. secrets: environment variables of the
    server whose values come from this process's environment under the same name; they
    never stand on a command line or in nsys's environment.
    api_key_env / admin_api_key_env: names of the environment variables of *this*
    process that hold the server's keys ("" for none).
    nsys: start it under ``nsys profile --start-later``. nsys_args: more options for that.
    gpus: device indices to lease ("all" visible ones, or a tuple). lock_clocks: MHz at which
    their clocks are held while it lives; 0 leaves them alone.
    """

    name: str = "default"
    kind: ServerKind = "sglang"
    model_path: str = ""
    args: tuple[str, ...] = ()
    standin_args: tuple[str, ...] = ()
    env: tuple[tuple[str, str], ...] = ()
    secrets: tuple[str, ...] = ()
    api_key_env: str = ""
    admin_api_key_env: str = ""
    python: str = ""
    nsys: bool = False
    nsys_args: tuple[str, ...] = ()
    gpus: Literal["all"] | tuple[int, ...] = "all"
    lock_clocks: int = 0
    port: int | None = None
    ready_timeout: float = 1800.0
    stop_timeout: float = 60.0

    @property
    def key(self) -> str:
        """Identifies one server life: tests with equal keys share a server."""
        return f"{self.name}+nsys" if self.nsys else self.name


@dataclass(frozen=True)
class Threshold:
    """One limit. A verdict fails when `metric` of `scope` is worse than `limit`.

    metric: a name of `metrics.METRICS`; for most of them more is worse.
    scope: "compute", "communication", "all", or a category (`moe`, `gemm`, ...).
    kernel: a regular expression over normalised kernel names, instead of a scope.
    stage: one of `STAGES`, or "" (all steps together).
    origin: where it was set, for messages ("marker", "sglprof.toml", "default", ...).
    """

    metric: str = "slowdown"
    limit: float = 1.10
    scope: str = "compute"
    kernel: str = ""
    stage: str = ""
    origin: str = "default"

    @property
    def identity(self) -> tuple[str, str, str, str]:
        """A threshold replaces an earlier one of the same identity."""
        return (self.scope, self.kernel, self.stage, self.metric)

    def describe(self) -> str:
        """`slowdown of moe in decode <= 1.2`."""
        sign = ">=" if METRICS[self.metric].better == "higher" else "<="
        what = f"kernel /{self.kernel}/" if self.kernel else self.scope
        stage = f" in {self.stage}" if self.stage else ""
        return f"{self.metric} of {what}{stage} {sign} {self.limit:g}"


@dataclass(frozen=True)
class WindowSpec:
    """What a profile window records and when. Durations in seconds, counts in steps.

    num_steps: closes after so many forward passes (None: `duration` or by hand).
    start_step: absolute step of the server's own counter; see docs/windows.md before use.
    delay: waits before opening. duration: closes after so long. settle: dropped from the
    front of the window before measuring. timeout: limit for opening, filling and
    closing together. output_dir: a folder on the *server's* machine.
    whole_body: profile all of the test's body instead of a steady part of it.
    repeat: opened so many times, and judged over all of them (None: as `window.repeat`
    of the configuration says, where it can be repeated).
    trigger: opens the window instead of steady load (`analysis.triggers`, or a callable).
    Names and defaults of the rest are those of SGLang's `/start_profile`.
    """

    name: str = "window"
    backend: Backend = "torch"
    start_step: int | None = None
    num_steps: int | None = None
    delay: float = 0.0
    duration: float | None = None
    settle: float = 0.0
    activities: tuple[str, ...] | None = None
    profile_by_stage: bool = False
    profile_stages: tuple[str, ...] | None = None
    with_stack: bool = False
    record_shapes: bool = False
    merge_profiles: bool = False
    profile_prefix: str | None = None
    profile_id: str | None = None
    detailed_annotations: bool = True
    output_dir: str | None = None
    timeout: float = 300.0
    whole_body: bool = False
    repeat: int | None = None
    trigger: Any = None
    thresholds: tuple[Threshold, ...] = ()


@dataclass(frozen=True)
class AcceptLength:
    """Mean tokens a request that speculative decoding accepted in the passes before `time`.

    time: Unix time, s. dp: the replica that logged it, None where there is one.
    """

    time: float
    dp: int | None
    length: float


@dataclass(frozen=True)
class ServerFacts:
    """What the server's log tells of a window's forward passes.

    rebalances: (start, end) of each rebalance of experts, Unix time, s, not overlapping.
    captures: how often a capture of graphs began. graph_batches: batch sizes, ascending, for
    which there are decode graphs; a smaller batch is padded to the next one.
    """

    rebalances: tuple[tuple[float, float], ...] = ()
    accepted: tuple[AcceptLength, ...] = ()
    captures: int = 0
    graph_batches: tuple[int, ...] = ()


@dataclass(frozen=True)
class GpuClocks:
    """The GPU of one rank during a window.

    median_sm_mhz: of its SM clock, MHz. power_limit_w: W, None where it has none. throttled:
    slowed by heat or an external power brake; a power cap is normal and does not count.
    reason: "thermal", "power brake", both, or "". throttled_share: of the readings, 0 to 1.
    """

    rank: str
    uuid: str
    median_sm_mhz: float
    power_limit_w: float | None
    throttled: bool
    reason: str = ""
    throttled_share: float = 0.0


@dataclass(frozen=True, slots=True)  # hundreds of thousands are kept
class LoadSample:
    """What one DP rank had to do at one moment, as the server told it.

    time: Unix time, s. rank: label (`DP1`, `DP0 PP1`); "" where the server logs no DP tag,
    since there is one DP rank. running, waiting: requests. tokens: KV tokens held, None
    where the source leaves it out (prefill lines). token_usage: share of the KV cache, 0 to
    1. throughput: generated tokens / s, None of a prefill line. iteration: the rank's own
    forward pass, None where it is not told. source: "log" or "loads".
    """

    time: float
    rank: str
    running: int
    waiting: int
    tokens: int | None = None
    token_usage: float | None = None
    throughput: float | None = None
    iteration: int | None = None
    source: str = "log"


@dataclass(frozen=True, slots=True)
class BalanceSample:
    """A balance that the server measures itself. factor: λ = max / mean, 1.0 is perfect.

    time: Unix time, s. kind: "experts" (tokens of the GPUs that hold experts; the server
    tells mean / max, its "balancedness") or "dp_tokens" (tokens of the DP ranks in a step
    under DP attention). iteration: forward pass, where told. source: "log" or "metrics".
    """

    time: float
    rank: str
    kind: Literal["experts", "dp_tokens"]
    factor: float
    iteration: int | None = None
    source: str = "log"


@dataclass(frozen=True)
class Artifact:
    """One file that a window left. kind: "torch", "nsys-rep", "sqlite", "parquet"."""

    path: Path
    kind: str
    rank: str = ""


@dataclass(frozen=True)
class WindowCapture:
    """A window after it was closed: what is there, and what is not.

    state: "complete", or "incomplete" (closed, but something is missing), or "failed"
    (nothing to read). reason: why it is not complete. opened, closed: Unix time, s.
    expected_ranks / missing_ranks: labels. pid_ranks: pid of each scheduler at window
    time -> rank label, which is the only trace of the rank in an nsys report.
    is_still_open: the profiler could not be stopped, so a teardown has to try again.
    """

    window_id: str
    spec: WindowSpec
    state: Literal["complete", "incomplete", "failed"]
    opened: float
    closed: float
    artifacts: tuple[Artifact, ...] = ()
    expected_ranks: tuple[str, ...] = ()
    missing_ranks: tuple[str, ...] = ()
    pid_ranks: Mapping[int, str] = field(default_factory=dict)
    gpu_ranks: Mapping[int, str] = field(default_factory=dict)
    reason: str = ""
    log: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    facts: ServerFacts = ServerFacts()
    gpus: tuple[GpuClocks, ...] = ()
    is_still_open: bool = False


@dataclass(frozen=True)
class LoadResult:
    """What the load driver measured. Times in ms, rates per second, `duration` in s.

    requested, completed: numbers of requests. ttft, tpot, itl, e2e: statistic name
    ("mean", "median", "p90", "p95", "p99") -> ms. A figure that the driver did not give,
    or gave as infinite, is None. raw: the driver's own record, redacted. started: Unix time in
    s at which the driver of the measured load was started; None for a record read elsewhere.
    """

    requested: int
    completed: int
    duration: float
    request_throughput: float | None
    output_throughput: float | None
    total_throughput: float | None
    concurrency: float | None
    ttft: Mapping[str, float | None]
    tpot: Mapping[str, float | None]
    itl: Mapping[str, float | None]
    e2e: Mapping[str, float | None]
    command: tuple[str, ...] = ()
    warmed_up: bool = True
    cache_flushed: bool = True
    raw: Mapping[str, Any] = field(default_factory=dict)
    started: float | None = None
