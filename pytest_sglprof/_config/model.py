"""Frozen values that several rooms hand to each other; no behaviour beyond naming them."""

from dataclasses import dataclass
from typing import Any, Literal, get_args

from pytest_sglprof._metrics import METRICS

Backend = Literal["torch", "nsys"]
LauncherName = Literal["sglang", "standin"]  # of a row of `_server.command.LAUNCHERS`
ServerKind = Literal[LauncherName, "auto"]
SERVER_KINDS: tuple[ServerKind, ...] = (*get_args(LauncherName), "auto")
STAGES = ("decode", "prefill", "mixed", "idle")  # of a step that a trace tells


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

    __module__ = "pytest_sglprof"

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

    __module__ = "pytest_sglprof"

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

    __module__ = "pytest_sglprof"

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
