"""Categories of kernel names: large tables, and the rules behind them.

The lines of tests/data/kernel_names.tsv are name, category. A person wrote them as CUTLASS, cuBLAS,
cuDNN, FlashInfer, FlashAttention, TensorRT-LLM, DeepGEMM, DeepEP, NCCL, NVSHMEM, vLLM, SGLang,
Inductor, AITER, CK, Tensile, Liger, bitsandbytes, FLA, Mamba and PyTorch name their kernels; among
those of `other` are words that merely look like a category's.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from pytest_sglprof._trace.categories import CATEGORY_NAMES, category
from pytest_sglprof._trace.kernel_names import normalise

OWN = Path(__file__).parents[2] / "data" / "kernel_names.tsv"

# Names of the own table that the rules get wrong, and what would be needed.
MISSED = {
    # the library is known from the namespace of a template argument only
    "void cutlass::device_kernel<machete::PrepackBLayout<1>>(int)",
    # QServe's GEMM: `dense` alone is too common a word
    "void dense_kernel0<128, 128, 64>(signed char*)",
    # dequantizes what an mm has made
    "void bitsandbytes_kdequant_mm_int32_fp16<4, 512>(int)",
    # transposes scale factors, which only DeepGEMM's source says
    "void deep_gemm::transpose_fp32<512u, 128u, 28u>(float*)",
    # neither a peer nor an expert in the name
    "dispatch_low_latency",
    # no library writes it; softmax may have an ending
    "softmaxx",
}

# Rows of the given table that are arguable, with the answer of this project.
ARGUABLE = {
    # Not a kernel: the driver or a copy engine fills, and it is no work of the rank's SMs.
    "Memset (Device)": "memory",
}


def _rows(path: Path) -> list[tuple[str, str]]:
    header, *lines = path.read_text(encoding="utf-8").splitlines()
    assert header == "name\tcategory"
    return [(name, expected) for name, expected in (line.split("\t") for line in lines)]


def _wrong(rows: list[tuple[str, str]]) -> dict[str, str]:
    answers = {name: category(name) for name, _ in rows}
    return {name: answers[name] for name, expected in rows if answers[name] != expected}


def test_the_own_table_is_right_but_for_what_is_listed() -> None:
    rows = _rows(OWN)
    assert set(_wrong(rows)) == MISSED
    assert len(MISSED) < 0.05 * len(rows)


def test_the_own_table_is_large_and_has_every_category() -> None:
    rows = _rows(OWN)
    assert len(rows) == len({name for name, _ in rows}) >= 1_000
    assert min(Counter(expected for _, expected in rows)[word] for word in CATEGORY_NAMES) >= 15


def test_the_given_table_is_right_but_for_what_is_arguable(shared_data: Path) -> None:
    path = shared_data.parent / "cases" / "kernel_names.tsv"
    if not path.is_file():
        pytest.skip(f"no table of kernel names: {path.name} is not in cases beside the real data")
    rows = _rows(path)
    assert _wrong(rows) == ARGUABLE
    assert len(rows) >= 175


def test_a_key_is_in_the_category_of_its_name() -> None:
    for name, _ in _rows(OWN):
        assert category(normalise(name)) == category(name), name


LOOPS = ("poi", "red", "per", "for")
NEIGHBOURS = (
    "mm", "addmm", "bmm", "_scaled_mm", "convolution", "linear", "_scaled_dot_product_attention",
    "flash_attention", "moe_forward", "all_reduce", "wait_tensor", "all_gather_into_tensor",
)  # fmt: skip


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("neighbour", NEIGHBOURS)
def test_a_loop_of_inductor_does_not_do_what_its_neighbours_do(loop: str, neighbour: str) -> None:
    assert category(f"triton_{loop}_fused_{neighbour}_view_1") == "elementwise"
    assert category(f"triton_{loop}_fused_add_{neighbour}_native_layer_norm_2") == "norm"
    assert category(f"triton_{loop}_fused_{neighbour}_mul_silu_split_3") == "activation"
    assert category(f"triton_{loop}_fused__softmax_{neighbour}_4") == "sampling"


@pytest.mark.parametrize(
    ("operators", "expected"), [("mm", "gemm"), ("addmm_relu", "gemm"), ("bmm_silu_mul", "gemm"),
                                ("flex_attention", "attention"), ("flex_decoding", "attention")],
)  # fmt: skip
def test_a_template_of_inductor_does(operators: str, expected: str) -> None:
    assert category(f"triton_tem_fused_{operators}_7") == expected


@pytest.mark.parametrize("leaf", ["Marlin", "gemm_kernel", "sum_kernel", "quant", "kernel", "run"])
@pytest.mark.parametrize("namespace", ["vllm::moe", "marlin_moe_wna16", "a::moe::dev::b"])
def test_a_namespace_of_experts_says_more_than_its_kernels(namespace: str, leaf: str) -> None:
    assert category(f"void {namespace}::{leaf}<float, 4>(float*)") == "moe"


@pytest.mark.parametrize("leaf", ["rmsNormKernel", "quant_gemm", "kernel", "silu_and_mul"])
@pytest.mark.parametrize("namespace", ["a::allreduce_fusion", "deep_ep::layout", "mscclpp"])
def test_a_namespace_of_collectives_says_more_than_its_kernels(namespace: str, leaf: str) -> None:
    assert category(f"void {namespace}::{leaf}<float, 4>(float*)") == "communication"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("void fbgemm_gpu::_segment_lengths_cuda_kernel<int>(int)", "elementwise"),
        ("void fbgemm_gpu::quantize_per_row<int>(int)", "quantization"),
        ("void fbgemm_gpu::tbe_embedding<int>(int)", "elementwise"),
        ("fbgemm::gemm_rowwise", "gemm"),
        ("void deep_gemm::pack_ue8m0<128u>(float*)", "quantization"),
        ("void deep_gemm::sm120_gemm<128u>(float*)", "gemm"),
    ],
)
def test_a_library_that_is_called_gemm_is_none(name: str, expected: str) -> None:
    assert category(name) == expected


@pytest.mark.parametrize("word", ["gemma", "comma", "dilemma", "symmetric", "gemmology", "summary"])
def test_letters_inside_of_a_word_are_no_word(word: str) -> None:
    assert category(f"{word}_kernel") == "other"
    assert category(f"void {word}::{word}_copy_kernel<{word}>({word})") == "elementwise"
    assert category(f"{word}_rmsnorm_kernel") == "norm"


@pytest.mark.parametrize("name", ["rms_norm_v2", "RmsNormV2", "rmsNorm2d", "RMSNorm", "rms2norm"])
def test_words_end_at_underscores_digits_and_changes_of_case(name: str) -> None:
    assert category(name) == "norm"


def test_a_mangled_name_that_was_cut_is_read_as_far_as_it_goes() -> None:
    assert normalise("_ZN5aiter40mla_decode_stage1_bf16") == "aiter::mla_decode_stage1_bf16"
    assert category("_ZN5aiter40mla_decode_stage1_bf16") == "attention"
    assert category("_ZN2at6native40vectorized_layer_norm_ker") == "norm"


def test_a_users_pattern_comes_before_every_rule() -> None:
    own = [("mine", "fused_mm"), ("other", r"Marlin<")]
    assert category("triton_poi_fused_mm_silu_mul_3", own) == "mine"
    assert category("void marlin_moe_wna16::Marlin<half>(int4 const*)", own) == "other"
