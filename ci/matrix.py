"""`python -m ci.matrix [WORD…]`: runs the tests of `matrix.toml` in all of its environments.

Words pick environments: `3.10` or `highest` or `3.10 lowest-direct`. An interpreter that this
machine lacks is named and left out, so that the table in the end says what was run. Needs the
extra `release`; environments lie in `.matrix/`, and are made anew each time.
"""

from __future__ import annotations

import itertools
import subprocess
import sys
from pathlib import Path
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
UV = (sys.executable, "-m", "uv")
SHOWN = ("pytest", "pandas", "numpy", "msgspec", "pyarrow")


def main(words: list[str]) -> int:
    """1 if the tests of an environment failed."""
    matrix = tomllib.loads((ROOT / "ci" / "matrix.toml").read_text())
    versions, resolutions = matrix["python"], matrix["resolution"]
    if unknown := set(words) - {*versions, *resolutions}:
        sys.exit(f"not in the matrix: {', '.join(unknown)}; it has {versions} and {resolutions}")
    rows = []
    for version, resolution in itertools.product(
        [v for v in versions if v in words] or versions,
        [r for r in resolutions if r in words] or resolutions,
    ):
        print(f"\n== Python {version}, {resolution}", flush=True)
        rows.append((version, resolution, *_run(version, resolution, matrix["tests"])))
    print()
    for row in rows:
        print("{:6} {:14} {:14} {}".format(*row))
    return int(any(outcome == "FAILED" for _, _, outcome, _ in rows))


def _run(version: str, resolution: str, tests: list[str]) -> tuple[str, str]:
    """The outcome, and what it was reached with."""
    # A name such as python3.12 on PATH need not be one: pyenv has a stub of each.
    find = [*UV, "python", "find", "--no-python-downloads", "--no-project", version]
    interpreter = subprocess.run(find, capture_output=True, text=True)
    if interpreter.returncode:
        return "not run", "this machine has no such interpreter"
    python = ROOT / ".matrix" / f"{version}-{resolution}" / "bin" / "python"
    _do([*UV, "venv", "-q", "--clear", "-p", interpreter.stdout.strip(), python.parents[1]])
    # Wheels only: an old version is not "lowest" where it has to be compiled first.
    wheels = ["--only-binary", ":all:", "--no-binary", "pytest-sglprof"]
    install = [*UV, "pip", "install", "-q", "-p", python, "--resolution", resolution]
    _do([*install, *wheels, "-e", f"{ROOT}[test]"])
    command = [python, "-m", "pytest", "-q", "-n", "2", "--dist", "loadfile", *tests]
    passed = subprocess.run(command, cwd=ROOT).returncode == 0
    return "passed" if passed else "FAILED", _versions(python)


def _versions(python: Path) -> str:
    code = f"from importlib.metadata import version\nfor n in {SHOWN}: print(n, version(n))"
    listed = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True)
    return ", ".join(listed.stdout.splitlines())


def _do(command: list[Any]) -> None:
    subprocess.run(command, check=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
