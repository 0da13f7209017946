"""The stand-in's own load driver on a running stand-in, as a user's test has them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from pytest_sglprof._bench_serving.bench import BenchServing
from pytest_sglprof._config.model import ServerSpec
from pytest_sglprof._errors import SettingsError
from pytest_sglprof._server.launch import Server, launch

KEY = "standin-key-0123"


@pytest.fixture(scope="module")
def standin(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BENCH_KEY", KEY)
        folder = tmp_path_factory.mktemp("standin")
        spec = ServerSpec(kind="standin", args=("--tp", "2"), api_key_env="BENCH_KEY")
        server = launch(spec, folder=folder)
        yield server
        assert server.stop() == ()


@pytest.fixture
def bench(standin: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> BenchServing:
    monkeypatch.setenv("BENCH_KEY", KEY)
    return BenchServing(standin, folder=tmp_path)


def test_a_load_with_a_key(bench: BenchServing, tmp_path: Path) -> None:
    result = bench(
        num_prompts=12,
        max_concurrency=4,
        random_input_len=8,
        random_output_len=8,
        random_range_ratio=1.0,
    )
    assert (result.requested, result.completed) == (12, 12)
    assert result.warmed_up
    assert result.cache_flushed
    assert result.ttft["median"]
    assert result.e2e["p99"]
    stored = json.loads((tmp_path / "load-1.jsonl").read_text())
    assert stored["total_output_tokens"] == 12 * 8
    assert not any(KEY in path.read_text() for path in tmp_path.iterdir())


def test_an_unknown_keyword_is_explained(bench: BenchServing) -> None:
    with pytest.raises(SettingsError) as caught:
        bench(num_prompts=2, max_concurency=3)
    assert caught.value.hint == "did you mean max_concurrency?"
