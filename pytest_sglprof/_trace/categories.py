"""Which category a kernel belongs to, and which kind of communication it is.

`CATEGORIES` is the one list of categories: a new one is one more row. Its patterns are
matched against the *words* of a kernel's key, not against its full name: types and argument
lists mention attention, scans and GEMMs that the kernel does not do, and a pattern for `conv`
must not match `convert`. `flashinfer::norm::FusedAddRMSNormKernel` is split into the words
`flashinfer norm fused add rms norm kernel`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Literal, NamedTuple

from pytest_sglprof._config.options import compiled as compiled_pattern
from pytest_sglprof._trace.kernel_names import normalise


class Category(NamedTuple):
    """A category of kernels.

    colour: hue in degrees and saturation in %; a kernel's name picks the lightness.
    patterns: by the order in which those of all categories are tried, the lowest number first.
    is_compute: whether its time is work of the rank itself, as opposed to communication with
    peers or the host: a collective mostly waits, and a copy depends on the bus.
    """

    name: str
    colour: tuple[int, int]
    patterns: Mapping[int, str]
    is_compute: bool = True


# In the order of reports. Patterns match whole words. A fused kernel counts as its most
# specific part: a grouped GEMM of experts is moe, an all-reduce with RMSNorm is communication,
# RMSNorm that also quantizes is norm. `all ?reduce` matches both spellings.
CATEGORIES: tuple[Category, ...] = (
    Category(
        "attention",
        (212, 62),
        {
            60: r"\w*attn\w*|\w*attention\w*|flash|flash ?(attn|mla|infer decode)\w*|fmha\w*|mha"
            r"|mla"
            r"|mqa|gqa|xqa"
            r"|batch (decode|prefill) with|prefill with|decode with|variable length merge"
            r"|rotary|m?rope|apply rotary|rotary ?pos|kv ?caches?|kv (buffer|indices|indptr|pool)"
            r"|paged|merge states?|fwd grouped kernel|fwd kernel stage|decode att|extend att"
            r"|cascade"
            r"|mamba\d*|gated ?delta|delta rule|ssd|ssm|selective (scan|state)|causal ?conv ?1 ?d"
            r"|chunk (fwd|scan|state|gated|local|scaled)|fused recurrent|gdn|kda|indexer|nsa|dsa"
            r"|topk transform|_fwd_kernel|lightning|lse|k nope|latent"
            r"|q?(?<!sort )kv|page (table|row)|hicache|swa|(short|s) ?conv|conv (window|state)",
        },
    ),
    Category(
        "gemm",
        (168, 48),
        {
            70: r"\w*gemms?\d*|\w*gemv\w*|matmul|matvec|nvjet|xmma|cublas\w*|cijk|wgmma"
            r"|split ?k( ?reduce)?"
            r"|mm|bmm|qmm"
            r"|addmm|baddbmm|dot kernel|(?<!to )linear|flatmm|scudnn|wgrad|dgrad|fprop|conv"
            r"|conv ?\d ?d"
            r"|(implicit )?convol(ve|ution)|marlin|machete|gemlite|lora|tensorop|einsum"
            r"|weight packed",
        },
    ),
    Category(
        "moe",
        (278, 42),
        {
            20: r"deep ?ep (permute|post reorder|compute|run moe)|ep (scatter|gather)",
            50: r"f?moe\w*|\w*experts?|routing\w*|router|grouped ?(gemm|mm|matmul)"
            r"|group ?gemm|gemm .*grouped"
            r"|gmm|top ?k (gating|sigmoid|softmax|gate)|topk ?gating\w*|grouped top ?k"
            r"|permute tokens"
            r"|matmul ogs|array tma\w*|ptr ?array|(pre|post) reorder"
            r"|silu and mul (masked )?post (per tensor )?quant|expand input rows|shuffle rows"
            r"|shuffle mul sum|finalize moe|problem sizes|arg sorts|seg indptr|src 2 dst|m range"
            r"|bmm (e \d m \d|bfloat|bfloat 16|mx\w*|fp 16)",
        },
    ),
    Category(
        "norm",
        (92, 38),
        {
            90: r"(add )?rms ?norm\w*|layer ?norm\w*|batch ?norm\w*|bn (fw|bw)|group ?norm\w*"
            r"|norm|qk ?norm"
            r"|normali[sz]ation|welford|row ?wise moments|gemma ?rms\w*",
        },
    ),
    Category(
        "activation",
        (48, 62),
        {
            100: r"(act|silu|gelu|swiglu|clamp) (and )?mul|silu|gelu|swiglu\w*|relu\d*|sigmoid|tanh"
            r"|swish|softplus|threshold|do activation|masked activation|gelu tanh|\w*silu",
            120: r"activation",
        },
    ),
    Category(
        "quantization",
        (328, 46),
        {
            110: r"\w*quant(s|ize|ized|ization|izer)?|dequant\w*|scaled fp|cvt fp|to fp ?\d"
            r"|act quant\w*"
            r"|a(bs )?max|absmax|mx ?fp|nv ?fp|block ?scale interleave|swizzle|transform sf"
            r"|pack (fp|ue)|awq|gptq",
        },
    ),
    Category(
        "sampling",
        (14, 58),
        {
            80: r"sampl(ing|er)|top ?[kp]|arg ?(max|min)\w*|arg (max|min) ops|multinomial|min ?p"
            r"|radix ?sort|sort|bitonic|(log )?softmax\w*|soft ?max|\w*penalt(y|ies)|logits?"
            r"|logprobs?|bincount|exponential|renorm|speculative|verify tree|tree (greedy|spec\w*)"
            r"|build tree|bitmask|radix ?top ?k",
        },
    ),
    Category(
        "elementwise",
        (196, 30),
        {
            # Inductor names what it fuses after every operator that went into it.
            10: r"^triton (poi|red|per|for) (?!.*(softmax|norm|silu|gelu|relu|sigmoid))",
        },
    ),
    Category(
        "communication",
        (220, 6),
        {
            30: r"(nccl|rccl|mscclpp|msccl|nvshmem\w*|rocshmem\w*|mooncake|multimem|userbuffers"
            r"|nvls|gloo)"
            r"|cross device|local device load|quick ?reduce|(one|two) ?shot|all ?reduce\d*"
            r"|reduce ?scatter|all ?gather|all ?to ?all|a ?2 ?a|send ?recv|deep ?ep"
            r"|(inter|intra) ?node( ll)?|low latency (dispatch|combine)|lamport"
            r"|symm(etric)? mem(ory)?"
            r"|(moe|ep) ?(dispatch|combine)|c 10 d",
        },
        is_compute=False,
    ),
    Category(
        "memory",
        (34, 26),
        {
            40: r"^(cuda |hip )?(unified memory )?(memcpy|memset)"
            r"|amd rocclr (copy|fill) ?buffer\w*( aligned)?",
        },
        is_compute=False,
    ),
    Category(
        "other",
        (240, 12),
        {},
    ),
)
"""Every category; a kernel that no pattern matches is `elementwise` or `other`."""

CATEGORY_NAMES = tuple(row.name for row in CATEGORIES)
NOT_COMPUTE = tuple(row.name for row in CATEGORIES if not row.is_compute)
"""Categories that do not count as compute; every category of a user does."""

# Kernels that move or combine numbers; tried last, when no category's pattern matches.
_ELEMENTWISE_WORDS = (
    r"\w*elementwise|elt ?wise|\w*gather|\w*scatter|index\w*|\w*copy|cat|concat|cat array|reduce"
    r"|fill|arange|scan|cum(sum|prod)|cub|rocprim|hipcub|thrust|where|embedding|positions?|future"
    r"|req to token|clamp|pool|pow|nchw|nhwc|transpose|permute|pad|unrolled|multi tensor apply"
    r"|triton (poi|red|per|for)|[sdcz]?(axpy|axpby|scal)|saxpy|aten|at native|compute offsets"
    r"|(add|mul|sub|div|cast|convert|slice|repeat|unique|nonzero|masked|tril|triu|roll|flip)"
    r"|split|zeros?|write|assign|compute|expand"
)


def category(name: str, patterns: Sequence[tuple[str, str]] = ()) -> str:
    """The category of a kernel's full name; `patterns` (category, regex) are tried first.

    Users' patterns are searched in the full name. Raises `SettingsError` for one that is not
    a regular expression.
    """
    for user_category, pattern in patterns:
        if _user_pattern(user_category, pattern).search(name):
            return user_category
    return _of_key(normalise(name))


def words(key: str) -> str:
    """The words of a key, lower case, with blanks between: `FusedAddRMSNorm` is four."""
    joined = key.replace("MoE", "Moe").replace("SoftMax", "Softmax").replace("KVCache", "Kvcache")
    return " ".join(_WORD.findall(joined)).lower()


_WORD = re.compile(r"[A-Z]+(?=[A-Z][a-z])|[A-Z]?[a-z]+|[A-Z]+|\d+")
_PATTERNS = sorted((at, row.name, text) for row in CATEGORIES for at, text in row.patterns.items())
_CATEGORY_PATTERNS = tuple(
    (name, re.compile(rf"\b(?:{pattern})\b")) for _, name, pattern in _PATTERNS
)
_ELEMENTWISE = re.compile(rf"\b(?:{_ELEMENTWISE_WORDS})\b")
_BARE_ATTENTION = ("_fwd_kernel", "_fwd_kernel_unified")


@lru_cache(maxsize=4096)
def _of_key(key: str) -> str:
    # Triton's context and extend attention, whose names do not mention attention.
    if key in _BARE_ATTENTION:
        return "attention"
    whole = words(key)
    head, bracket, inner = key.partition("[")
    leaf = words(head.rsplit("::", 1)[-1] + bracket + inner)
    for text in dict.fromkeys((leaf, whole)):
        for row_name, compiled in _CATEGORY_PATTERNS:
            if compiled.search(text):
                return row_name
    return "elementwise" if _ELEMENTWISE.search(whole) else "other"


@lru_cache(maxsize=256)
def _user_pattern(category: str, pattern: str) -> re.Pattern[str]:
    return compiled_pattern(pattern, f"the pattern {pattern!r} of category {category}")


# Which kind of communication a kernel is. Stragglers can be found in some kinds only.

CollectiveKind = Literal["collective", "all_to_all", "p2p", "fused"]

# The first match decides. A fused kernel both computes and communicates, so its time is
# neither; of point-to-point peers the receiver always waits; in an all-to-all the bytes
# differ from rank to rank. Everything else is symmetric: all ranks wait for the last one.
_KINDS: tuple[tuple[CollectiveKind, str], ...] = (
    (
        "fused",
        r"all_?reduce_?(fusion|rms|add|norm|residual)|fused_?(all_?reduce|allreduce|rs|ag|moe_?ep)"
        r"|(rms_?norm|gemm).*(all_?reduce|reduce_?scatter|all_?gather)"
        r"|(all_?reduce|reduce_?scatter|all_?gather).*(rms_?norm|gemm|lamport)|moe_?finalize_?all",
    ),
    (
        "all_to_all",
        r"all_?to_?all|a2a|deep_?ep|(intra|inter)node::|low_latency.*(dispatch|combine)"
        r"|(moe|ep|mooncake)_?\w*?(dispatch|combine)|mooncake",
    ),
    ("p2p", r"send_?recv|isend|irecv|gloo:(send|recv)|\b(send|recv)\b|p2p(?!_?all)"),
)
_KIND_PATTERNS = tuple((kind, re.compile(pattern, re.IGNORECASE)) for kind, pattern in _KINDS)


def collective_kind(name: str) -> CollectiveKind:
    """The kind of a communication kernel (any name; the full name is the most reliable)."""
    for kind, pattern in _KIND_PATTERNS:
        if pattern.search(name):
            return kind
    return "collective"


# Collectives with a root: not every rank has to wait for every other one.
_ROOTED = re.compile(
    r"broadcast|(?<!all)(?<!all_)gather|(?<!reduce)(?<!reduce_)scatter"
    r"|(?<!all)(?<!all_)reduce(?!_?scatter|_?[12]stage|_prototype)(?=_Sum|_Max|_Min|_Prod|$)",
    re.IGNORECASE,
)
_SYMMETRIC = re.compile(r"all_?(reduce|gather)|reduce_?scatter|cross_device_reduce|barrier", re.I)


def is_symmetric(name: str) -> bool:
    """True for a collective in which every rank waits for the last one to arrive."""
    if collective_kind(name) != "collective":
        return False
    return _SYMMETRIC.search(name) is not None or _ROOTED.search(name) is None
