"""The journal in run.json: many write it at once, and what cannot be read of it is passed over."""

from __future__ import annotations

import fcntl
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec
import pytest

from pytest_sglprof._process import ProcessId
from pytest_sglprof._server import journal
from pytest_sglprof._server.journal import (
    KeptServer,
    change_server,
    end_server,
    kept_servers,
    note_server,
)


def server(number: int) -> KeptServer:
    return KeptServer(
        life=f"{number:012x}",
        folder=f"servers/default+nsys.{number}",
        since=1.5,
        stop_timeout=60.0,
        owner=ProcessId(1, 2),
        keeper=ProcessId(3, 4),
    )


def content(run: Path) -> dict[str, object]:
    loaded: dict[str, object] = json.loads((run / "run.json").read_text())
    return loaded


@pytest.fixture
def run(tmp_path: Path) -> Path:
    (tmp_path / "run.json").write_text('{"id": "run-1"}')
    return tmp_path


def test_nothing_is_lost_when_many_write_at_once(run: Path) -> None:
    def live(number: int) -> None:
        note_server(server(number), run)
        folder = run / server(number).folder
        change_server(folder, server(number).life, ports=[number], server=ProcessId(number, 7))
        left = ("process 1",) if number % 2 else ()
        end_server(folder, server(number).life, left)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(live, range(24)))
    read = sorted(kept_servers(content(run)), key=lambda each: each.life)
    assert [each.life for each in read] == [server(number).life for number in range(24)]
    assert [each.ports for each in read] == [(number,) for number in range(24)]
    assert [each.server for each in read] == [ProcessId(number, 7) for number in range(24)]
    assert [bool(each.left) for each in read] == [bool(number % 2) for number in range(24)]
    assert all(each.ended for each in read)
    assert content(run)["id"] == "run-1"
    assert [path.name for path in run.iterdir()] == ["run.json"]


def test_without_a_run_nothing_is_written(tmp_path: Path) -> None:
    note_server(server(1), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_lock_that_is_never_given_back_is_an_error(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal, "LOCK_WAIT", 0.1)
    with (run / "run.json").open("rb") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        with pytest.raises(TimeoutError, match="another process has held its lock"):
            note_server(server(1), run)
    assert content(run) == {"id": "run-1"}


@pytest.mark.parametrize(
    "wrong",
    [
        {"folder": "servers/../../etc"},
        {"folder": "servers/.."},
        {"folder": "/etc"},
        {"life": "../000000000"},
        {"keeper": {"pid": 1}},
    ],
)
def test_an_entry_that_no_run_wrote_is_passed_over(wrong: dict[str, object]) -> None:
    whole = msgspec.to_builtins(server(1))
    assert kept_servers({"servers": [whole, {**whole, **wrong}, 7]}) == [server(1)]
    assert kept_servers({"servers": wrong}) == []
