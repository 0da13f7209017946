"""What log lines and documents hold, as SGLang 0.5.23 gives them."""

from __future__ import annotations

from typing import Any

STAMP = r"\[\d{4}-\d\d-\d\d \d\d:\d\d:\d\d"
PREFILL = (
    STAMP + r" TP0\] Prefill batch, #new-seq: \d+, #new-token: \d+, #cached-token: \d+, "
    r"token usage: \d+\.\d\d, #running-req: \d+, #queue-req: \d+, #pending-token: \d+, "
    r"(cpu|cuda) graph: (True|False), input throughput \(token/s\): \d+\.\d\d"
)
DECODE = (
    STAMP + r" TP0\] Decode batch, #running-req: \d+, #token: \d+, token usage: \d+\.\d\d, "
    r"(cpu|cuda) graph: (True|False), gen throughput \(token/s\): \d+\.\d\d, #queue-req: \d+"
)
LOAD_FIELDS = {
    "timestamp", "dp_rank", "num_running_reqs", "num_waiting_reqs", "num_used_tokens",
    "num_total_tokens", "max_total_num_tokens", "max_running_requests", "token_usage",
    "gen_throughput", "cache_hit_rate", "utilization", "memory", "disaggregation", "queues",
    "num_waiting_uncached_tokens", "num_active_tokens", "num_prealloc_ready_tokens",
    "total_prefill_uncached_tokens", "total_prefill_busy_us", "decode_moments",
}  # fmt: skip
LOAD_PARTS = {
    "memory": {"weight_gb", "kv_cache_gb", "graph_gb", "token_capacity"},
    "queues": {"waiting", "grammar", "paused", "retracted", "prealloc_ready"},
    "disaggregation": {
        "mode", "prefill_bootstrap_queue_reqs", "prefill_inflight_queue_reqs",
        "decode_prealloc_queue_reqs", "decode_transfer_queue_reqs", "decode_retracted_queue_reqs",
        "kv_transfer_speed_gb_s", "kv_transfer_latency_ms",
    },
}  # fmt: skip
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
