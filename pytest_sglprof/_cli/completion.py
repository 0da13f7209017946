"""`sglprof --completion SHELL`: a script that completes commands, options and their choices."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from shlex import quote


@dataclass(frozen=True)
class Words:
    """What may follow a command. options: each with its choices, () for any value.

    help: of each option, in one line. words: other words that are known: actions of a command.
    """

    options: Mapping[str, tuple[str, ...]]
    help: Mapping[str, str]
    words: tuple[str, ...]


def script(parser: argparse.ArgumentParser, shell: str) -> str:
    """The script for `eval`, or for a file that the shell loads. parser: with every command."""
    commands = {"": _words(parser)}
    for name, command in _subparsers(parser).items():
        commands[name] = _words(command)
    if shell == "fish":
        return "\n".join(_fish(commands)) + "\n"
    head = "#compdef sglprof\nautoload -U +X bashcompinit && bashcompinit\n"
    return (head if shell == "zsh" else "") + _bash(commands)


def _subparsers(parser: argparse.ArgumentParser) -> Mapping[str, argparse.ArgumentParser]:
    parsers: dict[str, argparse.ArgumentParser] = {}
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            parsers.update(action.choices)
    return parsers


def _words(parser: argparse.ArgumentParser) -> Words:
    """Those of a command, and of all its actions."""
    options: dict[str, tuple[str, ...]] = {}
    texts: dict[str, str] = {}
    inner = _subparsers(parser)
    for each in (parser, *(inner.values() if parser.prog.count(" ") else ())):
        for action in each._actions:
            for option in action.option_strings:
                options[option] = tuple(map(str, action.choices or ()))
                texts[option] = " ".join((action.help or "").replace("%%", "%").split())
    return Words(options, texts, tuple(inner))


def _bash(commands: Mapping[str, Words]) -> str:
    """Files are what `-o default` completes where the function has nothing."""
    names = "|".join(name for name in commands if name)
    choices = [
        f'    "{name} {option}") list={quote(" ".join(values))} ;;'
        for name, words in commands.items()
        for option, values in words.options.items()
        if values
    ]
    options = [
        f'    "{name} "-*) list={quote(" ".join(words.options))} ;;'
        for name, words in commands.items()
    ]
    others = [
        f'    "{name} "*) list={quote(" ".join(words.words))} ;;'
        for name, words in commands.items()
        if words.words
    ]
    lines = [
        "_sglprof() {",
        "  local cur=${COMP_WORDS[COMP_CWORD]} prev=${COMP_WORDS[COMP_CWORD-1]} command= list= i",
        "  for ((i = 1; i < COMP_CWORD; i++)); do",
        "    case ${COMP_WORDS[i]} in",
        f"      {names}) command=${{COMP_WORDS[i]}}; break ;;",
        "    esac",
        "  done",
        '  case "$command $prev" in',
        *choices,
        '  *) case "$command $cur" in',
        *options,
        *others,
        "    esac ;;",
        "  esac",
        '  COMPREPLY=($(compgen -W "$list" -- "$cur"))',
        "}",
        "complete -o default -F _sglprof sglprof",
    ]
    return "\n".join(lines) + "\n"


def _fish(commands: Mapping[str, Words]) -> Iterator[str]:
    for name, words in commands.items():
        where = f"__fish_seen_subcommand_from {name}" if name else "__fish_use_subcommand"
        begin = f"complete -c sglprof -n {quote(where)}"
        for word in words.words:
            yield f"{begin} -f -a {quote(word)}"
        for option, values in words.options.items():
            flag = f"-l {option[2:]}" if option.startswith("--") else f"-s {option[1:]}"
            given = f" -x -a {quote(' '.join(values))}" if values else ""
            yield f"{begin} {flag}{given} -d {quote(words.help[option])}"
