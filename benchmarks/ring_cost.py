"""What a ring of windows costs, and whether it fires its own trigger: a balanced server for long.

    python -m benchmarks.ring_cost [--minutes 30] [--limit 0.02]

Starts the stand-in with two replicas and sends it the same balanced load twice: alone, and under
`profile_window(trigger=ImbalanceOnset(...), ring=Ring())` with the defaults of `Ring`. Each load
takes so many minutes of real time (a pass of 20 ms; little of it is work of this machine). Prints
the throughput that the load driver reports for both, and what the window says. The exit status is
1 if the ring cost more than the limit, or there was an onset.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

CONCURRENCY, OUTPUT = 24, 100  # requests in flight, tokens of each
PASS_MS = 20.0
CONFIG = f"""
[server]
kind = "standin"
args = ["--dp", "2"]
standin_args = ["--step-ms", "{PASS_MS:g}", "--layers", "1", "--profile-stall", "rank=1,s=1"]
"""
TESTS = """
import pytest
from pytest_sglprof import ImbalanceOnset, Ring, balanced_load

LOAD = dict(
    warm_up=False, disable_stream=True, timeout={limit_s},
    **balanced_load(concurrency={concurrency}, requests={requests}, input_len=8,
                    output_len={output}),
)


def test_alone(sglang_server, bench_serving):
    bench_serving(**LOAD)


@pytest.mark.profile_window(trigger=ImbalanceOnset(within={limit_s}), ring=Ring())
def test_under_a_ring(sglang_server, bench_serving, load_watch):
    bench_serving(**LOAD)
    stalls = [round(each.stall, 2) for each in load_watch.disturbances.windows]
    print("stalls:", stalls)
"""


def main() -> int:
    """Measures and prints; the exit status."""
    parser = argparse.ArgumentParser(description="Measure what a ring of windows costs.")
    parser.add_argument("--minutes", type=float, default=30.0, help="of each of the two loads")
    parser.add_argument("--limit", type=float, default=0.02)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        results = run(folder, options.minutes)
    alone, ring = (
        next(load for load in results["loads"] if load["nodeid"].endswith(f"::{test}"))
        for test in ("test_alone", "test_under_a_ring")
    )
    cost = 1.0 - ring["output_throughput"] / alone["output_throughput"]
    (test,) = (each for each in results["tests"] if each["nodeid"].endswith("::test_under_a_ring"))
    onsets = [window["onset"] for window in results["windows"] if window["onset"]]
    for name, load in (("alone", alone), ("under a ring", ring)):
        print(f"{name}: {load['output_throughput']:.1f} tokens/s over {load['duration_s']:.0f} s")
    print(f"cost: {100 * cost:+.2f} % (limit {100 * options.limit:.2f} %)")
    print(f"{test['verdict']}: {test['reason']}; onsets: {len(onsets)}")
    return int(cost > options.limit or bool(onsets) or test["verdict"] != "pass")


def run(folder: Path, minutes: float) -> dict[str, Any]:
    """The results of the two loads."""
    rate = CONCURRENCY / (OUTPUT * PASS_MS / 1e3)  # requests per second
    tests = TESTS.format(
        limit_s=120 + 90 * minutes,
        concurrency=CONCURRENCY,
        requests=round(60 * minutes * rate),
        output=OUTPUT,
    )
    (folder / "sglprof.toml").write_text(CONFIG)
    (folder / "pytest.ini").write_text("[pytest]\n")
    (folder / "test_ring.py").write_text(tests)
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTEST_", "SGLPROF_"))}
    command = [sys.executable, "-m", "pytest", "--sglprof", "-q", "-rP"]
    ran = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    latest = folder / ".sglprof" / "latest" / "results.json"
    if ran.returncode or not latest.is_file():
        raise SystemExit(ran.stdout + ran.stderr)
    print(*(line for line in ran.stdout.splitlines() if "stalls:" in line), sep="\n")
    results: dict[str, Any] = json.loads(latest.read_text())
    return results


if __name__ == "__main__":
    raise SystemExit(main())
