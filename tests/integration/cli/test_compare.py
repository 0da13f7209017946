"""`sglprof compare` as a user runs it: against independent SQL, and what it refuses."""

from __future__ import annotations

import csv
import io
import json
import shutil
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import msgspec
import pytest

from pytest_sglprof._analysis.strata import GroupStrata
from pytest_sglprof._baselines.records import (
    RECORD_FORMAT,
    AcceptedLife,
    Baseline,
    LifeRecord,
)
from pytest_sglprof._cli.main import main
from pytest_sglprof._report.results import write_results
from pytest_sglprof._trace.kernel_names import normalise
from tests.support.kernel_tables import build
from tests.support.lives import key, provenance
from tests.support.windows import as_run, run, window

Output = pytest.CaptureFixture[str]
BEFORE, AFTER = "nsys/mfu_2gpu_before.sqlite", "nsys/mfu_2gpu_after.sqlite"


def sums(export: Path) -> dict[str, tuple[int, int]]:
    """Calls and ns of each kernel, over both ranks, by SQL alone."""
    query = (
        "SELECT s.value, COUNT(*), SUM(k.end - k.start) FROM CUPTI_ACTIVITY_KIND_KERNEL k "
        "JOIN StringIds s ON s.id = k.demangledName GROUP BY s.value"
    )
    found: dict[str, tuple[int, int]] = {}
    with closing(sqlite3.connect(f"file:{export}?immutable=1", uri=True)) as connection:
        for name, count, ns in connection.execute(query):
            calls, total = found.get(normalise(name), (0, 0))
            found[normalise(name)] = (calls + count, total + ns)
    return found


def compared(capsys: Output, *words: str | Path, status: int = 0) -> dict[str, Any]:
    assert main(["compare", *map(str, words), "--format", "json"]) == status
    document: dict[str, Any] = json.loads(capsys.readouterr().out)
    return document


def test_figures_of_two_exports_equal_independent_sums(shared_data: Path, capsys: Output) -> None:
    old, new = sums(shared_data / BEFORE), sums(shared_data / AFTER)
    document = compared(capsys, shared_data / BEFORE, shared_data / AFTER, "--scope", "all")
    ((stage,),) = [pair["stages"] for pair in document["pairs"]]
    rows = {row["name"]: row for row in stage["kernels"]}
    assert {*old, *new} <= {*rows}
    lost = 0.0
    for name in {*old, *new}:
        (calls_before, ns_before), (calls_now, ns_now) = old[name], new[name]
        before, now = ns_before / calls_before, ns_now / calls_now
        weight = (calls_before + calls_now) / 2 / 2  # of both windows, of two ranks
        row = rows[name]
        assert row["calls"] == [calls_before / 2, calls_now / 2]
        assert row["before_ns"] == pytest.approx(before, rel=1e-9)
        assert row["now_ns"] == pytest.approx(now, rel=1e-9)
        assert row["lost_ns"] == pytest.approx((now - before) * weight, rel=1e-6, abs=1e-3)
        lost += (now - before) * weight * (row["category"] != "communication")
    assert stage["compute"]["lost_ns"] == pytest.approx(lost, rel=1e-6)
    assert [row["lost_ns"] for row in stage["kernels"]] == sorted(
        (row["lost_ns"] for row in stage["kernels"]), reverse=True
    )


def test_an_export_against_itself_is_within_every_limit(shared_data: Path, capsys: Output) -> None:
    document = compared(capsys, shared_data / BEFORE, shared_data / BEFORE, "--limit", "1")
    assert document["verdict"] == "pass"
    (stage,) = document["pairs"][0]["stages"]
    assert {row["lost_ns"] for row in stage["kernels"]} == {0.0}


def of_model(export: Path, model: str, target: Path) -> Path:
    """A copy of an export that tells its GPU."""
    shutil.copyfile(export, target)
    target.chmod(0o644)
    with closing(sqlite3.connect(target)) as connection:
        connection.execute("CREATE TABLE TARGET_INFO_GPU (id INTEGER, name TEXT)")
        connection.execute("INSERT INTO TARGET_INFO_GPU VALUES (0, ?)", (model,))
        connection.commit()
    return target


def test_exports_of_two_models_of_gpu_are_not_compared(
    shared_data: Path, tmp_path: Path, capsys: Output
) -> None:
    old = of_model(shared_data / BEFORE, "NVIDIA A100-SXM4-80GB", tmp_path / "old.sqlite")
    new = of_model(shared_data / AFTER, "NVIDIA H100 80GB HBM3", tmp_path / "new.sqlite")
    document = compared(capsys, old, new, "--limit", "1.5", status=3)
    reason = "GPU NVIDIA A100-SXM4-80GB before and NVIDIA H100 80GB HBM3 now"
    assert document["reason"] == reason
    assert document["pairs"][0]["stages"] == []
    assert main(["compare", str(old), str(new)]) == 3
    assert capsys.readouterr().out.endswith(f"inconclusive: {reason}\n")
    same = of_model(shared_data / AFTER, "NVIDIA A100-SXM4-80GB", tmp_path / "same.sqlite")
    assert compared(capsys, old, same)["verdict"] == "measured"


def test_one_life_each_gives_no_interval_and_says_so(shared_data: Path, capsys: Output) -> None:
    assert main(["compare", str(shared_data / BEFORE), str(shared_data / AFTER)]) == 0
    out = capsys.readouterr().out
    assert "how much lives of one version differ is not known" in out
    assert out.endswith("measured: compute takes 1.003 x the time before\n")


def test_a_torch_trace_is_not_compared_with_an_export(shared_data: Path, capsys: Output) -> None:
    trace = shared_data / "torch" / "sglang-cpu-tp2"
    document = compared(capsys, trace, shared_data / BEFORE, status=3)
    assert "profiler torch before and nsys now" in document["reason"]


# Windows of runs. The tables have the steps that a stand-in's window would have.


def moe(factor: float) -> Callable[[str, str, int], float]:
    """The scale of a table whose category `moe` takes so many times its time, on every rank."""
    return lambda rank, category, step: factor if category == "moe" else 1.0


@pytest.fixture
def made(tmp_path: Path) -> Callable[..., Path]:
    """Writes a run with one window a table."""

    def make(name: str, *windows: dict[str, Any]) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        write_results(as_run(run(windows)), folder / "results.json")
        return folder

    return make


def test_a_slower_kernel_fails_the_limit_and_leads_the_list(
    made: Callable[..., Path], capsys: Output
) -> None:
    old, new = made("old", window(build())), made("new", window(build(scale=moe(1.5))))
    document = compared(capsys, old, new, "--limit", "1.02", status=1)
    stage = document["pairs"][0]["stages"][0]
    assert stage["kernels"][0]["category"] == "moe"
    assert stage["kernels"][0]["ratio"] == pytest.approx(1.5, rel=0.05)
    assert "takes" in document["reason"]
    assert "limit 1.02" in document["reason"]
    assert compared(capsys, old, new, "--limit", "1.02", "--scope", "gemm")["verdict"] == "pass"
    assert compared(capsys, new, old, "--limit", "1.02")["verdict"] == "pass"
    assert main(["compare", str(old), str(new), "--stage", "prefill", "--limit", "1.02"]) == 3
    assert "neither has steps in prefill" in capsys.readouterr().out
    assert main(["compare", str(old), str(new), "--format", "csv"]) == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [row["name"] for row in rows] == [row["name"] for row in stage["kernels"]]


def change_kernel(document: dict[str, Any], kernel: str, **changes: Any) -> dict[str, Any]:
    """A window whose kernel `kernel` has another name or another number of calls."""
    for group in document["strata"]:
        at = [name for _, name in group["kernels"]].index(kernel)
        if "name" in changes:
            group["kernels"][at][1] = changes["name"]
        for stratum in group["strata"] if "calls" in changes else ():
            stratum["calls"][at] *= changes["calls"]
    return document


def test_kernels_that_appear_vanish_or_change_their_calls_are_named(
    made: Callable[..., Path], capsys: Output
) -> None:
    before = window(build())
    names = [kernel[1] for kernel in before["strata"][0]["kernels"]]
    now = change_kernel(window(build()), names[0], name="another_kernel")
    now = change_kernel(now, names[1], calls=2)
    document = compared(capsys, made("old", before), made("new", now), "--scope", "all")
    kernels = document["pairs"][0]["stages"][0]["kernels"]
    words = {row["name"]: row["word"] for row in kernels if row["word"]}
    assert words == {names[0]: "gone", "another_kernel": "new", names[1]: "more calls"}


def test_several_windows_are_paired_by_name_and_the_rest_is_named(
    made: Callable[..., Path], capsys: Output
) -> None:
    one, two = window(build()), window(build(), window_id="w2")
    two["name"], one["name"] = "prefill", "steady"
    extra = {**two, "id": "w3", "name": "later"}
    old, new = made("old", one, two), made("new", two, one, extra)
    document = compared(capsys, old, new)
    assert [(pair["old"], pair["new"]) for pair in document["pairs"]] == [
        ("w2", "w2"),
        ("w1", "w1"),
    ]
    assert document["alone"] == ["w3: only now"]
    assert len(compared(capsys, old, new, "--window", "prefill")["pairs"]) == 1
    assert main(["compare", str(old), str(new), "--window", "nothing"]) == 2
    assert "choose with --window: w1, w2" in capsys.readouterr().err


def test_what_speaks_against_a_window_is_named_with_both_values(
    made: Callable[..., Path], capsys: Output
) -> None:
    here = window(build())
    cases = [
        ({"standin": True}, "server SGLang before and the stand-in now"),
        ({"backend": "nsys"}, "profiler torch before and nsys now"),
        ({"run": {"GPU": "NVIDIA H200"}}, "GPU NVIDIA H100 before and NVIDIA H200 now"),
        ({"partial": True}, "w1: it was read from a truncated trace"),
    ]
    old = made("old", {**here, "run": {"GPU": "NVIDIA H100", "CUDA driver": "13000"}})
    for at, (changes, reason) in enumerate(cases):
        document = compared(capsys, old, made(f"new{at}", {**here, **changes}), status=3)
        assert document["reason"] == reason
    driver = made("driver", {**here, "run": {"GPU": "NVIDIA H100", "CUDA driver": "13010"}})
    document = compared(capsys, old, driver)
    assert "CUDA driver 13000 before, 13010 now" in document["pairs"][0]["notes"]


# Baselines.

KEY = key(
    test="tests/test_a.py::test_b[x|y]",
    gpu="",
    model="Meta/Llama-8B",
    kv_dtype="",
    sizes={"dp": 1, "tp": 2},  # as files of baselines have them: sorted
    load="",
    server="",
)


def life(table: Any, number: int) -> LifeRecord:
    return LifeRecord(
        format=RECORD_FORMAT,
        id=f"r{number}",
        life=f"l{number}",
        run="r",
        recorded="2026-11-29T03:00:00Z",
        key=KEY,
        groups=msgspec.convert(window(table)["strata"], tuple[GroupStrata, ...]),
        load=None,
        provenance=provenance(host="h5", versions={"SGLang": "0.5.22"}, load={}),
        verdict="pass",
    )


def test_a_baseline_is_the_mean_of_the_lives_of_its_last_level(
    made: Callable[..., Path], tmp_path: Path, capsys: Output
) -> None:
    tables = [build(scale=moe(scale)) for scale in (9.0, 1.0, 1.2)]
    lives = tuple(
        AcceptedLife(record=life(table, at), accepted="2026-11-29T04:00:00Z", begins_level=at == 1)
        for at, table in enumerate(tables)
    )
    file = tmp_path / "baseline.json"
    file.write_bytes(
        msgspec.json.encode(Baseline(format=RECORD_FORMAT, key=KEY, lives=lives), order="sorted")
    )
    new = made("new", window(build(scale=moe(1.1))))
    path = "/hub/models--Meta--Llama-8B/snapshots/1f3a"  # where the key has the model's name
    text = (new / "results.json").read_text().replace('"model": ""', f'"model": "{path}"')
    assert path in text
    document = json.loads(text)
    assert len(document["servers"]) == 1
    document["servers"][0]["sizes"] = {"tp": 2, "dp": 1}  # as results have them
    (new / "results.json").write_text(json.dumps(document))
    assert main(["compare", str(file), str(new)]) == 0
    assert f"now:    {document['windows'][0]['id']} of {document['run']['id']}" in (
        capsys.readouterr().out.splitlines()
    )
    document = compared(capsys, file, new)
    pair = document["pairs"][0]
    assert pair["lives"] == [2, 1]
    (slow,) = (row for row in pair["stages"][0]["kernels"] if row["category"] == "moe")
    assert slow["before_ns"] == pytest.approx(660_000)
    assert slow["ratio"] == pytest.approx(1.0, rel=0.02)  # 1.1 against the mean of 1.0 and 1.2
    assert "Means of 2 and 1 server lives" in pair["notes"][0]


def test_wrong_usage_is_not_a_verdict(tmp_path: Path, capsys: Output) -> None:
    assert main(["compare", str(tmp_path / "none"), str(tmp_path / "neither")]) == 2
    assert main(["compare", "a", "b", "--limit", "0.9"]) == 2
    assert main(["compare", "a"]) == 2
    assert main(["compare", "a", "b", "--scope", "atention"]) == 2
    assert "did you mean attention?" in capsys.readouterr().err
    capsys.readouterr()
