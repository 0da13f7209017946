"""Who waits, who runs, who gets a token."""

from __future__ import annotations

from pytest_sglprof.standin.engine import Lane, Request
from pytest_sglprof.standin.model import IDLE, Batch


def request(length: int, tokens: int, first: int = 0) -> Request:
    return Request(tuple(range(first, first + length)), tokens)


def handed_out(one: Request) -> list[int | None]:
    found = []
    while not one.tokens.empty():
        found.append(one.tokens.get())
    return found


def test_a_prefill_gives_the_first_token_and_each_decode_one_more() -> None:
    lane = Lane(0, limit=8, chunk=100)
    one = request(5, 3)
    assert lane.next_batch() == IDLE
    lane.add(one)
    for expected in (
        Batch("EXTEND", 1, 5, 5),
        Batch("DECODE", 1, 1, 6),
        Batch("DECODE", 1, 1, 7),
    ):
        batch = lane.next_batch()
        assert batch == expected
        assert lane.finish(batch) == 1
    assert handed_out(one) == [1, 2, 3, None]
    assert lane.is_empty
    assert lane.next_batch() == IDLE


def test_limits_of_requests_and_of_tokens_in_a_prefill() -> None:
    lane = Lane(0, limit=3, chunk=10)
    for number in range(5):
        lane.add(request(6, 2, first=100 * number))
    sizes = []
    while not lane.is_empty:
        batch = lane.next_batch()
        sizes.append((batch.mode, batch.size))
        lane.finish(batch)
    assert sizes == [("EXTEND", 1)] * 3 + [("DECODE", 3)] + [("EXTEND", 1)] * 2 + [("DECODE", 2)]


def test_a_prompt_seen_before_hits_the_cache_until_it_is_flushed() -> None:
    lane = Lane(0, limit=8, chunk=100)

    def prefill_tokens() -> int:
        lane.add(request(9, 1))
        batch = lane.next_batch()
        assert not lane.flush()
        lane.finish(batch)
        return batch.tokens

    assert [prefill_tokens(), prefill_tokens()] == [9, 1]
    assert lane.flush()
    assert prefill_tokens() == 9


def test_aborted_requests_leave_the_queue_and_the_batch() -> None:
    lane = Lane(0, limit=1, chunk=100)
    running, waiting = request(2, 50), request(3, 50)
    lane.add(running)
    lane.finish(lane.next_batch())
    lane.add(waiting)
    running.aborted = waiting.aborted = True
    assert lane.next_batch() == IDLE
    assert lane.is_empty
