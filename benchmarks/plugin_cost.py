"""What the plugin costs everybody who has it installed and does not use it.

    python benchmarks/plugin_cost.py

Makes two fresh virtual environments, one with pytest and one with the plugin as well, and
runs `pytest -p no:cacheprovider --co -q` of an empty project in each by turns. Prints the
median over the pairs of the ratio of wall times, and the heavy modules that were imported;
exit status 1 when the ratio is above the limit or there is any such module.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
COLLECT = ("-p", "no:cacheprovider", "--co", "-q")
HEAVY = (
    "httpx", "jsonschema", "psutil", "filelock", "numpy", "pandas", "scipy", "msgspec", "jinja2",
)  # fmt: skip
LIST_IMPORTED = f"""
import sys, pytest
pytest.main({list(COLLECT)!r})
assert "pytest_sglprof.plugin" in sys.modules, "the plugin is not loaded"
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
        without = environment(Path(folder) / "without", "pytest")
        with_plugin = environment(Path(folder) / "with", str(ROOT))
        pairs = [
            (collect(without, project), collect(with_plugin, project))
            for _ in range(options.pairs + 1)
        ][1:]  # the first pair writes the byte code
        heavy = imported(with_plugin, project)
    ratio = statistics.median(after / before for before, after in pairs)
    before, after = (statistics.median(times) * 1e3 for times in zip(*pairs, strict=True))
    print(f"without {before:.0f} ms, with {after:.0f} ms (medians of {len(pairs)})")
    print(f"ratio   {ratio:.3f} (median over the pairs, limit {options.limit:g})")
    print(f"heavy modules imported: {' '.join(heavy) or 'none'}")
    return int(ratio > options.limit or bool(heavy))


def environment(folder: Path, package: str) -> Path:
    """A new virtual environment with one package; its interpreter."""
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    python = folder / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "-qq", package], check=True)
    return python


def collect(python: Path, project: Path) -> float:
    """Seconds of one collection of the empty project."""
    start = time.perf_counter()
    done = subprocess.run(
        [python, "-m", "pytest", *COLLECT], cwd=project, env=plain_env(), capture_output=True
    )
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
