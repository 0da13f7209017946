"""Options, environment, ini and sglprof.toml become one `Settings` that knows its origins."""

from __future__ import annotations

from pathlib import Path

import pytest

from pytest_sglprof._config.load import (
    Settings,
    build_settings,
    load_config,
    resolve_options,
    thresholds_from,
)
from pytest_sglprof._config.model import ServerSpec, Threshold
from pytest_sglprof._config.options import OPTIONS
from pytest_sglprof._config.windows import window_spec
from pytest_sglprof._errors import SettingsError

HERE = Path("/project")


def settings(document=None, *, cli=None, env=None, config=None, servers=None) -> Settings:
    values, origins = resolve_options(cli or {}, env or {})
    return build_settings(
        values,
        origins,
        document or {},
        config_file=config,
        invocation_dir=HERE,
        extra_servers=servers,
    )


SOURCES = [  # weakest first: what each would set, and what the origin is then called
    ("toml", "runs-toml", "sglprof.toml"),
    ("env", "runs-env", "SGLPROF_OUTPUT"),
    ("set", "runs-set", "--sglprof-set output.dir"),
    ("cli", "runs-cli", "--sglprof-output"),
]


@pytest.mark.parametrize("count", range(1, 5))
def test_the_strongest_source_wins_and_is_named(count):
    given = {source: value for source, value, _ in SOURCES[:count]}
    found = settings(
        {"output": {"dir": given["toml"]}},
        env={"SGLPROF_OUTPUT": given.get("env", "")},
        cli={
            "output": given.get("cli"),
            "set": [f"output.dir={given['set']}"] if "set" in given else None,
        },
        config=HERE / "sglprof.toml",
    )
    _, value, origin = SOURCES[count - 1]
    assert found.output == HERE / value
    assert found.origins["output"] == origin
    assert f"output = {HERE / value}  ({origin})" in found.describe()


def test_without_any_source_the_documented_defaults_hold():
    found = settings()
    assert found.output == HERE / ".sglprof"
    assert (found.keep, found.runs, found.max_gib) == ("failed", 10, 20)
    assert (found.min_steps, found.min_share, found.allow_inconclusive) == (50, 0.01, False)
    assert [limit.describe() for limit in found.thresholds] == ["slowdown of compute <= 1.05"]
    assert found.servers == {"default": ServerSpec()}
    assert "keep = failed  (default)" in found.describe()


def test_the_step_delimiter_and_the_number_of_repeats():
    assert (settings().step_delimiter, settings().repeat) == ("", 1)
    found = settings({"trace": {"step_delimiter": "^embed"}}, cli={"set": ["window.repeat=3"]})
    assert (found.step_delimiter, found.repeat) == ("^embed", 3)


def test_every_option_has_its_names():
    by_name = {option.name: option for option in OPTIONS}
    main, output = by_name["enabled"], by_name["output"]
    assert (main.pytest_flag, main.env, main.dest) == ("--sglprof", "SGLPROF", "sglprof_enabled")
    assert (output.pytest_flag, output.flag) == ("--sglprof-output", "--output")
    assert (output.env, output.dest) == ("SGLPROF_OUTPUT", "sglprof_output")


@pytest.mark.parametrize(("text", "value"), [("1", True), ("on", True), ("no", False)])
def test_a_switch_can_be_set_and_unset_by_the_environment(text, value):
    document = {"gate": {"allow_inconclusive": not value}}
    found = settings(document, env={"SGLPROF_ALLOW_INCONCLUSIVE": text})
    assert found.allow_inconclusive is value


@pytest.mark.parametrize(
    ("env", "said"),
    [
        ({"SGLPROF_ALLOW_INCONCLUSIVE": "maybe"}, "SGLPROF_ALLOW_INCONCLUSIVE is 'maybe'"),
        ({"SGLPROF_REPEAT": "two"}, "expected: a whole number, 1 or more"),
        ({"SGLPROF_MAX_GIB": "0"}, "SGLPROF_MAX_GIB is '0'\n  expected: a number above 0"),
        ({"SGLPROF_LOCK_CLOCKS": "0"}, "SGLPROF_LOCK_CLOCKS is '0'"),
        ({"SGLPROF_MIN_SHARE": "1.5"}, "expected: a share from 0 to 1"),
        ({"SGLPROF_STEP_DELIMITER": "("}, "SGLPROF_STEP_DELIMITER '(' is not a regular expression"),
        ({"SGLPROF_MIN_STEPS": "-1"}, "SGLPROF_MIN_STEPS is '-1'"),
        ({"SGLPROF_KEEP": "some"}, "expected: failed or all or none"),
        ({"SGLPROF_SERVER_DIR": "/a:/b"}, "--sglprof-server-dir is given without --sglprof-server"),
        ({"SGLPROF_NSYS_SESSION": "s"}, "--sglprof-nsys-session is given without"),
        ({"SGLPROF_SERVER": "http://h:1", "SGLPROF_SERVER_DIR": "a"}, "expected: SERVER:LOCAL"),
    ],
)
def test_wrong_values_are_refused_by_name(env, said):
    with pytest.raises(SettingsError) as error:
        settings(env=env)
    assert said in str(error.value)


def test_an_attached_servers_folder_is_a_pair_of_absolute_paths(tmp_path):
    found = settings(env={"SGLPROF_SERVER": "http://h:1", "SGLPROF_SERVER_DIR": f"/a:{tmp_path}"})
    assert found.server_dir == ("/a", str(tmp_path.resolve()))


def test_servers_of_the_file_and_of_the_hook():
    document = {
        "server": {"kind": "auto", "args": ["--tp", "2"], "env": {"A": "b"}, "gpus": [0, 1]},
        "servers": {"moe": {"model_path": "./models/moe", "nsys": True}},
    }
    hooked = ServerSpec(name="hooked")
    found = settings(document, config=HERE / "sglprof.toml", servers={"hooked": hooked})
    assert list(found.servers) == ["default", "moe", "hooked"]
    default, moe = found.servers["default"], found.servers["moe"]
    assert (default.args, default.env, default.gpus) == (("--tp", "2"), (("A", "b"),), (0, 1))
    assert (moe.model_path, moe.key) == ("/project/models/moe", "moe+nsys")
    assert "server moe: kind=sglang nsys=True args=" in found.describe()


def test_categories_and_output_limits_come_from_the_file():
    document = {
        "category": [{"name": "mine", "pattern": "^my_"}],
        "output": {"max_gib": 0.5, "runs": 3},
        "window": {"num_steps": 100},
    }
    found = settings(document, config=HERE / "sglprof.toml")
    assert found.categories == (("mine", "^my_"),)
    assert (found.max_gib, found.runs) == (0.5, 3)
    assert found.origins["max_gib"] == found.origins["categories"] == "sglprof.toml"
    assert "window.num_steps = 100  (config)" in found.describe()


# ---- thresholds ------------------------------------------------------------------------------


def test_configured_thresholds_replace_the_default_one():
    tables = [
        {"scope": "moe", "limit": 1.2},
        {"kernel": "fused", "metric": "lost_share", "limit": 0},
    ]
    limits = thresholds_from({"threshold": tables}, "sglprof.toml")
    assert [limit.describe() for limit in limits] == [
        "slowdown of moe <= 1.2",
        "lost_share of kernel /fused/ <= 0",
    ]
    assert {limit.origin for limit in limits} == {"sglprof.toml"}


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ({"limit": 0}, "threshold[1].limit is 0"),
        ({"limit": 0.9}, "expected: a ratio that is ≥ 1.0"),
        ({"limit": float("nan")}, "threshold[1].limit is nan"),
        ({"metric": "lost_share", "limit": 1.1}, "expected: a share that is ≥ 0.0 and < 1.0"),
        ({"limit": 1.1, "kernel": "("}, "'(' is not a regular expression"),
    ],
)
def test_thresholds_that_can_tell_nothing_are_refused(table, said):
    with pytest.raises(SettingsError) as error:
        thresholds_from({"threshold": [{"limit": 1.1}, table]}, "sglprof.toml")
    assert said in str(error.value)
    assert "sglprof.toml" in str(error.value)


def test_a_markers_threshold_replaces_the_configured_one_of_the_same_scope_only():
    document = {"threshold": [{"scope": "compute", "limit": 1.1}, {"scope": "moe", "limit": 1.3}]}
    keywords = {"slowdown": {"moe": 1.5}, "lost_share": 0.2}
    spec = window_spec(settings(document), keywords, origin="marker")
    assert [(limit.describe(), limit.origin) for limit in spec.thresholds] == [
        ("slowdown of compute <= 1.1", "default"),
        ("slowdown of moe <= 1.5", "marker"),
        ("lost_share of compute <= 0.2", "marker"),
    ]


def test_thresholds_may_be_listed_as_values():
    listed = [Threshold("slowdown", 1.2, scope="moe", stage="decode"), Threshold("lost_share", 0.1)]
    spec = window_spec(settings(), {"slowdown": 1.3, "thresholds": listed}, origin="marker")
    assert [(limit.describe(), limit.origin) for limit in spec.thresholds] == [
        ("slowdown of compute <= 1.3", "marker"),
        ("slowdown of moe in decode <= 1.2", "marker"),
        ("lost_share of compute <= 0.1", "marker"),
    ]


# ---- windows ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keywords", "said"),
    [
        ({"steps": 3, "wide": 1}, "unknown arguments steps, wide"),
        ({"thresholds": 1.2}, "thresholds is 1.2"),
        ({"thresholds": [1.2]}, "thresholds[0] is 1.2"),
        ({"thresholds": [Threshold(scope="meo")]}, "thresholds[0].scope: 'meo' is not a scope"),
        ({"thresholds": [Threshold(limit=0.9)]}, "thresholds[0].limit is 0.9"),
        ({"thresholds": [Threshold("slow")]}, "'slow' is not a metric"),
        ({"backend": "ncu"}, "backend='ncu'"),
        ({"num_steps": "50"}, "num_steps='50'"),
        ({"num_steps": 0}, "num_steps=0"),
        ({"num_steps": True}, "num_steps=True"),
        ({"start_step": -1}, "start_step=-1"),
        ({"duration": 0}, "duration=0"),
        ({"delay": -1}, "delay=-1"),
        ({"settle": float("inf")}, "settle=inf"),
        ({"timeout": "long"}, "timeout='long'"),
        ({"num_steps": 5, "duration": 1.0}, "num_steps=5 with duration=1.0"),
        ({"whole_body": True, "num_steps": 5}, "whole_body=True with num_steps"),
        ({"whole_body": "yes"}, "whole_body='yes'"),
        ({"with_stack": 1}, "with_stack=1"),
        ({"activities": "GPU"}, "activities='GPU'"),
        ({"activities": [1]}, "activities=(1,)"),
        ({"activities": ["GPU"], "slowdown": 1.1}, "activities=['GPU'] with slowdown of compute"),
        ({"profile_stages": "decode"}, "profile_stages='decode'"),
        ({"max_stall": 0}, "max_stall=0"),
        ({"max_mib": "100"}, "max_mib='100'"),
        ({"max_mib": 1, "whole_body": True}, "whole_body=True with max_stall or max_mib"),
        ({"output_dir": 3}, "output_dir=3"),
        ({"profile_by_stage": True}, "profile_by_stage=True without num_steps"),
        ({"name": ""}, "name=''"),
        ({"slowdown": "fast"}, "slowdown is 'fast', not a number"),
        ({"slowdown": {"moe": None}}, "slowdown['moe'] is None"),
    ],
)
def test_windows_that_cannot_be_are_refused_with_their_origin(keywords, said):
    with pytest.raises(SettingsError) as error:
        window_spec(settings(), keywords, origin="profile_window('w')")
    assert str(error.value).startswith("profile_window('w'): ")
    assert said in str(error.value)


def test_what_ends_a_window_replaces_what_was_configured_to():
    configured = settings({"window": {"num_steps": 60, "settle": 0.5, "activities": ["GPU"]}})
    plain = window_spec(configured, {}, origin="m")
    assert (plain.num_steps, plain.settle, plain.activities) == (60, 0.5, ("GPU",))
    timed = window_spec(configured, {"duration": 2.0}, origin="m")
    assert (timed.num_steps, timed.duration) == (None, 2.0)
    whole = window_spec(configured, {"whole_body": True}, origin="m")
    assert (whole.num_steps, whole.settle) == (None, 0.5)
    by_time = settings({"window": {"duration": 2.0, "delay": 1.0}})
    stepped = window_spec(by_time, {"num_steps": 5}, origin="m")
    assert (stepped.num_steps, stepped.duration, stepped.delay) == (5, None, 1.0)
    assert window_spec(by_time, {"whole_body": True}, origin="m").delay == 0.0


# ---- the file --------------------------------------------------------------------------------


def test_a_mistake_in_the_toml_is_told_with_its_line(tmp_path):
    path = tmp_path / "sglprof.toml"
    path.write_text('[server]\nkind = "standin"\nargs = [}\n')
    with pytest.raises(SettingsError, match=r"(?s)sglprof\.toml is not valid TOML.*line \d"):
        load_config(path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(SettingsError, match="UTF-8"):
        load_config(path)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('[server]\nkind = "fast"', "server.kind: 'fast' is not one of"),
        ("[servers.moe]\nargs = [1]", "servers.moe.args[0]: 1 is not of type 'string'"),
        ("[servers.moe]\nmodel = 'x'", "servers.moe: unknown key model (did you mean model_path?)"),
        ('[[threshold]]\nlimit = "low"', "threshold[0].limit: 'low' is not of type 'number'"),
        ("[[threshold]]\nscope = 'moe'", "threshold[0]: 'limit' is a required property"),
        ("[window]\nnum_steps = 0", "window.num_steps: 0 is less than the minimum of 1"),
        ("[gates]\nmin_steps = 1", "top level: unknown key gates (did you mean gate?)"),
    ],
)
def test_schema_violations_name_the_path_in_the_document(tmp_path, text, said):
    path = tmp_path / "sglprof.toml"
    path.write_text(text)
    with pytest.raises(SettingsError) as error:
        load_config(path)
    assert said in str(error.value)
    assert str(path) in str(error.value)


def test_all_violations_are_told_at_once(tmp_path):
    path = tmp_path / "sglprof.toml"
    path.write_text('[server]\nkind = "fast"\nport = 0\n[output]\nkeep = "some"\n')
    with pytest.raises(SettingsError) as error:
        load_config(path)
    assert all(name in str(error.value) for name in ("server.kind", "server.port", "output.keep"))


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(SettingsError, match=r"none\.toml does not exist"):
        load_config(tmp_path / "none.toml")


def test_the_table_of_pyproject_is_read_the_same_way(tmp_path):
    path = tmp_path / "pyproject.toml"
    path.write_text('[project]\nname = "x"\n[tool.sglprof.gate]\nmin_steps = 5\n')
    assert load_config(path) == {"gate": {"min_steps": 5}}


def test_clocks_are_locked_for_every_server_only_when_asked_for(tmp_path):
    assert settings().lock_clocks == 0
    assert settings({"server": {}}).servers["default"].lock_clocks == 0
    path = tmp_path / "sglprof.toml"
    path.write_text("[gpu]\nlock_clocks = 1410\n[servers.other]\nmodel_path = 'm'\n")
    found = settings(load_config(path), config=path, servers={"hook": ServerSpec(name="hook")})
    assert {name: spec.lock_clocks for name, spec in found.servers.items()} == {
        "default": 1410,
        "other": 1410,
        "hook": 1410,
    }
    assert "lock_clocks = 1410  (sglprof.toml)" in found.describe()


@pytest.mark.parametrize("value", ["0", "-1", "1410.5", "'base'", "true", "[1410, 1500]"])
def test_a_clock_that_is_no_frequency(tmp_path, value):
    path = tmp_path / "sglprof.toml"
    path.write_text(f"[gpu]\nlock_clocks = {value}\n")
    with pytest.raises(SettingsError, match=r"gpu\.lock_clocks"):
        load_config(path)
