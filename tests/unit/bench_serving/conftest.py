from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest

from pytest_sglprof._bench_serving.bench import BenchServing
from pytest_sglprof._config.model import ServerSpec
from pytest_sglprof._errors import SglprofError
from pytest_sglprof._server import command


@dataclass
class FakeServer:
    """A server that only a load looks at; `flushes` are the answers of its /flush_cache."""

    spec: ServerSpec = field(default_factory=ServerSpec)
    kind: Literal["sglang", "standin"] = "sglang"
    driver_kind: Literal["sglang", "standin"] = "sglang"
    url: str = "http://127.0.0.1:1"
    python: str = sys.executable
    info: Mapping[str, Any] = field(default_factory=lambda: {"model_path": "some/model"})
    flushes: list[bool] = field(default_factory=list)
    flushed: int = 0
    api_key: str = ""
    driver_variables: Mapping[str, str] = field(default_factory=dict)
    died: SglprofError | None = None
    warm_for: dict[str, int] = field(default_factory=dict)

    @property
    def client(self) -> FakeServer:
        return self

    def flush_cache(self) -> bool:
        self.flushed += 1
        return self.flushes.pop(0) if self.flushes else True

    def is_alive(self) -> bool:
        return self.died is None

    def exit_reason(self) -> SglprofError | None:
        return self.died


@pytest.fixture
def sglang_layout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Path]]:
    """Puts the fake driver where this interpreter would have SGLang's; called with its place."""

    def place(*where: str) -> Path:
        package = tmp_path / "site" / "sglang"
        target = package.joinpath(*where)
        target.parent.mkdir(parents=True, exist_ok=True)
        (package / "__init__.py").touch()
        shutil.copy(Path(__file__).parents[2] / "support" / "fake_driver.py", target)
        monkeypatch.setenv(
            "PYTHONPATH", f"{package.parent}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
        )
        return package

    command._probe.cache_clear()
    yield place
    command._probe.cache_clear()


@pytest.fixture
def server(sglang_layout: Callable[..., Path]) -> FakeServer:
    sglang_layout("benchmark", "serving.py")
    return FakeServer()


@pytest.fixture
def bench(server: FakeServer, tmp_path: Path) -> BenchServing:
    return BenchServing(server, folder=tmp_path / "loads")
