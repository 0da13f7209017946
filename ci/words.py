"""``python -m ci.words``: finds what `ci/words.txt` says must not come back.

`name` rows are matched against whole identifiers of Python, `prose` rows against
documentation, docstrings, comments and string literals. Prints each place with what to write
instead; the exit status is 1 where there is any.
"""

from __future__ import annotations

import ast
import io
import re
import subprocess
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
WORDS = ROOT / "ci/words.txt"
CODE = ("pytest_sglprof", "benchmarks", "ci", "conftest_examples")  # tests quote what they refuse
PROSE = ("*.md", "docs/*.md", "pytest_sglprof/*.j2", "pytest_sglprof/*.html")


class Rule(NamedTuple):
    """A word that must not come back. kind: "name" or "prose"."""

    kind: str
    pattern: re.Pattern[str]
    instead: str


def rules(text: str) -> list[Rule]:
    """The rows of `ci/words.txt`. Raises ValueError for a row that is not one."""
    result = []
    for line in text.splitlines():
        if line.strip() and not line.startswith("#"):
            row = re.fullmatch(r"(name|prose)\s+(.+?)\s+->\s+(.+)", line)
            if row is None:
                raise ValueError(f"ci/words.txt: expected KIND PATTERN -> INSTEAD, got {line!r}")
            kind, pattern, instead = row.groups()
            if kind == "prose":  # a sentence may be broken anywhere
                pattern = pattern.replace(" ", r"\s+")
            result.append(Rule(kind, re.compile(pattern, re.IGNORECASE), instead))
    return result


def names(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Each identifier that a module gives to something, with its line."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.lineno, node.id
        elif isinstance(node, ast.arg):
            yield node.lineno, node.arg
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.lineno, node.name


def prose(source: str) -> Iterator[tuple[int, str]]:
    """Each comment (adjacent lines as one) and string literal of a module, with its line."""
    start, comment = 0, ""
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            start = start if comment else token.start[0]
            comment += token.string.lstrip("#")
        elif token.type not in (tokenize.NL, tokenize.NEWLINE, tokenize.INDENT):
            if comment:
                yield start, comment
            comment = ""
            if token.type == tokenize.STRING or tokenize.tok_name[token.type] == "FSTRING_MIDDLE":
                yield token.start[0], token.string


def matches(path: str, text: str, rows: list[Rule]) -> Iterator[str]:
    """A line of the report for each place in one file that a row forbids."""
    if path.endswith(".py"):
        for number, name in names(ast.parse(text)):
            for row in rows:
                if row.kind == "name" and row.pattern.fullmatch(name):
                    yield f"{path}:{number}: {name} -> {row.instead}"
    for start, passage in prose(text) if path.endswith(".py") else [(1, text)]:
        for row in rows:
            if row.kind == "prose":
                for match in row.pattern.finditer(passage):
                    number = start + passage.count("\n", 0, match.start())
                    yield f"{path}:{number}: {' '.join(match[0].split())} -> {row.instead}"


def main() -> int:
    """Print all places; 1 where there are any."""
    rows = rules(WORDS.read_text())
    command = ["git", "-C", str(ROOT), "ls-files", "--", *CODE, *PROSE]
    files = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
    places = [
        place
        for path in files
        if path.endswith((".py", ".md", ".j2", ".html"))
        for place in matches(path, (ROOT / path).read_text(), rows)
    ]
    print("\n".join(places) or f"nothing of {WORDS.name} in {len(files)} files")
    return bool(places)


if __name__ == "__main__":
    sys.exit(main())
