"""The lines that a wheel's scheduler writes about its batches, in each role that it can have."""

from __future__ import annotations

from collections.abc import Mapping
from types import ModuleType, SimpleNamespace
from typing import Any

from ci.old_wheels import GAP, MANAGERS, NOW, PARTS, Clock, logged
from ci.stubbed import Stub, Wheel

# What a batch is made to have; the names are those of the templates in standin/speech.py.
VALUES: Mapping[str, Any] = {
    "new_seq": 3, "new_token": 2048, "cached_token": 512, "token_usage": 0.25, "running": 7,
    "waiting": 2, "pending": 4096, "tokens": 1234, "graph": True, "generated": 560, "step": 321,
    "bootstrap": 5, "inflight": 6, "prealloc": 4, "transfer": 3, "retracted": 1,
}  # fmt: skip
CAPACITY = 4936  # tokens; a quarter of it is in use


def log_lines(wheel: Wheel) -> list[dict[str, Any]]:
    """Lines of batches, of each role that the version has."""
    shown: list[dict[str, Any]] = []
    for role in ("null", "prefill", "decode"):
        for graph in ("cuda", "cpu"):
            for steps in (False, True):
                if role != "null" and (graph == "cpu" or steps):
                    continue
                tags = " DP1 TP2" if role == "null" and graph == "cuda" else ""
                with logged(wheel, tags) as lines:
                    _report(wheel, role, graph, steps)
                known = {"role": role, "device": graph, "iterations": steps, "tags": tags.strip()}
                shown += [{**known, "line": line} for line in lines]
    unique: dict[str, dict[str, Any]] = {}
    for each in shown:  # versions without a choice say the same again
        unique.setdefault(each["line"], each)
    return list(unique.values())


def _report(wheel: Wheel, role: str, device: str, steps: bool) -> None:
    name = wheel.first(
        f"{PARTS}.metrics_reporter",
        f"{MANAGERS}.scheduler_metrics_mixin",
        f"{MANAGERS}.scheduler",
    )
    module = wheel.load(name)
    module.__dict__.update(time=Clock(), RECORD_STEP_TIME=False, LOG_FORWARD_ITERS=steps)
    if name.endswith("metrics_reporter"):
        _report_parts(wheel, module, role, device)
    else:
        _report_mixin(module, role, device)


def _queues(module: ModuleType, role: str, device: str) -> dict[str, Any]:
    """A scheduler's queues with `VALUES` in them."""
    mode = module.__dict__.get("DisaggregationMode", Stub("no roles"))
    request = SimpleNamespace(pending_bootstrap=False)
    count = VALUES.__getitem__
    return {
        "waiting_queue": [request] * count("waiting"),
        "running_batch": SimpleNamespace(
            reqs=[request] * count("running"), forward_iter=count("step"), batch_size=lambda: 7
        ),
        "disaggregation_mode": getattr(mode, role.upper()),
        "disagg_prefill_bootstrap_queue": SimpleNamespace(queue=[request] * count("bootstrap")),
        "disagg_prefill_inflight_queue": [request] * count("inflight"),
        "disagg_decode_prealloc_queue": SimpleNamespace(
            queue=[request] * count("prealloc"),
            num_tokens_pre_allocated=CAPACITY // 2,
            retracted_queue=[request] * count("retracted"),
        ),
        "disagg_decode_transfer_queue": SimpleNamespace(queue=[request] * count("transfer")),
        "max_total_num_tokens": CAPACITY,
        "spec_algorithm": SimpleNamespace(is_none=lambda: True, is_dspark=lambda: False),
        "device": device,
        "enable_priority_scheduling": False,
    }


def _report_mixin(module: ModuleType, role: str, device: str) -> None:
    """0.4 and 0.5.0 to about 0.5.10: methods of the scheduler, or of a part it inherits."""
    kind = module.__dict__.get("SchedulerMetricsMixin") or module.Scheduler
    used = VALUES["tokens"]
    began = 0.0 if "SchedulerMetricsMixin" in module.__dict__ else NOW - GAP
    rank = SimpleNamespace(
        **_queues(module, role, device),
        last_prefill_stats_tic=began, last_decode_stats_tic=began, is_hybrid=False,
        is_hybrid_swa=False, is_hybrid_ssm=False, enable_metrics=False, stats=SimpleNamespace(),
        last_prefill_tokens=VALUES["new_token"], num_prefill_tokens=VALUES["new_token"],
        num_generated_tokens=VALUES["generated"], forward_ct=VALUES["step"],
        server_args=SimpleNamespace(language_only=False, decode_log_interval=40),
        _largest_prefill_len=0, _largest_prefill_decode_len=0,
        tree_cache=SimpleNamespace(evictable_size=lambda: 0),
        token_to_kv_pool_allocator=SimpleNamespace(available_size=lambda: CAPACITY - used),
        _get_token_info=lambda: (used, used / CAPACITY, 0, 0),
        _publish_kv_events=lambda: None,
    )  # fmt: skip
    adder = {"log_input_tokens": VALUES["new_token"], "log_hit_tokens": VALUES["cached_token"]}
    if "PrefillStats" in module.__dict__:
        stats = module.PrefillStats(
            **adder,
            new_token_ratio=0.5,
            running_bs=VALUES["running"],
            num_new_seqs=VALUES["new_seq"],
        )
        kind.log_prefill_stats(rank, stats, VALUES["graph"])
    else:
        admitted = [None] * VALUES["new_seq"]
        more = (0,) if "offline" in str(kind.log_prefill_stats.__code__.co_varnames) else ()
        kind.log_prefill_stats(rank, SimpleNamespace(**adder), admitted, VALUES["running"], *more)
    if role != "prefill":
        with_graph = kind.log_decode_stats.__code__.co_argcount > 1
        kind.log_decode_stats(rank, *((VALUES["graph"],) if with_graph else ()))


def _report_parts(wheel: Wheel, module: ModuleType, role: str, device: str) -> None:
    """Since about 0.5.12: a reporter beside the scheduler."""
    pools = wheel.load(f"{PARTS}.pool_stats_observer")
    pool = pools.PoolStats(VALUES["tokens"], VALUES["token_usage"], 0, 0)
    queues = _queues(module, role, device)
    args = SimpleNamespace(language_only=False, decode_log_interval=40)
    scheduler = SimpleNamespace(
        **queues, server_args=args, forward_ct=VALUES["step"],
        pool_stats_observer=SimpleNamespace(get_pool_stats=lambda: pool),
        kv_events_publisher=Stub("events"),
    )  # fmt: skip
    reporter = object.__new__(module.SchedulerMetricsReporter)
    labels = {"cuda": "cuda graph", "cpu": "cpu graph"}
    fields = {
        "scheduler": scheduler, "is_stats_logging_rank": True, "stats": SimpleNamespace(),
        "current_scheduler_metrics_enabled": False, "last_prefill_stats_tic": 0.0,
        "last_decode_stats_tic": 0.0, "enable_mfu_metrics": False, "forward_ct_decode": 40,
        "decode_log_interval": 40, "num_generated_tokens": VALUES["generated"],
        "_graph_backend_label": labels[device], "_update_decode_queue_stats": lambda _: None,
    }  # fmt: skip
    vars(reporter).update(fields)
    module.__dict__["ENABLE_METRICS_DEVICE_TIMER"] = False
    disagg = SimpleNamespace(language_only=False, disaggregation_decode_host_receive_threshold=1)
    module.__dict__["get_disagg"] = lambda: disagg
    stats = module.PrefillStats(
        log_input_tokens=VALUES["new_token"], log_hit_tokens=VALUES["cached_token"],
        new_token_ratio=0.5, num_running_reqs=SimpleNamespace(total=VALUES["running"]),
        num_new_seqs=VALUES["new_seq"], num_pending_tokens=VALUES["pending"],
    )  # fmt: skip
    reporter.report_prefill_stats(queues["running_batch"], stats, VALUES["graph"])
    if role != "prefill":
        reporter.report_decode_stats(VALUES["graph"])
