"""How a server is divided into ranks, which GPU each rank uses, and how its passes are run."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from pytest_sglprof._files import atomic_write
from pytest_sglprof._ranks import Rank

_WITHOUT_RANKS = ("device", "version", "decode_log_interval")  # sizes of no ranks
MOST_OF_A_SIZE = 4096
MOST_RANKS = 65_536
_COUNTS = ("tp_size", "dp_size", "attn_dp_size", "pp_size", "ep_size", "moe_dp_size", "nnodes")


def flat_info(info: Mapping[str, Any]) -> dict[str, Any]:
    """`info` with what some servers and gateways have below `server_args` beside the rest."""
    nested = info.get("server_args")
    if not isinstance(nested, Mapping):
        return dict(info)
    return {**nested, **{name: value for name, value in info.items() if name != "server_args"}}


def invalid_size(info: Mapping[str, Any]) -> str:
    """Which number of ranks of a flat `/server_info` is none, "" if all are. Absent ones are."""
    for name in _COUNTS:
        value = info.get(name)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
            return f"{name} is {str(value)[:80]!r}"
        if isinstance(value, int) and not 1 <= value <= MOST_OF_A_SIZE:
            return f"{name} is {str(value)[:80]}"
    ranks = math.prod(info.get(name) or 1 for name in ("tp_size", "dp_size", "pp_size"))
    if ranks > MOST_RANKS:
        return f"tp_size, dp_size and pp_size make {ranks} ranks"
    nested = info.get("server_args", {})
    return "" if nested is None or nested == {} else f"server_args is a {type(nested).__name__}"


@dataclass(frozen=True)
class ServerSizes:
    """Parallel sizes as ``/server_info`` reports them; numbers of ranks, all at least 1.

    dp: data-parallel replicas. attn_dp: DP ranks inside one TP group (DP attention).
    is_known: False if the server does not say its sizes, as behind some gateways.
    base_gpu_id, gpu_id_step: which devices of a node are used. device: "cuda", "cpu", ...
    decode_log_interval: iterations between two decode lines of a rank's log.
    """

    tp: int = 1
    dp: int = 1
    attn_dp: int = 1
    pp: int = 1
    ep: int = 1
    moe_dp: int = 1
    nnodes: int = 1
    node_rank: int = 0
    base_gpu_id: int = 0
    gpu_id_step: int = 1
    dp_attention: bool = False
    device: str = "cuda"
    version: str = ""
    decode_log_interval: int = 40
    is_known: bool = True

    @classmethod
    def from_info(cls, info: Mapping[str, Any]) -> ServerSizes:
        """Reads `/server_info`. A size that is absent has SGLang's default.

        Before 0.5.23 DP attention reported ``dp_size=N`` and no ``attn_dp_size``; since
        then ``dp_size=1, attn_dp_size=N``. Both give ``attn_dp=N, dp=1`` here.
        """
        dp = _number(info, "dp_size", 1)
        attn_dp = _number(info, "attn_dp_size", 1)
        dp_attention = bool(info.get("enable_dp_attention"))
        if dp_attention and "attn_dp_size" not in info:
            dp, attn_dp = 1, dp
        return cls(
            tp=_number(info, "tp_size", 1),
            dp=dp,
            attn_dp=attn_dp,
            pp=_number(info, "pp_size", 1),
            ep=_number(info, "ep_size", 1),
            moe_dp=_number(info, "moe_dp_size", 1),
            nnodes=_number(info, "nnodes", 1),
            node_rank=_number(info, "node_rank", 0),
            base_gpu_id=_number(info, "base_gpu_id", 0),
            gpu_id_step=_number(info, "gpu_id_step", 1),
            dp_attention=dp_attention,
            device=str(info.get("device") or "cuda"),
            version=str(info.get("version") or ""),
            decode_log_interval=_number(info, "decode_log_interval", 40),
            is_known=_number(info, "tp_size", 0) > 0,
        )

    def shown(self) -> dict[str, int | bool | str]:
        """What is known of them, by name."""
        every = asdict(self)
        is_known = every.pop("is_known")
        return {name: every[name] for name in every if is_known or name in _WITHOUT_RANKS}

    @property
    def dp_ranks(self) -> int:
        """DP ranks that take requests: replicas times ranks of DP attention."""
        return self.dp * self.attn_dp

    @property
    def is_cpu(self) -> bool:
        """True for a server that computes on the CPU; its traces have no GPU activities."""
        return self.device == "cpu"

    def ranks(self) -> tuple[Rank, ...]:
        """Each rank that writes a file in a torch window: ``dp * pp * tp`` of them.

        Labels are those of the file names: TP always, another part only if its size is
        above 1. None of a server whose sizes are not known.
        """
        if not self.is_known:
            return ()
        return tuple(
            self._rank(dp, pp, tp)
            for dp in range(self.dp)
            for pp in range(self.pp)
            for tp in range(self.tp)
        )

    def _rank(self, dp: int, pp: int, tp: int) -> Rank:
        dp_rank = dp * self.attn_dp + tp // max(self.tp // self.attn_dp, 1)
        tp_of_moe = max(self.tp // self.moe_dp, 1)
        ep_rank = tp % tp_of_moe // max(tp_of_moe // self.ep, 1)
        return Rank(
            tp=tp,
            dp=dp_rank if self.dp_ranks > 1 else None,
            pp=pp if self.pp > 1 else None,
            ep=ep_rank if self.ep > 1 else None,
        )

    def node_of(self, rank: Rank) -> int:
        """Index of the node (0 ... nnodes - 1) that runs `rank`."""
        nodes_per_stage = max(self.nnodes // self.pp, 1)
        return (rank.pp or 0) // self._pp_per_node() * nodes_per_stage + (
            rank.tp or 0
        ) // self._tp_per_node()

    def gpu_of(self, rank: Rank) -> int:
        """Device index of `rank` on its own node, as SGLang's launcher computes it.

        ``base_gpu_id + dp * tp_size * pp_size * step`` (plain DP only)
        ``+ (pp mod pp_per_node) * tp_per_node + (tp mod tp_per_node) * step``.
        """
        replica = (rank.dp or 0) // self.attn_dp
        tp_per_node = self._tp_per_node()
        return (
            self.base_gpu_id
            + replica * self.tp * self.pp * self.gpu_id_step
            + (rank.pp or 0) % self._pp_per_node() * tp_per_node
            + (rank.tp or 0) % tp_per_node * self.gpu_id_step
        )

    def gpu_ranks(self, node: int | None = None) -> dict[int, str]:
        """Device index -> rank label, for the ranks of a node (None: the one that answered).

        Empty on a CPU server. A device that several ranks share is left out.
        """
        if self.is_cpu:
            return {}
        number = self.node_rank if node is None else node
        here = [rank for rank in self.ranks() if self.node_of(rank) == number]
        shared = Counter(self.gpu_of(rank) for rank in here)
        return {self.gpu_of(rank): rank.label for rank in here if shared[self.gpu_of(rank)] == 1}

    def _pp_per_node(self) -> int:
        return max(self.pp // self.nnodes, 1)

    def _tp_per_node(self) -> int:
        return max(self.tp // max(self.nnodes // self.pp, 1), 1)


# What a server does of a request; "" for all of it, but "embedding" for no decode steps.
Role = Literal["", "prefill", "decode", "embedding"]


def role_of(info: Mapping[str, Any]) -> Role:
    """Of a server, by its `/server_info`."""
    mode = info.get("disaggregation_mode")
    if mode == "prefill":
        return "prefill"
    if mode == "decode":
        return "decode"
    return "embedding" if info.get("is_embedding") is True else ""


SERVER_INFO = "server_info.json"  # beside the traces of a window
EXPERTS = "experts.npz"  # likewise; see `_trace.beside`
Regime = Literal["gather", "local"]

SYNCED_A2A = ("flashinfer", "mori_epv2", "flashinfer_megamoe")  # local, but with one graph bucket
_RULES_OF = (0, 5, 23)  # the oldest version whose rules for these, and for speculation, were read
SETTINGS_KEYS = (
    *("version", "device", "tp_size", "dp_size", "attn_dp_size", "attn_cp_size", "pp_size"),
    *("moe_dp_size", "ep_size", "nnodes", "enable_dp_attention", "enable_dp_lm_head"),
    *("moe_dense_tp_size", "moe_a2a_backend", "elastic_ep_backend", "disable_attn_tp_gather"),
    *("enable_two_batch_overlap", "cuda_graph_config", "cuda_graph_bs", "disable_cuda_graph"),
    *("disable_cuda_graph_padding", "disable_custom_all_reduce", "speculative_algorithm"),
    "speculative_num_draft_tokens",
)
_STATE_KEYS = ("decode_cuda_graph_bs", "effective_max_running_requests_per_dp")


@dataclass(frozen=True)
class PassSettings:
    """What `/server_info` says about how a forward pass is run; see `pass_settings`.

    regime: by whose batch the decode graph of a rank is chosen under DP attention: that of the
    largest batch of all ranks ("gather") or its own ("local"); None if unknown, and without DP
    attention, where all ranks have one batch. capture_sizes: requests of the batches for which
    decode graphs of the target model were captured, ascending; a batch is padded to the next
    one. () without graphs, without padding, or if unknown. graphs: whether decode passes replay
    graphs, None if unknown. custom_all_reduce: whether small tensors may be gathered by a custom
    all-reduce, None if unknown. speculative: whether drafts are made and verified.
    dp_attention: whether ranks of one group have requests of their own.
    """

    regime: Regime | None = None
    capture_sizes: tuple[int, ...] = ()
    graphs: bool | None = None
    custom_all_reduce: bool | None = None
    speculative: bool = False
    dp_attention: bool = False


def pass_settings(info: Mapping[str, Any]) -> PassSettings:
    """Reads `/server_info`, of 0.5.23 and of older versions; what is absent is unknown.

    As in SGLang's `require_mlp_tp_gather`, `get_batch_sizes_to_capture` and `ServerArgs`.
    """
    sizes = ServerSizes.from_info(info)
    graphs = _has_graphs(info)
    custom: bool | None = None
    if isinstance(disabled := info.get("disable_custom_all_reduce"), bool):
        # It works between the GPUs of one node.
        custom = not disabled and sizes.nnodes <= sizes.pp and not sizes.is_cpu
    return PassSettings(
        regime=_regime(info, sizes) if sizes.dp_attention else None,
        capture_sizes=_capture_sizes(info, sizes) if graphs else (),
        graphs=graphs,
        custom_all_reduce=custom,
        speculative=bool(info.get("speculative_algorithm")),
        dp_attention=sizes.dp_attention,
    )


def settings_part(info: Mapping[str, Any]) -> dict[str, Any]:
    """The part of `/server_info` that is read here: no path, no address, no secret."""
    part = {key: info[key] for key in SETTINGS_KEYS if key in info}
    if states := _states(info):
        part["internal_states"] = [
            {key: state[key] for key in _STATE_KEYS if key in state} for state in states
        ]
    return part


def write_settings(folder: Path, info: Mapping[str, Any]) -> None:
    """Keeps that part of `/server_info` beside the traces in `folder`."""
    atomic_write(folder / SERVER_INFO, json.dumps(settings_part(info), indent=1) + "\n")


def _regime(info: Mapping[str, Any], sizes: ServerSizes) -> Regime | None:
    """`require_mlp_tp_gather`, where every key that decides is there."""
    unknown = object()
    dense_tp = info.get("moe_dense_tp_size", unknown)
    lm_head = info.get("enable_dp_lm_head", unknown)
    a2a = info.get("moe_a2a_backend", unknown)
    if dense_tp is None or lm_head is False or a2a in (None, "none"):
        return "gather"
    if unknown in (dense_tp, lm_head, a2a) or not isinstance(dense_tp, int):
        return None
    if info.get("elastic_ep_backend") is not None or a2a == "mori":
        return None  # ranks that join, or an environment variable of the server, decide
    if a2a in SYNCED_A2A:
        return "gather" if _version(info) >= _RULES_OF else None
    return "gather" if dense_tp > sizes.tp // sizes.attn_dp else "local"


def _has_graphs(info: Mapping[str, Any]) -> bool | None:
    if info.get("disable_cuda_graph") is True:
        return False
    if backend := _decode_config(info).get("backend"):
        return bool(backend != "disabled")
    if info.get("device") == "cpu":
        return False
    return True if info.get("disable_cuda_graph") is False else None


def _capture_sizes(info: Mapping[str, Any], sizes: ServerSizes) -> tuple[int, ...]:
    """As the server reports what it captured, else as it derives that from its arguments."""
    if info.get("disable_cuda_graph_padding"):
        return ()
    captured = [_ascending(state.get("decode_cuda_graph_bs")) for state in _states(info)]
    if captured and all(captured):
        return captured[0] if len(set(captured)) == 1 else ()
    listed = _ascending(_decode_config(info).get("bs") or info.get("cuda_graph_bs"))
    align = _alignment(info, sizes)  # of the rows of a batch, which some ranks share out
    if not listed or align is None:
        return ()
    rows = 1  # of each request in a verify pass
    if align > 1 and info.get("speculative_algorithm"):
        rows = _number(info, "speculative_num_draft_tokens", 0)
        if rows < 1 or _version(info) < _RULES_OF:
            return ()
    if info.get("enable_two_batch_overlap"):
        rows = 1
    most = min((_most_requests(state) for state in _states(info)), default=0)
    if most:
        most = -(-most // align) * align
        listed = (
            *(size for size in listed if size < most),
            *([most] if listed[-1] >= most else []),
        )
    return tuple(size for size in listed if size * rows % align == 0)


def _alignment(info: Mapping[str, Any], sizes: ServerSizes) -> int | None:
    """`get_cuda_graph_batch_size_alignment`; None where it cannot be known."""
    if _number(info, "attn_cp_size", 1) > 1:
        return None  # depends on the kind of GPU, too
    overlap = 2 if info.get("enable_two_batch_overlap") else 1
    attn_tp = max(sizes.tp // sizes.attn_dp, 1)
    if attn_tp == 1:
        return overlap
    regime = _regime(info, sizes) if sizes.dp_attention else "local"
    a2a = info.get("moe_a2a_backend") not in (None, "none")
    scattered = a2a or info.get("moe_dense_tp_size") is not None
    if sizes.dp_attention and regime is None:
        return None
    gathers = regime == "gather" or (scattered and not info.get("disable_attn_tp_gather"))
    return overlap * attn_tp if gathers else overlap


def _states(info: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    states = info.get("internal_states")
    listed = states if isinstance(states, list) else []
    return [state for state in listed if isinstance(state, dict)]


def _most_requests(state: Mapping[str, Any]) -> int:
    return _number(state, "effective_max_running_requests_per_dp", 0)


def _decode_config(info: Mapping[str, Any]) -> Mapping[str, Any]:
    config = info.get("cuda_graph_config")
    decode = config.get("decode") if isinstance(config, dict) else None
    return decode if isinstance(decode, dict) else {}


def _ascending(sizes: Any) -> tuple[int, ...]:
    """The batch sizes in a list of `/server_info`; () for anything else."""
    listed = sizes if isinstance(sizes, list | tuple) else ()
    return tuple(sorted({size for size in listed if type(size) is int and size > 0}))


def version_of(text: str) -> tuple[int, ...]:
    """(0, 5, 23) of "0.5.23.post1"; () if there is none."""
    match = re.match(r"v?(\d+)\.(\d+)\.(\d+)", text)
    return tuple(map(int, match.groups())) if match else ()


def _version(info: Mapping[str, Any]) -> tuple[int, ...]:
    return version_of(str(info.get("version") or ""))


def _number(info: Mapping[str, Any], key: str, default: int) -> int:
    value = info.get(key)
    return value if isinstance(value, int) and not isinstance(value, bool) else default
