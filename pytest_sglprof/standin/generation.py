"""`/generate` and the OpenAI routes, streamed or not."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Iterator
from typing import Any

from pytest_sglprof.standin.batching import Request
from pytest_sglprof.standin.front import Front
from pytest_sglprof.standin.web import BadRequest, Call, Reply, as_json, body_of

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
        requests = [_request(call.front, one, _limit(sampling), body) for one in prompt]
        for request in requests:
            _drain(request)
        return as_json([_answer(request) for request in requests])
    request = _request(call.front, prompt, _limit(sampling), body)
    if not body.get("stream"):
        _drain(request)
        return as_json(_answer(request))
    return Reply(200, content_type=_EVENTS, stream=_stream(request, _answer))


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

    return Reply(200, content_type=_EVENTS, stream=_stream(request, chunk))


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

    return Reply(200, content_type=_EVENTS, stream=_stream(request, chunk))


def _request(front: Front, prompt: Any, limit: int, body: dict[str, Any]) -> Request:
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
    front.submit(request, int(rank) if rank is not None and lanes > 1 else None)
    return request


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


def _stream(request: Request, shape: Any) -> Iterator[bytes]:
    """One event a token; a client that leaves ends the request."""
    try:
        while (made := request.tokens.get()) is not None:
            view = Request(request.prompt, request.max_new_tokens, request.rid, made)
            view.cached, view.dp_rank, view.created = (
                request.cached,
                request.dp_rank,
                request.created,
            )
            yield b"data: " + json.dumps(shape(view)).encode() + b"\n\n"
        yield b"data: [DONE]\n\n"
    finally:
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
