"""The documents that describe the server: arguments, model, load, metrics."""

from __future__ import annotations

import datetime
import time
from collections.abc import Sequence
from typing import Any

from pytest_sglprof import __version__
from pytest_sglprof.standin.engine import SYNC_WAITS, Load
from pytest_sglprof.standin.front import Front
from pytest_sglprof.standin.http import Call, Reply, as_json
from pytest_sglprof.standin.laws import CAPTURE_SIZES


def server_info(call: Call) -> Reply:
    """Resolved arguments, flat, with the keys in clear, as the real server has them.

    One more key than the real one, `standin`, tells the two apart.
    """
    front = call.front
    speech = front.options.speech
    arguments = speech.info(_arguments(front))
    memory = {"weight": 0.0, "kvcache": 0.0, "graph": {}}
    timings = {"load_weight": 0.0, "kv_cache_allocation": 0.0, "scheduler_e2e": 0.1}
    state = {
        **arguments,
        "world_size": front.options.sizes.tp * front.options.sizes.pp,
        "effective_max_running_requests_per_dp": front.options.max_running_requests,
        "last_gen_throughput": max(load.throughput for load in _loads(front)),
        "memory_usage": {**memory, "token_capacity": front.options.max_total_tokens},
    }
    return as_json(
        speech.info(
            {
                **arguments,
                "launch_command": front.options.launch_command,
                "status": "ready" if front.ready else "starting",
                "max_total_num_tokens": front.options.max_total_tokens,
                "max_req_input_len": front.options.context_length - 6,
                "startup_time": {**timings, "cuda_graph": {}, "tokenizer_e2e": 0.2},
                "internal_states": [state for _ in front.lanes],
                "version": speech.version,
                "frontend": "python",
                "standin": __version__,
            }
        )
    )


def _arguments(front: Front) -> dict[str, Any]:
    options, sizes = front.options, front.options.sizes
    fixed = {
        "model_path": options.model_path,
        "tokenizer_path": options.model_path,
        "served_model_name": options.served_model_name,
        "tokenizer_mode": "auto",
        "load_format": "dummy",
        "dtype": "auto",
        "quantization": None,
        "kv_cache_dtype": "auto",
        "context_length": options.context_length,
        "host": options.host,
        "port": options.port,
        "nccl_port": None,
        "api_key": options.api_key or None,
        "admin_api_key": options.admin_api_key or None,
        "device": options.device,
        "tp_size": sizes.tp,
        "pp_size": sizes.pp,
        "dp_size": 1 if sizes.dp_attention else sizes.dp,
        "attn_dp_size": sizes.dp if sizes.dp_attention else 1,
        "attn_cp_size": 1,
        "moe_dp_size": 1,
        "ep_size": sizes.ep,
        "enable_dp_attention": sizes.dp_attention,
        "load_balance_method": "round_robin",
        "nnodes": options.nnodes,
        "node_rank": 0,
        "base_gpu_id": 0,
        "gpu_id_step": 1,
        "disaggregation_mode": options.disaggregation,
        "max_running_requests": options.max_running_requests,
        "max_total_tokens": options.max_total_tokens,
        "chunked_prefill_size": options.chunked_prefill_size,
        "disable_radix_cache": False,
        "disable_cuda_graph": False,
        "attention_backend": "flashinfer",
        "sampling_backend": "flashinfer",
        "speculative_algorithm": None,
        "speculative_num_draft_tokens": None,
        "decode_log_interval": options.decode_log_interval,
        "enable_metrics": options.enable_metrics,
        "expert_distribution_recorder_mode": None,
        "random_seed": options.model.seed,
        "watchdog_timeout": 300,
        "sleep_on_idle": False,
        "log_level": "info",
    }
    return {**fixed, **(_padding(options.device) if sizes.dp_attention else {}), **options.others}


def _padding(device: str) -> dict[str, Any]:
    """What decides about the graph that a batch of DP attention replays."""
    return {
        "cuda_graph_config": {
            "decode": {
                "backend": "disabled" if device == "cpu" else "full",
                "max_bs": max(CAPTURE_SIZES),
                "bs": list(CAPTURE_SIZES),
            },
            "prefill": {"backend": "disabled"},
        },
        "moe_a2a_backend": "none",
        "moe_dense_tp_size": None,
        "enable_dp_lm_head": False,
        "disable_custom_all_reduce": False,
        "disable_overlap_schedule": False,
    }


def model_info(call: Call) -> Reply:
    """What the model is said to be."""
    options = call.front.options
    return as_json(
        {
            "model_path": options.model_path,
            "served_model_name": options.served_model_name,
            "tokenizer_path": options.model_path,
            "is_generation": True,
            "preferred_sampling_params": None,
            "weight_version": "default",
            "load_format": "dummy",
            "reasoning_parser": None,
            "tool_call_parser": None,
            "disaggregation_mode": "null",
            "has_image_understanding": False,
            "has_audio_understanding": False,
            "model_type": "standin_moe",
            "architectures": ["StandinMoeForCausalLM"],
        }
    )


def models(call: Call) -> Reply:
    """The OpenAI list of models."""
    return as_json({"object": "list", "data": [_card(call)]})


def model_card(call: Call) -> Reply:
    """One model of the list, 404 for another name."""
    name = call.path.removeprefix("/v1/models/")
    if name != call.front.options.served_model_name:
        message = f"The model '{name}' does not exist"
        error = {
            "message": message,
            "type": "invalid_request_error",
            "param": "model",
            "code": "model_not_found",
        }
        return as_json({"error": error}, 404)
    return as_json(_card(call))


def _card(call: Call) -> dict[str, Any]:
    options = call.front.options
    return {
        "id": options.served_model_name,
        "object": "model",
        "created": int(call.front.started),
        "owned_by": "sglang",
        "root": options.served_model_name,
        "parent": None,
        "max_model_len": options.context_length,
    }


def loads(call: Call) -> Reply:
    """Load of each DP rank, as of its last refresh."""
    options, speech = call.front.options, call.front.options.speech
    wanted = call.query.get("dp_rank")
    shown = [
        speech.load(_load(call.front, rank, load))
        for rank, load in enumerate(_loads(call.front))
        if wanted in (None, str(rank))
    ]
    now = datetime.datetime.now(datetime.timezone.utc).isoformat()
    accelerators = {
        "accelerator": None if options.device == "cpu" else "stand-in",
        "num_accelerators": options.sizes.tp * options.sizes.pp // options.sizes.queues,
    }
    parts = _with_sums(shown) if speech.aggregate else {"loads": shown}
    head = {"timestamp": now, "version": speech.version}
    return as_json({**head, **speech.load(accelerators), **parts})


def _with_sums(shown: Sequence[dict[str, Any]]) -> dict[str, Any]:
    entries = [
        {**each, "num_total_reqs": each["num_running_reqs"] + each["num_waiting_reqs"]}
        for each in shown
    ]

    def total(name: str) -> float:
        return float(sum(each[name] for each in entries))

    count = max(1, len(entries))
    sums = {
        "total_running_reqs": int(total("num_running_reqs")),
        "total_waiting_reqs": int(total("num_waiting_reqs")),
        "total_reqs": int(total("num_total_reqs")),
        "avg_token_usage": round(total("token_usage") / count, 4),
        "avg_throughput": round(total("gen_throughput") / count, 2),
        "avg_utilization": round(total("utilization") / count, 4),
    }
    return {"dp_rank_count": len(entries), "loads": entries, "aggregate": sums}


def get_load(call: Call) -> Reply:
    """What there was before `/v1/loads`: a list of a few figures, of each DP rank."""
    entries = [
        {
            "rid": None,
            "http_worker_ipc": None,
            "dp_rank": rank,
            "num_reqs": load.running + load.waiting,
            "num_waiting_reqs": load.waiting,
            "num_tokens": load.tokens + load.waiting_tokens,
            "num_pending_tokens": load.waiting_tokens,
            "ts_tic": time.perf_counter(),
        }
        for rank, load in enumerate(_loads(call.front))
    ]
    names = call.front.options.speech.get_load
    return as_json([{name: entry[name] for name in names} for entry in entries])


def _loads(front: Front) -> list[Load]:
    return [load for engine in front.engines for load in engine.loads]


def _load(front: Front, rank: int, load: Load) -> dict[str, Any]:
    options = front.options
    return {
        "timestamp": load.timestamp,
        "dp_rank": rank,
        "num_running_reqs": load.running,
        "num_waiting_reqs": load.waiting,
        "num_waiting_uncached_tokens": load.waiting_tokens,
        "num_used_tokens": load.tokens,
        "num_total_tokens": load.tokens + load.waiting_tokens,
        "num_active_tokens": load.tokens,
        "num_prealloc_ready_tokens": 0,
        "max_total_num_tokens": options.max_total_tokens,
        "max_running_requests": options.max_running_requests,
        "token_usage": round(load.tokens / options.max_total_tokens, 4),
        "gen_throughput": round(load.throughput, 2),
        "cache_hit_rate": 0.0,
        "utilization": round(load.running / options.max_running_requests, 4),
        "total_prefill_uncached_tokens": 0,
        "total_prefill_busy_us": 0,
        "decode_moments": None,
        "memory": {
            "weight_gb": 0.0,
            "kv_cache_gb": 0.0,
            "graph_gb": 0.0,
            "token_capacity": options.max_total_tokens,
        },
        "disaggregation": {"mode": options.disaggregation, **dict.fromkeys(_TRANSFERS, 0)},
        "queues": {
            "waiting": load.waiting,
            "grammar": 0,
            "paused": 0,
            "retracted": 0,
            "prealloc_ready": 0,
        },
    }


_TRANSFERS = (
    "prefill_bootstrap_queue_reqs",
    "prefill_inflight_queue_reqs",
    "decode_prealloc_queue_reqs",
    "decode_transfer_queue_reqs",
    "decode_retracted_queue_reqs",
    "kv_transfer_speed_gb_s",
    "kv_transfer_latency_ms",
)


def metrics(call: Call) -> Reply:
    """A little Prometheus text; 404 without `--enable-metrics`."""
    front = call.front
    if not front.options.enable_metrics:
        return as_json({"detail": "Not Found"}, 404)
    lines: list[str] = []
    for name, pick in (
        ("num_running_reqs", lambda load: float(load.running)),
        ("num_queue_reqs", lambda load: float(load.waiting)),
        ("num_used_tokens", lambda load: float(load.tokens)),
        ("gen_throughput", lambda load: load.throughput),
    ):
        lines += [f"# HELP sglang:{name} {name}", f"# TYPE sglang:{name} gauge"]
        for rank, load in enumerate(_loads(front)):
            labels = f'dp_rank="{rank}",model_name="{front.options.served_model_name}"'
            lines.append(f"sglang:{name}{{{labels}}} {pick(load)}")
    waits = front.engines[0].sync_waits
    lines += [f"# TYPE {SYNC_WAITS} histogram"] if waits else []
    for rank, each in enumerate(waits):
        labels = f'dp_rank="{rank}",model_name="{front.options.served_model_name}"'
        lines += each.lines(labels)
    lines.append(f"sglang:uptime_seconds {time.time() - front.started:.3f}")
    return Reply(200, "\n".join(lines).encode() + b"\n", "text/plain; version=0.0.4")
