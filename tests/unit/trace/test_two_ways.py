"""Scanning and decoding give one table, whatever a trace holds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from pytest_sglprof._errors import TraceError
from pytest_sglprof._trace.merge.files import merge_files
from pytest_sglprof._trace.read import read_window
from pytest_sglprof._trace.torch import assemble, scan
from pytest_sglprof._trace.torch.stream import pieces
from tests.support.scanned import LAYOUTS, NAME

Trace = dict[str, Any]
FIRST = {"ph": "X", "cat": "cpu_op", "name": "x", "pid": 1, "tid": 1, "ts": 1.0, "dur": 1.0}
# Of other things than GPU activities the scan knows nothing.
UNSEEN = ("cpu_op", "user_annotation", "decoded as a whole", "invalid JSON")
COLUMNS = ["rank", "full_name", "kind", "category", "start_ns", "dur_ns", "stream", "step", "stage"]

names = st.sampled_from(
    [
        "gemm",
        "ncclDevKernel_AllReduce",
        "nccl:all_reduce",
        "record_param_comms",
        '"cat": "kernel"',
        'a}, {"ph": "X"',
        "ü€\\",
        "x" * 300,
    ]
)
categories = st.sampled_from(
    ["kernel"] * 5
    + ["cuda_runtime", "user_annotation", "gpu_user_annotation"] * 2
    + ["gpu_memcpy", "gpu_memset", "cpu_op", "python_function"]
)
micros = st.integers(0, 90_000).map(lambda ns: ns / 1000)
brief = st.integers(0, 9_000).map(lambda ns: ns / 1000)
odd = st.sampled_from(["7", "soon", None, 1.5, True, -1, -3.5, 2**40, 2**70, 1e300, [1], {}])


@st.composite
def traces(draw: st.DrawFn) -> list[Trace]:
    """Events in order of time, some of which are not as they should be."""
    return [FIRST, FIRST, *(draw(event(number)) for number in range(draw(st.integers(1, 30))))]


@st.composite
def event(draw: st.DrawFn, number: int) -> Trace:
    category = draw(categories)
    step = number // 4
    args: Trace = {
        "device": draw(st.sampled_from([0, 0, 1])),
        "stream": draw(st.sampled_from([7, 7, 13])),
        "correlation": draw(st.sampled_from([number, number, number - 1, 0])),
        "External id": step,
    }
    args |= draw(
        st.fixed_dictionaries(
            {},
            optional={
                "Process Group Name": st.sampled_from(["3", "0", ""]),
                "Seq": st.integers(0, 9),
                "graph node id": st.sampled_from([0, 5]),
                "kernel": st.just("kernel"),
                "grid": st.just([1, 1, 1]),
            },
        )
    )
    found: Trace = {
        "ph": "X",
        "cat": category,
        "name": draw(names),
        "pid": draw(st.sampled_from([0, 5])),
        "tid": draw(st.sampled_from([7, 8])),
        "ts": round(1000 + 10 * number + draw(brief) / 10, 3),
        "dur": draw(micros if "annotation" in category else brief),
        "args": args,
    }
    if "annotation" in category:
        found["name"] = f"step[{draw(st.sampled_from(['DECODE', 'EXTEND']))} forward_id={step}]"
    if draw(st.integers(0, 9)) == 0:
        found = {"ph": "f", "id": number, "pid": 0, "tid": 0, "ts": 1.5, "cat": "ac2g", "name": "x"}
    if draw(st.integers(0, 9)) == 0:
        where = draw(st.sampled_from([found, args]))
        key = draw(st.sampled_from([*where]))
        where[key] = draw(odd)
    if draw(st.integers(0, 19)) == 0:
        del found[draw(st.sampled_from([*found]))]
    if draw(st.integers(0, 9)) == 0:
        found["pad"] = "p" * draw(st.sampled_from([10, 3000]))
    return found


def seen(path: Path) -> Any:
    """All that a table says, or that the file was refused."""
    try:
        table = read_window(path, processes=1)
    except TraceError:
        return None
    rows = zip(*(table.frame[key].tolist() for key in COLUMNS), strict=True)
    calls = table.frame.join(table.collectives, how="inner")
    keys = ("start_ns", "process_group", "sequence")
    return (
        table.ranks,
        sorted(rows),
        sorted(zip(*(calls[key].astype(str) for key in keys), strict=True)),
        table.steps.drop(columns="excluded").to_dict("list"),
        sorted(note for note in table.notes if not any(word in note for word in UNSEEN)),
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("trace")


KERNEL = {**FIRST, "cat": "kernel", "name": "gemm", "args": {"device": 0, "stream": 7}}
TWICE = {**KERNEL, "cat": "gpu_memset", "args": {"pad": "x" * 2500, "kernel": "f"}}
FAR = {**FIRST, "args": {"pad": "x" * 9000}}
NCCL = {"Process Group Name": "3", "External id": 2**70, "device": 0, "stream": 7}


@settings(deadline=None, max_examples=200, suppress_health_check=[HealthCheck.too_slow])
@given(
    trace=traces(),
    merged=st.booleans(),
    layout=st.sampled_from(sorted(LAYOUTS)),
    piece=st.sampled_from([64, 200, 1000, 1 << 18]),
)
@example([FIRST, FIRST, KERNEL | {"dur": 1e300}], False, "one line", 1000)
@example([FIRST, FIRST, KERNEL | {"name": "nccl", "args": NCCL}], False, "one line", 1000)
@example([FIRST, FIRST, KERNEL | {"args": {"stream": True, "device": 0}}], False, "one line", 1000)
@example([FIRST, FIRST, TWICE, FAR, KERNEL], False, "one line", 1 << 18)
def test_both_ways_give_one_table(
    folder: Path, trace: list[Trace], merged: bool, layout: str, piece: int
) -> None:
    path = folder / NAME
    if merged:
        trace = [e | {"pid": f"[TP{e.get('pid', 0)}] {e.get('pid')}"} for e in trace]
        pids = sorted({e["pid"] for e in trace})
        named = [{"ph": "M", "name": "process_name", "ts": 0.0, "pid": pid} for pid in pids]
        trace = [trace[0], *named, *trace[1:]]
    path.write_bytes(LAYOUTS[layout](trace).encode())
    decoded = seen(path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(assemble, "SCAN_BYTES", 0)
        patch.setattr(
            scan,
            "pieces",
            lambda path, *, size: pieces(path, size=piece),
        )
        scanned = seen(path)
    # Decoding refuses a file for a fault of any event, of whatever kind.
    assert decoded is None or scanned == decoded


@pytest.mark.parametrize("layout", sorted(LAYOUTS))
@pytest.mark.parametrize(
    ("odd_time", "words"),
    [
        ({"dur": 4.0e15}, "an impossible"),  # three of them are more than int64 holds
        ({"dur": 1.2e12}, "an impossible"),
        ({"dur": 2**62 // 1000}, "an impossible"),
        ({"dur": 2**63 - 1}, "a missing or unreadable"),
        ({"dur": "abc"}, "a missing or unreadable"),
        ({"dur": None}, "a missing or unreadable"),
        ({"ts": 1e30}, "a missing or unreadable"),
        ({"dur": -1e15}, "a negative"),
    ],
)
def test_fault_2_times_that_cannot_be_are_in_no_total(
    tmp_path: Path, odd_time: Trace, words: str, layout: str
) -> None:
    kernels = [KERNEL | {"ts": 10.0 * at, "dur": 5.0} for at in range(3)]
    odd = [
        KERNEL | odd_time | {"name": "odd", "args": {"device": 0, "stream": 8 + at}}
        for at in range(3)
    ]
    path = tmp_path / NAME
    path.write_bytes(LAYOUTS[layout]([FIRST, FIRST, *kernels[:2], *odd, kernels[2]]).encode())
    for least in (assemble.SCAN_BYTES, 0):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(assemble, "SCAN_BYTES", least)
            table = read_window(path, processes=1)
        assert table.frame["dur_ns"].tolist() == [5_000] * 3
        assert f"skipped 3 kernel events with {words} time" in " ".join(table.notes)


def test_fault_2_a_merged_file_keeps_what_its_readers_leave_out(tmp_path: Path) -> None:
    ranks = []
    for number in range(2):
        events = [KERNEL | {"ts": 10.0, "dur": 5.0}, KERNEL | {"ts": 30.0, "dur": 4.0e15}]
        ranks.append(tmp_path / f"1-TP-{number}.trace.json")
        ranks[-1].write_text(LAYOUTS["one line"]([FIRST, FIRST, *events]))
    merged = tmp_path / "merged.trace.json"
    merge_files(ranks, merged)
    apart, together = read_window(ranks, processes=1), read_window(merged, processes=1)
    assert apart.frame["dur_ns"].tolist() == together.frame["dur_ns"].tolist() == [5_000] * 2
    for table in (apart, together):
        notes = [note for note in table.notes if "kernel events with an impossible time" in note]
        assert sum(int(note.split()[2]) for note in notes) == 2
