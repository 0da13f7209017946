from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from pytest_sglprof._capture import recording, torch
from pytest_sglprof._config.model import WindowSpec
from pytest_sglprof._run import window
from tests.support.fake_server import FakeServer, FakeSglang


@pytest.fixture
def http(tmp_path: Path) -> Iterator[FakeSglang]:
    fake = FakeSglang(tmp_path)
    yield fake
    fake.close()


@pytest.fixture
def server(tmp_path: Path, http: FakeSglang) -> Iterator[FakeServer]:
    made = FakeServer(tmp_path, http)
    yield made
    made.client.close()


@pytest.fixture(autouse=True)
def _short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "QUIET", 0.15)
    monkeypatch.setattr(torch, "QUIET_SHARED", 0.3)
    monkeypatch.setattr(torch, "POLL", 0.01)
    monkeypatch.setattr(torch, "DEATH_SECONDS", 0.2)
    monkeypatch.setattr(window, "POLL", 0.01)
    monkeypatch.setattr(window, "ENDING_SECONDS", 0.2)
    monkeypatch.setattr(recording, "POLL", 0.01)


@pytest.fixture
def new_window(server: FakeServer, tmp_path: Path):
    made = []

    def make(window_id: str = "t::a[b/c]", *, on: object = None, **options: object):
        options.setdefault("timeout", 10.0)
        opened = window.Window(
            on or server,
            WindowSpec(**options),
            tmp_path / "windows" / f"w{len(made)}",
            window_id=window_id,
        )
        made.append(opened)
        return opened

    yield make
    for opened in made:
        assert opened.state != "open"
