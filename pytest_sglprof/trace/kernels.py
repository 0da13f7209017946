"""Kernel names: one stable, readable key for each kernel, and the category that it is in.

The full name stays in the table beside the key. Both functions are pure text: they look at
nothing but the name.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache

from pytest_sglprof.errors import SettingsError

CATEGORIES: tuple[str, ...] = (
    "attention",
    "gemm",
    "moe",
    "norm",
    "activation",
    "quantization",
    "sampling",
    "elementwise",
    "communication",
    "memory",
    "other",
)
"""Every category, in the order of reports. Communication is apart from compute."""

# The first pattern that is found anywhere in the full name decides, so specific ones stand
# before general ones: a grouped GEMM of experts is moe, a fused all-reduce with RMSNorm is
# communication, a paged-attention reduction is attention.
PATTERNS: tuple[tuple[str, str], ...] = (
    (
        "communication",
        r"nccl|rccl|mscclpp|msccl|cross_device_reduce|quick_?reduce|two_?shot|one_?shot"
        r"|all_?reduce|reduce_?scatter|all_?gather|all_?to_?all|a2a|sendrecv|broadcast_RING"
        r"|nvshmem|deep_?ep|mooncake|(intra|inter)node::(dispatch|combine)"
        r"|low_latency.*(dispatch|combine)|moe_?(dispatch|combine)|ep_?(dispatch|combine)"
        r"|gloo:|c10d::|multimem|userbuffers",
    ),
    ("memory", r"^\[?(cuda |hip )?(memcpy|memset)|copyBuffer|fillBuffer"),
    (
        "moe",
        r"moe|expert|grouped_?gemm|group_?gemm|topk_?(gating|softmax|sigmoid)|biased_grouped_topk"
        r"|permute_tokens|fused_gate|kimi_k2_gate",
    ),
    (
        "attention",
        r"attention|attn|flash_?(fwd|attn|mla|bwd|infer_decode)|fmha|mla_|_mla|BatchDecodeWith"
        r"|BatchPrefillWith|PersistentVariableLengthMerge|rotary|_rope|rope_|RotaryPos"
        r"|ApplyRotary|kv_?cache|paged|merge_?state|_fwd_grouped_kernel|_fwd_kernel_stage"
        r"|decode_att|extend_att|kv_indices|unified_attn|cascade|flash::|mamba|gated_delta|ssd_",
    ),
    (
        "sampling",
        r"sampling|sampler|TopKTopP|top_?[kp]_|argmax|ArgMaxOps|multinomial|MinP|radixSort"
        r"|softmax|penalt|logit|bincount|radix_?topk|exponential",
    ),
    (
        "norm",
        r"rms_?norm|layer_?norm|add_norm|FusedAddRMS|batch_?norm|\bbn_(fw|bw)|group_?norm|l2norm"
        r"|normalization",
    ),
    (
        "quantization",
        r"quantiz|dequant|_quant_|per_token_quant|per_token_group|fp8_quant|scaled_fp[48]|cvt_fp"
        r"|mxfp|nvfp4_(quant|expert)|act_quant|dynamic_scaled",
    ),
    (
        "gemm",
        r"gemm|gemv|matmul|nvjet|xmma|cublas|cutlass|Cijk_|wgmma|splitK|_mm_|dot_kernel|linear"
        r"|implicit_convolve|scudnn|wgrad|dgrad|fprop|conv|deep_gemm|marlin|machete|aten::(mm|addmm"
        r"|bmm|baddbmm|_weight_int)|ck_tile.*Gemm|hgemm|bf16gemm",
    ),
    ("activation", r"act_and_mul|silu|gelu|swiglu|relu|sigmoid|tanh|threshold_kernel|activation"),
    (
        "elementwise",
        r"elementwise|elt_?wise|vectorized_gather|multi_tensor_apply|direct_copy|CatArray|index"
        r"|gather|scatter|reduce_kernel|triton_(poi|red|per)|copy|fill|arange|scan|cumsum|cub::"
        r"|rocprim|hipcub|where|embedding|position|resolve_future|req_to_token|clamp|pool|pow_"
        r"|nchwToNhwc|nhwcToNchw|aten::|transpose|pad|unrolled|compute_|computeOffsets|write_",
    ),
)

_COMPILED = tuple((name, re.compile(pattern, re.IGNORECASE)) for name, pattern in PATTERNS)
# Types of CUTLASS stand in the arguments of kernels that have nothing to do with it.
_NUMBER_TYPE = re.compile(r"cutlass::(?:\w+_t\b|float_\w+)")
_LENGTH = re.compile(r"(\d+)")
_FUNCTOR = re.compile(
    r"(?:at::native::)?\b(?!gpu_kernel_impl)(\w*(?:Functor|_kernel_cuda|KernelImpl|kernel_impl|_cuda_out|ArgM\w+Ops"
    r"|MeanOps|sum_functor|WelfordOps)\w*)"
)
_CUTLASS_NAME = re.compile(r"(cutlass\w*_(?:tensorop|simt|wmma)\w*)")
_CK_NAME = re.compile(r"\w*?((?:Fmha|Gemm|GroupedGemm|MoeGemm|Moe|Rmsnorm2d|Layernorm2d)\w*Kernel)")
_TENSILE = re.compile(r"^(Cijk_[A-Za-z]+_[A-Za-z]+(?:_[A-Z0-9]{2,4}){0,2})\w*?_(MT\d+x\d+x\d+)")
_TRITON_SIGNATURE = re.compile(r"_0(?:de|d|c)?1(?:\d*(?:de|d|c))+\d*$|_[0-9a-f]{16,}$")
_NOISE = re.compile(r"\(anonymous namespace\)::|<unnamed>::|_GLOBAL__N_\w+::")
_GENERIC_HOST = re.compile(
    r"(elementwise_kernel|reduce_kernel|elementwise_kernel_manual_unroll|multi_tensor_apply_kernel"
    r"|elementwise_kernel_with_index)$"
)


def normalise(name: str) -> str:
    """A stable, readable key: templates and arguments stripped, mangled names demangled.

    Where a template argument *is* the kernel (PyTorch's elementwise functors, CUTLASS and
    ck_tile), it stays, in brackets: `at::native::elementwise_kernel[CUDAFunctor_add]`.
    """
    text = name.strip()
    if text.startswith("_Z"):
        text = _demangle(text)
    tensile = _TENSILE.match(text)
    if tensile:
        return f"{tensile[1]}_{tensile[2]}"
    text = _NOISE.sub("", text)
    if "cutlass" in text:
        cutlass = _CUTLASS_NAME.search(text)
        if cutlass:
            return cutlass[1]
    bare = _strip_nested(text.removeprefix("void ").replace("static ", ""))
    inner = _inner(text, bare)
    if "<" not in name and "(" not in name and "::" not in bare:
        bare = _TRITON_SIGNATURE.sub("", bare) or bare
    return f"{bare}[{inner}]" if inner else bare


def category(name: str, patterns: Sequence[tuple[str, str]] = ()) -> str:
    """The category of a kernel's full name; `patterns` (category, regex) are tried first.

    Raises `SettingsError` for a pattern that is no regular expression.
    """
    for found, pattern in patterns:
        if _user_pattern(found, pattern).search(name):
            return found
    text = _NUMBER_TYPE.sub("", name)
    for found, compiled in _COMPILED:
        if compiled.search(text):
            return found
    return "other"


@lru_cache(maxsize=256)
def _user_pattern(category: str, pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise SettingsError(
            f"the pattern {pattern!r} of category {category} is no regular expression: {error}",
            expected="a Python regular expression that is searched in full kernel names",
            hint="escape what is meant literally, for example \\( and \\[",
        ) from error


def _inner(text: str, bare: str) -> str:
    if _GENERIC_HOST.search(bare):
        functor = _FUNCTOR.search(text, text.find("<") + 1)
        return functor[1] if functor else ""
    if "ck_tile" in text:
        kernel = _CK_NAME.search(text)
        return kernel[1] if kernel and kernel[1] not in bare else ""
    return ""


def _strip_nested(text: str) -> str:
    """`text` without what stands in <>, () and [], nested or not; operators are rare here."""
    kept: list[str] = []
    depth = 0
    for position, char in enumerate(text):
        if char in "<([{":
            depth += 1
        elif char in ">)]}":
            if char == ">" and position and text[position - 1] == "-":
                kept += char * (not depth)  # an arrow, not the end of a template
                continue
            depth = max(0, depth - 1)
        elif not depth:
            kept.append(char)
    bare = "".join(kept).strip()
    words = bare.split()
    return words[-1] if words and "::" in words[-1] else bare or text[:80]


def _demangle(name: str) -> str:
    """The nested name of an Itanium-mangled kernel, and the identifiers that follow it.

    `_ZN5aiter24add_rmsnorm_quant_kernelI…` becomes `aiter::add_rmsnorm_quant_kernel<…>`.
    Only what `normalise` and `category` look at is rebuilt; other names come back as they
    are.
    """
    position = 3 if name.startswith("_ZN") else 2
    parts: list[str] = []
    while match := _LENGTH.match(name, position):
        end = match.end() + int(match[1])
        parts.append(name[match.end() : end])
        position = end
        if name[position : position + 1] not in "0123456789":
            break
    if not parts:
        return name
    rest = name[position:]
    return f"{'::'.join(parts)}<{_identifiers(rest)}>" if rest.startswith("I") else "::".join(parts)


def _identifiers(text: str) -> str:
    """The source names inside a mangled template argument list."""
    found: list[str] = []
    position = 0
    while match := _LENGTH.search(text, position):
        length = int(match[1])
        word = text[match.end() : match.end() + length]
        if 2 < length == len(word) and (word[0].isalpha() or word[0] == "_"):
            found.append(word)
            position = match.end() + length
        else:
            position = match.end()
    return ", ".join(found)
