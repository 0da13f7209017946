"""What happens to somebody who tries the plugin for an hour, a test for each."""

from __future__ import annotations

import contextlib
import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest

from pytest_sglprof._cli.main import main
from pytest_sglprof._config.load import build_settings
from pytest_sglprof._run.folder import RunFolder
from pytest_sglprof._run.servers import open_server
from pytest_sglprof._server import command
from tests.integration.plugin.conftest import MakeProject, RunHere
from tests.support.project import SERVERS
from tests.support.running import standin

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


def test_on_a_terminal_a_line_of_progress_is_replaced(make_project: MakeProject) -> None:
    late = SERVERS.replace('"--crash-delay", "0.2"]', '"--ready-delay", "4"]', 1)
    project = make_project(ASKS_FOR_A_SERVER, late)
    ours, theirs = pty.openpty()
    with os.fdopen(ours, "rb", buffering=0) as terminal:
        running = subprocess.Popen(
            project.command("-v"),
            cwd=project.folder,
            env=project.environment(),
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
        )
        os.close(theirs)
        shown = bytearray()
        with contextlib.suppress(OSError):  # EIO: nobody has the other end any more
            while piece := terminal.read(4096):
                shown += piece
    assert running.wait() == 0
    text = shown.decode().replace("\r\n", "\n")
    assert re.search(r"test_it \nsglprof: server default: \w+, \d s\r\x1b\[K", text), text


# ---- a window after the load -----------------------------------------------------------------

TOO_LATE = """
def test_after_the_load(bench_serving, profile_window, load):
    load(60)
    with profile_window(num_steps=60) as window:
        window.wait()


def test_load_ends_first(bench_serving, profile_window):
    with bench_serving.running(num_prompts=4, random_input_len=8, random_output_len=1100,
                               random_range_ratio=1.0, warm_up=False):
        with profile_window(num_steps=1500) as window:  # more than the load has
            window.wait()


def test_somebody_else_drives_a_load(bench_serving, profile_window, load, drive):
    import threading

    load(60)
    driving = threading.Thread(target=drive, args=(3000,))
    driving.start()
    with profile_window(num_steps=60) as window:
        window.wait()
    driving.join()
"""


def test_a_window_opened_after_the_load_had_ended_says_so_at_once(
    make_project: MakeProject,
) -> None:
    patient = 'args = ["--tp", "2", "--watchdog-timeout", "100000"]'  # for a window of many steps
    project = make_project(TOO_LATE, SERVERS.replace('args = ["--tp", "2"]', patient))
    ran = project.run()  # of which each window has a timeout of 300 s
    text = ran.section("test_after_the_load")
    assert text.startswith("inconclusive: the load was over before the window ")
    assert "inside `with bench_serving.running(...):`" in text
    (window,) = ran.windows("test_load_ends_first")
    assert window["verdict"] == "inconclusive"
    assert "its 1500 steps were not over when it closed" in window["reason"]
    assert ran.word("test_somebody_else_drives_a_load") == "PASSED"
    assert ran.seconds < 240
    names = [window["name"] for window in ran.results["windows"]]
    assert names == ["test_load_ends_first", "test_somebody_else_drives_a_load"]  # of their tests


# ---- running servers -------------------------------------------------------------------------


def test_a_running_server_may_stand_in_the_configuration(
    tmp_path: Path, make_project: MakeProject
) -> None:
    key = "sk-of-the-running-server"
    with standin(tmp_path, "--tp", "2", "--step-ms", "4", "--api-key", key) as running:
        config = f"""
            [server]
            kind = "standin"

            [servers.theirs]
            url = "{running.url}"
            server_dir = "{tmp_path}:{tmp_path}"
            api_key_env = "THEIR_KEY"
        """
        project = make_project(
            """
            @pytest.mark.sglang_server("theirs")
            @pytest.mark.profile_window(num_steps=60)
            def test_theirs(sglang_server, load):
                assert sglang_server.attached
                load(1500)
            """.replace("\n            ", "\n"),
            config,
        )
        ran = project.run(THEIR_KEY=key)
        assert ran.word("test_theirs") == "PASSED"
        (server,) = ran.results["servers"]
        assert (server["key"], server["url"], server["attached"]) == ("theirs", running.url, True)
        assert f"theirs ({running.url})" in ran.text
        assert key not in ran.text
        assert running.get("/ready").status_code == 200


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ('url = "http://a:1"\nargs = ["--tp", "2"]', "server default: args beside url"),
        ('server_dir = "/a:/b"', "server default: server_dir without url"),
        ('url = "http://a:1"\nserver_dir = "a"', "the folder of the running server is 'a'"),
    ],
)
def test_a_server_is_either_started_or_running(
    pytester: pytest.Pytester, run_here: RunHere, table: str, said: str
) -> None:
    pytester.makepyfile(ASKS_FOR_A_SERVER)
    ran = run_here("--sglprof", config=f"[server]\n{table}\n")
    assert ran.ret == pytest.ExitCode.USAGE_ERROR
    assert said in ran.stderr.str()


@pytest.mark.parametrize(
    ("of_server", "of_settings", "python", "driver"),
    [
        ("", "", sys.executable, "standin"),  # this interpreter has no SGLang
        ("/opt/sglang/bin/python", "", "/opt/sglang/bin/python", "sglang"),
        ("", "/opt/other/bin/python", "/opt/other/bin/python", "sglang"),
    ],
)
def test_python_of_the_server_drives_the_load_of_a_running_one(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    of_server: str,
    of_settings: str,
    python: str,
    driver: str,
) -> None:
    document = {"server": {"python": of_server} if of_server else {}}
    if of_settings:
        document["tools"] = {"python": of_settings}
    monkeypatch.setattr(command, "kind_from_info", lambda info: "sglang")
    monkeypatch.setattr(command, "has_load_driver", lambda python: False)
    with standin(tmp_path) as running:
        settings = build_settings(
            {"server": running.url}, {}, document, config_file=None, invocation_dir=tmp_path
        )
        spec = settings.servers["default"]
        server = open_server(spec, settings, RunFolder(tmp_path, "run"), None)
        try:
            assert (server.python, server.driver_kind) == (python, driver)
        finally:
            server.stop()


def test_the_embedded_driver_is_named_where_it_stands_in(
    pytester: pytest.Pytester, run_here: RunHere
) -> None:
    pytester.makepyfile("def test_plain(): pass")
    ran = run_here("--sglprof", "--sglprof-server=http://127.0.0.1:9", config=None)
    ran.stdout.fnmatch_lines(["sglprof: attached to http://127.0.0.1:9;*"])
    if not command.has_load_driver(sys.executable):
        ran.stdout.fnmatch_lines(["sglprof: * has no SGLang, so loads *the embedded driver*"])


# ---- contradictions, and what is missing -----------------------------------------------------

CONTRADICTIONS = """
    import pytest
    from pytest_sglprof import ImbalanceOnset

    @pytest.mark.sglang_server(nsys=True)
    @pytest.mark.profile_window(num_steps=100)
    def test_torch_under_nsys(sglang_server): pass

    @pytest.mark.profile_window(backend="nsys", activities=["GPU"])
    def test_torch_option_of_nsys(sglang_server): pass

    @pytest.mark.profile_window(trigger=ImbalanceOnset(), repeat=3)
    def test_trigger_repeats(sglang_server): pass

    @pytest.mark.profile_window(num_steps=100, activities=["CUDA_PROFILER"])
    def test_records_nothing(sglang_server): pass

    @pytest.mark.sglang_server("cpu", nsys=True)
    @pytest.mark.profile_window(num_steps=100)
    def test_torch_under_nsys_on_a_cpu(sglang_server): pass
"""


def test_contradictions_in_markers_fail_the_collection(
    pytester: pytest.Pytester, run_here: RunHere
) -> None:
    pytester.makepyfile(CONTRADICTIONS)
    config = '[server]\n[servers.cpu]\nargs = ["--device", "cpu"]\n'
    ran = run_here("--sglprof", "--collect-only", config=config)
    text = ran.stdout.str()
    for line in (
        "test_torch_under_nsys: a torch window on a GPU server that runs under nsys",
        "test_torch_option_of_nsys: activities with backend='nsys'",
        "test_trigger_repeats: profile window 'test_trigger_repeats': repeat=3 with a trigger",
        "test_records_nothing: activities=['CUDA_PROFILER'] would record no kernel",
    ):
        assert line in text, line
    assert "on_a_cpu" not in text
    assert ran.ret == pytest.ExitCode.INTERRUPTED


def test_contradictions_in_the_configuration_are_usage_errors(
    pytester: pytest.Pytester, run_here: RunHere
) -> None:
    pytester.makepyfile(ASKS_FOR_A_SERVER)
    ran = run_here("--sglprof", config=f"{STANDIN}[window]\nnum_steps = 100\nduration = 5\n")
    assert ran.ret == pytest.ExitCode.USAGE_ERROR
    assert "sglprof.toml: [window]: num_steps=100 with duration=5" in ran.stderr.str()


def test_what_the_machine_lacks_is_a_line_and_no_error_of_collection(
    pytester: pytest.Pytester, run_here: RunHere, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("ABSENT_KEY", raising=False)
    pytester.makepyfile(
        """
        import pytest

        @pytest.mark.sglang_server(nsys=True)
        def test_it(sglang_server): pass

        @pytest.mark.sglang_server("other")
        def test_other(sglang_server): pass
        """
    )
    config = f"""
        [server]
        model_path = "/models/absent"
        api_key_env = "ABSENT_KEY"
        [servers.other]
        kind = "standin"
        [servers.unused]
        python = "{pytester.path}/unused-python"
        [tools]
        python = "{pytester.path}/no-python"
        nsys = "{pytester.path}/no-nsys"
    """
    ran = run_here("--sglprof", "--collect-only", config=config)
    assert ran.ret == pytest.ExitCode.OK
    lines = [line for line in ran.outlines if line.startswith("sglprof: not on this machine: ")]
    for part in ("no-python is not a working", "no-nsys", "ABSENT_KEY is not", "/models/absent"):
        assert [line for line in lines if part in line and "(server default+nsys)" in line], part
    assert len(lines) == 4
    assert "unused-python" not in "".join(lines)


# ---- an interrupted run ----------------------------------------------------------------------

INTERRUPTED = """
import os, signal

def test_whole(load, profile_window, bench_serving):
    load(60)


def test_interrupted(bench_serving, profile_window):
    with bench_serving.running(num_prompts=4, random_input_len=8, random_output_len=3000,
                               random_range_ratio=1.0, warm_up=False):
        with profile_window("first", num_steps=60) as window:
            window.wait()
        with profile_window("second"):
            os.kill(os.getpid(), signal.SIGINT)
            signal.pause()
"""


def test_an_interrupted_run_keeps_what_it_recorded_and_says_how_to_report_it(
    make_project: MakeProject, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = make_project(INTERRUPTED).run()
    assert ran.status == pytest.ExitCode.INTERRUPTED
    outcomes = {test["nodeid"]: test["outcome"] for test in ran.results["tests"]}
    assert outcomes == {
        "test_job.py::test_whole": "passed",
        "test_job.py::test_interrupted": "interrupted",
    }
    words = {window["name"]: window["verdict"] for window in ran.results["windows"]}
    assert words == {"first": "pass", "second": "inconclusive"}  # the block of the second was cut
    assert f"`sglprof report {ran.run_folder}`" in ran.text
    monkeypatch.chdir(ran.folder)
    assert main(["report", str(ran.run_folder)]) == 0


def test_a_configuration_that_is_not_read_is_named(
    pytester: pytest.Pytester, run_here: RunHere
) -> None:
    """It is beside the tests, but pytest was given a folder above both."""
    for name in ("one", "two"):
        pytester.mkdir(name)
        (pytester.path / name / f"test_{name}.py").write_text(ASKS_FOR_A_SERVER)
    (pytester.path / "one" / "sglprof.toml").write_text(STANDIN)
    ran = run_here("--sglprof", "--collect-only", config=None)
    ran.stdout.fnmatch_lines(["sglprof: one/sglprof.toml is not read*=one/sglprof.toml, or *"])
    ran = run_here("--sglprof", "--collect-only", "one", config=None)
    ran.stdout.no_fnmatch_line("*is not read*")
    ran = run_here("--sglprof", "--collect-only", "--sglprof-config=one/sglprof.toml", config=None)
    ran.stdout.no_fnmatch_line("*is not read*")
