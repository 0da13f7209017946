"""What the plugin costs everybody who has it installed and does not use it.

    python benchmarks/plugin_cost.py

Makes two fresh virtual environments that differ in the plugin only: the other one has its
dependencies, as the environment of an SGLang has anyway. Runs `pytest -p no:cacheprovider
--co -q` of an empty project in each by turns; prints the median over the pairs of the
ratio of wall times, and the heavy modules that were imported. Exit status 1 when the ratio
is above the limit or there is any such module.

A third environment has pytest alone. What the dependencies cost there is shown, not
judged: nearly all of it is the pytest plugin that anyio, which httpx needs, brings along.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
COLLECT = ("-p", "no:cacheprovider", "--co", "-q")
HEAVY = (
    "httpx", "jsonschema", "psutil", "filelock", "numpy", "pandas", "scipy", "msgspec", "jinja2",
)  # fmt: skip
LIST_IMPORTED = f"""
import sys, pytest
pytest.main({list(COLLECT)!r})
assert "pytest_sglprof._plugin.hooks" in sys.modules, "the plugin is not loaded"
print("imported:", *(name for name in {HEAVY!r} if name in sys.modules))
"""


def main() -> int:
    """Measures and prints; the exit status."""
    parser = argparse.ArgumentParser(description="Measure the cost of the installed plugin.")
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument("--limit", type=float, default=1.10)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        project = Path(folder) / "empty"
        project.mkdir()
        alone = environment(Path(folder) / "alone", "pytest")
        without = environment(Path(folder) / "without", str(ROOT))
        pip(without, "uninstall", "-y", "pytest-sglprof")
        with_plugin = environment(Path(folder) / "with", str(ROOT))
        # The first round writes the byte code.
        rounds = [
            measure((alone, without, with_plugin), project, turn)
            for turn in range(options.pairs + 1)
        ][1:]
        anyio_off = [collect(with_plugin, project, "-p", "no:anyio") for _ in rounds]
        heavy = imported(with_plugin, project)
    ratio = statistics.median(after / before for _, before, after in rounds)
    bare, before, after = (statistics.median(times) * 1e3 for times in zip(*rounds, strict=True))
    print(f"without {before:.0f} ms, with {after:.0f} ms (medians of {len(rounds)})")
    print(f"ratio   {ratio:.3f} (median over the pairs, limit {options.limit:g})")
    print(
        f"pytest alone {bare:.0f} ms; with the plugin, but anyio's switched off, "
        f"{statistics.median(anyio_off) * 1e3:.0f} ms"
    )
    print(f"heavy modules imported: {' '.join(heavy) or 'none'}")
    return int(ratio > options.limit or bool(heavy))


def measure(pythons: Sequence[Path], project: Path, turn: int) -> list[float]:
    """Seconds of each; every turn another one begins, so that no place has an advantage."""
    order = [(place + turn) % len(pythons) for place in range(len(pythons))]
    times = {place: collect(pythons[place], project) for place in order}
    return [times[place] for place in sorted(times)]


def environment(folder: Path, package: str) -> Path:
    """A new virtual environment with one package; its interpreter."""
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    python = folder / "bin" / "python"
    pip(python, "install", package)
    return python


def pip(python: Path, *words: str) -> None:
    """Runs pip of an environment, quietly."""
    subprocess.run([python, "-m", "pip", "-qq", *words], check=True)


def collect(python: Path, project: Path, *options: str) -> float:
    """Seconds of one collection of the empty project."""
    command = [python, "-m", "pytest", *COLLECT, *options]
    start = time.perf_counter()
    done = subprocess.run(command, cwd=project, env=plain_env(), capture_output=True)
    elapsed = time.perf_counter() - start
    assert done.returncode == 5, done.stdout + done.stderr  # pytest: no tests collected
    return elapsed


def imported(python: Path, project: Path) -> list[str]:
    """The heavy modules that a collection with the plugin imports."""
    done = subprocess.run(
        [python, "-c", LIST_IMPORTED], cwd=project, env=plain_env(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1].split()[1:]


def plain_env() -> dict[str, str]:
    """Ours without what changes how Python or pytest starts."""
    return {k: v for k, v in os.environ.items() if not k.startswith(("PYTEST_", "PYTHON", "COV"))}


if __name__ == "__main__":
    sys.exit(main())
