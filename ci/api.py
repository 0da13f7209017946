"""``python -m ci.api``: everything that is public, a line each, as `tests/data/api.txt` holds it.

The file is compared with the code by a test, so that no public name, option, key or exit status
comes, goes or changes unseen (docs/stability.md). This command writes it.
"""

from __future__ import annotations

import argparse
import inspect
import json
import sys
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

from _pytest.fixtures import FixtureFunctionDefinition

import pytest_sglprof
from pytest_sglprof._cli import main as command_line
from pytest_sglprof._config.model import WindowSpec
from pytest_sglprof._config.options import OPTIONS
from pytest_sglprof._errors import ExitStatus
from pytest_sglprof._metrics import METRICS
from pytest_sglprof._plugin import hooks, hookspec
from pytest_sglprof._plugin.markers import MARKER_HELP

ROOT = Path(__file__).resolve().parents[1]
API = ROOT / "tests/data/api.txt"
SCHEMAS = Path(pytest_sglprof.__file__).parent / "schemas"

# What docs/servers.md, docs/windows.md and docs/watch.md promise of the fixtures' values.
OF_FIXTURES = {
    "BenchServing": ("__call__", "running"),
    "LoadWatch": ("frame", "samples"),
    "ProfileWindow": ("__call__",),
    "Server": ("url", "client", "info", "sizes", "kind", "log"),
    "Window": ("open", "wait", "close", "check", "capture", "table", "verdict"),
}


def describe() -> str:
    """The content of `tests/data/api.txt`."""
    sections = {
        "names": _names(),
        "fixtures": _fixtures(),
        "markers": _markers(),
        "hooks": _hooks(),
        "options of pytest": _options(),
        "commands": _commands(),
        "exit statuses": (f"{status.value} {status.name}" for status in ExitStatus),
        "sglprof.toml": _toml_keys(),
        "schemas": _schemas(),
    }
    return "\n".join(
        f"[{title}]\n" + "".join(f"{x}\n" for x in sections[title]) for title in sections
    )


def _names() -> Iterator[str]:
    for name in sorted(pytest_sglprof.__all__):
        value = getattr(pytest_sglprof, name)
        if name in OF_FIXTURES:  # made by a fixture, not by its constructor
            for attribute in OF_FIXTURES[name]:
                member = inspect.getattr_static(value, attribute, None)
                yield f"{name}.{attribute}" + (_signature(member) if callable(member) else "")
        elif callable(value):
            yield name + _signature(value)
        else:
            yield name


def _signature(value: Any) -> str:
    """Parameters and their defaults; types are no part of what is promised."""
    try:
        parameters = inspect.signature(value).parameters.values()
    except ValueError:
        return "(...)"
    bare = [each.replace(annotation=inspect.Parameter.empty) for each in parameters]
    shown = [each.replace(default=...) if _is_long(each.default) else each for each in bare]
    return str(inspect.Signature(shown))


def _is_long(default: Any) -> bool:
    """True where a default shows where it lies in memory, or is an object of its own."""
    simple = (str, int, float, bool, tuple, type(None), type(inspect.Parameter.empty))
    return default is not inspect.Parameter.empty and not isinstance(default, simple)


def _fixtures() -> Iterator[str]:
    for name, value in vars(hooks).items():
        if isinstance(value, FixtureFunctionDefinition):
            yield name


def _markers() -> Iterator[str]:
    for text in MARKER_HELP:
        yield text.partition("(")[0]
    yield from (f"profile_window({each.name}=)" for each in fields(WindowSpec))
    yield from (f"profile_window({name}=)" for name in (*METRICS, "across"))


def _hooks() -> Iterator[str]:
    for name, value in vars(hookspec).items():
        if name.startswith("pytest_"):
            yield name + _signature(value)


def _options() -> Iterator[str]:
    for option in OPTIONS:
        flag = option.pytest_flag if option.pytest else "-"
        yield f"{flag} {option.env} {option.key or '-'}"


def _commands() -> Iterator[str]:
    for name in command_line.COMMANDS:
        yield name
        parser = command_line._parser({name: command_line._module(name)})
        for action in _command(parser, name)._actions:
            yield f"{name} {'/'.join(action.option_strings) or action.metavar or action.dest}"


def _command(parser: argparse.ArgumentParser, name: str) -> argparse.ArgumentParser:
    choices = next(each.choices for each in parser._actions if isinstance(each.choices, dict))
    command: argparse.ArgumentParser = choices[name]
    return command


def _toml_keys() -> Iterator[str]:
    schema = json.loads((SCHEMAS / "config.schema.json").read_text(encoding="utf-8"))

    def walk(node: dict[str, Any], path: str) -> Iterator[str]:
        if "$ref" in node:
            node = schema["$defs"][node["$ref"].rpartition("/")[2]]
        for key, child in node.get("properties", {}).items():
            yield f"{path}{key}"
            yield from walk(child, f"{path}{key}.")
        for part, mark in (("items", "[]"), ("additionalProperties", "NAME")):
            if isinstance(node.get(part), dict):
                yield from walk(
                    node[part], f"{path.removesuffix('.')}{'' if mark == '[]' else '.'}{mark}."
                )

    yield from walk(schema, "")


def _schemas() -> Iterator[str]:
    for path in sorted(SCHEMAS.glob("*.json")):
        yield f"{path.name} {json.loads(path.read_text(encoding='utf-8')).get('$id', '')}".rstrip()


def main() -> int:
    """Write the file."""
    API.write_text(describe(), encoding="utf-8")
    print(f"{API.relative_to(ROOT)}: {len(describe().splitlines())} lines")
    return 0


if __name__ == "__main__":
    sys.exit(main())
