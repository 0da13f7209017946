"""Every form of batch line becomes a sample; everything else is passed over."""

from __future__ import annotations

import itertools
import re
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_sglprof._load.samples import BalanceSample, LoadSample
from pytest_sglprof._load.sources import LineReader, read_log

LOGS = (
    "crash_gpu_activity.log", "crash_prefix_slash.log", "dp2_idle_rank.log", "mixtral_tp2ep2.log",
    "tp2_under_nsys.log", "nsys_stop_output.txt", "dp2/server.log", "tp1/server.log",
    "tp2/server.log", "tp2dp2/server.log",
)  # fmt: skip
REST = "#running-req: 3, #token: 70, token usage: 0.04, cuda graph: True, gen throughput (token/s)"


def one(line: str) -> LoadSample:
    (sample,) = LineReader().read([line])
    assert isinstance(sample, LoadSample)
    return sample


def moment(text: str) -> float:
    return time.mktime(time.strptime(text, "%Y-%m-%d %H:%M:%S"))


@pytest.mark.parametrize("name", LOGS)
def test_every_batch_line_of_a_real_log_is_parsed(shared_data: Path, name: str) -> None:
    text = (shared_data / "logs" / name).read_text(errors="replace")
    samples = [s for s in read_log(shared_data / "logs" / name) if isinstance(s, LoadSample)]
    decode = [sample for sample in samples if sample.throughput is not None]
    assert len(decode) == text.count("Decode batch")
    assert len(samples) - len(decode) == text.count("Prefill batch")
    pattern = r"Decode batch.*?#running-req: (\d+), #token: (\d+).*#queue-req: (\d+)"
    truth = [tuple(map(int, found)) for found in re.findall(pattern, text)]
    assert [(s.running, s.tokens, s.waiting) for s in decode] == truth


def test_what_is_prefilled_runs_in_the_next_decode_line(shared_data: Path) -> None:
    samples = list(read_log(shared_data / "logs/tp1/server.log"))
    loads = [s for s in samples if isinstance(s, LoadSample)]
    pairs = [(a, b) for a, b in itertools.pairwise(loads) if b.throughput is not None]
    after_prefill = [(a.running, b.running) for a, b in pairs if a.throughput is None]
    assert after_prefill
    # Requests may end before the decode line, none can appear.
    assert all(decoding <= prefilled for prefilled, decoding in after_prefill)
    assert sum(d == p for p, d in after_prefill) > len(after_prefill) / 2


def test_all_fields() -> None:
    line = (
        "[2026-11-24 03:13:51.250 DP1 PP0 ATTN_CP0 MOE_DP0 TP4 EP4] Decode batch [1234], "
        f"{REST}: 512.25, #queue-req: 7"
    )
    expected = moment("2026-11-24 03:13:51") + 0.25
    assert one(line) == LoadSample(expected, "DP1 PP0", 3, 7, 70, 0.04, 512.25, 1234, "log")


@pytest.mark.parametrize(
    ("tags", "rank"),
    [(" DP1", "DP1"), ("", ""), (" TP0", ""), (" TP1 DP3", "DP3"), (" DP0 TP2 EP2", "DP0")],
)
def test_tags_in_any_order(tags: str, rank: str) -> None:
    assert one(f"[2026-11-24 03:13:51{tags}] Decode batch, {REST}: 1.0, #queue-req: 0").rank == rank


def test_hybrid_models_have_two_pools() -> None:
    pools = "#full token: 900, full token usage: 0.30, #swa token: 80, swa token usage: 0.55"
    line = f"[2026-11-24 03:13:51 DP0] Decode batch, #running-req: 2, {pools}, mamba num: 3, "
    sample = one(line + "mamba usage: 0.10, gen throughput (token/s): 5.00, #queue-req: 1")
    assert (sample.tokens, sample.token_usage, sample.waiting) == (900, 0.55, 1)


def test_disaggregated_servers_wait_in_more_queues() -> None:
    more = "pre-allocated usage: 0.10, #prealloc-req: 2, #transfer-req: 3, #retracted-req: 1"
    line = "[2026-11-24 03:13:51 DP0] Decode batch, #running-req: 4, #token: 9, token usage: 0.1, "
    assert one(f"{line}{more}, cuda graph: True, #queue-req: 1").waiting == 7


def test_ray_puts_a_head_before_the_stamp() -> None:
    head = "\x1b[36m(SchedulerActor pid=4711, ip=10.0.0.2)\x1b[0m "
    assert one(f"{head}[2026-11-24 03:13:51 DP2] Decode batch, {REST}: 1, #queue-req: 0").rank == (
        "DP2"
    )


def test_glued_lines_are_two_samples() -> None:
    first = f"[2026-11-24 03:13:51 DP0] Decode batch, {REST}: 1.5, #queue-req: 0"
    second = "[2026-11-24 03:13:52 DP1] Prefill batch, #new-seq: 2, #new-token: 9, "
    second += "#cached-token: 0, token usage: 0.00, #running-req: 5, #queue-req: 8"
    zero, one_ = LineReader().read([first + second])
    assert (zero.rank, one_.rank, one_.time - zero.time) == ("DP0", "DP1", 1.0)
    assert isinstance(zero, LoadSample) and zero.waiting == 0 and zero.throughput == 1.5
    assert isinstance(one_, LoadSample) and (one_.running, one_.waiting) == (7, 8)


def test_an_entry_that_lost_its_stamp_has_the_newest_one() -> None:
    lines = [f"[2026-11-24 03:13:51 DP0] Decode batch, {REST}: 1.5, #queue-req: 0"]
    lines.append(f"Decode batch, {REST}: 1.5, #queue-req: 0")
    first, second = LineReader().read(lines)
    assert first == second
    assert LineReader().read(lines[1:]) == []


def test_expert_balancedness_is_a_sample_of_its_own_kind() -> None:
    line = (
        "[2026-11-24 03:13:51 TP0 EP0] [Expert Balancedness] forward_pass_id=12 "
        "current_pass_balancedness=0.500 last_10_average_balancedness=0.610  "
        "gpu_physical_count_sum=4096"
    )
    expected = BalanceSample(moment("2026-11-24 03:13:51"), "", "experts", 2.0, 12, "log")
    assert LineReader().read([line]) == [expected]
    assert LineReader().read([line.replace("0.500", "0.000")]) == []


@given(st.text() | st.from_regex(r"\[20\d\d-\d\d-\d\d \d\d:\d\d:\d\d.*\] (Decode|Prefill) batch.*"))
def test_no_line_raises(line: str) -> None:
    LineReader().read([line, line + line])
