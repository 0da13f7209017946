"""How a server's arguments are read: spellings, abbreviations, and the file of `--config`."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest

from pytest_sglprof._config.load import servers_from
from pytest_sglprof._config.model import ServerSpec
from pytest_sglprof._errors import ServerMissing, SettingsError
from pytest_sglprof._redact import HIDDEN, redact_text
from pytest_sglprof._server import command
from pytest_sglprof._server.arguments import config_words, has_option, option
from pytest_sglprof._server.keeper.life import ServerLife
from pytest_sglprof._server.keeper.protocol import Plan
from pytest_sglprof._server.launch import server_keys

SGLANG = command.Entry("sglang", sys.executable, "module", "sglang.launch_server")


@pytest.fixture(autouse=True)
def installed(tmp_path, monkeypatch):
    """A SGLang with both commands; tests remove what theirs lacks."""
    for name in ("__init__.py", "launch_server.py", "cli/serve.py"):
        file = tmp_path / "site" / "sglang" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "site"))
    monkeypatch.chdir(tmp_path)
    command._probe.cache_clear()
    yield tmp_path / "site" / "sglang"
    command._probe.cache_clear()


def with_file(text: str, *args: str, **fields: object) -> ServerSpec:
    Path("server.yaml").write_text(text)
    return ServerSpec(args=("--config", "server.yaml", *args), **fields)


def words_of(spec: ServerSpec) -> list[str]:
    return command.server_words(spec, command.find_entry(spec), 30000, 30001)


@pytest.mark.parametrize(
    ("word", "name"),
    [
        ("--dp", "--dp-size"),
        ("--dp=2", "--dp-size"),
        ("--data", "--dp-size"),
        ("--data-parallel-size", "--dp-size"),
        ("--model", "--model-path"),
        ("--model-p", "--model-path"),
        ("--nccl-p=1", "--nccl-port"),
        ("--ssl-keyfile", "--ssl-keyfile"),
        ("--ssl-keyfile-p", "--ssl-keyfile-password"),
        ("--enable-dp-a", "--enable-dp-attention"),
        ("--api", "--api-key"),
    ],
)
def test_a_beginning_that_fits_one_option_is_that_option(word, name):
    assert has_option([word], name)


@pytest.mark.parametrize(
    ("word", "name"),
    [
        ("--ssl-keyfile", "--ssl-keyfile-password"),
        ("--model-impl", "--model-path"),
        ("--dp-attention", "--dp-size"),
        ("dp", "--dp-size"),
        ("--", "--dp-size"),
        ("-d", "--dp-size"),
        ("--host-name", "--host"),
    ],
)
def test_what_is_another_option_or_none(word, name):
    assert not has_option([word, "2"], name)


def test_the_last_value_counts():
    assert option(["--port", "1", "--po=2", "--port"], "--port") == "2"
    assert option(["--port"], "--port") is None


@pytest.mark.parametrize("args", [("--data-parallel", "2"), ("--dp=2",), ("--dp-s", "2")])
def test_replicas_are_seen_however_they_are_asked_for(args):
    assert "--nccl-port" not in words_of(ServerSpec(args=args))
    assert "--nccl-port" in words_of(ServerSpec(args=(*args, "--enable-dp-a")))


def test_an_abbreviated_option_is_not_given_again():
    args = ("--ho=0.0.0.0", "--po", "9", "--nccl-p", "8", "--watch", "60", "--model-p", "x")
    assert words_of(ServerSpec(model_path="m", args=args)) == list(args)


@pytest.mark.usefixtures("secrets_end_here")
def test_an_abbreviated_key_is_hidden_too():
    spec = ServerSpec(args=("--api", "sk-never-shown-1", "--ssl-keyfile-p=sk-never-shown-2"))
    command.learn_secrets(spec, {})
    shown, hidden = command.split_secret_words([*spec.args, "--tp", "2"])
    assert shown == ["--tp", "2"]
    assert hidden == list(spec.args)
    assert server_keys(spec) == ("sk-never-shown-1", "")


# `--config FILE`.


def test_c01_the_sizes_of_the_file_count(shared_data):
    file = shared_data.parent / "cases" / "server" / "C01_server.yaml"
    spec = ServerSpec(model_path="m", args=("--config", str(file)))
    assert words_of(spec) == [
        *("--model-path", "m", "--host", "127.0.0.1", "--port", "30000"),
        *("--watchdog-timeout", "1800", "--config", str(file)),
    ]


FILE = """
# the server of the nightly run
model-path: org/model
host: 0.0.0.0
port: 31000
nccl-port: 31001
data-parallel-size: 4
enable-dp-attention: true
trust-remote-code: false
lora-paths: [a, b]
json-model-override-args: {rope_scaling: {factor: 2.0}}
api-key: sk-of-the-file-4711
"""


def test_what_stands_in_the_file_is_not_given_again():
    spec = with_file(FILE, "--tp", "4", model_path="other")
    assert words_of(spec) == [
        *("--watchdog-timeout", "1800", "--config", "server.yaml", "--tp", "4")
    ]
    merged = command.merged_spec(spec, command.find_entry(spec))
    assert merged.args == (
        *("--model-path", "org/model", "--host", "0.0.0.0", "--port", "31000"),
        *("--nccl-port", "31001", "--data-parallel-size", "4", "--enable-dp-attention"),
        *("--lora-paths", "a", "b"),
        *("--json-model-override-args", '{"rope_scaling": {"factor": 2.0}}'),
        *("--api-key", "sk-of-the-file-4711", "--tp", "4"),
    )
    assert command.user_port(merged) == 31000
    assert not command.has_replicas(merged.args)


def test_the_command_line_wins_over_the_file():
    spec = with_file("dp-size: 2\nport: 1\n", "--dp", "1", "--port=2")
    assert "--nccl-port" in words_of(spec)
    merged = command.merged_spec(spec, command.find_entry(spec))
    assert command.user_port(merged) == 2


def test_the_keeper_leases_what_the_file_says(tmp_path):
    spec = with_file("host: 127.0.0.2\ndevice: cpu\n")
    life = ServerLife(
        Plan(spec, command.find_entry(spec), tmp_path),
        cancelled=lambda: False,
        progress=lambda text: None,
    )
    assert life.host == "127.0.0.2"
    assert life._lease_gpus() is None


@pytest.mark.usefixtures("secrets_end_here")
def test_secrets_of_the_file_are_hidden_and_its_key_is_used(tmp_path):
    spec = with_file(FILE)
    merged = command.merged_spec(spec, command.find_entry(spec))
    assert server_keys(merged) == ("sk-of-the-file-4711", "")
    command.keep_secrets([merged])
    assert redact_text("api_key='sk-of-the-file-4711'") == f"api_key='{HIDDEN}'"


def test_the_stand_in_gets_what_the_file_holds():
    spec = with_file("dp-size: 2\nport: 9\n", "--tp", "2", kind="standin")
    assert words_of(spec) == ["--host", "127.0.0.1", "--dp-size", "2", "--port", "9", "--tp", "2"]


@pytest.mark.parametrize("text", ["", "# nothing yet\n", "---\n"])
def test_an_empty_file_is_none(text):
    assert config_words(sys.executable, with_file(text).args) == ()


@pytest.mark.parametrize(
    ("args", "what"),
    [
        (("--config=server.yaml",), "args have --config=server.yaml"),
        (("--conf", "server.yaml"), "args have --conf"),
        (("-c", "server.yaml"), "args have -c"),
        (("--tp", "2", "--config"), "args have --config"),
        (("--config", "server.yaml", "--config", "server.yaml"), "--config and --config"),
        (("--config", "gone.yaml"), "gone.yaml does not exist"),
        (("--config", "server.json"), "is not named .yaml or .yml"),
        (("--config", "folder.yml"), "is not a file"),
        (("--config", "list.yaml"), "holds a list"),
        (("--config", "word.yaml"), "holds a str"),
        (("--config", "broken.yaml"), "cannot be read(?s:.)*line 2"),
        (("--config", "binary.yaml"), "cannot be read"),
    ],
)
def test_what_sglang_would_refuse_or_ignore_is_refused_before(args, what):
    Path("server.yaml").write_text("dp-size: 2\n")
    Path("server.json").write_text("{}")
    Path("folder.yml").mkdir()
    Path("list.yaml").write_text("- dp-size: 2\n")
    Path("word.yaml").write_text("dp-size:2\n")
    Path("broken.yaml").write_text("a: [1\nb: 2\n")
    Path("binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(SettingsError, match=what) as caught:
        command.find_entry(ServerSpec(kind="auto", args=args))
    assert caught.value.expected
    assert caught.value.hint


def test_an_interpreter_without_pyyaml_is_no_stand_in(installed):
    (installed.parent / "yaml.py").write_text("raise ImportError('not here')\n")
    with pytest.raises(SettingsError, match="has no PyYAML"):
        command.find_entry(replace(with_file("dp-size: 2\n"), kind="auto"))


def test_a_relative_file_begins_in_the_folder_of_the_configuration(tmp_path):
    args = ["--config", "a.yaml", "--tp", "2", "--ssl-certfile=c.pem", "--ssl-keyfile", "/k.pem"]
    (spec,) = servers_from({"server": {"args": args}}, tmp_path).values()
    assert spec.args == (
        *("--config", f"{tmp_path}/a.yaml", "--tp", "2"),
        *(f"--ssl-certfile={tmp_path}/c.pem", "--ssl-keyfile", "/k.pem"),
    )


# Which command starts it.


@pytest.mark.parametrize(
    ("text", "args", "model", "mode"),
    [
        ("dp-size: 2\n", (), "m", "serve"),
        ("dp-size: 2\n", ("--model-path=m",), "", "serve"),
        ("model-path: m\n", (), "", "module"),
        ("model: m\n", (), "other", "module"),
        ("model-path: m\n", ("--model", "n"), "", "serve"),
        ("dp-size: 2\n", ("--model-p", "m"), "", "module"),
    ],
)
def test_a_model_that_serve_does_not_see_is_launched_by_module(text, args, model, mode):
    spec = with_file(text, *args, model_path=model)
    assert command.find_entry(spec).mode == mode


def test_what_serve_alone_cannot_start_is_refused(installed):
    with pytest.raises(SettingsError, match="refuses a model") as caught:
        command.find_entry(with_file("model-path: m\n", entry="serve"))
    assert "launch_server" in caught.value.hint
    (installed / "launch_server.py").unlink()
    command._probe.cache_clear()
    with pytest.raises(SettingsError, match="refuses a model"):
        command.find_entry(with_file("model-path: m\n"))


@pytest.mark.parametrize(("entry", "mode"), [("serve", "serve"), ("launch_server", "module")])
def test_the_command_can_be_chosen(entry, mode):
    assert command.find_entry(ServerSpec(entry=entry)).mode == mode


@pytest.mark.parametrize(
    ("entry", "file"), [("serve", "cli/serve.py"), ("launch_server", "launch_server.py")]
)
def test_a_command_that_the_interpreter_lacks_is_an_error(installed, entry, file):
    (installed / file).unlink()
    with pytest.raises(ServerMissing, match=f"has no {entry}") as caught:
        command.find_entry(ServerSpec(entry=entry))
    assert "leave entry out" in caught.value.hint


def test_the_entry_is_checked_in_the_configuration(tmp_path):
    from pytest_sglprof._config.load import load_config

    file = tmp_path / "sglprof.toml"
    file.write_text('[server]\nentry = "server"\n')
    with pytest.raises(SettingsError, match=r"line 2.*server\.entry.*did you mean"):
        load_config(file)
    file.write_text('[server]\nentry = "serve"\n')
    assert servers_from(load_config(file), tmp_path)["default"].entry == "serve"
