"""`sglprof ab` on stand-ins: lives in turn, an interruption, floors, and `git bisect run`."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import psutil
import pytest

from pytest_sglprof._baselines.store import BaselineFolder
from pytest_sglprof._cli.ab import bisect_status
from pytest_sglprof._cli.main import main

PATIENCE = 600.0  # s; a life takes 5 on an idle machine
LOAD = ("--num-prompts", "6", "--concurrency", "2", "--input", "16", "--output-len", "60")
LOAD += ("--steps", "55")
SHAPES = ("--batch", "1,4", "--input", "32", "--output-len", "60")
STANDIN = ("--step-ms", "4", "--layers", "1")
QUIET = ("--life-noise", "0.003")
SLOW = ("--slow", "rank=all,category=moe,factor=4")


def config(**servers: Sequence[str]) -> str:
    return "".join(
        f'[servers.{name}]\nkind = "standin"\nargs = ["--tp", "2"]\n'
        f"standin_args = {json.dumps([*STANDIN, *more])}\n"
        for name, more in servers.items()
    )


class Place:
    """A folder with sglprof.toml, and leases of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.leases = folder.parent / f"{folder.name}-leases"

    def write(self, text: str) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "sglprof.toml").write_text(text)

    @property
    def environment(self) -> dict[str, str]:
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("PYTEST_", "SGLPROF"))}
        return {**kept, "SGLPROF_LEASE_DIR": str(self.leases)}

    def start(self, *words: str, command: str = "ab") -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-W", "error", "-m", "pytest_sglprof", command, *words],
            cwd=self.folder,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, *words: str, command: str = "ab") -> tuple[int, str, str]:
        process = self.start(*words, command=command)
        out, err = process.communicate(timeout=PATIENCE)
        print(out, err)
        return process.returncode, out, err

    def family(self) -> list[psutil.Process]:
        """What still runs of it."""
        found = []
        for process in psutil.process_iter():
            try:
                is_mine = process.environ().get("SGLPROF_LEASE_DIR") == str(self.leases)
                if is_mine and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except psutil.Error:
                continue
        return found


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    made = Place(tmp_path / "project")
    made.write(config(old=QUIET, new=QUIET))
    yield made
    deadline = time.monotonic() + 20
    while (left := made.family()) and time.monotonic() < deadline:
        time.sleep(0.2)
    for process in left:
        process.kill()
    assert not left


def lines_until(process: subprocess.Popen[str], text: str) -> str:
    """What it says on stderr up to and with the line that has `text`."""
    assert process.stderr is not None
    said = ""
    for line in process.stderr:
        said += line
        if text in line:
            return said
    raise AssertionError(f"{text} was never said:\n{said}")


def test_an_interrupted_floor_keeps_its_lives_and_goes_on(place: Place) -> None:
    base = place.folder / "baselines"
    process = place.start("old", "--lives", "3", *LOAD, "--folder", "aa", "--seed", "4")
    lines_until(process, "life 1 of 3 (old): ")
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 130
    assert "1 of 3 lives are kept; to go on: sglprof ab --resume" in err
    first = (place.folder / "aa" / "lives" / "01.json").read_bytes()

    place.write(config(old=(*QUIET, *SLOW)))
    status, _, err = place.run("--resume", "aa", "--baselines", str(base))
    assert status == 2
    assert "server old is not the one with which aa began" in err

    place.write(config(old=QUIET))
    status, out, err = place.run("--resume", "aa", "--baselines", str(base))
    assert status == 0
    assert "life 1 of 3" not in err
    assert "life 3 of 3 (old): " in err
    assert (place.folder / "aa" / "lives" / "01.json").read_bytes() == first
    assert "its upper end (95 %) is 4.42 times that" in out
    (baseline,) = BaselineFolder(base).list()
    assert baseline.floor is not None
    assert baseline.floor.lives == 3
    assert 0 < baseline.floor.sd["compute"] < 0.05
    assert baseline.lives == ()
    result = json.loads((place.folder / "aa" / "ab.json").read_text())
    assert result["seed"] == 4
    assert [record["key"]["standin"] for record in result["records"]] == [True] * 3
    assert len({record["life"] for record in result["records"]}) == 3
    assert not list((place.folder / "aa").glob("0*/**/*.json.gz"))
    assert len(list((place.folder / "aa").glob("0*/servers/*/server.log"))) >= 3
    status, _, err = place.run("old", "--folder", "aa", *LOAD)
    assert status == 2
    assert "aa has a comparison already" in err


B_FIRST, A_FIRST = "0", "1"  # seeds


@pytest.mark.parametrize(
    ("broken", "seed", "words", "expected"),
    [
        ("new", B_FIRST, ("--bisect",), 125),
        ("new", B_FIRST, (), 2),
        ("old", A_FIRST, ("--bisect",), 255),
    ],
    ids=["B", "B without git", "A"],
)
def test_a_server_that_does_not_start(
    place: Place, broken: str, seed: str, words: tuple[str, ...], expected: int
) -> None:
    failing = ("--start-fault", "import", "--crash-delay", "0.1")
    place.write(config(**{"old": QUIET, "new": QUIET, broken: failing}))
    status, _, err = place.run("old", "new", "--seed", seed, *words, *LOAD)
    assert status == expected, err
    assert "0 of 10 lives are kept" in err
    assert ("server B cannot be tested: " in err) == (expected == 125)


def test_ctrl_c_ends_the_server_and_the_bisection(place: Place) -> None:
    place.write(config(old=("--ready-delay", "60"), new=QUIET))
    process = place.start("old", "new", "--seed", A_FIRST, "--bisect", *LOAD)
    lines_until(process, "new against old: 10 lives, seed 1")
    log = "*/servers/*/server.log"
    deadline = time.monotonic() + 60
    while not list((place.folder / ".sglprof" / "ab").glob(f"*/{log}")):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=PATIENCE)
    assert process.returncode == 255


def test_what_a_killed_comparison_has_left_is_cleaned(place: Place) -> None:
    place.write(config(old=("--ready-delay", "60"), new=QUIET))
    process = place.start("old", "--lives", "2", *LOAD, "--folder", "aa")
    deadline = time.monotonic() + 60
    while not list(place.folder.glob("aa/*/servers/*/server.log")):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    process.send_signal(signal.SIGSTOP)
    for each in place.family():
        if "pytest_sglprof._server.keeper" in each.cmdline():
            each.kill()
    process.kill()
    process.communicate(timeout=PATIENCE)
    assert place.family()
    status, out, _ = place.run("aa", command="clean")
    assert status == 0
    assert "01-A/servers/old.1: " in out
    assert not place.family()


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (("old", "nwe"), "did you mean new?"),
        (("old",), "--bisect with one server"),
        (("old", "new", "--lives", "none"), "invalid"),
        (("old", "new", "--no-such-option"), "--no-such-option"),
        (("old", "new", "--num-prompts", "2"), "more requests than run at once"),
        (("old", "new", "--steps", "30"), "--steps 30: num_steps=30 is below min_steps=50"),
        (("--resume", "nowhere"), "there is no comparison in nowhere"),
    ],
)
def test_wrong_usage_stops_a_bisection(
    place: Place,
    words: tuple[str, ...],
    text: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(place.folder)
    assert main(["ab", *words, "--bisect"]) == 255
    said = capsys.readouterr().err
    assert text in said
    assert "to go on" not in said  # before any server is started
    if words != ("old",):  # which is right without git
        assert main(["ab", *words]) == 2


def test_only_what_was_measured_is_good_or_bad_for_git() -> None:
    answers = {status: bisect_status(["ab", "--bisect"], status) for status in range(256)}
    assert {status: code for status, code in answers.items() if code != 255} == {0: 0, 1: 1, 3: 125}
    assert bisect_status(["ab", "--bis"], 70) == 255  # argparse takes abbreviations
    assert bisect_status(["ab", "a", "b"], 3) == 3


def test_servers_of_other_gpus_are_refused(
    place: Place, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    place.write(
        '[servers.old]\nkind = "standin"\ngpus = [0]\n[servers.new]\nkind = "standin"\ngpus = [1]\n'
    )
    monkeypatch.chdir(place.folder)
    assert main(["ab", "old", "new"]) == 2
    assert "the servers use other GPUs: old (0,) and new (1,)" in capsys.readouterr().err


FEW = ("--lives", "3", "--alpha", "0.05", "--limit", "1.6", *SHAPES)


@pytest.mark.end_to_end
def test_a_slower_category_is_found_and_the_same_version_is_not(place: Place) -> None:
    place.write(config(old=QUIET, new=(*QUIET, *SLOW), same=QUIET))
    status, out, _ = place.run("old", "new", *FEW, "-o", "result.json", "--format", "json")
    result = json.loads((place.folder / "result.json").read_text())
    assert status == 1, out
    assert result["word"] == "slower"
    slower = {row["name"] for row in result["rows"] if row["word"] == "slower"}
    assert "moe" in slower
    assert "attention" not in slower
    assert sorted(result["order"]) == sorted("AAABBB")
    moe = next(row for row in result["rows"] if row["name"] == "moe")
    assert moe["ratio"] == pytest.approx(4, rel=0.05)
    batches = {s["work"]["batch"] for g in result["records"][0]["groups"] for s in g["strata"]}
    assert batches == {1, 4}
    status, out, _ = place.run("old", "same", *FEW)
    assert status in (0, 3), out  # never 1: no figure of it is 1.6 times as slow
    assert "slower: " not in out.rpartition("\n")[2]


def git(folder: Path, *words: str) -> str:
    name = ("-c", "user.name=t", "-c", "user.email=t@example.org")
    ran = subprocess.run(
        ["git", *name, *words], cwd=folder, capture_output=True, text=True, check=False
    )
    return ran.stdout + ran.stderr


def commits(place: Place, texts: Sequence[str]) -> None:
    """A repository whose commits c0, c1 … are these versions of sglprof.toml."""
    place.folder.mkdir(parents=True, exist_ok=True)
    git(place.folder, "init", "-q")
    (place.folder / ".gitignore").write_text(".sglprof/\n")
    for number, text in enumerate(texts):
        place.write(f"# {number}\n{text}")
        git(place.folder, "add", "-A")
        git(place.folder, "commit", "-qm", f"version {number}")
        git(place.folder, "tag", f"c{number}")


def bisected(place: Place, first: str, last: str, *words: str) -> tuple[int, str]:
    git(place.folder, "bisect", "start", last, first)
    command = [sys.executable, "-m", "pytest_sglprof", "ab", "good", "current", "--bisect", *words]
    ran = subprocess.run(
        ["git", "bisect", "run", *command],
        cwd=place.folder,
        env=place.environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=3 * PATIENCE,
        check=False,
    )
    print(ran.stdout)
    return ran.returncode, ran.stdout + git(place.folder, "bisect", "log")


def test_a_bisection_stops_where_sglprof_itself_fails(place: Place) -> None:
    sound = config(good=QUIET, current=QUIET)
    commits(place, [sound, f"{sound}\n[servers", sound])
    status, said = bisected(place, "c0", "c2")
    assert status != 0
    assert "is not valid TOML" in said
    assert "255" in said  # git says which status made it stop
    assert "first bad commit:" not in said


@pytest.mark.end_to_end
def test_a_bisection_finds_the_slow_commit_past_one_that_does_not_start(place: Place) -> None:
    sound = config(good=QUIET, current=QUIET)
    dead = config(good=QUIET, current=("--start-fault", "oom", "--crash-delay", "0.1"))
    slow = config(good=QUIET, current=(*QUIET, *SLOW))
    commits(place, [sound, sound, sound, dead, sound, slow, slow])  # git begins in the middle
    status, said = bisected(place, "c0", "c6", *FEW, "--seed", B_FIRST)
    assert status == 0, said
    skipped, bad = (git(place.folder, "rev-parse", name).strip() for name in ("c3", "c5"))
    assert f"git bisect skip {skipped}" in said
    assert f"# first bad commit: [{bad}]" in said
