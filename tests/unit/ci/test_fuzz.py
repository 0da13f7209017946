"""The fuzzer itself: its corpus is read to the end, a fault is seen, and a few examples of each."""

from __future__ import annotations

from pathlib import Path

import pytest

from ci import fuzz
from ci.fuzz import READERS, Fault, Reader, lay_out, outcome, run_examples
from pytest_sglprof._limits import READ_GIB

EVERY_READER = pytest.mark.parametrize("reader", READERS, ids=lambda reader: reader.name)


@pytest.fixture(autouse=True)
def here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(READ_GIB, "0.5")
    monkeypatch.setenv("SGLPROF_LEASE_DIR", str(tmp_path / "locks"))


@EVERY_READER
def test_the_corpus_is_read_to_the_end(tmp_path: Path, reader: Reader) -> None:
    path = lay_out(reader, tmp_path)
    for read in reader.reads:
        came = outcome(read, path)
        assert came in ("exit 0", "exit 3", "read", "True samples", "0 problems", "1 windows")


@EVERY_READER
def test_changed_files_are_read_or_refused(tmp_path: Path, reader: Reader) -> None:
    count = 8 if fuzz.CHECK in reader.reads else 24  # comparing ranks takes 0.05 s each time
    outcomes = run_examples(reader, seed=1, count=count, folder=tmp_path)
    assert outcomes.total() >= count


def test_a_fault_is_seen_and_can_be_seen_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def read(path: Path) -> str:
        if b"TP0" not in path.read_bytes():
            raise KeyError("TP0")
        return "read"

    reader = Reader("ranks", "ranks.json", "ranks.json", fuzz.change_json, (read,))
    monkeypatch.setattr(fuzz.tempfile, "tempdir", str(tmp_path))
    assert not fuzz.fuzz(reader, 7, 5)
    out = capsys.readouterr().out
    assert "KeyError: 'TP0'" in out
    assert "again: python -m ci.fuzz --reader ranks --seed 7" in out
    (kept,) = tmp_path.glob("fuzz-ranks-*/ranks.json")
    assert b"TP0" not in kept.read_bytes()


def test_what_takes_too_long_is_a_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def read(path: Path) -> str:
        while True:
            pass

    monkeypatch.setattr(fuzz, "SECONDS", 0.1)
    with pytest.raises(Fault, match="it took too long"):
        outcome(read, tmp_path)
