"""Process groups and sequence numbers of collectives, as torch.distributed records them.

A kernel carries its process group; its number stands in the `record_param_comms` operator
of the same External id. That is how PyTorch and Kineto write them.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from pytest_sglprof._analysis.collectives import waits
from pytest_sglprof._trace.read import read_window
from pytest_sglprof._trace.table import KernelTable
from tests.support.kineto import BASE, Event, document, event, kernel, write

NCCL = "ncclDevKernel_AllReduce_Sum_bf16_RING_LL(ncclDevKernelArgsStorage<4096ul>)"
STEPS, CALLS = 30, 4
Read = Callable[..., KernelTable]


@pytest.fixture(params=["decoded", "scanned", "processes"])
def read(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Read:
    """Reads a window in each of the ways that files are read."""
    if request.param != "decoded":
        monkeypatch.setattr("pytest_sglprof._trace.torch.assemble.SCAN_BYTES", 0)
        monkeypatch.setattr("pytest_sglprof._trace.torch.assemble.POOL_BYTES", 0)
    processes = 2 if request.param == "processes" else 1

    def reads(path: Path, **options: Any) -> KernelTable:
        return read_window(path, processes=processes, **options)

    return reads


def announced(external: int, ts: float, **args: Any) -> Event:
    own = {"External id": external, "Process Group Name": "3", "Collective name": "allreduce"}
    return event("cpu_op", "record_param_comms", ts, 2, 5, 5, **{**own, **args})


def rank_events(*, late: float = 0.0, start: float = 1000.0, **args: Any) -> list[Event]:
    """Steps of calls of one all-reduce; the operators stand before the kernels, as in Kineto.

    late: µs that this rank arrives later than one with 0. args: more of every kernel.
    """
    operators, kernels, spans = [], [], []
    for step in range(STEPS):
        begin = start + step * 1000
        text = f"step[EXTEND bs=1 toks=9 forward_id={step}]"
        spans += [
            event("user_annotation", text, begin, 900, 5, 5, **{"External id": step + 1}),
            *(
                event(
                    "gpu_user_annotation", text, begin, 900, 0, stream, **{"External id": step + 1}
                )
                for stream in (7, 9)
            ),
        ]
        for call in range(CALLS):
            number = step * CALLS + call
            at = begin + 10 + 200 * call
            # An odd one of another group: its numbers are its own.
            told: dict[str, Any] = {"Seq": 900 + number}
            if number % 7 == 6:
                told = {"Seq": number // 7, "Process Group Name": "0"}
            group = told.get("Process Group Name", "3")
            own = {"External id": 5000 + number, "Process Group Name": group, **args}
            operators.append(announced(5000 + number, at - 5, **told))
            for tie in (2 * number + 1, 2 * number + 2):
                launch = event("cuda_runtime", "cudaLaunchKernel", at - 4, 1, 5, 5)
                operators.append(launch | {"args": {"correlation": tie}})
            kernels.append(kernel("gemm", at, 20 + late, correlation=2 * number + 1))
            own["correlation"] = 2 * number + 2
            kernels.append(kernel(NCCL, at + 21 + late, 100 - late, 9, **own))
    return [*operators, *spans, *kernels]


def truth(path: Path) -> list[tuple[int, str, int]]:
    """(start, group, number) of every kernel with a group, by plain json."""
    data = path.read_bytes()
    text = gzip.decompress(data) if path.suffix == ".gz" else data
    found = json.loads(text, parse_float=Decimal)
    base = int(found.get("baseTimeNanoseconds", 0))
    operators = [e for e in found["traceEvents"] if e.get("name") == "record_param_comms"]
    numbers = {e["args"]["External id"]: e["args"].get("Seq", -1) for e in operators}
    return sorted(
        (
            base + int(e["ts"] * 1000),
            e["args"]["Process Group Name"],
            e["args"].get("Seq", numbers.get(e["args"]["External id"], -1)),
        )
        for e in found["traceEvents"]
        if e.get("cat") == "kernel" and "Process Group Name" in e["args"]
    )


def told(table: KernelTable) -> list[tuple[int, str, int]]:
    """The same from a table."""
    joined = table.frame.join(table.collectives, how="inner")
    assert len(joined) == len(table.collectives)
    assert set(joined["full_name"].astype(str).str.contains("(?i)nccl")) <= {True}
    columns = (joined["start_ns"], joined["process_group"].astype(str), joined["sequence"])
    return sorted((int(a), b, int(c)) for a, b, c in zip(*columns, strict=True))


@pytest.mark.parametrize("start", [1000.0, 2.0**43 + 1000])  # the second is read by its text
def test_group_and_number_of_each_call(tmp_path: Path, read: Read, start: float) -> None:
    path = write(tmp_path, document(rank_events(start=start)))
    found = told(read(path))
    assert found == truth(path)
    assert len(found) == STEPS * CALLS
    assert {group for _, group, _ in found} == {"3", "0"}
    assert min(number for _, _, number in found) == 0


def test_a_number_of_the_kernel_itself_needs_no_operator(tmp_path: Path, read: Read) -> None:
    events = [e for e in rank_events(Seq=77) if e["name"] != "record_param_comms"]
    found = told(read(write(tmp_path, document(events))))
    assert {number for _, _, number in found} == {77}


def test_numbers_that_are_not_asked_for_are_not_looked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pytest_sglprof._trace.torch.assemble.SCAN_BYTES", 0)
    path = write(tmp_path, document(rank_events()))
    collectives = read_window(path, launches=False).collectives
    assert set(collectives["process_group"]) == {"0", "3"}
    assert set(collectives["sequence"]) == {-1}


@pytest.mark.parametrize(
    ("args", "operation", "size"),
    [
        ({"Collective name": "all_to_all", "Group size": 4}, "all_to_all", 4),
        ({"Collective name": "allreduce"}, "allreduce", -1),
        ({"Collective name": 7, "Group size": "4"}, "", -1),
        ({"Collective name": None, "Group size": 2**70}, "", -1),
        ({}, "", -1),
    ],
)
def test_what_a_call_was_asked_for_and_by_how_many(
    tmp_path: Path, read: Read, args: Event, operation: str, size: int
) -> None:
    calls = read(write(tmp_path, document(rank_events(**args)))).collectives
    assert len(calls) == STEPS * CALLS
    assert set(calls["operation"]) == {operation}
    assert set(calls["group_size"]) == {size}


@pytest.mark.parametrize(
    "args",
    [{"Process Group Name": 3}, {"Process Group Name": None}, {"Process Group Name": ""}],
)
def test_a_group_that_is_no_name_is_not_known(tmp_path: Path, read: Read, args: Event) -> None:
    table = read(write(tmp_path, document(rank_events(**args))))
    assert table.collectives.empty
    assert len(table.frame) == 2 * STEPS * CALLS


@pytest.mark.parametrize("start", [1000.0, 2.0**43 + 1000])  # the second is read by its text
def test_a_copy_that_a_collective_launched_is_no_call(
    tmp_path: Path, read: Read, start: float
) -> None:
    group = {"External id": 5000, "Process Group Name": "3", "Seq": 4}
    copies = [
        kernel("CatArrayBatchedCopy", start + 600 + number * 1000, 3, **group)
        for number in range(STEPS)
    ]
    events = rank_events(start=start)
    found = told(read(write(tmp_path, document([*events, *copies]))))
    assert len(found) == STEPS * CALLS


@pytest.mark.parametrize("number", ["12", None, -1, 2**70, 1.5])
def test_a_number_that_is_none_is_not_known(tmp_path: Path, read: Read, number: object) -> None:
    events = rank_events()
    for found in events:
        if found["name"] == "record_param_comms":
            found["args"]["Seq"] = number
    table = read(write(tmp_path, document(events)))
    assert set(table.collectives["sequence"]) == {-1}
    assert len(table.collectives) == STEPS * CALLS


def test_ranks_of_one_window_keep_their_own_rows(tmp_path: Path, read: Read) -> None:
    paths = [
        write(tmp_path, document(rank_events(late=late), rank=rank), f"1-TP-{rank}.trace.json")
        for rank, late in enumerate((0.0, 7.5))
    ]
    found = told(read(tmp_path))
    assert found == sorted(row for path in paths for row in truth(path))
    settled = read(tmp_path, settle_s=0.0105)
    edge = BASE + 12_000_000  # the first step that began 10.5 ms after the first one of all
    assert told(settled) == [row for row in found if row[0] >= edge]


def test_ranks_of_a_merged_file_have_numbers_of_their_own(tmp_path: Path, read: Read) -> None:
    """External ids repeat from rank to rank."""
    events = []
    for rank in range(2):
        for one in rank_events(late=3.0 * rank):
            one["pid"] = f"[TP{rank:02d}] {one['pid']}"
            if one["name"] == "record_param_comms":
                one["args"]["Seq"] += 10_000 * rank
            events.append(one)
    table = read(write(tmp_path, document(events), "merged-1.trace.json"))
    joined = table.frame.join(table.collectives, how="inner")
    thousands = joined["sequence"] // 10_000
    assert thousands.tolist() == [int(str(rank)[2:]) for rank in joined["rank"]]


def test_a_trace_without_groups_has_no_such_rows(tmp_path: Path, read: Read) -> None:
    table = read(write(tmp_path, document([kernel(NCCL, 10, 5), kernel("gemm", 1, 5)])))
    assert table.collectives.empty
    assert list(table.collectives) == ["process_group", "sequence", "operation", "group_size"]


def test_a_real_trace_of_nccl(shared_data: Path, read: Read) -> None:
    """PyTorch 2.3 on an A100: groups and operators, but no numbers yet."""
    path = shared_data / "torch/a100-nccl/rank-0.json.gz"
    table = read(path)
    found = told(table)
    assert found == truth(path)
    assert set(table.collectives["operation"]) == {"allreduce", "broadcast"}
    assert set(table.collectives["group_size"]) == {2}
    assert [(group, number) for _, group, number in found] == [("0", -1)] * 21


@pytest.mark.parametrize("numbered", [True, False])
def test_a_call_that_one_rank_lost_moves_no_other(
    tmp_path: Path, read: Read, numbered: bool
) -> None:
    """TP1 arrives 7.5 µs later; its second all-reduce of step 12 is not in its trace."""
    lost = BASE + round((1000 + 12 * 1000 + 10 + 200 + 21 + 7.5) * 1000)
    for rank, late in enumerate((0.0, 7.5)):
        events = rank_events(late=late)
        if rank:
            at = [e for e in events if BASE + round(e["ts"] * 1000) == lost]
            assert [e["name"] for e in at] == [NCCL]
            events.remove(at[0])
        if not numbered:
            events = [e for e in events if e["name"] != "record_param_comms"]
        write(tmp_path, document(events, rank=rank), f"1-TP-{rank}.trace.json")
    (found,) = waits(read(tmp_path))
    at_12 = int((found.step == 12).sum())
    assert set((found.start[:, 1] - found.start[:, 0]).tolist()) == {7_500}
    # Of step 12 three of four are left; by order, only that of the other process group.
    assert (at_12, found.unmatched) == ((3, 1) if numbered else (1, 5))
    assert len(found.step) == STEPS * CALLS - (4 - at_12)
