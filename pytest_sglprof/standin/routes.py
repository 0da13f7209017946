"""Which path answers what: health, control and information. Generation has its own module."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from pytest_sglprof.standin import generation, info
from pytest_sglprof.standin.batching import Request
from pytest_sglprof.standin.logs import log
from pytest_sglprof.standin.web import BadRequest, Call, Reply, Route, ServerFault, as_json, body_of

HEALTH_TIMEOUT_S = 20.0

_PROFILE_TYPES: Mapping[str, tuple[type, ...]] = {
    "output_dir": (str,),
    "start_step": (int,),
    "num_steps": (int,),
    "activities": (list,),
    "profile_by_stage": (bool,),
    "with_stack": (bool,),
    "record_shapes": (bool,),
    "profile_id": (str,),
    "merge_profiles": (bool,),
    "profile_prefix": (str,),
    "profile_stages": (list,),
    "detailed_annotations": (bool,),
}
_NEVER_NULL = ("profile_by_stage", "merge_profiles", "detailed_annotations")


def find(path: str) -> Route | None:
    """The route of a path, None for 404."""
    if path.startswith("/v1/models/"):
        return Route(("GET",), info.model_card)
    return ROUTES.get(path)


def ready(call: Call) -> Reply:
    """200 once the server serves, 503 before."""
    return Reply(200 if call.front.ready else 503)


def health(call: Call) -> Reply:
    """Runs a batch of one token when the server is idle, and takes a second or more."""
    front = call.front
    if not front.ready or front.stopping:
        return Reply(503)
    asked = time.time()
    probe = Request(prompt=(0,), max_new_tokens=1)
    if all(lane.is_empty for _, lane in front.lanes):
        front.submit(probe)
    while time.time() < asked + HEALTH_TIMEOUT_S:
        time.sleep(1)
        if any(engine.last_progress > asked for engine in front.engines):
            return Reply(200)
    probe.aborted = True
    clock = time.strftime("%H:%M:%S", time.localtime(asked))
    last = max(engine.last_progress for engine in front.engines)
    log(
        "Health check failed. Server couldn't get a response from detokenizer for last "
        f"{HEALTH_TIMEOUT_S:.0f} seconds. tic start time: {clock}. last_heartbeat time: "
        f"{time.strftime('%H:%M:%S', time.localtime(last))}"
    )
    return Reply(503)


def start_profile(call: Call) -> Reply:
    """Opens a window, or arms one; the reply comes at once."""
    params = body_of(call) if call.body.strip() else {}
    _check_profile(params)
    params["profile_id"] = params.get("profile_id") or str(time.time())
    _succeed(call.front.profile(params))
    return Reply(200, b"Start profiling.\n")


def stop_profile(call: Call) -> Reply:
    """Closes the window; the reply comes once all files are written."""
    _succeed(call.front.profile(None))
    return Reply(200, b"Stop profiling. This will take some time.\n")


def flush_cache(call: Call) -> Reply:
    """Forgets prefixes of an idle server; 400 for a busy one."""
    busy = [engine for engine in call.front.engines if not engine.flush()]
    if busy:
        waiting = sum(len(lane.waiting) for engine in busy for lane in engine.lanes)
        running = sum(len(lane.running) for engine in busy for lane in engine.lanes)
        log(
            "Cache not flushed because there are pending requests. "
            f"#queue-req: {waiting}, #running-req: {running}"
        )
        return Reply(400, b"Flush cache failed.\n")
    return Reply(
        200,
        b"Cache flushed.\nPlease check backend logs for more details. (When there are running "
        b"or waiting requests, the operation will not be performed.)\n",
    )


def slow_down(call: Call) -> Reply:
    """Makes every forward pass of every rank sleep first; null ends it."""
    seconds = body_of(call).get("forward_sleep_time")
    if seconds is not None and not isinstance(seconds, int | float):
        raise BadRequest("forward_sleep_time: Input should be a valid number")
    for engine in call.front.engines:
        engine.forward_sleep = seconds
    return as_json(None)


def _check_profile(params: Mapping[str, Any]) -> None:
    for key, value in params.items():
        kinds = _PROFILE_TYPES.get(key)
        if kinds is None or (value is None and key not in _NEVER_NULL):
            continue
        wrong_bool = isinstance(value, bool) and bool not in kinds
        if wrong_bool or not isinstance(value, kinds):
            raise BadRequest(f"body -> {key}: Input should be a valid {kinds[0].__name__}")


def _succeed(answer: Mapping[str, Any]) -> None:
    if not answer["ok"]:
        raise ServerFault(answer["message"])


_BOTH = ("GET", "POST")
ROUTES: Mapping[str, Route] = {
    "/ready": Route(("GET",), ready),
    "/health": Route(("GET",), health),
    "/health_generate": Route(("GET",), health),
    "/server_info": Route(("GET",), info.server_info),
    "/get_server_info": Route(("GET",), info.server_info),
    "/model_info": Route(("GET",), info.model_info),
    "/get_model_info": Route(("GET",), info.model_info),
    "/v1/models": Route(("GET",), info.models),
    "/v1/loads": Route(("GET",), info.loads),
    "/metrics": Route(("GET",), info.metrics),
    "/start_profile": Route(_BOTH, start_profile, admin=True),
    "/stop_profile": Route(_BOTH, stop_profile, admin=True),
    "/flush_cache": Route(_BOTH, flush_cache, admin=True),
    "/slow_down": Route(_BOTH, slow_down, admin=True),
    "/generate": Route(("POST", "PUT"), generation.generate),
    "/v1/completions": Route(("POST",), generation.completions),
    "/v1/chat/completions": Route(("POST",), generation.chat_completions),
}
