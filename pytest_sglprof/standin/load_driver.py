"""`python -m pytest_sglprof.standin.load_driver`: load without SGLang being installed.

Takes the place of `python -m sglang.benchmark.serving`: same options, same fields, and the
same habit of exiting 0 when requests failed.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import os
import random
import statistics
import sys
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

VOCABULARY = 32_000
WARM_UP_TOKENS = 32
SETTLE_S = 1.0
"""Between warm-up and load, as in the real driver."""


@dataclass(frozen=True)
class Row:
    """One request to send: token ids, and how many to generate."""

    ids: tuple[int, ...]
    output_len: int

    @property
    def text(self) -> str:
        """As many words as there are tokens."""
        return " ".join(f"t{number}" for number in self.ids)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one load and appends its result; the exit status of the process."""
    options = parse(sys.argv[1:] if argv is None else argv)
    url = base_url(options)
    headers = {**_auth(), **options.headers}
    if options.ready_check_timeout_sec > 0 and not _wait(
        f"{url}/v1/models", headers, options.ready_check_timeout_sec
    ):
        _say(f"Server at {url}/v1/models is not ready. Exiting.")
        return 1
    options.model = options.model or _model(url, headers)
    try:
        result = asyncio.run(_benchmark(options, url, headers))
    except WarmUpFailed as error:
        _say(f"Warmup failed - Please make sure benchmark arguments are correct. Error: {error}")
        return 1
    _report(result)
    if options.output_file:
        with Path(options.output_file).open("a", encoding="utf-8") as file:
            file.write(json.dumps(result) + "\n")
    return 0


class WarmUpFailed(Exception):
    """No request of the warm-up succeeded."""


def rows(options: argparse.Namespace) -> list[Row]:
    """The requests of a run; the same seed gives the same rows."""
    rng = random.Random(options.seed)
    requests: list[Row] = []
    for number in range(options.num_prompts):
        size = _length(rng, options.random_input_len, options.random_range_ratio)
        output = _length(rng, options.random_output_len, options.random_range_ratio)
        offset = rng.randrange(VOCABULARY)
        ids = tuple((offset + number + i) % VOCABULARY for i in range(size))
        requests.append(Row(ids, output))
    return requests


def _length(rng: random.Random, full: int, ratio: float) -> int:
    return rng.randint(max(int(full * ratio), 1), full) if full > 0 else 0


async def _benchmark(
    options: argparse.Namespace, url: str, headers: dict[str, str]
) -> dict[str, Any]:
    todo = rows(options)
    limit = asyncio.Semaphore(options.max_concurrency or len(todo) or 1)
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    async with httpx.AsyncClient(
        base_url=url, headers=headers, timeout=None, limits=limits
    ) as client:

        async def one(row: Row) -> Outcome:
            async with limit:
                return await _send(client, options, row)

        async def counted(row: Row) -> Outcome:
            outcome = await one(row)
            bar.step()
            return outcome

        _say(f"Starting warmup with {options.warmup_requests} sequences...")
        if options.warmup_requests and todo:
            short = Row(todo[0].ids, min(todo[0].output_len, WARM_UP_TOKENS))
            tries = await asyncio.gather(*(one(short) for _ in range(options.warmup_requests)))
            if not any(outcome.success for outcome in tries):
                raise WarmUpFailed(tries[0].error)
        _say(
            f"Warmup completed with {options.warmup_requests} sequences. "
            "Starting main benchmark run..."
        )
        if options.flush_cache:
            await client.post("/flush_cache")
        await asyncio.sleep(SETTLE_S)
        bar = Bar(len(todo), is_shown=not options.disable_tqdm)
        began = time.perf_counter()
        tasks = [asyncio.create_task(counted(row)) async for row in _paced(options, todo)]
        outcomes = list(await asyncio.gather(*tasks))
        duration = time.perf_counter() - began
        bar.end()
        reply = await _server_info(client)
    return _result(options, outcomes, duration, reply)


class Bar:
    """How many requests have ended, in the form of tqdm, which SGLang's driver has."""

    def __init__(self, total: int, *, is_shown: bool) -> None:
        self._total = total
        self._is_shown = is_shown
        self._done = 0
        self._began = time.perf_counter()
        self._show()

    def step(self) -> None:
        """One more."""
        self._done += 1
        self._show()

    def end(self) -> None:
        """Ends the line."""
        if self._is_shown:
            sys.stderr.write("\n")

    def _show(self) -> None:
        if self._is_shown:
            share = self._done / max(self._total, 1)
            seconds = int(time.perf_counter() - self._began)
            sys.stderr.write(
                f"\r{100 * share:3.0f}%|{'#' * int(10 * share):10}| {self._done}/{self._total} "
                f"[{seconds // 60:02d}:{seconds % 60:02d}]"
            )
            sys.stderr.flush()


async def _paced(options: argparse.Namespace, todo: Sequence[Row]) -> AsyncIterator[Row]:
    """Rows at their moments: all at once, or as a Poisson process of the given rate."""
    rng = random.Random(options.seed + 1)
    for row in todo:
        yield row
        if options.request_rate != float("inf"):
            await asyncio.sleep(rng.expovariate(options.request_rate))


async def _send(client: httpx.AsyncClient, options: argparse.Namespace, row: Row) -> Outcome:
    outcome = Outcome(len(row.ids), row.output_len, start=time.perf_counter())
    path = PATHS[options.backend]
    try:
        async with client.stream("POST", path, json=_payload(options, row)) as response:
            if response.status_code != 200:
                text = (await response.aread()).decode(errors="replace")
                outcome.error = f"{response.reason_phrase}: {text}"
                return outcome
            await _follow(response, options, outcome)
        outcome.latency = time.perf_counter() - outcome.start
        outcome.success = True
    except (httpx.HTTPError, ValueError, KeyError, IndexError) as error:
        outcome.error = f"{type(error).__name__}: {error}"
    return outcome


async def _follow(response: httpx.Response, options: argparse.Namespace, outcome: Outcome) -> None:
    last, seen = outcome.start, 0
    async for line in response.aiter_lines():
        data = line.removeprefix("data: ").strip()
        if not data or data == "[DONE]":
            continue
        text, count = _read(json.loads(data), options.backend, seen)
        if not text or count <= seen:
            continue
        now = time.perf_counter()
        if not outcome.ttft:
            outcome.ttft = now - outcome.start
        else:
            outcome.itl += [(now - last) / (count - seen)] * (count - seen)
        last, seen, outcome.text = now, count, text
        outcome.output_len = count


def _read(data: dict[str, Any], backend: str, seen: int) -> tuple[str, int]:
    """Text and number of tokens so far, of one event or of a whole answer."""
    if PATHS[backend] == "/generate":
        return data["text"], int(data["meta_info"]["completion_tokens"])
    choices = data.get("choices") or [{}]
    part = choices[0].get("delta") or choices[0].get("message") or choices[0]
    text = part.get("content") or part.get("text") or ""
    usage = data.get("usage") or {}
    return text, int(usage.get("completion_tokens") or seen + 1)


def _payload(options: argparse.Namespace, row: Row) -> dict[str, Any]:
    stream = not options.disable_stream
    ignore = not options.disable_ignore_eos
    if PATHS[options.backend] == "/generate":
        sampling: dict[str, Any] = {
            "temperature": options.temperature,
            "max_new_tokens": row.output_len,
            "ignore_eos": ignore,
        }
        if options.top_p < 1:
            sampling["top_p"] = options.top_p
        prompt = {"input_ids": row.ids} if options.tokenize_prompt else {"text": row.text}
        body: dict[str, Any] = {**prompt, "sampling_params": sampling, "stream": stream}
        if options.return_logprob:
            body["return_logprob"] = True
        return {**body, **options.extra}
    shared = {
        "model": options.served_model_name or options.model,
        "temperature": options.temperature,
        "stream": stream,
        "ignore_eos": ignore,
    }
    if PATHS[options.backend].endswith("chat/completions"):
        messages = [{"role": "user", "content": row.text}]
        format_fields = {"messages": messages, "max_completion_tokens": row.output_len}
    else:
        format_fields = {"prompt": row.text, "max_tokens": row.output_len}
    return {**shared, **format_fields, **options.extra}


def _result(
    options: argparse.Namespace,
    outcomes: Sequence[Outcome],
    duration: float,
    server_info: dict[str, Any] | None,
) -> dict[str, Any]:
    result = {
        "tag": options.tag,
        "backend": options.backend,
        "dataset_name": options.dataset_name,
        "request_rate": options.request_rate,
        "max_concurrency": options.max_concurrency,
        "sharegpt_output_len": options.sharegpt_output_len,
        "random_input_len": options.random_input_len,
        "random_output_len": options.random_output_len,
        "random_range_ratio": options.random_range_ratio,
        "server_info": server_info,
        **summarise(outcomes, duration),
    }
    if options.output_details:
        result |= {
            "input_lens": [outcome.prompt_len for outcome in outcomes],
            "output_lens": [o.output_len if o.success else 0 for o in outcomes],
            "ttfts": [outcome.ttft for outcome in outcomes],
            "itls": [outcome.itl for outcome in outcomes],
            "generated_texts": [outcome.text for outcome in outcomes],
            "errors": [outcome.error for outcome in outcomes],
        }
    for error in sorted({outcome.error for outcome in outcomes if outcome.error}):
        _say(f"output.error={error!r}")
    return result


def _auth() -> dict[str, str]:
    key = os.environ.get("OPENAI_API_KEY")
    return {"Authorization": f"Bearer {key}"} if key else {}


def _wait(url: str, headers: dict[str, str], limit: float) -> bool:
    deadline = time.monotonic() + limit
    while True:
        try:
            if httpx.get(url, headers=headers, timeout=5).status_code == 200:
                return True
        except httpx.HTTPError:
            pass
        if time.monotonic() >= deadline:
            return False
        time.sleep(min(1.0, limit))


def _model(url: str, headers: dict[str, str]) -> str:
    models = httpx.get(f"{url}/v1/models", headers=headers, timeout=5).json()["data"]
    return str(models[0]["id"])


async def _server_info(client: httpx.AsyncClient) -> dict[str, Any] | None:
    try:
        reply = await client.get("/server_info", timeout=10)
        if reply.status_code == 404:  # up to 0.5.3
            reply = await client.get("/get_server_info", timeout=10)
        info: dict[str, Any] | None = reply.json() if reply.status_code == 200 else None
    except (httpx.HTTPError, ValueError):
        return None
    return info


def _report(result: dict[str, Any]) -> None:
    _say(f"{' Serving Benchmark Result ':=^50}")
    for label, key in (
        ("Backend:", "backend"),
        ("Successful requests:", "completed"),
        ("Benchmark duration (s):", "duration"),
        ("Request throughput (req/s):", "request_throughput"),
        ("Output token throughput (tok/s):", "output_throughput"),
        ("Concurrency:", "concurrency"),
        ("Mean TTFT (ms):", "mean_ttft_ms"),
        ("Mean TPOT (ms):", "mean_tpot_ms"),
        ("Mean E2E Latency (ms):", "mean_e2e_latency_ms"),
    ):
        value = result[key]
        shown = f"{value:.2f}" if isinstance(value, float) else str(value)
        _say(f"{label:<40} {shown:<10}")
    _say("=" * 50)


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


# From what each request saw to the fields of SGLang's load driver.


@dataclass
class Outcome:
    """One request. Times in seconds; start on the clock of `time.perf_counter`."""

    prompt_len: int
    output_len: int
    success: bool = False
    start: float = 0.0
    latency: float = 0.0
    ttft: float = 0.0
    itl: list[float] = field(default_factory=list)
    text: str = ""
    error: str = ""


def summarise(outcomes: Sequence[Outcome], duration: float) -> dict[str, Any]:
    """Throughputs and latency statistics, in the driver's own names and order."""
    good = [outcome for outcome in outcomes if outcome.success]
    inputs = sum(outcome.prompt_len for outcome in good)
    outputs = sum(outcome.output_len for outcome in good)
    latencies = [outcome.latency for outcome in good]
    peak_tokens, peak_requests = _peaks(good)
    return {
        "duration": duration,
        "completed": len(good),
        "total_input_tokens": inputs,
        "total_input_text_tokens": inputs,
        "total_input_vision_tokens": 0,
        "total_output_tokens": outputs,
        "total_output_tokens_retokenized": outputs,
        "request_throughput": len(good) / duration,
        "input_throughput": inputs / duration,
        "output_throughput": outputs / duration,
        "total_throughput": (inputs + outputs) / duration,
        **_statistics("e2e_latency", latencies),
        **_statistics("ttft", [outcome.ttft for outcome in good]),
        **_statistics("tpot", [_tpot(o) for o in good if o.output_len > 1]),
        **_statistics("itl", [gap for outcome in good for gap in outcome.itl]),
        "concurrency": sum(latencies) / duration,
        "accept_length": None,
        "max_output_tokens_per_s": peak_tokens,
        "max_concurrent_requests": peak_requests,
    }


def percentile(values: Sequence[float], percent: float) -> float:
    """Linear interpolation between the two nearest, as numpy's default."""
    ordered = sorted(values)
    place = (len(ordered) - 1) * percent / 100
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def _statistics(name: str, seconds: Sequence[float]) -> dict[str, float]:
    values = [value * 1000 for value in seconds] or [0.0]
    return {
        f"mean_{name}_ms": statistics.fmean(values),
        f"median_{name}_ms": statistics.median(values),
        f"std_{name}_ms": statistics.pstdev(values),
        **{f"p{p}_{name}_ms": percentile(values, p) for p in (90, 95, 99)},
    }


def _tpot(outcome: Outcome) -> float:
    return (outcome.latency - outcome.ttft) / (outcome.output_len - 1)


def _peaks(good: Sequence[Outcome]) -> tuple[float, int]:
    """Most tokens, and most requests in flight, in any second since the first start."""
    if not good:
        return 0.0, 0
    first = min(outcome.start for outcome in good)
    last = max(outcome.start + outcome.latency for outcome in good)
    tokens = [0] * (math.ceil(last - first) + 1)
    flying = list(tokens)
    for outcome in good:
        moment = outcome.start + outcome.ttft - first
        for gap in (0.0, *outcome.itl):
            moment += gap
            if 0 <= int(moment) < len(tokens):
                tokens[int(moment)] += 1
        begin, end = int(outcome.start - first), int(outcome.start + outcome.latency - first)
        for second in range(begin, min(end + 1, len(flying))):
            flying[second] += 1
    return float(max(tokens)), max(flying)


# Options of the load driver: those of `python -m sglang.benchmark.serving` that matter.


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


if __name__ == "__main__":
    sys.exit(main())
