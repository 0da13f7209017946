"""The routes of the stand-in, and what each of them answers."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pytest_sglprof.standin.documents import (
    get_load,
    loads,
    metrics,
    model_card,
    model_info,
    models,
    server_info,
)
from pytest_sglprof.standin.engine import Request
from pytest_sglprof.standin.front import Front
from pytest_sglprof.standin.handover import await_prompt, rooms_of
from pytest_sglprof.standin.http import (
    BadRequest,
    Call,
    Reply,
    Route,
    ServerFault,
    as_json,
    body_of,
)
from pytest_sglprof.standin.options import log

# `/generate` and the OpenAI routes, streamed or not.


_WORD = " stand"
_EVENTS = "text/event-stream; charset=utf-8"
DEFAULT_NEW_TOKENS = 128


def generate(call: Call) -> Reply:
    """SGLang's own route; text of a streamed answer is cumulative."""
    body = body_of(call)
    prompt = body.get("text") if body.get("input_ids") is None else body["input_ids"]
    if prompt is None:
        raise BadRequest("Either text, input_ids or input_embeds should be provided.")
    sampling = body.get("sampling_params") or {}
    if isinstance(prompt, list) and prompt and isinstance(prompt[0], list | str):
        limit = _limit(sampling)
        requests = [_request(call.front, one, limit, body, at) for at, one in enumerate(prompt)]
        if body.get("stream"):
            index = {request.rid: number for number, request in enumerate(requests)}
            events = _stream(requests, lambda one: {**_answer(one), "index": index[one.rid]})
            return Reply(200, content_type=_EVENTS, stream=events)
        for request in requests:
            _drain(request)
        return as_json([_answer(request) for request in requests])
    request = _request(call.front, prompt, _limit(sampling), body)
    if not body.get("stream"):
        _drain(request)
        return as_json(_answer(request))
    return Reply(200, content_type=_EVENTS, stream=_stream([request], _answer))


def completions(call: Call) -> Reply:
    """OpenAI's text completion."""
    body = body_of(call)
    request = _request(call.front, body.get("prompt", ""), _openai_limit(body), body)
    name = f"cmpl-{uuid.uuid4().hex}"
    if not body.get("stream"):
        _drain(request)
        text, usage = _WORD * request.made, _usage(request)
        return as_json(_openai(call, name, "text_completion", {"text": text}, "length", usage))

    def chunk(request: Request) -> dict[str, Any]:
        reason = "length" if request.made >= request.max_new_tokens else None
        usage = _usage(request) if reason else None
        return _openai(call, name, "text_completion", {"text": _WORD}, reason, usage)

    return Reply(200, content_type=_EVENTS, stream=_stream([request], chunk))


def chat_completions(call: Call) -> Reply:
    """OpenAI's chat completion."""
    body = body_of(call)
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise BadRequest("messages: Field required")
    text = " ".join(str(message.get("content", "")) for message in messages)
    request = _request(call.front, text, _openai_limit(body), body)
    name = f"chatcmpl-{uuid.uuid4().hex}"
    if not body.get("stream"):
        _drain(request)
        message = {"role": "assistant", "content": _WORD * request.made}
        part = {"message": message}
        return as_json(_openai(call, name, "chat.completion", part, "length", _usage(request)))

    def chunk(request: Request) -> dict[str, Any]:
        reason = "length" if request.made >= request.max_new_tokens else None
        part = {"delta": {"role": "assistant", "content": _WORD}}
        usage = _usage(request) if reason else None
        return _openai(call, name, "chat.completion.chunk", part, reason, usage)

    return Reply(200, content_type=_EVENTS, stream=_stream([request], chunk))


def _request(
    front: Front, prompt: Any, limit: int, body: dict[str, Any], index: int = 0
) -> Request:
    words = tuple(prompt) if isinstance(prompt, list) else tuple(str(prompt).split() or [""])
    if len(words) >= front.options.context_length:
        raise BadRequest(
            f"The input ({len(words)} tokens) is longer than the model's context length "
            f"({front.options.context_length} tokens)."
        )
    rank = body.get("routed_dp_rank")
    rank = body.get("data_parallel_rank") if rank is None else rank
    lanes = len(front.lanes)
    if rank is not None and lanes > 1 and not 0 <= int(rank) < lanes:
        raise BadRequest(f"routed_dp_rank={rank} out of range [0, {lanes})")
    rid = body.get("rid")
    request = Request(words, limit, rid if isinstance(rid, str) else uuid.uuid4().hex)
    _meet(front, request, body, index)
    front.submit(request, int(rank) if rank is not None and lanes > 1 else None)
    return request


def _meet(front: Front, request: Request, body: dict[str, Any], index: int) -> None:
    """What a disaggregated server does first: it opens a room, or waits for what happens in one."""
    mode = front.options.disaggregation
    if mode == "null":
        return
    if (address := rooms_of(body, index)) is None:
        raise BadRequest(
            "Invalid request: Disaggregated request received without bootstrap room id. "
            f"recv_req.rid={request.rid!r}"
        )
    if mode == "prefill":
        request.max_new_tokens, request.prompt_ran = 1, front.rooms.of(address[2])
        return
    try:
        await_prompt(*address)
    except OSError as error:
        raise ServerFault(f"Decode handshake failed for request {request.rid!r}: {error}") from None


def _limit(sampling: dict[str, Any]) -> int:
    value = sampling.get("max_new_tokens", DEFAULT_NEW_TOKENS)
    if not isinstance(value, int) or value < 0:
        raise BadRequest(f"max_new_tokens must be at least 0, got {value}.")
    return max(1, value)


def _openai_limit(body: dict[str, Any]) -> int:
    given = body.get("max_completion_tokens") or body.get("max_tokens") or 16
    return _limit({"max_new_tokens": given})


def _drain(request: Request) -> None:
    while request.tokens.get() is not None:
        pass


def _stream(requests: Sequence[Request], shape: Any) -> Iterator[bytes]:
    """One event a token of each request, in turn; a client that leaves ends them."""
    running = list(requests)
    try:
        while running:
            for request in tuple(running):
                if (made := request.tokens.get()) is None:
                    running.remove(request)
                    continue
                view = Request(request.prompt, request.max_new_tokens, request.rid, made)
                view.cached, view.dp_rank = request.cached, request.dp_rank
                view.created = request.created
                yield b"data: " + json.dumps(shape(view)).encode() + b"\n\n"
        yield b"data: [DONE]\n\n"
    finally:
        for request in requests:
            request.aborted = True


def _answer(request: Request) -> dict[str, Any]:
    finished = request.made >= request.max_new_tokens
    return {
        "text": _WORD * request.made,
        "output_ids": list(range(request.made)),
        "meta_info": {
            "id": request.rid,
            "finish_reason": {"type": "length", "length": request.made} if finished else None,
            "prompt_tokens": len(request.prompt),
            "weight_version": "default",
            "weight_versions": [{"version": "default", "start": 0, "end": request.made}],
            "num_retractions": 0,
            "reasoning_tokens": 0,
            "cached_tokens_details": {"device": request.cached, "host": 0},
            "completion_tokens": request.made,
            "cached_tokens": request.cached,
            "dp_rank": request.dp_rank,
            "e2e_latency": time.time() - request.created,
            "response_sent_to_client_ts": time.time(),
        },
    }


def _usage(request: Request) -> dict[str, Any]:
    return {
        "prompt_tokens": len(request.prompt),
        "total_tokens": len(request.prompt) + request.made,
        "completion_tokens": request.made,
        "prompt_tokens_details": None,
        "reasoning_tokens": 0,
    }


def _openai(
    call: Call,
    name: str,
    kind: str,
    part: dict[str, Any],
    reason: str | None,
    usage: dict[str, Any] | None,
) -> dict[str, Any]:
    choice = {"index": 0, **part, "logprobs": None, "finish_reason": reason}
    return {
        "id": name,
        "object": kind,
        "created": int(time.time()),
        "model": call.front.options.served_model_name,
        "choices": [choice],
        "usage": usage,
    }


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
        return Route(("GET",), model_card)
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
    params = {name: params[name] for name in call.front.options.speech.body if name in params}
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
    "/server_info": Route(("GET",), server_info),
    "/get_server_info": Route(("GET",), server_info),
    "/model_info": Route(("GET",), model_info),
    "/get_model_info": Route(("GET",), model_info),
    "/v1/models": Route(("GET",), models),
    "/v1/loads": Route(("GET",), loads),
    "/get_load": Route(("GET",), get_load),
    "/metrics": Route(("GET",), metrics),
    "/start_profile": Route(_BOTH, start_profile, admin=True),
    "/stop_profile": Route(_BOTH, stop_profile, admin=True),
    "/flush_cache": Route(_BOTH, flush_cache, admin=True),
    "/slow_down": Route(_BOTH, slow_down, admin=True),
    "/generate": Route(("POST", "PUT"), generate),
    "/v1/completions": Route(("POST",), completions),
    "/v1/chat/completions": Route(("POST",), chat_completions),
}
