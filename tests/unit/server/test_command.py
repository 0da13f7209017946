"""Which command is started, with which words and which environment."""

from __future__ import annotations

import inspect
import json
import pickle
import sys
from pathlib import Path
from typing import get_args

import pytest

from pytest_sglprof import _errors as errors
from pytest_sglprof._config.load import SCHEMA
from pytest_sglprof._config.model import LauncherName, ServerSpec
from pytest_sglprof._errors import (
    LeaseError,
    ServerError,
    ServerMissing,
    SettingsError,
    SglprofError,
)
from pytest_sglprof._server import command, lease
from pytest_sglprof._server.client import is_local_url, server_name
from pytest_sglprof._server.command import LAUNCHERS, Entry
from pytest_sglprof._server.keeper.protocol import (
    Failed,
    Launch,
    Plan,
    decode_event,
    decode_order,
    encode,
    error_from,
    error_message,
)
from pytest_sglprof._server.launch import checked_url, server_keys

SGLANG = Entry("sglang", "/env/bin/python", "module", "sglang.launch_server")
STANDIN = Entry("standin", "/usr/bin/python", "module", "pytest_sglprof.standin")


@pytest.fixture(autouse=True)
def no_memory():
    command._probe.cache_clear()
    yield
    command._probe.cache_clear()


def installed(folder: Path, monkeypatch, *files: str) -> None:
    for name in files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("raise ImportError('a probe must not import this')\n")
    monkeypatch.setenv("PYTHONPATH", str(folder))


def test_the_newer_command_is_taken_where_there_is_one(tmp_path, monkeypatch):
    files = ("sglang/__init__.py", "sglang/launch_server.py", "sglang/cli/serve.py")
    installed(tmp_path, monkeypatch, *files)
    assert command.find_entry(ServerSpec()) == Entry("sglang", sys.executable, "serve")


def test_an_older_one_starts_by_its_module(tmp_path, monkeypatch):
    installed(tmp_path, monkeypatch, "sglang/__init__.py", "sglang/launch_server.py")
    entry = command.find_entry(ServerSpec(kind="auto", python=sys.executable))
    assert entry == Entry("sglang", sys.executable, "module", "sglang.launch_server")


def test_without_sglang(tmp_path, monkeypatch):
    monkeypatch.delenv("PYTHONPATH", raising=False)
    (tmp_path / "sglang").mkdir()  # a folder of that name is no installation
    (tmp_path / "sglang" / "launch_server.py").touch()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ServerMissing, match="SGLang is not installed for") as caught:
        command.find_entry(ServerSpec())
    assert "--sglprof-python" in caught.value.hint
    assert command.find_entry(ServerSpec(kind="auto")).kind == "standin"
    assert command.find_entry(ServerSpec(kind="standin")).module == "pytest_sglprof.standin"


def test_fault_4_a_bare_name_of_an_interpreter_becomes_its_path(tmp_path, monkeypatch):
    installed(tmp_path / "site", monkeypatch, "sglang/__init__.py", "sglang/launch_server.py")
    tools, here = tmp_path / "tools", tmp_path / "here"
    tools.mkdir()
    (tools / "mypython").symlink_to(sys.executable)
    (here / "mypython").mkdir(parents=True)
    (here / "python3").mkdir()
    monkeypatch.chdir(here)
    monkeypatch.setenv("PATH", f":{tools}:/usr/bin:/bin")
    for name in ("mypython", "../tools/mypython"):
        assert command.find_entry(ServerSpec(python=name)).python == str(tools / "mypython")
    with pytest.raises(ServerMissing, match="no-python is not a working Python interpreter"):
        command.find_entry(ServerSpec(python="no-python"))


@pytest.mark.parametrize("python", ["/no/such/python", "/bin/false"])
def test_an_interpreter_that_is_none(python):
    with pytest.raises(ServerMissing, match="is not a working Python interpreter"):
        command.find_entry(ServerSpec(python=python))


def test_an_interpreter_is_looked_at_once_whether_it_has_sglang_or_not(tmp_path, monkeypatch):
    looks = tmp_path / "looks"
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\necho look >> {looks}\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    monkeypatch.delenv("PYTHONPATH", raising=False)
    for _ in range(3):
        assert command.find_entry(ServerSpec(kind="auto", python=str(python))).kind == "standin"
        with pytest.raises(ServerMissing, match="no load driver of SGLang"):
            command.load_driver(str(python))
    assert looks.read_text() == "look\n"


def test_every_launcher_can_be_configured_and_no_other_kind():
    assert set(LAUNCHERS) == set(get_args(LauncherName))
    schema = json.loads(SCHEMA.read_text())
    kinds = schema["$defs"]["server"]["properties"]["kind"]["enum"]
    # A router is started for the servers of a deployment, never by its kind.
    assert sorted([*kinds, "router"]) == sorted([*LAUNCHERS, "auto"])
    assert "deployments" in schema["properties"]


@pytest.mark.parametrize(
    ("info", "kind"),
    [({}, "sglang"), ({"version": "0.5.9"}, "sglang"), ({"version": "0.5.9+standin"}, "standin"),
     ({"standin": "0.1"}, "standin")],
)  # fmt: skip
def test_an_attached_server_is_known_by_its_info(info, kind):
    assert command.kind_from_info(info) == kind


def test_sglangs_words():
    words = command.server_words(
        ServerSpec(model_path="m", args=("--tp", "2")), SGLANG, 30000, 30001
    )
    assert words == [
        "--model-path",
        "m",
        "--host",
        "127.0.0.1",
        "--port",
        "30000",
        "--nccl-port",
        "30001",
        "--watchdog-timeout",
        "1800",
        "--tp",
        "2",
    ]
    assert command.shown_command(SGLANG, ["--x"]) == [
        "/env/bin/python",
        "-m",
        "sglang.launch_server",
        "--x",
    ]
    serve = Entry("sglang", "/env/bin/python", "serve")
    assert command.shown_command(serve, ["--x"]) == ["/env/bin/sglang", "serve", "--x"]
    assert command.exec_command(serve, Path("/f"), ["--x"])[2:] == [
        str(command.EXEC_STEP),
        "/f",
        "serve",
        "--x",
    ]


@pytest.mark.parametrize(
    ("args", "given"),
    [
        (("--dp-size", "2"), False),
        (("--dp=2", "--tp", "2"), False),
        (("--dp", "1"), True),
        (("--dp", "2", "--enable-dp-attention"), True),
    ],
)
def test_replicas_find_their_own_ports(args, given):
    words = command.server_words(ServerSpec(args=args), SGLANG, 30000, 30001)
    assert ("--nccl-port" in words) is given


def test_what_the_user_gives_is_not_given_again():
    args = (
        "--host=0.0.0.0",
        "--watchdog-timeout",
        "60",
        "--nccl-port=1",
        "--port",
        "9",
        "--model",
        "x",
    )
    spec = ServerSpec(model_path="m", args=args)
    assert command.server_words(spec, SGLANG, 9, None) == list(args)
    assert command.user_port(spec) == 9
    assert command.user_port(ServerSpec(port=8)) == 8
    with pytest.raises(SettingsError, match="not a number"):
        command.user_port(ServerSpec(args=("--port", "x")))


def test_the_stand_ins_words_have_its_own_options_last():
    spec = ServerSpec(model_path="m", args=("--tp", "2"), standin_args=("--slow", "rank=1"))
    words = command.server_words(spec, STANDIN, 30000, 30001)
    assert words == ["--host", "127.0.0.1", "--port", "30000", "--tp", "2", "--slow", "rank=1"]


def test_secret_words_go_apart():
    words = ["--tp", "2", "--api-key", "K", "--admin-api-key=A", "--tokenizer-path", "t"]
    assert command.split_secret_words(words) == (
        ["--tp", "2", "--tokenizer-path", "t"],
        ["--api-key", "K", "--admin-api-key=A"],
    )
    spec = ServerSpec(args=("--api-key", "K"))
    assert command.key_words(spec, "K", "A") == ["--admin-api-key", "A"]
    assert command.key_words(ServerSpec(), "K", "") == ["--api-key", "K"]


def test_the_environment_is_parted_by_secrecy(monkeypatch):
    base = {
        "HF_TOKEN": "h",
        "MY_CONFIG": "c",
        "THE_KEY": "k",
        "SGLANG_LOG_MS": "0",
        "PATH": "/bin",
        "TMPDIR": "/tmp",
    }
    spec = ServerSpec(
        secrets=("MY_CONFIG",),
        api_key_env="THE_KEY",
        nsys=True,
        env=(("A", "1"), ("B_SECRET", "2")),
    )
    shown, private = command.server_environment(spec, SGLANG, base, Path("/t"))
    assert private == {"HF_TOKEN": "h", "MY_CONFIG": "c", "B_SECRET": "2"}
    assert shown == {
        "PATH": "/bin",
        "TMPDIR": "/t",
        "A": "1",
        "PYTHONUNBUFFERED": "1",
        "SGLANG_LOG_MS": "0",
        "SGLANG_LOG_FORWARD_ITERS": "1",
        "SGLANG_EXPERT_DISTRIBUTION_RECORDER_DIR": "/t/experts",
        "SGLANG_ENABLE_NVTX_SCHEDULER": "1",
    }
    plain, _ = command.server_environment(ServerSpec(), STANDIN, {"PYTHONPATH": "x"}, Path("/t"))
    assert "SGLANG_ENABLE_NVTX_SCHEDULER" not in plain
    assert plain["PYTHONPATH"] == f"{command.PACKAGE_ROOT}:x"


def test_keys_come_from_the_environment_or_the_arguments(monkeypatch):
    monkeypatch.setenv("K", "one")
    assert server_keys(ServerSpec(api_key_env="K")) == ("one", "")
    assert server_keys(ServerSpec(args=("--admin-api-key=two",))) == ("", "two")


def test_a_plan_survives_its_way():
    spec = ServerSpec(args=("a",), env=(("A", "1"),), gpus=(0, 1), port=3)
    plan = Plan(spec, SGLANG, Path("/f"), nsys="/n", api_key="K", parent=7, private={"T": "x"})
    assert decode_order(encode(Launch(plan))) == Launch(plan)
    no_text = b"latin-\xe9-4711".decode("utf-8", "surrogateescape")
    odd = Plan(ServerSpec(env=(("E", no_text),)), SGLANG, Path(no_text), private={"T": no_text})
    assert decode_order(encode(Launch(odd))) == Launch(odd)


def test_an_error_survives_its_way():
    error = LeaseError("taken", expected="free", hint="wait", log=("a", "b"))
    back = error_from(error_message(error))
    assert type(back) is LeaseError
    assert str(back) == str(error)
    unknown = error_from(Failed("annotations", {"what": "odd"}))
    assert type(unknown) is ServerError
    assert isinstance(unknown, SglprofError)


def every_error(kind: type[SglprofError] = SglprofError) -> list[type[SglprofError]]:
    """The whole tree of errors.py; what pytest's own side adds to it never travels."""
    homes = (errors.__name__, "pytest_sglprof")
    below = [each for each in kind.__subclasses__() if each.__module__ in homes]
    return [kind, *(each for one in below for each in every_error(one))]


def made(kind: type[SglprofError]) -> SglprofError:
    """One with a value in every field that its class has."""
    values = {"expected": "é", "hint": "wait", "log": ("a", "b"), "status": 503}
    names = inspect.signature(kind).parameters
    return kind("what\nhappened", **{name: values[name] for name in names if name != "what"})


@pytest.mark.parametrize("kind", every_error())
def test_fault_6_every_error_survives_its_way_with_all_of_its_fields(kind):
    error = made(kind)
    ways = (
        error_from(decode_event(encode(error_message(error)))),
        pickle.loads(pickle.dumps(error)),
    )
    for back in ways:
        assert type(back) is kind
        assert vars(back) == vars(error)
        assert (str(back), back.args) == (str(error), error.args)
        assert back.exit_status == error.exit_status


@pytest.mark.parametrize("name", ["Sequence", "SettingsErrors", "ValueError", ""])
def test_fault_6_an_error_of_no_known_class_keeps_all_of_its_text(name):
    error = LeaseError("taken", expected="free", hint="wait", log=("a", "b"))
    back = error_from(Failed(name, error_message(error).fields))
    assert type(back) is ServerError
    assert str(back) == str(error)
    assert error_from(Failed(name, {})).what


@pytest.mark.parametrize(
    ("text", "url"),
    [
        ("http://localhost:30000/", "http://127.0.0.1:30000"),
        ("node7:8000", "http://node7:8000"),
        ("https://gpu.example", "https://gpu.example"),
        ("http://[::1]:30000", "http://[::1]:30000"),
    ],
)
def test_addresses(text, url):
    assert checked_url(text) == url


@pytest.mark.parametrize(
    "text", ["", "http://", "ftp://a:1", "http://a:x", "http://a:1/v1", "http://u:p@a:1"]
)
def test_no_addresses(text):
    with pytest.raises(SettingsError, match="is not the address of a server"):
        checked_url(text)


@pytest.mark.parametrize(
    ("text", "url"),
    [
        ("http://my-localhost.example:30000", "http://my-localhost.example:30000"),
        ("http://localhost.example", "http://localhost.example"),
        ("notlocalhost:1", "http://notlocalhost:1"),
        ("http://a.localhost:1", "http://a.localhost:1"),
        ("LOCALHOST:30000", "http://127.0.0.1:30000"),
        ("Http://Node7.Example.:8000/", "http://node7.example:8000"),
        ("HTTPS://Gpu.Example:443", "https://gpu.example"),
        ("http://gpu.example:80", "http://gpu.example"),
        ("http://gpu.example:443", "http://gpu.example:443"),
        ("https://localhost", "https://127.0.0.1"),
        ("http://0.0.0.0:30000", "http://127.0.0.1:30000"),
        ("http://[0:0:0:0:0:0:0:1]:30000", "http://[::1]:30000"),
        ("http://[::ffff:127.0.0.1]:30000", "http://127.0.0.1:30000"),
        ("http://[FE80::A]:30000", "http://[fe80::a]:30000"),
        (" localhost.:030000 ", "http://127.0.0.1:30000"),
    ],
)
def test_fault_5_only_the_host_is_unified(text, url):
    assert checked_url(text) == url
    assert checked_url(url) == url


@pytest.mark.parametrize("text", ["http://:pw@a:1", "http://a:0", "http://a:1#x", "http://.:1"])
def test_fault_5_what_would_be_lost_on_the_way_is_refused(text):
    with pytest.raises(SettingsError, match="is not the address of a server"):
        checked_url(text)


HERE = ["localhost", "LocalHost", "127.0.0.1", "0.0.0.0", "[::1]", "[::]", "localhost."]


def test_fault_5_one_server_has_one_window_lock_whatever_it_is_called():
    assert {server_name(f"http://{host}:30000") for host in HERE} == {"127.0.0.1:30000"}
    assert {server_name(f"HTTP://{host}/") for host in HERE} == {"127.0.0.1:80"}
    assert all(is_local_url(checked_url(f"{host}:30000")) for host in HERE)
    others = [f"http://{host}:30000" for host in ("my-localhost", "127.0.0.2.example", "gpu7")]
    assert not any(is_local_url(url) for url in others)
    assert server_name("https://GPU7") == server_name("https://gpu7.:443") == "gpu7:443"
    with lease.window_lock("http://localhost:30000"):
        with pytest.raises(LeaseError, match="profile window"):
            lease.window_lock("http://[::1]:30000").__enter__()
        with lease.window_lock("http://my-localhost:30000"):
            pass


def test_where_a_listening_host_is_reached():
    assert command.local_url("0.0.0.0", 1) == "http://127.0.0.1:1"
    assert command.local_url("::1", 1) == "http://[::1]:1"
