"""The servers of `sglprof.toml`: `[server]` and `[servers.NAME]`, started or attached to."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pytest_sglprof._config.model import ServerSpec
from pytest_sglprof._errors import SettingsError
from pytest_sglprof._nsys import check_profile_args


def servers_from(document: Mapping[str, Any], base: Path) -> dict[str, ServerSpec]:
    """The servers by name: `[server]` is "default", `[servers.NAME]` is NAME."""
    tables = {"default": document.get("server", {}), **document.get("servers", {})}
    return {name: _server_spec(name, table, base) for name, table in tables.items()}


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
