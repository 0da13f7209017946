"""Full names of real kernels against the key and category that a person gave them.

The lines of kernel_names.tsv are category, key, full name. The names are those of NCCL, RCCL,
SGLang, FlashInfer, FlashAttention, DeepEP, DeepGEMM, TensorRT-LLM, cuBLAS, CUTLASS, Tensile,
AITER, ck_tile, Triton and PyTorch, as profilers print them.
"""

from __future__ import annotations

import shutil
import sqlite3
import subprocess
from collections import Counter
from contextlib import closing
from pathlib import Path

import pytest

from pytest_sglprof._trace.categories import CATEGORY_NAMES, category, words
from pytest_sglprof._trace.kernel_names import normalise
from tests.support import plain_traces as plain

TABLE = [
    tuple(line.split("\t"))
    for line in Path(__file__).with_name("kernel_names.tsv").read_text().splitlines()
]
MANGLED = [name for _, _, name in TABLE if name.startswith("_Z")]
TORCH = (
    "a100-nccl/rank-0.json.gz",
    "sglang-mi300x/sglang_Qwen3-8B_decode.json.gz",
    "sglang-mi300x/sglang_Qwen3-8B_prefilldecode.json.gz",
)
REPORTS = ("mfu_2gpu_after.sqlite", "mfu_2gpu_before.sqlite", "saxpy_perlmutter0.sqlite")


@pytest.mark.parametrize(("expected", "key", "name"), TABLE)
def test_key_and_category(expected: str, key: str, name: str) -> None:
    assert (normalise(name), category(name)) == (key, expected)
    assert normalise(key) == key
    assert category(key) == expected, "rows with one key must be in one category"


def test_the_table_is_large_and_covers_all_but_other() -> None:
    assert len(TABLE) >= 150
    assert {word for word, _, _ in TABLE} == set(CATEGORY_NAMES) - {"other"}


def _demangled(name: str) -> str:
    tool = shutil.which("c++filt")
    if tool is None:
        pytest.skip("there is no c++filt (binutils) to compare with")
    run = subprocess.run([tool, name], capture_output=True, text=True, check=True)
    readable = run.stdout.strip()
    if readable == name:
        pytest.skip("this c++filt is too old for the name")
    return readable


@pytest.mark.parametrize("name", MANGLED)
def test_a_mangled_name_has_the_key_of_its_readable_form(name: str) -> None:
    readable = _demangled(name)
    assert normalise(name) == normalise(readable)
    assert category(name) == category(readable)


LAMBDAS = (
    "_ZN2at6native18elementwise_kernelILi128ELi4EZNS0_22gpu_kernel_impl_nocastINS0_15CUDAFunctor_"
    "addIfEEEEvRNS_18TensorIteratorBaseERKT_EUliE_EEviT1_",
    "_ZN2at6native29vectorized_elementwise_kernelILi4ENS0_11FillFunctorIiEESt5arrayIPcLm1EEEEviT0_"
    "T1_",
    "_ZN2at6native13reduce_kernelILi512ELi1ENS0_8ReduceOpIfNS0_9ArgMaxOpsIfEEjlLi4ELi4EEEEEvT1_",
    "_ZN3foo3barIiE3bazEv",
    "_Z3fooi",
    "_ZN12_GLOBAL__N_13fooIfEEvPT_",
    "_ZN2at6native12_GLOBAL__N_128vectorized_layer_norm_kernelIffLb0EEEviT0_PKT_S6_S6_PS3_S7_PS4_",
)


@pytest.mark.parametrize("name", LAMBDAS)
def test_lambdas_anonymous_namespaces_and_members(name: str) -> None:
    readable = _demangled(name)
    assert normalise(name) == normalise(readable)


@pytest.mark.parametrize("name", ["_Z", "_Zweird", "_ZN", "_ZN3fo", "_ZNI", "_ZN99999999999x"])
def test_what_is_no_mangled_name_stays(name: str) -> None:
    assert normalise(name) == name


def test_a_mangled_name_that_was_cut_keeps_its_front() -> None:
    for name in MANGLED:
        for length in range(3, len(name)):
            assert normalise(name[:length])


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("flashinfer::norm::FusedAddRMSNormKernel", "flashinfer norm fused add rms norm kernel"),
        ("topkGatingSoftmax", "topk gating softmax"),
        ("TopKTopPSampling", "top k top p sampling"),
        ("Cijk_Alik_MT256x32x64", "cijk alik mt 256 x 32 x 64"),
    ],
)
def test_words(key: str, expected: str) -> None:
    assert words(key) == expected


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("convert_fp32_kernel", "gemm"),
        ("bilinear_upsample_kernel", "gemm"),
        ("remove_padding_kernel", "moe"),
        ("page_split_kernel", "gemm"),
        ("at::native::normal_fill_kernel", "norm"),
        ("scatter_add_kernel(ScanTileState, CopyPolicy, Softmax<float>)", "sampling"),
        ("void my_add<cutlass::gemm::GemmShape<1, 2, 3>>(attention::Params)", "gemm"),
        ("void my_add<cutlass::gemm::GemmShape<1, 2, 3>>(attention::Params)", "attention"),
        ("triton_poi_fused_reduce_scatter_tensor_0", "communication"),
        ("hadamard_kernel", "sampling"),
    ],
)
def test_parts_of_words_and_types_of_arguments_do_not_count(name: str, wrong: str) -> None:
    assert category(name) != wrong


def test_the_stand_in_means_what_we_read() -> None:
    from pytest_sglprof.standin.model import forward

    for prefill in (False, True):
        for attention_ranks in (1, 2):
            pass_ = forward(prefill=prefill, layers=1, attention_ranks=attention_ranks, ranks=2)
            assert [category(kernel.name) for kernel in pass_] == [k.category for k in pass_]


def _torch_names(path: Path) -> Counter[str]:
    time: Counter[str] = Counter()
    for row in plain.gpu_rows(path):
        time[row[0]] += row[3]
    return time


def _report_names(path: Path) -> Counter[str]:
    query = (
        "select value, sum(end - start) from CUPTI_ACTIVITY_KIND_KERNEL "
        "join StringIds on StringIds.id = demangledName group by value"
    )
    with closing(sqlite3.connect(path)) as database:
        return Counter(dict(database.execute(query).fetchall()))


@pytest.mark.parametrize("file", [*(f"torch/{f}" for f in TORCH), *(f"nsys/{f}" for f in REPORTS)])
def test_other_is_below_2_percent_of_every_real_gpu_trace(shared_data: Path, file: str) -> None:
    path = shared_data / file
    time = _report_names(path) if file.endswith(".sqlite") else _torch_names(path)
    other = sum(ns for name, ns in time.items() if category(name) == "other")
    assert sum(time.values()) > 0
    assert other < 0.02 * sum(time.values())


@pytest.mark.parametrize("file", [f"torch/{f}" for f in TORCH])
def test_mangled_names_of_real_traces(shared_data: Path, file: str) -> None:
    for name in _torch_names(shared_data / file):
        if name.startswith("_Z"):
            assert normalise(name) == normalise(_demangled(name))
