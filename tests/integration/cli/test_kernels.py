"""`sglprof kernels` as a user runs it, against independent sums."""

from __future__ import annotations

import csv
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pytest_sglprof._cli import kernels
from pytest_sglprof._cli.main import main
from tests.support import plain_traces as plain

MI300X = "torch/sglang-mi300x/sglang_Qwen3-8B_decode.json.gz"
TRACE = {
    "baseTimeNanoseconds": 0,
    "traceEvents": [
        {"ph": "X", "cat": "kernel", "name": name, "ts": ts, "dur": dur, "pid": 0, "tid": stream,
         "args": {"stream": stream}}
        for name, ts, dur, stream in (
            ("fused_moe_kernel", 1, 5, 7), ("fused_moe_kernel", 10, 6.5, 7), ("zzz", 20, 1, 8),
        )
    ],
}  # fmt: skip

Output = pytest.CaptureFixture[str]


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    path = tmp_path / "1-TP-0.trace.json"
    path.write_text(json.dumps(TRACE))
    return path


def test_json_is_a_list_of_plain_objects(trace: Path, capsys: Output) -> None:
    assert main(["kernels", str(trace), "--format", "json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out) == [
        {"rank": "TP0", "name": "fused_moe_kernel", "category": "moe", "count": 2,
         "total_ns": 11_500},
        {"rank": "TP0", "name": "zzz", "category": "other", "count": 1, "total_ns": 1_000},
    ]  # fmt: skip
    assert err == ""


def test_json_of_a_real_trace_equals_an_independent_sum(shared_data: Path, capsys: Output) -> None:
    path = shared_data / MI300X
    status = main(["kernels", str(path), "--by", "rank,full_name,category", "--format", "json"])
    assert status == 0
    rows = json.loads(capsys.readouterr().out)
    expected = plain.totals([(row[0], row[3]) for row in plain.gpu_rows(path)])
    assert {row["full_name"]: (row["count"], row["total_ns"]) for row in rows} == expected
    assert {row["rank"] for row in rows} == {"TP0"}
    totals = [row["total_ns"] for row in rows]
    assert totals == sorted(totals, reverse=True)


def test_a_folder_of_real_ranks(shared_data: Path, capsys: Output) -> None:
    folder = shared_data / "torch/sglang-cpu-tp2dp2"
    assert main(["kernels", str(folder), "--by", "rank,category", "--format", "json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert list(dict.fromkeys(row["rank"] for row in rows)) == [
        "DP0 TP0", "DP0 TP1", "DP1 TP0", "DP1 TP1",
    ]  # fmt: skip
    expected = sum(ns for file in folder.iterdir() for _, ns in plain.cpu_totals(file).values())
    assert sum(row["total_ns"] for row in rows) == expected


@pytest.mark.parametrize(
    ("by", "expected"),
    [
        ("rank,category", [("TP0", "moe", 2, 11_500), ("TP0", "other", 1, 1_000)]),
        ("category", [("moe", 2, 11_500), ("other", 1, 1_000)]),
        (" stream , kind ", [("7", "kernel", 2, 11_500), ("8", "kernel", 1, 1_000)]),
        ("step,stage", [("-1", "unknown", 3, 12_500)]),
    ],
)
def test_csv_and_keys(
    trace: Path, capsys: Output, by: str, expected: list[tuple[object, ...]]
) -> None:
    assert main(["kernels", str(trace), "--by", by, "--format", "csv"]) == 0
    head, *rows = csv.reader(io.StringIO(capsys.readouterr().out))
    assert head == [*(key.strip() for key in by.split(",")), "count", "total_ns"]
    assert rows == [[str(value) for value in row] for row in expected]


NSYS = ("mfu_2gpu_before", "mfu_2gpu_after", "saxpy_perlmutter0", "sglang_cpu_tp2_win_b")


@pytest.mark.parametrize("options", [
    [], ["--by", "category"], ["--by", "kind,full_name"], ["--uncategorised"],
    ["--by", "full_name,rank,kind", "--format", "csv"],
])  # fmt: skip
@pytest.mark.parametrize("name", NSYS)
def test_nsys_totals_say_what_the_rows_say(
    shared_data: Path,
    capsys: Output,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    options: list[str],
) -> None:
    words = ["kernels", str(shared_data / "nsys" / f"{name}.sqlite"), "--format", "json", *options]
    assert main(words) == 0
    from_sums = capsys.readouterr()
    monkeypatch.setattr(kernels, "_from_sums", lambda *_: None)
    assert main(words) == 0
    assert capsys.readouterr() == from_sums


def test_steps_and_streams_of_an_nsys_report_come_from_its_rows(
    shared_data: Path, capsys: Output
) -> None:
    path = shared_data / "nsys" / "mfu_2gpu_after.sqlite"
    assert main(["kernels", str(path), "--by", "rank,stream", "--format", "json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [(row["rank"], row["stream"]) for row in rows] == [("GPU0", 7), ("GPU1", 15)]


def test_nsys_totals_need_no_pandas(shared_data: Path, project_root: Path) -> None:
    path = shared_data / "nsys" / "mfu_2gpu_after.sqlite"
    code = (
        "import sys\nfrom pytest_sglprof._cli.main import main\n"
        f"assert main(['kernels', {str(path)!r}]) == 0\n"
        "assert not {'pandas', 'numpy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=project_root, capture_output=True)


@pytest.mark.parametrize(("given", "during"), [({}, "1"), ({"OMP_NUM_THREADS": "3"}, None)])
def test_numpy_starts_no_threads_unless_somebody_says_how_many(
    trace: Path, project_root: Path, given: dict[str, str], during: str | None
) -> None:
    code = (
        "import os, sys\nfrom pytest_sglprof._cli.main import main\nbefore = {**os.environ}\n"
        "class Watch:\n"
        "    def find_spec(name, *_):\n"
        "        if name == 'numpy': print([os.environ.get('OPENBLAS_NUM_THREADS')])\n"
        "sys.meta_path.insert(0, Watch)\n"
        f"assert main(['kernels', {str(trace)!r}]) == 0\n"
        "assert os.environ == before"
    )
    unset = {key: value for key, value in os.environ.items() if not key.endswith("_NUM_THREADS")}
    done = subprocess.run(
        [sys.executable, "-c", code],
        check=True,
        cwd=project_root,
        capture_output=True,
        text=True,
        env={**unset, **given},
    )
    assert done.stdout.startswith(f"{[during]}\n")


def test_table_for_people(trace: Path, capsys: Output) -> None:
    assert main(["kernels", str(trace)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["rank", "name", "category", "count", "total", "ms"]
    assert [line.split() for line in lines[-2:]] == [
        ["TP0", "fused_moe_kernel", "moe", "2", "0.011"],
        ["TP0", "zzz", "other", "1", "0.001"],
    ]


def test_uncategorised(trace: Path, capsys: Output) -> None:
    assert main(["kernels", str(trace), "--uncategorised", "--format", "json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert row == {"name": "zzz", "full_name": "zzz", "count": 1, "total_ns": 1_000,
                   "share": pytest.approx(1.0 / 12.5)}  # fmt: skip
    assert main(["kernels", str(trace), "--uncategorised"]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert " ".join(last.split()) == "zzz zzz 1 0.001 8.00 %"
    assert main(["kernels", str(trace), "--uncategorised", "--by", "rank", "--format", "csv"]) == 0
    assert capsys.readouterr().out == "rank,count,total_ns,share\nTP0,1,1000,0.08\n"


def test_own_categories_of_the_configuration(
    trace: Path, capsys: Output, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    config = '[[category]]\nname = "gemm"\npattern = "^z+$"\n'
    (tmp_path / "sglprof.toml").write_text(config)
    (tmp_path / "other.toml").write_text(config.replace("gemm", "norm"))
    by = ["kernels", str(trace), "--by", "category", "--format", "csv"]
    assert main([*by, "--uncategorised"]) == 0
    assert capsys.readouterr().out == "category,count,total_ns,share\n"
    for more, expected in (([], "gemm"), (["--config", str(tmp_path / "other.toml")], "norm")):
        assert main([*by, *more]) == 0
        assert f"{expected},1,1000" in capsys.readouterr().out
    assert main([*by, "--config", str(tmp_path / "none.toml")]) == 2


def test_the_kernel_that_begins_a_step(tmp_path: Path, capsys: Output) -> None:
    path = tmp_path / "1-TP-0.trace.json"
    event = TRACE["traceEvents"][0]
    events = [
        {**event, "name": name, "ts": 10 * n + at}
        for n in range(4)
        for at, name in ((0, "a"), (3, "b"))
    ]
    path.write_text(json.dumps({"baseTimeNanoseconds": 0, "traceEvents": events}))
    by = ["kernels", str(path), "--by", "step", "--format", "csv"]
    assert main(by) == 0
    assert capsys.readouterr().out.splitlines()[1:] == ["-1,8,40000"]
    assert main([*by, "--step-delimiter", "^a$"]) == 0
    out, err = capsys.readouterr()
    assert sorted(out.splitlines()[1:]) == ["-1,2,10000", *(f"{n},2,10000" for n in range(3))]
    assert "steps are 3 repetitions" in err
    assert main([*by, "--step-delimiter", "("]) == 2


def test_json_follows_its_schema(trace: Path, capsys: Output) -> None:
    import jsonschema

    import pytest_sglprof

    path = Path(pytest_sglprof.__file__).parent / "schemas/kernels.schema.json"
    schema = json.loads(path.read_text())
    for more in ([], ["--uncategorised"], ["--by", "rank,stage,step,stream,kind,category"]):
        assert main(["kernels", str(trace), "--format", "json", *more]) == 0
        jsonschema.validate(json.loads(capsys.readouterr().out), schema)


def test_nothing_is_an_answer_with_a_note(tmp_path: Path, capsys: Output) -> None:
    path = tmp_path / "1-TP-0.trace.json"
    path.write_text(json.dumps({"traceEvents": []}))
    for form, empty in (("json", "[]\n"), ("csv", "rank,name,category,count,total_ns\n")):
        assert main(["kernels", str(path), "--format", form]) == 0
        out, err = capsys.readouterr()
        assert out == empty
        assert "no activity in" in err
    assert main(["kernels", str(path)]) == 0


def test_notes_go_beside_the_table(trace: Path, capsys: Output) -> None:
    doc = json.loads(trace.read_text())
    doc["traceEvents"][0]["dur"] = -1
    trace.write_text(json.dumps(doc))
    assert main(["kernels", str(trace), "--format", "json"]) == 0
    out, err = capsys.readouterr()
    assert [row["count"] for row in json.loads(out)] == [1, 1]
    assert err.startswith("note: TP0: skipped 1 kernel events with a negative time")


def test_a_cut_file_is_refused_unless_allowed(trace: Path, capsys: Output) -> None:
    trace.write_text(trace.read_text()[:-60])
    assert main(["kernels", str(trace)]) == 2
    assert "ends in the middle" in capsys.readouterr().err
    assert main(["kernels", str(trace), "--allow-partial", "--format", "json"]) == 0
    out, err = capsys.readouterr()
    assert [row["count"] for row in json.loads(out)] == [2]
    assert "truncated" in err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["kernels"], "PATH"),
        (["kernels", "none.json"], "none.json does not exist"),
        (["kernels", "{trace}", "--by", "rank,colour"], "unknown key colour"),
        (["kernels", "{trace}", "--by", ","], "none given"),
        (["kernels", "{trace}", "--format", "xml"], "xml"),
        (["kernels", "{trace}", "{trace}"], "given twice"),
        (["kernels", "{trace}", "--nonsense"], "--nonsense"),
    ],
)
def test_what_is_wrong_is_said_with_status_2(
    trace: Path, capsys: Output, words: list[str], message: str
) -> None:
    assert main([word.format(trace=trace) for word in words]) == 2
    out, err = capsys.readouterr()
    assert message in err
    assert out == ""


def test_as_a_program(trace: Path) -> None:
    command = [sys.executable, "-m", "pytest_sglprof", "kernels", str(trace), "--format", "json"]
    root = Path(__file__).parents[3]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=root)
    assert len(json.loads(done.stdout)) == 2
