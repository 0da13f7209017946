"""A folder of baselines: what is accepted, what stays, and that nothing is lost."""

from __future__ import annotations

import json
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import msgspec
import pytest
from jsonschema import Draft202012Validator

import pytest_sglprof
from pytest_sglprof._analysis.strata import StepWork
from pytest_sglprof._baselines.records import Floor
from pytest_sglprof._baselines.store import (
    BaselineError,
    BaselineFolder,
    Mode,
    usable_lives,
)
from tests.support.lives import group, key, kind, life

SCHEMAS = Path(pytest_sglprof.__file__).parent / "schemas"
NOW = datetime(2026, 11, 30, tzinfo=timezone.utc)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> BaselineFolder:
    monkeypatch.setenv("SGLPROF_LEASE_DIR", str(tmp_path / "leases"))
    return BaselineFolder(tmp_path / "baselines")


def bytes_of(folder: BaselineFolder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.path.iterdir())}


def accepted_ids(folder: BaselineFolder, **changes: Any) -> list[str]:
    baseline = folder.find(key(**changes))
    return [] if baseline is None else [each.record.id for each in baseline.lives]


# What is accepted.


def test_a_folder_need_not_exist(folder: BaselineFolder) -> None:
    assert folder.find(key()) is None
    assert list(folder.list()) == []
    assert not folder.path.exists()


def test_new_takes_keys_without_a_baseline_and_all_takes_what_passed(
    folder: BaselineFolder,
) -> None:
    first, second = life(), life()
    assert folder.accept([first], mode="new")[0].is_new
    (again,) = folder.accept([second], mode="new")
    assert (again.refused, again.is_new) == ("its key has a baseline already", False)
    other = life(key=key(window="burst"))
    assert folder.accept([other], mode="new")[0].refused == ""
    assert folder.accept([second], mode="all")[0].refused == ""
    assert accepted_ids(folder) == [first.id, second.id]
    assert accepted_ids(folder, window="burst") == [other.id]


@pytest.mark.parametrize("mode", ["new", "all"])
@pytest.mark.parametrize("reason", ["", "a new kernel"])
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"not_acceptable": ("the GPU of TP1 was throttled (thermal)",)}, "throttled"),
        ({"not_acceptable": ("its verdict is inconclusive: few steps",)}, "inconclusive"),
        ({"not_acceptable": ("a", "b")}, "a; b"),
        ({"apart": "a kernel was compiled"}, "kept apart: a kernel was compiled"),
        ({"verdict": "fail", "failed": ("slowdown",)}, "it failed by slowdown"),
        ({"verdict": "fail", "failed": ("regression", "idle_share")}, "it failed by idle_share"),
        ({"verdict": "fail"}, "it failed"),
    ],
)
def test_what_is_never_accepted(
    folder: BaselineFolder, changes: dict[str, Any], words: str, reason: str, mode: Mode
) -> None:
    folder.accept([life()])
    before = bytes_of(folder)
    bad = life(**changes), life(key=key(window="burst"), **changes)
    for one in folder.accept(bad, mode=mode, reason=reason):
        assert words in one.refused
    assert bytes_of(folder) == before


@pytest.mark.parametrize("mode", ["new", "all"])
def test_a_regression_is_accepted_with_a_reason_alone_and_begins_a_level(
    folder: BaselineFolder, mode: Mode
) -> None:
    old = [life(), life()]
    folder.accept(old)
    before = bytes_of(folder)
    slow = life(verdict="fail", failed=("regression",), scale=1.2)
    (refused,) = folder.accept([slow], mode=mode)
    assert "with a reason only" in refused.refused
    assert bytes_of(folder) == before
    later = life(scale=1.2)
    assert (
        folder.accept([slow, later], reason="fp32 logits, #123", now="2026-11-29")[0].refused == ""
    )
    baseline = folder.find(key())
    assert baseline is not None
    assert [(each.begins_level, each.reason) for each in baseline.lives] == [
        (False, ""),
        (False, ""),
        (True, "fp32 logits, #123"),
        (False, ""),
    ]
    assert {each.accepted for each in baseline.lives[2:]} == {"2026-11-29"}
    usable = usable_lives(baseline, now=NOW)
    assert [each.is_level for each in usable] == [False, False, True, True]


def test_lives_that_confirm_a_regression_are_one_level(folder: BaselineFolder) -> None:
    folder.accept([life(), life()])
    bad = [life(verdict="fail", failed=("regression",), scale=1.2) for _ in range(3)]
    assert {each.refused for each in folder.accept(bad, reason="fp32 logits")} == {""}
    baseline = folder.find(key())
    assert baseline is not None
    assert [each.begins_level for each in baseline.lives] == [False, False, True, False, False]
    assert [each.reason for each in baseline.lives] == ["", "", *["fp32 logits"] * 3]
    usable = usable_lives(baseline, now=NOW)
    assert [each.is_level for each in usable] == [False, False, True, True, True]
    # Another regression, accepted another night, is another level.
    folder.accept([life(verdict="fail", failed=("regression",), scale=1.4)], reason="logprobs")
    later = folder.find(key())
    assert later is not None
    assert [each.begins_level for each in later.lives[2:]] == [True, False, False, True]


def test_an_improvement_can_begin_a_level_too(folder: BaselineFolder) -> None:
    folder.accept([life(), life()])
    folder.accept([life(scale=0.7), life(scale=0.7)], reason="graphs", new_level=True)
    baseline = folder.find(key())
    assert baseline is not None
    assert [each.begins_level for each in baseline.lives] == [False, False, True, False]
    assert baseline.lives[2].reason == "graphs"


def test_a_life_that_could_not_be_compared_needs_a_reason(folder: BaselineFolder) -> None:
    folder.accept([life()])
    elsewhere = life(verdict="inconclusive")
    assert "could not be compared" in folder.accept([elsewhere])[0].refused
    assert folder.accept([elsewhere], reason="first life on h5")[0].refused == ""
    baseline = folder.find(key())
    assert baseline is not None
    assert (baseline.lives[1].reason, baseline.lives[1].begins_level) == ("first life on h5", False)


def test_a_server_life_counts_once(folder: BaselineFolder) -> None:
    """Two attempts at a test on one server are no two lives."""
    first = life()
    rerun = msgspec.structs.replace(first, id="another")
    told = folder.accept([first, rerun, first])
    assert [each.refused for each in told] == ["", *["this server life is accepted already"] * 2]
    assert accepted_ids(folder) == [first.id]
    assert "already" in folder.accept([first])[0].refused


def test_twenty_stay_and_a_level_stays_begun(folder: BaselineFolder) -> None:
    lives = [life(night=night) for night in range(1, 31)]
    folder.accept(lives[:3])
    folder.accept(
        [msgspec.structs.replace(lives[3], verdict="fail", failed=("regression",))], reason="x"
    )
    folder.accept(lives[4:])
    assert accepted_ids(folder) == [each.id for each in lives[-20:]]
    baseline = folder.find(key())
    assert baseline is not None
    assert all(each.is_level for each in usable_lives(baseline, now=NOW))
    folder.accept([life(night=30)], keep=5)
    assert len(accepted_ids(folder)) == 5


def test_lives_are_in_order_of_time_whenever_they_are_accepted(folder: BaselineFolder) -> None:
    nights = [life(night=night) for night in (3, 1, 2)]
    for each in nights:
        folder.accept([each])
    assert accepted_ids(folder) == [nights[1].id, nights[2].id, nights[0].id]


def test_younger_lives_can_be_left_out(folder: BaselineFolder) -> None:
    lives = [life(night=night) for night in (1, 10, 20, 29)]
    folder.accept(lives[:2])
    folder.accept(
        [msgspec.structs.replace(lives[2], verdict="fail", failed=("regression",))], reason="x"
    )
    folder.accept(lives[3:])
    baseline = folder.find(key())
    assert baseline is not None

    def left(**ages: Any) -> list[tuple[str, bool]]:
        return [
            (each.record.recorded[8:10], each.is_level)
            for each in usable_lives(baseline, now=NOW, **ages)
        ]

    assert left() == [("01", False), ("10", False), ("20", True), ("29", True)]
    assert left(min_age_days=3) == [("01", False), ("10", False), ("20", True)]
    assert left(min_age_lives=2) == [("01", False), ("10", False)]
    assert left(min_age_days=3, min_age_lives=1) == [("01", False), ("10", False), ("20", True)]
    assert left(min_age_days=90) == left(min_age_lives=4) == []


# The file.


def test_a_baseline_is_read_back_as_it_was(folder: BaselineFolder) -> None:
    lives = [life(), life()]
    folder.accept(lives, now="2026-11-29T08:00:00.000Z")
    baseline = folder.find(key())
    assert baseline is not None
    assert tuple(each.record for each in baseline.lives) == tuple(lives)
    (file,) = folder.path.iterdir()
    assert file.name == key().file_name
    assert file.name.endswith(f"-steady-{key().digest}.json") or key().digest in file.name


def test_the_file_is_sorted_and_one_more_life_is_one_more_block(folder: BaselineFolder) -> None:
    folder.accept([life(), life()])
    (file,) = folder.path.iterdir()
    before = file.read_text().splitlines()

    def is_sorted(value: Any) -> bool:
        parts = value if isinstance(value, list) else []
        if isinstance(value, dict):
            parts = list(value.values())
            if list(value) != sorted(value):
                return False
        return all(map(is_sorted, parts))

    assert is_sorted(json.loads("\n".join(before)))
    assert len(before) < 170
    folder.accept([life()])
    after = file.read_text().splitlines()
    same = [line.rstrip(",") for line in before]
    assert [line.rstrip(",") for line in after][: len(before) - 4] == same[:-4]
    assert len(after) > len(before)


def test_a_floor_stays_beside_the_lives(folder: BaselineFolder) -> None:
    floor = Floor(lives=10, sd={"compute": 0.009}, upper=1.65, measured="2026-11-28", host="h1")
    folder.set_floor(key(), floor)
    assert folder.accept([life()], mode="new")[0].refused == ""  # a floor alone is no baseline
    folder.accept([life()])
    baseline = folder.find(key())
    assert baseline is not None
    assert (baseline.floor, len(baseline.lives)) == (floor, 2)


def test_other_keys_have_other_files(folder: BaselineFolder) -> None:
    changes: list[dict[str, Any]] = [
        {},
        {"gpu": "NVIDIA B200"},
        {"gpus": 4},
        {"model": "org/other"},
        {"quantization": "fp8"},
        {"kv_dtype": "fp8_e5m2"},
        {"sizes": {"tp": 4, "dp": 1}},
        {"backend": "nsys"},
        {"load": "33333333"},
        {"server": "33333333"},
        {"standin": True},
    ]
    folder.accept([life(key=key(**each)) for each in changes])
    assert len(bytes_of(folder)) == len(changes)
    assert len(folder.nearest(key().test, "steady")) == len(changes)
    assert folder.nearest(key().test, "burst") == []
    used = [key(**each) for each in changes[2:]]
    unused = {path.name for path in folder.unused(used)}
    assert unused == {key().file_name, key(gpu="NVIDIA B200").file_name}


def test_a_stand_in_never_becomes_the_baseline_of_a_real_server(folder: BaselineFolder) -> None:
    folder.accept([life()])
    before = bytes_of(folder)
    folder.accept([life(key=key(standin=True))])
    assert bytes_of(folder)[key().file_name] == before[key().file_name]
    assert accepted_ids(folder, standin=True) != accepted_ids(folder)


# Files that cannot be read.


def edited(change: Callable[[dict[str, Any]], None]) -> Callable[[bytes], bytes]:
    def apply(text: bytes) -> bytes:
        document = json.loads(text)
        change(document)
        return json.dumps(document).encode()

    return apply


DAMAGED: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "empty": (lambda text: b"", "is damaged"),
    "half": (lambda text: text[: len(text) // 2], "is damaged"),
    "merge conflict": (lambda text: b"<<<<<<< HEAD\n" + text, "is damaged"),
    "another document": (lambda text: b'{"tests": []}', "is damaged"),
    "a text for a number": (edited(lambda d: d["key"].update(gpus="two")), "is damaged"),
    "newer major": (edited(lambda d: d.update(format=[2, 0])), "format 2.0, which this version"),
    "older major": (edited(lambda d: d.update(format=[0, 9])), "format 0.9, which this version"),
    "another key": (edited(lambda d: d["key"].update(gpus=8)), "holds the lives of another key"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_what_cannot_be_read_is_reported_and_never_overwritten(
    folder: BaselineFolder, name: str
) -> None:
    damage, words = DAMAGED[name]
    folder.accept([life(), life(key=key(window="burst"))])
    file = folder.path / key().file_name
    file.write_bytes(damage(file.read_bytes()))
    before = file.read_bytes()
    with pytest.raises(BaselineError, match=words):
        folder.find(key())
    told = folder.accept([life(), life(key=key(window="burst"))])
    assert words in told[0].refused
    assert told[1].refused == ""
    with pytest.raises(BaselineError, match=words):
        folder.set_floor(key(), Floor(lives=5, sd={}, upper=2.37, measured="", host=""))
    fresh = BaselineFolder(folder.path)
    assert [each.key.window for each in fresh.list()] == ["burst"]
    assert [words in line for line in fresh.problems] == [True]
    fresh.prune(keep=0, older_than=NOW, only=[file], runs=["run-20261101"])
    assert file.read_bytes() == before


def test_a_newer_minor_is_read_and_not_overwritten(folder: BaselineFolder) -> None:
    """It may hold what this version would lose."""
    folder.accept([life()])
    (file,) = folder.path.iterdir()

    def add(document: dict[str, Any]) -> None:
        document["format"] = [1, 7]
        document["lives"][0]["record"]["something_new"] = 1

    file.write_bytes(edited(add)(file.read_bytes()))
    before = file.read_bytes()
    baseline = folder.find(key())
    assert baseline is not None
    assert len(baseline.lives) == 1
    assert "newer than this version" in folder.accept([life()])[0].refused
    assert folder.prune(keep=0, older_than=NOW) == ()
    assert file.read_bytes() == before


def test_other_files_of_the_folder_are_left_alone(folder: BaselineFolder) -> None:
    folder.path.mkdir()
    (folder.path / "README.md").write_text("ours")
    (folder.path / ".gitattributes").write_text("*.json -diff")
    folder.accept([life()])
    assert len(folder.list()) == 1
    assert folder.problems == ()
    assert {"README.md", ".gitattributes"} < set(bytes_of(folder))


# Pruning.


def test_prune(folder: BaselineFolder) -> None:
    folder.accept([life(night=night) for night in range(1, 9)])
    folder.accept([life(night=2, key=key(window="burst"))])
    told = folder.prune(keep=3, older_than=datetime(2026, 11, 5, tzinfo=timezone.utc), dry_run=True)
    assert len(accepted_ids(folder)) == 8
    assert told == folder.prune(keep=3, older_than=datetime(2026, 11, 5, tzinfo=timezone.utc))
    assert {(each.is_whole, each.lives) for each in told} == {(False, 5), (True, 1)}
    assert len(accepted_ids(folder)) == 3
    assert folder.find(key(window="burst")) is None
    (gone,) = folder.prune(only=[folder.path / key().file_name])
    assert gone.is_whole
    assert bytes_of(folder) == {}


def test_a_level_whose_first_life_is_taken_out_begins_with_the_next(
    folder: BaselineFolder,
) -> None:
    old, slow, later = life(night=1), life(night=2), life(night=3)
    folder.accept([old])
    folder.accept(
        [msgspec.structs.replace(slow, verdict="fail", failed=("regression",)), later], reason="x"
    )
    folder.prune(runs=[slow.run])
    baseline = folder.find(key())
    assert baseline is not None
    assert [(each.record.id, each.begins_level, each.reason) for each in baseline.lives] == [
        (old.id, False, ""),
        (later.id, True, "x"),
    ]
    (gone,) = folder.prune(runs=[old.run, later.run])
    assert (gone.is_whole, gone.lives) == (True, 2)
    assert bytes_of(folder) == {}


def test_a_floor_outlives_its_lives(folder: BaselineFolder) -> None:
    folder.accept([life()])
    floor = Floor(lives=5, sd={"compute": 0.01}, upper=2.37, measured="2026-01-01", host="h1")
    folder.set_floor(key(), floor)
    (gone,) = folder.prune(keep=0)
    assert (gone.is_whole, gone.lives) == (False, 1)
    assert folder.prune(older_than=NOW) == ()
    baseline = folder.find(key())
    assert baseline is not None
    assert (baseline.lives, baseline.floor) == ((), floor)


def test_a_life_without_a_common_kind_of_step_would_end_all_comparisons(
    folder: BaselineFolder,
) -> None:
    folder.accept([life(), life()])
    other = life(group(kind(work=StepWork("decode", "", 64, 10, -1))))
    (told,) = folder.accept([other])
    assert told.refused.startswith("it cannot be compared with the accepted lives: no kind of step")
    assert "decode of 64 requests" in told.refused
    assert folder.accept([other], reason="a new scheduler")[0].refused == ""
    assert folder.accept([life()])[0].refused == ""  # nothing more is lost


# Nothing is lost.

ACCEPT = """
import sys, time
from pathlib import Path
from pytest_sglprof._baselines.store import BaselineFolder
from tests.support.lives import life, key
from msgspec.structs import replace
folder, which, count = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
print("ready", flush=True)
sys.stdin.readline()
for number in range(count):
    one = replace(life(night=1 + number), id=f"{which}-{number}", life=f"{which}-{number}")
    BaselineFolder(folder).accept([one], keep=1000)
print("done", flush=True)
"""


def accepting(folder: BaselineFolder, which: str, count: int, **more: Any) -> subprocess.Popen[str]:
    words = [sys.executable, "-c", ACCEPT, str(folder.path), which, str(count)]
    process = subprocess.Popen(
        words,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **more,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def test_two_processes_that_accept_at_once_lose_nothing(folder: BaselineFolder) -> None:
    processes = [accepting(folder, which, 12) for which in ("a", "b")]
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    for process in processes:
        assert process.communicate(timeout=60)[0] == "done\n"
    expected = {f"{which}-{number}" for which in "ab" for number in range(12)}
    assert set(accepted_ids(folder)) == expected
    assert list(bytes_of(folder)) == [key().file_name]  # no lock beside it


def test_a_process_that_is_killed_while_it_writes_loses_nothing(folder: BaselineFolder) -> None:
    folder.accept([life(night=1)])
    known = set(accepted_ids(folder))
    for attempt in range(6):
        process = accepting(folder, f"k{attempt}", 1000)
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
        time.sleep(0.15 + 0.05 * attempt)  # sleeps: a kill at any moment of its writing
        process.send_signal(signal.SIGKILL)
        process.communicate()
        now = set(accepted_ids(folder))
        assert known <= now
        known = now
    assert len(known) > 1
    (folder.path / f".{key().file_name}.abcd").write_bytes(b"half of it")  # as a killed one leaves
    folder.accept([life()])
    assert list(bytes_of(folder)) == [key().file_name]


def test_a_full_disk_keeps_what_was_there(folder: BaselineFolder) -> None:
    """A file may not grow beyond what it is: the next life does not fit."""
    folder.accept([life()])
    before = bytes_of(folder)
    size = len(before[key().file_name])

    def no_space() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

    process = accepting(folder, "a", 1, preexec_fn=no_space)
    _, errors = process.communicate("\n", timeout=60)
    assert process.returncode == 1
    assert "cannot be written: File too large" in errors
    assert "what it held before is still there" in errors
    assert bytes_of(folder) == before


def test_a_folder_that_cannot_be_written(folder: BaselineFolder) -> None:
    folder.path.write_text("a file where the folder should be")
    assert "cannot be read: Not a directory" in folder.accept([life()])[0].refused
    with pytest.raises(BaselineError, match="cannot be read"):
        folder.list()
    assert folder.path.read_text() == "a file where the folder should be"


def test_a_baseline_fits_its_schema(folder: BaselineFolder) -> None:
    folder.accept([life()])
    (text,) = bytes_of(folder).values()
    schema = json.loads((SCHEMAS / "baseline.schema.json").read_text())
    Draft202012Validator(schema).validate(json.loads(text))
