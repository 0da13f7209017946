"""The script of `sglprof --completion`, in a real bash."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from pytest_sglprof._cli.main import COMMANDS, main

Output = pytest.CaptureFixture[str]


@pytest.fixture
def bash_script(tmp_path: Path, capsys: Output) -> Path:
    assert main(["--completion", "bash"]) == 0
    file = tmp_path / "sglprof.bash"
    file.write_text(capsys.readouterr().out)
    return file


def completed(script: Path, *words: str) -> list[str]:
    """What bash offers for the last of `words`."""
    bash = shutil.which("bash")
    if bash is None:
        pytest.skip("no bash")
    line = 'source "$1"; shift; COMP_WORDS=(sglprof "$@"); COMP_CWORD=$#; _sglprof; '
    line += 'printf "%s\\n" "${COMPREPLY[@]}"'
    command = [bash, "--norc", "-uc", line, "bash", str(script), *words]
    shown = subprocess.run(command, capture_output=True, text=True, check=True)
    assert shown.stderr == ""
    return shown.stdout.split()


def test_commands_in_the_order_of_use(bash_script: Path) -> None:
    assert completed(bash_script, "") == list(COMMANDS)
    assert completed(bash_script, "re") == [name for name in COMMANDS if name.startswith("re")]
    used = ["watch", "record", "kernels", "check", "compare", "report", "export", "ab"]
    assert [name for name in COMMANDS if name in used] == used


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        (("check", "--met"), ["--metric"]),
        (("check", "w/", "--metric", "slow"), ["slowdown"]),
        (("export", "--to", ""), ["perfetto", "nsight", "svg", "png"]),
        (("--comp",), ["--completion"]),
        (("--completion", ""), ["bash", "zsh", "fish"]),
        (("baseline", ""), ["list", "show", "accept", "prune"]),
        (("baseline", "accept", "--rea"), ["--reason"]),
        (("kernels", "--sort", "total"), ["total_ns"]),
        (("kernels", "some"), []),
    ],
)
def test_options_and_their_choices(
    bash_script: Path, words: tuple[str, ...], offered: list[str]
) -> None:
    assert completed(bash_script, *words) == offered


def test_every_option_of_every_command_is_offered(bash_script: Path, capsys: Output) -> None:
    for name in COMMANDS:
        offered = completed(bash_script, name, "--")
        assert main([name, "--help"]) == 0
        usage = capsys.readouterr().out.partition("\n\n")[0].split()
        asked = {word.strip("[]|,") for word in usage if word.strip("[").startswith("--")}
        assert asked <= {*offered}, name


def test_files_are_completed_where_nothing_else_is(bash_script: Path, tmp_path: Path) -> None:
    text = bash_script.read_text()
    assert text.endswith("complete -o default -F _sglprof sglprof\n")


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_scripts_of_other_shells(shell: str, tmp_path: Path, capsys: Output) -> None:
    assert main(["--completion", shell]) == 0
    text = capsys.readouterr().out
    assert all(name in text for name in COMMANDS)
    assert "--metric" in text if shell == "zsh" else "-l metric -x -a" in text
    if (program := shutil.which(shell)) is not None:
        file = tmp_path / "script"
        file.write_text(text)
        check = "-n" if shell == "zsh" else "--no-execute"
        subprocess.run([program, check, str(file)], check=True, env=dict(os.environ))
