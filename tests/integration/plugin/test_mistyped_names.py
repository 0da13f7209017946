"""A mistyped name is refused where it is written, with the name that may have been meant."""

from __future__ import annotations

import pytest

from pytest_sglprof import ImbalanceOnset, QueueGrowth, ThroughputDrop
from pytest_sglprof._cli.main import main
from pytest_sglprof._config.model import METRICS, STAGES
from pytest_sglprof._errors import SettingsError, did_you_mean
from pytest_sglprof._load.triggers import as_trigger
from pytest_sglprof._trace.passes import STAGES as TRACED

# What no test of this file may need: a server that starts would be sglang, which is missing.
CONFIG = """
[server]
kind = "sglang"

[servers.experts]

[[category]]
name = "rope"
pattern = "rotary"
"""


@pytest.fixture
def run(run_here):
    def run(*options, config=CONFIG):
        return run_here("--sglprof", *options, config=config)

    return run


WINDOWS = {  # arguments of the marker -> what the refusal says
    'slowdown={"meo": 1.1}': "did you mean moe?",
    'slowdown={"MoE": 1.1}': "did you mean moe?",
    'slowdown={"comunication": 1.1}': "did you mean communication?",
    'slowdown={"al": 1.1}': "did you mean all?",
    'lost_share={"roope": 0.1}': "did you mean rope?",
    'slowdown={"qwertz": 1.1}': "expected: one of compute, communication, all, attention,",
    'slowdown={"moe in decod": 1.1}': "did you mean decode?",
    'slowdown={"compute in prefil": 1.1}': "did you mean prefill?",
    'slowdown=1.1, across="snyc"': "did you mean sync?",
    'slowdown={"moe across peer": 1.1}': "did you mean peers?",
    'slowdown=1.1, accross="sync"': "did you mean across?",
    'slowdown={"/fused[/": 1.1}': "is not a regular expression",
    "slow_down=1.1": "did you mean slowdown?",
    "imbalance_faktor=1.1": "did you mean imbalance_factor?",
    "num_step=50": "did you mean num_steps?",
    "whole_boddy=True, durration=2": "did you mean duration and whole_body?",
    'backend="nsis"': "did you mean nsys?",
    'profile_by_stage=True, num_steps=50, profile_stages=["decoed"]': "did you mean decode?",
    "num_steps=49": "num_steps=49 is below min_steps=50",
    "num_steps=1, slowdown=1.5": "num_steps=1 is below min_steps=50",
}


def test_fault_8_wrong_markers_are_one_collection_error_and_start_nothing(pytester, run):
    tests = ["import pytest"]
    for number, arguments in enumerate(WINDOWS):
        tests.append(f"@pytest.mark.profile_window({arguments})")
        tests.append(f"def test_{number}(sglang_server): pass")
    tests.append('@pytest.mark.sglang_server("expert")\ndef test_server(sglang_server): pass')
    tests.append("@pytest.mark.sglang_server(nsis=True)\ndef test_key(sglang_server): pass")
    pytester.makepyfile("\n".join(tests))
    ran = run()
    text = ran.stdout.str()
    for number, (arguments, said) in enumerate(WINDOWS.items()):
        problem = text.partition(f"test_{number}: ")[2].partition("\ntest_")[0]
        assert said in problem, arguments
    assert "did you mean experts?" in text.partition("test_server: ")[2]
    assert "did you mean nsys?" in text.partition("test_key: ")[2]
    assert ran.ret == pytest.ExitCode.INTERRUPTED
    assert not (pytester.path / ".sglprof").exists()


def test_fault_8_names_that_are_known_are_collected(pytester, run):
    pytester.makepyfile(
        """
        import pytest

        LIMITS = {"moe": 1.1, "all": 1.2, "rope": 1.3, "moe in mixed": 1.1, "/a|b/ in decode": 2}

        @pytest.mark.sglang_server("experts")
        @pytest.mark.profile_window(slowdown=LIMITS, num_steps=50, activities=["CPU", "GPU"])
        def test_it(sglang_server): pass
        """
    )
    assert run("--collect-only").ret == 0


def test_fault_8_fewer_steps_may_be_asked_for_where_fewer_are_needed(pytester, run):
    pytester.makepyfile(
        """
        import pytest

        @pytest.mark.profile_window(num_steps=5)
        def test_it(sglang_server): pass
        """
    )
    assert run("--collect-only", "--sglprof-set=gate.min_steps=5").ret == 0
    assert (
        run("--collect-only", "--sglprof-set=gate.min_steps=6").ret == pytest.ExitCode.INTERRUPTED
    )


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ('[[threshold]]\nscope = "meo"\nlimit = 1.1', "did you mean moe?"),
        ('[[threshold]]\nscope = "gem"\nlimit = 1.1', "threshold[0].scope: 'gem' is not a scope"),
        ('[[threshold]]\nstage = "decod"\nlimit = 1.1', "did you mean decode?"),
        ('[[threshold]]\nmetric = "slowdwn"\nlimit = 1.1', "did you mean slowdown?"),
        ('[[threshold]]\nkernel = "("\nlimit = 1.1', "threshold[0].kernel: '(' is not a regular"),
        ('[[threshold]]\nscop = "moe"\nlimit = 1.1', "did you mean scope?"),
        ("[[thresholds]]\nlimit = 1.1", "did you mean threshold?"),
        ("[gates]\nmin_steps = 1", "did you mean gate?"),
        ("[gate]\nminsteps = 1", "did you mean min_steps?"),
        ("[window]\nnum_step = 40", "did you mean num_steps?"),
        ("[window]\nnum_steps = 20", "[window]: num_steps=20 is below min_steps=50"),
        ("[window]\nnum_steps = 40\n[gate]\nmin_steps = 41", "num_steps=40 is below min_steps=41"),
        ('[window]\nbackend = "torhc"', "did you mean torch?"),
        ('[server]\nkind = "standing"', "did you mean standin?"),
        ('[servers.a]\nmodelpath = "x"', "did you mean model_path?"),
        ('[output]\nkeep = "fail"', "did you mean failed?"),
        ('[[category]]\nname = "a"\npattern = "x("', "category[0].pattern: 'x(' is not a regular"),
        ('[trace]\nstep_delimiter = "["', "trace.step_delimiter: '[' is not a regular expression"),
    ],
)
def test_fault_8_a_wrong_configuration_is_a_usage_error(pytester, run, config, said):
    pytester.makepyfile("def test_it(): pass")
    ran = run(config=config)
    assert said in ran.stderr.str()
    assert ran.ret == pytest.ExitCode.USAGE_ERROR


def test_fault_8_a_category_of_ones_own_is_a_scope(pytester, run):
    pytester.makepyfile("def test_it(): pass")
    config = f'{CONFIG}\n[[threshold]]\nscope = "rope"\nlimit = 1.1\n'
    assert run(config=config).ret == 0
    assert run(config=config.replace('scope = "rope"', 'scope = "rop"')).ret == 4


def test_fault_8_a_kind_of_server_that_a_hook_returns_is_checked(pytester, run):
    pytester.makeconftest(
        """
        from pytest_sglprof import ServerSpec

        def pytest_sglprof_servers(config):
            return {"mine": ServerSpec(name="mine", kind="stand-in")}
        """
    )
    pytester.makepyfile("def test_it(): pass")
    ran = run()
    assert "did you mean standin?" in ran.stderr.str()
    assert ran.ret == pytest.ExitCode.USAGE_ERROR


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: ImbalanceOnset(factr=2.0), "did you mean factor?"),
        (lambda: QueueGrowth(request=3), "did you mean requests?"),
        (lambda: ThroughputDrop(0.2, holt=1.0), "did you mean hold?"),
        (lambda: ImbalanceOnset(source="load"), "did you mean loads?"),
        (lambda: QueueGrowth(on_no_onset="passed"), "did you mean pass?"),
    ],
)
def test_fault_8_arguments_of_triggers(make, said):
    with pytest.raises(SettingsError) as refused:
        make()
    assert said in str(refused.value)


def test_fault_8_a_trigger_of_ones_own_is_whole():
    class Half:
        within = 3.0

        def detector(self, ranks):
            return None

    with pytest.raises(SettingsError, match="has no on_no_onset, compares_ranks"):
        as_trigger(Half())


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("check x --scope meo", "did you mean moe?"),
        ("check x --scope comput", "did you mean compute?"),
        ("check x --scope roep", "did you mean rope?"),
        ("check x --metric lost_shar", "did you mean lost_share?"),
        ("check x --stage prefil", "did you mean prefill?"),
        ("check x --stage qwertz", "expected: one of decode, prefill"),
        ("check x --kernel (", "--kernel: '(' is not a regular expression"),
        ("check x --step-delimiter (", "--step-delimiter '(' is not a regular expression"),
        ("kernels x --by rnak", "did you mean rank?"),
        ("kernels x --format jsno", "did you mean json?"),
        ("chekc x", "did you mean check?"),
    ],
)
def test_fault_8_names_on_the_command_line(tmp_path, monkeypatch, capsys, words, said):
    (tmp_path / "sglprof.toml").write_text(CONFIG)
    monkeypatch.chdir(tmp_path)
    assert main(words.split()) == 2
    assert said in capsys.readouterr().err


def test_fault_8_the_command_line_takes_the_categories_of_the_configuration(
    tmp_path, monkeypatch, capsys
):
    (tmp_path / "sglprof.toml").write_text(CONFIG)
    monkeypatch.chdir(tmp_path)
    for scope in ("rope", "moe", "all"):
        assert main(["check", "nothing-here", "--scope", scope]) == 2
        assert "nothing-here does not exist" in capsys.readouterr().err


def test_the_stages_that_may_be_written_are_those_that_traces_tell():
    assert set(STAGES) == set(TRACED.values())


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        (["slowdwn"], "did you mean slowdown?"),
        (["Slowdown "], "did you mean slowdown?"),
        (["xyz", "lostshare"], "did you mean lost_share?"),
        (["xyz"], "-"),
        ([3], "-"),
        ([], "-"),
    ],
)
def test_the_nearest_name(given, meant):
    assert did_you_mean(given, METRICS, "-") == meant
