"""The plugin's options: one table from which command line, environment and ini follow.

Each option is `--sglprof-NAME`, `SGLPROF_NAME` in the environment and `sglprof_NAME` in the
ini file. Values are resolved in that order; `Settings` knows where each one came from.
Imported by every pytest run, so it imports nothing heavy.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from pytest_sglprof.metrics import MIN_STEPS

PLUGIN_NAME = "sglprof-session"  # under which a run with --sglprof registers its hooks


class Option(NamedTuple):
    """One option. kind: "flag", "text", "path", "int"; choices apply to text."""

    name: str
    kind: str
    help: str
    choices: tuple[str, ...] = ()
    metavar: str = ""
    ini: bool = True

    @property
    def flag(self) -> str:
        """`--sglprof-output`; the main switch is `--sglprof` itself."""
        return f"--sglprof-{self.name.replace('_', '-')}" if self.name != "enabled" else "--sglprof"

    @property
    def dest(self) -> str:
        """Name in `config.option` and in the ini file."""
        return f"sglprof_{self.name}"

    @property
    def env(self) -> str:
        """Name of the environment variable; the main switch is `SGLPROF`."""
        return f"SGLPROF_{self.name.upper()}" if self.name != "enabled" else "SGLPROF"


def is_on(text: object) -> bool:
    """True for the texts by which the environment and ini files switch something on."""
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
        "path",
        "configuration file (default: the nearest sglprof.toml, from the tests up to rootdir, "
        "then [tool.sglprof] in rootdir's pyproject.toml)",
        metavar="FILE",
    ),
    Option("output", "path", "folder for results (default: .sglprof)", metavar="DIR"),
    Option(
        "keep",
        "text",
        "windows whose traces stay on disk (default: failed)",
        choices=("failed", "all", "none"),
    ),
    Option(
        "python",
        "text",
        "interpreter that has SGLang installed (default: this one)",
        metavar="PYTHON",
    ),
    Option("nsys", "text", "the nsys command (default: from PATH)", metavar="NSYS"),
    Option(
        "server",
        "text",
        "profile this running server instead of starting one; it is never stopped",
        metavar="URL",
        ini=False,
    ),
    Option(
        "server_dir",
        "text",
        "for --sglprof-server: a folder that the server can write and we can read, "
        "as SERVER:LOCAL paths",
        metavar="SERVER:LOCAL",
        ini=False,
    ),
    Option(
        "nsys_session",
        "text",
        "for --sglprof-server: name of the nsys session that the server runs in",
        metavar="NAME",
        ini=False,
    ),
    Option("allow_inconclusive", "flag", "skip a test with an inconclusive verdict; never pass it"),
    Option(
        "retry_inconclusive",
        "int",
        "run the body of an inconclusive test again, on the warm server, up to N times",
        metavar="N",
    ),
    Option(
        "repeat",
        "int",
        "open each profile window N times and judge the median of the windows (default: 1)",
        metavar="N",
    ),
    Option(
        "min_steps",
        "int",
        f"fewest steps that a verdict needs (default: {MIN_STEPS})",
        metavar="N",
    ),
    Option("show_config", "flag", "print the effective settings with their origins", ini=False),
)
