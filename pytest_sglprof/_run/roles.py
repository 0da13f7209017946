"""Windows on several servers of a deployment, one each, which open and close together."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from pytest_sglprof._capture.recording import in_thread
from pytest_sglprof._config.model import WindowSpec
from pytest_sglprof._errors import SettingsError, do_every
from pytest_sglprof._metrics import METRICS
from pytest_sglprof._server.deployment import servers_of
from pytest_sglprof._server.sizes import role_of

if TYPE_CHECKING:
    from pytest_sglprof._run.window import Window
    from pytest_sglprof._server.launch import Server


class RoleWindows:
    """The windows of a deployment's servers, in the order in which these started.

    Used as a `Window` is: with `with`, or with `open`, `wait` and `close`. Each of them is judged
    by itself at the end of the test, by the thresholds of its role.
    """

    __module__ = "pytest_sglprof"

    def __init__(self, windows: Sequence[Window]) -> None:
        self.windows = tuple(windows)

    def __iter__(self) -> Iterator[Window]:
        return iter(self.windows)

    def of(self, role: str) -> tuple[Window, ...]:
        """Those on the servers of a role; raises `SettingsError` if there are none."""
        windows = tuple(each for each in self.windows if each.role == role)
        if not windows:
            raise SettingsError(
                f"none of these windows is on a {role!r} server",
                expected="one of " + ", ".join(dict.fromkeys(each.role for each in self.windows)),
                hint="give profile_window that role",
            )
        return windows

    def open(self) -> None:
        """Starts to record on all servers; raises what `Window.open` raises on one of them."""
        together([each.open for each in self.windows])

    def wait(self) -> None:
        """Waits until all windows are over."""
        for waiting in [in_thread("sglprof-window", each.wait) for each in self.windows]:
            waiting.result()

    def close(self) -> None:
        """Closes all windows."""
        together([each.close for each in self.windows])

    def __enter__(self) -> RoleWindows:
        together([each.__enter__ for each in self.windows])
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        together([partial(each.__exit__, kind, error, traceback) for each in self.windows])

    def check(self, metric: str, limit: float, *, role: str = "", **subject: Any) -> float:
        """`Window.check` on each window, or on those of a role; returns the worst figure."""
        figures: list[float] = []

        def check(window: Window) -> None:
            figures.append(window.check(metric, limit, **subject))

        do_every(partial(check, each) for each in (self.of(role) if role else self.windows))
        return min(figures) if METRICS[metric].better == "higher" else max(figures)


def together(steps: Sequence[Callable[[], object]]) -> None:
    """Takes all steps at the same time, and raises the first error once all are over."""
    if len(steps) == 1:
        steps[0]()
        return
    do_every(each.result for each in [in_thread("sglprof-window", step) for step in steps])


def specs_by_server(spec: WindowSpec, server: Server) -> list[tuple[Server, WindowSpec]]:
    """The servers on which `spec` is opened, each with the window that it gets.

    Those of a deployment have the name of the server in theirs: `steady-decode-2`. Raises
    `SettingsError` where no server has one of the roles that are asked for.
    """
    servers: Mapping[str, Server] = servers_of(server)
    chosen = [
        (each, replace(spec, name=f"{spec.name}-{label}" if label else spec.name))
        for label, each in servers.items()
        if not spec.roles or role_of(each.info) in spec.roles
    ]
    if not chosen:
        raise SettingsError(
            f"profile window {spec.name!r}: roles={list(spec.roles)} on a server without a role",
            expected="a deployment, which has prefill and decode servers",
            hint='@pytest.mark.sglang_server("NAME") with NAME of [deployments.NAME]',
        )
    return chosen
