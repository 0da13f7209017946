"""Plugins that repeat tests or run them in another way. Each lies in a folder of its own.

They are not installed beside the others: pytest-retry and pytest-rerunfailures read one marker.
"""

from __future__ import annotations

import shutil

import pytest

from tests.integration.plugin.conftest import MakeProject
from tests.support.plugins import plugin
from tests.support.project import Outcome

RETRIED = """
import unittest
import httpx
runs = []

@pytest.mark.sglang_server("slow")
@pytest.mark.profile_window(whole_body=True, slowdown=1.1)
def test_slow(drive):
    drive()

@pytest.mark.sglang_server
class TestFlaky(unittest.TestCase):
    @pytest.mark.profile_window(whole_body=True, slowdown=1.3)
    def test_third(self):
        sampling = {"max_new_tokens": 60, "ignore_eos": True}
        request = {"text": "one", "sampling_params": sampling}
        httpx.post(f"{self.sglang_server.url}/generate", json=request, timeout=60)
        runs.append(1)
        self.assertEqual(len(runs), 3)

@pytest.mark.flaky(retries=1)
def test_without_a_window(sglang_server):
    runs.append(2)
    assert runs.count(2) == 2
"""


@pytest.fixture(scope="module")
def retried(make_project: MakeProject) -> Outcome:
    folder = plugin("pytest-retry==1.7.0")
    options = ("-p", "no:rerunfailures", "--retries=2")
    return make_project(RETRIED).run(*options, PYTHONPATH=str(folder))


def attempts(ran: Outcome, name: str) -> list[tuple[str, str | None]]:
    return [(each["outcome"], each["verdict"]) for each in ran.test(name)["attempts"]]


def test_every_attempt_of_pytest_retry_is_kept(retried: Outcome) -> None:
    assert "1 failed, 2 passed, 3 retried" in retried.text
    assert attempts(retried, "test_slow") == [
        ("retried", "fail"),
        ("failed", "fail"),
        ("failed", "fail"),
    ]
    assert attempts(retried, "TestFlaky::test_third") == [
        ("retried", "pass"),
        ("failed", "pass"),
        ("passed", "pass"),
    ]
    assert attempts(retried, "test_without_a_window") == [("retried", None), ("passed", None)]
    assert [w["attempt"] for w in retried.windows("test_slow")] == [1, 2, 3]


def test_the_last_attempt_is_the_result(retried: Outcome) -> None:
    assert retried.test("test_slow")["outcome"] == "failed"
    assert dict(retried.properties("test_third"))["verdict"] == "pass"
    assert retried.text.count("attempt 3, stand-in): fail") >= 1


@pytest.mark.parametrize("word", ["again", "rerun"])
def test_the_word_of_another_plugin_is_kept(make_project: MakeProject, word: str) -> None:
    folder = plugin("pytest-retry==1.7.0")
    options = ("-p", "no:rerunfailures", "-n1", f"--retry-outcome={word}", "-k", "without")
    ran = make_project(RETRIED).run(*options, PYTHONPATH=str(folder))
    first = "failed" if word == "rerun" else word  # as pytest-rerunfailures has it
    assert attempts(ran, "test_without_a_window") == [(first, None), ("passed", None)]


ASYNC = """
import asyncio

@pytest.mark.asyncio
@pytest.mark.profile_window(whole_body=True, slowdown=1.3)
async def test_coroutine(drive):
    await asyncio.to_thread(drive)

@pytest.fixture(scope="module")
def server(sglang_server):
    return sglang_server

@pytest.mark.profile_window(whole_body=True, slowdown=1.3)
def test_by_a_fixture_of_the_user(server, drive):
    drive()
"""


def test_coroutines_of_pytest_asyncio_have_windows(make_project: MakeProject) -> None:
    folder = plugin("pytest-asyncio==1.5.0")
    project = make_project(ASYNC)
    (project.folder / "pytest.ini").write_text(
        "[pytest]\nasyncio_default_fixture_loop_scope = function\n"
    )
    ran = project.run(PYTHONPATH=str(folder))
    for name in ("test_coroutine", "test_by_a_fixture_of_the_user"):
        assert attempts(ran, name) == [("passed", "pass")]


def test_the_example_of_a_unittest_suite_passes(make_project: MakeProject, project_root) -> None:
    example = project_root / "conftest_examples" / "unittest_suite"
    project = make_project("", (example / "sglprof.toml").read_text())
    shutil.copy(example / "test_suite.py", project.folder)
    ran = project.run()
    assert ran.status == 0
    assert {(t["outcome"], t["verdict"]) for t in ran.results["tests"]} == {
        ("passed", None),
        ("passed", "pass"),
    }
    assert len(ran.results["windows"]) == 2
