"""Ids of many ranks, and the writer of the result."""

from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_sglprof._errors import TraceError
from pytest_sglprof._trace.merge.events import (
    MAX_RANKS,
    ProcessIds,
    RankNumbers,
    flow_id,
    shifted,
    was_text,
)
from pytest_sglprof._trace.merge.files import TraceWriter

PIDS = st.one_of(
    st.integers(0, 9_999_999).map(lambda pid: b"%d" % pid),
    st.text(max_size=8).map(lambda text: json.dumps(text).encode()),
    st.sampled_from([b'""', b'"[]"', b'"[x] 1"', b'"[x] y"', b'"y"']),
)


@given(st.lists(PIDS, unique=True, max_size=30), st.lists(PIDS, unique=True, max_size=30))
def test_no_two_processes_get_one_id(first: list[bytes], second: list[bytes]) -> None:
    numbers = RankNumbers(("TP0", f"TP{MAX_RANKS}"))
    found = {}
    for label, pids in (("TP0", first), (f"TP{MAX_RANKS}", second)):
        ids = ProcessIds(numbers, label)
        for pid in pids:
            rank, new, text = ids.of(pid)
            assert rank == label
            assert was_text(new) == bool(text) or pid == b'""'
            # A number and the same number as text are one process, as Perfetto has it.
            found[label, pid.strip(b'"')] = new
    assert len(set(found.values())) == len(found)
    assert all(0 < pid < 2**32 for pid in found.values())


def test_too_many_ranks_are_refused() -> None:
    numbers = RankNumbers(tuple(f"TP{at}" for at in range(MAX_RANKS)))
    assert int(numbers.prefix(f"TP{MAX_RANKS - 1}")) * 10**7 + 9_999_999 < 2**33
    with pytest.raises(TraceError, match="329"):
        numbers.number("one more")


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        (b"181", b"100181"),
        (b'"0x1f"', rb'"100-\"0x1f\""'),
        (b"12345678901234567", b'"100-12345678901234567"'),
    ],
)
def test_flow_ids(raw: bytes, expected: bytes) -> None:
    assert flow_id(b"100", raw) == expected
    assert json.loads(expected)


@given(st.integers(0, 10**18), st.integers(-(10**17), 10**18))
def test_times_move_exactly(time: int, shift: int) -> None:
    text = b"%d.%03d" % divmod(time, 1000)
    moved = shifted(text, shift)
    assert moved is not None
    whole, fraction = moved.decode().lstrip("-").split(".")
    assert (int(whole) * 1000 + int(fraction)) == abs(time + shift)
    assert moved.startswith(b"-") == (time + shift < 0)


def test_what_is_no_time_stays() -> None:
    assert shifted(b'"soon"', 5) is None


def test_without_isal_the_standard_library_packs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "isal", None)
    out = tmp_path / "o.json.gz"
    with TraceWriter(out) as writer:
        writer.add(b'{"ph":"X"}')
        writer.add(b"")
        writer.add(b'{"ph":"i"}')
        writer.close({"more": 1})
    found = json.loads(gzip.decompress(out.read_bytes()))
    assert [event["ph"] for event in found["traceEvents"]] == ["X", "i"]
    assert found["more"] == 1


def test_a_failing_body_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyError), TraceWriter(tmp_path / "o.json") as writer:
        writer.add(b"{}")
        raise KeyError
    assert not list(tmp_path.iterdir())
