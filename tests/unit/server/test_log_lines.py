"""The grammar of the log: which lines are entries, of which kind, and what they hold."""

from __future__ import annotations

import time

import pytest

from pytest_sglprof._ranks import Rank
from pytest_sglprof._server.log_lines import (
    Entry,
    EntryReader,
    begins_entry,
    highest_iteration,
    read_balance,
    read_batch,
    read_sizes,
)

STAMP = "[2026-11-24 03:13:51 DP1 TP0] "
BATCH = "Decode batch, #running-req: 3, #token: 70, gen throughput (token/s): 1.00, #queue-req: 7"


def entries(*lines: str) -> list[Entry]:
    return list(EntryReader().read(lines))


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("Prefill batch, #new-seq: 2, #running-req: 1", "prefill"),
        ("Decode batch [7], #running-req: 1", "decode"),
        ("[Expert Balancedness] forward_pass_id=1 current_pass_balancedness=0.5", "experts"),
        ("[EPLBManager] rebalance start", "rebalance_start"),
        ("[EPLBManager] rebalance end time=1.500s", "rebalance_end"),
        ("Capture target decode CUDA graph begin. avail mem=1.00 GB", "capture"),
        ("Capture cuda graph bs [1, 2, 4]", "capture"),
        ("Profiling starts. Traces will be saved to: /x (with profile id: 7.5)", "profile_start"),
        ("Profiling done. Traces are saved to: /x", "profile_end"),
    ],
)
@pytest.mark.parametrize("head", ["", "(Scheduler pid=4711, ip=10.0.0.2) "], ids=["plain", "ray"])
def test_every_kind(text: str, kind: str, head: str) -> None:
    (entry,) = entries(f"{head}{STAMP}{text}")
    assert (entry.kind, entry.rank, entry.resolution) == (kind, Rank(dp=1, tp=0), 1.0)
    assert entry.time == time.mktime(time.strptime("2026-11-24 03:13:51", "%Y-%m-%d %H:%M:%S"))


@pytest.mark.parametrize(
    "line",
    [
        f"{STAMP}Capture target decode CUDA graph end. elapsed=1.00 s",
        f"{STAMP}[EPLBManager] system started, will rebalance per 1000 iterations.",
        f"{STAMP}Receive: text='Profiling done', sampling_params={{}}",
        f"{STAMP}Receive: text='] Profiling starts (with profile id: mine)'",
        "Profiling done",
        f"[2026-11-24 99:13:51] {BATCH}",
        BATCH,
        "",
    ],
)
def test_what_is_no_entry(line: str) -> None:
    assert entries(line) == []


def test_what_a_server_quotes_is_not_what_it_says() -> None:
    quote = f"{STAMP}{BATCH}, text='Profiling done'"
    assert [entry.kind for entry in entries(quote)] == ["decode"]


def test_glued_entries_have_their_own_stamps_and_texts() -> None:
    one, two, three = entries(
        f"{STAMP}{BATCH}[2026-11-24 03:13:52.500] {BATCH}Profiling done{BATCH}"
    )
    assert (two.time - one.time, one.rank, two.rank) == (1.5, Rank(dp=1, tp=0), None)
    assert (two.resolution, three.time) == (0.0, two.time)
    assert [read_batch(entry).waiting for entry in (one, two, three)] == [7, 7, 7]


def test_the_figures_of_other_versions() -> None:
    old = "Decode batch. #running-req: 3, #token: 70, token usage: 0.10, #queue-req: 1"
    assert read_batch(entries(STAMP + old)[0]).running == 3
    hidden = "Prefill batch, #new-seq: 2, #unbootstrapped-req: 1, #transferring-req: 2"
    assert read_batch(entries(STAMP + hidden)[0]).running is None
    speculative = f"{BATCH}, block accept len: 9.00, accept len: 2.35, accept rate: 0.45"
    assert read_batch(entries(STAMP + speculative)[0]).accept_length == 2.35
    assert read_batch(entries(STAMP + BATCH)[0]).accept_length is None


def test_numbers_that_cannot_be_raise_nothing() -> None:
    digits = "9" * 5000
    assert entries(f"[2026-11-24 03:13:51 DP{digits}] {BATCH}") == []
    batch = f"{STAMP}Decode batch [{digits}], #running-req: {digits}, #token: {digits}.{digits}"
    assert read_batch(entries(batch)[0]).iteration is None
    experts = f"{STAMP}[Expert Balancedness] forward_pass_id={digits} current_pass_balancedness="
    assert read_balance(entries(experts + digits)[0]) is None
    assert highest_iteration(batch.encode()) is None


def test_tags_that_are_not_known_are_passed_over() -> None:
    (entry,) = entries(f"[2026-11-24 03:13:51 DP1 DCP0 TP0 host-7] {BATCH}")
    assert entry.rank == Rank(dp=1, tp=0)
    assert Rank.from_tags(" DCP0") is None


@pytest.mark.parametrize(
    ("sizes", "here"),
    [
        ("{'dp_size': 4, 'moe_dp_size': 9}", {0, 1, 2, 3}),
        ("ServerArgs(dp_size=4, nnodes=2, node_rank=1)", {2, 3}),
        ("{'dp_size': 2, 'attn_dp_size': 2, 'nnodes': 4, 'node_rank': 3}", {3}),
        ("{'dp_size': 2, 'nnodes': 4, 'node_rank': 1}", set()),  # it has TP ranks of DP0 only
        ("{'dp_size': 4, 'pp_size': 2, 'nnodes': 2, 'node_rank': 1}", {0, 1, 2, 3}),
    ],
)
def test_the_dp_ranks_of_a_node(sizes: str, here: set[int]) -> None:
    (entry,) = entries(f"[2026-11-24 03:13:51] server_args={sizes}")
    logged = read_sizes(entry)
    assert logged is not None
    assert logged.here == here


@pytest.mark.parametrize("sizes", ["{}", "{'dp_size': 1}", "ServerArgs(nnodes=0)"])
def test_one_dp_rank_has_no_tag(sizes: str) -> None:
    (entry,) = entries(f"[2026-11-24 03:13:51] server_args={sizes}")
    assert read_sizes(entry) is None


def test_the_highest_iteration_is_that_of_any_batch() -> None:
    lines = [f"{STAMP}Decode batch [12], …", f"{STAMP}Prefill batch [40], …", f"{STAMP}text [99]"]
    assert highest_iteration("\n".join(lines).encode()) == 40
    assert highest_iteration(b"") is None


def test_where_an_entry_begins() -> None:
    assert begins_entry("[2026-11-24 03:28:27] SIGQUIT received.")
    assert not begins_entry("ValueError: broken")
