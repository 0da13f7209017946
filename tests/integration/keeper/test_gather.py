"""Files of a node that come here, whatever they are called and whatever becomes of them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pytest_sglprof._errors import ServerError
from pytest_sglprof._server.keeper.gather import CHUNK, Gathering
from pytest_sglprof._server.keeper.protocol import SEND_FILES
from tests.support.nodes import can_hide_disks, on_own_disk

pytestmark = pytest.mark.skipif(
    not can_hide_disks(), reason="needs root, for a disk that only one process has"
)


@pytest.fixture
def here(tmp_path: Path) -> Path:
    (tmp_path / "run").mkdir()
    return tmp_path / "run"


@pytest.fixture
def there(tmp_path: Path) -> Path:
    (tmp_path / "disk").mkdir()
    return tmp_path / "disk"


@pytest.fixture
def files(here: Path, there: Path) -> Iterator[Gathering]:
    words = [*on_own_disk(there, here), sys.executable, "-m", "pytest_sglprof._server.keeper"]
    files = Gathering(
        subprocess.Popen([*words, SEND_FILES], stdin=subprocess.PIPE, stdout=subprocess.PIPE),
        here,
        "n1",
    )
    yield files
    files.close()


def wait(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_what_grows_there_grows_here(files: Gathering, here: Path, there: Path) -> None:
    (there / "a b").mkdir()
    names = ["server.log", "a b/large.gz", "a b/two\nlines", "empty"]
    contents = {name: bytes([at]) * (at * CHUNK + 17) for at, name in enumerate(names)}
    contents["empty"] = b""
    (there / os.fsdecode(b"not \xff text")).write_bytes(b"stays")
    for name, content in contents.items():
        (there / name).write_bytes(content)
    files.catch_up()
    assert {name: (here / name).read_bytes() for name in names} == contents
    with (there / "server.log").open("ab") as log:
        log.write(b"one more line\n")
    files.catch_up()
    assert (here / "server.log").read_bytes().endswith(b"\0one more line\n")
    (there / "a b/large.gz").write_bytes(b"another one")
    files.catch_up()
    assert (here / "a b/large.gz").read_bytes() == b"another one"
    assert sorted(path.name for path in here.iterdir()) == ["a b", "empty", "server.log"]
    assert files.close() == (f"{here / 'not ? text'} on node n1",)


def test_what_goes_here_goes_there_and_the_other_way_round(
    files: Gathering, here: Path, there: Path
) -> None:
    for name in ("moved", "removed there"):
        (there / name).write_bytes(b"x")
    files.catch_up()
    (here / "moved").rename(here.parent / "moved")
    (there / "removed there").unlink()
    files.catch_up()
    assert not (here / "removed there").exists()
    time.sleep(1.1)
    files.catch_up()
    wait(lambda: not (there / "moved").exists())
    assert (here.parent / "moved").read_bytes() == b"x"
    assert not (here / "moved").exists()


def test_what_was_here_before_stays_as_it_is(files: Gathering, here: Path, there: Path) -> None:
    (here / "results.json").write_text("of this machine")
    (here / "run.json").write_text("{}")
    (here / "keeper.log").write_text("said by the launcher\n")
    for name in ("results.json", "run.json"):
        (there / name).write_text("of the node")
    (there / "keeper.log").write_text("said by the keeper\n")
    files.catch_up()
    assert files.close() == (f"{here / 'results.json'} on node n1",)
    assert (here / "results.json").read_text() == "of this machine"
    assert (here / "run.json").read_text() == "{}"
    assert (here / "keeper.log").read_text() == "said by the launcher\nsaid by the keeper\n"
    assert (there / "results.json").exists()
    assert not (there / "keeper.log").exists()


def test_a_report_comes_once_it_is_complete(files: Gathering, here: Path, there: Path) -> None:
    report = b"\1\2\3" * CHUNK
    (there / "w.sqlite").write_bytes(report)
    files.catch_up()
    assert not (here / "w.sqlite").exists()
    assert files.bring(here / "w.sqlite", 20) == here / "w.sqlite"
    assert (here / "w.sqlite").read_bytes() == report
    (there / "w.sqlite").write_bytes(b"new")
    assert files.bring(here / "w.sqlite", 20).read_bytes() == b"new"
    with pytest.raises(ServerError, match=r"other.sqlite did not come from node n1\n"):
        files.bring(here / "other.sqlite", 20)
    assert files.close() == ()
    assert list(there.iterdir()) == []
    assert (here / "w.sqlite").read_bytes() == b"new"


def test_a_node_that_is_lost(files: Gathering, here: Path, there: Path) -> None:
    (there / "server.log").write_bytes(b"x")
    files.catch_up()
    files._process.kill()
    began = time.monotonic()
    files.catch_up()
    with pytest.raises(ServerError, match="its files ended with status -9"):
        files.bring(here / "w.sqlite", 20)
    assert files.close() == ()
    assert time.monotonic() - began < 5
    assert (here / "server.log").read_bytes() == b"x"


def test_what_a_node_may_not_write(here: Path) -> None:
    """Anything but a file below the folder, in pieces of a size that was agreed on."""
    said = b"Welcome to n1\n"
    for name, at, size, content in (
        ("../evil", 0, 3, b"abc"),
        ("/tmp/evil", 0, 3, b"abc"),
        ("a/../../evil", 0, 3, b"abc"),
        ("huge", 0, 10**13, b""),
        ("before", -1, 3, b"abc"),
        ("good", 0, 3, b"abc"),
    ):
        head = {"piece": "file", "name": name, "at": at, "size": size, "last": False}
        said += json.dumps(head).encode() + b"\n" + content + b"\n"
    (here / "said").write_bytes(said)
    program = f"import sys; sys.stdout.buffer.write(open({str(here / 'said')!r}, 'rb').read())"
    files = Gathering(
        subprocess.Popen(
            [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        ),
        here,
        "n1",
    )
    assert files.close() == ()
    assert {path.name for path in here.iterdir()} == {"said", "good"}
    assert (here / "good").read_bytes() == b"abc"
    assert {path.name for path in here.parent.iterdir()} == {"run"}
