"""Methods of `unittest.TestCase`: what they are given, and what becomes of what they raise."""

from __future__ import annotations

import pytest

from pytest_sglprof._baselines.history import read_history
from tests.integration.plugin.conftest import MakeProject, RunHere
from tests.support.project import Outcome

TESTS = """
import asyncio
import unittest
import httpx

@pytest.fixture
def whole(request):
    request.instance.whole = "a fixture of the user"

class CustomTestCase(unittest.TestCase):
    def drive(self, steps=60):
        sampling = {"max_new_tokens": steps, "ignore_eos": True}
        request = {"text": "one two three", "sampling_params": sampling}
        url = f"{self.sglang_server.url}/generate"
        return httpx.post(url, json=request, timeout=60).json()

@pytest.mark.sglang_server
class TestFast(CustomTestCase):
    def setUp(self):
        self.url = self.sglang_server.url

    @pytest.mark.profile_window(whole_body=True, slowdown=1.3)
    def test_window(self):
        self.drive()

    @pytest.mark.usefixtures("whole")
    def test_by_hand(self):
        assert self.whole == "a fixture of the user"
        with self.profile_window("hand") as window:
            self.drive()
        window.check("slowdown", 1.3)

    def test_load(self):
        load = self.bench_serving(num_prompts=4, max_concurrency=4, random_input_len=8,
                                  random_output_len=8, warm_up=False, disable_stream=True)
        self.assertEqual(load.completed, 4)

    @pytest.mark.profile_window(whole_body=True, slowdown=1.3)
    def test_that_fails(self):
        self.drive(4)
        self.assertEqual(self.url, "another")

    @pytest.mark.profile_window(whole_body=True, slowdown=1.3)
    def test_that_skips(self):
        self.skipTest("not today")

    @pytest.mark.profile_window(whole_body=True, slowdown=1.3)
    @unittest.expectedFailure
    def test_expected(self):
        self.fail("as expected")

    @pytest.mark.profile_window(whole_body=True, slowdown=1.3)
    def test_parts(self):
        for steps in (60, 61):
            with self.subTest(steps=steps):
                self.drive(steps)
                self.assertNotEqual(steps, 61)

    def test_too_little(self):
        with self.profile_window("short") as window:
            self.drive(4)
        window.check("slowdown", 1.3)

@pytest.mark.sglang_server("slow")
class TestSlow(CustomTestCase):
    @pytest.mark.profile_window(whole_body=True, slowdown=1.1)
    def test_window(self):
        self.drive()

    @pytest.mark.sglang_server("default")
    def test_elsewhere(self):
        self.assertEqual(self.sglang_server.spec.name, "default")

    def test_here(self):
        self.assertEqual(self.sglang_server.spec.name, "slow")

@pytest.mark.sglang_server
class TestAsync(unittest.IsolatedAsyncioTestCase, CustomTestCase):
    @pytest.mark.profile_window(whole_body=True, slowdown=1.3)
    async def test_window(self):
        await asyncio.to_thread(self.drive)

@pytest.mark.sglang_server
class TestTooEarly(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.url = cls.sglang_server.url

    def test_it(self):
        pass

@pytest.mark.usefixtures("sglang_server")
class TestByFixture(unittest.TestCase):
    @pytest.fixture(autouse=True)
    def _take(self, load):
        self.load = load

    def test_it(self):
        self.assertEqual(self.load(8).completed, 4)

def test_function(sglang_server):
    assert sglang_server.spec.name == "default"
"""
WORDS = {
    "TestFast::test_window": ("passed", "pass"),
    "TestFast::test_by_hand": ("passed", "pass"),
    "TestFast::test_load": ("passed", None),
    "TestFast::test_that_fails": ("failed", "inconclusive"),
    "TestFast::test_that_skips": ("skipped", None),
    "TestFast::test_expected": ("xfailed", None),
    "TestFast::test_parts": ("failed", "pass"),
    "TestFast::test_too_little": ("failed", "inconclusive"),
    "TestSlow::test_window": ("failed", "fail"),
    "TestSlow::test_elsewhere": ("passed", None),
    "TestSlow::test_here": ("passed", None),
    "TestAsync::test_window": ("passed", "pass"),
    "TestTooEarly::test_it": ("error", None),
    "TestByFixture::test_it": ("passed", None),
    "test_function": ("passed", None),
}


@pytest.fixture(scope="module")
def ran(make_project: MakeProject) -> Outcome:
    return make_project(TESTS).run("--tb=short")


@pytest.mark.parametrize("name", WORDS)
def test_a_method_has_a_server_windows_and_a_verdict(ran: Outcome, name: str) -> None:
    test = ran.test(name)
    assert (test["outcome"], test["verdict"]) == WORDS[name]
    assert len(test["attempts"]) == 1, "a subtest is no attempt"


def test_classes_share_servers_with_functions(ran: Outcome) -> None:
    assert sorted(server["key"] for server in ran.results["servers"]) == ["default", "slow"]


def test_a_failure_is_that_of_the_method_and_not_of_its_window(ran: Outcome) -> None:
    assert "AssertionError: 'http" in ran.section("TestFast.test_that_fails")
    assert "profile window verdict: fail" in ran.section("TestSlow.test_window")
    assert "4 steps" in ran.section("TestFast.test_too_little")
    assert "_plugin/" not in ran.section("TestFast.test_that_fails")


def test_only_what_passed_as_a_whole_may_become_a_baseline(ran: Outcome) -> None:
    lives = {life.key.test.partition("::")[2]: life for life in read_history(ran.run_folder.parent)}
    why = "its test failed by itself"
    assert why not in lives["TestFast::test_window"].not_acceptable
    assert why in lives["TestFast::test_parts"].not_acceptable


def test_a_class_is_told_that_it_comes_too_early(ran: Outcome) -> None:
    text = ran.section("TestTooEarly.test_it")
    assert "AttributeError: type object 'TestTooEarly' has no attribute 'sglang_server'" in text
    assert "before each method, after setUpClass has run: use self.sglang_server" in text


def test_two_workers_have_a_class_and_its_server_each(make_project: MakeProject) -> None:
    ran = make_project(TESTS).run("-n2", "-k", "test_window or test_here")
    assert [ran.test(name)["outcome"] for name in ("TestFast::test_window", "TestSlow::test_here")]
    workers = {test["nodeid"]: test["attempts"][0]["worker"] for test in ran.results["tests"]}
    assert len(workers) == 4
    assert len({name for test, name in workers.items() if "TestFast" in test}) == 1
    assert len(ran.results["servers"]) == 2
    assert ran.test("TestSlow::test_window")["verdict"] == "fail"


STANDIN = '[server]\nkind = "standin"\n'


@pytest.mark.parametrize(
    ("marks", "said"),
    [
        ("@pytest.mark.profile_window(slowdown=1.2)", "@pytest.mark.profile_window on a method"),
        ("@pytest.mark.sglang_server", "@pytest.mark.sglang_server on a method"),
    ],
)
def test_a_method_without_a_class_that_has_a_server_is_refused(
    pytester: pytest.Pytester, run_here: RunHere, marks: str, said: str
) -> None:
    pytester.makepyfile(
        f"""
        import unittest
        import pytest
        class TestBare(unittest.TestCase):
            {marks}
            def test_it(self):
                pass
        """
    )
    result = run_here("--sglprof", config=STANDIN)
    assert result.ret == pytest.ExitCode.INTERRUPTED
    assert said in result.stdout.str()
    assert "expected: @pytest.mark.sglang_server on the class" in result.stdout.str()


def test_without_sglprof_they_are_collected_and_skipped(
    pytester: pytest.Pytester, run_here: RunHere
) -> None:
    path = pytester.path / "test_it.py"
    path.write_text(f"import pytest\n{TESTS}")
    (pytester.path / "conftest.py").write_text("import pytest\nload = pytest.fixture(lambda: 1)\n")
    listed = run_here("--co", "-q", config=None)
    assert listed.ret == 0
    listed.stdout.fnmatch_lines(["*::TestFast::test_window", "*::TestTooEarly::test_it"])
    skipped = run_here(config=None)
    skipped.assert_outcomes(skipped=15)
    collected = run_here(
        "--sglprof", "--co", "-q", config=STANDIN + '[servers.slow]\nkind="standin"\n'
    )
    assert collected.ret == 0
