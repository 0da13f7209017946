"""Which ranks there are, how they are called, and which of them meet."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Sizes:
    """Parallel sizes. dp: as given on the command line, of replicas or of attention."""

    tp: int = 1
    dp: int = 1
    pp: int = 1
    ep: int = 1
    dp_attention: bool = False

    @property
    def engines(self) -> int:
        """Replicas that never meet: several only in plain data parallel."""
        return 1 if self.dp_attention else self.dp

    @property
    def queues(self) -> int:
        """Batches that one engine runs side by side: several only with DP attention."""
        return self.dp if self.dp_attention else 1

    @property
    def attention_tp(self) -> int:
        """Ranks that share the attention of one batch."""
        return self.tp // self.queues


@dataclass(frozen=True)
class Place:
    """One scheduler process. dp is None where there is no data parallelism at all.

    index: position among all ranks. engine: its replica. queue: its batch within it.
    """

    index: int
    engine: int
    queue: int
    tp: int
    pp: int
    ep: int
    dp: int | None
    sizes: Sizes

    @property
    def tags(self) -> tuple[str, ...]:
        """`("DP0", "TP1")`, in the order of the server's log; size 1 leaves a tag out."""
        sizes = self.sizes
        parts: list[str] = []
        if self.dp is not None:
            parts.append(f"DP{self.dp}")
        if sizes.pp > 1:
            parts.append(f"PP{self.pp}")
        if sizes.tp > 1:
            parts.append(f"TP{self.tp}")
        if sizes.ep > 1:
            parts.append(f"EP{self.ep}")
        return tuple(parts)

    @property
    def title(self) -> str:
        """The process title, `sglang::scheduler_DP0_TP1`."""
        return "_".join(("sglang::scheduler", *self.tags))

    @property
    def label(self) -> str:
        """`DP0 TP1`; `TP0` for the only rank."""
        return " ".join(self.tags) or "TP0"

    @property
    def file_part(self) -> str:
        """`TP-1-DP-0`, the order and rules of trace file names."""
        sizes = self.sizes
        parts = [f"TP-{self.tp}"]
        if self.dp is not None and sizes.dp > 1:
            parts.append(f"DP-{self.dp}")
        if sizes.pp > 1:
            parts.append(f"PP-{self.pp}")
        if sizes.ep > 1:
            parts.append(f"EP-{self.ep}")
        return "-".join(parts)

    @property
    def attention_rank(self) -> int:
        """Place within the ranks that share attention; 0 is the one that logs batches."""
        return self.tp % self.sizes.attention_tp

    @property
    def gpu(self) -> int:
        """Device index on this node, with base 0 and step 1."""
        sizes = self.sizes
        return (self.engine * sizes.pp + self.pp) * sizes.tp + self.tp

    @property
    def logs_batches(self) -> bool:
        """True for the ranks that write `Prefill batch` and `Decode batch` lines."""
        return self.attention_rank == 0 and self.pp == 0


def places(sizes: Sizes) -> tuple[Place, ...]:
    """All ranks: by replica, then pipeline stage, then tensor rank."""
    found: list[Place] = []
    for engine in range(sizes.engines):
        for pp in range(sizes.pp):
            for tp in range(sizes.tp):
                queue = tp // sizes.attention_tp
                dp = queue if sizes.dp_attention else engine if sizes.dp > 1 else None
                ep = tp * sizes.ep // sizes.tp
                found.append(Place(len(found), engine, queue, tp, pp, ep, dp, sizes))
    return tuple(found)


def stage_peers(place: Place, everyone: tuple[Place, ...]) -> tuple[Place, ...]:
    """The ranks of the same replica and pipeline stage, `place` among them."""
    return tuple(p for p in everyone if (p.engine, p.pp) == (place.engine, place.pp))
