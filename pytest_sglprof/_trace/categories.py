"""Which category a kernel belongs to, and which kind of communication it is.

`CATEGORIES` is the one list of categories: a new one is one more row. Its patterns are
matched against the *words* of a kernel's key, not against its full name: types and argument
lists mention attention, scans and GEMMs that the kernel does not do, and a pattern for `conv`
must not match `convert`. `flashinfer::norm::FusedAddRMSNormKernel` is split into the words
`flashinfer norm fused add rms norm kernel`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Literal, NamedTuple

from pytest_sglprof._limits import matching
from pytest_sglprof._trace.kernel_names import normalise


class Category(NamedTuple):
    """A category of kernels.

    colour: hue in degrees and saturation in %; a kernel's name picks the lightness.
    patterns: by the order in which those of all categories are tried, the lowest number first.
    is_compute: whether its time is work of the rank itself, as opposed to communication with
    peers or the host: a collective mostly waits, and a copy depends on the bus.
    in_loops: whether a loop that Inductor generates can be of it. Loops multiply no matrices and
    do no attention, whatever the operators are called whose results they take up.
    """

    name: str
    colour: tuple[int, int]
    patterns: Mapping[int, str]
    is_compute: bool = True
    in_loops: bool = False


# In the order of reports. Patterns match whole words. A fused kernel counts as its most
# specific part: a grouped GEMM of experts is moe, an all-reduce with RMSNorm is communication,
# RMSNorm that also quantizes is norm. `all ?reduce` matches both spellings.
CATEGORIES: tuple[Category, ...] = (
    Category(
        "attention",
        (212, 62),
        {
            60: r"\w*attn\w*|\w*attention\w*|flash|flash ?(attn|mla|infer decode)\w*|fmha\w*|mha"
            r"|mla|mqa|gqa|xqa|sdpa|sage|flex decod(e|ing)|sparse fwd|clean logits|pack ?bits"
            r"|(and|dequant|quant) cache|copy blocks|hadamard|kn entry"
            r"|batch (decode|prefill) with|prefill with|decode with|variable length merge"
            r"|rotary|m?rope|apply rotary|rotary ?pos|kv ?caches?|kv (buffer|indices|indptr|pool)"
            r"|paged|merge states?|fwd grouped kernel|fwd kernel stage|decode att|extend att"
            r"|cascade"
            r"|mamba\d*|gated ?delta|delta rule|ssd|ssm|selective (scan|state)|causal ?conv ?1 ?d"
            r"|chunk (fwd|scan|state|gated|local|scaled|cumsum|gla|delta|o)|fused recurrent|gdn|kda"
            r"|gla|retention|r?wkv|state passing|recompute w u|solve tril|to \d+ x \d+ inverse|kkt"
            r"|fwd (none )?diag|indexer|nsa|dsa"
            r"|topk transform|_fwd_kernel|lightning|lse|k nope"
            r"|latent|(?<!sort )kv|qkv\w*|page (table|row)|hicache|swa|(short|s) ?conv"
            r"|conv (window|state)",
        },
    ),
    Category(
        "gemm",
        (168, 48),
        {
            55: r"lora|sgmv|bgmv|(kv|qkv) (proj )?(gemm|matmul|linear)",
            70: r"\w*gemm[skx]?\d*|\w*gemv\w*|matmul|matvec|nvjet|xmma|cublas\w*|cijk|wgmma"
            r"|split ?k([a-z]{0,2}|( ?reduce)?)|trsm|trmm|syrk|mm|bmm|qmm"
            r"|addmm|baddbmm|dot kernel|(?<!to )linear|flatmm|scudnn|wgrad|dgrad|fprop|conv"
            r"|conv ?\d ?d|winograd|(implicit )?convol(ve|ution)|fft 2 d"
            r"|marlin|machete|gemlite|tensorop|einsum|weight (packed|only kernel)",
        },
    ),
    Category(
        "moe",
        (278, 42),
        {
            20: r"deep ?ep (permute|post reorder|compute|run moe)|ep (scatter|gather)",
            50: r"f?moe(gemm|sum|reduce|finalize|sorting|smoothquant)?|\w*experts?|routing\w*"
            r"|router(?! gemm)|\w*grouped ?(\w+ ){0,2}?(gemm|mm|matmul)|reduce grouped"
            r"|group ?gemm|gemm .*grouped"
            r"|gmm|top ?k (gating|sigmoid|softmax|gate)|topk ?gating\w*|grouped top ?k"
            r"|permute tokens"
            r"|matmul ogs|array tma\w*|ptr ?array|(pre|post) reorder"
            r"|silu and mul (masked )?post (per tensor )?quant|expand input rows|shuffle rows"
            r"|shuffle mul sum|finalize moe|problem sizes|arg sorts|seg indptr|src 2 dst|m range"
            r"|masked m|gateup|topk (forward|backward)|bitmatrix|expt|combined routing"
            r"|writeback idx|compute strides|do activation|pplx"
            r"|bmm (e \d m \d|bfloat|bfloat 16|mx\w*|fp 16)",
        },
    ),
    Category(
        "norm",
        (92, 38),
        {
            90: r"(add )?rms ?norm\w*|layer ?norm\w*|batch ?norm\w*|bn (fw|bw)|group ?norm\w*"
            r"|norm|qk ?norm"
            r"|normali[sz]ation|welford|row ?wise moments|gemma ?rms\w*"
            r"|mean .*rsqrt|rsqrt .*var mean",
        },
        in_loops=True,
    ),
    Category(
        "activation",
        (48, 62),
        {
            100: r"(act|clamp) (and )?mul|\w*silu|[a-z]{0,2}elu|\w*relu|swiglu\w*|([gr]e)?glu"
            r"|\w*sigmoid|(hard)?tanh|\w*swish|mish|softplus|threshold|masked activation",
            120: r"activation",
        },
        in_loops=True,
    ),
    Category(
        "quantization",
        (328, 46),
        {
            110: r"\w*quant(s|ize|ized|ization|izer)?|dequant\w*|scaled fp|cvt fp|to fp ?\d"
            r"|act quant\w*"
            r"|a(bs )?max|absmax|mx ?fp|nv ?fp|block ?scale interleave|swizzle|transform sf"
            r"|pack (fp|ue)|awq|gptq|(cast|convert) fp [48]|to mxfp",
        },
    ),
    Category(
        "sampling",
        (14, 58),
        {
            # Speculative decoding chooses tokens, whatever it prepares for attention.
            57: r"draft|eagle",
            80: r"(?<!grid )sampl(e|ed|ing|er)|rejection|recovered|gumbel|temperature"
            r"|distribution (elementwise|nullary)|\w*top ?[kp]|kth values?"
            r"|arg ?(max|min)\w*|arg (max|min) ops|multinomial|min ?p"
            r"|radix ?sort|sort|bitonic|(log )?softmax\w*|soft ?max|\w*penalt(y|ies)|logits?"
            r"|logprobs?|bincount|exponential|(?<!embedding )renorm|spec(ulative)?|ngram|verify"
            r"|verified|accept(ed)?|cache locs?|tree mask|evict mask|tree (greedy|spec\w*)"
            r"|build tree|beam search|bitmask|radix ?top ?k",
        },
        in_loops=True,
    ),
    Category(
        "elementwise",
        (196, 30),
        {65: "pooling"},
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
            r"|symm(etric)? mem(ory)?|(put|wait) signal"
            r"|(moe|ep) ?(dispatch|combine)|c 10 d",
            115: "barrier",
        },
        is_compute=False,
    ),
    Category(
        "memory",
        (34, 26),
        {
            40: r"^(cuda |hip )?(unified memory )?(memcpy|memset)(?!.* kernel)"
            r"|^copy (host|device) to (host|device)"
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
    r"|memcpy|memset|fill|arange|scan|cum(sum|prod)|cub|rocprim|hipcub|thrust|where|embedding|positions?"
    r"|future|req to token|clamp|pool|pow|nchw|nhwc|transpose|permute|pad|unrolled"
    r"|multi tensor apply|[sdcz]?(axpy|axpby|scal)|aten|at native|offsets?|scale|alloc|loc|segment"
    r"|(add|mul|sub|div|cast|convert|slice|repeat|unique|nonzero|masked|tril|triu|roll|flip)"
    r"|split|tensor transform|zeros?|write|assign|compute|expand"
)


def category(name: str, patterns: Sequence[tuple[str, str]] = ()) -> str:
    """The category of one full name; see `categories_of`."""
    return categories_of([name], patterns)[name]


def categories_of(names: Iterable[str], patterns: Sequence[tuple[str, str]]) -> dict[str, str]:
    """The category of each full name; `patterns` (category, regex) of the user are tried first.

    They are searched in the full name. Raises what `matching` does.
    """
    distinct = dict.fromkeys(names)
    given: dict[str, str] = {}
    for user_category, pattern in patterns:
        what = f"the pattern {pattern!r} of category {user_category}"
        matches = matching(pattern, distinct.keys() - given.keys(), what)
        given.update(dict.fromkeys(matches, user_category))
    return {name: given.get(name) or _of_key(normalise(name)) for name in distinct}


def words(key: str) -> str:
    """The words of a key, lower case, with blanks between: `FusedAddRMSNorm` is four."""
    joined = key.replace("MoE", "Moe").replace("SoftMax", "Softmax").replace("KVCache", "Kvcache")
    return " ".join(_WORD.findall(joined)).lower()


_WORD = re.compile(r"[A-Z]+(?=[A-Z][a-z])|[A-Z]?[a-z]+|[A-Z]+|\d+")
# Loops that Inductor generates; it names them after every operator near them. Its templates of
# matrix multiplication and attention begin with triton_tem.
_LOOP = re.compile(r"triton_(poi|red|per|for|spl|mix)_")
# Libraries whose names mention an operation that most of their kernels do not do.
_LIBRARY = re.compile(r"\b(?:fbgemm|deep_gemm)\w*::")
_Compiled = tuple[tuple[str, re.Pattern[str]], ...]
_ORDERED = sorted((at, row.name, text) for row in CATEGORIES for at, text in row.patterns.items())
_PATTERNS: _Compiled = tuple((name, re.compile(rf"\b(?:{text})\b")) for _, name, text in _ORDERED)
_IN_LOOPS = tuple(row.name for row in CATEGORIES if row.in_loops)
_LOOP_PATTERNS = tuple(pair for pair in _PATTERNS if pair[0] in _IN_LOOPS)
_ELEMENTWISE = re.compile(rf"\b(?:{_ELEMENTWISE_WORDS})\b")
_BARE_ATTENTION = ("_fwd_kernel", "_fwd_kernel_unified")


@lru_cache(maxsize=4096)
def _of_key(key: str) -> str:
    if _LOOP.match(key):
        return _first(words(key), _LOOP_PATTERNS) or "elementwise"
    # Triton's context and extend attention, whose names do not mention attention.
    if key in _BARE_ATTENTION:
        return "attention"
    key = _LIBRARY.sub("", key)
    head, bracket, inner = key.partition("[")
    namespace, _, last = head.rpartition("::")
    whole = words(key)
    # What is in a namespace of experts or of collectives belongs to them, whatever its own name.
    is_of_namespace = _first(words(namespace)) in ("moe", "communication")
    leaf = whole if is_of_namespace else words(last + bracket + inner)
    for text in dict.fromkeys((leaf, whole)):
        if row_name := _first(text):
            return row_name
    return "elementwise" if _ELEMENTWISE.search(whole) else "other"


def _first(text: str, patterns: _Compiled = _PATTERNS) -> str:
    """The category of the first pattern that is found in `text`; empty if there is none."""
    return next((name for name, compiled in patterns if compiled.search(text)), "")


# Which kind of communication a kernel is. Stragglers can be found in some kinds only.

CollectiveKind = Literal["collective", "all_to_all", "p2p", "fused", "unknown"]

# The first match decides. A fused kernel both computes and communicates, so its time is
# neither; of point-to-point peers the receiver always waits; in an all-to-all the bytes
# differ from rank to rank. Everything else is symmetric: all ranks wait for the last one.
_KINDS: tuple[tuple[CollectiveKind, str], ...] = (
    (
        "fused",
        r"all_?reduce_?(fusion|rms|add|norm|residual)|fused_?(all_?reduce|allreduce|rs|ag|moe_?ep)"
        r"|(rms_?norm|gemm|matmul).*(all_?reduce|reduce_?scatter|all_?gather)"
        r"|(all_?reduce|reduce_?scatter|all_?gather).*(rms_?norm|gemm|matmul|lamport)"
        r"|moe_?finalize_?all|device_load_rms_?norm",
    ),
    (
        "all_to_all",
        r"all_?to_?all|a2a|deep_?ep|hybrid_ep|(intra|inter)node::|low_latency.*(dispatch|combine)"
        r"|(moe|ep|mooncake)_?\w*?(dispatch|combine)|mooncake",
    ),
    (
        "p2p",
        r"send_?recv|isend|irecv|gloo:(send|recv)|\b(send|recv)\b|p2p(?!_?all)"
        r"|(put|get|wait)_?(signal|nbi)|nvshmemi_(init|proxy)",
    ),
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


# All ranks wait for the last before the sum, and then do the same; where a matrix product or
# the output of experts is part of the kernel, some of its work comes before.
_SUM_AND_NORM = re.compile(r"all_?reduce", re.IGNORECASE)
_WORK_BEFORE = re.compile(r"gemm|matmul|moe|expert", re.IGNORECASE)


def is_meeting(name: str) -> bool:
    """True for a collective at which ranks arrive: a symmetric one, or an all-reduce with a norm.

    The latter has no transfer time, since its duration includes the norm.
    """
    if collective_kind(name) != "fused":
        return is_symmetric(name)
    return _SUM_AND_NORM.search(name) is not None and _WORK_BEFORE.search(name) is None
