"""`python -m pytest_sglprof.standin.one_batch_driver`: batches of fixed shape, without SGLang.

Takes the place of `python -m sglang.benchmark.one_batch_server --base-url URL`: same options,
same fields of the result, and like it silent about batches that the server has no room for.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx

VOCABULARY = 32_000
FLUSHES = 3
FLUSH_PAUSE_S = 2.0


def main(argv: Sequence[str] | None = None) -> int:
    """Runs every case and appends a result for each; the exit status of the process."""
    options = parse(sys.argv[1:] if argv is None else argv)
    key = os.environ.get("OPENAI_API_KEY")
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    with httpx.Client(base_url=options.base_url, headers=headers, timeout=600) as client:
        info = _get(client, "/server_info")
        states = info["internal_states"]
        most = states[0]["effective_max_running_requests_per_dp"] * len(states)
        _say(f"skip_max_running_requests_threshold={most}")
        cases = itertools.product(options.batch_size, options.input_len, options.output_len)
        for number, (batch, input_len, output_len) in enumerate(cases):
            if batch > most:
                _say(
                    f"========Skip benchmark batch_size={batch} > "
                    f"skip_max_running_requests_threshold={most} due to max running requests "
                    "limit.========"
                )
                continue
            rng = random.Random(options.seed + number)
            result = run_case(client, rng, batch, input_len, output_len)
            for name, value in result.items():
                _say(f"{name}: {value}")
            line = {"run_name": options.run_name, **result}
            with Path(options.result_filename).open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
    return 0


def run_case(
    client: httpx.Client, rng: random.Random, batch: int, input_len: int, output_len: int
) -> dict[str, Any]:
    """Sends one batch in one request; its figures in the driver's own names, times in s."""
    _flush(client)
    prompts = [[rng.randrange(VOCABULARY) for _ in range(input_len)] for _ in range(batch)]
    sampling = {"temperature": 0.0, "max_new_tokens": output_len, "ignore_eos": True}
    body = {"input_ids": prompts, "sampling_params": sampling, "stream": True}
    began = time.perf_counter()
    tokens: dict[int, int] = {}
    ttft = 0.0
    with client.stream("POST", "/generate", json=body) as response:
        if response.status_code != 200:
            text = response.read().decode(errors="replace")
            raise RuntimeError(f"Request has failed. {response.status_code} {text}")
        for line in response.iter_lines():
            data = line.removeprefix("data: ").strip()
            if not data or data == "[DONE]":
                continue
            event = json.loads(data)
            tokens[event["index"]] = event["meta_info"]["completion_tokens"]
            if not ttft and len(tokens) == batch:
                ttft = time.perf_counter() - began
    latency = time.perf_counter() - began
    made = sum(tokens.values())
    state = _get(client, "/server_info")["internal_states"][0]
    return {
        "batch_size": batch,
        "input_len": input_len,
        "output_len": output_len,
        "latency": round(latency, 4),
        "input_throughput": round(batch * input_len / ttft, 2),
        "output_throughput": round(made / (latency - ttft), 2),
        "overall_throughput": round((batch * input_len + made) / latency, 2),
        "last_ttft": round(ttft, 4),
        "last_gen_throughput": round(state["last_gen_throughput"], 2),
        "acc_length": -1,
        "total_output_tokens": made,
    }


def _flush(client: httpx.Client) -> None:
    for attempt in range(FLUSHES):
        if attempt:
            time.sleep(FLUSH_PAUSE_S)
        response = client.post("/flush_cache")
        if response.status_code == 200:
            return
    response.raise_for_status()


def _get(client: httpx.Client, path: str) -> dict[str, Any]:
    answer: dict[str, Any] = client.get(path).raise_for_status().json()
    return answer


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Reads the command line; SystemExit (2) for what this driver cannot do."""
    parser = argparse.ArgumentParser(
        prog="python -m pytest_sglprof.standin.one_batch_driver",
        description="Sends batches of fixed shape and appends what it measured, one JSON object a "
        "batch, to a file. Options and fields are those of SGLang's own driver.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--base-url", required=True)
    add("--model", default=None)
    add("--run-name", default="default")
    add("--batch-size", type=int, nargs="+", default=[1])
    add("--input-len", type=int, nargs="+", default=[1024])
    add("--output-len", type=int, nargs="+", default=[16])
    add("--result-filename", default="result.jsonl")
    add("--dataset-name", choices=("random", "random-ids"), default="random-ids")
    add("--seed", type=int, default=42)
    add("--skip-warmup", action="store_true", required=True)  # it has none
    return parser.parse_args(list(argv))


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
