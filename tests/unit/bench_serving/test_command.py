from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pytest_sglprof._bench_serving.command import (
    bench_command,
    measured_keywords,
    parse_result,
    record_line,
    target_concurrency,
    usage_error,
    warm_up_keywords,
)
from pytest_sglprof._errors import ServerMissing, SettingsError

OUT = Path("out.jsonl")
URL = "http://127.0.0.1:30000"


def options(**keywords: Any) -> list[str]:
    return bench_command("python", "standin", URL, "m", keywords, OUT)[3:]


def test_keywords_become_options() -> None:
    words = options(
        num_prompts=20, disable_tqdm=True, disable_stream=False, tokenizer=None, request_rate=2.5
    )
    assert (
        words
        == (
            f"--base-url {URL} --output-file out.jsonl --backend sglang --dataset-name random-ids "
            "--model m --num-prompts 20 --disable-tqdm --request-rate 2.5"
        ).split()
    )


def test_values_with_structure() -> None:
    words = options(
        goodput=["ttft:500", "tpot:50"], extra_request_body={"a": 1}, logprob_start_len=-1
    )
    tail = words[words.index("m") + 1 :]
    assert tail == [
        "--goodput", "ttft:500", "tpot:50", "--extra-request-body", '{"a": 1}',
        "--logprob-start-len=-1",
    ]  # fmt: skip


def test_users_choice_replaces_our_defaults() -> None:
    words = options(backend="sglang-oai", dataset_name="sharegpt", model="other")
    assert words.count("--backend") == words.count("--model") == words.count("--dataset-name") == 1
    assert words[words.index("--model") + 1] == "other"
    assert words[words.index("--backend") + 1] == "sglang-oai"


def test_unknown_model_is_left_to_the_driver() -> None:
    assert "--model" not in bench_command("python", "standin", URL, "", {}, OUT)


@pytest.mark.parametrize(
    ("keywords", "words"),
    [
        ({"host": "x"}, "host"),
        ({"output_file": "x"}, "output_file"),
        ({"profile": True}, "profile_window"),
        ({"profile_steps": 3}, "profile_window"),
        ({"NumPrompts": 3}, "num_prompts"),
        ({"num_prompts": 0}, "at least 1"),
        ({"num_prompts": "20"}, "at least 1"),
        ({"max_concurrency": True}, "at least 1"),
    ],
)
def test_unusable_keywords_are_refused(keywords: dict[str, Any], words: str) -> None:
    with pytest.raises(SettingsError, match=words) as caught:
        options(**keywords)
    assert next(iter(keywords)) in str(caught.value)


@pytest.mark.parametrize(
    ("keywords", "target", "warm_up"),
    [
        ({}, 1000, 64),
        ({"num_prompts": 20}, 20, 20),
        ({"num_prompts": 200, "max_concurrency": 16}, 16, 16),
        ({"num_prompts": 4, "max_concurrency": 16}, 4, 4),
    ],
)
def test_concurrency_and_warm_up(keywords: dict[str, Any], target: int, warm_up: int) -> None:
    assert target_concurrency(keywords) == target
    assert warm_up_keywords({**keywords, "seed": 3}) == {
        **keywords,
        "num_prompts": warm_up,
        "seed": 3,
    }


@pytest.mark.parametrize(
    ("place", "module"),
    [
        (("benchmark", "serving.py"), "sglang.benchmark.serving"),
        (("bench_serving.py",), "sglang.bench_serving"),
    ],
)
def test_finds_the_driver_without_importing_sglang(
    sglang_layout: Callable[..., Path], place: tuple[str, ...], module: str
) -> None:
    package = sglang_layout(*place)
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    assert bench_command(sys.executable, "sglang", URL, "m", {}, OUT)[:3] == [
        sys.executable,
        "-m",
        module,
    ]


def test_fault_4_a_folder_called_sglang_beside_us_is_no_driver(
    sglang_layout: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sglang_layout("benchmark", "serving.py")
    stray = tmp_path / "here" / "sglang"
    stray.mkdir(parents=True)
    for name in ("__init__.py", "bench_serving.py"):
        (stray / name).write_text("raise SystemExit('the stray one')")
    monkeypatch.chdir(stray.parent)
    words = bench_command(sys.executable, "sglang", URL, "m", {}, OUT)
    assert words[:3] == [sys.executable, "-m", "sglang.benchmark.serving"]


def test_interpreter_without_sglang(sglang_layout: Callable[..., Path]) -> None:
    package = sglang_layout("bench_serving.py")
    (package / "bench_serving.py").unlink()
    with pytest.raises(ServerMissing, match="no load driver of SGLang"):
        bench_command(sys.executable, "sglang", URL, "m", {}, OUT)


def test_interpreter_that_is_none(sglang_layout: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(ServerMissing, match="is not a working Python interpreter"):
        bench_command(str(tmp_path / "python"), "sglang", URL, "m", {}, OUT)


USAGE = """usage: serving.py [-h] [--num-prompts NUM_PROMPTS] [--max-concurrency N]
                  [--request-rate RATE]
"""


@pytest.mark.parametrize("program", ["serving.py", "python -m pytest_sglprof.standin.load_driver"])
def test_unknown_option_names_its_neighbours(program: str) -> None:
    output = f"{USAGE}{program}: error: unrecognized arguments: --max-concurency 3 --frob\n"
    error = usage_error(output, {"max_concurency": 3, "frob": True})
    assert isinstance(error, SettingsError)
    assert "bench_serving(max_concurency=…, frob=…)" in error.what
    assert error.hint == "did you mean max_concurrency?"
    assert error.log == ("unrecognized arguments: --max-concurency 3 --frob",)


def test_bad_value_shows_the_drivers_own_words() -> None:
    output = f"{USAGE}serving.py: error: argument --request-rate: invalid float value: 'x'\n"
    error = usage_error(output, {"request_rate": "x"})
    assert error is not None
    assert "invalid float value" in str(error)
    assert "request_rate" in error.hint


def test_other_output_is_no_usage_error() -> None:
    assert usage_error("ValueError: error: something\n", {}) is None


@pytest.mark.parametrize(
    ("keywords", "asks"),
    [
        ({"request_rate": 5}, True),
        ({"request_rate": 0.5, "max_concurrency": 3}, True),
        ({"request_rate": float("inf")}, False),
        ({"request_rate": 5, "output_details": False}, False),
        ({"max_concurrency": 3}, False),
    ],
)
def test_a_fixed_rate_alone_asks_for_the_ttft_of_each_request(
    keywords: dict[str, Any], asks: bool
) -> None:
    assert bool(measured_keywords(keywords).get("output_details")) is asks


NO_RANDOM_IDS = (
    "usage: bench_serving.py [-h] [--backend B]\n"
    "bench_serving.py: error: argument --dataset-name: invalid choice: 'random-ids' "
    "(choose from 'sharegpt', 'random')\n"
)


def test_a_driver_without_random_ids_is_refused_where_it_would_download() -> None:
    error = usage_error(NO_RANDOM_IDS, {"num_prompts": 3})
    assert "no data set random-ids" in error.what
    assert "downloads unless dataset_path has it" in str(error)
    chosen = usage_error(NO_RANDOM_IDS, {"dataset_name": "random-ids"})
    assert "does not accept" in chosen.what


def steady(python: str = sys.executable) -> list[str]:
    asked = {"steady_state_concurrency_ratio": 0.8}
    return bench_command(python, "sglang", URL, "m", asked, OUT)


def test_the_steady_state_is_measured_by_its_own_driver(
    sglang_layout: Callable[..., Path],
) -> None:
    sglang_layout("benchmark", "serving.py")
    words = steady()
    assert words[1:5] == [
        "-m", "sglang.benchmark.steady_state_serving", "--steady-state-output-file", "out.jsonl",
    ]  # fmt: skip
    assert words[-2:] == ["--steady-state-concurrency-ratio", "0.8"]


def test_a_driver_without_steady_states_is_refused(sglang_layout: Callable[..., Path]) -> None:
    sglang_layout("bench_serving.py")
    with pytest.raises(SettingsError, match=r"0\.5\.19 or newer"):
        steady()


def test_the_figures_of_the_steady_state_are_within_those_of_the_load() -> None:
    run = json.dumps({"completed": 8, "duration": 9.0})
    steady = json.dumps({"concurrency_ratio": 0.8, "completed": 5, "output_throughput": 70.0})
    result = parse_result(record_line(f"{run}\n{steady}\n"), requested=8)
    assert (result.completed, result.duration) == (8, 9.0)
    assert result.raw["steady_state"]["output_throughput"] == 70.0
    for text in (run, f"{run}\n{run}\n", "", "half a li", "[1]"):
        assert record_line(text) == text.strip().split("\n")[-1]
