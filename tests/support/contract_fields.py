"""What log lines and documents hold; figures are those of SGLang 0.5.23."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

STAMP = r"\[\d{4}-\d\d-\d\d \d\d:\d\d:\d\d"


def pattern_of(lines: Sequence[Mapping[str, Any]], head: str, tags: str) -> str:
    """What a line of batches of a rank looks like, from lines of its version's wheel."""
    plain = (each for each in lines if each["role"] == "null" and not each["iterations"])
    text = next(each["line"] for each in plain if head in each["line"]).partition("] ")[2]
    shown = re.sub(r"(?<=: )-?\d+", r"\\d+", re.escape(text).replace("\\ ", " "))
    shown = re.sub(r"(?<=\\.)\d\d\b", r"\\d\\d", shown).replace("True", "(True|False)")
    return f"{STAMP} {tags}\\] " + shown.replace("cuda", "(cuda|cpu)")


def shape(value: Any) -> Any:
    """Names of objects, inside of each other; of a list of objects, the shape of the first.

    A list of plain values is a value: a server has none of them until it has measured some.
    """
    if isinstance(value, Mapping):
        return {name: shape(each) for name, each in value.items()}
    if isinstance(value, list) and value and isinstance(value[0], Mapping):
        return [shape(value[0])]
    return None


META_FIELDS = {
    "id", "finish_reason", "prompt_tokens", "weight_version", "num_retractions",
    "completion_tokens", "cached_tokens", "dp_rank", "e2e_latency", "response_sent_to_client_ts",
    "cached_tokens_details", "reasoning_tokens", "weight_versions",
}  # fmt: skip
INFO_FIELDS: dict[str, Any] = {
    "tp_size": 2, "dp_size": 1, "pp_size": 1, "ep_size": 1, "attn_dp_size": 1, "nnodes": 1,
    "node_rank": 0, "base_gpu_id": 0, "gpu_id_step": 1, "disaggregation_mode": "null",
    "enable_dp_attention": False, "decode_log_interval": 5, "version": "0.5.23", "api_key": None,
    "admin_api_key": None, "max_running_requests": 16, "attn_cp_size": 1, "moe_dp_size": 1,
    "load_balance_method": "round_robin", "frontend": "python", "host": "127.0.0.1",
}  # fmt: skip
