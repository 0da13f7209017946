"""What `record` and the keys of `watch` have in common: a window's options, folder and outcome."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytest_sglprof._errors import ExitStatus

if TYPE_CHECKING:
    from pytest_sglprof._config.load import Settings
    from pytest_sglprof._config.model import WindowSpec
    from pytest_sglprof._run.one_window import WindowRun

FOLDER = "sglprof-window"


def fresh_folder() -> Path:
    """The default folder of the next window."""
    return fresh(Path(FOLDER))


def window_of(
    settings: Settings,
    name: str,
    backend: str,
    *,
    steps: int | None = None,
    seconds: float | None = None,
) -> WindowSpec:
    """A window with the defaults and thresholds of the configuration, opened once.

    Without steps and seconds it is closed by hand.
    """
    from pytest_sglprof._config.windows import window_spec

    end: Mapping[str, Any] = {"num_steps": steps, "duration": seconds}
    spec = window_spec(
        settings,
        {"name": name, "backend": backend, **{key: value for key, value in end.items() if value}},
        origin="sglprof record",
    )
    if not (steps or seconds):
        spec = replace(spec, num_steps=None, duration=None)
    return replace(spec, repeat=1, delay=0.0, whole_body=False, trigger=None)


def outcome_lines(outcome: WindowRun) -> list[str]:
    """The ranks with the verdict and its reason, the cost, notes, and where everything is."""
    from pytest_sglprof._report.terminal import cost_lines, rank_table

    window = outcome.window
    notes = [f"note: {text}" for text in (*window.notes, *outcome.problems)]
    failed = [each for each in window.judgements if each.verdict == "fail"]
    if failed and outcome.status == ExitStatus.DONE:
        notes.append(
            "note: the limit is the default one, which decides no exit status: give your own in "
            "[[threshold]] of sglprof.toml"
        )
    where = outcome.page or outcome.folder
    lines = [*rank_table(window), *cost_lines([window]), *notes]
    return [*lines, f"{'page' if outcome.page else 'results'}: {where}"]


def fresh(path: Path) -> Path:
    """`path`, or the first of `path-2`, `path-3` … that does not exist with any file ending."""
    names = [path.name, *(f"{path.name}-{number}" for number in range(2, 1000))]
    existing = {entry.name.partition(".")[0] for entry in path.parent.glob(f"{path.name}*")}
    return path.with_name(next(name for name in names if name not in existing))
