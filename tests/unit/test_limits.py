"""What reading may cost: nesting, memory, and patterns that never end."""

from __future__ import annotations

import gzip
import json
import os
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from pytest_sglprof import _limits as limits
from pytest_sglprof._cli.main import main
from pytest_sglprof._errors import SettingsError, SglprofError, TraceError
from pytest_sglprof._limits import matching, most_memory, read_bytes, refuse_deep
from pytest_sglprof._trace.read import read_window
from tests.support.kineto import document, event, kernel, write

ENDLESS = "(a+)+$"
NAME = "a" * 60 + "!"


def test_half_of_the_memory_is_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(limits.READ_GIB, raising=False)
    assert 0 < most_memory() <= psutil.virtual_memory().total / 2
    monkeypatch.setattr(limits, "_memories", lambda: iter([8 << 30, 3 << 30, 9 << 60]))
    assert most_memory() == 3 << 29
    monkeypatch.setenv(limits.READ_GIB, "0.25")
    assert most_memory() == 1 << 28


def test_the_groups_above_limit_as_well() -> None:
    files = {*limits._limits_of_cgroup()}
    assert all(file.is_relative_to("/sys/fs/cgroup") for file in files)
    assert {file.name for file in files} <= {"memory.max", "memory.limit_in_bytes"}


@pytest.mark.parametrize("value", ["much", "-1", "nan", "inf"])
def test_a_wrong_limit_is_named(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv(limits.READ_GIB, value)
    with pytest.raises(SettingsError, match=f"{limits.READ_GIB} is '{value}'"):
        most_memory()


def test_a_file_that_is_decoded_has_a_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(limits.READ_GIB, "0.0001")
    path = tmp_path / "results.json"
    path.write_bytes(b" " * 4_000)
    assert len(read_bytes(path)) == 4_000
    path.write_bytes(b" " * 8_000)
    with pytest.raises(SglprofError, match=r"results\.json can only be read as a whole") as caught:
        read_bytes(path)
    assert limits.READ_GIB in caught.value.hint
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=pipe.write_bytes, args=[b"x" * 8_000])
    writer.start()
    with pytest.raises(TraceError, match="pipe can only be read as a whole"):
        read_bytes(pipe, error=TraceError)
    writer.join()


def nested(levels: int) -> Any:
    value: Any = 1
    for _ in range(levels):
        value = [value] if levels % 2 else {"a": value}
    return value


@pytest.mark.parametrize("levels", [limits.MOST_LEVELS - 1, 50_000, 50_001])
def test_nesting_has_a_limit(levels: int) -> None:
    if levels < limits.MOST_LEVELS:
        refuse_deep(nested(levels))
    else:
        with pytest.raises(ValueError, match="nested too deeply"):
            refuse_deep(nested(levels))


# Patterns.


def test_what_a_pattern_matches() -> None:
    names = ["void gemm<4>(float*)", "attention_fwd", "ncclKernel", "\ud800 ü"]
    for expression in ("gemm|attention", r"^\w+$", "(?i)NCCL.*", "ü$", "gemm<[0-9]+>", "x{2}"):
        expected = {name for name in names if limits.re.search(expression, name)}
        assert matching(expression, names) == expected
        assert matching(expression, [*names, "another gemm"]) >= expected


def test_a_pattern_without_an_end_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "PATTERN_SECONDS", 1)
    before = set(psutil.Process().children())  # those of other tests in this process
    begin = time.monotonic()
    with pytest.raises(SettingsError) as caught:
        matching(ENDLESS, ["b", NAME, "c"], "the pattern of category moe")
    assert time.monotonic() - begin < 100  # of which it had 1 s of CPU
    assert caught.value.what.startswith("the pattern of category moe needs more than 1 s")
    assert repr(NAME) in caught.value.what
    assert matching(ENDLESS, ["b", "aaa"]) == {"aaa"}
    assert set(psutil.Process().children()) <= before


@pytest.mark.parametrize("expression", ["(", "a{99999999999999}", "(" * 5_000, "[[a]"])
def test_what_is_no_pattern_is_a_mistake_of_the_user(expression: str) -> None:
    with pytest.raises(SettingsError, match="is not a regular expression"):
        matching(expression, ["x"])


@pytest.mark.parametrize(
    "words",
    [
        ["check", "--step-delimiter", ENDLESS],
        ["kernels", "--set", f"category=[{{name='moe', pattern='{ENDLESS}'}}]"],
        ["check", "--kernel", ENDLESS],
        ["check", "--set", f"threshold=[{{metric='slowdown', limit=1.1, kernel='{ENDLESS}'}}]"],
    ],
    ids=" ".join,
)
def test_every_pattern_of_a_user_is_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: Any
) -> None:
    monkeypatch.setattr(limits, "PATTERN_SECONDS", 1)
    monkeypatch.setattr(limits, "_known", {})
    monkeypatch.chdir(tmp_path)
    for rank in range(2):
        events = [kernel(NAME, 10.0 * at, 5.0, correlation=at) for at in range(9)]
        write(tmp_path / "traces", document(events, rank=rank), f"1-TP-{rank}.trace.json")
    assert main([words[0], "traces", *words[1:]]) == 2
    assert "needs more than 1 s" in capsys.readouterr().err


# Memory and nesting of traces.


def bomb(path: Path, unit: bytes, count: int) -> Path:
    path.write_bytes(gzip.compress(b'{"traceEvents": [' + unit * count + b"]}", 1))
    return path


@pytest.mark.parametrize(
    ("unit", "count"),
    [(b" " * 1_000, 1_500), (b"{},", 100_000), (b'{"name": "' + b"x" * 1_500_000, 1)],
    ids=["blanks", "events of nothing", "one event"],
)
def test_a_packed_file_is_refused_before_memory_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    unit: bytes, count: int,
) -> None:  # fmt: skip
    monkeypatch.setenv(limits.READ_GIB, "0.001")
    path = bomb(tmp_path / "1-TP-0.trace.json.gz", unit, count)
    assert path.stat().st_size < 1 << 20
    with pytest.raises(TraceError, match="can only be read as a whole") as caught:
        read_window(path)
    assert str(path) in caught.value.what
    before = psutil.Process().memory_info().rss
    for words in (["kernels"], ["check"], ["export", "--to", "perfetto", "-o", "m.json.gz"]):
        assert main([words[0], str(path), *words[1:]]) == 2
        assert "can only be read as a whole" in capsys.readouterr().err
    assert psutil.Process().memory_info().rss - before < 50 << 20


DEEP = "[" * 100_000 + "]" * 100_000


def deep_in(event_text: str) -> str:
    return event_text.replace('"DEEP"', DEEP)


@pytest.mark.parametrize("is_kernel", [True, False])
def test_deep_arguments_are_an_error_or_a_note(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    is_kernel: bool,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    operator = event("cpu_op", "aten::mm", 1, 2, 5, 5, deep="x" if is_kernel else "DEEP")
    first = kernel("gemm", 10, 5, **({"deep": "DEEP"} if is_kernel else {}))
    text = deep_in(json.dumps(document([operator, first, kernel("silu", 20, 5)])))
    path = tmp_path / "1-TP-0.trace.json"
    path.write_text(text)
    for words in (["kernels"], ["check"], ["export", "--to", "perfetto", "-o", "m.json.gz"]):
        status = main([words[0], str(path), *words[1:]])
        err = capsys.readouterr().err
        assert "Traceback" not in err
        if words[0] == "export":  # leaves out what it cannot move
            assert status == 0
            assert not is_kernel or "1 kernel events left out" in err
        elif is_kernel:
            assert status == 2
            assert "nested too deeply" in err
    if not is_kernel:
        table = read_window(path)
        assert sorted(table.frame["full_name"]) == ["gemm", "silu"]
        assert any("skipped" in note for note in table.notes)


def test_deep_documents_are_refused_by_every_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path, document([kernel("gemm", 10, 5)], rank=0), "traces/1-TP-0.trace.json")
    texts = {
        "results.json": f'{{"schema_version": {{"major": 1, "minor": 0}}, "x": {DEEP}}}',
        "baselines/x.json": f'{{"format": [1, 0], "x": {DEEP}}}',
        "history/x.jsonl": f'{{"format": [1, 0], "x": {DEEP}}}',
        "deep.toml": f"[server]\nargs = {DEEP}",
        "server_info.json": DEEP,
    }
    for name, text in texts.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    for words in (
        ["report", "results.json"],
        ["compare", "results.json", "results.json"],
        ["baseline", "list", "--baselines", "baselines"],
        ["compare", "baselines/x.json", "baselines/x.json"],
        ["history", "."],
        ["kernels", "traces", "--config", "deep.toml"],
        ["check", "traces", "--server-info", "server_info.json"],
    ):
        assert main(words) == 2, words
        err = capsys.readouterr().err
        assert "Traceback" not in err
        assert "nested too deeply" in err or "is not JSON" in err
