"""Behaves like SGLang's load driver as far as its caller can see; put in place by conftest.py."""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

parser = argparse.ArgumentParser(prog="serving.py")
for name in ("base-url", "output-file", "backend", "dataset-name", "model", "tag"):
    parser.add_argument(f"--{name}")
parser.add_argument("--num-prompts", type=int, default=1000)
parser.add_argument("--max-concurrency", type=int)
parser.add_argument("--disable-tqdm", action="store_true")
parser.add_argument("--lost", type=int, default=0)
parser.add_argument("--available", type=int)
parser.add_argument("--hang", action="store_true")
parser.add_argument("--crash", action="store_true")
parser.add_argument("--no-result", action="store_true")
args = parser.parse_args()

total = args.available or args.num_prompts
say = sys.stdout.write
say(f"key={os.environ.get('OPENAI_API_KEY', '')} extra={os.environ.get('EXTRA', '')}\n")
if args.crash:
    raise ValueError("Warmup failed - Error: Bad Gateway")
if args.hang:
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    say(f"child {child.pid} {os.getpid()}\n")
    sys.stdout.flush()
    time.sleep(600)
if not args.disable_tqdm:
    for done in (0, total):
        sys.stderr.write(f"\r {done * 100 // total:3d}%|###| {done}/{total} [00:01<00:00, 4.2it/s]")
if not args.no_result:
    record = {
        "request_rate": float("inf"),
        "server_info": {"api_key": os.environ.get("OPENAI_API_KEY"), "tp_size": 2},
        "duration": 2.0,
        "completed": total - args.lost,
        "num_prompts": args.num_prompts,
        "tag": args.tag,
        "mean_ttft_ms": 12.5,
        "p99_itl_ms": float("inf"),
    }
    with Path(args.output_file).open("a") as stream:
        stream.write(json.dumps(record) + "\n")
