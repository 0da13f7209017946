"""The servers of `sglprof.toml`: `[server]`, `[servers.NAME]` and `[deployments.NAME]`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pytest_sglprof._config.model import ROLES, SERVER_KINDS, Member, ServerSpec
from pytest_sglprof._config.windows import check_name
from pytest_sglprof._errors import SettingsError, did_you_mean
from pytest_sglprof._nsys import check_profile_args


def servers_from(document: Mapping[str, Any], base: Path) -> dict[str, ServerSpec]:
    """The servers by name: `[server]` is "default", `[servers.NAME]` is NAME.

    A deployment, `[deployments.NAME]`, is its router, which has members.
    """
    tables = {"default": document.get("server", {}), **document.get("servers", {})}
    deployments = document.get("deployments", {})
    if twice := [name for name in deployments if name in tables]:
        raise SettingsError(
            f"{twice[0]} is a server and a deployment",
            expected="one of the two: the marker sglang_server takes the names of both",
            hint=f"rename [deployments.{twice[0]}]",
        )
    servers = {name: _server_spec(name, table, base) for name, table in tables.items()}
    return servers | {name: _router(name, table) for name, table in deployments.items()}


def _router(name: str, table: Mapping[str, Any]) -> ServerSpec:
    members = [(role, server) for role in ROLES for server in table[role]]
    args, python = tuple(table.get("router", ())), table.get("router_python", "")
    return ServerSpec(name=name, kind="router", args=args, python=python, members=tuple(members))


def members_of(router: ServerSpec, servers: Mapping[str, ServerSpec]) -> tuple[Member, ...]:
    """The servers of a deployment, in the order in which they start.

    Each has its role, and a name of its own. The GPUs of a server that is named several times
    are shared out, in order. Raises `SettingsError` for what cannot be started together.
    """
    times, seen = Counter(name for _, name in router.members), Counter[str]()
    per_role, numbers = Counter(role for role, _ in router.members), Counter[str]()
    members = []
    for role, name in router.members:
        spec = _checked(router, servers, name, times[name])
        gpus = spec.gpus
        if gpus != "all":
            share = len(gpus) // times[name]
            gpus = gpus[seen[name] * share :][:share]
        seen[name] += 1
        numbers[role] += 1
        label = role if per_role[role] == 1 else f"{role}-{numbers[role]}"
        args = (*spec.args, *_unless(spec.args, "--disaggregation-mode", role))
        key, nsys = f"{router.name}.{label}", spec.nsys or router.nsys
        spec = replace(spec, name=key, args=args, gpus=gpus, nsys=nsys)
        members.append(Member(role, label, spec))
    return tuple(members)


def _checked(
    router: ServerSpec, servers: Mapping[str, ServerSpec], name: str, times: int
) -> ServerSpec:
    where = f"deployment {router.name}: server {name}"
    if name not in servers or servers[name].members or servers[name].url:
        raise SettingsError(
            f"{where} is none that could be started",
            expected="the name of a [servers.NAME] without url",
            hint=did_you_mean([name], servers, f"add [servers.{name}]"),
        )
    spec = servers[name]
    if times > 1 and (spec.port or any(word.partition("=")[0] == "--port" for word in spec.args)):
        raise SettingsError(
            f"{where} is started {times} times and has a port",
            expected="no port: each gets a free one",
            hint="leave it out, or name several servers",
        )
    if spec.gpus != "all" and len(spec.gpus) % times:
        raise SettingsError(
            f"{where} is started {times} times and has {len(spec.gpus)} GPUs",
            expected="GPUs that can be shared out evenly",
            hint="correct gpus, or name several servers",
        )
    return spec


def _unless(args: Sequence[str], option: str, value: str) -> Sequence[str]:
    """An option with its value; () where `args` have it."""
    is_given = any(word.partition("=")[0] == option for word in args)
    return () if is_given else (option, value)


def check_servers(servers: Mapping[str, ServerSpec]) -> None:
    """Raises `SettingsError` for a kind that does not exist, or members that cannot be started."""
    for name, spec in servers.items():
        if spec.members:
            members_of(spec, servers)
        else:
            check_name(spec.kind, SERVER_KINDS, f"server {name}: kind={spec.kind!r}")


def server_dir_pair(text: str) -> tuple[str, str]:
    """`SERVER:LOCAL`, or one path for both, as two absolute paths; else raises `SettingsError`."""
    server, colon, local = text.partition(":")
    if not server.startswith("/") or (colon and not local):
        raise SettingsError(
            f"the folder of the running server is {text!r}",
            expected="SERVER:LOCAL, its absolute path on the server's machine and its path here",
            hint="where both machines have it under the same path, give that alone: /data/prof",
        )
    return server, str(Path(local or server).resolve())


def _server_spec(name: str, table: Mapping[str, Any], base: Path) -> ServerSpec:
    values: Any = {key: tuple(v) if isinstance(v, list) else v for key, v in table.items()}
    _refuse_both(name, table)
    if "node_command" in table:
        values["launcher"] = _command_launcher(name, table)
    values["args"] = tuple(_with_absolute_files(values.get("args", ()), base))
    values["env"] = tuple(values.get("env", {}).items())
    check_profile_args(values.get("nsys_args", ()), f"server {name}: nsys_args")
    if values.get("model_path", "").startswith(("./", "../")):
        values["model_path"] = str((base / values["model_path"]).resolve())
    if "server_dir" in values:
        values["server_dir"] = server_dir_pair(values["server_dir"])
    if "server_ca" in values:
        values["server_ca"] = str(base / values["server_ca"])
    return ServerSpec(name=name, **values)


def _command_launcher(name: str, table: Mapping[str, Any]) -> str:
    """The launcher of a server with a `node_command`, which is checked."""
    words = table["node_command"]
    if table.get("launcher", "command") != "command":
        raise SettingsError(
            f"server {name}: node_command beside launcher = {table['launcher']!r}",
            expected='launcher = "command", which node_command belongs to',
            hint="leave one of the two out",
        )
    if not any(word == "{command}" or "{quoted}" in word for word in words):
        raise SettingsError(
            f"server {name}: node_command {' '.join(words)!r} holds no {{command}}",
            expected='["ssh", "{node}", "{quoted}"], or ["kubectl", "exec", "-i", "sglang-{rank}", '
            '"--", "{command}"]',
            hint="{command} stands for several words, {quoted} for the same as one word of a shell",
        )
    return "command"


# Keys of a server that somebody else runs, and those that both kinds have.
OF_RUNNING = ("server_dir", "server_ca", "nsys_session")
OF_BOTH = ("url", "python", "api_key_env", "admin_api_key_env", *OF_RUNNING)


def _refuse_both(name: str, table: Mapping[str, Any]) -> None:
    """Raises `SettingsError` for a server that is both attached to and started."""
    if "url" in table:
        wrong = [key for key in table if key not in OF_BOTH]
        what, expected = "beside url", "a server that is running, which is only attached to"
    else:
        wrong = [key for key in table if key in OF_RUNNING]
        what, expected = "without url", "url: they describe a running server"
    if wrong:
        raise SettingsError(
            f"server {name}: {' and '.join(wrong)} {what}",
            expected=expected,
            hint="leave one of the two out",
        )


_FILE_OPTIONS = ("--config", "--ssl-keyfile", "--ssl-certfile", "--ssl-ca-certs")


def _with_absolute_files(args: Sequence[str], base: Path) -> Iterator[str]:
    """`args`, in which the files of some options are relative to `base`, as `model_path` is."""
    for before, word in zip(["", *args], args, strict=False):
        name, equals, file = word.rpartition("=")
        yield f"{name}{equals}{base / file}" if (name or before) in _FILE_OPTIONS else word
