"""Plugins of pytest that would change other tests if they were installed beside them."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

CACHE = Path.home() / ".cache" / "pytest-sglprof" / "plugins"
LIMIT = 120.0  # s


def plugin(requirement: str) -> Path:
    """A folder with this plugin alone, for PYTHONPATH; skips where it cannot be had."""
    folder = CACHE / requirement
    if folder.is_dir():
        return folder
    CACHE.mkdir(parents=True, exist_ok=True)
    new = Path(tempfile.mkdtemp(prefix=".new-", dir=CACHE))
    words = ["install", "--quiet", "--no-deps", f"--target={new}", requirement]
    try:
        process = subprocess.run(
            [sys.executable, "-m", "pip", *words],
            capture_output=True,
            text=True,
            timeout=LIMIT,
            check=False,
        )
        if process.returncode != 0:
            last = (process.stderr.strip().splitlines() or ["no word"])[-1]
            pytest.skip(f"{requirement} cannot be installed here: {last}")
        if not folder.exists():
            new.rename(folder)
    except subprocess.TimeoutExpired:
        pytest.skip(f"{requirement} was not installed within {LIMIT:g} s")
    finally:
        shutil.rmtree(new, ignore_errors=True)
    return folder
