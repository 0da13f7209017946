"""Runs whose results cannot be written: pytest's own summary and status are there all the same."""

from __future__ import annotations

import json
import re
import resource
import subprocess
import tracemalloc
from pathlib import Path

import pytest

from pytest_sglprof._errors import SettingsError
from pytest_sglprof._report.results import load_results
from pytest_sglprof._run.folder import RunBook
from tests.integration.plugin.test_run_folder import FACTS, record
from tests.support.project import CONFTEST, SERVERS, Outcome

LIMITS = """
import resource

def limit_files(size):
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))

def our_folder(config):
    return config.pluginmanager.getplugin("sglprof-session")._book.folder
"""
NO_SGLANG = """
def test_one(sglang_server): pass
def test_two(sglang_server): pass
def test_plain(): pass
"""
MISSING = "--sglprof-python=/nowhere/python"
SGLANG = "[server]\n"
SECRETS = 'secrets = ["SOME_SECRET"]'


def is_orderly(ran: Outcome) -> None:
    """pytest ended as always: with its own summary, and nothing that looks like a crash."""
    assert "Traceback" not in ran.text
    assert "INTERNALERROR" not in ran.text
    assert re.search(r"\d (passed|failed|error).* in [\d.]+s", ran.text.splitlines()[-1])


# ---- before anything runs --------------------------------------------------------------------


@pytest.mark.parametrize("place", ["out", "out/below", "loop", "dangling/x"])
def test_fault_18_an_output_that_cannot_be_a_folder_is_a_usage_error(pytester, run_here, place):
    pytester.makepyfile("def test_it(): pass")
    (pytester.path / "out").write_text("notes")
    (pytester.path / "loop").symlink_to("loop")
    (pytester.path / "dangling").symlink_to("out")
    ran = run_here("--sglprof", f"--sglprof-output={place}", config=SGLANG)
    text = ran.stdout.str() + ran.stderr.str()
    assert ran.ret == pytest.ExitCode.USAGE_ERROR
    assert "results cannot be written into" in text
    assert "next: choose another one with --sglprof-output" in text
    assert "Traceback" not in text
    assert "INTERNALERROR" not in text
    assert (pytester.path / "out").read_text() == "notes"


def test_fault_18_a_run_that_cannot_be_opened_leaves_nothing(tmp_path: Path) -> None:
    long = "run-" + "x" * 300
    with pytest.raises(SettingsError, match="File name too long"):
        RunBook(tmp_path / "out", long, FACTS).open()
    assert list(tmp_path.iterdir()) == []


# ---- while tests run, and at the end -----------------------------------------------------------

FULL = """
@pytest.mark.profile_window(whole_body=True)
@pytest.mark.sglang_server("slow")
def test_slow(drive):
    drive()
    from conftest import limit_files
    limit_files(1)  # whatever is written from now on is refused

def test_plain(): pass
"""
AT_THE_END = """
@pytest.hookimpl(tryfirst=True)  # before pytest writes junit.xml
def pytest_sessionfinish(session):
    limit_files(resource.RLIM_INFINITY)
    (our_folder(session.config) / "report.html").mkdir()
"""


@pytest.fixture(scope="module")
def full(make_project) -> Outcome:
    project = make_project(FULL)
    (project.folder / "conftest.py").write_text(CONFTEST + LIMITS + AT_THE_END)
    (project.folder / "summary").mkdir()
    ran = project.run("-p", "no:cacheprovider", GITHUB_STEP_SUMMARY="summary")
    (ran.run_folder / "report.html").rmdir()
    return ran


def test_fault_18_the_verdict_of_the_tests_is_told_whatever_cannot_be_written(full):
    is_orderly(full)
    assert full.status == pytest.ExitCode.TESTS_FAILED
    assert full.word("test_slow") == "FAILED"
    assert full.word("test_plain") == "PASSED"
    assert "slowdown" in full.section("test_slow")


@pytest.mark.parametrize(
    "line",
    [
        r"heat maps could not be written: File too large",
        r"journal\.jsonl could not be written: File too large",
        r"\S*/report\.html could not be written: Is a directory",
        r"GITHUB_STEP_SUMMARY summary could not be written: Is a directory",
    ],
)
def test_fault_18_each_thing_that_is_not_written_is_one_line(full, line):
    assert len(re.findall(f"^{line}$", full.text, re.M)) == 1


def test_fault_18_what_could_be_written_is_there(full):
    results = load_results(full.run_folder / "results.json")
    assert [window.verdict for window in results.windows] == ["fail"]
    assert not (full.run_folder / "journal.jsonl").exists()
    assert "report:" not in full.text
    assert full.properties("test_slow")
    assert not [p for p in full.properties("test_slow") if p[0].startswith("attachment")]


FULL_DISK = """
import os

def test_full(sglang_server, drive, request):
    place = our_folder(request.config)
    free = os.statvfs(place)
    with (place / "filler").open("wb") as filler:
        os.posix_fallocate(filler.fileno(), 0, free.f_bavail * free.f_frsize)
    with (place / "filler").open("ab", buffering=0) as filler, pytest.raises(OSError):
        while True:
            filler.write(b"x")
    log = sglang_server.folder / "tmp" / "log.fifo"
    with log.open("wb") as as_the_server_does:
        as_the_server_does.write(b"a line of a log\\n" * 2**16)  # 1 MB: a pipe holds 64 kB
    drive(20)
    assert sglang_server.is_alive()
"""


def test_on_a_full_disk_the_server_never_waits_and_each_file_is_one_line(make_project, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(disk)],
        capture_output=True,
        text=True,
        check=False,
    )
    if mounted.returncode:
        pytest.skip(f"no disk of a few MB can be mounted here: {mounted.stderr.strip()}")
    try:
        project = make_project(FULL_DISK, SERVERS.replace("[server]", "[server]\n" + SECRETS))
        (project.folder / "conftest.py").write_text(f"from helpers import *\n{CONFTEST}")
        (project.folder / "helpers.py").write_text(LIMITS)
        (project.folder / "test_job.py").write_text(
            f"import pytest\nfrom helpers import our_folder\n{FULL_DISK}"
        )
        ran = project.run(f"--sglprof-output={disk}", SOME_SECRET="of-this-test-alone")
    finally:
        subprocess.run(["umount", str(disk)], check=True)
    is_orderly(ran)
    assert ran.status == pytest.ExitCode.OK
    for name in (r"run\.json", r"journal\.jsonl", r"\S*/server\.log", r"\S*/results\.json"):
        line = rf"^{name} could not be written: No space left on device( \(it lacks .* bytes\))?$"
        assert len(re.findall(line, ran.text, re.M)) == 1
    lacks = re.search(r"server\.log .*\(it lacks ([\d,]+) bytes\)$", ran.text, re.M)
    assert lacks is not None
    assert int(lacks[1].replace(",", "")) >= 2**20 - 4096
    assert "journal.jsonl, without 1 that the disk refused" in ran.text


UNWRITTEN = """
@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session):
    (our_folder(session.config) / "results.json").mkdir(exist_ok=True)
"""
FULL_AT_THE_END = """
@pytest.hookimpl(trylast=True)
def pytest_sessionfinish():
    limit_files(1)

def pytest_unconfigure():
    limit_files(resource.RLIM_INFINITY)
"""


@pytest.mark.parametrize(
    ("conftest", "reason"), [(UNWRITTEN, "Is a directory"), (FULL_AT_THE_END, "File too large")]
)
@pytest.mark.parametrize("workers", [(), ("-n", "1")], ids=["alone", "workers"])
def test_fault_18_without_results_the_records_stay(make_project, conftest, reason, workers):
    project = make_project(NO_SGLANG, SGLANG)
    (project.folder / "conftest.py").write_text(CONFTEST + LIMITS + conftest)
    ran = project.run(MISSING, "-p", "no:cacheprovider", *workers)
    is_orderly(ran)
    assert ran.status == pytest.ExitCode.TESTS_FAILED
    (folder,) = (project.folder / ".sglprof").glob("run-*")
    assert f"{folder / 'results.json'} could not be written: {reason}" in ran.text
    assert f"the records of its tests stay in {folder / 'journal.jsonl'}" in ran.text
    lines = (folder / "journal.jsonl").read_text().splitlines()
    names = [json.loads(line)["attempt"]["nodeid"] for line in lines]
    assert names == ["test_job.py::test_one", "test_job.py::test_two"]
    assert [path.name for path in folder.glob(".*")] == []


def test_fault_18_a_folder_that_was_removed_meanwhile_is_made_again(make_project):
    project = make_project(NO_SGLANG, SGLANG)
    removal = """
import shutil

def pytest_runtest_teardown(item):
    shutil.rmtree(our_folder(item.config), ignore_errors=True)
"""
    (project.folder / "conftest.py").write_text(CONFTEST + LIMITS + removal)
    ran = project.run(MISSING)
    is_orderly(ran)
    assert [test["outcome"] for test in ran.results["tests"]] == ["error", "error"]
    assert (ran.run_folder / "run.json").is_file()


# ---- Ctrl-C at the end -------------------------------------------------------------------------

INTERRUPTED = """
import os, signal, time
import {module} as module

real = module.{function}

def interrupted(*args, **options):
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(30)

module.{function} = interrupted
"""
PASSING = """
@pytest.mark.profile_window(whole_body=True)
def test_it(drive):
    drive(20)
"""


@pytest.mark.parametrize("step", ["page", "results"])
def test_fault_18_ctrl_c_while_results_are_written_is_pytest_s_interrupt(make_project, step):
    project = make_project(PASSING)
    module = {
        "page": "pytest_sglprof._report.page.page",
        "results": "pytest_sglprof._report.results",
    }
    interrupted = INTERRUPTED.format(module=module[step], function=f"write_{step}")
    (project.folder / "conftest.py").write_text(CONFTEST + interrupted)
    ran = project.run("--sglprof-allow-inconclusive")
    assert ran.status == pytest.ExitCode.INTERRUPTED
    assert "Traceback" not in ran.text
    assert "INTERNALERROR" not in ran.text
    assert re.search(r"^!+ KeyboardInterrupt while results were written !+$", ran.text, re.M)
    assert re.search(r"1 skipped in", ran.text)
    (folder,) = (project.folder / ".sglprof").glob("run-*")
    assert f"interrupted: {folder} is not complete" in ran.text
    assert (folder / "results.json").exists() == (step == "page")
    assert (folder / "journal.jsonl").exists() == (step == "results")
    assert list(folder.glob(".*")) == []


# ---- memory ------------------------------------------------------------------------------------


def test_fault_10_memory_does_not_grow_with_the_number_of_records(tmp_path: Path) -> None:
    book = RunBook(tmp_path, "run-1", FACTS)
    book.open()
    tracemalloc.start()
    try:
        for number in range(30):
            book.add(record(f"test_a.py::test_{number}", padding=2**20))
        grown = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert grown < 2**20
    book.finish(0)
    results = json.loads((tmp_path / "run-1" / "results.json").read_text())
    assert len(results["tests"]) == 30


MANY = """
@pytest.mark.parametrize("number", range(3))
@pytest.mark.profile_window(whole_body=True)
def test_good(drive, number):
    drive(40)

@pytest.mark.parametrize("number", range(3))
@pytest.mark.profile_window(whole_body=True)
@pytest.mark.sglang_server("slow")
def test_bad(drive, number):
    drive(40)

def test_last(): pass
"""
COUNTED = """
import gc, json, pathlib

@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish(session):
    from pytest_sglprof._run.attempt import TestRun
    from pytest_sglprof._run.window import Window

    gc.collect()
    alive = {kind.__name__: 0 for kind in (TestRun, Window)}
    for thing in gc.get_objects():
        if type(thing) in (TestRun, Window):
            alive[type(thing).__name__] += 1
    reporter = session.config.pluginmanager.getplugin("terminalreporter")
    reports = [one for many in reporter.stats.values() for one in many]
    alive["records"] = sum(hasattr(report, "sglprof") for report in reports)
    alive["documents"] = sum(
        type(thing).__name__ == "RecordedWindow" for thing in gc.get_objects()
    )
    pathlib.Path("alive.json").write_text(json.dumps(alive))
"""


def test_fault_10_nothing_of_a_window_stays_in_memory_when_its_test_is_over(make_project):
    project = make_project(MANY)
    (project.folder / "conftest.py").write_text(CONFTEST + COUNTED)
    ran = project.run("--sglprof-set=gate.min_steps=10")
    is_orderly(ran)
    assert len(ran.results["windows"]) == 6
    alive = json.loads((project.folder / "alive.json").read_text())
    # pytest-rerunfailures keeps the exceptions of failed tests, and with them a TestRun each.
    assert alive["TestRun"] <= 3
    assert (alive["records"], alive["documents"], alive["Window"]) == (0, 0, 0)


def test_fault_10_records_that_the_disk_refused_come_back_in_their_place(tmp_path: Path) -> None:
    book = RunBook(tmp_path, "run-1", FACTS)
    book.open()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for number in range(4):
        refused = number in (1, 2)
        resource.setrlimit(resource.RLIMIT_FSIZE, (400 if refused else soft, hard))
        try:
            book.add(record(f"test_a.py::test_{number}", padding=500))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    lines = (tmp_path / "run-1" / "journal.jsonl").read_text().splitlines()
    assert [json.loads(line)["attempt"]["nodeid"][-1] for line in lines] == ["0", "3"]
    assert book.problems == ["journal.jsonl could not be written: File too large"]
    book.finish(0)
    tests = json.loads((tmp_path / "run-1" / "results.json").read_text())["tests"]
    assert [test["nodeid"][-1] for test in tests] == ["0", "1", "2", "3"]
