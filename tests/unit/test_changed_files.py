"""What changed files have shown, in readers of all rooms: an error of this package, in no time."""

from __future__ import annotations

import json
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pytest_sglprof import _limits as limits
from pytest_sglprof._baselines.store import BaselineError, moment
from pytest_sglprof._bench_serving.command import parse_result
from pytest_sglprof._bench_serving.shapes import batch_result
from pytest_sglprof._cli.main import main
from pytest_sglprof._config.load import find_config, load_config, position
from pytest_sglprof._errors import LoadError, NotATrace, SettingsError, SglprofError, TraceError
from pytest_sglprof._report.model import unix_ns
from pytest_sglprof._server.death import explain_status, reason_of
from pytest_sglprof._server.log_lines import EntryReader, read_batch
from pytest_sglprof._trace.beside import with_files_beside
from pytest_sglprof._trace.kernel_names import normalise
from pytest_sglprof._trace.nsys.report import read_report
from pytest_sglprof._trace.read import read_window
from pytest_sglprof._trace.torch.events import FileFacts
from pytest_sglprof._trace.torch.scan import read_footer
from tests.support.kineto import KERNELS, document, kernel, write
from tests.support.nsys_exports import STRINGS, make_export, to_parquet
from tests.support.nsys_exports import kernel as row

STAMP = "[2026-11-24 03:10:52 DP0 TP0]"


@pytest.fixture
def at_once() -> Iterator[None]:
    """The test takes no more than 2 s of CPU; what is tested here took minutes, or for ever."""
    begin = time.process_time()
    yield
    assert time.process_time() - begin < 2


@pytest.mark.usefixtures("at_once")
def test_a_table_whose_head_has_no_end(tmp_path: Path) -> None:
    path = tmp_path / "wide.csv"
    path.write_text(",".join(f"column {number}" for number in range(500)))
    with pytest.raises(NotATrace):
        read_window(path)
    path.write_text("a,b,c\r\n1,2,3\r\n")
    with pytest.raises(NotATrace, match="is a table"):
        read_window(path)


@pytest.mark.usefixtures("at_once")
def test_a_footer_of_many_ends() -> None:
    assert read_footer(b'"x": [{}], ' * 40_000, FileFacts()) is None


@pytest.mark.usefixtures("at_once")
@pytest.mark.parametrize(
    "line",
    [
        "Capture a" * 20_000,
        "1" * 200_000 + " batch",
        f"{STAMP} Decode batch" + ". a" * 60_000,
        f"x{STAMP} batch" * 10_000,
        f"{STAMP} [Expert Balancedness] " + "a" * 200_000,
        'x"GET a' * 30_000 + " batch",
    ],
    ids=lambda line: line[:20],
)
def test_a_long_line_of_a_log(line: str) -> None:
    for entry in EntryReader().read([line]):
        read_batch(entry)


@pytest.mark.usefixtures("at_once")
def test_the_reason_of_a_death_is_searched_in_long_lines() -> None:
    assert len(reason_of(["Assertion `" * 10_000, "Assertion `x' failed."], 12)) == 1


def test_the_code_of_a_rank_has_a_length() -> None:
    assert explain_status(1, ["exit code: -" + "9" * 5_000]) == ""
    assert "SIGKILL" in explain_status(1, ["exit code: -9"])


@pytest.mark.usefixtures("at_once")
@pytest.mark.parametrize(
    "name",
    [
        "void reduce_kernel<" + "ReduceOp<" * 5_000,
        "kernel_cutlass_x" + "object_at" * 7_000 + "!",
        "_Z" + "N1a" * 20_000,
        "a" * 65_000,
    ],
    ids=lambda name: name[:20],
)
def test_the_key_of_an_endless_name(name: str) -> None:
    assert 0 < len(normalise(name)) <= 16_400


# Configuration.


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (f"[[threshold]]\nmetric = 'slowdown'\nlimit = 1{'0' * 400}", "more than 64 bits"),
        (f"[trace]\nstep_delimiter = '{'(' * 5_000}'", "is not a regular expression"),
        (f"[server]\nargs = {'[' * 3_000}{']' * 3_000}", "nested too deeply"),
        ("x = 1\n" * 2, "not valid TOML"),
        ("[[threshold]]\nlimit = 'x'\n" * 100, "and 80 more"),
    ],
)
def test_a_configuration_is_refused(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "sglprof.toml"
    path.write_text(text)
    with pytest.raises(SettingsError) as caught:
        load_config(path)
    assert words in caught.value.what


@pytest.mark.parametrize("text", ["tool = 5", "tool = [1]", "[tool]\nother = 1"])
def test_a_pyproject_without_tools_is_passed_over(tmp_path: Path, text: str) -> None:
    (tmp_path / "pyproject.toml").write_text(text)
    assert find_config([tmp_path], tmp_path) is None
    assert load_config(tmp_path / "pyproject.toml") == {}


@pytest.mark.usefixtures("at_once")
def test_the_place_of_a_mistake_behind_long_values() -> None:
    lines = "".join(f'  "package-{number}>=1.0",\n' for number in range(5_000))
    text = f'# a\u2028b = "\n[project]\ndependencies = [\n{lines}]\n[gate]\n  min_steps = "x"\n'
    assert position(text, ("gate", "min_steps")) == (5_006, 3)


def test_the_settings_of_a_run_are_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    path = write(tmp_path, document(KERNELS, rank=0), "w/1-TP-0.trace.json")
    run = tmp_path / "run.json"
    run.write_text(json.dumps({"settings": {"threshold": [{"metric": "slowdown", "limt": 1}]}}))
    assert main(["kernels", str(path)]) == 2
    assert "unknown key limt (did you mean limit?)" in capsys.readouterr().err


# Results of drivers, baselines, documents.


@pytest.mark.parametrize(
    "line",
    [
        "[" * 100_000,
        '{"completed": 1e400, "duration": 1}',
        '{"completed": 1, "duration": NaN}',
        '{"completed": -1, "duration": 1}',
        f'{{"completed": 1{"0" * 400}, "duration": 1}}',
        '{"completed": 1, "duration": 1, "x": ' + "[" * 200 + "]" * 200 + "}",
    ],
    ids=lambda line: line[:40],
)
def test_a_result_of_the_driver_is_refused(line: str) -> None:
    with pytest.raises(LoadError, match="cannot be read"):
        parse_result(line, requested=1)


def test_a_result_of_the_driver_is_storable() -> None:
    line = (
        '{"completed": 1, "duration": 2, "ttfts": 5, "concurrency": 1%s, "a": "\\ud800", "b": 1%s}'
    )
    result = parse_result(line % ("0" * 400, "0" * 30), requested=1)
    assert (result.ttfts, result.concurrency) == ((), None)
    assert result.raw["a"] == "?"
    assert result.raw["b"] == "1" + "0" * 30


@pytest.mark.parametrize("changes", [{"latency": 0}, {"batch_size": 1e400}, {"output_len": None}])
def test_a_batch_without_possible_figures_is_refused(changes: dict[str, Any]) -> None:
    record = {"batch_size": 4, "output_len": 16, "latency": 0.5, **changes}
    with pytest.raises(LoadError, match="missing or impossible"):
        batch_result(record, ["driver"], 1.0)


def test_a_time_that_is_none() -> None:
    with pytest.raises(BaselineError, match="recorded at 'soon', which is no time"):
        moment("soon")
    assert moment("2026-11-24T06:08:42") == moment("2026-11-24T06:08:42Z")
    with pytest.raises(SglprofError, match="'2026-13-45' in the place of a time"):
        unix_ns("2026-13-45")


# What lies beside traces, and exports.


@pytest.mark.parametrize("kind", ["bomb", "no zip", "object", "text", "flat"])
def test_counts_of_experts_that_are_none_are_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setenv(limits.READ_GIB, "0.1")
    path = write(tmp_path, document([kernel("gemm", 10, 5)], rank=0))
    file = tmp_path / "experts.npz"
    arrays = {name: np.zeros((1, 1, 1, 1), np.int32) for name in ("passes", "counts", "logical")}
    arrays |= {"rank_rows": np.zeros(1, np.int64), "labels": np.array(["TP0"])}
    if kind == "bomb":
        with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as packed:
            packed.writestr("counts.npy", bytes(20_000_000))
    elif kind == "no zip":
        file.write_bytes(b"PK\x03\x04" + b"x" * 100)
    elif kind == "object":
        np.savez(file, **{**arrays, "counts": np.array([None])})
    elif kind == "text":
        np.savez(file, **{**arrays, "counts": np.array([[[["x"]]]])})
    else:
        np.savez(file, **arrays)
    table = with_files_beside(read_window(path), [path])
    assert len(table.experts) == 0
    assert "experts.npz is left out" in table.notes[-1]


def test_a_parquet_file_of_a_thousand_million_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [row(10 * at, 10 * at + 5) for at in range(200)]
    export = make_export(tmp_path / "x.sqlite", CUPTI_ACTIVITY_KIND_KERNEL=rows, StringIds=STRINGS)
    folder = to_parquet(export, tmp_path / "parquet")
    assert len(read_report(folder)[0].dur) == 200
    monkeypatch.setenv(limits.READ_GIB, "0.00001")
    with pytest.raises(TraceError, match=r"KERNEL\.parquet can only be read as a whole"):
        read_report(folder)
