"""Each row of the option table is one setting, whichever way it is given."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest

from pytest_sglprof._cli import options as shared
from pytest_sglprof._config.load import (
    SCHEMA,
    Settings,
    build_settings,
    load_config,
    read_settings,
    resolve_options,
)
from pytest_sglprof._config.options import OPTIONS

VALUES = {
    "count": "7", "positive": "7", "repeat": "7", "size": "0.5", "share": "0.25", "regex": "^embed",
    "flag": "true", "confirm": "1",
}  # fmt: skip
NOT_SCALAR = ("server", "servers", "deployments", "window", "threshold", "category")
TEXTS = {"keep": "all", "accept": "new", "server_dir": "/a:/b", "server": "http://h:1"}
WITH_KEY = [option for option in OPTIONS if option.key]
PER_INVOCATION = {
    "enabled", "config", "set", "output", "server", "server_dir", "server_ca", "nsys_session",
    "python", "nsys", "allow_inconclusive",
    "show_config", "baselines", "accept", "require_baseline",
}  # fmt: skip


def value_of(option) -> str:
    return VALUES.get(option.kind) or TEXTS.get(option.name, "some")


def attribute(settings: Settings, option) -> object:
    found = getattr(settings, option.name)
    return str(found[0]) if isinstance(found, tuple) else found


def read(tmp_path: Path, *, flags=None, env=None, of_pytest: bool = True) -> Settings:
    return read_settings(
        flags or {},
        env or {},
        start=[tmp_path],
        rootdir=tmp_path,
        invocation_dir=tmp_path,
        of_pytest=of_pytest,
    )


@pytest.mark.parametrize("option", WITH_KEY, ids=lambda option: option.name)
def test_flag_environment_assignment_and_file_give_the_same(tmp_path, option):
    text = value_of(option)
    settings = [
        read(tmp_path, flags={option.name: text}),
        read(tmp_path, env={option.env: text}),
        read(tmp_path, flags={"set": [f"{option.key}={text}"]}),
    ]
    table, _, key = option.key.partition(".")
    value = json.dumps(text) if option.kind in ("text", "regex") else text
    (tmp_path / "sglprof.toml").write_text(f"[{table}]\n{key} = {value}\n")
    settings.append(read(tmp_path))
    first, *others = [attribute(each, option) for each in settings]
    assert others == [first] * 3
    assert first != attribute(Settings(Path("x")), option)
    assert [each.origins[option.name] for each in settings] == [
        option.pytest_flag, option.env, f"--sglprof-set {option.key}", "sglprof.toml",
    ]  # fmt: skip


@pytest.mark.parametrize("option", WITH_KEY, ids=lambda option: option.name)
def test_every_key_stands_in_the_schema_and_in_the_docs(option, project_root):
    schema = json.loads(SCHEMA.read_text())
    table, _, key = option.key.partition(".")
    part = schema["properties"][table]
    part = schema["$defs"][table] if "$ref" in part else part
    assert key in part["properties"]
    text = (project_root / "docs/configuration.md").read_text()
    assert f"`{option.key}`" in text


def test_every_scalar_key_of_the_schema_is_a_row():
    tables = json.loads(SCHEMA.read_text())["properties"]
    keys = {
        f"{table}.{key}"
        for table, rule in tables.items()
        if table not in NOT_SCALAR
        for key in rule["properties"]
    }
    assert keys == {option.key for option in WITH_KEY} - {"window.repeat"}


def test_a_server_keeps_its_own_interpreter_unless_the_invocation_names_one(tmp_path):
    text = "[tools]\npython = 'all'\n[server]\npython = 'one'\n[servers.moe]\n"
    (tmp_path / "sglprof.toml").write_text(text)
    given = [{}, {"flags": {"set": ["tools.python=x"]}}, {"env": {"SGLPROF_PYTHON": "x"}}]
    pythons = [[s.python for s in read(tmp_path, **each).servers.values()] for each in given]
    assert pythons == [["one", "all"], ["x", "x"], ["x", "x"]]


def test_the_tools_of_this_machine_serve_a_run_that_was_stored_elsewhere(tmp_path):
    (tmp_path / "sglprof.toml").write_text("[tools]\nnsys = 'here'\n[gate]\nmin_steps = 4\n")
    settings = read_settings(
        {},
        {},
        start=[tmp_path],
        rootdir=tmp_path,
        invocation_dir=tmp_path,
        of_pytest=False,
        stored=(tmp_path / "run.json", {"gate": {"min_share": 0.5}}),
    )
    assert (settings.nsys, settings.min_steps, settings.min_share) == ("here", 50, 0.5)
    assert "tools" not in settings.stored


@pytest.mark.parametrize("option", OPTIONS, ids=lambda option: option.name)
def test_flags_are_those_of_the_table(option, pytestconfig, project_root):
    assert option.pytest == (option.name in PER_INVOCATION)
    assert hasattr(pytestconfig.option, option.dest) == option.pytest
    text = (project_root / "docs/configuration.md").read_text()
    assert f"`{option.env}`" in text
    if option.pytest:
        assert f"`{option.pytest_flag}" in text
    if option.command:
        parser = argparse.ArgumentParser()
        shared.add_rows(parser, option.name)
        args = parser.parse_args([option.flag, value_of(option)])
        expected = [value_of(option)] if option.kind == "list" else value_of(option)
        assert getattr(args, option.name) == expected


def test_an_assignment_beats_the_environment_and_a_flag_beats_both(tmp_path):
    env = {"SGLPROF_MIN_STEPS": "5"}
    assigned = {"set": ["gate.min_steps=6"]}
    assert read(tmp_path, env=env).min_steps == 5
    assert read(tmp_path, env=env, flags=assigned).min_steps == 6
    flags = {**assigned, "min_steps": "7"}
    found = read(tmp_path, env=env, flags=flags, of_pytest=False)
    assert (found.min_steps, found.origins["min_steps"]) == (7, "--min-steps")


def test_an_assignment_takes_toml_and_plain_text(tmp_path):
    given = ["threshold=[{scope='moe', limit=1.3}]", "trace.step_delimiter=^a b$"]
    found = read(tmp_path, flags={"set": [*given, "servers.moe.model_path=./m"]})
    assert [each.describe() for each in found.thresholds] == ["slowdown of moe <= 1.3"]
    assert found.step_delimiter == "^a b$"
    assert found.servers["moe"].model_path.endswith("/m")


def test_what_a_run_stores_reads_back_as_the_same(tmp_path):
    (tmp_path / "sglprof.toml").write_text(
        "[gate]\nmin_steps = 4\n[trace]\nstep_delimiter = 'x'\n[[threshold]]\nlimit = 1.2\n"
        "[[category]]\nname = 'mine'\npattern = 'my'\n[server]\nenv = { TOKEN = 's' }\n"
    )
    first = read(tmp_path, flags={"set": ["gate.min_share=0.5"]})
    assert "s" not in first.stored.get("server", {})
    stored = json.loads(json.dumps(first.stored))
    values, origins = resolve_options({}, {})
    again = build_settings(values, origins, stored, config_file=None, invocation_dir=tmp_path)
    names = ("min_steps", "min_share", "step_delimiter", "categories")
    assert [getattr(again, n) for n in names] == [getattr(first, n) for n in names]
    assert [t.describe() for t in again.thresholds] == ["slowdown of compute <= 1.2"]


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("[gate]\n\n  minsteps = 1\n", (3, 3)),
        ("[gate]\nmin_steps = -1\n", (2, 1)),
        ("gate.min_steps = -1\n", (1, 1)),
        ("[[threshold]]\nlimit = 1.1\n[[threshold]]\nscope = 'a'\nlimit = 'x'\n", (5, 1)),
        ("[[threshold]]\nlimit = 1.1\n\n[[threshold]]\nscope = 'a'\n", (4, 1)),
        ("[server]\nargs = [\n  'a', # ]\n  3,\n]\n", (2, 1)),
        ("[server]\nmodel_path = '''\n[gate]\nx'''\n[gate]\nnothing = 1\n", (6, 1)),
        ("[servers.'a-b']\nport = 0\n", (2, 1)),
        ("# first\n[gates]\nmin_steps = 1\n", (2, 1)),
        ("[server]\nenv = { A = 1 }\n", (2, 1)),
    ],
)
def test_a_mistake_is_named_with_line_and_column(tmp_path, text, place):
    for name, file_text, below in (
        ("sglprof.toml", text, 0),
        ("pyproject.toml", f"[tool.other]\nx = 1\n[tool.sglprof]\n{text}", 3),
    ):
        if below:  # the same tables, below tool.sglprof
            file_text = file_text.replace("\n[[", "\n[[tool.sglprof.")
            for table in ("gate", "gates", "server", "servers"):
                file_text = file_text.replace(f"\n[{table}", f"\n[tool.sglprof.{table}", 1)
        if below and "'''" in text:
            continue
        path = tmp_path / name
        path.write_text(file_text)
        with pytest.raises(Exception, match=f"line {place[0] + below}, column {place[1]}: "):
            load_config(path)
