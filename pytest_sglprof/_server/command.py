"""`LAUNCHERS`: the ways to start a server, a row each; and the command that a row leads to."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pytest_sglprof import _process as process
from pytest_sglprof._config.model import LauncherName, ServerSpec
from pytest_sglprof._errors import ServerMissing, SettingsError
from pytest_sglprof._redact import (
    is_secret_variable,
    learn,
    learn_command,
    learn_environment,
    redact_command,
)
from pytest_sglprof._server.arguments import (
    SECRET_OPTIONS,
    config_words,
    has_option,
    option,
    without_config,
)
from pytest_sglprof._server.client import url_to

WATCHDOG = "1800"  # s; an export of a profile that outlasts it would kill the server
HOST = "127.0.0.1"
EXEC_STEP = Path(__file__).parent / "keeper" / "exec_step.py"
PACKAGE_ROOT = Path(__file__).parents[2]
PROBE_LIMIT = 120.0  # s; interpreters in containers and on network disks start slowly

# It only looks for files, since importing sglang would import torch.
_PROBE = """
import importlib.metadata, importlib.util, json, os, re, sys
if sys.path[0] == "":  # a folder called sglang beside us is not an installation
    del sys.path[0]
spec = importlib.util.find_spec("sglang")
places = list(spec.submodule_search_locations or []) if spec else []
has = lambda name: any(os.path.isfile(os.path.join(p, *name.split(".")) + ".py") for p in places)
first = lambda *names: next(("sglang." + name for name in names if has(name)), "")
def options(module):
    files = [os.path.join(p, *module.split(".")[1:]) + ".py" for p in places if module]
    texts = [open(file, encoding="utf-8").read() for file in files if os.path.isfile(file)]
    return [name for text in texts[:1] for name in re.findall(r'"--([a-z][a-z-]*)"', text)]
try:
    version = importlib.metadata.version("sglang") if places else ""
except importlib.metadata.PackageNotFoundError:
    version = ""
batch = first("benchmark.one_batch_server", "bench_one_batch_server")
print(json.dumps({"serve": has("cli.serve"), "server": first("launch_server"),
                  "driver": first("benchmark.serving", "bench_serving"),
                  "batch_driver": batch, "batch_options": options(batch), "version": version,
                  "router": importlib.util.find_spec("sglang_router") is not None}))
"""


@dataclass(frozen=True)
class Installation:
    """What an interpreter has of SGLang.

    serve: it has `sglang serve`. server, driver, batch_driver: modules that start a server, its
    load driver, and the one that sends batches of fixed shape, "" where it has none.
    batch_options: of the last one, without dashes. version: "" if unknown. router: whether it has
    sglang-router. problem: the last lines of a failed look, None after one that worked.
    """

    serve: bool = False
    server: str = ""
    driver: str = ""
    batch_driver: str = ""
    batch_options: Sequence[str] = ()
    version: str = ""
    router: bool = False
    problem: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Entry:
    """How an interpreter starts a server.

    mode: "serve" (`sglang serve`) or "module" (`python -m MODULE`).
    version: of SGLang, "" if unknown. config: what `--config FILE` of the spec holds, as words.
    """

    kind: LauncherName
    python: str
    mode: Literal["serve", "module"]
    module: str = ""
    version: str = ""
    config: tuple[str, ...] = ()


class Launcher(NamedTuple):
    """One way to start a server.

    find: how the interpreter that a spec asks for starts it; raises `ServerMissing`.
    words: the server's arguments, for a port and an NCCL port (None: none was leased), from the
    spec, and the spec with what its `--config FILE` holds.
    environment: variables that it needs in addition to those given.
    load_driver: the words that start its load driver, given the server's interpreter;
    batch_driver: the same for the driver of fixed shapes, with the options that it has (None:
    all); both raise `ServerMissing`. recognises: from its ``/server_info``, a running server of
    this kind; a server that no row recognises is an SGLang. is_automatic: kind "auto" tries
    it, in the order of the rows. is_standin: its figures say nothing about SGLang.
    uses_hardware: its speed depends on this machine, so its GPUs are leased and watched,
    and tests of CPU servers wait for each other.
    """

    name: LauncherName
    find: Callable[[ServerSpec], Entry]
    words: Callable[[ServerSpec, ServerSpec, int, int | None], list[str]]
    environment: Callable[[Mapping[str, str]], dict[str, str]]
    load_driver: Callable[[str], list[str]]
    batch_driver: Callable[[str], tuple[list[str], Sequence[str] | None]]
    recognises: Callable[[Mapping[str, Any]], bool]
    is_automatic: bool
    is_standin: bool
    uses_hardware: bool


# SGLang in an interpreter of this machine.


def _find_sglang(spec: ServerSpec) -> Entry:
    # As a path, since the keeper and nsys would look a bare name up on their own.
    python = (process.which(spec.python) or spec.python) if spec.python else sys.executable
    sglang = installation(python)
    if not sglang.serve and not sglang.server:
        raise ServerMissing(
            f"SGLang is not installed for {python}",
            expected="an interpreter that has the package sglang",
            hint="install it there, choose another interpreter with --sglprof-python, or set "
            'kind = "standin" under [server] in sglprof.toml to run on the embedded stand-in '
            "server",
        )
    entries = {
        "serve": Entry("sglang", python, "serve", version=sglang.version) if sglang.serve else None,
        "launch_server": Entry("sglang", python, "module", sglang.server, sglang.version)
        if sglang.server
        else None,
    }
    entry = entries[spec.entry] if spec.entry else entries["serve"] or entries["launch_server"]
    if entry is None:
        raise ServerMissing(
            f"the SGLang of {python}, version {sglang.version or 'unknown'}, has no {spec.entry}",
            expected=f"{spec.entry}, since server {spec.name!r} has entry = {spec.entry!r}",
            hint="leave entry out: then the command that it has is taken",
        )
    return entry


def _sglang_words(
    spec: ServerSpec, merged: ServerSpec, port: int, nccl_port: int | None
) -> list[str]:
    # Plain DP replicas look for a port each; a fixed one would be shared by all.
    nccl = "" if nccl_port is None or has_replicas(merged.args) else str(nccl_port)
    return [
        *_unless_given(merged, "--model-path", spec.model_path),
        *_unless_given(merged, "--host", HOST),
        *_unless_given(merged, "--port", str(port)),
        *_unless_given(merged, "--nccl-port", nccl),
        *_unless_given(merged, "--watchdog-timeout", WATCHDOG),
        *spec.args,
    ]


def load_driver(python: str) -> str:
    """The module of SGLang's load driver; raises `ServerMissing` where there is none."""
    if driver := installation(python).driver:
        return driver
    raise ServerMissing(
        f"{python} has no load driver of SGLang",
        expected="sglang.benchmark.serving or sglang.bench_serving",
        hint="set --sglprof-python to the interpreter of your SGLang",
    )


def has_load_driver(python: str) -> bool:
    """Whether this interpreter has SGLang's load driver."""
    return bool(_probe(python).driver)


def _batch_driver(python: str) -> tuple[list[str], Sequence[str]]:
    sglang = installation(python)
    if sglang.batch_driver:
        return [python, "-m", sglang.batch_driver], sglang.batch_options
    raise ServerMissing(
        f"{python} has no driver of SGLang for batches of fixed shape",
        expected="sglang.benchmark.one_batch_server or sglang.bench_one_batch_server",
        hint="set --sglprof-python to the interpreter of your SGLang",
    )


def _unless_given(spec: ServerSpec, name: str, value: str) -> list[str]:
    """An option with its value; [] without a value, or where the user's `args` have it."""
    return [name, value] if value and not has_option(spec.args, name) else []


# The router in front of the servers of a deployment, which serves nobody itself.

ROUTER = "sglang_router.launch_router"
ROUTER_GRACE = "5"  # s for open requests at its end; its own 180 would outlast the keeper


def _find_router(spec: ServerSpec) -> Entry:
    python = (process.which(spec.python) or spec.python) if spec.python else sys.executable
    if installation(python).router:
        return Entry("router", python, "module", ROUTER)
    raise ServerMissing(
        f"sglang-router is not installed for {python}",
        expected="an interpreter that has the package sglang-router",
        hint=f"pip install sglang-router there, or set router_python of deployment {spec.name!r}",
    )


def _router_words(
    spec: ServerSpec, merged: ServerSpec, port: int, nccl_port: int | None
) -> list[str]:
    # It always listens for Prometheus, by default at one port that all routers would share.
    return [
        *_unless_given(spec, "--host", HOST),
        *_unless_given(spec, "--port", str(port)),
        *_unless_given(spec, "--prometheus-port", str(nccl_port or "")),
        *_unless_given(spec, "--shutdown-grace-period-secs", ROUTER_GRACE),
        *spec.args,
    ]


# The embedded stand-in, which runs in the interpreter of pytest.


def _find_standin(spec: ServerSpec) -> Entry:
    return Entry("standin", sys.executable, "module", "pytest_sglprof.standin")


def _standin_words(
    spec: ServerSpec, merged: ServerSpec, port: int, nccl_port: int | None
) -> list[str]:
    # It reads no YAML, which needs a package that pytest-sglprof does without.
    return [
        *_unless_given(merged, "--host", HOST),
        *_unless_given(merged, "--port", str(port)),
        *merged.args,
        *spec.standin_args,
    ]


def _standin_environment(base: Mapping[str, str]) -> dict[str, str]:
    paths = [str(PACKAGE_ROOT), *base.get("PYTHONPATH", "").split(os.pathsep)]
    return {"PYTHONPATH": os.pathsep.join(path for path in paths if path)}


def _is_standin(info: Mapping[str, Any]) -> bool:
    return "standin" in str(info.get("version", "")) or bool(info.get("standin"))


_ROWS = (
    Launcher(
        "sglang",
        find=_find_sglang,
        words=_sglang_words,
        environment=lambda base: {},
        load_driver=lambda python: [python, "-m", load_driver(python)],
        batch_driver=_batch_driver,
        recognises=lambda info: False,
        is_automatic=True,
        is_standin=False,
        uses_hardware=True,
    ),
    Launcher(
        "standin",
        find=_find_standin,
        words=_standin_words,
        environment=_standin_environment,
        load_driver=lambda python: [sys.executable, "-m", "pytest_sglprof.standin.load_driver"],
        batch_driver=lambda python: (
            [sys.executable, "-m", "pytest_sglprof.standin.one_batch_driver"],
            None,
        ),
        recognises=_is_standin,
        is_automatic=True,
        is_standin=True,
        uses_hardware=False,
    ),
    Launcher(
        "router",
        find=_find_router,
        words=_router_words,
        environment=lambda base: {},
        load_driver=lambda python: [python, "-m", load_driver(python)],
        batch_driver=_batch_driver,
        recognises=lambda info: False,
        is_automatic=False,
        is_standin=False,
        uses_hardware=False,
    ),
)
LAUNCHERS = {row.name: row for row in _ROWS}


def find_entry(spec: ServerSpec) -> Entry:
    """How the server of `spec` is started; "auto" is the first launcher that finds one.

    Raises `ServerMissing` when the launcher that is asked for finds none, `SettingsError` for a
    `--config FILE` that cannot be used.
    """
    entry = _find(spec)
    entry = replace(entry, config=config_words(entry.python, spec.args))
    if entry.mode == "serve" and _hides_model(spec, entry):
        server = installation(entry.python).server
        if spec.entry == "serve" or not server:
            raise SettingsError(
                f"server {spec.name!r}: `sglang serve` refuses a model that stands only in the "
                "file of --config",
                expected="model_path, or --model-path in args",
                hint='set model_path, or entry = "launch_server"',
            )
        return replace(entry, mode="module", module=server)
    return entry


def find_launcher(spec: ServerSpec) -> Launcher:
    """The row that starts the server of `spec`; raises `ServerMissing` as `find_entry` does."""
    return LAUNCHERS[_find(spec).kind]


def _find(spec: ServerSpec) -> Entry:
    if spec.kind != "auto":
        return LAUNCHERS[spec.kind].find(spec)
    *preferred, last = (row for row in _ROWS if row.is_automatic)
    for row in preferred:
        with contextlib.suppress(ServerMissing):
            return row.find(spec)
    return last.find(spec)


def _hides_model(spec: ServerSpec, entry: Entry) -> bool:
    """True if the model stands in no word in which `sglang serve` looks for it."""
    is_seen = any(word.partition("=")[0] in ("--model-path", "--model") for word in spec.args)
    return has_option(merged_spec(spec, entry).args, "--model-path") and not is_seen


def merged_spec(spec: ServerSpec, entry: Entry) -> ServerSpec:
    """`spec` with what its `--config FILE` holds in `args`, in the order in which SGLang reads."""
    if not entry.config:
        return spec
    return replace(spec, args=(*entry.config, *without_config(spec.args)))


def kind_from_info(info: Mapping[str, Any]) -> LauncherName:
    """The kind of a running server, from its ``/server_info``."""
    return next((row.name for row in _ROWS if row.recognises(info)), "sglang")


def server_words(spec: ServerSpec, entry: Entry, port: int, nccl_port: int | None) -> list[str]:
    """The arguments of the server. An option that the user's `args` have is not added."""
    return LAUNCHERS[entry.kind].words(spec, merged_spec(spec, entry), port, nccl_port)


def node_words(merged: ServerSpec, nodes: int, rank: int, head: str) -> list[str]:
    """The arguments of a server's part on one of several nodes. head: of the first, HOST:PORT."""
    if nodes == 1:
        return []
    return [
        *_unless_given(merged, "--nnodes", str(nodes)),
        *_unless_given(merged, "--dist-init-addr", head),
        *("--node-rank", str(rank)),
    ]


def spec_on_node(spec: ServerSpec, address: str) -> ServerSpec:
    """`spec`, with the address at which a node of a network listens ("": this machine's own)."""
    words = _unless_given(spec, "--host", address)
    return replace(spec, args=(*spec.args, *words)) if words else spec


def has_replicas(args: Sequence[str]) -> bool:
    """True for data parallelism without DP attention: replicas that share no collective."""
    is_wide = option(args, "--dp-size") not in (None, "1")
    return is_wide and not has_option(args, "--enable-dp-attention")


def local_url(host: str, port: int, *, tls: bool = False) -> str:
    """The address at which this machine reaches a server that listens on `host`."""
    return url_to("https" if tls else "http", host or HOST, port)


def user_port(spec: ServerSpec) -> int | None:
    """The port that the user set, by --port in `args` or by `port`; None if neither is set."""
    text = option(spec.args, "--port")
    if text is None:
        return spec.port
    if not text.isdigit():
        raise SettingsError(f"server {spec.name!r}: --port {text!r} is not a number")
    return int(text)


def key_words(spec: ServerSpec, api_key: str, admin_key: str) -> list[str]:
    """The arguments that pass the server its keys, unless `args` has them."""
    return [
        *_unless_given(spec, "--api-key", api_key),
        *_unless_given(spec, "--admin-api-key", admin_key),
    ]


def split_secret_words(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Splits a command line into (words that may be shown, options that hold a secret).

    An option stays together with all of its values: `--lora-paths a
    https://user:PASSWORD@hub/b` is hidden as a whole.
    """
    options: list[list[str]] = [[]]
    for word in words:
        if word.startswith("--"):
            options.append([])
        options[-1].append(word)
    shown: list[str] = []
    hidden: list[str] = []
    for option_words in options:
        secret = redact_command(option_words) != option_words
        (hidden if secret else shown).extend(option_words)
    return shown, hidden


def exec_command(entry: Entry, fifo: Path, words: Sequence[str]) -> list[str]:
    """The command that is started: `exec_step.py`, whose process becomes the server."""
    start = [entry.python, "-u", str(EXEC_STEP), str(fifo)]
    target = ["serve"] if entry.mode == "serve" else ["module", entry.module]
    return [*start, *target, *words]


def shown_command(entry: Entry, words: Sequence[str]) -> list[str]:
    """The command as a user would type it."""
    if entry.mode == "serve":
        return [str(Path(entry.python).with_name("sglang")), "serve", *words]
    return [entry.python, "-m", entry.module, *words]


# Where SGLang's recorder of experts writes; by default /tmp, where dumps of all servers mix.
EXPERT_DUMPS = "SGLANG_EXPERT_DISTRIBUTION_RECORDER_DIR"


def server_environment(
    spec: ServerSpec, entry: Entry, base: Mapping[str, str], tmpdir: Path
) -> tuple[dict[str, str], dict[str, str]]:
    """The server's variables as (those that may be shown, the secret ones).

    base: the environment of the caller. `secret_variables` says which ones are secret.
    """
    merged = dict(base)
    merged["PYTHONUNBUFFERED"] = "1"
    merged["TMPDIR"] = str(tmpdir)
    merged.setdefault("SGLANG_LOG_FORWARD_ITERS", "1")
    merged.setdefault("SGLANG_LOG_MS", "1")
    merged.setdefault(EXPERT_DUMPS, str(tmpdir / "experts"))
    if spec.nsys:
        merged.setdefault("SGLANG_ENABLE_NVTX_SCHEDULER", "1")
    merged.update(LAUNCHERS[entry.kind].environment(merged))
    merged.update(spec.env)
    secret = secret_variables(spec, merged)
    # The server gets its keys as arguments, so it does not need the variables as well.
    unused = {spec.api_key_env, spec.admin_api_key_env} - {name for name, _ in spec.env}
    visible = {k: v for k, v in merged.items() if k not in secret}
    return visible, {k: v for k, v in secret.items() if k not in unused}


def secret_variables(spec: ServerSpec, environment: Mapping[str, str]) -> dict[str, str]:
    """The variables that `spec` declares, are named like a credential, or hold a known secret."""
    declared = _declared(spec)
    return {k: v for k, v in environment.items() if k in declared or is_secret_variable(k, v)}


def learn_secrets(spec: ServerSpec, environment: Mapping[str, str]) -> None:
    """Makes this process hide a server's secrets in everything that it writes.

    environment: where to look up the variables that `spec` declares. `server_keys` reads
    the server's keys.
    """
    learn_environment({**environment, **dict(spec.env)}, _declared(spec))
    learn_command([*spec.args, *spec.standin_args, *spec.nsys_args, spec.url])
    # Also where the option is abbreviated, so that its name says nothing.
    learn(filter(None, (option(spec.args, name) for name in SECRET_OPTIONS)), guessed=True)


def keep_secrets(specs: Iterable[ServerSpec]) -> dict[str, str]:
    """Learns these servers' secrets and blanks them in this process's environment block.

    Returns the variables of this process that are secret.
    """
    secret: dict[str, str] = {}
    for spec in specs:
        learn_secrets(spec, os.environ)
        secret |= secret_variables(spec, os.environ)
    process.blank_variables(secret)
    return secret


def _declared(spec: ServerSpec) -> set[str]:
    return {name for name in (*spec.secrets, spec.api_key_env, spec.admin_api_key_env) if name}


def installation(python: str) -> Installation:
    """What an interpreter has of SGLang; raises `ServerMissing` if it does not run."""
    sglang = _probe(python)
    if sglang.problem is not None:
        raise ServerMissing(
            f"{python} is not a working Python interpreter",
            expected="the interpreter that has SGLang",
            hint="check --sglprof-python (or `python` of the server)",
            log=sglang.problem,
        )
    return sglang


@functools.lru_cache(maxsize=8)  # failures are kept as well: each look starts a Python
def _probe(python: str) -> Installation:
    try:
        answer = subprocess.run(
            [python, "-c", _PROBE],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=PROBE_LIMIT,
            check=True,
        )
        return Installation(**json.loads(answer.stdout.strip().splitlines()[-1]))
    except (OSError, subprocess.SubprocessError, ValueError, TypeError, IndexError) as error:
        output = getattr(error, "stderr", None) or str(error)
        return Installation(problem=tuple(str(output).strip().splitlines()[-5:]))
