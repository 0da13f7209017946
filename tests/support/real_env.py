"""Where the real SGLang and the real nsys of this run are; see ci/real_env.py.

A suite that needs one asks here. Without it the test is skipped with the reason, or fails
where SGLPROF_REQUIRE_REAL is set, as in CI: there, nothing real may be left out silently.
"""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import pytest

HOW = 'install it with: eval "$(python3 ci/real_env.py)"'
# What a SGLang needs to serve on a CPU; ranks share the cores in turn.
CPU_ENVIRONMENT = {
    "SGLANG_USE_CPU_ENGINE": "1",
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    # Else the first request compiles for 13 s.
    "TORCH_COMPILE_DISABLE": "1",
    "OMP_NUM_THREADS": "1",
}
# A small KV cache, a server that sleeps when idle (a spinning one fills its own profile).
CPU_ARGUMENTS = (
    "--load-format", "dummy", "--device", "cpu", "--attention-backend", "torch_native",
    "--max-total-tokens", "20000", "--max-running-requests", "16", "--mem-fraction-static", "0.3",
    "--sleep-on-idle", "--decode-log-interval", "5",
)  # fmt: skip


@dataclass(frozen=True)
class RealSglang:
    """An interpreter that has SGLang, and a folder of tiny models (llama, qwen3moe, mixtral)."""

    python: str
    models: Path

    def model(self, name: str) -> str:
        """Path of one of the tiny models."""
        return str(self.models / name)

    def environment(self, ranks: int) -> dict[str, str]:
        """What a server of so many ranks needs in its environment."""
        cores = sorted(os.sched_getaffinity(0))
        bind = "|".join(str(cores[rank % len(cores)]) for rank in range(ranks))
        # With one rank SGLang binds by itself.
        return {**CPU_ENVIRONMENT, **({"SGLANG_CPU_OMP_THREADS_BIND": bind} if ranks > 1 else {})}


def real_sglang() -> RealSglang:
    """The real SGLang, or the end of the calling test."""
    python = os.environ.get("SGLPROF_REAL_PYTHON", "")
    models = Path(os.environ.get("SGLPROF_REAL_MODELS", ""))
    if not python or not os.access(python, os.X_OK):
        _without("no real SGLang: SGLPROF_REAL_PYTHON is not an interpreter")
    if not (models / "llama" / "config.json").is_file():
        _without("no model for the real SGLang: SGLPROF_REAL_MODELS has no llama")
    return RealSglang(python, models)


def real_router() -> str:
    """An interpreter that has sglang-router, or the end of the calling test."""
    python = os.environ.get("SGLPROF_ROUTER_PYTHON", "")
    if not python or not os.access(python, os.X_OK):
        _without("no real router: SGLPROF_ROUTER_PYTHON is not an interpreter")
    return python


def real_mooncake() -> str:
    """A PYTHONPATH with which a real SGLang sends its KV cache over TCP, or the test's end."""
    path = os.environ.get("SGLPROF_MOONCAKE", "")
    if not all(Path(part).is_dir() for part in path.split(os.pathsep)) or not path:
        _without("no Mooncake: SGLPROF_MOONCAKE does not name its folders")
    return path


def real_nsys() -> str:
    """Path of the real nsys, or the end of the calling test."""
    nsys = shutil.which(os.environ.get("SGLPROF_NSYS") or "nsys")
    if not nsys:
        _without("no real nsys: neither SGLPROF_NSYS nor PATH has one")
    if reason := _unusable(nsys):
        _without(reason)
    return nsys


@functools.lru_cache
def _unusable(nsys: str) -> str:
    help_text = subprocess.run([nsys, "profile", "--help"], capture_output=True, text=True).stdout
    return "" if "--start-later" in help_text else f"{nsys} does not know --start-later"


def _without(reason: str) -> NoReturn:
    if os.environ.get("SGLPROF_REQUIRE_REAL", "") not in ("", "0"):
        pytest.fail(f"{reason}, but SGLPROF_REQUIRE_REAL is set; {HOW}", pytrace=False)
    pytest.skip(f"{reason}; {HOW}")
