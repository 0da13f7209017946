"""The nsys commands in our documents and examples, against what nsys says that it knows.

tests/data/nsys-2023.4.4-options.json holds the options in the real `--help` of each command. An
option that 2023.4 has not is marked on its line, and so is one that newer versions call otherwise.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from pytest_sglprof._nsys import REFUSED

COMMAND = re.compile(
    r"\bnsys (profile|launch|start|stop|shutdown|sessions list|export|stats)\b"
    r"((?:\\\n|[^`\n]|\n(?=--))*)"
)
NSYS_ARGS = re.compile(r"nsys_args\s*=\s*\[([^\]]*)\].*")
OPTION = re.compile(r"(?<![\w-])--[a-z][\w-]*")
RENAMED = {"--gpu-metrics-device", "--gpu-metrics-frequency"}  # in newer versions


def documents(root: Path) -> list[Path]:
    patterns = ("*.md", "docs/*.md", "conftest_examples/**/*", "ci/*.yml", "ci/*.sh")
    return [path for each in patterns for path in sorted(root.glob(each)) if path.is_file()]


def commands(text: str) -> list[tuple[str, str, str]]:
    """(command, its options, the line or lines that it stands in)."""
    pairs = [(match[1], match[2], match[0]) for match in COMMAND.finditer(text)]
    return pairs + [("profile", match[1], match[0]) for match in NSYS_ARGS.finditer(text)]


def faults(text: str, known: dict[str, list[str]]) -> list[str]:
    return [
        f"nsys {command} {option}"
        for command, options, lines in commands(text)
        for option in OPTION.findall(options)
        if (option not in known[command] or option in RENAMED) and "2023.4" not in lines
    ]


@pytest.fixture(scope="module")
def known(project_root: Path) -> dict[str, list[str]]:
    path = project_root / "tests" / "data" / "nsys-2023.4.4-options.json"
    options: dict[str, list[str]] = json.loads(path.read_text())
    return options


def test_every_command_in_our_documents_is_valid_or_marked(project_root, known):
    texts = {path.name: path.read_text() for path in documents(project_root)}
    assert sum(len(commands(text)) for text in texts.values()) >= 8
    bad = {name: wrong for name, text in texts.items() if (wrong := faults(text, known))}
    assert not bad


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("`nsys stop --session=a --output=b`", ["nsys stop --output"]),
        ("nsys profile --trace=cuda \\\n  --gpu-metrics-devices=all", 1),
        ("`nsys start --capture-range=a\n--no-such=b`", ["nsys start --no-such"]),
        ('nsys_args = ["--gpu-metrics-devices=all"]', 1),
        ('nsys_args = ["--gpu-metrics-devices=all"]  # 2023.4: --gpu-metrics-device', []),
        ('nsys_args = ["--gpu-metrics-device=all"]', 1),
        ("`nsys profile --start-later` and sglprof --steps", []),
    ],
)
def test_a_wrong_command_is_seen(known, text, wrong):
    seen = faults(text, known)
    assert len(seen) == wrong if isinstance(wrong, int) else seen == wrong


def test_what_we_refuse_are_options_of_nsys(known):
    assert set(REFUSED) - {"--session"} <= set(known["profile"])
