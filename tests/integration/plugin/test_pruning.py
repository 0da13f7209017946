"""What is removed of an output folder, and above all what is not: everything that is not ours."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from pytest_sglprof._run.folder import RunBook, RunFolder, prune, write_run_file
from tests.integration.plugin.test_run_folder import FACTS, record, run_folders


def ended_run(output: Path, run_id: str) -> Path:
    book = RunBook(output, run_id, FACTS)
    book.open()
    (RunFolder(output, run_id).window("w", "test_a.py::a") / "trace.json").write_text("x" * 100)
    book.add(record())
    book.finish(0)
    return output / run_id


def prune_all(output: Path) -> list[str]:
    return prune(output, keep_runs=1, keep_bytes=0)


def as_is(folder: Path) -> None:
    """A folder of the user's that only has such a name."""


def with_results(folder: Path) -> None:
    (folder / "results.json").write_text(json.dumps({"run": {"id": folder.name}}))


def with_another_tool_s_run_file(folder: Path) -> None:
    (folder / "run.json").write_text(json.dumps({"id": folder.name, "seed": 1}))


def with_half_a_run_file(folder: Path) -> None:
    write_run_file(folder, started=0.0, version="0")
    content = (folder / "run.json").read_text()
    (folder / "run.json").write_text(content[:-3])


def with_a_list(folder: Path) -> None:
    (folder / "run.json").write_text("[" * 100_000)


def with_bytes(folder: Path) -> None:
    (folder / "run.json").write_bytes(b"\xff\xfe\0")


def with_a_folder_for_a_run_file(folder: Path) -> None:
    (folder / "run.json").mkdir()


def with_the_run_file_of_another_run(folder: Path) -> None:
    shutil.copy(folder.parent / "run-2" / "run.json", folder)


def with_a_linked_run_file(folder: Path) -> None:
    elsewhere = folder.parent.parent / "elsewhere" / folder.name
    elsewhere.mkdir(parents=True)
    write_run_file(elsewhere, started=0.0, version="0")
    (folder / "run.json").symlink_to(elsewhere / "run.json")


@pytest.mark.parametrize(
    "content",
    [
        as_is,
        with_results,
        with_another_tool_s_run_file,
        with_half_a_run_file,
        with_a_list,
        with_bytes,
        with_a_folder_for_a_run_file,
        with_the_run_file_of_another_run,
        with_a_linked_run_file,
    ],
)
def test_fault_a_a_folder_that_no_run_of_ours_made_is_never_removed(
    tmp_path: Path, content: Callable[[Path], None]
) -> None:
    output = tmp_path / "out"
    for number in range(1, 4):
        ended_run(output, f"run-{number}")
    theirs = output / "run-0-my-experiment"
    theirs.mkdir()
    (theirs / "weights.bin").write_text("precious")
    content(theirs)
    assert prune_all(output) == ["run-1", "run-2"]
    assert (theirs / "weights.bin").read_text() == "precious"


def test_fault_a_strangers_do_not_count_as_runs(tmp_path: Path) -> None:
    for number in range(14):
        (tmp_path / f"run-my-experiment-{number:02}").mkdir()
    ended_run(tmp_path, "run-1")
    ended_run(tmp_path, "run-2")
    assert prune(tmp_path, keep_runs=2, keep_bytes=10**9) == []
    assert prune(tmp_path, keep_runs=1, keep_bytes=10**9) == ["run-1"]
    assert len(run_folders(tmp_path)) == 15


def test_fault_a_links_are_neither_followed_nor_removed(tmp_path: Path) -> None:
    output, elsewhere = tmp_path / "out", tmp_path / "elsewhere"
    kept = ended_run(elsewhere, "run-0")
    output.mkdir()
    (output / "run-0").symlink_to(kept)
    (output / "run-00").symlink_to(tmp_path / "nowhere")
    old = ended_run(output, "run-1")
    (old / "data").symlink_to(elsewhere)
    ended_run(output, "run-2")
    assert prune_all(output) == ["run-1"]
    assert (output / "run-0").is_symlink()
    assert (output / "run-00").is_symlink()
    assert (kept / "results.json").is_file()


def test_fault_a_an_output_folder_may_be_a_link(tmp_path: Path) -> None:
    for number in (1, 2):
        ended_run(tmp_path / "disk", f"run-{number}")
    (tmp_path / "out").symlink_to("disk")
    assert prune_all(tmp_path / "out") == ["run-1"]


def test_fault_a_the_run_file_says_whose_run_it_is_while_it_lasts(tmp_path: Path) -> None:
    book = RunBook(tmp_path, "run-1", FACTS)
    book.open()
    content = json.loads((tmp_path / "run-1" / "run.json").read_text())
    assert content["format"] == "pytest-sglprof run"
    assert (content["id"], content["pid"]) == ("run-1", os.getpid())
    assert content["process_started"] and content["started"] and content["host"]
    book.finish(0)
    assert run_folders(tmp_path) == []


def test_fault_a_a_killed_run_is_removed_like_others(tmp_path: Path) -> None:
    child = os.fork()
    if not child:
        RunBook(tmp_path, "run-1", FACTS).open()
        os._exit(9)
    os.waitpid(child, 0)
    assert (tmp_path / "run-1" / "journal.jsonl").exists()
    ended_run(tmp_path, "run-2")
    assert prune_all(tmp_path) == ["run-1"]


def test_fault_a_an_output_folder_that_was_there_stays(tmp_path: Path) -> None:
    output = tmp_path / "theirs"
    output.mkdir()
    book = RunBook(output, "run-1", FACTS)
    book.open()
    assert book.finish(5) is None
    assert list(output.iterdir()) == []


@pytest.mark.parametrize("kind", ["file", "folder", "link", "link-to-their-run"])
def test_fault_a_what_is_called_latest_but_is_not_ours_stays(tmp_path: Path, kind: str) -> None:
    latest = tmp_path / "latest"
    (tmp_path / "run-theirs").mkdir()
    if kind == "file":
        latest.write_text("notes")
    elif kind == "folder":
        latest.mkdir()
        (latest / "notes").touch()
    else:
        latest.symlink_to("run-theirs" if kind == "link-to-their-run" else tmp_path.parent)
    before = latest.lstat()
    ended_run(tmp_path, "run-1")
    assert latest.lstat().st_ino == before.st_ino
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "run-1", "run-theirs"]


def test_fault_a_our_own_latest_follows_also_after_its_run_was_removed(tmp_path: Path) -> None:
    shutil.rmtree(ended_run(tmp_path, "run-1"))
    second = ended_run(tmp_path, "run-2")
    assert (tmp_path / "latest").resolve() == second.resolve()


# ---- two at once, and disks that refuse ------------------------------------------------------


def _prune_now(output: Path, start, answers) -> None:
    start.wait()
    try:
        answers.put(prune(output, keep_runs=2, keep_bytes=10**9))
    except BaseException as error:
        answers.put(repr(error))


def test_fault_7_runs_that_prune_at_once_do_not_meet(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    for trial in range(5):
        output = tmp_path / f"out{trial}"
        for number in range(12):
            folder = output / f"run-{number:02}"
            (folder / "windows").mkdir(parents=True)
            write_run_file(folder, started=0.0, version="0")
            for file in range(100):
                (folder / "windows" / f"f{file}").touch()
        start, answers = context.Event(), context.Queue()
        all_three = [
            context.Process(target=_prune_now, args=(output, start, answers)) for _ in range(3)
        ]
        for process in all_three:
            process.start()
        start.set()
        told = [answers.get(timeout=60) for _ in all_three]
        for process in all_three:
            process.join(60)
        assert not [answer for answer in told if isinstance(answer, str)]
        names = [name for answer in told for name in answer]
        assert len(names) == len(set(names))
        assert run_folders(output) == ["run-10", "run-11"]


@pytest.mark.skipif(os.geteuid() == 0 and not shutil.which("setpriv"), reason="root may all")
def test_fault_7_what_may_not_be_read_or_removed_stays_and_nothing_is_raised(tmp_path: Path):
    tmp_path.chmod(0o755)
    output = tmp_path / "out"
    for number in range(1, 5):
        ended_run(output, f"run-{number}")
    (output / "run-1" / "windows").chmod(0o555)
    (output / "run-2").chmod(0o000)
    (output / "run-3").chmod(0o555)
    for path in (output, *output.glob("run-*")):
        os.chown(path, 12345, 12345)
    child = os.fork()
    if not child:  # pragma: no cover
        status = 1
        try:
            if os.geteuid() == 0:
                os.setgroups([])
                os.setgid(12345)
                os.setuid(12345)
            prune_all(output)
            status = 0
        finally:
            os._exit(status)
    _, status = os.waitpid(child, 0)
    for number in range(1, 5):
        (output / f"run-{number}").chmod(0o755)
    (output / "run-1" / "windows").chmod(0o755)
    assert status == 0
    assert (output / "run-2" / "results.json").is_file()
    assert (output / "run-4" / "results.json").is_file()
    assert all((output / name / "run.json").is_file() for name in run_folders(output))


@pytest.mark.parametrize("there", ["nothing", "file", "dangling", "loop"])
def test_fault_7_an_output_folder_that_is_none(tmp_path: Path, there: str) -> None:
    output = tmp_path / "out"
    if there == "file":
        output.touch()
    elif there != "nothing":
        output.symlink_to("out" if there == "loop" else "nowhere")
    assert prune_all(output) == []
