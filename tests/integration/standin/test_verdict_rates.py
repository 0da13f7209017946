"""How often verdicts are right from end to end, at the noise of a recorded window.

Two server lives, one after the other: balanced ranks, and a rank that is 8 % slower. 60 windows of
each are opened by HTTP, written, read and judged as pytest does it, at a limit of 1.05.

**The noise.** SGLang 0.5.23 with `--tp 2` on two CPU cores recorded four windows of 400 decode
steps of 8 requests, while other programs ran. sd of one rank and step (of the log ratio of the two
/ √2, winsorised by 20 % at both ends as the slowdown is): 0.093, 0.13, 0.25, 0.25; φ by lag 1: 0 to
0.03. The least disturbed window is planted here, with a φ of 0.12, since its correlations up to lag
10 add up to 0.14, as those of such a process do. Not planted: its spikes (its plain sd is 0.19).
Windows that are kept as test data are too short for φ (5 and 10 steps); their sd is 0.02 and 0.14.
GPUs are said to be quieter; no recording of several was at hand.

**The steps.** By the formula of `sglprof check --limit 1.05 --power 0.95` about 530 steps of such
noise find 1.08; these windows have 750.

**What this shows** is that figures, errors and ranks survive the way from the server to the
verdict, and that windows of as many steps as `--power` asks for suffice: with twice the noise a
fifth to two fifths of them are found. It hardly shows that the errors are right: balanced ranks are
eight standard errors below the limit and the slow one is five above it, so plain sums would do as
well, and errors without φ are noticed only because too few steps then seem enough.
tests/unit/analysis/test_rates.py shows it, on ranks at the limit.
"""

from __future__ import annotations

import math
import shutil
import statistics
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import httpx
import numpy as np
import pytest

from pytest_sglprof import ServerSpec, Threshold, Window, WindowSpec, read_window
from pytest_sglprof._analysis.certainty import log_ratios
from pytest_sglprof._analysis.times import sum_times
from pytest_sglprof._server.launch import Server, launch

SD, PHI = 0.093, 0.12
NEEDED = 530  # steps
STEPS = 750
WINDOWS = 60
LIMIT = Threshold(limit=1.05)
SLOW_RANK, SLOWDOWN = 1, 1.08
FAST = ("--step-ms", "0.5", "--layers", "1")


@dataclass(frozen=True)
class Found:
    """What a window showed. needed: steps that find `SLOWDOWN` with 95 %, as `--power` has it."""

    word: str
    slowest: str | None
    value: float
    needed: float
    reason: str


def judged(window: Window) -> Found:
    """Reads the files of a window, which are then removed."""
    verdict = window.verdict
    (judgement,) = verdict.judgements
    finding, estimate, value = judgement.finding, judgement.estimate, judgement.value
    assert finding is not None, verdict.reason
    assert estimate is not None, verdict.reason
    assert value is not None, verdict.reason
    shutil.rmtree(window.folder)
    needed = estimate.steps_to_find(SLOWDOWN, LIMIT.limit, 0.95)
    return Found(verdict.word, finding.slowest, value, needed, verdict.reason)


def recorded(server: Server, folder: Path) -> Window:
    """A closed window. The server ran nothing before it opened, so its steps are known."""
    window = Window(server, WindowSpec(num_steps=STEPS, thresholds=(LIMIT,)), folder)
    sampling = {"max_new_tokens": STEPS + 2, "ignore_eos": True}
    request = {"text": "one two three", "sampling_params": sampling}
    with window:
        httpx.post(f"{server.url}/generate", json=request, timeout=300).raise_for_status()
    assert window.capture.state == "complete", window.capture.reason
    return window


def server_life(folder: Path, windows: int, seed: int, *faults: str) -> list[Found]:
    """The windows of one server, each judged while the next is recorded."""
    spec = ServerSpec(
        kind="standin",
        args=("--tp", "2", "--device", "cpu", "--random-seed", str(seed)),
        standin_args=(*FAST, "--step-noise", f"sd={SD},phi={PHI}", *faults),
    )
    server = launch(spec, folder=folder / "server")
    try:
        with ThreadPoolExecutor(1) as pool:
            answers = [
                pool.submit(judged, recorded(server, folder / f"window-{number}"))
                for number in range(windows)
            ]
            return [answer.result() for answer in answers]
    finally:
        assert server.stop() == ()


def slow_life(folder: Path, windows: int) -> list[Found]:
    return server_life(folder, windows, 2, "--slow", f"rank={SLOW_RANK},factor={SLOWDOWN}")


@pytest.fixture(scope="module")
def own_leases(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SGLPROF_LEASE_DIR", str(tmp_path_factory.mktemp("leases")))
        yield


@pytest.fixture(scope="module")
def balanced(own_leases: None, tmp_path_factory: pytest.TempPathFactory) -> list[Found]:
    return server_life(tmp_path_factory.mktemp("balanced"), WINDOWS, 1)


@pytest.fixture(scope="module")
def slow(own_leases: None, tmp_path_factory: pytest.TempPathFactory) -> list[Found]:
    return slow_life(tmp_path_factory.mktemp("slow"), WINDOWS)


@pytest.mark.end_to_end
def test_balanced_ranks_pass_and_are_never_blamed(balanced: list[Found]) -> None:
    words = [found.word for found in balanced]
    print("balanced:", {word: words.count(word) for word in set(words)})
    assert words.count("fail") == 0, [each.reason for each in balanced if each.word == "fail"]
    assert words.count("pass") >= 54


@pytest.mark.end_to_end
def test_a_rank_8_percent_slower_is_found_and_never_passes(slow: list[Found]) -> None:
    words = [found.word for found in slow]
    print("slow:", {word: words.count(word) for word in set(words)})
    assert words.count("fail") >= 54
    assert {each.slowest for each in slow if each.word == "fail"} == {f"TP{SLOW_RANK}"}
    assert words.count("pass") == 0, [each.reason for each in slow if each.word == "pass"]


@pytest.mark.end_to_end
def test_windows_are_as_uncertain_as_the_recorded_one(
    balanced: list[Found], slow: list[Found]
) -> None:
    needed = statistics.median(found.needed for found in (*balanced, *slow))
    print(f"{needed:.0f} steps find {SLOWDOWN}, in the median of the windows")
    assert needed == pytest.approx(NEEDED, rel=0.15)  # about 420 where errors ignore φ
    ratios = [math.log(found.value) for found in slow]
    expected = SD * math.sqrt(2 * (1 + PHI) / (1 - PHI) / STEPS)
    assert statistics.fmean(ratios) == pytest.approx(math.log(SLOWDOWN), abs=3 * expected / 7)
    assert statistics.stdev(ratios) == pytest.approx(expected, rel=0.3)


@pytest.mark.end_to_end
def test_the_same_seed_gives_the_same_verdicts(slow: list[Found], tmp_path: Path) -> None:
    again = slow_life(tmp_path, 5)
    assert again == slow[:5]
    assert len({found.value for found in slow}) == WINDOWS


def test_the_noise_lies_between_that_of_two_kept_recordings(shared_data: Path) -> None:
    spreads = []
    for folder in ("sglang-cpu-tp2", "sglang-cpu-tp2-nostack"):
        files = sorted((shared_data / "torch" / folder).glob("*-TP-?.trace.json.gz"))
        (group,) = sum_times(read_window(files))
        times = group.matrix(group.select("compute"), "decode").astype(float)
        ratios = log_ratios(times)[:, 0] / math.sqrt(2)
        spreads.append(float(np.median(np.abs(ratios - np.median(ratios)))) / 0.6745)
    assert spreads[0] < SD < spreads[1]
