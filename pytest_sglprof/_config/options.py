"""The table of options: command lines, the environment and `sglprof.toml` follow from it.

A row NAME is `--sglprof-NAME` of pytest, `--NAME` of the `sglprof` commands, `SGLPROF_NAME`
in the environment and `key` in `sglprof.toml`, as far as it has each of them. pytest has flags
only for what differs from one invocation to the next; the rest is set in TOML, in the
environment or by `--sglprof-set KEY=VALUE`.

A row with a key is a field of `Settings` with the same name; `python -m ci.schemas` writes the
key into the schema. Every pytest run imports this module, so it imports nothing heavy.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from pytest_sglprof._metrics import MIN_STEPS

PLUGIN_NAME = "sglprof-session"  # under which a run with --sglprof registers its hooks


class Option(NamedTuple):
    """One option.

    kind: what its value is: "flag", "text", "count" (whole, 0 or more), "positive" (whole, 1 or
    more), "repeat" (positive or "certain"), "size" (above 0), "share" (0 to 1), "regex", or
    "list" (may be repeated; in the environment one entry a line). key: the dotted key in
    sglprof.toml, "" for an option that a file cannot set. pytest, command: whether pytest, and
    whether any command, has a flag for it. choices: the allowed values of kind "text", empty
    for any.
    """

    name: str
    kind: str
    help: str
    key: str = ""
    metavar: str = ""
    choices: tuple[str, ...] = ()
    pytest: bool = True
    command: bool = False

    @property
    def flag(self) -> str:
        """`--output`, as commands have it."""
        return f"--{self.name.replace('_', '-')}"

    @property
    def pytest_flag(self) -> str:
        """`--sglprof-output`; the main switch is `--sglprof` itself."""
        return f"--sglprof-{self.flag[2:]}" if self.name != "enabled" else "--sglprof"

    @property
    def table(self) -> str:
        """The table of `key`: `output` of `output.dir`."""
        return self.key.partition(".")[0]

    @property
    def last_key(self) -> str:
        """The name of `key` in its table: `dir` of `output.dir`."""
        return self.key.partition(".")[2]

    @property
    def dest(self) -> str:
        """Name in pytest's `config.option`."""
        return f"sglprof_{self.name}"

    @property
    def env(self) -> str:
        """Name of the environment variable; the main switch is `SGLPROF`."""
        return f"SGLPROF_{self.name.upper()}" if self.name != "enabled" else "SGLPROF"


def is_on(text: object) -> bool:
    """True for the values that switch something on in the environment."""
    return str(text).lower() in ("1", "true", "yes", "on")


def shows_config(config: Any) -> bool:
    """`--sglprof-show-config`, or its environment variable."""
    import os

    return bool(config.getoption("sglprof_show_config")) or is_on(
        os.environ.get("SGLPROF_SHOW_CONFIG", "")
    )


OPTIONS: tuple[Option, ...] = (
    Option("enabled", "flag", "run the tests that use SGLang servers or profile windows"),
    Option(
        "config",
        "text",
        "configuration file (default: the nearest sglprof.toml, or pyproject.toml with "
        "[tool.sglprof], searched upward to the root of the repository)",
        metavar="FILE",
        command=True,
    ),
    Option(
        "set",
        "list",
        "set one key of the configuration, for example gate.min_steps=10; can be repeated",
        metavar="KEY=VALUE",
        command=True,
    ),
    Option("output", "text", "folder for the results (default: .sglprof)", "output.dir", "DIR"),
    Option(
        "keep",
        "text",
        "which windows keep their traces: failed (those that did not pass), all or none",
        "output.keep",
        choices=("failed", "all", "none"),
        pytest=False,
    ),
    Option(
        "runs",
        "positive",
        "how many runs the folder for results keeps; the oldest are removed (default: 10)",
        "output.runs",
        "N",
        pytest=False,
    ),
    Option(
        "max_gib",
        "size",
        "GiB that the folder for results may hold; the oldest runs are removed (default: 20)",
        "output.max_gib",
        "GIB",
        pytest=False,
    ),
    Option(
        "python",
        "text",
        "Python interpreter that has SGLang installed (default: this one)",
        "tools.python",
        "PYTHON",
    ),
    Option(
        "nsys",
        "text",
        "the nsys executable (default: the one on PATH)",
        "tools.nsys",
        "NSYS",
        command=True,
    ),
    Option(
        "executor",
        "text",
        "who reads the files, with the paths as the workers see them: dask://HOST:PORT, or a "
        "command for each task, command:srun -N1 -n1 {command} (default: processes here)",
        "tools.executor",
        "EXECUTOR",
        pytest=False,
        command=True,
    ),
    Option(
        "lock_clocks",
        "positive",
        "MHz at which the GPUs of each started server are held (default: clocks are left alone)",
        "gpu.lock_clocks",
        "MHZ",
        pytest=False,
    ),
    Option(
        "server",
        "text",
        "profile this running server instead of starting one; it is not stopped",
        metavar="URL",
    ),
    Option(
        "server_dir",
        "text",
        "folder that the running server and this machine share: its path, or where the two differ "
        "the path on the server's machine, a colon, the path here (default for a server on this "
        "machine: a folder of its own)",
        metavar="DIR|SERVER:LOCAL",
        command=True,
    ),
    Option(
        "server_ca",
        "text",
        "certificate of the running server, or of the authority that signed it, in PEM format "
        "(default: https is trusted by the usual authorities)",
        metavar="FILE",
        command=True,
    ),
    Option(
        "nsys_session",
        "text",
        "name or ID of the nsys session in which the server runs (default of record and watch: the "
        "only one that holds it)",
        metavar="NAME|ID",
        command=True,
    ),
    Option(
        "allow_inconclusive",
        "flag",
        "skip tests with an inconclusive verdict instead of failing them",
        "gate.allow_inconclusive",
    ),
    Option(
        "repeat",
        "repeat",
        "open each profile window that ends by itself N times and judge the median (default: 1), "
        'or "certain": until the verdict is certain, 2 to 8 times',
        "window.repeat",
        "N",
        pytest=False,
    ),
    Option(
        "min_steps",
        "count",
        f"minimum number of steps for a verdict (default: {MIN_STEPS}; 0: no minimum)",
        "gate.min_steps",
        "N",
        pytest=False,
        command=True,
    ),
    Option(
        "min_share",
        "share",
        "a limit on single kernels is ignored where they take a smaller share of compute time, "
        "0 to 1 (default: 0.01)",
        "gate.min_share",
        "SHARE",
        pytest=False,
        command=True,
    ),
    Option(
        "step_delimiter",
        "regex",
        "regular expression for the kernel that begins each step, for traces without step markers",
        "trace.step_delimiter",
        "REGEX",
        pytest=False,
        command=True,
    ),
    Option(
        "baselines",
        "text",
        "folder of baselines that server lives are compared with; a run writes there only with "
        "--sglprof-accept",
        "baseline.dir",
        "DIR",
        command=True,
    ),
    Option(
        "accept",
        "text",
        "at the end of the run, accept its server lives as baselines: new (of keys without a "
        "baseline) or all (also those that passed)",
        choices=("new", "all"),
    ),
    Option(
        "require_baseline",
        "flag",
        "a window without enough accepted lives is inconclusive instead of green",
        "baseline.require",
    ),
    Option(
        "min_age_days",
        "count",
        "compare only with lives that were recorded so many days before (default: 0)",
        "baseline.min_age_days",
        "DAYS",
        pytest=False,
    ),
    Option(
        "min_age_lives",
        "count",
        "compare without so many of the newest accepted lives (default: 0)",
        "baseline.min_age_lives",
        "N",
        pytest=False,
    ),
    Option(
        "confirm",
        "confirm",
        "how many further server lives a test gets where it looks slower than its baseline, "
        "0 to 3 (default: 3)",
        "baseline.confirm",
        "N",
        pytest=False,
    ),
    Option(
        "fail_after",
        "positive",
        "fail a regression at the Nth bad run in a row (default: 1)",
        "baseline.fail_after",
        "N",
        pytest=False,
    ),
    Option(
        "keep_lives",
        "positive",
        "how many accepted lives a baseline keeps; the oldest are dropped (default: 20)",
        "baseline.keep",
        "N",
        pytest=False,
        command=True,
    ),
    Option("show_config", "flag", "print each setting and where it was set, then stop"),
)
