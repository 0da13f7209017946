"""What watching costs the server: requests per second with and without, in pairs.

    python -m benchmarks.watch_cost [--real] [--pairs 30] [--seconds 2] [--limit 0.01]

Starts the stand-in, or with `--real` the SGLang of SGLPROF_REAL_PYTHON (ci/real_env.py),
with two replicas. A process of its own keeps `--clients` requests in flight for the whole
time; slices of `--seconds` are watched (`/v1/loads` twice a second, and the log) or not, by
turns: without, with, with, without. A request that lies in a slice with half of its time
counts there by half, so slices of few requests are exact as well. Everything shares this
machine's cores, so the watcher's own work, which is printed, is part of the ratio; on a
machine where others work too the ratio is no finer than its interval. Exit status 1 when the
whole interval of the cost lies above the limit, or the server's processor time for two
answers a second, as a share of one core, does.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil

from pytest_sglprof._config.model import ServerSpec
from pytest_sglprof._load.watcher import server_watch
from pytest_sglprof._server.launch import Server, launch

ROOT = Path(__file__).resolve().parents[1]
IDLE_S = 4.0  # of the server alone, whose own cost is taken off
RESAMPLES = 2000
SETTLE_S = 0.3  # a watch has started; that happens once a test, not once a slice


@dataclass(frozen=True)
class Slice:
    """A stretch of the load. spent: processor time of the server; own: of this process, s."""

    watched: bool
    begin: float
    end: float
    spent: float
    client_busy: float

    def requests(self, done: list[tuple[float, float]]) -> float:
        """Requests served in it: of each, the share of its time that lies inside."""
        inside = (
            max(0.0, min(end, self.end) - max(begin, self.begin)) / (end - begin)
            for begin, end in done
        )
        return sum(inside)


def main() -> int:
    """Measures and prints; the exit status."""
    parser = argparse.ArgumentParser(description="Measure what watching costs a server.")
    parser.add_argument("--real", action="store_true", help="a real SGLang on the CPU")
    parser.add_argument("--pairs", type=int, default=30)
    parser.add_argument("--seconds", type=float, default=3.0)
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
    total = 2 * options.pairs * (options.seconds + SETTLE_S + 0.1) + 3.0
    words = [sys.executable, "-m", "benchmarks.watch_cost", "--client", server.url]
    words += ["--clients", str(options.clients), "--seconds", str(total)]
    client = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    time.sleep(3.0)
    slices = []
    for number in range(options.pairs):
        for watched in (number % 2 == 0, number % 2 == 1):
            if watched:
                watch.start()
            time.sleep(SETTLE_S)
            spent, client_busy, begin = (
                tree_seconds(server.pid),
                time.process_time(),
                time.perf_counter(),
            )
            time.sleep(options.seconds)
            end, client_busy = time.perf_counter(), time.process_time() - client_busy
            slices.append(Slice(watched, begin, end, tree_seconds(server.pid) - spent, client_busy))
            watch.stop()
    output, _ = client.communicate()
    assert client.returncode == 0
    assert len(watch.samples) > options.pairs * options.seconds, "it was not watched"
    kind = f"{server.kind} {server.sizes.version}"
    least = report(slices, [(begin, end) for begin, end in json.loads(output)], kind)
    share = answer_share(server)
    print(f"the server's processor time for two answers a second: {100 * share:.2f} % of one core")
    print(f"limit: {100 * options.limit:.2f} %; load average {os.getloadavg()[0]:.1f}")
    return int(share > options.limit or least > options.limit)


def report(slices: list[Slice], done: list[tuple[float, float]], kind: str) -> float:
    """Prints what adjacent pairs tell; the lower end of the cost in requests per second."""
    rates = [one.requests(done) / (one.end - one.begin) for one in slices]
    yields = [one.requests(done) / max(one.spent, 0.01) for one in slices]
    for watched, word in ((False, "without"), (True, "with")):
        chosen = [rate for rate, one in zip(rates, slices, strict=True) if one.watched is watched]
        busy = sum(one.client_busy for one in slices if one.watched is watched)
        seconds = sum(one.end - one.begin for one in slices if one.watched is watched)
        print(
            f"{kind} {word}: {statistics.fmean(chosen):.2f} requests/s, this process "
            f"{100 * busy / seconds:.2f} % of one core"
        )
    lows = []
    for name, figures in (("requests/s", rates), ("requests/s of its processor time", yields)):
        pairs = [
            math.log(figures[at] / figures[at + 1]) * (1 if slices[at].watched else -1)
            for at in range(0, len(slices), 2)
        ]
        low, middle, high = cost_interval(pairs)
        lows.append(low)
        print(
            f"{name}: cost {100 * middle:+.2f} % (mean of {len(pairs)} pairs, 95 %: "
            f"{100 * low:+.2f} to {100 * high:+.2f} %)"
        )
    return lows[0]


def cost_interval(pairs: list[float]) -> tuple[float, float, float]:
    """What watching takes, 0 to 1: 2.5 %, mean and 97.5 % of resampled logs of ratios."""
    draw = random.Random(1)
    means = sorted(statistics.fmean(draw.choices(pairs, k=len(pairs))) for _ in range(RESAMPLES))
    ends = (means[-1 - RESAMPLES // 40], statistics.fmean(pairs), means[RESAMPLES // 40])
    low, middle, high = (1.0 - math.exp(value) for value in ends)
    return low, middle, high


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


async def completions(url: str, clients: int, seconds: float) -> list[tuple[float, float]]:
    """Begin and end of each request (`time.perf_counter`), in a closed loop."""
    done: list[tuple[float, float]] = []
    over = time.perf_counter() + seconds
    body = {"input_ids": [7] * 16, "sampling_params": {"max_new_tokens": 16, "ignore_eos": True}}
    async with httpx.AsyncClient(base_url=url, timeout=60, trust_env=False) as http:

        async def client() -> None:
            while time.perf_counter() < over:
                begin = time.perf_counter()
                (await http.post("/generate", json=body)).raise_for_status()
                done.append((begin, time.perf_counter()))

        await asyncio.gather(*(client() for _ in range(clients)))
    return done


def spec(real: bool) -> ServerSpec:
    """Two replicas, on the real thing or on the stand-in."""
    if not real:
        return ServerSpec(kind="standin", args=("--dp", "2"), standin_args=("--step-ms", "4"))
    sys.path.insert(0, str(ROOT))
    from tests.support.real_env import CPU_ARGUMENTS, RealSglang

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
