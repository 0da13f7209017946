"""The one table of options: command lines, environment and `sglprof.toml` follow from it.

A row NAME is `--sglprof-NAME` of pytest, `--NAME` of the `sglprof` commands, `SGLPROF_NAME`
in the environment and `key` in `sglprof.toml`, as far as the row has each. pytest has flags
only for what differs from one invocation to the next; the rest is TOML, the environment and
`--sglprof-set KEY=VALUE`. Imported by every pytest run, so it imports nothing.
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple

from pytest_sglprof._errors import SettingsError
from pytest_sglprof._metrics import MIN_STEPS

PLUGIN_NAME = "sglprof-session"  # under which a run with --sglprof registers its hooks


class Option(NamedTuple):
    """One option.

    kind: what its value is: "flag", "text", "count" (0 or more), "share" (0 to 1), "regex",
    or "list" (may be given again; the environment has one entry a line). key: the dotted key
    of sglprof.toml, "" for what no file can say. pytest, command: whether the plugin, and
    whether a command, has a flag for it. choices apply to text.
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
    def dest(self) -> str:
        """Name in pytest's `config.option`."""
        return f"sglprof_{self.name}"

    @property
    def env(self) -> str:
        """Name of the environment variable; the main switch is `SGLPROF`."""
        return f"SGLPROF_{self.name.upper()}" if self.name != "enabled" else "SGLPROF"


def is_on(text: object) -> bool:
    """True for the texts by which the environment switches something on."""
    return str(text).lower() in ("1", "true", "yes", "on")


def shows_config(config: Any) -> bool:
    """`--sglprof-show-config`, or its environment variable."""
    import os

    return bool(config.getoption("sglprof_show_config")) or is_on(
        os.environ.get("SGLPROF_SHOW_CONFIG", "")
    )


OPTIONS: tuple[Option, ...] = (
    Option("enabled", "flag", "run the tests that use SGLang servers and profile windows"),
    Option(
        "config",
        "text",
        "configuration file (default: the nearest sglprof.toml, or pyproject.toml with "
        "[tool.sglprof], upward to the repository's root)",
        metavar="FILE",
        command=True,
    ),
    Option(
        "set",
        "list",
        "set one key of the configuration, such as gate.min_steps=10; may be given again",
        metavar="KEY=VALUE",
        command=True,
    ),
    Option("output", "text", "folder for results (default: .sglprof)", "output.dir", "DIR"),
    Option(
        "keep",
        "text",
        "windows whose traces stay on disk (default: failed)",
        "output.keep",
        choices=("failed", "all", "none"),
        pytest=False,
    ),
    Option(
        "python",
        "text",
        "interpreter that has SGLang installed (default: this one)",
        metavar="PYTHON",
    ),
    Option("nsys", "text", "the nsys command (default: from PATH)", metavar="NSYS", command=True),
    Option(
        "server",
        "text",
        "profile this running server instead of starting one; it is never stopped",
        metavar="URL",
    ),
    Option(
        "server_dir",
        "text",
        "a folder that the running server can write and we can read, as SERVER:LOCAL paths",
        metavar="SERVER:LOCAL",
        command=True,
    ),
    Option(
        "nsys_session",
        "text",
        "name of the nsys session that the running server is in",
        metavar="NAME",
        command=True,
    ),
    Option(
        "allow_inconclusive",
        "flag",
        "skip a test with an inconclusive verdict; never pass it",
        "gate.allow_inconclusive",
    ),
    Option(
        "repeat",
        "count",
        "open each profile window that ends by itself N times and judge the median (default: 1)",
        "window.repeat",
        "N",
        pytest=False,
    ),
    Option(
        "min_steps",
        "count",
        f"fewest steps that a verdict needs (default: {MIN_STEPS}; 0: none)",
        "gate.min_steps",
        "N",
        pytest=False,
        command=True,
    ),
    Option(
        "min_share",
        "share",
        "a kernel below this share of compute cannot fail, 0 to 1 (default: 0.01)",
        "gate.min_share",
        "SHARE",
        pytest=False,
        command=True,
    ),
    Option(
        "step_delimiter",
        "regex",
        "the kernel that begins a step, for traces without step markers",
        "trace.step_delimiter",
        "REGEX",
        pytest=False,
        command=True,
    ),
    Option("show_config", "flag", "print the effective settings with their origins"),
)


# Regular expressions that users write.


def compiled(
    expression: str,
    what: str,
    *,
    expected: str = "a Python regular expression that is searched in full kernel names",
    hint: str = "escape what is meant literally, for example \\( and \\[",
) -> re.Pattern[str]:
    """Compiles `expression`; `SettingsError` says that `what` is none, and why."""
    try:
        return re.compile(expression)
    except re.error as error:
        raise SettingsError(
            f"{what} is no regular expression: {error}", expected=expected, hint=hint
        ) from error
