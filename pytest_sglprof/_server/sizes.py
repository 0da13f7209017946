"""`ServerSizes`: how a server is divided into ranks, and which GPU each rank uses."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pytest_sglprof._ranks import Rank


@dataclass(frozen=True)
class ServerSizes:
    """Parallel sizes as ``/server_info`` reports them; numbers of ranks, all at least 1.

    dp: data-parallel replicas. attn_dp: DP ranks inside one TP group (DP attention).
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
        )

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
        above 1.
        """
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

    def gpu_ranks(self) -> dict[int, str]:
        """Device index -> rank label, for the ranks of this node.

        Empty on a CPU server. A device that several ranks share is left out.
        """
        if self.is_cpu:
            return {}
        here = [rank for rank in self.ranks() if self.node_of(rank) == self.node_rank]
        shared = Counter(self.gpu_of(rank) for rank in here)
        return {self.gpu_of(rank): rank.label for rank in here if shared[self.gpu_of(rank)] == 1}

    def _pp_per_node(self) -> int:
        return max(self.pp // self.nnodes, 1)

    def _tp_per_node(self) -> int:
        return max(self.tp // max(self.nnodes // self.pp, 1), 1)


def graph_batches(info: Mapping[str, Any]) -> tuple[int, ...]:
    """Batch sizes, ascending, for which `/server_info` says that decode graphs were captured.

    Empty without decode graphs, without padding, and under DP attention, where a batch is
    padded to a size that all ranks agree on. Keys of 0.5.23 and of older versions are read.
    """
    decode = (info.get("cuda_graph_config") or {}).get("decode") or {}
    sizes = decode.get("bs") or info.get("cuda_graph_bs") or ()
    off = decode.get("backend") == "disabled" or info.get("disable_cuda_graph")
    if off or info.get("disable_cuda_graph_padding") or info.get("enable_dp_attention"):
        return ()
    return tuple(sorted(size for size in sizes if isinstance(size, int) and size > 0))


def _number(info: Mapping[str, Any], key: str, default: int) -> int:
    value = info.get(key)
    return value if isinstance(value, int) and not isinstance(value, bool) else default
