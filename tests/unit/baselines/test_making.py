"""What a record keeps of a window, and which options make lives comparable."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from pytest_sglprof._analysis.strata import StepWork
from pytest_sglprof._baselines import making
from pytest_sglprof._baselines.making import asked_for, kept, model_name, server_options
from tests.support.lives import DECODE, KERNELS, group, kind

WIDE = StepWork("decode", "", 8, 10, -1)


def test_what_was_asked_for() -> None:
    words = ["python", "-m", "sglang.launch_server", "--attention-backend", "fa3", "--port", "1"]
    words += ["--cuda-graph-bs", "1", "2", "4", "--mem-fraction-static=0.8", "--enable-metrics"]
    assert asked_for(words) == {
        "attention_backend": "fa3",
        "cuda_graph_bs": "1 2 4",
        "enable_metrics": "",
        "mem_fraction_static": "0.8",
    }


@pytest.mark.parametrize(
    "words",
    [
        "--host 0.0.0.0 --port 30000 --nccl-port 5 --dist-init-addr h:1 --grpc-port 4",
        "--model-path /a/b --tokenizer-path /a/b --served-model-name x --model y",
        "--tp 2 --tp-size=2 --dp-size 2 --pipeline-parallel-size 2 --ep 2 --nnodes 2",
        "--node-rank 1 --base-gpu-id 4 --device cuda --quantization fp8 --kv-cache-dtype auto",
        "--log-level debug --log-requests --decode-log-interval 5 --crash-dump-folder /x",
        "--api-key sk-1 --admin-api-key=sk-2 --ssl-keyfile /k --watchdog-timeout 9",
        "--base-url http://h --output-file /o --run-name a --tag b --download-dir /d",
        "--result-filename /r --pydantic-result-filename /p --local-tokenizer-path /t",
        "--output-details --header X=1 --ready-check-timeout-sec 5 --print-requests",
    ],
)
def test_what_differs_between_lives_of_one_configuration_does_not_count(words: str) -> None:
    assert asked_for(words.split()) == {}


def test_of_a_path_the_last_part_counts() -> None:
    here, there = (asked_for(["--lora-paths", f"{root}/lora-a"]) for root in ("/data", "~/x"))
    assert here == there == {"lora_paths": "lora-a"}


def test_a_random_seed_counts_where_it_was_asked_for() -> None:
    """SGLang draws one for each life that has none."""
    drawn = {"launch_command": "--attention-backend fa3", "random_seed": 748987726}
    assert server_options((), (), drawn) == {"attention_backend": "fa3"}
    assert server_options(("--random-seed", "7"), (), drawn) == {"random_seed": "7"}


def test_options_of_later_versions_are_no_other_configuration(shared_data: Path) -> None:
    info = json.loads((shared_data / "logs/tp2/server_info.json").read_text())
    later = info | {"an_option_of_next_year": True, "attention_backend": "another default"}
    assert server_options((), (), info) == server_options((), (), later)
    assert server_options((), (), info) == {
        "load_format": "dummy",
        "attention_backend": "torch_native",
        "max_total_tokens": "20000",
        "max_running_requests": "16",
        "mem_fraction_static": "0.3",
        "skip_server_warmup": "",
        "enable_metrics": "",
        "sleep_on_idle": "",
    }


def test_before_commands_were_told_what_became_of_them_counts(shared_data: Path) -> None:
    info = json.loads((shared_data / "logs/tp2/server_info.json").read_text())
    del info["launch_command"]
    another = info | {"port": 1, "host": "h", "random_seed": 1, "model_path": "/x", "api_key": "k"}
    another["internal_states"] = [{"last_gen_throughput": 3.0}]
    found = server_options((), (), info)
    assert found["chunked_prefill_size"] == "4096"
    changed = server_options((), (), another)
    assert {name for name in found if found[name] != changed[name]} == {"random_seed"}


def test_variables_of_the_environment_count_but_not_those_of_the_machine() -> None:
    env = [("SGLANG_USE_AITER", "1"), ("HF_TOKEN", "hf_x"), ("CUDA_VISIBLE_DEVICES", "4,5")]
    env += [("HF_HOME", "/data/hf"), ("PYTHONPATH", "/x"), ("OMP_NUM_THREADS", "8")]
    expected = {"$SGLANG_USE_AITER": "1", "$OMP_NUM_THREADS": "8", "page_size": "16"}
    assert server_options(["--page-size", "16"], env, {}) == expected


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("meta-llama/Llama-3-8B", "meta-llama/Llama-3-8B"),
        ("/data/models/llama/", "llama"),
        ("~/.cache/hub/models--meta-llama--Llama-3/snapshots/1f2e", "meta-llama/Llama-3"),
        ("", ""),
    ],
)
def test_a_model_is_named_the_same_on_every_machine(path: str, name: str) -> None:
    assert model_name(path) == name


# Kinds of steps.


def test_kinds_with_few_steps_are_left_out() -> None:
    (left,) = kept([(group(kind(), kind(work=WIDE, steps=9)),)])
    assert [(each.work, each.steps) for each in left.strata] == [(DECODE, 50)]
    assert left.left_out_strata == 1


def test_kernels_are_bounded_and_figures_short(monkeypatch: pytest.MonkeyPatch) -> None:
    names = tuple(("gemm", f"k{at}") for at in range(300))
    one = kind([1234567.891 - at for at in range(300)], kernels=names, wall_ns=7654321.098)
    (left,) = kept([(group(one, kernels=names),)])
    assert left.kernels == names[:200]
    assert left.left_out_kernels == 100
    assert left.strata[0].kernels[:2] == (1234570.0, 1234570.0)
    assert left.strata[0].wall_ns == 7654320.0
    assert left.strata[0].compute_ns == pytest.approx(one.compute_ns, rel=1e-5)  # of all of them
    monkeypatch.setattr(making, "MAX_CELLS", 30)
    assert len(kept([(group(one, kernels=names),)])[0].kernels) == 30


def test_windows_that_repeat_each_other_are_one_record() -> None:
    """Weighted by steps: (50 x 100 + 150 x 140) / 200 = 130."""
    more = (*KERNELS, ("sampling", "top_p"))
    first = group(kind((100.0, 200.0, 10.0), wall_ns=400.0, calls=(1, 2, 3)))
    second = group(
        kind((140.0, 200.0, 10.0, 8.0), kernels=more, steps=150, wall_ns=800.0, transfer_ns=None),
        kind((1.0, 1.0, 1.0, 1.0), WIDE, kernels=more),
        kernels=more,
    )
    (together,) = kept([(first,), (second,)])
    assert together.steps == {"decode": 250}
    wide, both = sorted(together.strata, key=lambda each: each.steps)
    assert (both.work, both.steps, wide.work, wide.steps) == (DECODE, 200, WIDE, 50)
    assert together.kernels == more
    assert both.kernels == (130.0, 200.0, 10.0, 6.0)
    assert both.calls == (7.75, 8.0, 8.25, 7.5)
    assert (both.wall_ns, both.transfer_ns) == (700.0, 50_000.0)
    assert both.categories == {"gemm": 130.0, "moe": 200.0, "communication": 10.0, "sampling": 6.0}
    cut = replace(first, left_out_kernels=5)
    assert kept([(cut,), (second,)])[0].strata[0].kernels[3] == 8.0  # where it is known


def test_a_few_kilobytes_a_life() -> None:
    import msgspec

    names = tuple(("gemm", f"kernel_of_a_usual_length_<bf16, 128, {at}>") for at in range(80))
    one = kind([1e6 / (at + 1) for at in range(80)], kernels=names)
    groups: Any = kept([(group(one, kernels=names),)])
    assert len(msgspec.json.encode(groups)) < 8_000
