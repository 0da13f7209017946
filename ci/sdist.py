"""`python -m ci.sdist [PYTEST OPTION…]`: builds what is released, and tests that.

Builds the sdist and, from it, the wheel; checks both; installs the wheel into a new
environment and runs the tests of the unpacked sdist there, with no source of the package
beside them. Needs the extra `release`. Without options, `TESTS` run; `tests` runs all.
"""

from __future__ import annotations

import subprocess
import sys
import tarfile
import tempfile
import zipfile
from email.parser import Parser
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
# What depends on the place of the package: commands, files of the package, whole runs.
TESTS = (
    "tests/unit/ci",
    "tests/unit/report",
    "tests/integration/cli/test_main.py",
    "tests/integration/plugin/test_runs.py",
)


def main(options: list[str]) -> int:
    """The exit status of the tests; leaves with that of the step before which failed."""
    with tempfile.TemporaryDirectory(prefix="sdist-") as folder:
        place = Path(folder)
        sdist, wheel = _build(place / "dist")
        with tarfile.open(sdist) as archive:
            archive.extractall(place, filter="data")
        unpacked = place / sdist.name.removesuffix(".tar.gz")
        _check_sdist(unpacked)
        _check_wheel(wheel)
        python = _install(wheel, place / "venv")
        (unpacked / "pytest_sglprof").rename(place / "source")
        pytest = [python, "-m", "pytest", *(options or [*TESTS, "-n", "2", "--dist", "loadfile"])]
        return subprocess.run(pytest, cwd=unpacked, check=False).returncode


def _build(folder: Path) -> tuple[Path, Path]:
    _run(sys.executable, "-m", "uv", "build", "--quiet", "--out-dir", folder, ROOT)
    (sdist,), (wheel,) = folder.glob("*.tar.gz"), folder.glob("*.whl")
    _run(sys.executable, "-m", "twine", "check", "--strict", sdist, wheel)
    return sdist, wheel


def _check_sdist(unpacked: Path) -> None:
    """Whoever has the sdist has every file of the repository."""
    listed = subprocess.run(
        ["git", "-c", "safe.directory=*", "ls-files"], cwd=ROOT, capture_output=True, text=True
    )
    missing = [name for name in listed.stdout.splitlines() if not (unpacked / name).is_file()]
    if missing:
        sys.exit(f"the sdist lacks {', '.join(missing)}")


def _check_wheel(wheel: Path) -> None:
    """The metadata names the licences of all that is inside, and holds their texts."""
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        info = next(name.partition("/")[0] for name in names if name.endswith("/METADATA"))
        metadata = Parser().parsestr(archive.read(f"{info}/METADATA").decode())
    files = metadata.get_all("License-File", [])
    missing = [file for file in files if f"{info}/licenses/{file}" not in names]
    if metadata["License-Expression"] != "Apache-2.0 AND MIT" or len(files) < 2 or missing:
        sys.exit(f"licences of the wheel: {metadata['License-Expression']}, {files}")


def _install(wheel: Path, folder: Path) -> Path:
    _run(sys.executable, "-m", "uv", "venv", "--quiet", "--python", sys.executable, folder)
    python = folder / "bin" / "python"
    install = ["-m", "uv", "pip", "install", "--quiet", "--python", python]
    _run(sys.executable, *install, f"pytest-sglprof[test] @ {wheel.as_uri()}")
    return python


def _run(*command: Any) -> None:
    print("+", *command, flush=True)
    if status := subprocess.run([str(word) for word in command], check=False).returncode:
        sys.exit(status)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
