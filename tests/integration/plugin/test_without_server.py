"""Runs that need no server: the plugin off, wrong input, and what is only shown."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

HEAVY = (
    "httpx", "jsonschema", "psutil", "filelock", "numpy", "pandas", "scipy", "msgspec", "jinja2",
)  # fmt: skip
STANDIN = '[server]\nkind = "standin"\n'


pytestmark = pytest.mark.usefixtures("clean_environment")


@pytest.fixture
def run(run_here):
    """In this process; the plugin comes by its entry point."""

    def run(*options, config=STANDIN):
        return run_here(*options, config=config)

    return run


@pytest.fixture
def run_apart(pytester):
    """In a process of its own: for workers, and for what ends a process."""

    def run(*options, config=STANDIN):
        (pytester.path / "sglprof.toml").write_text(config)
        return pytester.runpytest_subprocess("-W", "error", "--strict-markers", "-rA", *options)

    return run


# ---- off -------------------------------------------------------------------------------------

USERS = """
    import pytest

    def test_plain(): pass
    def test_server(sglang_server): assert 0
    def test_load(bench_serving): assert 0
    def test_window(profile_window): assert 0

    @pytest.mark.sglang_server("nowhere", nonsense=True)
    def test_mark(): assert 0

    @pytest.mark.profile_window(nonsense=True)
    def test_window_mark(): assert 0
"""


def test_without_the_switch_what_needs_it_is_skipped_with_that_reason(pytester, run):
    pytester.makepyfile(USERS)
    ran = run(config="this is [not read")
    ran.assert_outcomes(passed=1, skipped=5)
    ran.stdout.fnmatch_lines(["SKIPPED *needs --sglprof: it starts a server*"])
    ran.stdout.no_fnmatch_line("sglprof:*")
    assert ran.ret == 0
    assert not (pytester.path / ".sglprof").exists()


def test_without_the_switch_nothing_heavy_is_imported(pytester, run):
    pytester.makepyfile(USERS)
    pytester.makeconftest(
        """
        import json, pathlib, sys

        def pytest_unconfigure(config):
            pathlib.Path("modules.json").write_text(json.dumps(sorted(sys.modules)))
        """
    )
    found = []
    for options in ((), ("-p", "no:sglprof", "-k", "plain", "-W", "ignore")):
        pytester.runpytest_subprocess("-p", "no:xdist", "--continue-on-collection-errors", *options)
        found.append(set(json.loads((pytester.path / "modules.json").read_text())))
    ours = found[0] - found[1]
    assert "pytest_sglprof._plugin.hooks" in ours
    assert not [name for name in ours if name.partition(".")[0] in HEAVY]
    assert "pytest_sglprof._plugin.session" not in ours


def test_with_the_switch_pandas_is_imported_only_for_a_window():
    code = "import sys, pytest_sglprof._plugin.session as session; print('pandas' in sys.modules)"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout == "False\n"


def test_help_and_markers_tell_of_us(pytester):
    text = pytester.runpytest_inprocess("--help").stdout.str()
    assert "profile windows on SGLang servers (pytest-sglprof)" in text
    assert "--sglprof-output=DIR" in text
    assert "[SGLPROF_OUTPUT]" in " ".join(text.split())
    assert "sglprof_output (string)" not in text
    text = pytester.runpytest_inprocess("--markers").stdout.str()
    assert '@pytest.mark.sglang_server(name="default", nsys=None): ' in text
    assert "@pytest.mark.profile_window(**options): " in text


# ---- on, without a server --------------------------------------------------------------------


def test_plain_tests_start_no_server_and_leave_no_folder(pytester, run):
    pytester.makepyfile("def test_plain(): pass")
    ran = run("--sglprof")
    ran.assert_outcomes(passed=1)
    ran.stdout.fnmatch_lines(["sglprof: servers default (standin); config sglprof.toml; *"])
    ran.stdout.no_fnmatch_line("*= sglprof =*")
    assert not (pytester.path / ".sglprof").exists()


@pytest.mark.parametrize("where", ["environment", "addopts"])
def test_the_switch_can_be_set_elsewhere(pytester, run, monkeypatch, where):
    pytester.makepyfile("def test_it(sglang_server): pass")
    if where == "addopts":
        pytester.makeini("[pytest]\naddopts = --sglprof\n")
    else:
        monkeypatch.setenv("SGLPROF", "1")
    ran = run("--collect-only")
    ran.stdout.fnmatch_lines(["sglprof: servers *"])
    assert not (pytester.path / ".sglprof").exists()


def test_the_environment_can_say_no(pytester, run, monkeypatch):
    pytester.makepyfile("def test_it(sglang_server): pass")
    monkeypatch.setenv("SGLPROF", "0")
    run().assert_outcomes(skipped=1)


def test_show_config_names_values_and_origins_and_runs_nothing(pytester, run, monkeypatch):
    pytester.makepyfile("def test_it(): assert 0")
    monkeypatch.setenv("SGLPROF_MIN_STEPS", "7")
    config = f"{STANDIN}[gate]\nmin_share = 0.2\n[[threshold]]\nscope = 'moe'\nlimit = 1.3\n"
    words = ("--sglprof-output=results", "--sglprof-set", "output.keep=all")
    ran = run("--sglprof-show-config", *words, config=config)
    ran.stdout.fnmatch_lines_random(
        [
            "output = */results  (--sglprof-output)",
            "keep = all  (--sglprof-set output.keep)",
            "min_steps = 7  (SGLPROF_MIN_STEPS)",
            "min_share = 0.2  (sglprof.toml)",
            "runs = 10  (default)",
            "threshold: slowdown of moe <= 1.3  (sglprof.toml)",
            "server default: kind=standin nsys=False args=",
        ]
    )
    assert ran.ret == 0
    assert "1 failed" not in ran.stdout.str()


def test_a_hook_adds_servers(pytester, run):
    pytester.makeconftest(
        """
        from pytest_sglprof import ServerSpec

        def pytest_sglprof_servers(config):
            return {"hooked": ServerSpec(name="hooked", kind="standin")}
        """
    )
    pytester.makepyfile(
        """
        import pytest

        @pytest.mark.sglang_server("hooked")
        def test_it(sglang_server): pass
        """
    )
    ran = run("--sglprof", "--collect-only")
    ran.stdout.fnmatch_lines(["sglprof: servers default (standin), hooked (standin);*"])
    assert ran.ret == 0


def test_the_servers_parameter_is_hidden_and_sorts(pytester, run):
    pytester.makepyfile(
        """
        import pytest

        def test_a(sglang_server): pass

        @pytest.mark.sglang_server("default", nsys=True)
        @pytest.mark.parametrize("x", [1, 2])
        def test_b(sglang_server, x): pass

        def test_plain(): pass

        def test_c(bench_serving): pass
        """
    )
    ran = run("--sglprof", "--collect-only", "-q")
    ids = [line.partition("::")[2] for line in ran.outlines if "::" in line]
    ours = [name for name in ids if name != "test_plain"]
    assert ours == ["test_a", "test_c", "test_b[1]", "test_b[2]"]


# ---- wrong -----------------------------------------------------------------------------------

WRONG = """
    import pytest

    @pytest.mark.profile_window(num_stepz=3, wide=True)
    def test_window(sglang_server): pass

    @pytest.mark.sglang_server("nowhere")
    def test_server(sglang_server): pass

    @pytest.mark.sglang_server("default", nsys=False)
    @pytest.mark.profile_window(backend="nsys")
    def test_nsys(sglang_server): pass

    @pytest.mark.profile_window(slowdown="much")
    def test_threshold(sglang_server): pass

    @pytest.mark.profile_window()
    def test_serverless(): pass

    def test_right(): pass
"""


@pytest.mark.parametrize("workers", [(), ("-n", "2")], ids=["alone", "workers"])
def test_all_wrong_markers_of_a_module_are_one_collection_error(pytester, run, run_apart, workers):
    pytester.makepyfile(test_wrong=WRONG, test_fine="def test_fine(): pass")
    ran = (run_apart if workers else run)("--sglprof", *workers)
    text = ran.stdout.str()
    for line in (
        "test_window: @pytest.mark.profile_window: unknown arguments num_stepz, wide",
        'test_server: @pytest.mark.sglang_server("nowhere"): there is no such server',
        'test_nsys: backend="nsys" on a server that is not started under nsys',
        "expected: @pytest.mark.sglang_server(nsys=True) on the test",
        "test_threshold: @pytest.mark.profile_window: slowdown is 'much', not a number",
        "test_serverless: @pytest.mark.profile_window on a test without a server",
    ):
        assert line in text, line
    assert "test_right" not in text
    assert "INTERNALERROR" not in text
    assert ran.ret in (pytest.ExitCode.INTERRUPTED, pytest.ExitCode.TESTS_FAILED)
    assert "ERROR test_wrong.py" in text


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--sglprof-nsys-session=s"], "--sglprof-nsys-session is given without --sglprof-server"),
        (["--sglprof-server-dir=/a:/b"], "--sglprof-server-dir is given without --sglprof-server"),
        (
            ["--sglprof-set=window.repeat=often"],
            "window.repeat: 'often' does not match '^certain$'",
        ),
        (["--sglprof-set=min_steps"], "expected: KEY=VALUE, a dotted key of sglprof.toml"),
        (["--sglprof-config=none.toml"], "none.toml does not exist"),
        (["--sglprof-set=output.keep=some"], "output.keep: 'some' is not one of"),
        (["--sglprof-set=gate.minsteps=3"], "did you mean min_steps?"),
        (["--sglprof-output"], "expected one argument"),
    ],
)
def test_wrong_options_are_usage_errors(pytester, run, options, said):
    pytester.makepyfile("def test_it(): pass")
    ran = run("--sglprof", *options)
    assert ran.ret == pytest.ExitCode.USAGE_ERROR
    assert said in ran.stderr.str()
    assert "Traceback" not in ran.stderr.str()


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ('[server]\nkind = "standin"\nargs = }\n', "line 3"),
        ("[server]\ntp = 2\n", "server: unknown key tp ("),
        ('[[threshold]]\nlimit = "low"\n', "threshold[0].limit: 'low' is not of type 'number'"),
        ("[[threshold]]\nlimit = 0.5\n", "threshold[0].limit is 0.5"),
    ],
)
def test_wrong_configuration_is_a_usage_error(pytester, run, config, said):
    pytester.makepyfile("def test_it(): pass")
    ran = run("--sglprof", config=config)
    assert ran.ret == pytest.ExitCode.USAGE_ERROR
    assert said in ran.stderr.str()
    assert "sglprof.toml" in ran.stderr.str()


def test_missing_sglang_is_an_error_of_setup_that_says_what_to_do(pytester, run):
    pytester.makepyfile("def test_it(sglang_server): pass\ndef test_too(sglang_server): pass")
    ran = run("--sglprof", f"--sglprof-python={pytester.path / 'no-python'}", config=None)
    ran.assert_outcomes(errors=2)
    text = ran.stdout.str()
    assert "sglprof: servers default (sglang, which is missing)" in text
    assert "--sglprof-python" in text
    assert "plugin_session.py" not in text
    results = json.loads((pytester.path / ".sglprof/latest/results.json").read_text())
    assert [test["outcome"] for test in results["tests"]] == ["error", "error"]


def test_workers_that_scatter_the_tests_of_a_server_are_warned_of(pytester, run_apart):
    pytester.makepyfile("def test_it(): pass")
    warned = "*--dist=each may give tests of one server to several workers*"
    run_apart("--sglprof", "-n", "1", "--dist=each").stdout.fnmatch_lines([warned])


CRASHING = """
    import os, pytest

    group = pytest.mark.xdist_group

    @group("a")
    def test_before(): pass

    @group("a")
    def test_crash(): os._exit(1)

    @group("a")
    def test_after(): pass

    @group("b")
    def test_other(): pass

    def test_crash_alone(): os._exit(1)

    def test_last(): pass
"""


@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_crashed_worker_loses_only_the_test_it_died_of(pytester, run_apart, workers):
    pytester.makepyfile(CRASHING)
    ran = run_apart("--sglprof", "-n", workers)
    ran.assert_outcomes(passed=4, failed=2)
    crashed = [line for line in ran.outlines if line.startswith("FAILED")]
    assert sorted(line.split("::")[1].split("@")[0].split(" ")[0] for line in crashed) == [
        "test_crash",
        "test_crash_alone",
    ]
