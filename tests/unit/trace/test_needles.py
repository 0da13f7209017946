"""Both ways to find a word give every place where it stands."""

from __future__ import annotations

import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_sglprof._trace.torch import stream

WORDS = (b'"kernel"', b'"gpu_mem', b'user_annotation"', b"aa")
FRAGMENTS = st.sampled_from([*WORDS, b'"', b"a", b"kernel", b"gpu_", b"\x00\xff", b"x" * 50])
WAYS = {"quickest": stream._quickest(), "without the library": stream.Search(
    bytes.find, bytes.rfind, bytes.count
)}  # fmt: skip


@given(
    fragments=st.lists(FRAGMENTS, max_size=60),
    words=st.lists(st.sampled_from(WORDS), min_size=1, unique=True),
    bounds=st.tuples(st.integers(0, 400), st.integers(0, 400)),
    way=st.sampled_from(sorted(WAYS)),
)
def test_every_place_within_the_bounds(
    fragments: list[bytes], words: list[bytes], bounds: tuple[int, int], way: str
) -> None:
    data = b"".join(fragments)
    begin, end = (min(at, len(data)) for at in sorted(bounds))
    places = {
        word: [at for at in range(begin, end - len(word) + 1) if data[at : at + len(word)] == word]
        for word in words
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stream, "QUICKEST", WAYS[way])
        assert {word: stream.offsets(word, data, begin, end) for word in words} == places
        found = stream.survey(words, data, begin, end)
        quick = stream.survey(words, data, begin, end, near=1_000)
    every = sorted(at for own in places.values() for at in own)
    if not every:
        assert found is None
        return
    without_overlap = sum(data[begin:end].count(word) for word in words)
    assert found == (every[0], every[-1], without_overlap)
    assert quick is not None
    first, last, count = quick
    longest = max(map(len, words))  # only what overlaps an outermost word may be passed over
    assert every[0] <= first < every[0] + longest
    assert every[-1] - longest < last <= every[-1]
    assert 1 <= count <= without_overlap


def test_large_pieces_are_searched_by_the_library() -> None:
    stringzilla = pytest.importorskip("stringzilla", reason="no wheel for this machine")
    assert stream._quickest().find is stringzilla.find


def test_without_the_library_bytes_find_does_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "stringzilla", None)
    assert stream._quickest() == WAYS["without the library"]
