"""`@pytest.mark.sglang_server` and `@pytest.mark.profile_window`: read and checked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from pytest_sglprof.errors import SettingsError
from pytest_sglprof.spelling import did_you_mean

if TYPE_CHECKING:
    import pytest

    from pytest_sglprof.settings import Settings
    from pytest_sglprof.values import ServerSpec, WindowSpec

SERVER_MARK = "sglang_server"
WINDOW_MARK = "profile_window"
FIXTURES = ("sglang_server", "bench_serving", "profile_window", "load_watch")
DEFAULT_STEPS = 50  # after which a marked torch window closes, or min_steps if that is more
TRIGGER_SECONDS = 2.0  # after which a triggered torch window closes
MARKER_HELP = (
    f'{SERVER_MARK}(name="default", nsys=None): the server of this test: a [servers.NAME] of '
    "sglprof.toml; nsys=True starts it under nsys profile --start-later",
    f"{WINDOW_MARK}(**options): opens a profile window while the test's load is steady and judges "
    "it; options such as backend, num_steps, duration, delay, whole_body, trigger, slowdown=1.10 "
    "(docs/windows.md)",
)


@dataclass(frozen=True)
class ServerKey:
    """Which server a test needs. Tests of equal keys share one server life."""

    name: str = "default"
    nsys: bool = False

    def __str__(self) -> str:
        return f"{self.name}+nsys" if self.nsys else self.name

    def spec(self, servers: Mapping[str, ServerSpec]) -> ServerSpec:
        """The specification with this name, under nsys where the test asks for it."""
        return replace(servers[self.name], nsys=self.nsys)


def concerns(item: pytest.Item) -> bool:
    """True for a test that uses one of our fixtures or carries one of our markers."""
    names = getattr(item, "fixturenames", ())
    return any(name in names for name in FIXTURES) or any(
        item.get_closest_marker(mark) is not None for mark in (SERVER_MARK, WINDOW_MARK)
    )


def server_key(node: Any, servers: Mapping[str, ServerSpec]) -> ServerKey:
    """The key that a test (or a test function about to be parametrised) asks for."""
    mark = node.get_closest_marker(SERVER_MARK)
    name, nsys = _server_arguments(mark.args, mark.kwargs) if mark else ("default", None)
    if name not in servers:
        raise SettingsError(
            f'@pytest.mark.{SERVER_MARK}("{name}"): there is no such server',
            expected="one of " + ", ".join(sorted(servers)),
            hint=did_you_mean([name], servers, f"add [servers.{name}] to sglprof.toml"),
        )
    if nsys is None:
        nsys = servers[name].nsys or _window_backend(node) == "nsys"
    return ServerKey(name, nsys)


def marked_window(item: pytest.Item, settings: Settings) -> WindowSpec | None:
    """The window that the closest marker asks for; it wins whole."""
    from pytest_sglprof.window_options import refuse_too_few_steps, window_spec

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
    spec = window_spec(settings, keywords, origin=f"@pytest.mark.{WINDOW_MARK}")
    refuse_too_few_steps(spec.num_steps, settings, f"@pytest.mark.{WINDOW_MARK}")
    ends_itself = spec.num_steps or spec.duration or spec.whole_body or spec.backend == "nsys"
    if ends_itself:
        return spec
    if spec.trigger is not None:  # a starved rank runs no steps, and would never end the window
        return replace(spec, duration=TRIGGER_SECONDS)
    return replace(spec, num_steps=max(DEFAULT_STEPS, settings.min_steps))


def check_item(item: pytest.Item, settings: Settings) -> str | None:
    """What is wrong with the markers of one test, or None."""
    try:
        key = server_key(item, settings.servers)
        spec = marked_window(item, settings)
        if spec is not None:
            _check_pair(item, key, spec, attached=bool(settings.server))
    except SettingsError as error:
        return f"{item.name}: {error}"
    return None


def _check_pair(item: pytest.Item, key: ServerKey, spec: WindowSpec, *, attached: bool) -> None:
    if not any(name in getattr(item, "fixturenames", ()) for name in FIXTURES):
        raise SettingsError(
            f"@pytest.mark.{WINDOW_MARK} on a test without a server",
            expected="the fixture sglang_server or bench_serving among its arguments",
            hint="add sglang_server to the test's arguments",
        )
    if spec.backend == "nsys" and not key.nsys and not attached:
        raise SettingsError(
            'backend="nsys" on a server that is not started under nsys',
            expected=f"@pytest.mark.{SERVER_MARK}(nsys=True) on the test",
            hint="remove nsys=False, or use the torch backend",
        )


def _server_arguments(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[str, bool | None]:
    unknown = sorted(set(kwargs) - {"name", "nsys"})
    name = kwargs.get("name", args[0] if args else "default")
    nsys = kwargs.get("nsys")
    if unknown or len(args) > 1 or (args and "name" in kwargs):
        found = ", ".join(unknown) or f"{len(args)} positional arguments and {sorted(kwargs)}"
        raise SettingsError(
            f"@pytest.mark.{SERVER_MARK}: unexpected {found}",
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


def _window_backend(node: Any) -> Any:
    mark = node.get_closest_marker(WINDOW_MARK)
    return mark.kwargs.get("backend") if mark else None
