"""Dumps as SGLang's recorder writes them, read in the interpreter that has torch."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pytest_sglprof._capture.experts import CONVERTER
from tests.support.real_env import real_sglang

pytestmark = pytest.mark.real_server

# Makes the dumps of each line, {"dumps": {file name: dump}, "arguments": [...]}, lists being
# tensors, and converts them; one process, since torch takes seconds to import.
DRIVER = """
import contextlib, io, json, runpy, sys, torch
def tensors(value, key=""):
    if isinstance(value, dict):
        return {k: tensors(v, k) for k, v in value.items()}
    if isinstance(value, list) and key != "records":
        return torch.tensor(value, dtype=torch.int32)
    return [tensors(v) for v in value] if isinstance(value, list) else value
convert = runpy.run_path(sys.argv[1])["main"]
for line in sys.stdin:
    job = json.loads(line)
    for name, dump in job["dumps"].items():
        torch.save(tensors(dump), name)
    out, error = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(error):
        status = convert(job["arguments"])
    print(json.dumps([status, out.getvalue(), error.getvalue()]), flush=True)
"""
RANKS = {"TP0 EP0": 0, "TP1 EP1": 1}
RNG = np.random.default_rng(15)
Passes = dict[int, np.ndarray]  # forward id -> counts (layers, experts)
LAYERS, EXPERTS = 3, 4
PLACED = [[2, 0, 1, 3]] * LAYERS  # physical -> logical


def counts(passes: int) -> np.ndarray:
    return RNG.integers(1, 50, (passes, LAYERS, EXPERTS))


def dump(
    rank: int, passes: dict[int, np.ndarray], drafts: dict[int, np.ndarray] | None = None
) -> Any:
    """drafts: records that stand before those of passes, with ids of their own."""
    listed = [*(drafts or {}).items(), *passes.items()]
    records = [
        {
            "forward_pass_id": number,
            "rank": rank,
            "gatherer_key": "primary",
            "global_physical_count": counted.tolist(),
        }
        for number, counted in listed
    ]
    return {"records": records, "last_physical_to_logical_map": PLACED}


class Converted:
    """What the converter left: exit status, its report, its error, and the arrays."""

    driver: subprocess.Popen[str]

    def __init__(self, folder: Path, dumps: list[Any], *options: str, ranks: Any = RANKS) -> None:
        names = [str(folder / f"dump{number}.pt") for number in range(len(dumps))]
        out = folder / "experts.npz"
        arguments = [str(out), "--ranks", json.dumps(ranks), *options, *names]
        job = {"dumps": dict(zip(names, dumps, strict=True)), "arguments": arguments}
        assert self.driver.stdin is not None
        assert self.driver.stdout is not None
        print(json.dumps(job), file=self.driver.stdin, flush=True)
        self.status, report, self.error = json.loads(self.driver.stdout.readline())
        if not self.status:
            self.report = json.loads(report)
            with np.load(out, allow_pickle=False) as stored:
                self.arrays = {name: stored[name] for name in stored}

    def tokens(self, label: str, number: int) -> dict[tuple[int, int], int]:
        """(layer, logical expert) -> tokens of a rank in a pass."""
        row = self.arrays["rank_rows"][self.arrays["labels"].tolist().index(label)]
        at = self.arrays["passes"].tolist().index(number)
        found, logical = self.arrays["counts"][row, at], self.arrays["logical"][row]
        return {
            (layer, int(logical[layer, place])): int(found[layer, place])
            for layer in range(found.shape[0])
            for place in range(found.shape[1])
        }


@pytest.fixture(scope="module", autouse=True)
def driver() -> Iterator[None]:
    """The interpreter that has torch."""
    command = [real_sglang().python, "-I", "-c", DRIVER, str(CONVERTER)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as Converted.driver:
        yield


def own(counted: np.ndarray, rank: int) -> dict[tuple[int, int], int]:
    """The same from the recorder's counts: each rank has half of the physical experts."""
    return {
        (layer, PLACED[layer][place]): int(counted[layer][place])
        for layer in range(LAYERS)
        for place in ((0, 1), (2, 3))[rank]
    }


def test_ranks_that_see_all_tokens_have_their_own_experts(tmp_path: Path) -> None:
    whole = dict(zip([5, 6, 9], counts(3), strict=True))
    found = Converted(tmp_path, [dump(0, whole), dump(1, whole)])
    assert found.report == {"passes": 3, "notes": []}, found.error
    assert found.arrays["passes"].tolist() == [5, 6, 9]
    for number, counted in whole.items():
        for rank, label in enumerate(RANKS):
            assert found.tokens(label, number) == own(counted, rank)


def test_ranks_that_count_their_own_tokens_are_added_up(tmp_path: Path) -> None:
    parts = [dict(zip([5, 6], counts(2), strict=True)) for _ in RANKS]
    parts[1][6][:] = 0  # an idle pass of this rank
    found = Converted(tmp_path, [dump(1, parts[1]), dump(0, parts[0])], "--summed")
    for number in (5, 6):
        for rank, label in enumerate(RANKS):
            assert found.tokens(label, number) == own(parts[0][number] + parts[1][number], rank)


def test_ranks_without_expert_parallelism_compute_every_expert(tmp_path: Path) -> None:
    whole = dict(zip([5, 6], counts(2), strict=True))
    found = Converted(tmp_path, [dump(0, whole)] * 2, ranks={"TP0": 0, "TP1": 0})
    for number in (5, 6):
        everything = own(whole[number], 0) | own(whole[number], 1)
        assert found.tokens("TP0", number) == found.tokens("TP1", number) == everything


def test_drafts_and_doubtful_passes_are_left_out(tmp_path: Path) -> None:
    whole = dict(zip([5, 6], counts(2), strict=True))
    nothing = np.zeros((LAYERS, EXPERTS), int)
    drafts = {6: nothing, 7: nothing, 5: counts(1)[0]}
    found = Converted(tmp_path, [dump(rank, whole, drafts) for rank in range(2)])
    assert found.arrays["passes"].tolist() == [6]
    assert found.tokens("TP1 EP1", 6) == own(whole[6], 1)
    assert found.report["notes"] == ["1 passes have an id that is not theirs alone: left out"] * 2


def test_a_dump_that_lacks_passes(tmp_path: Path) -> None:
    whole = dict(zip([5, 6, 9], counts(3), strict=True))
    late = {number: whole[number] for number in (6, 9)}
    found = Converted(tmp_path, [dump(0, whole), dump(1, late)])
    assert found.arrays["passes"].tolist() == [6, 9]
    assert found.report["notes"] == ["1 passes are not in the dump of every rank: left out"]


def test_a_rank_that_wrote_nothing_here(tmp_path: Path) -> None:
    whole = {5: counts(1)[0]}
    found = Converted(tmp_path, [dump(1, whole)])
    assert found.arrays["labels"].tolist() == ["TP1 EP1"]
    assert found.tokens("TP1 EP1", 5) == own(whole[5], 1)
    assert found.report["notes"] == ["1 ranks wrote no counts"]
    summed = Converted(tmp_path, [dump(1, whole)], "--summed")
    assert (summed.status, summed.error) == (1, "1 of 2 ranks of experts wrote counts of passes\n")


@pytest.mark.parametrize(
    ("dumps", "error"),
    [
        ([dump(0, {5: counts(1)[0]}), dump(1, {5: counts(1)[0]})], "counted different tokens"),
        ([dump(0, {}), dump(1, {})], "0 of 2 ranks"),
        ([dump(0, {5: np.zeros((LAYERS, EXPERTS), int)})] * 2, "no pass was recorded"),
        ([dump(0, {5: np.ones((LAYERS, 3), int)}), dump(1, {5: np.ones((LAYERS, 3), int)})],
         "cannot be shared out"),
    ],
)  # fmt: skip
def test_what_cannot_be_converted(tmp_path: Path, dumps: list[Any], error: str) -> None:
    found = Converted(tmp_path, dumps)
    assert found.status == 1
    assert error in found.error
    assert not (tmp_path / "experts.npz").exists()


def test_totals(tmp_path: Path) -> None:
    """The recorder adds up what all ranks counted, which is all tokens on each of them."""
    buffered = np.zeros((10, LAYERS, EXPERTS), int)
    buffered[:6] = counts(6)
    totals = {"rank": 0, "logical_count": (2 * buffered).tolist(),
              "average_utilization_rate_over_window": None}  # fmt: skip
    found = Converted(tmp_path, [totals])
    total = buffered.sum(axis=0)
    assert found.report == {"passes": 1, "notes": []}
    for rank, label in enumerate(RANKS):
        places = ((0, 1), (2, 3))[rank]
        expected = {(n, place): total[n, place] for n in range(LAYERS) for place in places}
        assert found.tokens(label, -1) == expected
    summed = Converted(tmp_path, [totals], "--summed")
    assert summed.arrays["counts"].sum() == 2 * total.sum()
    odd = {**totals, "logical_count": (2 * buffered + np.eye(10, dtype=int)[:, :1, None]).tolist()}
    assert Converted(tmp_path, [odd]).status == 1


def test_totals_of_a_full_buffer_lack_earlier_passes(tmp_path: Path) -> None:
    totals = {"rank": 0, "logical_count": (2 * counts(4)).tolist()}
    notes = Converted(tmp_path, [totals]).report["notes"]
    assert notes == ["the server keeps 4 passes: earlier ones are not in the totals"]
