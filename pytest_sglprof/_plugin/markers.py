"""Read and check `@pytest.mark.sglang_server` and `@pytest.mark.profile_window`."""

from __future__ import annotations

import unittest
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from pytest_sglprof._config.backends import BACKENDS
from pytest_sglprof._errors import SettingsError, WindowRefused, did_you_mean, docs

if TYPE_CHECKING:
    import pytest

    from pytest_sglprof._config.load import Settings
    from pytest_sglprof._config.model import ServerSpec, WindowSpec

SERVER_MARK = "sglang_server"
WINDOW_MARK = "profile_window"
SERVER_FIXTURE = "sglang_server"  # the other fixtures take it
TEST_CASE_FIXTURE = "_sglprof_test_case"  # sets attributes of a unittest.TestCase
TRIGGER_SECONDS = 2.0  # default duration of a torch window that a trigger opens
MARKER_HELP = (
    f'{SERVER_MARK}(name="default", nsys=None): run this test on [servers.NAME] of '
    "sglprof.toml (default: [server]); nsys=True starts it under nsys profile --start-later",
    f"{WINDOW_MARK}(**options): open a profile window and judge it; it opens when the load is "
    "steady, unless trigger, delay or whole_body says otherwise; other options are for example "
    "backend, num_steps, duration, slowdown=1.05; all of them: " + docs("windows"),
)


def concerns(item: pytest.Item) -> bool:
    """True for a test that uses a server, directly or by a fixture, or has one of our markers."""
    return SERVER_FIXTURE in getattr(item, "fixturenames", ()) or any(
        item.get_closest_marker(mark) is not None for mark in (SERVER_MARK, WINDOW_MARK)
    )


def is_test_case(node: Any) -> bool:
    """True for a class of unittest, and for a method of one."""
    cls = getattr(node, "cls", None)
    return isinstance(cls, type) and issubclass(cls, unittest.TestCase)


def server_spec(node: Any, settings: Settings) -> ServerSpec:
    """The server of a test, or of a test function that is about to be parametrised."""
    mark = node.get_closest_marker(SERVER_MARK)
    name, nsys = _server_arguments(mark.args, mark.kwargs) if mark else ("default", None)
    servers = settings.servers
    if name not in servers:
        raise SettingsError(
            f'@pytest.mark.{SERVER_MARK}("{name}"): there is no such server',
            expected="one of " + ", ".join(sorted(servers)),
            hint=did_you_mean([name], servers, f"add [servers.{name}] to sglprof.toml"),
        )
    if nsys is None:
        nsys = servers[name].nsys or _needs_session(node, settings)
    return replace(servers[name], name=name, nsys=nsys)


def marked_window(item: pytest.Item, settings: Settings) -> WindowSpec | None:
    """The window of the closest marker, or None. Markers further away are ignored."""
    mark = item.get_closest_marker(WINDOW_MARK)
    if mark is None:
        return None
    keywords = dict(mark.kwargs)
    if len(mark.args) > 1:
        raise SettingsError(
            f"@pytest.mark.{WINDOW_MARK} got {len(mark.args)} positional arguments",
            expected="at most one, the window's name",
            hint="give the others by keyword",
        )
    if mark.args:
        if "name" in keywords:
            raise SettingsError(
                f"@pytest.mark.{WINDOW_MARK} got its name twice",
                expected="the name alone or name=",
                hint="remove one of the two",
            )
        keywords["name"] = mark.args[0]
    keywords.setdefault("name", item.name)
    from pytest_sglprof._config.windows import refuse_too_few_steps, window_spec
    from pytest_sglprof._load.triggers import KernelImbalance

    spec = window_spec(settings, keywords, origin=f"@pytest.mark.{WINDOW_MARK}")
    refuse_too_few_steps(spec.num_steps, settings, f"@pytest.mark.{WINDOW_MARK}")
    default_steps = BACKENDS[spec.backend].default_steps
    if spec.num_steps or spec.duration or spec.whole_body or default_steps is None:
        return spec
    # A starved rank runs no steps, so a count would never be full. One whose kernels are slow does.
    if spec.trigger is not None and not isinstance(spec.trigger, KernelImbalance):
        return replace(spec, duration=TRIGGER_SECONDS)
    return replace(spec, num_steps=max(default_steps, settings.min_steps))


def check_item(item: pytest.Item, settings: Settings) -> str | None:
    """The first mistake in the markers of a test, or None."""
    from pytest_sglprof._config.servers import members_of
    from pytest_sglprof._config.windows import repeats

    try:
        server = server_spec(item, settings)
        window = marked_window(item, settings)
        _check_test_case(item)
        if window is not None:
            repeats(window, settings)
            members = [each.spec for each in members_of(server, settings.servers)]
            is_attached = bool(settings.server or server.url)
            _check_pair(item, server, window, members, attached=is_attached)
    except (SettingsError, WindowRefused) as error:
        return f"{item.name}: {error}"
    return None


def _check_test_case(item: pytest.Item) -> None:
    """A method without a server: its class has no marker, or only the method has it."""
    if SERVER_FIXTURE in getattr(item, "fixturenames", ()) or not is_test_case(item):
        return
    mark = next(m for m in (SERVER_MARK, WINDOW_MARK) if item.get_closest_marker(m) is not None)
    raise SettingsError(
        f"@pytest.mark.{mark} on a method of a unittest.TestCase without a server",
        expected=f"@pytest.mark.{SERVER_MARK} on the class, which gives its methods "
        "self.sglang_server, self.bench_serving and self.profile_window",
        hint=f'write @pytest.mark.{SERVER_MARK}("NAME") above the class; a method may then have '
        "another one",
    )


def _check_pair(
    item: pytest.Item,
    server: ServerSpec,
    window: WindowSpec,
    members: Sequence[ServerSpec],
    *,
    attached: bool,
) -> None:
    if SERVER_FIXTURE not in getattr(item, "fixturenames", ()):
        raise SettingsError(
            f"@pytest.mark.{WINDOW_MARK} on a test without a server",
            expected="the fixture sglang_server or bench_serving among its arguments",
            hint="add sglang_server to the test's arguments",
        )
    if window.roles and not (server.members or attached):
        raise SettingsError(
            f"@pytest.mark.{WINDOW_MARK}(roles={list(window.roles)}) on a server alone",
            expected=f'@pytest.mark.{SERVER_MARK}("NAME") with NAME of [deployments.NAME]',
            hint="leave roles out: such a server has one window",
        )
    if BACKENDS[window.backend].needs_session and not server.nsys and not attached:
        raise SettingsError(
            f'backend="{window.backend}" on a server that is not started under nsys',
            expected=f"@pytest.mark.{SERVER_MARK}(nsys=True) on the test",
            hint="remove nsys=False, or use the torch backend",
        )
    for each in () if attached else (members or (server,)):
        _refuse_by_text(each, window)


def _refuse_by_text(server: ServerSpec, window: WindowSpec) -> None:
    """Raises what the window would be refused for, as far as the text alone says it."""
    from pytest_sglprof._capture.nsys import refuse_torch_options
    from pytest_sglprof._capture.torch_request import refuse_request
    from pytest_sglprof._server.arguments import has_option, option
    from pytest_sglprof._server.sizes import ServerSizes

    if BACKENDS[window.backend].needs_session:
        refuse_torch_options(window)
        return
    is_elsewhere = has_option(server.args, "--config")  # then the device may be in that file
    is_cpu = is_elsewhere or option(server.args, "--device") == "cpu"
    refuse_request(
        window,
        ServerSizes.from_info({}),
        under_nsys=server.nsys and not is_cpu,
        standin=server.kind != "sglang",
        env=dict(server.env),
        last_step=None,
    )


def _server_arguments(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[str, bool | None]:
    unknown = sorted(set(kwargs) - {"name", "nsys"})
    name = kwargs.get("name", args[0] if args else "default")
    nsys = kwargs.get("nsys")
    if unknown or len(args) > 1 or (args and "name" in kwargs):
        given = ", ".join(unknown) or f"{len(args)} positional arguments and {sorted(kwargs)}"
        raise SettingsError(
            f"@pytest.mark.{SERVER_MARK}: unexpected {given}",
            expected=f'{SERVER_MARK}("NAME", nsys=True)',
            hint=did_you_mean(unknown, ("name", "nsys"), "correct the marker"),
        )
    if not isinstance(name, str) or not isinstance(nsys, bool | None):
        raise SettingsError(
            f"@pytest.mark.{SERVER_MARK}: name={name!r}, nsys={nsys!r}",
            expected="a string and True or False",
            hint="correct the marker",
        )
    return name, nsys


def _needs_session(node: Any, settings: Settings) -> bool:
    """Whether the marked window of a test, if it has one, needs a server under nsys."""
    mark = node.get_closest_marker(WINDOW_MARK)
    if mark is None:
        return False
    backend = mark.kwargs.get("backend", settings.window.get("backend"))  # any type: checked later
    return any(row.name == backend and row.needs_session for row in BACKENDS.values())
