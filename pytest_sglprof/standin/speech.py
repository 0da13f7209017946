"""How each version of SGLang speaks: one row a version, of what differs from the next one.

The rows agree with what the wheels' code says (tests/data/versions, made by ci.old_versions).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

_PREFILL = (
    "Prefill batch{iteration}, #new-seq: {new_seq}, #new-token: {new_token}, "
    "#cached-token: {cached_token}, token usage: {token_usage:.2f}, #running-req: {running}, "
    "#queue-req: {waiting}, "
)
_GRAPH = "{device} graph: {graph}"
_INPUT = "input throughput (token/s): {throughput:.2f}"
_DECODE = (
    "Decode batch{iteration}, #running-req: {running}, #token: {tokens}, "
    "token usage: {token_usage:.2f}, {device} graph: {graph}, "
    "gen throughput (token/s): {throughput:.2f}, #queue-req: {waiting}"
)


@dataclass(frozen=True)
class Speech:
    """One version. prefill, decode: templates of the lines of batches.

    tags, file_parts: ranks in the head of a line and in a file's name, in this order.
    logs_steps: SGLANG_LOG_FORWARD_ITERS numbers the batches. no_paths: routes that it lacks.
    get_load: fields of an entry of that path, none without it. no_info, no_load: what
    `/server_info` and `/v1/loads` lack. renamed: fields of the latter, new name to
    old. aggregate: `/v1/loads` has sums, and no names of accelerators.
    admin_key: there is one. body: what a start of a window understands.
    extra_pass: a window of steps holds as many as asked for; one less without it.
    spans: steps are named in traces. forward_ids: detailed names have them.
    decode_min_bs: a window by stage can wait for a batch size.
    """

    version: str
    prefill: str = f"{_PREFILL}#pending-token: {{pending}}, {_GRAPH}, {_INPUT}"
    decode: str = _DECODE
    tags: tuple[str, ...] = ("DP", "PP", "TP", "EP")
    file_parts: tuple[str, ...] = ("TP", "DP", "PP", "EP")
    logs_steps: bool = True
    no_paths: frozenset[str] = frozenset({"/get_load"})
    get_load: tuple[str, ...] = ()
    no_info: frozenset[str] = frozenset()
    no_load: frozenset[str] = frozenset()
    renamed: tuple[tuple[str, str], ...] = ()
    aggregate: bool = False
    admin_key: bool = True
    body: tuple[str, ...] = (
        "output_dir", "start_step", "num_steps", "activities", "profile_by_stage", "with_stack",
        "record_shapes", "profile_id", "merge_profiles", "profile_prefix", "profile_stages",
        "detailed_annotations",
    )  # fmt: skip
    extra_pass: bool = True
    spans: bool = True
    forward_ids: bool = True
    decode_min_bs: bool = True

    def has(self, path: str) -> bool:
        """Whether it answers a path of the newest version."""
        return path not in self.no_paths

    def info(self, document: Mapping[str, Any]) -> dict[str, Any]:
        """`/server_info` as this version has it; attention's DP ranks are in dp_size."""
        known = {name: value for name, value in document.items() if name not in self.no_info}
        if "attn_dp_size" in self.no_info and "attn_dp_size" in document:
            known["dp_size"] = document["dp_size"] * document["attn_dp_size"]
        return known

    def load(self, entry: Mapping[str, Any]) -> dict[str, Any]:
        """An entry of `/v1/loads` as this version has it."""
        names = dict(self.renamed)
        return {
            names.get(name, name): self.load(value) if isinstance(value, dict) else value
            for name, value in entry.items()
            if name not in self.no_load
        }


NEWEST = Speech("0.5.23")
_0_5_20 = replace(
    NEWEST,
    version="0.5.20",
    no_paths=frozenset(),
    get_load=(
        "dp_rank", "num_reqs", "num_waiting_reqs", "num_tokens", "num_pending_tokens", "ts_tic",
    ),
    no_info=frozenset({"attn_dp_size", "frontend"}),
    forward_ids=False,
)  # fmt: skip
_0_5_14 = replace(
    _0_5_20,
    version="0.5.14",
    no_paths=frozenset({"/ready"}),
    no_info=_0_5_20.no_info | {"launch_command", "startup_time"},
    no_load=frozenset(
        {"timestamp", "num_active_tokens", "num_prealloc_ready_tokens", "memory", "queues",
         "total_prefill_uncached_tokens", "total_prefill_busy_us", "decode_moments",
         "disaggregation", "accelerator", "num_accelerators"}
    ),
    body=tuple(name for name in NEWEST.body if name not in ("profile_id", "detailed_annotations")),
    extra_pass=False,
    decode_min_bs=False,
)  # fmt: skip
_0_5_9 = replace(
    _0_5_14,
    version="0.5.9",
    prefill=f"{_PREFILL}{_INPUT}, {_GRAPH}",
    get_load=("rid", "http_worker_ipc", "dp_rank", "num_reqs", "num_waiting_reqs", "num_tokens",
              "ts_tic"),
    no_load=_0_5_14.no_load - {"memory", "queues", "disaggregation"}
    | {"num_waiting_uncached_tokens", "num_total_tokens", "prealloc_ready"},
    renamed=(("prefill_bootstrap_queue_reqs", "prefill_prealloc_queue_reqs"),),
    aggregate=True,
    spans=False,
)  # fmt: skip
_0_5_3 = replace(
    _0_5_9,
    version="0.5.3",
    prefill=_PREFILL.replace("batch{iteration},", "batch."),
    decode=_DECODE.replace("batch{iteration},", "batch.") + ", ",
    tags=("DP", "TP", "EP", "PP"),
    file_parts=("TP",),
    logs_steps=False,
    no_paths=frozenset({"/ready", "/server_info", "/model_info", "/v1/loads"}),
    get_load=("rid", "dp_rank", "num_reqs", "num_waiting_reqs", "num_tokens"),
    no_info=_0_5_9.no_info | {"attn_cp_size", "moe_dp_size", "admin_api_key"},
    admin_key=False,
    body=NEWEST.body[:7],
)

SPEECHES: Mapping[str, Speech] = {
    each.version: each for each in (NEWEST, _0_5_20, _0_5_14, _0_5_9, _0_5_3)
}
"""By version, the newest first."""
