"""Installs what the real-server suites need, and prints the environment that finds it.

    eval "$(python3 ci/real_env.py)"

prints `export` lines for SGLPROF_REAL_PYTHON (an interpreter that has SGLang),
SGLPROF_REAL_MODELS (a folder of tiny models), SGLPROF_NSYS, SGLPROF_ROUTER_PYTHON (an
interpreter that has sglang-router; `router` alone installs only that) and SGLPROF_MOONCAKE (a
PYTHONPATH with which SGLang sends its KV cache over TCP). What cannot be installed
gets no line but a reason on standard error; the suites then skip with it, or fail where
SGLPROF_REQUIRE_REAL is set. Needs only the standard library.

Everything is kept in `$XDG_CACHE_HOME/pytest-sglprof` (`~/.cache/…`), under a name that
holds a hash of the files that made it: a changed script installs anew.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

HERE = Path(__file__).resolve().parent
MODELS = ("llama", "qwen3moe", "mixtral")
ROUTER = "sglang-router==0.3.2"  # a wheel of 31 MB
MOONCAKE = "mooncake-transfer-engine-non-cuda==0.3.13.post1"  # a wheel of 46 MB
SGLANG_PYTHON = (3, 11)  # the version whose wheels the pinned requirements name


class CannotInstall(Exception):
    """The reason for which one part is missing."""


def main() -> None:
    """Prints one `export` line for each part that is there or can be installed."""
    parts = {"sglang": _sglang, "nsys": _nsys, "router": _router, "mooncake": _mooncake}
    with _locked(_cache()):
        for install in (parts[name] for name in sys.argv[1:] or parts):
            try:
                for name, value in install():
                    sys.stdout.write(f"export {name}={shlex.quote(str(value))}\n")
            except CannotInstall as reason:
                _say(str(reason))


def _cache() -> Path:
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = root / "pytest-sglprof"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One installer at a time; the lock ends with its process."""
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _sglang() -> list[tuple[str, Path]]:
    script = HERE / "install_sglang_cpu.sh"
    requirements = HERE / "sglang_cpu_requirements.txt"
    shim = sorted(
        path for path in (HERE / "sglang_cpu_shim").rglob("*.p*") if path.suffix != ".pyc"
    )
    venv = _cache() / f"sglang-{_key([script, requirements, *shim])}"
    python = venv / "bin" / "python"
    if not os.access(python, os.X_OK):  # also when the interpreter behind it is gone
        _install([script, venv, _python_for_sglang()], venv)
    maker = HERE / "make_tiny_model.py"
    models = _cache() / f"models-{_key([maker])}"
    for arch in MODELS:
        if not (models / arch).is_dir():
            _install([python, maker, models / arch, "--arch", arch], models / arch)
    return [("SGLPROF_REAL_PYTHON", python), ("SGLPROF_REAL_MODELS", models)]


def _nsys() -> list[tuple[str, Path]]:
    script = HERE / "install_nsys.sh"
    folder = _cache() / f"nsys-{_key([script])}"
    nsys = folder / "target-linux-x64" / "nsys"
    if not os.access(nsys, os.X_OK):
        _install([script, folder], folder)
    return [("SGLPROF_NSYS", nsys)]


def _router() -> list[tuple[str, Path]]:
    venv = _cache() / ROUTER.replace("==", "-")
    python = venv / "bin" / "python"
    if not os.access(python, os.X_OK):
        _install([sys.executable, "-m", "venv", venv], venv)
        pip = [str(python), "-m", "pip", "install", "-q", ROUTER]
        if subprocess.run(pip, stdout=sys.stderr, check=False).returncode:
            shutil.rmtree(venv, ignore_errors=True)
            raise CannotInstall(f"{ROUTER} cannot be installed here (see above)")
    return [("SGLPROF_ROUTER_PYTHON", python)]


def _mooncake() -> list[tuple[str, str]]:
    """For the SGLang of `_sglang`. Needs libibverbs1, libnuma1 and libcurl4 of the machine."""
    ((_, python), _) = _sglang()
    folder = _cache() / MOONCAKE.replace("==", "-")
    if not (folder / "mooncake").is_dir():
        pip = [python, "-m", "pip", "install", "-q", "--no-deps", "--target", folder, MOONCAKE]
        _install(pip, folder)
    test = [str(python), "-c", "import mooncake.engine"]
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    done = subprocess.run(test, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise CannotInstall(f"{MOONCAKE} does not load: {done.stderr.strip().splitlines()[-1]}")
    return [("SGLPROF_MOONCAKE", f"{HERE / 'mooncake_cpu_shim'}{os.pathsep}{folder}")]


def _key(files: Sequence[Path]) -> str:
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.read_bytes())
    return digest.hexdigest()[:12]


def _install(command: Sequence[Path | str], target: Path) -> None:
    """Runs an installer, whose output goes to standard error, in place of any broken rest."""
    shutil.rmtree(target, ignore_errors=True)
    started = time.monotonic()
    _say(f"installing {target.name}")
    done = subprocess.run([str(word) for word in command], stdout=sys.stderr, check=False)
    if done.returncode:
        raise CannotInstall(f"{target.name} cannot be installed here (see above)")
    _say(f"installed {target.name} in {time.monotonic() - started:.0f} s")


def _python_for_sglang() -> str:
    wanted = ".".join(map(str, SGLANG_PYTHON))
    test = f"import sys, venv, ensurepip; sys.exit(sys.version_info[:2] != {SGLANG_PYTHON})"
    for name in (f"python{wanted}", f"/usr/bin/python{wanted}", sys.executable, "python3"):
        python = shutil.which(name)
        if python and subprocess.run([python, "-c", test], capture_output=True).returncode == 0:
            return python
    raise CannotInstall(f"SGLang is not installed: no CPython {wanted} with venv was found")


def _say(text: str) -> None:
    sys.stderr.write(f"real_env: {text}\n")


if __name__ == "__main__":
    main()
