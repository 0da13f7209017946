"""What a wheel's HTTP server answers: its routes, keys, load, sizes, and what a start becomes."""

from __future__ import annotations

import argparse
import ast
import asyncio
import contextlib
import dataclasses
import io
import sys
from collections.abc import Mapping
from types import ModuleType, SimpleNamespace
from typing import Any

from ci.old_batches import CAPACITY, VALUES
from ci.old_wheels import MANAGERS, App, Clock, Reply, lifted
from ci.stubbed import Stub, Wheel, plain

SERVER = "sglang.srt.entrypoints.http_server"
PATHS = (
    "/ready", "/health", "/health_generate", "/server_info", "/get_server_info", "/model_info",
    "/get_model_info", "/v1/models", "/v1/loads", "/get_load", "/start_profile", "/stop_profile",
    "/end_profile", "/flush_cache", "/slow_down", "/generate", "/v1/completions",
    "/v1/chat/completions",
)  # fmt: skip
ASKED = (
    "/health",
    "/ready",
    "/metrics",
    "/server_info",
    "/get_server_info",
    "/start_profile",
    "/x",
)
SIZES = {"model_path": "m", "tp_size": 4, "dp_size": 2, "enable_dp_attention": True}
SHOWN = (
    "tp_size", "dp_size", "pp_size", "ep_size", "attn_dp_size", "attn_cp_size", "moe_dp_size",
    "enable_dp_attention", "nnodes", "node_rank", "base_gpu_id", "gpu_id_step",
    "disaggregation_mode", "decode_log_interval", "load_balance_method", "api_key",
    "admin_api_key", "status", "launch_command", "startup_time", "frontend", "server_args",
    "kv_events", "version",
)  # fmt: skip


def answers(wheel: Wheel) -> dict[str, Any]:
    """All of them; `wheel` is used up by it."""
    served = wheel.load(SERVER)
    app: App = served.app
    routes = {path: app.paths[path][0] if path in app.paths else None for path in PATHS}
    return {
        "executed": True,
        "routes": routes,
        "auth": auth(wheel, app),
        "profile": profile(wheel, served),
        "server_info": server_info(wheel, served, app),
        "get_load": get_load(wheel, served, app),
        "v1_loads": v1_loads(wheel, app),
    }


def auth(wheel: Wheel, app: App) -> dict[str, dict[str, int]]:
    """Status by the keys that the server has, the key that is sent, and the path."""
    statuses: dict[str, dict[str, int]] = {}
    for kinds in (("api",), ("admin",), ("api", "admin")):
        keys = {f"{kind}_api_key".replace("api_api", "api"): kind for kind in kinds}
        if wheel.has("sglang.srt.utils.auth"):
            add = wheel.load("sglang.srt.utils.auth").add_api_key_middleware
            options: dict[str, Any] = {"api_key": None, "admin_api_key": None, **keys}
        elif kinds == ("api",):
            add = lifted(
                wheel, "sglang.srt.utils.common", "add_api_key_middleware", ORJSONResponse=Reply
            )
            options = keys
        else:
            continue
        app.middlewares.clear()
        add(app, **options)
        ((check, given),) = app.middlewares
        for sent in ("", "wrong", *kinds):
            row = {path: asyncio.run(_status(check, given, path, sent)) for path in ASKED}
            statuses[f"{'+'.join(kinds)} key, {sent or 'none'} sent"] = row
    return statuses


async def _status(check: Any, given: Mapping[str, Any], path: str, key: str) -> int:
    """200 stands for: it is let through to the path."""
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    method = "POST" if path == "/start_profile" else "GET"
    request = SimpleNamespace(method=method, url=SimpleNamespace(path=path), headers=headers)
    sent: list[Reply] = []

    async def passed(*_: Any) -> Reply:
        sent.append(Reply(status_code=200))
        return sent[-1]

    if given:
        scope = {"type": "http", "path": path, "method": method, "request": request}
        await check(passed, **given)(scope, None, sent.append)
        return sent[-1].status
    reply: Reply = await check(request, passed)
    return reply.status


def profile(wheel: Wheel, served: ModuleType) -> dict[str, Any]:
    """The fields of a start, and what of it reaches the schedulers."""
    structs = wheel.load(f"{MANAGERS}.io_struct")
    body = getattr(structs, "ProfileReqInput", structs.ProfileReq)
    known = [each for each in _fields(body) if each not in ("rid", "http_worker_ipc", "req_type")]
    name = wheel.first(
        f"{MANAGERS}.tokenizer_control_mixin", f"{MANAGERS}.tokenizer_communicator_mixin"
    )
    module = wheel.load(name)
    module.__dict__.update(time=Clock(), get_bool_env_var=lambda *_: True)
    kind = next(v for k, v in vars(module).items() if k.startswith("Tokenizer") and "Mixin" in k)
    sent: list[Any] = []
    success = [True, True, False]

    class Manager(kind):  # type: ignore[misc]
        def auto_create_handle_loop(self) -> None:
            return

        async def profile_communicator(self, request: Any) -> list[Any]:
            sent.append(request)
            return [SimpleNamespace(success=success[len(sent) - 1], message="the reason")]

    served.__dict__["_global_state"] = SimpleNamespace(tokenizer_manager=Manager())
    asked = {"output_dir": "/traces/w1", "num_steps": 5, "profile_id": "chosen"}
    start = asyncio.run(
        served.start_profile_async(body(**{k: v for k, v in asked.items() if k in known}))
    )
    stop = asyncio.run(served.stop_profile_async())
    try:
        asyncio.run(served.stop_profile_async())
        failure = "none"
    except RuntimeError as error:
        failure = f"RuntimeError: {error}"
    return {
        "fields": known,
        "start": [start.status, start.content],
        "stop": [stop.status, stop.content],
        "failure": failure,
        "sent": {each: plain(getattr(sent[0], each)) for each in (*known, "profile_id")},
    }


def _fields(kind: Any) -> list[str]:
    if dataclasses.is_dataclass(kind):
        return [each.name for each in dataclasses.fields(kind)]
    return list(kind.__struct_fields__)


def server_info(wheel: Wheel, served: ModuleType, app: App) -> dict[str, Any]:
    """Of a server with tp 4 and DP attention of 2; its names, and the values of some."""
    arguments = _arguments(wheel)
    tokenizer = SimpleNamespace(
        server_args=arguments, startup_time={}, get_internal_state=_async([{}, {}])
    )
    served.__dict__["_global_state"] = SimpleNamespace(
        tokenizer_manager=tokenizer,
        scheduler_info={"status": "ready", "max_total_num_tokens": CAPACITY},
    )
    served.__dict__.update(
        redact_watermark_secrets=lambda given: given,
        msgspec_to_builtins=lambda given: given,
        describe_kv_events_publisher=lambda _: None,
        __version__=wheel.root.name.removeprefix("sglang-"),
    )
    if "build_server_info" in vars(served):
        served.__dict__["build_server_info"] = lifted(
            wheel,
            "sglang.srt.utils.common",
            "build_server_info",
            describe_kv_events_publisher=lambda _: None,
        )
    path = next(path for path in ("/server_info", "/get_server_info") if path in app.paths)
    info = asyncio.run(app.paths[path][1]())
    return {
        "path": path,
        "of": "--tp 4 --dp 2 --enable-dp-attention",
        "values": {name: plain(info[name]) for name in SHOWN if name in info},
        "absent": [name for name in SHOWN if name not in info],
        "internal_states": len(info["internal_states"]),
    }


def _arguments(wheel: Wheel) -> Any:
    """Resolved arguments; where resolving would look for a GPU, as they were given."""
    kind = wheel.load("sglang.srt.server_args").ServerArgs
    if not dataclasses.is_dataclass(kind):
        made = kind(**SIZES)
        hook = wheel.load("sglang.srt.arg_groups.parallel_hook")
        if hasattr(hook, "handle_deprecated_dp_attention"):
            made._input_frozen = True
            hook.handle_deprecated_dp_attention(made)
        return made
    made = object.__new__(kind)
    for each in dataclasses.fields(kind):
        value = each.default
        if each.default_factory is not dataclasses.MISSING:
            value = each.default_factory()
        # A default that a stub made has no place in an answer; none of `SHOWN` has one.
        value = None if isinstance(value, Stub) or value is dataclasses.MISSING else value
        setattr(made, each.name, SIZES.get(each.name, value))
    kind.describe_kv_events_publisher = lambda _: None
    return made


def _async(value: Any) -> Any:
    async def give(*_: Any, **__: Any) -> Any:
        return value

    return give


def _known(name: str) -> Any:
    """What a load is made to have."""
    values = {
        "dp_rank": 1, "num_running_reqs": VALUES["running"], "num_waiting_reqs": VALUES["waiting"],
        "num_reqs": VALUES["running"] + VALUES["waiting"], "num_used_tokens": VALUES["tokens"],
        "num_total_tokens": VALUES["tokens"] + 10, "num_tokens": VALUES["tokens"],
        "max_total_num_tokens": CAPACITY, "token_usage": VALUES["token_usage"],
        "gen_throughput": 280.0, "mode": "null",
    }  # fmt: skip
    return values.get(name, 0)


def _snapshot(structs: ModuleType, name: str) -> Any:
    """A load of a rank, with the parts that a server without drafts and adapters has."""
    kind = getattr(structs, name)
    parts = {"memory": "Memory", "disaggregation": "Disaggregation", "queues": "Queue"}
    values: dict[str, Any] = {each: _known(each) for each in _fields(kind)}
    values |= dict.fromkeys(
        ({"rid", "http_worker_ipc", "decode_moments", "speculative", "lora"}) & set(values)
    )
    for field, part in parts.items():
        if field in values:
            of = getattr(structs, f"{part}Metrics")
            values[field] = of(**{each: _known(each) for each in _fields(of)})
    return kind(**values)


def _load(wheel: Wheel) -> Any:
    if wheel.has(f"{MANAGERS}.load_snapshot"):
        return _snapshot(wheel.load(f"{MANAGERS}.load_snapshot"), "LoadSnapshot")
    return _snapshot(wheel.load(f"{MANAGERS}.io_struct"), "GetLoadsReqOutput")


def get_load(wheel: Wheel, served: ModuleType, app: App) -> Any:
    """The answer of one rank, None where there is no such path."""
    if "/get_load" not in app.paths:
        return None
    structs = wheel.load(f"{MANAGERS}.io_struct")
    old = hasattr(structs, "GetLoadReqOutput")
    load = _snapshot(structs, "GetLoadReqOutput") if old else _load(wheel)
    manager = SimpleNamespace(get_load=_async([load]), get_loads=_async([load]))
    served.__dict__.update(_global_state=SimpleNamespace(tokenizer_manager=manager), time=Clock())
    answer = asyncio.run(app.paths["/get_load"][1]())
    return plain([dataclasses.asdict(each) if old else each for each in answer])


def v1_loads(wheel: Wheel, app: App) -> Any:
    """The answer for one rank, None where there is no such path."""
    if "/v1/loads" not in app.paths:
        return None
    handler = app.paths["/v1/loads"][1]
    sizes = SimpleNamespace(
        tp_size=4,
        pp_size=1,
        dp_size=2,
        num_dp_ranks=2,
        enable_dp_attention=True,
        attn_dp_enabled=True,
    )
    handler.__globals__.update(get_parallel=lambda: sizes, get_device_name=lambda: "GPU")
    manager = SimpleNamespace(get_loads=_async([_load(wheel)]))
    answer = asyncio.run(handler(tokenizer_manager=manager))
    return plain({**answer, "timestamp": "2025-11-29T07:06:40+00:00"})


def driver(wheel: Wheel) -> dict[str, Any]:
    """Names and choices of the load driver's options."""
    name = wheel.first("sglang.benchmark.serving", "sglang.bench_serving")
    module = wheel.load(name)
    options = _options(wheel, name, module)
    choices = {
        flag: plain(sorted(options[flag].choices))
        for flag in ("--dataset-name", "--backend")
        if options[flag].choices
    }
    return {
        "executed": True,
        "module": name,
        "options": sorted(options),
        "choices": choices,
        "steady_state": wheel.has("sglang.benchmark.steady_state_serving"),
    }


def _options(wheel: Wheel, name: str, module: ModuleType) -> dict[str, argparse.Action]:
    """The options of the parser that the script makes of its command line."""
    made: list[argparse.ArgumentParser] = []

    def stop(parser: argparse.ArgumentParser, *_: Any) -> Any:
        made.append(parser)
        raise SystemExit

    parse, argparse.ArgumentParser.parse_args = argparse.ArgumentParser.parse_args, stop  # type: ignore[assignment, method-assign]
    argv, sys.argv = sys.argv, [name]
    try:
        with contextlib.suppress(SystemExit), contextlib.redirect_stderr(io.StringIO()):
            if hasattr(module, "cli_main"):
                module.cli_main()
            else:
                main = next(n for n in ast.parse(wheel.text(name)).body if _is_main(n))
                assert isinstance(main, ast.If)
                exec(
                    compile(ast.Module(main.body, []), str(wheel.path(name)), "exec"), vars(module)
                )
    finally:
        argparse.ArgumentParser.parse_args = parse  # type: ignore[method-assign]
        sys.argv = argv
    return {flag: each for each in made[0]._actions for flag in each.option_strings}


def _is_main(node: ast.stmt) -> bool:
    return isinstance(node, ast.If) and "__main__" in ast.unparse(node.test)
