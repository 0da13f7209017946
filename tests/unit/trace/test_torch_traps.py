"""What real traces hold that a naive reader takes wrongly."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pytest_sglprof._errors import TraceError, TraceTruncated
from pytest_sglprof._trace.read import read_window
from pytest_sglprof._trace.torch.events import ns
from tests.support.kineto import (
    BASE,
    KERNELS,
    ROWS,
    Event,
    document,
    event,
    kernel,
    kineto_text,
    rows,
    write,
)

# Times -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("5", 5_000),
        ("5.002", 5_002),
        ('"5.002"', 5_002),
        ("4632854806531.629", 4_632_854_806_531_629),
        ("1711964646123456.789", 1_711_964_646_123_456_789),  # float64 would be 250 ns off
        ("-3", -3_000),
        ("1.5e3", 1_500_000),
        ("25E-4", 3),  # half up
        ("0.0004", 0),
        ("", None),
        ("null", None),
        ('"soon"', None),
        ("true", None),
        ("1e90", None),
        ("1" * 60, None),
        ("9" * 18, None),  # does not fit int64 once it is ns
    ],
)
def test_a_time_is_exact_or_none(text: str, expected: int | None) -> None:
    assert ns(text.encode()) == expected


def test_old_files_have_strings_whole_microseconds_and_other_words(tmp_path: Path) -> None:
    old = [
        {**kernel("gemm_kernel", "1650000000000010", "5"), "cat": "Kernel"},
        {**kernel("Memcpy HtoD (Pageable -> Device)", 1650000000000020, 3), "cat": "Memcpy"},
        {**kernel("Memset (Device)", 1650000000000030, 1), "cat": "Memset"},
        {**event("Runtime", "cudaLaunchKernel", 1650000000000000, 2), "args": {"correlation": 1}},
    ]
    doc = {"schemaVersion": 1, "traceEvents": old}  # absolute times: no base
    table = read_window(write(tmp_path, json.dumps(doc)))
    assert rows(table, 1_650_000_000_000_000_000) == [
        ("Memcpy HtoD (Pageable -> Device)", 20_000, 3_000),
        ("Memset (Device)", 30_000, 1_000),
        ("gemm_kernel", 10_000, 5_000),
    ]
    assert set(table.frame["kind"]) == {"kernel", "memcpy", "memset"}
    assert set(table.frame[table.frame["kind"] != "kernel"]["category"]) == {"memory"}


def test_the_display_unit_changes_nothing(tmp_path: Path) -> None:
    for unit in ("ms", "ns"):
        path = write(tmp_path, document(KERNELS, displayTimeUnit=unit))
        assert rows(read_window(path)) == ROWS


@pytest.mark.parametrize("base", ['"soon"', "1.5", "-1", "1" * 40, "[1]"])
def test_an_unreadable_base_time_is_told(tmp_path: Path, base: str) -> None:
    text = kineto_text(document(KERNELS)).replace(str(BASE), base)
    table = read_window(write(tmp_path, text))
    assert rows(table, 0) == ROWS
    assert any("baseTimeNanoseconds" in note for note in table.notes)


# Layouts -----------------------------------------------------------------------------------


def _sorted_keys(doc: Event) -> str:
    return json.dumps(doc, sort_keys=True)


LAYOUTS = {
    "kineto": kineto_text,
    "one line": json.dumps,
    "compact": lambda doc: json.dumps(doc, separators=(",", ":")),
    "one key per line": lambda doc: json.dumps(doc, indent=2),
    "tabs": lambda doc: json.dumps(doc, indent="\t"),
    "sorted keys": _sorted_keys,
    "CRLF": lambda doc: kineto_text(doc).replace("\n", "\r\n"),
    "BOM": lambda doc: "\ufeff" + kineto_text(doc),
    "events first": lambda doc: json.dumps({"traceEvents": doc["traceEvents"], **doc}),
    "white space": lambda doc: "\n \t" + kineto_text(doc) + "\n\n",
}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_are_the_same_table(tmp_path: Path, layout: str, packed: bool) -> None:
    text = LAYOUTS[layout](document(KERNELS, rank=0))
    table = read_window(write(tmp_path, text, "1-TP-0.trace.json" + ".gz" * packed))
    assert (rows(table), table.ranks, table.notes) == (ROWS, ("TP0",), ())


@pytest.mark.parametrize("layout", ["events first", "sorted keys"])
def test_a_rank_may_stand_after_the_events(tmp_path: Path, layout: str) -> None:
    path = write(tmp_path, LAYOUTS[layout](document(KERNELS, rank=1)), "trace.json")
    assert read_window(path).ranks == ("TP1",)


# Invalid JSON ------------------------------------------------------------------------------

FUNCTION = event("python_function", "NAME", 1, 2, 5, 5, **{"Python id": 1})
BROKEN_NAMES = {
    "quotes": 'torch/_ops.py(12): __call__ "quoted" name',
    "backslash": r"C:\qqq\file.py(3): f",
    "only a backslash": "f \\",
    "control": "f\x01\x1b[0m",
    "line break": "two\nlines",
    "braces": 'f("{"ph": "X", "cat": "x"")',
    "bracket": 'f("]")',
}


@pytest.mark.parametrize("case", BROKEN_NAMES)
@pytest.mark.parametrize("place", [0, 1, 2])
def test_bad_python_names_leave_the_gpu_events(tmp_path: Path, case: str, place: int) -> None:
    events = [*KERNELS[:place], FUNCTION, *KERNELS[place:]]
    text = kineto_text(document(events, rank=0)).replace("NAME", BROKEN_NAMES[case])
    with pytest.raises(json.JSONDecodeError):
        json.loads(text)
    table = read_window(write(tmp_path, text))
    assert rows(table) == ROWS
    assert "invalid JSON" in table.notes[0]
    assert not table.partial


def test_bad_utf8(tmp_path: Path) -> None:
    data = kineto_text(document([FUNCTION, *KERNELS])).encode().replace(b"NAME", b"f\xff\xfe\xc3")
    assert rows(read_window(write(tmp_path, data))) == ROWS


@pytest.mark.parametrize("value", ["inf", "-inf", "nan", "NaN", "Infinity", "-Infinity"])
def test_bare_infinities_and_nan(tmp_path: Path, value: str) -> None:
    text = kineto_text(document([{**KERNELS[0], "args": {"occupancy": 0.25}}, KERNELS[1]]))
    table = read_window(write(tmp_path, text.replace("0.25", value)))
    assert rows(table) == ROWS


def test_trailing_commas(tmp_path: Path) -> None:
    text = kineto_text(document(KERNELS))
    broken = text.replace("  }\n  ],", "  },\n  ],")
    assert broken != text
    assert rows(read_window(write(tmp_path, broken))) == ROWS
    inner = text.replace('"correlation": 1', '"correlation": 1,')
    assert rows(read_window(write(tmp_path, inner))) == ROWS


def test_a_name_may_hold_what_mends_others(tmp_path: Path) -> None:
    """Only what is broken is mended: the same texts in sound events stay as they are."""
    name = "f(a: inf, b: nan,)] \\\\ \\u0001"
    events = [FUNCTION, kernel(name, 1, 2)]
    text = kineto_text(document(events)).replace('"NAME"', '"a"b"')
    assert rows(read_window(write(tmp_path, text))) == [(name, 1_000, 2_000)]


@pytest.mark.parametrize(
    ("old", "new"), [('"gemm_kernel"', '"gemm"kernel"'), ('"cat": "kernel"', '"cat": kernel"')]
)
def test_an_unreadable_gpu_event_is_refused(tmp_path: Path, old: str, new: str) -> None:
    text = kineto_text(document([FUNCTION, *KERNELS, FUNCTION])).replace(old, new, 1)
    with pytest.raises(TraceError, match="GPU event"):
        read_window(write(tmp_path, text))


def test_invalid_json_in_an_unknown_layout_is_refused(tmp_path: Path) -> None:
    text = _sorted_keys(document([FUNCTION, *KERNELS])).replace("NAME", '"')
    with pytest.raises(TraceError, match="not valid JSON") as caught:
        read_window(write(tmp_path, text))
    assert "with_stack=False" in caught.value.hint


def test_a_long_unclosed_name_is_quick(tmp_path: Path) -> None:
    """A pattern over strings that is not unrolled runs for minutes on this."""
    text = (
        kineto_text(document(KERNELS))[:-60]
        + ',{"ph": "X", "cat": "cpu_op", "name": "'
        + ('a\\\\\\"' * 200_000)
    )
    with pytest.raises(TraceTruncated):
        read_window(write(tmp_path, text))


# Which events count ------------------------------------------------------------------------


def test_annotations_on_the_gpu_are_never_added(tmp_path: Path) -> None:
    spans = [event("gpu_user_annotation", f"step[DECODE bs={n}]", 0, 100, 0, 7) for n in (1, 2)]
    table = read_window(write(tmp_path, document([*spans, *KERNELS])))
    assert rows(table) == ROWS


def test_an_argument_called_kernel_is_none(tmp_path: Path) -> None:
    launch = event("cuda_runtime", "hipLaunchKernel", 1, 2, kernel="kernel", correlation=1)
    launch["args"]["cat"] = "kernel"
    table = read_window(write(tmp_path, document([launch, *KERNELS])))
    assert rows(table) == ROWS


def test_only_complete_events_count(tmp_path: Path) -> None:
    others = [{**KERNELS[0], "ph": phase} for phase in ("M", "i", "B", "s", None)]
    table = read_window(write(tmp_path, document([*others, *KERNELS])))
    assert rows(table) == ROWS


def test_events_of_odd_shapes_do_no_harm(tmp_path: Path) -> None:
    odd: list[Event] = [
        {"ph": "M", "cat": None, "name": None, "pid": "Spans", "tid": ""},
        {"ph": "X", "cat": "Trace", "name": 5, "pid": "[TP-x] 83", "tid": None, "ts": 1, "dur": 2},
        {**kernel("odd_args", 40, 1), "args": [1, 2]},
        {**kernel("odd_stream", 50, 1), "args": {"stream": "default", "correlation": 2**70}},
        {"name": "bare"},
    ]
    table = read_window(write(tmp_path, json.dumps(document([*odd, *KERNELS]))))
    assert rows(table) == [*ROWS[:1], ("odd_args", 40_000, 1_000), ("odd_stream", 50_000, 1_000),
                           *ROWS[1:]]  # fmt: skip
    assert set(table.frame["stream"]) == {7, -1}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"dur": None}, "1 kernel events with a missing or unreadable time"),
        ({"dur": -1}, "1 kernel events with a negative time"),
        ({"dur": "soon"}, "missing or unreadable"),
        ({"ts": None}, "missing or unreadable"),
    ],
)
def test_missing_and_negative_times_are_counted(
    tmp_path: Path, change: dict[str, Any], words: str
) -> None:
    bad = {key: value for key, value in {**KERNELS[0], **change}.items() if value is not None}
    table = read_window(write(tmp_path, document([bad, *KERNELS])))
    assert rows(table) == ROWS
    assert any(words in note and note.startswith("TP0: skipped") for note in table.notes)


def test_graph_kernels_have_no_launch(tmp_path: Path) -> None:
    nodes = [kernel("graph_gemm", 30 + n, 0.5, **{"graph node id": 8 + n}) for n in range(3)]
    for node in nodes:
        del node["args"]["device"]
    assert len(rows(read_window(write(tmp_path, document([*KERNELS, *nodes]))))) == 5


# Impossible durations ----------------------------------------------------------------------


def test_impossible_durations_are_excluded_and_told(tmp_path: Path) -> None:
    bad = kernel("gemm_kernel", 5, 1000, correlation=9)
    table = read_window(write(tmp_path, document([bad, *KERNELS])))
    assert rows(table) == ROWS
    assert "excluded 1 kernels (1.000 ms)" in table.notes[0]


def test_a_kernel_that_contains_a_later_one_behind_an_overlap_is_impossible(tmp_path: Path) -> None:
    events = [kernel("long", 0, 50), kernel("overlaps", 10, 60), kernel("inside", 20, 5)]
    table = read_window(write(tmp_path, document(events)))
    assert rows(table) == [("inside", 20_000, 5_000)]
    assert "excluded 2 kernels" in table.notes[0]


def test_dependent_launch_overlaps_stay(tmp_path: Path) -> None:
    events = [kernel(f"pdl{n}", 10 * n, 12) for n in range(8)]
    table = read_window(write(tmp_path, document(events)))
    assert (len(table.frame), table.notes) == (8, ())


@pytest.mark.parametrize(
    "second",
    [
        kernel("inside", 20, 5, stream=8),
        {**kernel("inside", 20, 5, pid=1), "args": {"stream": 7, "device": 1}},
        {**kernel("inside", 20, 5), "args": {}},
        {**kernel("inside", 20, 5), "args": {"stream": 7}},
    ],
    ids=["other stream", "other device", "no stream", "no device"],
)
def test_other_streams_and_devices_may_overlap(tmp_path: Path, second: Event) -> None:
    table = read_window(write(tmp_path, document([kernel("long", 0, 50), second])))
    assert (len(table.frame), table.notes) == (2, ())


def test_nodes_of_a_graph_may_contain_each_other(tmp_path: Path) -> None:
    events = [kernel("long", 0, 50, **{"graph node id": 3}), kernel("inside", 20, 5)]
    assert len(read_window(write(tmp_path, document(events))).frame) == 2
