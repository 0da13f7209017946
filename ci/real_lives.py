"""A/A lives of a real server on this CPU: each is judged against the ten before it.

    eval "$(python3 ci/real_env.py)"
    python -m ci.real_lives --folder DIR [--lives 30] [--limit 1.05] [--model llama]

A life is a run of pytest: it starts the server, warms it up, opens one window under a fixed load,
and ends the server. Its record stays in the folder, so that a command that was ended goes on where
it was. Takes two to three minutes a life. Nothing changes between lives, so each fail is false. The
exit status is 1 where there is one.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from pytest_sglprof._baselines.history import read_history
from pytest_sglprof._baselines.records import LifeRecord
from pytest_sglprof._config.model import Threshold
from pytest_sglprof._verdict.regression import (
    Against,
    KnownLife,
    LifeCase,
    LivesVerdict,
    judge_lives,
)
from tests.support.real_env import real_sglang
from tests.support.real_project import run_project, write_project

BEFORE = 10  # accepted lives
MOST_LOST = 3  # lives without a record in a row
WINDOW = "steady"
BODY = f"""
LOAD = dict(max_concurrency=4, random_input_len=32, random_output_len=64, random_range_ratio=1.0)


def test_a_life(sglang_server, bench_serving, profile_window):
    bench_serving(num_prompts=24, **LOAD)
    with bench_serving.running(num_prompts=1000, **LOAD) as load:
        with profile_window("{WINDOW}", num_steps=200) as window:
            window.wait()
        load.stop()
"""


def lives_of(folder: Path) -> list[LifeRecord]:
    """The records of all lives that were run there, the oldest first."""
    every = read_history(folder / ".sglprof")
    return [each for each in every if each.key.window == WINDOW and not each.apart]


def run_lives(folder: Path, count: int, model: str) -> list[LifeRecord]:
    """Runs lives until there are so many; their records."""
    folder.mkdir(parents=True, exist_ok=True)
    write_project(
        folder,
        real_sglang(),
        BODY,
        model=model,
        args=(),
        ranks=1,
        threshold='metric = "regression"\nlimit = 1.05',
    )
    lost = 0  # in a row
    while len(known := lives_of(folder)) < count:
        began = time.monotonic()
        outcome = run_project(folder, "--sglprof-set=output.keep=failed")
        lost = lost + 1 if len(lives_of(folder)) == len(known) else 0
        what = f"no record, pytest {outcome.status}" if lost else "recorded"
        print(f"life {len(known) + 1}: {what}, {time.monotonic() - began:.0f} s", flush=True)
        if lost == MOST_LOST:
            raise SystemExit(f"{lost} lives in a row left no record")
    return known[:count]


def judged(lives: Sequence[LifeRecord], limit: float) -> list[LivesVerdict]:
    """The verdict on compute of each life against the ten before it."""
    cases = [
        LifeCase(
            (lives[at],),
            Against("unused", exists=True, lives=tuple(map(KnownLife, lives[at - BEFORE : at]))),
            (Threshold("regression", limit),),
        )
        for at in range(BEFORE, len(lives))
    ]
    return [judge_lives([case])[0] for case in cases]


def upper_end(fails: int, of: int) -> float:
    """The rate at which so few fails, or fewer, have a chance of 5 % (binomial, exact)."""
    low, high = 0.0, 1.0
    for _ in range(60):
        rate = (low + high) / 2
        chance, term = 0.0, (1 - rate) ** of
        for count in range(fails + 1):
            chance += term
            term *= (of - count) / (count + 1) * rate / (1 - rate)
        low, high = (rate, high) if chance > 0.05 else (low, rate)
    return low


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the lives and judges them; the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--lives", type=int, default=30)
    parser.add_argument("--limit", type=float, default=1.05)
    parser.add_argument("--model", default="llama", help="of ci/make_tiny_model.py")
    options = parser.parse_args(arguments)
    verdicts = judged(run_lives(options.folder, options.lives, options.model), options.limit)
    for number, verdict in enumerate(verdicts, BEFORE + 1):
        print(f"life {number}: {verdict.word}: {verdict.sentence}")
    words = [verdict.word for verdict in verdicts]
    if words:
        fails, highest = words.count("fail"), 100 * upper_end(words.count("fail"), len(words))
        print(f"{fails} of {len(words)} fail falsely, at most {highest:.0f} % with 95 % certainty")
        print(f"{words.count('pass')} pass")
    return int("fail" in words)


if __name__ == "__main__":
    sys.exit(main())
