"""What watching costs the server: requests per second with and without, in pairs.

    python -m benchmarks.watch_cost [--real] [--pairs 30] [--seconds 2] [--limit 0.01]

Starts the stand-in, or with `--real` the SGLang of SGLPROF_REAL_PYTHON (ci/real_env.py),
with two replicas. A process of its own keeps `--clients` requests in flight for the whole
time; slices of `--seconds` are watched (`/v1/loads` twice a second, and the log) or not, by
turns. Everything shares this machine's cores, so the watcher's own work is part of the ratio.
On a machine where others work too the ratio is no finer than its quartiles; the ratio of
requests per second of the *server's processor time* depends on them less. What is judged is
the server's processor time for two answers a second, as a share of one core: exit status 1
when that is above the limit.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import httpx
import psutil

from pytest_sglprof.server.server import Server, launch
from pytest_sglprof.values import ServerSpec
from pytest_sglprof.watch.watcher import server_watch

ROOT = Path(__file__).resolve().parents[1]
IDLE_S = 4.0  # of the server alone, whose own cost is taken off
Slices = list[tuple[bool, float, float, float]]


def main() -> int:
    """Measures and prints; the exit status."""
    parser = argparse.ArgumentParser(description="Measure what watching costs a server.")
    parser.add_argument("--real", action="store_true", help="a real SGLang on the CPU")
    parser.add_argument("--pairs", type=int, default=30)
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--limit", type=float, default=0.01)
    parser.add_argument("--client", metavar="URL", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.client:
        print(
            json.dumps(asyncio.run(completions(options.client, options.clients, options.seconds)))
        )
        return 0
    with tempfile.TemporaryDirectory() as folder:
        server = launch(spec(options.real), folder=Path(folder) / "server")
        try:
            return measure(server, options)
        finally:
            server.stop()


def measure(server: Server, options: argparse.Namespace) -> int:
    """One long load, in slices that are watched or not; every other pair begins watched."""
    assert server.log is not None
    watch = server_watch(server.url, log=server.log.path)
    total = 2 * options.pairs * (options.seconds + 0.1) + 3.0
    words = [sys.executable, "-m", "benchmarks.watch_cost", "--client", server.url]
    words += ["--clients", str(options.clients), "--seconds", str(total)]
    client = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    time.sleep(3.0)
    slices = []
    for number in range(options.pairs):
        for watched in (number % 2 == 0, number % 2 == 1):
            if watched:
                watch.start()
            before, begin = tree_seconds(server.pid), time.perf_counter()
            time.sleep(options.seconds)
            spent, end = tree_seconds(server.pid) - before, time.perf_counter()
            slices.append((watched, begin, end, spent))
            watch.stop()
    output, _ = client.communicate()
    assert client.returncode == 0
    assert len(watch.samples) > options.pairs * options.seconds, "it was not watched"
    report(slices, json.loads(output), server)
    share = answer_share(server)
    print(f"the server's processor time for two answers a second: {100 * share:.2f} % of one core")
    print(f"limit: {100 * options.limit:.2f} %; load average {os.getloadavg()[0]:.1f}")
    return int(share > options.limit)


def report(slices: Slices, done: list[float], server: Server) -> None:
    """Ratios over adjacent pairs: of rates, and of requests per second of processor time."""
    counts = [sum(b <= at < e for at in done) for _, b, e, _ in slices]
    rates = [n / (e - b) for n, (_, b, e, _) in zip(counts, slices, strict=True)]
    yields = [n / max(spent, 0.01) for n, (*_, spent) in zip(counts, slices, strict=True)]
    for watched, word in ((False, "without"), (True, "with")):
        mine = [rate for rate, one in zip(rates, slices, strict=True) if one[0] is watched]
        print(
            f"{server.kind} {server.sizes.version} {word}: {statistics.fmean(mine):.1f} requests/s"
        )
    for name, figures in (("requests/s", rates), ("requests/s of its processor time", yields)):
        pairs = [
            figures[at] / figures[at + 1] if slices[at][0] else figures[at + 1] / figures[at]
            for at in range(0, len(slices), 2)
            if figures[at] and figures[at + 1]
        ]
        low, middle, high = statistics.quantiles(pairs, n=4)
        print(
            f"{name}: ratio {middle:.4f} (median of {len(pairs)} pairs, quartiles {low:.4f} to "
            f"{high:.4f})"
        )


def answer_share(server: Server, count: int = 300) -> float:
    """Processor time that two answers of `/v1/loads` cost a server without load, 0 to 1.

    What a server of one core would lose. Its idle time is taken off.
    """
    time.sleep(2.0)

    def spent(asks: int) -> tuple[float, float]:
        with httpx.Client(base_url=server.url, trust_env=False) as http:
            before, began = tree_seconds(server.pid), time.perf_counter()
            for _ in range(asks):
                http.get("/v1/loads?include=core").raise_for_status()
            while not asks and time.perf_counter() - began < IDLE_S:
                time.sleep(0.1)
            return (tree_seconds(server.pid) - before), time.perf_counter() - began

    idle, over = spent(0)
    asked, during = spent(count)
    return 2 * max(0.0, asked - idle * during / over) / count


def tree_seconds(pid: int) -> float:
    """Processor time of a process and its descendants, s."""
    root = psutil.Process(pid)
    return sum(sum(p.cpu_times()[:2]) for p in (root, *root.children(recursive=True)))


async def completions(url: str, clients: int, seconds: float) -> list[float]:
    """When requests were completed (`time.perf_counter`), in a closed loop."""
    done: list[float] = []
    over = time.perf_counter() + seconds
    body = {"input_ids": [7] * 16, "sampling_params": {"max_new_tokens": 16, "ignore_eos": True}}
    async with httpx.AsyncClient(base_url=url, timeout=60, trust_env=False) as http:

        async def client() -> None:
            while time.perf_counter() < over:
                (await http.post("/generate", json=body)).raise_for_status()
                done.append(time.perf_counter())

        await asyncio.gather(*(client() for _ in range(clients)))
    return done


def spec(real: bool) -> ServerSpec:
    """Two replicas, on the real thing or on the stand-in."""
    if not real:
        return ServerSpec(kind="standin", args=("--dp", "2"), standin_args=("--step-ms", "4"))
    sys.path.insert(0, str(ROOT))
    from tests.real_env import CPU_ARGUMENTS, RealSglang

    python = os.environ["SGLPROF_REAL_PYTHON"]
    sglang = RealSglang(python, Path(os.environ["SGLPROF_REAL_MODELS"]))
    return ServerSpec(
        model_path=sglang.model("llama"),
        python=python,
        args=(*CPU_ARGUMENTS, "--dp", "2"),
        env=tuple(sglang.environment(2).items()),
        ready_timeout=400.0,
    )


if __name__ == "__main__":
    sys.exit(main())
