"""A wheel of SGLang, ready to have its modules executed: its web framework and torch are stubs."""

from __future__ import annotations

import ast
import contextlib
import io
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from ci.stubbed import Stub, Wheel

NOW = 1_764_400_000.0  # 2025-11-29 07:06:40 UTC
GAP = 2.0  # seconds between two lines of a rank: a throughput is a count by it
MANAGERS = "sglang.srt.managers"
PARTS = f"{MANAGERS}.scheduler_components"
REAL = (
    "sglang.srt.arg_groups",
    "sglang.srt.entrypoints.v1_loads",
    "sglang.srt.environ",
    "sglang.srt.model_executor.forward_batch_info",
    "sglang.srt.model_executor.step_span_utils",
    "sglang.srt.runtime_context",
    "sglang.srt.server_args",
    "sglang.srt.utils.auth",
    f"{MANAGERS}.io_struct",
    f"{MANAGERS}.load_snapshot",
    f"{PARTS}.pool_stats_observer",
)


class Clock(SimpleNamespace):
    """Stands for the module `time`: it stands still, `GAP` after what is 0."""

    def __init__(self) -> None:
        super().__init__(time=lambda: NOW, perf_counter=lambda: GAP, monotonic=lambda: GAP)


def opened(root: Path) -> Wheel:
    """A wheel, unpacked as sglang-VERSION, whose modules can be loaded."""
    torch = Stub("torch")
    torch.__dict__["__version__"] = "2.9.0"
    web = Stub("fastapi")
    replies = (
        "Response",
        "ORJSONResponse",
        "JSONResponse",
        "StreamingResponse",
        "PlainTextResponse",
    )
    web.__dict__.update({"FastAPI": App, "APIRouter": App, **dict.fromkeys(replies, Reply)})
    modules = {
        "torch": torch,
        "sglang.version": SimpleNamespace(__version__=root.name.removeprefix("sglang-")),
        "fastapi": web,
        "fastapi.responses": web,
        "uvloop": SimpleNamespace(EventLoopPolicy=lambda: None),
        "starlette.routing": SimpleNamespace(Match=SimpleNamespace(FULL="full")),
        "starlette.requests": SimpleNamespace(Request=lambda scope, **_: scope["request"]),
    }
    # What follows there needs the types of modules that are stubs.
    return Wheel(root, modules, REAL, {f"{MANAGERS}.io_struct": "\n_msgpack_decoder = "})


class Reply:
    """Stands for a response of FastAPI."""

    def __init__(self, content: Any = "", status_code: int = 200, **_: Any) -> None:
        self.content = content
        self.status = status_code

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Sends itself, as an ASGI application."""
        send(self)


class App:
    """Stands for an application of FastAPI: it keeps what is registered."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self.paths: dict[str, tuple[list[str], Callable[..., Any]]] = {}
        self.middlewares: list[tuple[Any, dict[str, Any]]] = []

    def api_route(self, path: str, methods: Sequence[str] = ("GET",), **_: Any) -> Any:
        """As FastAPI's."""

        def keep(handler: Callable[..., Any]) -> Callable[..., Any]:
            self.paths[path] = (sorted(methods), handler)
            return handler

        return keep

    def __getattr__(self, name: str) -> Any:
        if name in ("get", "post", "put", "delete"):
            return lambda path, **_: self.api_route(path, (name.upper(),))
        return lambda *_, **__: lambda handler: handler

    def include_router(self, router: Any, **_: Any) -> None:
        """As FastAPI's."""
        if isinstance(router, App):
            self.paths.update(router.paths)

    def middleware(self, _: str) -> Any:
        """As FastAPI's, for functions."""
        return lambda handler: self.middlewares.append((handler, {})) or handler

    def add_middleware(self, kind: Any, **options: Any) -> None:
        """As FastAPI's, for classes."""
        if not isinstance(kind, Stub):
            self.middlewares.append((kind, options))

    @property
    def routes(self) -> list[Any]:
        """What a request is matched against, for the level of access that a path has."""
        return [
            SimpleNamespace(
                endpoint=handler,
                matches=lambda scope, path=path, handler=handler: (
                    "full" if scope["path"] == path else "none",
                    {"endpoint": handler},
                ),
            )
            for path, (_, handler) in self.paths.items()
        ]


@contextlib.contextmanager
def logged(wheel: Wheel, tags: str = "") -> Iterator[list[str]]:
    """The lines that the wheel's loggers write meanwhile, by the wheel's format; UTC."""
    lines: list[str] = []
    text = io.StringIO()
    logging.Formatter.converter = time.gmtime  # type: ignore[assignment]
    stderr, sys.stderr = sys.stderr, text
    factory = logging.getLogRecordFactory()

    def record(*args: Any, **options: Any) -> logging.LogRecord:
        made = factory(*args, **options)
        made.created, made.msecs = NOW, 0.0
        return made

    try:
        logging.setLogRecordFactory(record)
        _configure_logger(wheel)(SimpleNamespace(log_level="info"), prefix=tags)
        yield lines
    finally:
        sys.stderr = stderr
        logging.setLogRecordFactory(factory)
        lines += text.getvalue().splitlines()


def _configure_logger(wheel: Wheel) -> Any:
    """The function that sets the format of the lines; its module needs too much to be loaded."""
    return lifted(
        wheel,
        wheel.first("sglang.srt.utils.common", "sglang.srt.utils"),
        "configure_logger",
        os=os,
        logging=logging,
        envs=Stub("envs"),
        parent_process=lambda: None,
        is_flashinfer_available=lambda: False,
        configure_hf_hub_logger=lambda: None,
    )


def lifted(wheel: Wheel, module: str, name: str, **names: Any) -> Any:
    """One function of a module, executed with the given names instead of its module's."""
    tree = ast.parse(wheel.text(module))
    node = next(
        n
        for n in ast.walk(tree)
        if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and n.name == name
    )
    future = ast.parse("from __future__ import annotations").body
    exec(compile(ast.Module([*future, node], []), str(wheel.path(module)), "exec"), names)
    return names[name]
