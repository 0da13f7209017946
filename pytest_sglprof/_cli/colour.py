"""Colour on a terminal: only for the words of verdicts and the name of the slow rank."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import TextIO

RED, GREEN, YELLOW, BOLD = "31", "32", "33", "1"
OF_WORD = {"fail": RED, "pass": GREEN, "inconclusive": YELLOW, "measured": BOLD}
# At the start of a line, where it may stand behind the group that it is about.
_WORD = re.compile(rf"^((?:[A-Z_0-9 ]+: )?)({'|'.join(OF_WORD)})(?=: |$)", re.MULTILINE)


def wants_colour(stream: TextIO, environment: Mapping[str, str]) -> bool:
    """NO_COLOR and FORCE_COLOR decide where they are not empty, else whether it is a terminal.

    As https://no-color.org and https://force-color.org say; NO_COLOR counts first.
    """
    if environment.get("NO_COLOR"):
        return False
    if environment.get("FORCE_COLOR"):
        return True
    return stream.isatty() and environment.get("TERM") != "dumb"


def coloured(text: str, slow: Collection[str] = ()) -> str:
    """The text of a command with colour. slow: labels of ranks, which begin a row of a table."""
    text = _WORD.sub(lambda at: at[1] + _painted(at[2], OF_WORD[at[2]]), text)
    if not slow:
        return text
    labels = "|".join(map(re.escape, sorted(slow, key=len, reverse=True)))
    row = re.compile(rf"^({labels})(?=  |$)", re.MULTILINE)
    return row.sub(lambda at: _painted(at[1], RED), text)


def _painted(text: str, style: str) -> str:
    return f"\x1b[{style}m{text}\x1b[0m"
