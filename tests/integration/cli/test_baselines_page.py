"""docs/baselines.md: its commands, options, settings and Python exist, its figures are ours."""

from __future__ import annotations

import math
import re
import shlex
from pathlib import Path

import pytest

from pytest_sglprof._analysis.lives import FAIL_ALPHA, LifeChange
from pytest_sglprof._cli.main import COMMANDS, _module, _parser, main
from pytest_sglprof._config.load import load_config
from pytest_sglprof._config.options import OPTIONS

ROOT = Path(__file__).parents[3]
PAGE = (ROOT / "docs" / "baselines.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", PAGE, flags=re.MULTILINE | re.DOTALL)
LINES = [line for kind, text in BLOCKS if kind == "bash" for line in text.splitlines()]
LINES += re.findall(r"`((?:sglprof|pytest) [^` …]+ [^`…]+)`", PAGE)  # in sentences and tables
TABLE = re.compile(r"^\| ([\d.]+) % \|" + r" \+([\d.]+) % \|" * 4, flags=re.MULTILINE)


def words_of(line: str) -> list[str]:
    return shlex.split(line, comments=True)


@pytest.mark.parametrize("line", sorted({each for each in LINES if each.startswith("sglprof ")}))
def test_each_command_is_understood(
    line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words = words_of(line)[1:]
    assert words[0] in COMMANDS
    _parser({words[0]: _module(words[0])}).parse_args(words)


def test_the_page_has_all_commands_of_baselines() -> None:
    shown = {words_of(line)[1] for line in LINES if line.startswith("sglprof ")}
    assert shown >= {"baseline", "history", "compare", "ab"}
    actions = {words_of(line)[2] for line in LINES if line.startswith("sglprof baseline ")}
    assert actions == {"list", "show", "accept", "prune"}
    assert main(["history", "--help"]) == 0


@pytest.mark.parametrize("line", sorted({each for each in LINES if each.startswith("pytest ")}))
def test_each_option_of_pytest_exists(line: str) -> None:
    known = {f"--sglprof-{option.name.replace('_', '-')}" for option in OPTIONS} | {"--sglprof"}
    flags = {word.partition("=")[0] for word in words_of(line) if word.startswith("--sglprof")}
    assert flags <= known
    assert flags


def test_settings_are_those_of_the_configuration(tmp_path: Path) -> None:
    parts = [text for kind, text in BLOCKS if kind == "toml"]
    assert len(parts) >= 2
    for number, text in enumerate(parts):
        file = tmp_path / f"{number}.toml"
        file.write_text(text, encoding="utf-8")
        load_config(file)
    keys = {option.last_key for option in OPTIONS if option.table == "baseline"}
    named = set(re.findall(r"`(\w+) = [^`]+`", PAGE)) - {"metric", "limit", "kernel", "stage"}
    assert named <= keys | {"min_us"}
    assert {"confirm", "fail_after", "min_age_days", "min_age_lives"} <= named


@pytest.mark.parametrize("code", [text for kind, text in BLOCKS if kind == "python"])
def test_python_can_be_compiled(code: str) -> None:
    compile(code, "docs/baselines.md", "exec")


def test_what_can_be_seen_is_what_the_gate_would_print() -> None:
    rows = TABLE.findall(PAGE)
    assert len(rows) == 4
    for sd, *shown in rows:
        lives = [
            (5, 1, FAIL_ALPHA),
            (10, 1, FAIL_ALPHA),
            (20, 1, FAIL_ALPHA),
            (10, 4, FAIL_ALPHA / 3),
        ]
        for (accepted, fresh, alpha), text in zip(lives, shown, strict=True):
            error = float(sd) / 100 * math.sqrt(1 / accepted + 1 / fresh)
            change = LifeChange(
                accepted=accepted,
                fresh=fresh,
                log_ratio=0.0,
                error=error,
                freedom=accepted + fresh - 2.0,
                sd=float(sd) / 100,
            )
            assert float(text) == pytest.approx(100 * (change.detects(1.05, alpha) - 1), abs=0.05)
