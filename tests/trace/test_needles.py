"""Both ways to find a word give every place where it stands."""

from __future__ import annotations

import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_sglprof.trace import needles

WORDS = (b'"kernel"', b'"gpu_mem', b'user_annotation"', b"aa")
FRAGMENTS = st.sampled_from([*WORDS, b'"', b"a", b"kernel", b"gpu_", b"\x00\xff", b"x" * 50])


@given(
    fragments=st.lists(FRAGMENTS, max_size=60),
    word=st.sampled_from(WORDS),
    bounds=st.tuples(st.integers(0, 400), st.integers(0, 400)),
    engine=st.booleans(),
)
def test_every_place_within_the_bounds(
    fragments: list[bytes], word: bytes, bounds: tuple[int, int], engine: bool
) -> None:
    data = b"".join(fragments)
    begin, end = (min(at, len(data)) for at in sorted(bounds))
    truth = [at for at in range(begin, end - len(word) + 1) if data[at : at + len(word)] == word]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(needles, "SMALL", 0 if engine else 2**62)
        assert needles.finder(word)(data, begin, end) == truth


def test_the_engine_is_what_searches_large_pieces() -> None:
    hyperscan = pytest.importorskip("hyperscan", reason="the extra `fast` is not installed")
    scanned: list[int] = []

    class Watched(hyperscan.Database):  # type: ignore[misc, name-defined]
        def scan(self, data: memoryview, **more: object) -> None:
            scanned.append(len(data))
            super().scan(data, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hyperscan, "Database", Watched)
        find = needles.finder(b'"kernel"')
    data = b'"kernel" ' * 1000
    assert find(data, 9, len(data)) == list(range(9, len(data), 9))
    assert scanned == [len(data) - 9]


def test_without_the_engine_bytes_find_does_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "hyperscan", None)
    data = b'"kernel" ' * 1000
    assert needles.finder(b'"kernel"')(data, 0, len(data)) == list(range(0, len(data), 9))
