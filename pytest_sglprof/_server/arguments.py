"""How SGLang reads its arguments: other spellings, abbreviations, and what `--config FILE` holds.

SGLang reads its command line with argparse, which takes an option by any beginning that fits no
other: `--dp 2` is `--dp-size 2`. `--config FILE` puts the options of a YAML file before those of
the command line, so that the latter win.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pytest_sglprof._errors import SettingsError

# The options that are read here, with the other spellings that SGLang 0.4.4 to 0.5.23 take.
_SPELLINGS: dict[str, tuple[str, ...]] = {
    "--model-path": ("--model",),
    "--host": (),
    "--port": (),
    "--nccl-port": (),
    "--watchdog-timeout": (),
    "--device": (),
    "--base-gpu-id": (),
    "--dp-size": ("--data-parallel-size",),
    "--enable-dp-attention": (),
    "--api-key": (),
    "--admin-api-key": (),
    "--config": (),
    "--ssl-keyfile": (),
    "--ssl-certfile": (),
    "--ssl-ca-certs": (),
    "--ssl-keyfile-password": (),
}
_EXACT = {spelling for name, others in _SPELLINGS.items() for spelling in (name, *others)}
SECRET_OPTIONS = ("--api-key", "--admin-api-key", "--ssl-keyfile-password")


def is_option(word: str, name: str) -> bool:
    """True if SGLang takes `word`, with or without `=VALUE`, for the option `name`.

    A beginning that fits several options is an error of SGLang's own, whatever is said here.
    """
    head = word.partition("=")[0]
    spellings = (name, *_SPELLINGS.get(name, ()))
    if head in _EXACT or head == "--" or not head.startswith("--"):
        return head in spellings
    return any(spelling.startswith(head) for spelling in spellings)


def has_option(words: Sequence[str], name: str) -> bool:
    """True if the command line has the option."""
    return any(is_option(word, name) for word in words)


def option(words: Sequence[str], name: str) -> str | None:
    """The last value of an option in a command line, written `NAME VALUE` or `NAME=VALUE`."""
    value = None
    for number, word in enumerate(words):
        if is_option(word, name):
            if "=" in word:
                value = word.partition("=")[2]
            elif number + 1 < len(words):
                value = words[number + 1]
    return value


# `--config FILE`.

CONFIG = "--config"
_LIMIT = 120.0  # s; as for the look at an interpreter

# The server's own YAML reader decides what the file says.
_READ = """
import json, sys
if sys.path[0] == "":
    del sys.path[0]
try:
    import yaml
except ImportError:
    sys.exit(3)
with open(sys.argv[1], encoding="utf-8") as file:
    try:
        print(json.dumps(yaml.safe_load(file), default=str))
    except (yaml.YAMLError, TypeError, ValueError) as error:
        sys.exit(f"{error}")
"""
_NO_YAML = 3


def config_words(python: str, args: Sequence[str]) -> tuple[str, ...]:
    """What `--config FILE` of a server's `args` holds, as words; () without that option.

    python: the server's interpreter, whose PyYAML reads the file. As SGLang does it, a relative
    FILE is looked for in the working folder. Raises `SettingsError` for what SGLang would refuse
    or, worse, ignore.
    """
    file = _config_file(args)
    if file is None:
        return ()
    held = _read(python, file)
    if held is None:
        return ()
    if not isinstance(held, dict):
        raise SettingsError(
            f"{CONFIG} {file} holds a {type(held).__name__}",
            expected="options of SGLang, a line each: tp-size: 2",
            hint="correct the file",
        )
    return tuple(word for key, value in held.items() for word in _words(f"--{key}", value))


def without_config(args: Sequence[str]) -> tuple[str, ...]:
    """`args` without `--config FILE`."""
    if CONFIG not in args:
        return tuple(args)
    at = list(args).index(CONFIG)
    return (*args[:at], *args[at + 2 :])


def _config_file(args: Sequence[str]) -> Path | None:
    given = [word for word in args if is_option(word, CONFIG) or word == "-c"]
    if not given:
        return None
    # SGLang looks for this very word. It takes any other spelling as well, and ignores it.
    if given != [CONFIG] or args[-1] == CONFIG:
        raise SettingsError(
            f"args have {' and '.join(given)}",
            expected=f'"{CONFIG}", "FILE" as two words, once: SGLang reads no other spelling',
            hint=f'write args = ["{CONFIG}", "server.yaml"]',
        )
    file = Path(args[list(args).index(CONFIG) + 1])
    problem = (
        "is not named .yaml or .yml"
        if file.suffix.lower() not in (".yaml", ".yml")
        else "does not exist"
        if not file.exists()
        else ""
        if file.is_file()
        else "is not a file"
    )
    if problem:
        raise SettingsError(
            f"{CONFIG} {file} {problem}",
            expected="a YAML file with options of SGLang",
            hint=f"correct the path; a relative one begins in {Path.cwd()}",
        )
    return file


def _read(python: str, file: Path) -> Any:
    try:
        answer = subprocess.run(
            [python, "-c", _READ, str(file)],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_LIMIT,
            check=True,
        )
    except (OSError, subprocess.SubprocessError) as error:
        if getattr(error, "returncode", 0) == _NO_YAML:
            raise SettingsError(
                f"{CONFIG} {file} cannot be read: {python} has no PyYAML",
                expected="the package pyyaml, with which SGLang reads the file as well",
                hint="install it there, or write the options into args",
            ) from error
        output = getattr(error, "stderr", None) or str(error)
        raise SettingsError(
            f"{CONFIG} {file} cannot be read",
            expected="a YAML file with options of SGLang",
            hint="correct the file",
            log=str(output).strip().splitlines()[-5:],
        ) from error
    return json.loads(answer.stdout.strip().splitlines()[-1])


def _words(name: str, value: Any) -> list[str]:
    """One key of the file as SGLang turns it into words.

    `false` switches off what is off anyway; options that take true or false are not read here.
    """
    if isinstance(value, bool):
        return [name] if value else []
    if isinstance(value, list):
        return [name, *map(str, value)] if value else []
    return [name, json.dumps(value) if isinstance(value, Mapping) else str(value)]
