"""What a user asks for: a server, a threshold, a window. Values that several rooms share."""

from dataclasses import dataclass
from typing import Any, Final, Literal, get_args

from pytest_sglprof._config.backends import Backend
from pytest_sglprof._metrics import METRICS

# Of a row of `_server.command.LAUNCHERS`; a router is that of a deployment.
LauncherName = Literal["sglang", "standin", "router"]
ServerKind = Literal[LauncherName, "auto"]
NodeLauncher = Literal["local", "slurm", "command"]  # of a row of `_server.nodes.NODE_LAUNCHERS`
NODE_LAUNCHERS = get_args(NodeLauncher)
ServerEntry = Literal["", "serve", "launch_server"]  # "": the first that the interpreter has
SERVER_ENTRIES = get_args(ServerEntry)[1:]
SERVER_KINDS: tuple[ServerKind, ...] = ("sglang", "standin", "auto")  # of a server alone
MemberRole = Literal["prefill", "decode"]
ROLES: tuple[MemberRole, ...] = get_args(MemberRole)  # of a deployment's servers, as they start
Across = Literal["", "peers", "sync"]  # who is compared; "": peers, else sync if nobody has any
ACROSS = get_args(Across)[1:]
# Of a window, seen from the onset that opened one; "sources": after a fail, with stacks.
Moment = Literal["before", "at", "after", "sources"]
STAGES = ("decode", "prefill", "mixed", "idle")  # of the steps in a trace


@dataclass(frozen=True)
class ServerSpec:
    """How to start one server. Durations in seconds.

    kind: "sglang", "standin", or "auto" (SGLang if it is installed, else the stand-in).
    entry: "serve" (`sglang serve`) or "launch_server" (`python -m sglang.launch_server`); "" for
    the one that the interpreter has and that takes these arguments.
    args: options of SGLang. standin_args: options of the stand-in only.
    env: added to the server's environment. secrets: names of environment variables that the
    server gets from this process; they never appear on a command line or in the environment
    of nsys. api_key_env, admin_api_key_env: names of the environment variables of *this*
    process that hold the server's keys ("" for none). python: interpreter that has SGLang.
    nsys: start the server under ``nsys profile --start-later``. nsys_args: further options of
    nsys. gpus: device indices to lease, or "all" visible ones. lock_clocks: MHz at which their
    clocks are held while the server lives; 0 leaves them alone.
    nodes: how many nodes it spans, or their names, the first node first. launcher: how a process is
    started on one of them. launcher_args: further options of `srun` or `salloc`. node_command: of
    launcher "command", the words that run ``{command}`` (or, as one word, ``{quoted}``) on
    ``{node}``, number ``{rank}``; or a function that returns these words for (specification, node,
    number, words of the command).
    url: of a running server, which is attached to instead; server_dir: (a folder on its machine,
    the same folder here); server_ca: file of the certificate of its https; nsys_session: the name
    of the session that it is in.
    members: of a deployment, whose router this is: (role, name of the server), as they start.
    """

    __module__ = "pytest_sglprof"

    name: str = "default"
    kind: ServerKind = "sglang"
    entry: ServerEntry = ""
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
    nodes: int | tuple[str, ...] = 1
    launcher: NodeLauncher = "local"
    launcher_args: tuple[str, ...] = ()
    node_command: Any = None
    url: str = ""
    server_dir: tuple[str, str] | None = None
    server_ca: str = ""
    nsys_session: str = ""
    members: tuple[tuple[MemberRole, str], ...] = ()

    @property
    def key(self) -> str:
        """Tests whose specifications have equal keys share one server life."""
        return f"{self.name}+nsys" if self.nsys else self.name


@dataclass(frozen=True)
class Member:
    """A server of a deployment. label: "prefill", or "decode-2" where the role has several."""

    role: MemberRole
    label: str
    spec: ServerSpec


@dataclass(frozen=True)
class Threshold:
    """One limit. The verdict is fail if `metric` of `scope` is worse than `limit`.

    metric: a name in `METRICS`; for most of them more is worse.
    scope: "compute", "communication", "all", or a category (`moe`, `gemm`, ...).
    kernel: a regular expression over normalised kernel names, instead of a scope.
    stage: one of `STAGES`, or "" for all steps together.
    Metrics of whole steps (`idle_share`, `pass_wall`, `sync_lost_share`) leave scope and kernel as
    they are; those of the load driver (`ttft_p99`, …) also the stage. The scope of `regression` may
    also be `pass_wall`, `idle_share` or a figure of the load driver.
    across: who is compared: "peers", the ranks with the same input; "sync", all that meet in
    collectives, at equal work; "" for peers, or for sync where no rank has a peer.
    origin: where it was set, for messages ("marker", "sglprof.toml", "default", ...).
    min_us: of `regression`: it fails only if it is also slower by so many microseconds a step.
    role: of servers with this role in a deployment ("prefill", "decode"), "" for all servers.
    """

    __module__ = "pytest_sglprof"

    metric: str = "slowdown"
    limit: float = 1.05
    scope: str = "compute"
    kernel: str = ""
    stage: str = ""
    origin: str = "default"
    across: Across = ""
    min_us: float = 0.0
    role: str = ""

    @property
    def identity(self) -> tuple[str, str, str, str, str, str]:
        """A threshold replaces an earlier one with the same identity."""
        across = METRICS[self.metric].across or self.across
        return (self.role, self.scope, self.kernel, self.stage, self.metric, across)

    def describe(self) -> str:
        """`slowdown of moe in decode across sync <= 1.2`."""
        metric = METRICS[self.metric]
        sign = ">=" if metric.better == "higher" else "<="
        what = f"kernel /{self.kernel}/" if self.kernel else self.scope
        what = "steps" if metric.is_of_whole_steps else what
        what = "the load" if metric.of == "load" else what
        stage = f" in {self.stage}" if self.stage else ""
        across = f" across {self.across}" if self.across else ""
        least = f" and {self.min_us:g} µs a step" if self.min_us else ""
        role = f" of {self.role} servers" if self.role else ""
        return f"{self.metric} of {what}{stage}{across}{role} {sign} {self.limit:g}{least}"


CERTAIN: Final = "certain"  # of `repeat`: until the verdict is certain
MOST_WINDOWS = 8  # that are opened until it is


@dataclass(frozen=True)
class WindowSpec:
    """What a profile window records and when. Durations in seconds.

    num_steps: number of steps after which it closes (None: `duration`, or by hand).
    start_step: step of the server's counter at which it starts; read docs/windows.md first.
    delay: time to wait before it opens. duration: time after which it closes. settle: time
    that is dropped from its front before measuring. timeout: limit for opening, recording and
    closing together. output_dir: a folder on the *server's* machine.
    whole_body: profile the whole body of the test instead of a steady part of it.
    repeat: how many times it is opened, to be judged over all of them (None: `window.repeat`
    of the configuration, if it can be repeated); "certain": until the verdict is not
    inconclusive, 2 to 8 times. max_time: no more windows are opened after that, from the first
    opening on.
    max_stall, max_mib: it gets fewer steps or seconds where it would make serving stand still for
    longer (s), or write more (MiB); see `_run.cost`.
    source_lines: after a fail, while the load goes on, another window of 3 steps is recorded with
    Python stacks, for the lines that launched the kernels of the slow rank.
    roles: of the servers of a deployment on which it is opened, each with a window of its own
    (empty: on all).
    trigger: opens the window instead of steady load: a trigger of `pytest_sglprof`, or a
    callable. The other names and defaults are those of SGLang's `/start_profile`.
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
    repeat: int | Literal["certain"] | None = None
    max_time: float | None = None
    max_stall: float | None = None
    max_mib: float | None = None
    source_lines: bool = False
    roles: tuple[MemberRole, ...] = ()
    trigger: Any = None
    ring: Any = None
    thresholds: tuple[Threshold, ...] = ()
