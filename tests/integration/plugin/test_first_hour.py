"""What happens to somebody who tries the plugin for an hour, a test for each."""

from __future__ import annotations

import re
import sys

import pytest

from tests.integration.plugin.conftest import MakeProject, RunHere

STANDIN = '[server]\nkind = "standin"\n'
ASKS_FOR_A_SERVER = "def test_it(sglang_server): pass"


# ---- options that lack the switch ------------------------------------------------------------


@pytest.mark.parametrize(
    "words", [("--sglprof-output=here",), ("--sglprof-server", "http://127.0.0.1:9")]
)
def test_an_option_on_the_command_line_without_the_switch_is_a_usage_error(
    pytester: pytest.Pytester, run_here: RunHere, words: tuple[str, ...]
) -> None:
    pytester.makepyfile(ASKS_FOR_A_SERVER)
    ran = run_here(*words, config=STANDIN)
    assert ran.ret == pytest.ExitCode.USAGE_ERROR
    flag = words[0].partition("=")[0]
    ran.stderr.fnmatch_lines([f"*{flag} is given without --sglprof*"])
    assert f"leave {flag} out" in ran.stderr.str()


def test_an_option_in_addopts_or_the_environment_is_named_in_the_reason_of_the_skip(
    pytester: pytest.Pytester, run_here: RunHere, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytester.makeini("[pytest]\naddopts = --sglprof-output=here\n")
    monkeypatch.setenv("SGLPROF_KEEP", "all")  # pytest has no option for it
    monkeypatch.setenv("SGLPROF_NSYS", "/opt/nsys")
    pytester.makepyfile(ASKS_FOR_A_SERVER)
    ran = run_here(config=STANDIN)
    ran.assert_outcomes(skipped=1)
    reason = "*needs --sglprof: *(--sglprof-output in addopts, SGLPROF_NSYS alone *"
    ran.stdout.fnmatch_lines([reason])


# ---- a value that pytest takes for a test ----------------------------------------------------


def test_a_value_after_a_space_moves_no_configuration_and_no_name(
    make_project: MakeProject,
) -> None:
    project = make_project(ASKS_FOR_A_SERVER)
    (project.folder / "pytest.ini").unlink()  # with it pytest looks no further
    apart = project.run("--sglprof-python", sys.executable, "test_job.py")
    joined = project.run(f"--sglprof-python={sys.executable}", "test_job.py")
    warning = f"test: write --sglprof-python={sys.executable}"
    assert warning in apart.text
    assert warning not in joined.text
    for outcome in (apart, joined):
        assert "config sglprof.toml" in outcome.text
        assert [test["nodeid"] for test in outcome.results["tests"]] == ["test_job.py::test_it"]


def test_names_are_relative_to_the_configuration_wherever_pytest_is_started(
    make_project: MakeProject,
) -> None:
    project = make_project(ASKS_FOR_A_SERVER)
    (project.folder / "pytest.ini").unlink()
    elsewhere = f"--rootdir={project.folder.parent}"
    moved = project.run(elsewhere)
    assert f"rootdir: {project.folder.parent}" in moved.text
    assert [test["nodeid"] for test in moved.results["tests"]] == ["test_job.py::test_it"]


# ---- progress --------------------------------------------------------------------------------

TWO_LOADS = """
@pytest.mark.parametrize("turn", ["first", "second"])
def test_load(bench_serving, turn):
    bench_serving(num_prompts=4, random_input_len=8, random_output_len=400)
"""


def test_progress_is_ours_and_the_outcome_begins_a_line_and_a_warm_server_is_not_warmed_again(
    make_project: MakeProject,
) -> None:
    project = make_project(TWO_LOADS)
    ran = project.run("-v")
    assert ran.status == 0
    shown = re.findall(r"^sglprof: (.*)$", ran.text, re.M)
    assert [line for line in shown if line.startswith("server default: ")]
    known = r"servers|STAND-IN|server default: [\w ]+, \d+ s$|(warm-up|load)( \d/4,)? \d+ s$"
    assert [line for line in shown if not re.match(known, line)] == []
    assert re.search(r"^PASSED +\[ 50%\]", ran.text, re.M)
    folders = sorted((ran.run_folder / "loads").iterdir())
    logs = [sorted(path.stem for path in folder.glob("*.log")) for folder in folders]
    assert logs == [["load-1", "load-1-warm-up"], ["load-1"]]
    assert [load["warmed_up"] for load in ran.results["loads"]] == [True, True]
