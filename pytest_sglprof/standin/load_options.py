"""Options of the load driver: those of `python -m sglang.benchmark.serving` that matter."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from typing import Any

PATHS = {
    "sglang": "/generate",
    "sglang-native": "/generate",
    "sglang-oai": "/v1/completions",
    "sglang-oai-chat": "/v1/chat/completions",
    "vllm": "/v1/completions",
    "vllm-chat": "/v1/chat/completions",
}


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Reads the command line; SystemExit (2) for what this driver cannot do.

    `extra` of the result is `--extra-request-body` as a dictionary, `headers` the
    dictionary of `--header`.
    """
    parser = argparse.ArgumentParser(
        prog="python -m pytest_sglprof.standin.load_driver",
        description="Sends requests with random prompts and appends what it measured, as one "
        "JSON object, to a file. Options and fields are those of SGLang's own driver.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--backend", choices=sorted(PATHS), default="sglang")
    add("--base-url", default=None)
    add("--host", default="0.0.0.0")
    add("--port", type=int, default=30000)
    add("--ready-check-timeout-sec", type=int, default=60)
    add("--dataset-name", choices=("random", "random-ids"), default="random-ids")
    add("--dataset-path", default="")
    add("--model", default=None)
    add("--served-model-name", default=None)
    add("--tokenizer", default=None)
    add("--num-prompts", type=int, default=1000)
    add("--sharegpt-output-len", type=int, default=None)
    add("--random-input-len", type=int, default=1024)
    add("--random-output-len", type=int, default=1024)
    add("--random-range-ratio", type=float, default=0.0)
    add("--request-rate", type=float, default=float("inf"))
    add("--max-concurrency", type=int, default=None)
    add("--output-file", default=None)
    add("--output-details", action="store_true")
    add("--print-requests", action="store_true")
    add("--disable-tqdm", action="store_true")
    add("--disable-stream", action="store_true")
    add("--return-logprob", action="store_true")
    add("--seed", type=int, default=42)
    add("--disable-ignore-eos", action="store_true")
    add("--temperature", type=float, default=0.0)
    add("--top-p", type=float, default=1.0)
    add("--extra-request-body", default=None, metavar="JSON")
    add("--apply-chat-template", action="store_true")
    add("--flush-cache", action="store_true")
    add("--warmup-requests", type=int, default=1)
    add("--tokenize-prompt", action="store_true")
    add("--tag", default=None)
    add("--header", nargs="+", default=None, metavar="NAME=VALUE")
    options = parser.parse_args(list(argv))
    try:
        options.extra = _extra(options.extra_request_body)
    except ValueError as error:
        parser.error(f"--extra-request-body: {error}")
    options.headers = dict(text.split("=", 1) for text in options.header or () if "=" in text)
    if options.tokenize_prompt and options.backend != "sglang":
        parser.error("--tokenize-prompt works with --backend sglang only")
    if not 0 <= options.random_range_ratio <= 1:
        parser.error("--random-range-ratio must lie between 0 and 1")
    return options


def base_url(options: argparse.Namespace) -> str:
    """`--base-url`, else of host and port."""
    given = options.base_url or f"http://{options.host}:{options.port}"
    return str(given).rstrip("/")


def _extra(text: str | None) -> dict[str, Any]:
    value = json.loads(text) if text else {}
    if not isinstance(value, dict):
        raise ValueError("expected a JSON object")
    return value
